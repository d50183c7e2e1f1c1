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

OPERATORS = [name for name in dispatch.operators() if dispatch.form(name, "triton") is not None]


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_kernel_compiles_for_every_target(operator: str, tmp_path: Path) -> None:
    # The compiler needs a process in which Triton does not interpret, as it does in this one.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_matrix", "--one", "--operator", operator]
    command += ["--out", str(tmp_path / "out.md")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    by_kernel: dict[str, set[str]] = {}
    for result in results:
        by_kernel.setdefault(result["kernel"], set()).add(result["family"])
    assert by_kernel
    assert all(targets == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"} for targets in by_kernel.values())


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_matrix", "--operator", "foo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "foo" in done.stderr
