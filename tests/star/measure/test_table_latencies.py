"""Latencies of a device in the table of genomes: whose they are, what stays, and `star table --predict`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_tables import CONTEXTS, SETTINGS, table
from typer.testing import CliRunner

from star import baselines
from star.commands import app
from star.comparison.latencies import with_latencies
from star.comparison.table import Row, conditions_name, device_label, extend, read, write
from star.genome import Genome
from star.profile.predict import Predictor
from star.profile.table import ProfileTable

TABLE = table()
SHORT = table(replace(SETTINGS, contexts=CONTEXTS[:1]))
ON = device_label(TABLE)
NAMES = ("ttft", "prefill", "decode_p50", "decode_p95", "peak_memory")


def rows(count: int = 3) -> list[Row]:
    rng = np.random.default_rng(0)
    found = [baselines.lfm2(4).canonical(), *(Genome.random(4, rng).canonical() for _ in range(count - 1))]
    return [
        Row(
            genome.key,
            conditions_name({}),
            0,
            "random",
            "ok",
            "",
            1.5,
            {"quality": 2.0 + index, "size": 1000},
        )
        for index, genome in enumerate(found)
    ]


def failed(row: Row) -> Row:
    return replace(row, status="failed", reason="diverged", objectives={})


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="star")


def test_every_genome_gets_what_its_device_predicts() -> None:
    first, *others = with_latencies(rows(), TABLE)
    predicted = Predictor(TABLE).predict(Genome.parse(first.genome))
    for name in NAMES:
        assert first.objectives[name] == predicted[f"{name}@{CONTEXTS[0]}"]
        assert first.objectives[f"{name}@{CONTEXTS[1]}"] == predicted[f"{name}@{CONTEXTS[1]}"]
    assert first.objectives["quality"] == 2.0
    assert {row.device for row in (first, *others)} == {ON}
    assert others[0].objectives["ttft"] != first.objectives["ttft"]
    assert with_latencies([first, *others], TABLE) == [first, *others]


def test_a_failed_training_gets_a_device_and_no_values() -> None:
    (row,) = with_latencies([failed(rows(1)[0])], TABLE)
    assert (row.device, row.objectives) == (ON, {})


def test_rows_of_another_device_stay_and_gain_a_companion() -> None:
    other = replace(rows(1)[0], device="gpu 1", objectives={"quality": 2.0, "ttft": 7.0, "ttft@256": 9.0})
    stayed, new = with_latencies([other], SHORT)
    assert stayed == other
    assert new.device == device_label(SHORT)
    assert new.objectives.keys() == {"quality", *NAMES}
    assert new.objectives["ttft"] != 7.0
    assert with_latencies([stayed, new], SHORT) == [stayed, new]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_without_a_device_are_not_added_beside_those_with_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"genomes{suffix}"
    plain = rows()
    write(path, with_latencies(plain, TABLE))
    before = path.read_bytes()
    every, new = extend(path, plain)
    assert (len(every), new) == (3, 0)
    assert path.read_bytes() == before
    every, new = extend(path, [replace(plain[0], objectives={"quality": 9.0, "recall": 0.5})])
    assert (every[0].objectives["recall"], every[0].objectives["quality"], new) == (0.5, 2.0, 0)
    assert read(path) == every


def test_a_device_comes_to_rows_without_one(tmp_path: Path) -> None:
    path = tmp_path / "genomes.csv"
    plain = rows()
    write(path, [failed(plain[0]), *plain[1:]])
    every, new = extend(path, with_latencies(plain, TABLE)[:2])
    assert (len(every), new) == (3, 0)
    assert [row.device for row in every] == [ON, ON, ""]
    assert every[0].ok
    every, new = extend(path, [replace(plain[1], device="gpu 1")])
    assert (len(every), new) == (4, 1)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, profile = tmp_path / "genomes.csv", tmp_path / "device.json"
    write(path, rows())
    TABLE.write(profile)
    line = ("table", "--extend", path, "--predict")
    made = run(*line, "--profile", profile, "--json")
    assert made.exit_code == 0, made.stderr
    facts = json.loads(made.stdout)
    assert (facts["rows"], facts["predicted_for"]) == (3, ON)
    assert {*NAMES, "ttft@256"} <= set(facts["objectives"])
    assert read(path) == with_latencies(rows(), TABLE)

    def measure(settings: object, classes: object, **_: object) -> ProfileTable:
        return SHORT

    monkeypatch.setattr("star.profile.cached.find_or_measure", measure)
    again = run(*line)
    assert again.exit_code == 0, again.stderr
    assert "predicted for abacus" in again.stdout
    assert len(read(path)) == 6


def test_refusals(tmp_path: Path) -> None:
    path, profile = tmp_path / "genomes.csv", tmp_path / "device.json"
    write(path, rows())
    before = path.read_bytes()
    table(classes=[1]).write(profile)
    (tmp_path / "broken.json").write_text("{}")
    for options, words in (
        (("--profile", profile), "--profile is for --predict"),
        (("--predict", "--profile", profile), "has no LIV"),
        (("--predict", "--profile", tmp_path / "broken.json"), "broken.json is not a profile table"),
        (("--predict", "--profile", tmp_path / "none.json"), "can not be read"),
    ):
        refused = run("table", "--extend", path, *options)
        assert refused.exit_code == 2
        assert words in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert path.read_bytes() == before
