"""Decoding on a GPU: each operator's step at batch 1 and 64, under a CUDA graph, for `benchmarks.gpu`.

A step's memory is small beside a GPU's cache, so a graph holds the steps of many copies of its tensors,
enough to fill the cache several times: what is measured is the memory, as in a model with many layers. A
step counts every tensor once, and those that it rewrites twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import star_kernels
from benchmarks import report
from benchmarks.checks import Check
from star.bench.cases import CASES, STEPS, Case, Fill, tensors
from star.bench.timing import Timing, copy_call, interleaved
from star_kernels import dispatch

__all__ = ["BATCHES", "DecodeRow", "decode_checks", "decode_rows", "graph_of", "measure_decode"]

BATCHES = (1, 64)
COPY = 0.85
"""Of a copy's bandwidth, at the largest batch, for operators whose state is worth reading fast."""

WORKING_SET = 512 << 20
"""Bytes that the copies of a step's tensors fill together: ten times the second-level cache of an H200."""

MOST_COPIES = 64
GPU_SIZES: Mapping[str, Mapping[str, int]] = {
    "attention_decode": {"L": 4096, "H": 16, "Dh": 128},
    "long_conv_step": {"D": 2048, "L": 4096},
    "gated_long_conv_step": {"D": 2048, "L": 4096},
    "gated_linear_attention_step": {"H": 16, "Dk": 128, "Dv": 128},
    "gated_delta_rule_step": {"H": 16, "Dk": 128, "Dv": 128},
}
WIDTH = {"D": 2048}
LIMITED = (
    "attention_decode",
    "selective_scan_step",
    "gated_linear_attention_step",
    "gated_delta_rule_step",
    "long_conv_step",
    "gated_long_conv_step",
    "short_conv_step",
    "gated_short_conv_step",
    "linear_scan_step",
    "gru_scan_step",
    "lstm_scan_step",
)
"""Operators with a limit: the attention over a cache, and every step that has a state."""


@dataclass(frozen=True)
class DecodeRow:
    """One step: its backend, seconds, bytes, and seconds of a copy that moves as many."""

    operator: str
    backend: str
    sizes: Mapping[str, int]
    seconds: float
    bytes: int
    copy_seconds: float

    @property
    def copy_fraction(self) -> float:
        """Of the bandwidth of a copy in the same run."""
        return self.copy_seconds / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "copy_fraction": self.copy_fraction}


def decode_rows(operators: Sequence[str] | None = None, *, quick: bool = False) -> list[Case]:
    """The calls: every step and attention_decode at both batches."""
    made = []
    for name, case in {"attention_decode": CASES["attention_decode"], **STEPS}.items():
        if operators is not None and name not in operators:
            continue
        if dispatch.form(name, "reference") is None:
            continue
        for batch in BATCHES:
            sizes = {**case.sizes, **GPU_SIZES.get(name, WIDTH if "D" in case.sizes else {}), "B": batch}
            if quick:
                sizes = {key: min(size, 2 if key == "B" else 24) for key, size in sizes.items()}
            made.append(replace(case, sizes=sizes))
    return made


def measure_decode(case: Case, *, device: torch.device, dtype: torch.dtype, seconds: float) -> DecodeRow:
    """Times one step among copies of itself, beside a memory copy that moves as many bytes."""
    function = getattr(star_kernels, case.operator)
    first = case.make(case.sizes, Fill.seeded(dtype, device))
    options = case.options(case.sizes)
    moved = step_bytes(function, first, options)
    copies = max(1, min(MOST_COPIES, math.ceil(WORKING_SET / moved))) if device.type == "cuda" else 2
    arguments = [first, *(case.make(case.sizes, Fill.seeded(dtype, device)) for _ in range(copies - 1))]
    calls = [lambda these=these: function(*these, **options) for these in arguments]
    timings: dict[str, Timing] = interleaved(
        {
            "steps": graph_of(calls, device),
            "copies": graph_of([copy_call(moved, device) for _ in range(copies)], device),
        },
        seconds,
        device,
    )
    backend = dispatch.fastest(case.operator, first[0])[0]
    each = {name: timing.median / copies for name, timing in timings.items()}
    return DecodeRow(case.operator, backend, dict(case.sizes), each["steps"], moved, each["copies"])


def step_bytes(function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> int:
    """What one step reads and writes at least; a tensor that it rewrites counts twice."""
    before = [tensor.clone() for tensor in tensors(tuple(arguments))]
    results = tensors(function(*arguments, **options))
    moved = sum(tensor.nbytes for tensor in [*before, *results])
    for old, new in zip(before, tensors(tuple(arguments)), strict=True):
        if (old != new).float().mean() > 0.5:
            moved += new.nbytes
    return moved


def graph_of(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """All calls as one CUDA graph; one after the other where there is no CUDA."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()  # compiles and allocates what the first call does
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def decode_checks(rows: Sequence[DecodeRow]) -> list[Check]:
    """The limit of every step at the largest batch."""
    checks = []
    for row in rows:
        if row.operator not in LIMITED or row.sizes["B"] != max(BATCHES):
            continue
        sizes = ", ".join(f"{name} {size}" for name, size in row.sizes.items())
        reached = f"{row.copy_fraction:.0%} of a copy ({row.backend})"
        met = row.copy_fraction >= COPY
        checks.append(Check(f"{row.operator}, decode", "copy", sizes, f"{COPY:.0%} of a copy", reached, met))
    return checks


def decode_table(rows: Sequence[DecodeRow]) -> str:
    """The Markdown table of all steps."""
    lines = [
        (
            row.operator,
            ", ".join(f"{name} {size}" for name, size in row.sizes.items()),
            row.backend,
            report.time_text(row.seconds),
            f"{row.bytes / row.seconds / 1e9:.0f} GB/s",
            f"{row.copy_fraction:.0%}",
        )
        for row in rows
    ]
    heads = ("step", "sizes", "backend", "time", "bandwidth", "of a copy")
    return report.table(heads, lines, right=(3, 4, 5))
