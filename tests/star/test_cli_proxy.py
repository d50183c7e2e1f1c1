"""`--proxy NAME=VALUE` of star search and star train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import TINY, refused, run

from star.commands.errors import BadInput
from star.commands.proxy import proxy_settings
from star.search.store import RunStore

GENOME = "11111-91111"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {number} says little" for number in range(800)))
    return path


def test_texts_become_settings_of_their_kinds() -> None:
    given = ["schedule=constant", "average-evaluations = 4", "final_rate=0.5", "threads=2"]
    assert proxy_settings(given, {"steps": 7, "dtype": None}) == {
        "steps": 7,
        "schedule": "constant",
        "average_evaluations": 4,
        "final_rate": 0.5,
        "threads": 2,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("speed=1", "--proxy is 'speed=1', takes NAME=VALUE with one of steps, "),
        ("schedule", "--proxy is 'schedule', takes NAME=VALUE"),
        ("extrapolate_to=soon", "--proxy extrapolate_to is 'soon', takes an integer"),
        ("weight_decay=x", "--proxy weight_decay is 'x', takes a number"),
        ("steps=9", "--proxy steps is given twice"),
    ],
)
def test_refusals_name_the_setting(given: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        proxy_settings([given], {"steps": 7})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("command", [["search"], ["train", GENOME, "--out", "unused"]])
def test_values_out_of_range_are_one_line(command: list[str]) -> None:
    assert "schedule is 'linear', takes one of cosine, constant" in refused(
        *command, "--proxy", "schedule=linear"
    )


def test_train_is_carried_out_as_told(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: list[Any] = ["--steps", 8, "--width", 16, "--head-dim", 4, "--length", 16, "--data", text]
    options += ["--proxy", "parametrization=mup", "--proxy", "base_width=8", "--proxy", "schedule=constant"]
    result = run("train", GENOME, "--out", out, *options, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads((out / "training.json").read_text())
    settings = record["identity"]["settings"]
    assert (settings["parametrization"], settings["base_width"], settings["schedule"]) == (
        "mup",
        8,
        "constant",
    )
    other = run("train", GENOME, "--out", out, *options[:-2])
    assert other.exit_code == 2
    assert "holds a training with schedule 'constant', not 'cosine'" in other.stderr


def test_search_trains_every_candidate_as_told(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    chosen = ["--proxy", "average_evaluations=2", "--proxy", "warmup_steps=1", "--no-references"]
    result = run("search", path, "--data", text, *TINY, "--generations", 1, "--no-report", *chosen)
    assert result.exit_code == 0, result.output
    proxy = json.loads((path / "config.json").read_text())["proxy"]
    assert (proxy["average_evaluations"], proxy["warmup_steps"], proxy["steps"]) == (2, 1, 4)


def test_a_run_says_which_qualities_were_not_extrapolated(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    chosen = ["--proxy", "extrapolate_to=90", "--proxy", "evaluate_every=2", "--no-references"]
    result = run("search", path, "--data", text, *TINY, "--generations", 1, *chosen)
    assert result.exit_code == 0, result.output
    with RunStore.open(path / "run.db") as store:
        recorded = list(store.evaluations())
    said = "not extrapolated: 2 evaluations after the warm-up, takes 4"
    assert [(item.status, item.reason) for item in recorded] == [("ok", said)] * 2
    assert said in (path / "report" / "index.html").read_text()


def test_tasks_have_no_proxy(tmp_path: Path) -> None:
    error = refused(
        "train", GENOME, "--task", "mqar", "--out", tmp_path / "x", "--proxy", "schedule=constant"
    )
    assert "--proxy is for texts" in error
