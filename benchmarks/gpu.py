"""All GPU tests and the table of the operators on this machine's GPU: `make bench-gpu`.

Writes DIR/<device>.json and DIR/<device>.md. Everything runs, whatever fails; what failed is in the table and
makes the exit code 1. With TRITON_INTERPRET=1, `--device cpu --quick` tries the whole path without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import star_kernels
from benchmarks import report
from benchmarks.checks import Check
from benchmarks.gpu_rows import MEMORY_FRACTION, ROWS, GpuRow, Limit, tiny
from star import bench
from star.bench.cases import Case
from star.bench.gpu_cases import gpu_cases
from star_kernels import dispatch

RESULTS = Path(__file__).parent / "results"
COLD_LIMIT, WARM_LIMIT = 1.0, 0.05  # seconds of an operator's first call, without and with Triton's cache
MAX_TEST_WORKERS = 8  # each holds its own CUDA context


@dataclass(frozen=True)
class Results:
    """Everything of one run, for the report."""

    device: str
    conditions: dict[str, Any]
    tests: str
    measurements: tuple[tuple[GpuRow, bench.Measurement], ...]
    failures: dict[str, str]
    first_calls: dict[str, dict[str, float]]
    memory: dict[str, float]
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "conditions": self.conditions,
            "tests": self.tests,
            "operators": [measurement.to_json() for _, measurement in self.measurements],
            "failures": self.failures,
            "first_calls": self.first_calls,
            "peak_bytes": self.memory,
            "checks": [asdict(check) for check in self.checks],
        }


# --------------------------------------------------------------------------------------------------------
# The parts of a run


def measure_rows(
    rows: Sequence[GpuRow], device: str, dtype: str, seconds: float, tell: Callable[[str], None]
) -> tuple[list[tuple[GpuRow, bench.Measurement]], dict[str, str]]:
    """Times each row; what raises is a failure of that row alone."""
    measured, failures = [], {}
    for row in rows:
        tell(row.name)
        backends = tuple(name for name in row.backends if dispatch.form(row.case.operator, name))
        if not set(backends) & {"cuda", "triton"}:
            failures[row.name] = "it has no kernel for GPUs"
            continue
        try:
            measured.append(
                (
                    row,
                    bench.measure(
                        row.case,
                        dtype=dtype,
                        device=device,
                        passes=row.passes,
                        seconds=seconds,
                        backends=backends,
                    ),
                )
            )
        except Exception as error:  # one operator's failure must not cost the others' numbers
            failures[row.name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if device != "cpu":
            torch.cuda.empty_cache()
    return measured, failures


FIRST_CALLS = """
import json, sys, time
import torch
from benchmarks.gpu_rows import GpuRow, tiny
from star.bench.gpu_cases import gpu_cases
from star.bench.cases import CASES, Fill
from star_kernels import dispatch
import star_kernels
device, quick = torch.device(sys.argv[1]), sys.argv[2] == "quick"
torch.zeros(1, device=device)
times = {}
for operator, case in CASES.items():
    if dispatch.form(operator, "triton") is None or operator not in sys.argv[3:]:
        continue
    case = tiny(GpuRow(case, "forward")).case if quick else case
    arguments = case.make(case.sizes, Fill.seeded(torch.float32 if quick else torch.bfloat16, device))
    began = time.perf_counter()
    getattr(star_kernels, operator)(*arguments, backend="triton", **case.options(case.sizes))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times[operator] = time.perf_counter() - began
print(json.dumps(times))
"""


def first_calls(device: str, quick: bool, operators: Sequence[str]) -> dict[str, dict[str, float]]:
    """Seconds of every operator's first call, with an empty cache of Triton's and with a filled one."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", FIRST_CALLS, device, "quick" if quick else "whole", *operators]
        times = {}
        for state in ("cold", "warm"):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                problem = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"first calls, {state}: {problem}")
            times[state] = dict(json.loads(done.stdout.splitlines()[-1]))
    return times


def peak_memory(case: Case, device: str) -> dict[str, float]:
    """Bytes of GPU memory that linear_cross_entropy takes beyond its arguments, ours and its peers'."""
    place = torch.device(device)
    if place.type != "cuda":
        return {}
    calls = bench.calls(case, "both", dtype="bfloat16", device=device, backends=("triton",))
    taken = {}
    for name, call in calls.items():
        torch.cuda.synchronize(place)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        try:
            call()
        except Exception:  # a peer that refuses is named among the absent of its row
            continue
        torch.cuda.synchronize(place)
        taken[name] = float(torch.cuda.max_memory_allocated(place) - before)
    return taken


def run_tests() -> str:
    """The last line of pytest over the tests that need a GPU."""
    workers = min(MAX_TEST_WORKERS, os.cpu_count() or 1)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-n",
        str(workers),
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=RESULTS.parent.parent, capture_output=True, text=True)
    lines = [
        line for line in done.stdout.splitlines() if re.search(r"passed|failed|skipped|error|no tests", line)
    ]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print("\n".join(failed[:50]), file=sys.stderr)
    return (lines or [done.stderr.strip()[-200:] or "no output"])[-1].strip("= ")


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
# The run and its report


def run(
    device: str,
    *,
    operators: Sequence[str] | None,
    quick: bool,
    tests: bool,
    seconds: float,
    tell: Callable[[str], None],
) -> Results:
    """All parts, one after the other."""
    began = time.perf_counter()
    tell("the tests that need a GPU")
    summary = run_tests() if tests else "not run (--no-tests)"
    rows = [row for row in ROWS if operators is None or row.case.operator in operators]
    if quick:
        rows = list({(row.name, row.passes): row for row in map(tiny, rows)}.values())
    dtype = "float32" if device == "cpu" else "bfloat16"
    measurements, failures = measure_rows(rows, device, dtype, seconds, tell)
    tell("first calls")
    try:
        first = first_calls(device, quick, sorted({row.case.operator for row in rows}))
    except RuntimeError as error:
        first, failures["first calls"] = {}, str(error)
    tell("memory")
    measured_loss = any(row.case.operator == "linear_cross_entropy" for row in rows)
    loss = next(gpu_cases(["linear_cross_entropy"]))
    memory = peak_memory(loss, device) if measured_loss else {}
    checks = [check for row, measured in measurements for check in row_checks(row, measured)]
    name = torch.cuda.get_device_name(device) if device != "cpu" else "Triton's interpreter"
    conditions = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
        "star_kernels": star_kernels.__version__,
        "dtype": dtype,
        "quick": quick,
        "seconds": round(time.perf_counter() - began),
    }
    return Results(
        name,
        conditions,
        summary,
        tuple(measurements),
        failures,
        first,
        memory,
        (*checks, *other_checks(first, memory)),
    )


def document(results: Results) -> str:
    """The Markdown."""
    c = results.conditions
    parts = [
        f"# Operators on {results.device}",
        f"Remade by `make bench-gpu`: torch {c['torch']}, CUDA {c['cuda']}, Triton {c['triton']}, "
        f"{c['dtype']}, medians of samples taken in turns within one run of {c['seconds']} s. "
        f"Tests marked `gpu`: {results.tests}.",
    ]
    if c["quick"]:
        parts.append("**A quick run at tiny sizes: it shows that everything runs, nothing about speed.**")
    if results.failures:
        lines = [(name, problem) for name, problem in results.failures.items()]
        parts += ["## What failed", report.table(("what", "why"), lines)]
    parts += ["## Limits", report.limits(results.checks)]
    parts += ["## Times", report.times(results.measurements)]
    first = results.first_calls
    if first:
        calls = [
            (operator, report.time_text(seconds), report.time_text(first["warm"].get(operator, 0.0)))
            for operator, seconds in first["cold"].items()
        ]
        heads = ("operator", "empty cache", "filled cache")
        parts += ["## First calls", report.table(heads, calls, right=(1, 2))]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for Triton's interpreter")
    parser.add_argument("--operator", action="append", help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--seconds", type=float, default=None, help="for each row (default 2)")
    parser.add_argument("--tests", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args(arguments)
    if given.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu runs Triton's interpreter: set TRITON_INTERPRET=1")
    if given.device != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; TRITON_INTERPRET=1 and --device cpu --quick try the command")
    unknown = set(given.operator or ()) - {row.case.operator for row in ROWS}
    if unknown:
        parser.error(f"--operator {sorted(unknown)[0]!r}: the table has no such operator")
    if (given.quick or given.operator) and given.out == RESULTS:
        parser.error("--quick and --operator make no whole table: name another folder with --out")
    seconds = given.seconds if given.seconds is not None else 0.0 if given.quick else 2.0
    console = Console(stderr=True)
    with console.status("") as status:
        results = run(
            given.device,
            operators=given.operator,
            quick=given.quick,
            tests=given.tests,
            seconds=seconds,
            tell=lambda what: status.update(what),
        )
    given.out.mkdir(parents=True, exist_ok=True)
    base = given.out / re.sub(r"[^a-z0-9]+", "-", results.device.lower()).strip("-")
    text = json.dumps(results.to_json(), indent=2, allow_nan=False)
    base.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    base.with_suffix(".md").write_text(document(results), encoding="utf-8")
    missed = sum(check.met is False for check in results.checks)
    console.print(f"{len(results.checks)} limits, {missed} not reached: {base}.md")
    for name, problem in results.failures.items():
        console.print(f"failed: {name}: {problem}")
    sys.exit(1 if results.failures or "failed" in results.tests or "error" in results.tests else 0)


if __name__ == "__main__":
    main()
