"""`star table`, `star compare`, and `star train --task` as commands."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import evaluation, finished_run, genomes, record
from typer.testing import CliRunner

from star.commands import app
from star.commands import table as table_command
from star.comparison import surrogate
from star.comparison.table import read
from star.config import ModelConfig
from star.proxy import ProxySettings
from star.search import SearchInterrupted, search
from star.search.events import CandidateFinished, Event
from star.search.settings import PRESETS, DataSettings, RecallSettings

TASK = "mqar:vocab_size=8,length=8,pairs=2"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="star")


def refused(*arguments: object) -> str:
    """The one line on stderr of a command that ends with 2 and prints nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    return str(lines[0])


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo preset, as small as a real search can be, on a text of its own."""
    text = tmp_path / "text.txt"
    text.write_text("some words that repeat " * 1000)
    demo = replace(
        PRESETS["demo"],
        depth=2,
        model=ModelConfig(width=16, head_dim=4),
        proxy=ProxySettings(
            steps=2, batch_size=2, length=16, warmup_steps=1, validation_batches=1, threads=1
        ),
        recall=RecallSettings(task=TASK, steps=2, batch_size=2, warmup_steps=1, validation_batches=1),
        data=DataSettings(source=(str(text),)),
    )
    monkeypatch.setitem(PRESETS, "demo", demo)
    monkeypatch.setenv("STAR_CACHE", str(tmp_path / "cache"))


class TestTable:
    def test_is_made_from_runs_and_grows(self, tmp_path: Path) -> None:
        first, path = finished_run(tmp_path / "first"), tmp_path / "genomes.parquet"
        made = run("table", "--extend", path, first)
        assert made.exit_code == 0, made.stderr
        assert "15 rows, 15 of them new" in made.stdout
        assert "15 genomes (1 failed)" in made.stdout
        again = json.loads(run("table", "--extend", path, first, "--json").stdout)
        assert (again["rows"], again["new"], again["failed"]) == (15, 0, 1)
        assert again["objectives"] == ["cache", "flops", "quality", "size"]
        assert json.loads(run("table", "--extend", path, "--json").stdout)["rows"] == 15

    def test_trains_random_and_evolved_genomes(self, tmp_path: Path, tiny: None) -> None:
        path, folder = tmp_path / "genomes.csv", tmp_path / "run"
        line = ("table", "--extend", path, "--random", "8", "--run", folder, "--workers", "1")
        made = run(*line)
        assert made.exit_code == 0, made.stderr
        rows = read(path)
        assert sum(row.origin == "random" for row in rows) == 2
        assert sum(row.origin == "offspring" for row in rows) == 6
        assert sum(row.origin.startswith("reference:") for row in rows) == 3
        assert all({"quality", "size", "cache", "flops", "recall"} <= row.objectives.keys() for row in rows)
        assert "11 rows, 0 of them new" in run(*line).stdout
        assert "holds a run of other settings" in refused(*line[:4], "12", *line[5:])
        assert "holds a run of other settings" in refused(*line, "--seed", "1")

    def test_goes_on_where_it_was_stopped(self, tmp_path: Path, tiny: None) -> None:
        settings = table_command._settings("demo", 8, 0, 1)
        line = ("table", "--random", "8", "--workers", "1")
        assert run(*line, "--extend", tmp_path / "whole.csv", "--run", tmp_path / "whole").exit_code == 0

        def interrupt(event: Event) -> None:
            if isinstance(event, CandidateFinished) and event.finished == 5:
                raise KeyboardInterrupt

        with pytest.raises(SearchInterrupted):
            search(settings, tmp_path / "cut", on_event=interrupt)
        ended = run(*line, "--extend", tmp_path / "cut.csv", "--run", tmp_path / "cut")
        assert ended.exit_code == 0, ended.stderr
        whole, cut = read(tmp_path / "whole.csv"), read(tmp_path / "cut.csv")
        assert [replace(row, seconds=0.0) for row in whole] == [replace(row, seconds=0.0) for row in cut]

    def test_trains_again_with_further_seeds(self, tmp_path: Path, tiny: None) -> None:
        """A few at first, then more of them: what is there is not trained again."""
        path, folder = tmp_path / "genomes.csv", tmp_path / "run"
        made = run("table", "--extend", path, "--random", "8", "--run", folder, "--workers", "1")
        assert made.exit_code == 0, made.stderr
        first = read(path)
        line = ("table", "--extend", path, folder, "--workers", "1", "--json", "--again")
        said = run(*line, "3", "--seeds", "1")
        assert said.exit_code == 0, said.stderr
        assert "3 further trainings of 3 genomes; about" in said.stderr
        value = json.loads(said.stdout)
        assert (value["rows"], value["new"]) == (14, 3)
        assert set(value["seed_agreement"]) == {"quality", "recall"}
        assert value["seed_agreement"]["quality"]["genomes"] == 3
        assert value["seed_agreement"]["quality"]["deviation"] > 0
        again = [row for row in read(path) if row.seed == 1]
        assert all(row.objectives.keys() == first[0].objectives.keys() for row in again)
        more = run(*line, "4", "--seeds", "2")
        assert "8 further trainings of 4 genomes, 3 of them are there already" in more.stderr
        assert json.loads(more.stdout)["rows"] == 11 + 8
        plain = run("table", "--extend", path, folder, "--again", "4")
        assert "quality: Kendall's tau" in plain.stdout
        assert "bits per byte (4 genomes of 3 seeds)" in plain.stdout
        assert "19 rows, 0 of them new" in plain.stdout
        assert "--again is 99, takes 2 to 11" in refused("table", "--extend", path, "--again", "99")
        # Without the run, the text is the preset's.
        assert "name a run of that text too" in refused("table", "--extend", path, "--again", "5")

    def test_refusals(self, tmp_path: Path) -> None:
        path = tmp_path / "genomes.csv"
        assert "takes --extend FILE" in refused("table")
        assert "ends in .parquet or .csv" in refused("table", "--extend", tmp_path / "genomes.xls")
        assert "does not exist: name runs" in refused("table", "--extend", path)
        assert "run directory missing does not exist" in refused("table", "--extend", path, "missing")
        empty = record(tmp_path / "empty", [])
        assert "has evaluated no candidate yet" in refused("table", "--extend", path, empty)
        assert "--random" in refused("table", "--extend", path, "--random", "3")
        assert "preset is 'huge'" in refused("table", "--extend", path, "--random", "8", "--preset", "huge")
        assert "--seeds is for --again" in refused("table", "--extend", path, "--seeds", "2")
        both = ("--again", "8", "--random", "8")
        assert "give --random in a command before it" in refused("table", "--extend", path, *both)
        assert "does not exist" in refused("table", "--extend", path, "--again", "8")
        path.write_text("genome,quality\n1,2\n")
        before = path.read_bytes()
        assert "the column depth is missing" in refused(
            "table", "--extend", path, finished_run(tmp_path / "r")
        )
        assert path.read_bytes() == before


class TestCompare:
    @pytest.fixture
    def table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(surrogate, "TREES", 10)
        members = [evaluation(id, genome, 0) for id, genome in enumerate(genomes(20))]
        path = tmp_path / "genomes.parquet"
        assert run("table", "--extend", path, record(tmp_path / "run", members)).exit_code == 0
        return path

    OPTIONS = ("--population", "4", "--generations", "2", "--seeds", "2", "--processes", "1")

    def test_prints_and_writes(self, table: Path, tmp_path: Path) -> None:
        page = tmp_path / "compare.md"
        result = run("compare", table, *self.OPTIONS, "--out", page)
        assert result.exit_code == 0, result.stderr
        for word in (
            "nsga2",
            "ga",
            "regularised",
            "random",
            "parameters",
            "Kendall's tau",
            "20 trained genomes",
        ):
            assert word in result.stdout
            assert word in page.read_text()
        assert page.read_text().count("| random |") == 1

    def test_the_page_has_what_it_takes_to_make_it_again(self, table: Path, tmp_path: Path) -> None:
        page = tmp_path / "compare.md"
        options = ("--population", "4", "--generations", "2", "--seeds", "1", "--processes", "1")
        result = run("compare", table, *options, "--algorithms", "random,nsga2", "--out", page)
        assert result.exit_code == 0, result.stderr
        text = page.read_text()
        command = (
            f"`star compare {table} --objectives quality,size --algorithms random,nsga2 --population 4 "
            "--generations 2 --seeds 1`"
        )
        assert command in text
        assert f"- {table}: 20 rows" in text
        assert "2 algorithms x 1 seed, " in text
        assert "rho" in text

    def test_where_to_write_is_checked_before_the_work(
        self, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("star.comparison.replay.Landscape", None)
        missing = tmp_path / "missing" / "compare.md"
        assert "folder" in refused("compare", table, "--out", missing)
        assert not missing.parent.exists()
        assert "takes the name of a file" in refused("compare", table, "--out", tmp_path)

    def test_json(self, table: Path) -> None:
        options = (*self.OPTIONS, "--algorithms", "random,nsga2", "--objectives", "quality,cache", "--json")
        value = json.loads(run("compare", table, *options).stdout)
        assert set(value["algorithms"]) == {"random", "nsga2"}
        assert value["objectives"] == ["quality", "cache"]
        assert value["genomes"] == 20
        assert set(value["surrogates"]["quality"]) == {"tau", "rho", "parameter_count_tau"}

    def test_refusals(self, table: Path, tmp_path: Path) -> None:
        assert "does not exist" in refused("compare", tmp_path / "missing.csv")
        assert "algorithm is 'nsga3', takes nsga2" in refused("compare", table, "--algorithms", "nsga3")
        assert "no values of recall" in refused("compare", table, "--objectives", "recall")
        assert "'speed'" in refused("compare", table, "--objectives", "speed")
        assert "objectives is empty" in refused("compare", table, "--objectives", "")
        table.write_bytes(table.read_bytes()[:-20])
        assert "no Parquet file or damaged" in refused("compare", table)

    def test_without_scikit_learn(self, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "star-kernels[compare]" in refused("compare", table)


class TestTrainOnATask:
    OPTIONS = ("--task", TASK, "--width", "16", "--steps", "6")

    def test_writes_weights_curve_and_result(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        result = run("train", "21111-91111", *self.OPTIONS, "--out", out)
        assert result.exit_code == 0, result.stderr
        assert "of the answers are right after 6 steps" in result.stdout
        assert "chance is 25.0 %" in result.stdout
        assert {path.name for path in out.iterdir()} == {
            "task.json",
            "curve.png",
            "model.safetensors",
            "training.lock",
        }
        assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
        again = json.loads(run("train", "21111-91111", *self.OPTIONS, "--out", out, "--json").stdout)
        assert again["task"]["pairs"] == 2
        assert [point[0] for point in again["curve"]] == [1, 2, 3, 4, 5, 6]
        assert again["accuracy"] == again["curve"][-1][2]

    def test_of_a_run(self, tmp_path: Path) -> None:
        directory = finished_run(tmp_path / "run")
        result = run("train", directory, "--id", "4", "--task", "compression:length=4", "--steps", "2")
        assert result.exit_code == 0, result.stderr
        assert (directory / "trained" / "4-compression" / "task.json").is_file()

    def test_stops_and_goes_on(self, tmp_path: Path) -> None:
        arguments = ["train", "11111-91111", "--task", TASK, "--width", "16", "--out", str(tmp_path / "out")]
        line = [
            sys.executable,
            "-m",
            "star.cli",
            *arguments,
            "--steps",
            "100000",
            "--evaluate-every",
            "50000",
        ]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for said in process.stdout:
            if said.startswith("step "):
                break
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 130, complaint
        assert "the same command goes on" in complaint
        assert (tmp_path / "out" / "checkpoint.safetensors").is_file()

    def test_refusals(self, tmp_path: Path) -> None:
        line = ("train", "11111", "--out", tmp_path / "out", "--task")
        assert "task is 'mqra', takes mqar, in-context-recall" in refused(*line, "mqra")
        assert "pairs is 99, takes 1 to 16" in refused(*line, "mqar:pairs=99")
        assert "--data is for texts" in refused(*line, "mqar", "--data", "x.txt")
        assert "--length is for texts" in refused(*line, "mqar", "--length", "9")
        assert "--evaluate-every is 0" in refused(*line, "mqar", "--evaluate-every", "0")
        assert "takes --out DIR" in refused("train", "11111", "--task", "mqar")
        assert not (tmp_path / "out").exists()
