"""Every Triton kernel is compiled for every kind of GPU, one configuration each, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["convolution", "recurrence", "attention", "others"])
def test_every_kernel_compiles_for_every_target(family: str, tmp_path: Path) -> None:
    from benchmarks.compile_matrix import forms

    # The compiler needs a process in which Triton does not interpret, as it does in this one.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    operators = [name for name, form in forms(None).items() if family_of(form) == family]
    assert operators
    named = [word for name in operators for word in ("--operator", name)]
    command = [sys.executable, "-m", "benchmarks.compile_matrix", "--one", "--out", str(tmp_path / "out.md")]
    done = subprocess.run([*command, *named], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    by_kernel: dict[str, set[str]] = {}
    for result in results:
        by_kernel.setdefault(result["kernel"], set()).add(result["family"])
    assert all(targets == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"} for targets in by_kernel.values())


def family_of(form: object) -> str:
    family = getattr(form, "__module__", "").split(".")[1]
    return family if family in ("convolution", "recurrence", "attention") else "others"
