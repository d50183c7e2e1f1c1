"""One training step of a whole model: the fastest backends against the reference backend, in turns.

    python -m benchmarks.training_step lfm2                # prints JSON
    python -m benchmarks.training_step lfm2 --compile      # the reference under torch.compile as well

A step is forward, loss, backward, clipping and AdamW, as `star.proxy` trains. Both models start from the same
weights and read the same tokens. Compiling may take many minutes where the reference loops over tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from star import ModelConfig, baselines, build_model
from star.bench.timing import COMPILE_CALLS, interleaved, threads_set
from star.model import StarModel
from star.optimizer import AdamW
from star_kernels import dispatch, linear_cross_entropy

LAYOUTS = {
    "transformer_pp": ("Transformer++", baselines.transformer_pp),
    "striped_mamba": ("StripedMamba", baselines.striped_mamba),
    "lfm2": ("LFM2", baselines.lfm2),
}

DEFAULT, REFERENCE, COMPILED = "default", "reference", "reference, torch.compile"


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and its batch."""

    depth: int = 24
    width: int = 256
    head_dim: int = 32
    vocab_size: int = 256
    batch: int = 4
    length: int = 512

    def __str__(self) -> str:
        return f"{self.depth} LIVs x {self.width}, batch {self.batch} x {self.length}"


QUICK = Setting(depth=6, width=128, batch=1, length=64)


def measure(
    layout: str, setting: Setting, *, seconds: float, threads: int, compiled: bool = False
) -> dict[str, float]:
    """Median seconds of a step, by form; with `compiled` also "compile", the seconds that compiling took."""
    with threads_set(threads):
        calls = {
            DEFAULT: _step(layout, setting, None),
            REFERENCE: _step(layout, setting, "reference"),
        }
        numbers: dict[str, float] = {}
        if compiled:
            calls[COMPILED] = _step(layout, setting, "reference", compiled=True)
            began = time.perf_counter()
            for _ in range(COMPILE_CALLS):
                calls[COMPILED]()
            numbers["compile"] = time.perf_counter() - began
        timings = interleaved(calls, seconds, torch.device("cpu"))
    return {name: timing.median for name, timing in timings.items()} | numbers


def _step(layout: str, setting: Setting, backend: str | None, compiled: bool = False) -> Callable[[], object]:
    genome = LAYOUTS[layout][1](setting.depth)
    config = ModelConfig(width=setting.width, vocab_size=setting.vocab_size, head_dim=setting.head_dim)
    model = build_model(genome, config, seed=0)
    optimizer = AdamW(model.named_parameters(), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(setting.vocab_size, (setting.batch, setting.length + 1), generator=generator)
    inputs, targets = ids[:, :-1], ids[:, 1:].flatten()
    loss = torch.compile(_loss, dynamic=False) if compiled else _loss

    def step() -> None:
        with dispatch.use(backend):
            loss(model, inputs, targets).backward()
        norm = optimizer.gradient_norm()
        optimizer.step(1e-4, torch.clamp(norm, min=1.0))
        optimizer.zero_gradients()

    return step


def _loss(model: StarModel, inputs: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(model.hidden(inputs).flatten(0, 1), model.head_weight, targets)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("--compile", action="store_true", help="the reference under torch.compile as well")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    setting = QUICK if given.quick else Setting()
    numbers = measure(
        given.layout, setting, seconds=given.seconds, threads=given.threads, compiled=given.compile
    )
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
