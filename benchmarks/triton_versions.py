"""The kernels with other versions of Triton, for `benchmarks.compile_matrix`: each in its own processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Other", "section", "tried"]

OPERATOR_TESTS = (
    "tests/star_kernels/test_operators.py",
    *("-k", "definition and triton and not cuda and float32"),
)


@dataclass(frozen=True)
class Other:
    """What another version of Triton makes of the kernels.

    Attributes:
        version: its own.
        compilations: one call of each kernel for each kind of GPU.
        problems: of those, with configurations that ship; what they are, `benchmarks.compile_matrix` says.
        tests: what came of the operator tests in its interpreter.
    """

    version: str
    compilations: int
    problems: tuple[str, ...]
    tests: str

    @property
    def well(self) -> bool:
        return not self.problems and re.fullmatch(r"\d+ passed", self.tests) is not None

    def line(self) -> str:
        return (
            f"Triton {self.version}: {self.compilations} compilations, {len(self.problems)} shipped "
            f"configurations with a problem; operator tests: {self.tests}"
        )


def tried(directory: Path, workers: int) -> Other:
    """Compiles with the Triton in ``directory``, then runs the operator tests in its interpreter.

    Raises:
        ValueError: the directory holds no Triton, or nothing could be compiled; the message says why.
    """
    environment = {**os.environ, "PYTHONPATH": str(directory.resolve())}
    asked = [sys.executable, "-c", "import triton; print(triton.__version__, triton.__file__)"]
    answer = subprocess.run(asked, env=environment, capture_output=True, text=True).stdout
    version, _, place = answer.strip().partition(" ")
    if not version or not Path(place).is_relative_to(directory.resolve()):
        raise ValueError(f"--triton {directory}: no Triton is installed there")
    rows = _compiled(directory, environment, workers)
    bad = [row for row in rows if row["problem"] and row["shipped"]]
    problems = tuple(f"{row['kernel']}, {row['shape']}, {row['family']}: {row['problem']}" for row in bad)
    return Other(version, len(rows), problems, _tested(environment, workers))


def _compiled(directory: Path, environment: dict[str, str], workers: int) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "one.md"
        command = [sys.executable, "-m", "benchmarks.compile_matrix", "--one", "--workers", str(workers)]
        done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True)
        if not out.exists():
            problem = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"--triton {directory}: {problem}")
        rows: list[dict[str, str]] = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        return rows


def _tested(environment: dict[str, str], workers: int) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers)]
    testing = {**environment, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *OPERATOR_TESTS], env=testing, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return ", ".join(re.findall(r"\d+ (?:passed|failed|errors?)", last)) or last


def section(others: Sequence[Other]) -> list[str]:
    """Lines of Markdown: a table of the versions, then their problems."""
    return [
        "",
        "## Other versions of Triton",
        "",
        "One call of each kernel with the configurations that ship, for all kinds of GPU, and the operator "
        "tests in float32 in the version's interpreter.",
        "",
        "| Triton | compilations | problems | operator tests |",
        "| --- | --- | --- | --- |",
        *(f"| {o.version} | {o.compilations} | {len(o.problems)} | {o.tests} |" for o in others),
        *(f"- {o.version}: {problem}" for o in others for problem in o.problems),
    ]
