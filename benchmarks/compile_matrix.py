"""Compiles every Triton kernel for every kind of GPU, without one: `make compile-matrix`.

Each kernel is compiled for the calls of `star.bench.gpu_cases`, and, with the configurations that ship, for
every situation of the operator tests; on failure, on a spilled register in a configuration that sm_90 gets,
or on more shared memory than a device has, the exit code is 1. The cache of Triton keeps what did not change.

`--triton DIR` names another version of Triton (`pip install --no-deps --target DIR triton==...`), with which
one call of each kernel is compiled as well, and the operator tests are run in its interpreter.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks import situations, triton_versions
from star.bench.gpu_cases import gpu_cases
from star_kernels import dispatch
from star_kernels.launch import INTERPRETED, Configuration, Launch, tables
from star_kernels.launch.offline import TARGETS, compile_launch

RESULT = Path(__file__).parent / "results" / "compile.md"
FAMILIES = ("attention", "convolution", "recurrence", "memoryless", "norm", "loss")
HALF, WIDE = torch.bfloat16, torch.float32
TUNED_FOR = "sm_90"
FEATURE_TARGETS = ("sm_90", "gfx942")  # one of each maker for what is not timed in half precision


@dataclass(frozen=True)
class Job:
    """One kernel, one configuration, one device family."""

    launch: Launch
    dtype: str
    configuration: Configuration
    shipped: bool
    family: str


@dataclass(frozen=True)
class Result:
    """What became of a job; ``problem`` is empty where all is well."""

    kernel: str
    shape: str
    dtype: str
    configuration: dict[str, int]
    shipped: bool
    family: str
    registers: int = 0
    local: int = 0
    shared: int = 0
    seconds: float = 0.0
    problem: str = ""


def forms(operators: list[str] | None) -> dict[str, Any]:
    """The Triton form of every operator that has one."""
    for family in FAMILIES:
        if importlib.util.find_spec(f"star_kernels.{family}.triton"):
            importlib.import_module(f"star_kernels.{family}.triton")
    names = [name for name in dispatch.operators() if operators is None or name in operators]
    found = {name: dispatch.form(name, "triton") for name in names}
    return {name: form for name, form in found.items() if form is not None}


def jobs(operators: list[str] | None, *, one: bool) -> list[Job]:
    """All of them, each once; with ``one``, the shipped configuration of one call of each kernel, and all
    that the table of sm_90 has."""
    found: dict[Any, Job] = {}
    kernels: set[str] = set()
    table = tables.table_of(TUNED_FOR)
    for launch, dtype, timed in _launches(operators, one):
        name = launch.kernel.name
        families: Iterable[str] = TARGETS if one or (timed and dtype == str(HALF)) else FEATURE_TARGETS
        if one and name in kernels:
            if not timed or launch.shape not in table.get(name, {}):
                continue
            families = (TUNED_FOR,)
        kernels.add(name)
        for family in families:
            shipped = launch.kernel.shipped(family, launch.arguments)
            tried = [shipped]
            if timed and not one and family == TUNED_FOR and dtype == str(HALF):
                tried += [other for other in launch.kernel.candidates if other != shipped]
            for configuration in tried:
                job = Job(launch, dtype, configuration, configuration == shipped, family)
                found.setdefault((_identity(launch, exact=timed), repr(configuration), family), job)
    return list(found.values())


def _launches(operators: list[str] | None, one: bool) -> Iterator[tuple[Launch, str, bool]]:
    """Launches with their activations' dtype, and whether they are among those that are timed."""
    by_name = forms(operators)
    for case in gpu_cases(list(by_name)):
        for dtype in (HALF,) if one else (HALF, WIDE):
            for launch in situations.launches_of_case(case, dtype, by_name[case.operator]):
                yield launch, str(dtype), True
    for operator, arguments in situations.wide_calls(HALF):
        if operator in by_name:
            for launch in situations.launches_of_call(by_name[operator], arguments):
                yield launch, str(HALF), False
    from tests.star_kernels.cases import Maker, all_cases

    for row in all_cases():
        if row.operator not in by_name:
            continue
        arguments = {
            name: value.to(WIDE if name in row.float32 else HALF).requires_grad_(name not in row.constant)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in row.make(Maker()).items()
        }
        for launch in situations.launches_of_call(by_name[row.operator], arguments):
            yield launch, str(HALF), False


def _identity(launch: Launch, *, exact: bool) -> Any:
    """Equal for launches that compile to the same code; without ``exact``, also where only the divisibility
    of sizes and strides differs, of which the operator tests have every combination."""
    constants = {parameter.name for parameter in launch.kernel.function.params if parameter.is_constexpr}
    kinds = []
    for name, value in launch.arguments.items():
        if name in constants:
            kinds.append((name, value))
        elif isinstance(value, Tensor):
            kinds.append((name, value.dtype))
        else:
            kinds.append((name, (type(value), _class(value) if exact else None)))
    return launch.kernel.name, tuple(kinds)


def _class(value: Any) -> Any:
    """Triton compiles anew for an integer of 1, a multiple of 16, or more than 32 bits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0, abs(value) >= 2**31
    return None


def compile_job(job: Job) -> Result:
    """Compiles one; what the compiler raises becomes the problem."""
    described = (
        job.launch.kernel.name,
        job.launch.shape,
        job.dtype.removeprefix("torch."),
        job.configuration.to_json(),
        job.shipped,
        job.family,
    )
    try:
        used = compile_launch(job.launch, job.configuration, TARGETS[job.family])
    except Exception as error:  # whatever a compiler raises is this job's result
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Result(*described, problem=f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200])
    limit, problem = TARGETS[job.family].shared_limit, ""
    if used.shared > limit:
        problem = f"{used.shared} bytes of shared memory of {limit}"
    elif used.local and job.family == TUNED_FOR and job.shipped:
        problem = f"{used.local} bytes of local memory a thread"
    return Result(*described, used.registers, used.local, used.shared, used.seconds, problem)


def document(results: Sequence[Result], seconds: float, others: Sequence[triton_versions.Other] = ()) -> str:
    """One line a kernel, shape and configuration, the most that any variant of it takes; failures first."""
    failed = [result for result in results if result.problem and result.shipped]
    lines = [
        "# Triton kernels, compiled",
        "",
        f"Remade by `make compile-matrix`, without a GPU: Triton {triton.__version__}, {len(results)} "
        f"compilations for {', '.join(TARGETS)} in {seconds:.0f} s.",
        "",
        "Cells: registers a thread / bytes of local memory a thread (spilled registers) / KiB of shared "
        "memory a block, the most over all variants of the kernel (dtypes of weights, "
        "optional arguments, packed sequences). A shipped configuration is what a call gets where "
        "the user has no table; the others are what `star bench --tune` tries besides, compiled for "
        f"{TUNED_FOR} alone. What {TUNED_FOR} gets by `star_kernels/launch/tuned/{TUNED_FOR}.json` is "
        f"{tables.source_of(TUNED_FOR)}.",
        "",
        f"Problems of shipped configurations: {len(failed)}.",
    ]
    lines += [f"- {r.kernel}, {r.shape}, {r.dtype}, {r.family}: {r.problem}" for r in failed]
    if others:
        lines += [*triton_versions.section(others), "", f"## Triton {triton.__version__}"]
    groups: dict[tuple[str, ...], list[Result]] = {}
    for r in results:
        sizes = ", ".join(f"{name} {value}" for name, value in r.configuration.items())
        groups.setdefault((r.kernel, r.shape, r.dtype, sizes, "yes" if r.shipped else ""), []).append(r)
    heads = ("kernel", "shape", "dtype", "configuration", "shipped", "variants", *TARGETS)
    lines += ["", f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for key, members in sorted(groups.items(), key=lambda item: (item[0][:3], not item[0][4], item[0])):
        most = max(sum(r.family == family for r in members) for family in TARGETS)
        cells = (*key, str(most), *(_cell(members, family) for family in TARGETS))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(members: Sequence[Result], family: str) -> str:
    mine = [result for result in members if result.family == family]
    if not mine:
        return ""
    problem = next((result.problem for result in mine if result.problem), "")
    registers, local, shared = (
        max(getattr(r, name) for r in mine) for name in ("registers", "local", "shared")
    )
    usage = f"{registers} / {local} / {shared / 1024:.3g}"
    return f"{usage}: {problem}" if problem else usage


def run(operators: list[str] | None, *, one: bool, workers: int) -> list[Result]:
    """Compiles all jobs, in ``workers`` processes."""
    todo = jobs(operators, one=one)
    if workers == 1:
        return [compile_job(job) for job in todo]
    # The children fork: jobs hold fake tensors and functions, which no pipe carries; indices it does.
    global _todo
    _todo = todo
    import multiprocessing

    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(_compile_number, range(len(todo)), chunksize=4))


_todo: list[Job] = []


def _compile_number(number: int) -> Result:
    return compile_job(_todo[number])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help=f"Markdown; JSON beside it (default {RESULT})")
    parser.add_argument("--operator", action="append", help="only this one; may be repeated")
    parser.add_argument("--one", action="store_true", help="one call of each kernel: quick")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--triton", action="append", type=Path, default=[], help="folder of another version")
    given = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set; the compiler needs a process without it")
    unknown = set(given.operator or ()) - set(forms(None))
    if unknown:
        parser.error(f"--operator {sorted(unknown)[0]!r}: no operator with Triton kernels has this name")
    began = time.perf_counter()
    results = run(given.operator, one=given.one, workers=given.workers)
    seconds = time.perf_counter() - began
    try:
        others = [triton_versions.tried(directory, given.workers) for directory in given.triton]
    except ValueError as error:
        parser.error(str(error))
    text = document(results, seconds, others)
    whole = not given.operator and not given.one
    out = given.out or (RESULT if whole else None)
    if out is None:
        print(text)
    else:
        out.write_text(text, encoding="utf-8")
        rows = json.dumps([asdict(result) for result in results], indent=1)
        out.with_suffix(".json").write_text(rows + "\n", encoding="utf-8")
    bad = [result for result in results if result.problem and result.shipped]
    print(f"{len(results)} compilations, {len(bad)} shipped configurations with a problem", file=sys.stderr)
    for result in bad:
        print(f"  {result.kernel} ({result.shape}, {result.family}): {result.problem}", file=sys.stderr)
    for other in others:
        print(other.line(), *(f"  {problem}" for problem in other.problems), sep="\n", file=sys.stderr)
    sys.exit(1 if bad or not all(other.well for other in others) else 0)


if __name__ == "__main__":
    main()
