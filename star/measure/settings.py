"""How models are measured on a device: at which size, context and precision. Plain values, without torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from star.config import ModelConfig

__all__ = ["CONTEXTS", "DTYPES", "MeasureSettings"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
CONTEXTS = {"cpu": (4096,), "cuda": (4096, 32768)}
"""Where none are given. Attention over a prompt of 32768 tokens takes a CPU minutes a model."""

_HEAD_DIMS = (64, 48, 32, 16, 8, 4)
_CONTEXT_AT_MOST = 1 << 22


@dataclass(frozen=True)
class MeasureSettings:
    """One sequence (batch 1) through an untrained model of the target size, on the device at hand.

    Attributes:
        width: of the models that are measured.
        head_dim: of their attention; None for 64, or the largest that fits.
        vocab_size: of embedding and head; None for that of the models that are searched.
        dtype: of weights, activations and caches; "auto" is float32 on a CPU and bfloat16 on a GPU.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        threads: of the CPU; None for torch's own number.
        contexts: tokens of the prompt, and in the cache while decoding; several, in rising order. Empty for
            `CONTEXTS` of the device.
        chunk: tokens of a prompt that are read at once, which bounds the memory that it takes.
        decode_steps: tokens that are timed one by one.
        repetitions: prompts that are timed; fewer where `seconds` are over.
        seconds: after which no further repetition begins, for each context.
        every: in a search, each of so many candidates is measured whole; 0 for none but the front.

    Raises:
        ValueError: a value out of range, in one line.
    """

    width: int = 768
    head_dim: int | None = None
    vocab_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    contexts: tuple[int, ...] = ()
    chunk: int = 4096
    decode_steps: int = 64
    repetitions: int = 3
    seconds: float = 60.0
    every: int = 10

    def __post_init__(self) -> None:
        for name, least, most in (
            ("chunk", 1, _CONTEXT_AT_MOST),
            ("decode_steps", 1, 100_000),
            ("repetitions", 1, 10_000),
            ("every", 0, 1_000_000),
        ):
            _require_integer(name, getattr(self, name), least, most)
        if self.threads is not None:
            _require_integer("threads", self.threads, 1, 4096)
        if isinstance(self.contexts, (str, int)):
            raise ValueError(f"measured contexts are {self.contexts!r}, take numbers of tokens")
        contexts = tuple(self.contexts)
        for context in contexts:
            _require_integer("context", context, 1, _CONTEXT_AT_MOST)
        if len(set(contexts)) < len(contexts):
            raise ValueError(f"measured contexts are {contexts}, take each number of tokens once")
        object.__setattr__(self, "contexts", tuple(sorted(contexts)))
        is_number = isinstance(self.seconds, (int, float)) and not isinstance(self.seconds, bool)
        if not (is_number and 0 <= self.seconds < math.inf):
            raise ValueError(f"measured seconds is {self.seconds!r}, takes a number of at least 0")
        if self.dtype not in DTYPES:
            raise ValueError(f"measured dtype is {self.dtype!r}, takes {', '.join(DTYPES)}")
        kind, _, index = str(self.device).partition(":")
        if kind not in ("auto", "cpu", "cuda") or (":" in str(self.device) and not index.isdecimal()):
            raise ValueError(f"measured device is {self.device!r}, takes auto, cpu, cuda or cuda:N")
        if kind != "cuda" and index:
            raise ValueError(f"measured device is {self.device!r}, takes auto, cpu, cuda or cuda:N")
        self.config()

    def config(self) -> ModelConfig:
        """The sizes of the models that are measured."""
        head_dim = self.head_dim
        if head_dim is None and isinstance(self.width, int):
            fitting = (size for size in _HEAD_DIMS if self.width % (4 * size) == 0)
            head_dim = next(fitting, _HEAD_DIMS[0])
        vocabulary = {} if self.vocab_size is None else {"vocab_size": self.vocab_size}
        return ModelConfig(
            width=self.width, head_dim=_HEAD_DIMS[0] if head_dim is None else head_dim, **vocabulary
        )

    def resolved(self, vocab_size: int) -> MeasureSettings:
        """The same with nothing left open, on this machine. Imports torch.

        Args:
            vocab_size: where none was chosen.

        Raises:
            ValueError: the device is not in this machine.
        """
        import torch

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        kind, _, index = device.partition(":")
        if kind == "cuda":
            count = torch.cuda.device_count()
            if int(index or 0) >= count:
                raise ValueError(f"device is {device!r}, and this machine has {count} CUDA devices")
            device = f"cuda:{int(index or 0)}"
        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if kind == "cpu" else "bfloat16"
        return replace(
            self,
            device=device,
            dtype=dtype,
            head_dim=self.config().head_dim,
            vocab_size=vocab_size if self.vocab_size is None else self.vocab_size,
            threads=torch.get_num_threads() if self.threads is None else self.threads,
            contexts=self.contexts or CONTEXTS[kind],
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` turns it back."""
        return {**dataclasses.asdict(self), "contexts": list(self.contexts)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MeasureSettings:
        """The settings that `to_json` wrote.

        Raises:
            ValueError: a name that is none, or a wrong value.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        if not isinstance(value, Mapping):
            raise ValueError(f"measure is {type(value).__name__}, takes an object")
        if unknown := sorted(set(value) - set(names)):
            raise ValueError(f"measure has {unknown[0]!r}, takes {', '.join(names)}")
        contexts = value.get("contexts", ())
        if not isinstance(contexts, (list, tuple)):
            raise ValueError(f"measured contexts are {contexts!r}, take a list of numbers")
        return cls(**{**value, "contexts": tuple(contexts)})


def _require_integer(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"measured {name} is {value!r}, takes an integer from {least} to {most}")
