"""`star eval`: what lm-eval is given, and what is made of its answer.

With lm-eval itself where it is installed, else with a stand-in for it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import evaluation, record, small_settings
from typer.testing import CliRunner

from star import Genome, build_model, weights
from star.commands import app
from star.search.directory import RunDirectory

pytest.importorskip("transformers", reason="needs the extra hf (transformers)")

TASKS = Path(__file__).parents[2] / "examples" / "tasks"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="star")


def refused(*arguments: object, code: int = 2) -> str:
    result = run(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    result = run("export", "--genome", "71111-91111", "--width", "16", "--to", tmp_path / "x")
    assert result.exit_code == 0, result.stderr
    return tmp_path / "x"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """lm-eval's names, where the calls are noted and one answer is given."""
    calls: list[dict[str, Any]] = []

    class TaskManager:
        def __init__(self, include_path: str | None, include_defaults: bool) -> None:
            self.names = ["arc", "hellaswag"] if include_defaults else []
            if include_path:
                self.names += [path.stem for path in Path(include_path).glob("*.yaml")]

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in self.names if name in names]

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        calls.append(given)
        return {
            "results": {
                "count": {
                    "alias": "count",
                    "acc,none": 0.25,
                    "acc_stderr,none": 0.1,
                    "ppl,strict": float("nan"),
                },
            },
            "n-samples": {"count": {"original": 24, "effective": 12}},
        }

    def module(name: str, **names: Any) -> None:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)

    module("lm_eval", simple_evaluate=simple_evaluate)
    module("lm_eval.tasks", TaskManager=TaskManager)
    module("lm_eval.models")
    module("lm_eval.models.huggingface", HFLM=lambda **given: given)
    monkeypatch.setattr("star.evaluation._versions", lambda: {"lm_eval": "0"})
    return calls


class TestStandIn:
    def test_gives_lm_eval_the_model_and_the_tasks(
        self, exported: Path, stand_in: list[dict[str, Any]]
    ) -> None:
        options = (
            "--include-path",
            TASKS,
            "--shots",
            "2",
            "--limit",
            "12",
            "--max-length",
            "99",
            "--seed",
            "5",
        )
        result = run("eval", exported, "--tasks", "count", *options, "--json")
        assert result.exit_code == 0, (result.stderr, result.exception)
        (call,) = stand_in
        assert call["tasks"] == ["count"]
        assert (call["num_fewshot"], call["limit"], call["random_seed"]) == (2, 12, 5)
        assert type(call["model"]["pretrained"]).__name__ == "StarForCausalLM"
        assert call["model"]["tokenizer"]("ab")["input_ids"] == [97, 98]
        assert call["model"]["max_length"] == 99
        value = json.loads(result.stdout)
        scores = [
            {"task": "count", "metric": "acc", "value": 0.25, "error": 0.1, "samples": 12},
            {"task": "count", "metric": "ppl (strict)", "value": None, "error": None, "samples": 12},
        ]
        assert value["scores"] == scores
        assert json.loads((exported / "evaluation.json").read_text()) == value

    def test_shows_a_table(self, exported: Path, stand_in: list[dict[str, Any]], tmp_path: Path) -> None:
        out = tmp_path / "results" / "all.json"
        result = run("eval", exported, "--tasks", "arc,hellaswag", "--out", out)
        assert "0.2500" in result.stdout
        assert out.is_file()
        assert stand_in[0]["tasks"] == ["arc", "hellaswag"]

    def test_takes_a_run(self, stand_in: list[dict[str, Any]], tmp_path: Path) -> None:
        genome = Genome.parse("71111-91111")
        rows = [evaluation(0, genome, 0, objectives={"quality": 2.5, "size": 4096})]
        directory = record(tmp_path / "run", rows)
        model = build_model(genome, small_settings().model, seed=0)
        weights.save_weights(model, RunDirectory(directory).weights_of(0), {"genome": str(genome)})
        assert run("eval", directory, "--tasks", "arc").exit_code == 0
        assert (
            "candidate 0" in json.loads((directory / "export" / "evaluation-best.json").read_text())["model"]
        )

    def test_refuses(self, exported: Path, stand_in: list[dict[str, Any]], tmp_path: Path) -> None:
        assert "'nothing', which is no task in lm-eval" in refused("eval", exported, "--tasks", "arc,nothing")
        assert f"lm-eval or {TASKS}" in refused("eval", exported, "--tasks", "sum", "--include-path", TASKS)
        assert "--tasks is empty" in refused("eval", exported, "--tasks", ",")
        assert "takes a folder" in refused(
            "eval", exported, "--tasks", "arc", "--include-path", tmp_path / "no"
        )
        assert "does not exist" in refused("eval", tmp_path / "missing", "--tasks", "arc")
        assert "holds a single model" in refused("eval", exported, "--tasks", "arc", "--id", "3")
        (exported / "model.safetensors").write_bytes(b"\x00" * 64)
        assert "not a sound safetensors file" in refused("eval", exported, "--tasks", "arc")
        (exported / "tokenizer.json").unlink()
        assert "no tokenizer.json" in refused("eval", exported, "--tasks", "arc")
        assert stand_in == []


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_names_the_extra_where_lm_eval_is_missing(exported: Path) -> None:
    line = refused("eval", exported, "--tasks", "arc", code=1)
    assert "pip install 'star-kernels[eval]'" in line


def test_with_lm_eval_itself(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval (lm-eval)")
    monkeypatch.chdir(TASKS.parents[1])
    result = run("eval", exported, "--tasks", "count", "--include-path", TASKS, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    scores = {score["metric"]: score for score in json.loads(result.stdout)["scores"]}
    assert scores["acc"]["samples"] == 24
    assert 0 <= scores["acc"]["value"] <= 1
    assert scores["acc"]["error"] > 0
