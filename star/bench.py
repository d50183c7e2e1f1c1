"""Timing of the public operators, backend by backend, on the machine at hand.

All backends of an operator are timed in turns within one run, so that a machine that gets slower meanwhile
does so for all of them, and medians are compared. The yardstick takes its turns as well: a plain copy that
moves as many bytes as the operator's tensors hold. An operator that is limited by memory can not be faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import star_kernels
from star_kernels import dispatch

__all__ = ["CASES", "COPY", "DTYPES", "Case", "Measurement", "Timing", "case", "measure"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COPY = "copy"

_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 200
_SHORTEST_SAMPLE = 1e-3  # seconds: shorter calls are repeated within a sample

Make = Callable[[Mapping[str, int], "Fill"], tuple[Any, ...]]


@dataclass(frozen=True)
class Fill:
    """Makes the tensors of a case: seeded, in one dtype, on one device."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Activations."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        values = torch.rand(shape, generator=self.generator) * (high - low) + low
        return values.to(self.device, self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """Parameters: small, float32."""
        return (0.1 * torch.randn(shape, generator=self.generator)).to(self.device)


@dataclass(frozen=True)
class Case:
    """How an operator is called for timing: its sizes by name, with defaults, and its arguments from them."""

    operator: str
    sizes: Mapping[str, int]
    make: Make
    gradients: bool = True

    def with_shape(self, shape: Sequence[int]) -> Case:
        """The same with other sizes.

        Raises:
            ValueError: another number of sizes, or one below 1.
        """
        names = " ".join(self.sizes)
        if len(shape) != len(self.sizes) or min(shape) < 1:
            got = ",".join(str(size) for size in shape)
            raise ValueError(f"shape is {got!r}, {self.operator} takes {len(self.sizes)} sizes: {names}")
        return Case(self.operator, dict(zip(self.sizes, shape, strict=True)), self.make, self.gradients)


@dataclass(frozen=True)
class Timing:
    """One backend of one operator: the median and the fastest of its samples, in seconds a call."""

    backend: str
    median: float
    fastest: float
    samples: int


@dataclass(frozen=True)
class Measurement:
    """An operator on this machine.

    Attributes:
        operator, sizes, dtype, device, threads, backward: what was timed.
        bytes: of all tensors read and written once (with backward: three times as many).
        timings: one a backend, fastest backend's name first as `star_kernels` prefers them.
        copy: the copy of `bytes`.
    """

    operator: str
    sizes: Mapping[str, int]
    dtype: str
    device: str
    threads: int
    backward: bool
    bytes: int
    timings: tuple[Timing, ...]
    copy: Timing

    def bandwidth(self, timing: Timing) -> float:
        """Bytes a second that the call would move if it touched each tensor once."""
        return self.bytes / timing.median

    def copy_fraction(self, timing: Timing) -> float:
        """Its speed over that of the copy: 1 is as fast as moving the bytes alone."""
        return self.copy.median / timing.median

    def to_json(self) -> dict[str, Any]:
        return {
            "operator": self.operator,
            "sizes": dict(self.sizes),
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "backward": self.backward,
            "bytes": self.bytes,
            "copy_seconds": self.copy.median,
            "copy_bytes_per_second": self.bytes / self.copy.median,
            "backends": {
                timing.backend: {
                    "median_seconds": timing.median,
                    "fastest_seconds": timing.fastest,
                    "samples": timing.samples,
                    "bytes_per_second": self.bandwidth(timing),
                    "copy_fraction": self.copy_fraction(timing),
                }
                for timing in self.timings
            },
        }


def measure(
    case: Case,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    backward: bool = False,
    seconds: float = 2.0,
) -> Measurement:
    """Times every backend that covers the case, in turns, for about `seconds` in all.

    Raises:
        ValueError: no such dtype or device, or backward of an operator that has none.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, takes one of {', '.join(DTYPES)}")
    if backward and not case.gradients:
        raise ValueError(f"{case.operator} has no backward pass")
    place = _device(device)
    fill = Fill(DTYPES[dtype], place, torch.Generator().manual_seed(0))
    arguments = case.make(case.sizes, fill)
    function = getattr(star_kernels, case.operator)
    with _threads(threads):
        first = next(argument for argument in arguments if isinstance(argument, Tensor))
        calls = {
            backend: _call(function, arguments, backend, backward)
            for backend in dispatch.available(case.operator, first)
        }
        bytes_moved = _bytes(arguments, function(*arguments)) * (3 if backward else 1)
        calls[COPY] = _copy(bytes_moved, place)
        timings = {timing.backend: timing for timing in _interleaved(calls, seconds, place)}
        used = torch.get_num_threads()
    copy = timings.pop(COPY)
    return Measurement(
        case.operator,
        case.sizes,
        dtype,
        str(place),
        used,
        backward,
        bytes_moved,
        tuple(timings.values()),
        copy,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, takes cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, takes cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, and this machine has {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], backend: str, backward: bool
) -> Callable[[], object]:
    """The forward pass without gradients, or the forward and the backward pass."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(*arguments, backend=backend)

        return forward
    inputs = [
        argument.detach().requires_grad_() if _is_float(argument) else argument for argument in arguments
    ]
    leaves = [argument for argument in inputs if _is_float(argument)]
    with torch.no_grad():
        shapes = _tensors(function(*arguments, backend=backend))
    gradients = [torch.ones_like(output) for output in shapes]

    def both() -> object:
        outputs = _tensors(function(*inputs, backend=backend))
        return torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)

    return both


def _copy(bytes_moved: int, device: torch.device) -> Callable[[], object]:
    """Reads and writes `bytes_moved` together."""
    source = torch.zeros(max(1, bytes_moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device
) -> list[Timing]:
    """Samples of all calls in turns until `seconds` are over."""
    repeats = {name: _repeats(call, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for number in range(_MOST_ROUNDS):
        if number >= _FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            samples[name].append(_sample(call, repeats[name], device))
    return [
        Timing(name, statistics.median(values), min(values), len(values)) for name, values in samples.items()
    ]


def _repeats(call: Callable[[], object], device: torch.device) -> int:
    """Calls a sample; the two calls made here also warm up."""
    _sample(call, 1, device)
    return max(1, min(1000, round(_SHORTEST_SAMPLE / max(1e-9, _sample(call, 1, device)))))


def _sample(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - began) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(*values: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for value in values for tensor in _tensors(value))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# --------------------------------------------------------------------------------------------------------
# The operators


def _selective_scan(n: Mapping[str, int], f: Fill) -> tuple[Any, ...]:
    x, dt = f.normal(n["B"], n["L"], n["D"]), f.uniform(n["B"], n["L"], n["D"], low=0.001, high=0.1)
    states = f.normal(n["B"], n["L"], n["N"]), f.normal(n["B"], n["L"], n["N"])
    decay = -torch.arange(1, n["N"] + 1, dtype=torch.float32, device=f.device).repeat(n["D"], 1)
    return x, dt, decay, *states, f.weight(n["D"]), f.normal(n["B"], n["L"], n["D"])


def _heads(n: Mapping[str, int], f: Fill, count: int, last: str = "Dh") -> tuple[Tensor, ...]:
    return tuple(f.normal(n["B"], n["L"], n["H"], n[last]) for _ in range(count))


def _gated_linear_attention(n: Mapping[str, int], f: Fill) -> tuple[Any, ...]:
    log_decay = f.uniform(n["B"], n["L"], n["H"], low=-0.1, high=0.0)
    return *_heads(n, f, 2, "Dk"), *_heads(n, f, 1, "Dv"), log_decay


def _gated_delta_rule(n: Mapping[str, int], f: Fill) -> tuple[Any, ...]:
    q, k, v, log_decay = _gated_linear_attention(n, f)
    unit = torch.nn.functional.normalize(k.float(), dim=-1).to(f.dtype)
    return q, unit, v, f.uniform(n["B"], n["L"], n["H"]), log_decay


def _gates(n: Mapping[str, int], f: Fill, count: int) -> tuple[Tensor, ...]:
    return tuple(f.normal(n["B"], n["L"], n["D"]) for _ in range(count))


def _attention_decode(n: Mapping[str, int], f: Fill) -> tuple[Any, ...]:
    caches = (f.normal(n["B"], n["L"], n["H"], n["Dh"]), f.normal(n["B"], n["L"], n["H"], n["Dh"]))
    lengths = torch.full((n["B"],), n["L"], dtype=torch.int32, device=f.device)
    return f.normal(n["B"], n["H"], n["Dh"]), *caches, lengths


def _rope(n: Mapping[str, int], f: Fill) -> tuple[Any, ...]:
    angles = f.uniform(n["L"], n["Dh"] // 2, high=6.28).float()
    return f.normal(n["B"], n["L"], n["H"], n["Dh"]), angles.cos(), angles.sin()


def _linear_cross_entropy(n: Mapping[str, int], f: Fill) -> tuple[Any, ...]:
    targets = torch.randint(n["V"], (n["N"],), generator=f.generator).to(f.device)
    return f.normal(n["N"], n["D"]), f.weight(n["V"], n["D"]).to(f.dtype), targets


_TOKENS = {"B": 4, "L": 2048, "D": 768}
_HEADS = {"B": 1, "L": 2048, "H": 12, "Dh": 64}
_KEYS = {"B": 1, "L": 2048, "H": 12, "Dk": 64, "Dv": 64}

CASES: dict[str, Case] = {
    case.operator: case
    for case in (
        Case("short_conv", {**_TOKENS, "K": 3}, lambda n, f: (*_gates(n, f, 1), f.weight(n["D"], n["K"]))),
        Case(
            "gated_short_conv", {**_TOKENS, "K": 3}, lambda n, f: (*_gates(n, f, 3), f.weight(n["D"], n["K"]))
        ),
        Case("long_conv", {**_TOKENS, "B": 2}, lambda n, f: (*_gates(n, f, 1), f.weight(n["D"], n["L"]))),
        Case(
            "gated_long_conv", {**_TOKENS, "B": 2}, lambda n, f: (*_gates(n, f, 3), f.weight(n["D"], n["L"]))
        ),
        Case(
            "linear_scan",
            _TOKENS,
            lambda n, f: (f.uniform(n["B"], n["L"], n["D"], low=0.5, high=1.0), *_gates(n, f, 1)),
        ),
        Case("selective_scan", {"B": 1, "L": 2048, "D": 1536, "N": 16}, _selective_scan),
        Case("gated_linear_attention", _KEYS, _gated_linear_attention),
        Case("gated_delta_rule", _KEYS, _gated_delta_rule),
        Case("gru_scan", _TOKENS, lambda n, f: (*_gates(n, f, 3), *(f.weight(n["D"]) for _ in range(3)))),
        Case("lstm_scan", _TOKENS, lambda n, f: (*_gates(n, f, 3), *(f.weight(n["D"]) for _ in range(3)))),
        Case("attention", _HEADS, lambda n, f: _heads(n, f, 3)),
        Case(
            "diff_attention",
            _HEADS,
            lambda n, f: (*_heads(n, f, 5), torch.tensor(0.3, device=f.device)),
        ),
        Case("attention_decode", {**_HEADS, "B": 8}, _attention_decode, gradients=False),
        Case("glu", _TOKENS, lambda n, f: _gates(n, f, 2)),
        Case("rms_norm", _TOKENS, lambda n, f: (*_gates(n, f, 1), f.weight(n["D"]))),
        Case("rope", {**_HEADS, "B": 4}, _rope),
        Case("linear_cross_entropy", {"N": 4096, "D": 768, "V": 4096}, _linear_cross_entropy),
    )
}
"""The operators in the order of the README's table, at sizes of models with 100 million parameters."""


def case(operator: str, shape: Sequence[int] | None = None) -> Case:
    """The case of an operator.

    Raises:
        ValueError: no such operator, or sizes that it does not take.
    """
    if operator not in CASES:
        raise ValueError(f"operator is {operator!r}, takes one of {', '.join(CASES)}")
    found = CASES[operator]
    return found if shape is None else found.with_shape(shape)
