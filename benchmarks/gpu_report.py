"""The results of `benchmarks.gpu`: what they are compared with, and their JSON and Markdown."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.checks import Check
from benchmarks.gpu_decode import DecodeRow, decode_checks, decode_table
from benchmarks.gpu_models import ModelRow, model_checks, model_table
from benchmarks.gpu_rows import MEMORY_FRACTION, GpuRow, Limit
from star import bench

__all__ = ["Results", "document"]

COLD_LIMIT, WARM_LIMIT = 1.0, 0.05  # seconds of an operator's first call, without and with Triton's cache


@dataclass
class Results:
    """What a run has measured so far.

    Attributes:
        device: the GPU's name.
        conditions: versions, dtype, whether the run was quick, seconds so far, whether it is complete.
        tests: the last line of the tests.
        measurements: the rows that could be measured.
        failures: what could not be, or not with all of our backends, and why.
        first_calls: seconds by operator, under "cold" and "warm".
        memory: peak bytes of linear_cross_entropy, ours and its peers'.
        decode: the steps.
        models: whole models' steps.
    """

    device: str
    conditions: dict[str, Any]
    tests: str = "not run"
    measurements: list[tuple[GpuRow, bench.Measurement]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    first_calls: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    decode: list[DecodeRow] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)

    @property
    def checks(self) -> list[Check]:
        rows = [check for row, measured in self.measurements for check in row_checks(row, measured)]
        steps = [*decode_checks(self.decode), *model_checks(self.models)]
        return [*rows, *steps, *other_checks(self.first_calls, self.memory)]

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "conditions": self.conditions,
            "tests": self.tests,
            "operators": [measurement.to_json() for _, measurement in self.measurements],
            "decode": [row.to_json() for row in self.decode],
            "models": [row.to_json() for row in self.models],
            "failures": self.failures,
            "first_calls": self.first_calls,
            "peak_bytes": self.memory,
            "checks": [asdict(check) for check in self.checks],
        }

    def write(self, folder: Path) -> Path:
        """Writes both files, each whole or not at all; returns the Markdown's path."""
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        text = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        for suffix, content in ((".json", text), (".md", document(self))):
            beside = base.with_suffix(suffix + ".part")
            beside.write_text(content, encoding="utf-8")
            beside.replace(base.with_suffix(suffix))
        return base.with_suffix(".md")


# --------------------------------------------------------------------------------------------------------
# Limits


def row_checks(row: GpuRow, measured: bench.Measurement) -> list[Check]:
    """Each of the row's limits against what was measured."""
    sizes = ", ".join(f"{name} {size}" for name, size in measured.sizes.items())
    name = f"{measured.operator}, {'forward + backward' if row.passes == 'both' else row.passes}"
    checks = []
    for limit in row.limits:
        wanted, reached, met = _verdict(limit, measured)
        checks.append(Check(name, limit.kind, sizes, wanted, reached, met))
    return checks


def _verdict(limit: Limit, measured: bench.Measurement) -> tuple[str, str, bool | None]:
    ours = measured.default
    if limit.kind == "copy":
        fraction = measured.copy_fraction(ours)
        return f"{limit.value:.0%} of a copy", f"{fraction:.0%} of a copy", fraction >= limit.value
    if limit.kind == "product":
        bound = toeplitz_operations(measured.sizes) / measured.product_operations * measured.product.median
        times = ours.median / bound
        wanted = f"{limit.value:g}x its products' time"
        return wanted, f"{times:.2f}x", times <= limit.value
    others = [*measured.peers, *measured.backends[1:]]
    peer = next((timing for timing in others if timing.name.startswith(limit.against)), None)
    wanted = f"{limit.value:g}x {limit.against}"
    if peer is None:
        return wanted, "not installed, or it refused", None
    ratio = peer.median / ours.median
    return wanted, f"{ratio:.2f}x", ratio >= limit.value


def toeplitz_operations(sizes: Any) -> float:
    """Of a causal long convolution as products of Toeplitz blocks, those above the diagonal left out."""
    return float(sizes["B"] * sizes["D"] * sizes["L"] * (sizes["L"] + TOEPLITZ_BLOCK))


TOEPLITZ_BLOCK = 64


def other_checks(first: dict[str, dict[str, float]], memory: dict[str, float]) -> list[Check]:
    """First calls and memory."""
    checks = []
    for state, limit in (("cold", COLD_LIMIT), ("warm", WARM_LIMIT)):
        for operator, seconds in first.get(state, {}).items():
            name, wanted = f"{operator}, first call, {state} cache", f"under {limit:g} s"
            checks.append(Check(name, "", "", wanted, report.time_text(seconds), seconds < limit))
    ours, liger = memory.get("triton"), next((v for k, v in memory.items() if k.startswith("Liger")), None)
    if ours is not None:
        wanted = f"{MEMORY_FRACTION:.0%} of Liger's peak memory"
        reached = f"{ours / 2**20:.0f} MiB" + (f", Liger {liger / 2**20:.0f} MiB" if liger else "")
        met = None if liger is None else ours <= MEMORY_FRACTION * liger
        checks.append(Check("linear_cross_entropy", "memory", "", wanted, reached, met))
    return checks


# --------------------------------------------------------------------------------------------------------
# Markdown


def document(results: Results) -> str:
    """The Markdown."""
    c = results.conditions
    parts = [
        f"# Operators on {results.device}",
        f"Remade by `make bench-gpu`: torch {c['torch']}, CUDA {c['cuda']}, Triton {c['triton']}, "
        f"{c['dtype']}, medians of samples taken in turns within one run of {c['seconds']} s. "
        f"Tests marked `gpu`: {results.tests}.",
    ]
    if not c["complete"]:
        parts.append("**The run has not come to its end: what is missing has not been measured.**")
    if c["quick"]:
        parts.append("**A quick run at tiny sizes: it shows that everything runs, nothing about speed.**")
    if results.failures:
        lines = [(name, problem) for name, problem in results.failures.items()]
        parts += ["## What failed", report.table(("what", "why"), lines)]
    parts += ["## Limits", report.limits(tuple(results.checks))]
    parts += ["## Times", report.times(tuple(results.measurements))]
    if results.decode:
        parts += ["## Decode steps", decode_table(results.decode)]
    if results.models:
        parts += ["## Decoding whole models", model_table(results.models)]
    first = results.first_calls
    if first:
        calls = [
            (operator, report.time_text(seconds), report.time_text(first["warm"].get(operator, 0.0)))
            for operator, seconds in first["cold"].items()
        ]
        heads = ("operator", "empty cache", "filled cache")
        parts += ["## First calls", report.table(heads, calls, right=(1, 2))]
    return "\n\n".join(parts) + "\n"
