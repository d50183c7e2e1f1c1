"""The GPU benchmark's whole path, on the CPU: Triton's interpreter, tiny sizes, a few operators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_models

OPERATORS = ("glu", "rms_norm")
STEP = "linear_scan_step"


def benchmark(*arguments: str, interpreted: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_whole_path_runs_in_the_interpreter(tmp_path: Path) -> None:
    named = [word for operator in (*OPERATORS, STEP) for word in ("--operator", operator)]
    done = benchmark("--device", "cpu", "--quick", "--no-tests", "--out", str(tmp_path), *named)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "triton-s-interpreter.json").read_text())
    assert {measured["operator"] for measured in results["operators"]} == set(OPERATORS)
    assert {step["operator"] for step in results["decode"]} == {STEP}
    assert results["failures"] == {}
    assert set(results["first_calls"]["warm"]) == set(OPERATORS)
    text = (tmp_path / "triton-s-interpreter.md").read_text()
    assert "nothing about speed" in text
    assert "90% of a copy" in text


@pytest.mark.parametrize(("name", "batch"), [("StripedMamba", 1), ("LFM2", 64)])
def test_whole_models_decode_at_one_place_again_and_again(name: str, batch: int) -> None:
    row = gpu_models.measure_model(
        name, batch, device=torch.device("cpu"), dtype=torch.float32, seconds=0.0, quick=True
    )
    assert row.seconds > 0
    assert row.weight_bytes > 0
    assert len(gpu_models.model_checks([row])) == (batch == 1)
    assert f"| {name} | {batch} | 20 |" in gpu_models.model_table([row])


def test_a_run_without_time_says_so_and_writes_what_it_has(tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--quick", "--no-tests", "--limit", "0", "--operator", "glu")
    done = benchmark(*arguments, "--out", str(tmp_path))
    assert done.returncode == 1, done.stderr
    results = json.loads((tmp_path / "triton-s-interpreter.json").read_text())
    assert results["operators"] == []
    assert all("time of the whole run" in problem for problem in results["failures"].values())
    assert len(results["failures"]) == 3  # forward, backward, first calls
    assert "What failed" in (tmp_path / "triton-s-interpreter.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu", "--operator", "foo"], "no such operator"),
        (["--device", "cpu", "--quick"], "name another folder"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], words: str) -> None:
    done = benchmark(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_the_interpreter_must_be_asked_for() -> None:
    done = benchmark("--device", "cpu", "--quick", "--out", "x", interpreted=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr
