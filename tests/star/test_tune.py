"""Tuning the Triton kernels: the same path as on a GPU, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def tune(table: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from star.cli import main; main()", "bench", "glu", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run([*command, "--tune", str(table)], env=environment, capture_output=True, text=True)


def test_a_table_is_written_and_added_to(tmp_path: Path) -> None:
    table = tmp_path / "deep" / "table.json"
    done = tune(table, "--shape", "1,4,32", "--json")
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout)
    assert [line["kernel"] for line in lines] == ["glu_forward", "glu_backward"]
    assert all(line["gain"] >= 1.0 for line in lines)
    written = json.loads(table.read_text())["configurations"]
    assert written["glu_forward"]["any"] == lines[0]["configuration"]
    table.write_text(json.dumps({"configurations": {"other": written["glu_forward"]}}))
    assert tune(table, "--shape", "1,4,32").returncode == 0
    assert set(json.loads(table.read_text())["configurations"]) == {"other", "glu_forward", "glu_backward"}


def test_a_damaged_table_is_left_alone(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text("{")
    done = tune(table, "--shape", "1,4,32")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert table.read_text() == "{"
