"""The benchmark of other people's models runs, and says what it measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

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


def test_a_stopped_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "transformers.md"
    options = ["--quick", "--threads", "1", "--out", str(out)]
    assert benchmark.main([*options, "--models", "lfm2", "--rows-only"]) == 0
    kept = tmp_path / "transformers.partial.jsonl"
    about, *tasks = (line for line in kept.read_text().split("\n") if line)
    # What a kill cut off is measured again, what is there is not.
    changed = re.sub(r'("parameters": )\d+', r"\g<1>7000000", about)
    kept.write_text("\n".join([changed, *tasks[:-1], tasks[-1][:40]]))
    assert benchmark.main([*options, "--models", "lfm2,mamba"]) == 0
    table = out.read_text()
    assert "| lfm2 | `Lfm2ShortConv` | 7.0 M |" in table
    assert "| mamba |" in table
    assert not kept.exists()


def test_limits_are_the_products_of_the_linear_layers() -> None:
    hybrid = next(model for model in MODELS if model.module == "lfm2")
    model = hybrid.build()
    token = benchmark._Decode(model, torch.randint(1, 61, (1, 8)), 3).sample(1)
    with benchmark._Products(model) as products:
        token()
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert products.numbers() == sum(weight.numel() + weight.shape[1] for weight in linear)
    products.again()
