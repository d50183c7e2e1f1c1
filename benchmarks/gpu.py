"""All GPU tests and the tables of the operators on this machine's GPU: `make bench-gpu`.

Writes DIR/<device>.json and DIR/<device>.md, again after every row. Everything runs that the time allows,
whatever fails: rows are measured in a process of their own, which a crash or a hang costs and nothing else.
What failed is in the table and makes the exit code 1. With TRITON_INTERPRET=1, `--device cpu --quick` tries
the whole path without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import star_kernels
from benchmarks import gpu_worker
from benchmarks.gpu_decode import decode_rows
from benchmarks.gpu_models import model_names
from benchmarks.gpu_report import Results
from benchmarks.gpu_rows import ROWS, rows_of

RESULTS = Path(__file__).parent / "results"
MAX_TEST_WORKERS = 16  # each holds its own CUDA context
WHOLE = 510.0
"""Seconds of a run: under nine minutes, with what it takes to end."""

FOR_TESTS = 0.45
"""Of them, at most: the tests that have not ended by then are given up."""

FOR_ROW = 75.0
"""Seconds of one attempt at a row: peers compile and try their configurations first."""

FOR_LAST = 60.0
"""Seconds that rows leave for decode steps and first calls."""


class Clock:
    """What is left of a run's time."""

    def __init__(self, whole: float) -> None:
        self._began, self._whole = time.perf_counter(), whole

    def spent(self) -> float:
        return time.perf_counter() - self._began

    def left(self, reserved: float = 0.0) -> float:
        return max(0.0, self._whole - reserved - self.spent())


# --------------------------------------------------------------------------------------------------------
# The parts of a run


FIRST_CALLS = """
import json, sys, time
import torch
from benchmarks.gpu_rows import GpuRow, tiny
from star.bench.cases import CASES, Fill
from star_kernels import dispatch
import star_kernels
device, quick = torch.device(sys.argv[1]), sys.argv[2] == "quick"
torch.zeros(1, device=device)

def first_call(operator, case):
    arguments = case.make(case.sizes, Fill.seeded(torch.float32 if quick else torch.bfloat16, device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    getattr(star_kernels, operator)(*arguments, backend="triton", **case.options(case.sizes))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began

times, failures = {}, {}
for operator, case in CASES.items():
    if dispatch.form(operator, "triton") is None or operator not in sys.argv[3:]:
        continue
    try:
        times[operator] = first_call(operator, tiny(GpuRow(case, "forward")).case if quick else case)
    except Exception as error:  # that operator's failure, and no other's
        failures[operator] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
print(json.dumps([times, failures]))
"""


def first_calls(
    device: str, quick: bool, operators: Sequence[str], limit: float
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Seconds of every operator's first call with an empty and with a filled cache of Triton's; failures."""
    times: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", FIRST_CALLS, device, "quick" if quick else "whole", *operators]
        for state in ("cold", "warm"):
            what = f"first calls, {state} cache"
            try:
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=max(1.0, limit)
                )
            except subprocess.TimeoutExpired:
                failures[what] = f"not done within {limit:.0f} s"
                continue
            if done.returncode:
                failures[what] = (done.stderr.strip().splitlines() or ["no message"])[-1]
                continue
            times[state], problems = json.loads(done.stdout.splitlines()[-1])
            failures |= {f"{operator}, {what}": problem for operator, problem in problems.items()}
    return (times if len(times) == 2 else {}), failures


def run_tests(limit: float) -> str:
    """The last line of pytest over the tests that need a GPU, given up after ``limit`` seconds."""
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
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=RESULTS.parent.parent, stdout=output, stderr=output, start_new_session=True
        )
        late = ""
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = f", given up after {limit:.0f} s"
            _end(process)
        output.seek(0)
        lines = output.read().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print("\n".join(failed[:50]), file=sys.stderr)
    summaries = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|error)|no tests", line)]
    return ([line.strip("= ") for line in summaries] or [" ".join(lines)[-200:] or "no output"])[-1] + late


def _end(process: subprocess.Popen[Any]) -> None:
    """Interrupts pytest, which then says how far it came; kills it and its workers where it does not end."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


# --------------------------------------------------------------------------------------------------------
# The run


def run(
    results: Results,
    device: str,
    *,
    operators: Sequence[str] | None,
    tests: bool,
    seconds: float,
    clock: Clock,
    tell: Callable[[str], None],
    save: Callable[[], object],
) -> None:
    """All parts, one after the other, into ``results``; ``save`` is called after each step."""
    quick, dtype = results.conditions["quick"], results.conditions["dtype"]
    if tests:
        tell("the tests that need a GPU")
        results.tests = run_tests(clock.left() * FOR_TESTS)
        save()
    else:
        results.tests = "not run (--no-tests)"
    worker = gpu_worker.Worker(device, dtype, seconds, quick)
    try:
        _rows(results, worker, operators, clock, tell, save)
        _steps(results, worker, operators, clock, tell, save)
        if operators is None:
            _models(results, worker, clock, tell, save)
    finally:
        worker.stop()
    tell("first calls")
    names = sorted({row.case.operator for row in rows_of(operators, quick=quick)})
    if clock.left() > 0 and names:
        results.first_calls, failures = first_calls(device, quick, names, clock.left() / 2)
        results.failures |= failures
    elif names:
        results.failures["first calls"] = "the time of the whole run was over"


def _rows(
    results: Results,
    worker: gpu_worker.Worker,
    operators: Sequence[str] | None,
    clock: Clock,
    tell: Callable[[str], None],
    save: Callable[[], object],
) -> None:
    for number, row in enumerate(rows_of(None, quick=results.conditions["quick"])):
        if operators is not None and row.case.operator not in operators:
            continue
        tell(row.name)
        measured, problem = gpu_worker.measured(
            worker, number, row, lambda: min(FOR_ROW, clock.left(reserved=FOR_LAST))
        )
        if measured is not None:
            results.measurements.append((row, measured))
        if problem:
            results.failures[row.name] = problem
        if row.case.operator == "linear_cross_entropy":
            try:
                limit = min(FOR_ROW, clock.left())
                results.memory = worker.ask(gpu_worker.memory, number, limit=limit)
            except gpu_worker.Lost as lost:
                results.failures["peak memory"] = str(lost)
        save()


def _steps(
    results: Results,
    worker: gpu_worker.Worker,
    operators: Sequence[str] | None,
    clock: Clock,
    tell: Callable[[str], None],
    save: Callable[[], object],
) -> None:
    for number, case in enumerate(decode_rows(None, quick=results.conditions["quick"])):
        if operators is not None and case.operator not in operators:
            continue
        name = f"{case.operator}, batch {case.sizes['B']}"
        tell(name)
        limit = min(FOR_ROW, clock.left(reserved=FOR_LAST / 2))
        try:
            if limit <= 0:
                raise gpu_worker.Lost("the time of the whole run was over")
            results.decode.append(worker.ask(gpu_worker.step, number, limit=limit))
        except gpu_worker.Lost as lost:
            results.failures[name] = str(lost)
        save()


def _models(
    results: Results,
    worker: gpu_worker.Worker,
    clock: Clock,
    tell: Callable[[str], None],
    save: Callable[[], object],
) -> None:
    for number, (name, batch) in enumerate(model_names()):
        tell(f"{name}, batch {batch}")
        limit = min(FOR_ROW, clock.left(reserved=FOR_LAST / 3))
        try:
            if limit <= 0:
                raise gpu_worker.Lost("the time of the whole run was over")
            results.models.append(worker.ask(gpu_worker.model, number, limit=limit))
        except gpu_worker.Lost as lost:
            results.failures[f"{name}, batch {batch}"] = str(lost)
        save()


def _conditions(device: str, quick: bool) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
        "star_kernels": star_kernels.__version__,
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "quick": quick,
        "seconds": 0,
        "complete": False,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for Triton's interpreter")
    parser.add_argument("--operator", action="append", help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--seconds", type=float, default=None, help="for each row (default 2)")
    parser.add_argument("--limit", type=float, default=WHOLE, help="seconds of the whole run")
    parser.add_argument("--tests", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args(arguments)
    if given.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu runs Triton's interpreter: set TRITON_INTERPRET=1")
    if given.device != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; TRITON_INTERPRET=1 and --device cpu --quick try the command")
    known = {row.case.operator for row in ROWS} | {case.operator for case in decode_rows()}
    unknown = set(given.operator or ()) - known
    if unknown:
        parser.error(f"--operator {sorted(unknown)[0]!r}: the table has no such operator")
    if (given.quick or given.operator) and given.out == RESULTS:
        parser.error("--quick and --operator make no whole table: name another folder with --out")
    seconds = given.seconds if given.seconds is not None else 0.0 if given.quick else 2.0
    name = torch.cuda.get_device_name(given.device) if given.device != "cpu" else "Triton's interpreter"
    results, clock = Results(name, _conditions(given.device, given.quick)), Clock(given.limit)

    def save() -> Path:
        results.conditions["seconds"] = round(clock.spent())
        return results.write(given.out)

    console = Console(stderr=True)
    with console.status("") as status:
        run(
            results, given.device, operators=given.operator, tests=given.tests, seconds=seconds, clock=clock,
            tell=status.update, save=save,
        )  # fmt: skip
    results.conditions["complete"] = True
    written = save()
    missed = sum(check.met is False for check in results.checks)
    console.print(f"{len(results.checks)} limits, {missed} not reached: {written}")
    for what, problem in results.failures.items():
        console.print(f"failed: {what}: {problem}")
    well = not results.failures and not re.search(r"failed|error|given up", results.tests)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
