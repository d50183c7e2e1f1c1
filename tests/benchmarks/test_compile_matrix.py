"""Every Triton kernel is compiled for every kind of GPU, one configuration each, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from star_kernels import dispatch
from star_kernels.launch import tables

OPERATORS = [name for name in dispatch.operators() if dispatch.form(name, "triton") is not None]
# A process for several: half of the time of one operator is the start of its process.
GROUPS = [OPERATORS[place::4] for place in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("operators", GROUPS, ids=" ".join)
def test_every_kernel_compiles_for_every_target(operators: list[str], tmp_path: Path) -> None:
    # The compiler needs a process in which Triton does not interpret, as it does in this one.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_matrix", "--one", "--out", str(tmp_path / "out.md")]
    for operator in operators:
        command += ["--operator", operator]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    by_kernel: dict[str, set[str]] = {}
    for result in results:
        by_kernel.setdefault(result["kernel"], set()).add(result["family"])
    assert len(by_kernel) >= len(operators)
    # What the table of sm_90 has for these kernels is among it, at the one size of an operator's; the whole
    # matrix has the others. A spilled register ends with code 1.
    compiled = {(result["kernel"], result["shape"]) for result in results if result["family"] == "sm_90"}
    for kernel, shapes in tables.table_of("sm_90").items():
        if kernel in by_kernel:
            assert {(kernel, shape) for shape in shapes} & compiled, kernel
    assert all(targets == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"} for targets in by_kernel.values())


def test_another_triton_must_be_where_it_is_said_to_be(tmp_path: Path) -> None:
    from benchmarks.triton_versions import tried

    with pytest.raises(ValueError, match="no Triton is installed there"):
        tried(tmp_path, 1)


def test_other_versions_are_in_the_document() -> None:
    from benchmarks.triton_versions import Other, section

    well = Other("3.5.1", 10, (), "5 passed")
    assert well.well
    assert not Other("3.5.1", 10, (), "1 failed, 4 passed").well
    spilled = Other("3.9.0", 10, ("glu_forward, any, sm_90: 8 bytes of local memory a thread",), "5 passed")
    assert not spilled.well
    text = "\n".join(section([well, spilled]))
    assert "| 3.5.1 | 10 | 0 | 5 passed |" in text
    assert "- 3.9.0: glu_forward" in text


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_matrix", "--operator", "foo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "foo" in done.stderr
