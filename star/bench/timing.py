"""Samples of several calls in turns, and the yardsticks of a machine that take their turns with them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = [
    "COMPILE_CALLS",
    "LONG_CALL",
    "MATRIX_SIZE",
    "Timing",
    "copy_call",
    "interleaved",
    "matrix_product_call",
    "threads_set",
]

LONG_CALL = 5.0
"""Seconds: a call that takes longer is made once, cold, and never again. Some peers take minutes."""

COMPILE_CALLS = 3
"""Calls until torch.compile has settled: it may compile once more when it meets what the first call left."""

MATRIX_SIZE = 1024
GPU_MATRIX_SIZE = 8192
"""The yardstick of arithmetic multiplies two square matrices of this size."""

_FEWEST_ROUNDS = 3
_MOST_ROUNDS = 200
_SHORTEST_SAMPLE = 1e-3  # seconds: shorter calls are repeated within a sample
_MOST_REPEATS = 1000


@dataclass(frozen=True)
class Timing:
    """One call's time: the median and the fastest of its samples, in seconds."""

    name: str
    median: float
    fastest: float
    samples: int


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, Timing]:
    """Samples of all calls in turns, for about `seconds` in all, and at least three of each.

    In turns, so that a machine that gets slower meanwhile does so for all of them. A call's first two runs
    warm it up and say how often it is repeated within a sample. Of a call that takes longer than
    `LONG_CALL`, the first run is its only sample.
    """
    samples: dict[str, list[float]] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        first = _sample(call, 1, device)
        samples[name] = [first] if first > LONG_CALL else []
        if first <= LONG_CALL:
            repeats[name] = _repeats(_sample(call, 1, device))
    end = time.perf_counter() + seconds
    for number in range(_MOST_ROUNDS if repeats else 0):
        if number >= _FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, count in repeats.items():
            samples[name].append(_sample(calls[name], count, device))
    return {
        name: Timing(name, statistics.median(values), min(values), len(values))
        for name, values in samples.items()
    }


def _repeats(seconds: float) -> int:
    return max(1, min(_MOST_REPEATS, round(_SHORTEST_SAMPLE / max(1e-9, seconds))))


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


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Torch's CPU threads inside; None leaves them as they are."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copy_call(bytes_moved: int, device: torch.device) -> Callable[[], object]:
    """Reads and writes `bytes_moved` together, between two tensors that exist already."""
    # Random, as all operands here: power-saving makes a GPU faster on zeros than on real data.
    source = torch.randint(256, (max(1, bytes_moved // 2),), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def matrix_product_call(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], int]:
    """A product of two square matrices, and its floating-point operations."""
    size = GPU_MATRIX_SIZE if device.type == "cuda" else MATRIX_SIZE
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    product = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=product), 2 * size**3
