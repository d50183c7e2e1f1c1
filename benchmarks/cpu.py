"""The CPU operators against their limits: float32, two threads, medians, everything in turns within one run.

    python -m benchmarks.cpu                    # writes benchmarks/results/cpu.md and cpu.json
    python -m benchmarks.cpu --compile          # whole models against torch.compile too; may add many minutes
    python -m benchmarks.cpu --quick --out /tmp/cpu.md    # tiny sizes: whether it runs, nothing about speed

Peers come from the extra `bench` (transformers); fla's plain definitions are timed too where fla is
installed. One of them takes six minutes for a single backward pass; calls that long are made once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import star_kernels
from benchmarks import rows, training_step
from benchmarks.checks import Check
from benchmarks.report import document
from star import bench
from star.bench.timing import Timing, interleaved, threads_set
from star_kernels.compiled import operator

RESULT = Path(__file__).parent / "results" / "cpu.md"
EMPTY = "_empty"
SMALLEST = ", all sizes 1"  # what a step costs before it computes anything
COMPILE_SECONDS = 150.0  # for one model under torch.compile, compiling included


@dataclass(frozen=True)
class Results:
    """Everything of one run, for the report."""

    measurements: tuple[tuple[rows.Row, bench.Measurement], ...]
    steps: dict[str, Timing]
    models: dict[str, dict[str, float]]
    checks: tuple[Check, ...]
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "checks": [asdict(check) for check in self.checks],
            "operators": [measurement.to_json() for _, measurement in self.measurements],
            "steps": {name: asdict(timing) for name, timing in self.steps.items()},
            "models": self.models,
        }


def run(*, quick: bool, compiled: bool, seconds: float, threads: int, tell: Callable[[str], None]) -> Results:
    """Times everything: about `seconds` for each operator, slow peers extra."""
    began = time.perf_counter()
    measurements = []
    for row in rows.ROWS:
        tell(row.name)
        row = replace(row, case=rows.quick(row.case)) if quick else row
        measurements.append((row, measure_row(row, seconds, threads)))
    tell("decode steps")
    cases = [rows.quick(case) if quick else case for case in rows.STEP_ROWS]
    steps = measure_steps(cases, 3 * seconds, threads)
    setting = training_step.QUICK if quick else training_step.Setting()
    models = {}
    for layout, (title, _) in training_step.LAYOUTS.items():
        tell(f"a training step of {title}")
        models[layout] = measure_model(layout, setting, compiled, 3 * seconds, threads)
    checks: tuple[Check, ...] = (
        *(check for row, measurement in measurements for check in row_checks(row, measurement)),
        *step_checks(cases, steps),
        *(check for layout, numbers in models.items() for check in model_checks(layout, numbers, setting)),
    )
    checks = tuple(
        replace(check, why=rows.WHY_NOT.get(", ".join(filter(None, (check.name, check.kind))), ""))
        for check in checks
    )
    conditions = {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "compiled": star_kernels.COMPILED,
        "threads": threads,
        "dtype": "float32",
        "model": str(setting),
        "quick": quick,
        "seconds": round(time.perf_counter() - began),
    }
    return Results(tuple(measurements), steps, models, checks, conditions)


def measure_row(row: rows.Row, seconds: float, threads: int) -> bench.Measurement:
    return bench.measure(row.case, passes=row.passes, seconds=seconds, threads=threads, peers=row.peers)


def measure_steps(cases: Sequence[bench.Case], seconds: float, threads: int) -> dict[str, Timing]:
    """Every step as a user calls it, no backend named; the same with all sizes 1; and the empty operator."""
    device = torch.device("cpu")
    calls: dict[str, Callable[[], object]] = {EMPTY: partial(operator(EMPTY), torch.zeros(1, 768))}
    for case in cases:
        function = getattr(star_kernels, case.operator)
        smallest = case.with_shape([1] * len(case.sizes))
        for name, sized in ((case.operator, case), (f"{case.operator}{SMALLEST}", smallest)):
            arguments = sized.make(sized.sizes, bench.Fill.seeded(torch.float32, device))
            calls[name] = partial(function, *arguments, **sized.options(sized.sizes))
    with threads_set(threads), torch.no_grad():
        return interleaved(calls, seconds, device)


def measure_model(
    layout: str, setting: training_step.Setting, compiled: bool, seconds: float, threads: int
) -> dict[str, float]:
    """Seconds of a training step by form; with torch.compile in a process that is stopped when too long."""
    if not compiled:
        return training_step.measure(layout, setting, seconds=seconds, threads=threads)
    command = [sys.executable, "-m", "benchmarks.training_step", layout, "--compile"]
    command += ["--seconds", str(seconds), "--threads", str(threads)] + ["--quick"] * (
        setting == training_step.QUICK
    )
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        numbers = training_step.measure(layout, setting, seconds=seconds, threads=threads)
        return numbers | {"compile stopped after": COMPILE_SECONDS}
    return dict(json.loads(done.stdout.splitlines()[-1]))


# --------------------------------------------------------------------------------------------------------
# Limits


def row_checks(row: rows.Row, measurement: bench.Measurement) -> list[Check]:
    sizes = ", ".join(f"{name} {size}" for name, size in measurement.sizes.items())
    ours, checks = measurement.default, []
    if row.ratio is not None:
        peer = measurement.best_peer(row.against)
        ratio = None if peer is None else peer.median / ours.median
        reached = "no peer is installed" if peer is None else f"{ratio:.3g}x {peer.name}"
        met = None if ratio is None else ratio >= row.ratio
        checks.append(Check(row.name, "ratio", sizes, f"{row.ratio:g}x", reached, met))
    if row.copy_fraction is not None:
        fraction = measurement.copy_fraction(ours)
        limit = f"{row.copy_fraction:.0%} of a copy"
        met = fraction >= row.copy_fraction
        checks.append(Check(row.name, "copy", sizes, limit, f"{fraction:.0%} of a copy", met))
    return checks


def step_checks(cases: Sequence[bench.Case], steps: dict[str, Timing]) -> list[Check]:
    empty, checks = steps[EMPTY].median, []
    for case in cases:
        times = steps[case.operator].median / empty
        sizes = ", ".join(f"{name} {size}" for name, size in case.sizes.items())
        limit, reached = f"< {rows.STEP_LIMIT:g}x an empty operator", f"{times:.2f}x"
        checks.append(Check(case.operator, "", sizes, limit, reached, times < rows.STEP_LIMIT))
    return checks


def model_checks(layout: str, numbers: dict[str, float], setting: training_step.Setting) -> list[Check]:
    name = f"training step, {training_step.LAYOUTS[layout][0]}"
    sizes = str(setting)
    ratio = numbers[training_step.REFERENCE] / numbers[training_step.DEFAULT]
    limit, met = f"{rows.MODEL_RATIO:g}x the reference backend", ratio >= rows.MODEL_RATIO
    checks = [Check(name, "ratio", sizes, limit, f"{ratio:.2f}x", met)]
    limit = "not slower than torch.compile of it"
    if training_step.COMPILED in numbers:
        ratio = numbers[training_step.COMPILED] / numbers[training_step.DEFAULT]
        reached = f"{ratio:.2f}x, without its {numbers['compile']:.0f} s of compiling"
        checks.append(Check(name, "compile", sizes, limit, reached, ratio >= rows.COMPILED_RATIO))
    elif "compile stopped after" in numbers:
        reached = f"not compiled after {numbers['compile stopped after']:.0f} s"
        checks.append(Check(name, "compile", sizes, limit, reached, None))  # not measured is not met
    else:
        checks.append(Check(name, "compile", sizes, limit, "not measured (--compile)", None))
    return checks


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="Markdown; JSON goes beside it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--compile", action="store_true", help="whole models under torch.compile too")
    parser.add_argument("--seconds", type=float, default=None, help="for each operator (default 3)")
    parser.add_argument("--threads", type=int, default=None, help="of torch (default 2; 1 with --quick)")
    given = parser.parse_args(arguments)
    if given.quick and given.out == RESULT:
        parser.error("--quick measures nothing worth committing: name another file with --out")
    # Two threads stall on tiny operators, each time for longer than a quick run's whole case takes.
    threads = given.threads or (1 if given.quick else 2)
    seconds = given.seconds if given.seconds is not None else 0.05 if given.quick else 3.0
    console = Console(stderr=True)
    with console.status("") as status:
        results = run(
            quick=given.quick,
            compiled=given.compile,
            seconds=seconds,
            threads=threads,
            tell=lambda what: status.update(f"timing {what}"),
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(document(results), encoding="utf-8")
    text = json.dumps(results.to_json(), indent=2, allow_nan=False)
    given.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    missed = sum(check.met is False for check in results.checks)
    console.print(f"{len(results.checks)} limits, {missed} not reached: {given.out}")


if __name__ == "__main__":
    main()
