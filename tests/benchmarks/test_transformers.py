"""The benchmark of other people's models runs, and says what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.hybrid_models import MODELS

pytest.importorskip("transformers")

from benchmarks import transformers as benchmark


def test_a_quick_run_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "transformers.md"
    options = ["--quick", "--threads", "1", "--models", "mamba,lfm2,recurrent_gemma", "--out", str(out)]
    assert benchmark.main(options) == 0
    text = out.read_text()
    assert [line.split(" | ")[0] for line in text.splitlines() if "M |" in line] == [
        "| mamba",
        "| lfm2",
        "| recurrent_gemma",
    ]
    assert "mamba: forward " in capsys.readouterr().out


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--models", "foo"])
    assert stopped.value.code == 2
    assert "no foo" in capsys.readouterr().err


def test_every_model_can_be_made_large() -> None:
    for model in MODELS:
        assert {"hidden_size", "vocab_size"} <= model.large().keys()
