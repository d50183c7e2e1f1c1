"""The command line: what it prints where, how it ends, and what it costs to start."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import evaluation, failed, finished_run, genomes, record, small_settings
from typer.testing import CliRunner

from star.commands import app
from star.commands.errors import Failed, one_line
from star.commands.search import carry_out
from star.search.algorithms import ALGORITHMS
from star.search.events import RunStarted
from star.search.objectives import OBJECTIVES
from star.search.settings import preset

COMMANDS = (
    *("search", "resume", "report", "show", "train", "table", "compare", "fidelity"),
    *("generate", "export", "eval", "profile", "bench"),
)
GENOME = "21211-31112-21221-32112"
SCREEN_LINES = 58  # of a window that fills a screen
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# As small as a real search can be.
TINY = (
    *("--depth", "2", "--width", "16", "--head-dim", "4", "--population", "2", "--generations", "2"),
    *("--steps", "4", "--batch-size", "2", "--length", "16", "--workers", "1"),
)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="star")


def refused(*arguments: object) -> str:
    """The one line on stderr of a command that ends with 2 and prints nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("star: ")
    return lines[0]


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    line = [sys.executable, "-m", "star.cli", *(str(argument) for argument in arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300, **options)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        lines = [f"line {line} of text {number}, which says little" for line in range(200)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpora of the tests do not end in the user's cache."""
    monkeypatch.setenv("STAR_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


class TestHelp:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_fits_a_screen_and_has_an_example(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("TERMINAL_WIDTH", "100")
        result = run(name, "--help")
        assert result.exit_code == 0
        lines = ANSI.sub("", result.stdout).splitlines()
        assert len(lines) <= SCREEN_LINES
        assert any(line.strip().startswith(f"star {name} ") for line in lines)

    def test_all_options_of_search(self) -> None:
        """Rare ones are not on the screen that --help fills, and are found all the same."""
        short, whole = (ANSI.sub("", run("search", option).stdout) for option in ("--help", "--help-all"))
        for rare in ("--timeout", "--measure-every", "--rung-confidence", "--tournament"):
            assert rare not in short
            assert rare in whole
        assert "--help-all" in short

    def test_search_names_all_that_it_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the 80 columns that a terminal has, with what is taken where nothing is said."""
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERMINAL_WIDTH", "80")
        shown = ANSI.sub("", run("search", "--help").stdout)
        words = " ".join(shown.replace("│", " ").split())
        assert "…" not in shown
        listed = words.partition("--objectives")[2].partition("--algorithm")[0]
        assert set(re.findall(r"[a-z0-9_]+", listed)) >= set(OBJECTIVES)
        assert f"{','.join(preset('demo').objectives)} by default" in listed
        listed = words.partition("--algorithm")[2].partition("--depth")[0]
        assert set(re.findall(r"[a-z0-9]+", listed)) >= set(ALGORITHMS)
        for default in ("demo (default", "nsga2 (default", "crowding (default"):
            assert default in words
        assert (preset("demo").algorithm, preset("demo").survival) == ("nsga2", "crowding")
        assert "Ctrl-C stops, star resume RUN goes on" in words

    def test_names_all_commands(self) -> None:
        result = run("--help")
        assert result.exit_code == 0
        assert all(name in result.stdout for name in COMMANDS)

    def test_nothing_heavy_is_imported(self) -> None:
        program = (
            "import sys; from star.commands import app\n"
            "try:\n    app(['--help'], prog_name='star')\nexcept SystemExit:\n    pass\n"
            "print(sorted({'torch', 'numpy', 'pymoo', 'matplotlib', 'scipy'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == "[]"

    def test_version(self) -> None:
        assert run("--version").stdout.startswith("star-kernels ")


class TestWrongInput:
    def test_names_the_gene(self) -> None:
        assert "gene 2 '2x112'" in refused("show", "21211-2x112")

    def test_names_the_reason_of_an_invalid_genome(self) -> None:
        assert "gene 2" in refused("show", "11211-21211")

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("show",), "takes a genome"),
            (("show", GENOME, "--pools"), "not both"),
            (("show", GENOME, "--id", "3"), "--id is for a run directory"),
            (("show", GENOME, "--depth", "3"), "--depth is for transformer_pp"),
            (("show", GENOME, "--width", "30"), "width is 30"),
            (("show", GENOME, "--out", "picture.gif"), "picture.gif"),
            (("show", GENOME, "--out", "no/such/folder/x.svg"), "no/such/folder/x.svg"),
            (("show", GENOME, "--width", "wide"), "--width"),
            (("show", "nothing"), "no run directory, no genome"),
            (("shwo", GENOME), "No such command 'shwo'"),
            (("search", "--preset", "huge"), "preset is 'huge', takes demo, laptop, paper"),
            (("search", "--objectives", "quality,speed"), "'speed', takes one or more of quality, size"),
            (("search", "--objectives", ""), "objectives is empty"),
            (("search", "--population", "1"), "population is 1"),
            (("search", "--classes", "1,18"), "18"),
            (("search", "--classes", "one"), "takes numbers and ranges"),
            (("search", "--classes", "1-99999999999"), "takes numbers from 1 to 99"),
            (("search", "--engine", "magic"), "engine is 'magic', takes local or ray"),
            (
                ("search", "--algorithm", "magic"),
                "algorithm is 'magic', takes nsga2, ga, regularised, random",
            ),
            (("search", "--length", "0"), "length is 0"),
            (("search", "--rungs", "0.25,half"), "takes parts of a training with commas, like 0.25,0.5"),
            (("search", "--rungs", "25"), "rungs has 25.0, takes parts of a training between 0 and 1"),
            (("search", "--rungs", "0.5", "--objectives", "size"), "foretell the objective quality"),
            (("search", "--timeout", "0"), "timeout is 0.0, takes a number above 0"),
            (("search", "--workers-per-gpu", "2", "--device", "cpu"), "the device of the proxy is the CPU"),
            (("search", "--workers-per-gpu", "2", "--workers", "2"), "both given"),
            (("search", "--measure-every", "-1"), "measured every is -1, takes an integer from 0"),
            (("search", "--colour", "red"), "--colour"),
            (("resume", "missing"), "run directory missing does not exist"),
            (("report", "missing"), "run directory missing does not exist"),
            (("generate", "missing"), "run directory missing does not exist"),
            (("train", "missing/run", "--out", "x"), "run directory missing/run does not exist"),
            (("train", GENOME), "--out"),
            (("bench", "magic"), "operator is 'magic', takes one of short_conv"),
            (("bench", "glu", "--shape", "1,2"), "glu takes 3 sizes: B L D"),
            (("bench", "glu", "--shape", "1,x,2"), "takes sizes with commas"),
            (("bench", "--shape", "1,2,3"), "--shape takes one operator"),
            (("bench", "glu", "--dtype", "int8"), "dtype is 'int8'"),
            (("bench", "glu", "--device", "tpu7"), "device is 'tpu7'"),
        ],
        ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
    )
    def test_is_one_line_and_exit_code_2(
        self, arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert says in refused(*arguments)
        assert list(tmp_path.iterdir()) == []

    def test_text_that_is_not_there(self, tmp_path: Path) -> None:
        assert "nowhere.txt" in refused("search", tmp_path / "run", "--data", "nowhere.txt")
        assert not (tmp_path / "run").exists()

    def test_text_that_is_too_short(self, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("short")
        line = refused("search", tmp_path / "run", "--data", tmp_path / "short.txt")
        assert "length" in line or "short.txt" in line

    def test_a_run_that_is_there_already(self, tmp_path: Path) -> None:
        assert "already holds a search" in refused("search", finished_run(tmp_path / "run"), *TINY)

    @pytest.mark.parametrize("name", ["resume", "report", "fidelity"])
    def test_a_run_that_is_a_file(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert refused(name, tmp_path / "file").endswith("file is not a directory")

    def test_a_run_that_is_damaged(self, tmp_path: Path) -> None:
        directory = finished_run(tmp_path / "run")
        (directory / "run.db").write_bytes(b"not a database" * 100)
        for name in ("resume", "report", "show", "generate"):
            assert "run.db" in refused(name, directory)

    def test_a_run_that_another_search_holds(self, tmp_path: Path) -> None:
        from star.search.directory import RunDirectory

        directory = finished_run(tmp_path / "run")
        with RunDirectory(directory).locked():
            assert "is in use" in refused("resume", directory)

    def test_a_run_without_successes(self, tmp_path: Path) -> None:
        directory = record(tmp_path / "run", [failed(0, genomes(1)[0], 0)])
        assert "no successful candidate" in refused("show", directory)
        assert "no successful candidate" in refused("generate", directory)
        assert "no candidate 7; its ids are 0 to 0" in refused("show", directory, "--id", "7")

    def test_a_candidate_that_is_no_genome(self, tmp_path: Path) -> None:
        from dataclasses import replace

        row = replace(evaluation(0, genomes(1)[0], 0), key="\x1b[31mred\n")
        line = refused("show", record(tmp_path / "run", [row]))
        assert "no genome" in line
        assert "\x1b" not in line


def test_one_line_keeps_terminals_safe() -> None:
    assert one_line("a\n b\tc\x1b[31m\x07") == "a b c\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}"


class TestShow:
    def test_draws_and_counts(self) -> None:
        result = run("show", GENOME)
        assert result.exit_code == 0
        assert "SA-2" in result.stdout
        assert "key of 2" in result.stdout
        assert "parameters" in result.stdout

    @pytest.mark.parametrize(
        ("options", "parameters", "cache"),
        [
            (("--depth", "24"), 84_934_656, 150_994_944),
            (("--depth", "48", "--width", "2048"), None, 805_306_368),
        ],
    )
    def test_gives_the_papers_figures(
        self, options: tuple[str, ...], parameters: int | None, cache: int
    ) -> None:
        value = json.loads(run("show", "transformer_pp", *options, "--json").stdout)
        assert value["cache_bytes"] == cache
        if parameters is not None:
            assert value["parameters"] == parameters
        assert value["families"] == {"attention": value["depth"] // 2, "memoryless": value["depth"] // 2}

    @pytest.mark.parametrize("suffix", ["svg", "png"])
    def test_draws_into_a_file(self, suffix: str, tmp_path: Path) -> None:
        picture = tmp_path / f"backbone.{suffix}"
        assert run("show", GENOME, "--out", picture).exit_code == 0
        assert picture.stat().st_size > 1000

    def test_takes_a_candidate_of_a_run(self, tmp_path: Path) -> None:
        directory = finished_run(tmp_path / "run")
        value = json.loads(run("show", directory, "--id", "4", "--json").stdout)
        assert value["candidate"]["id"] == 4
        assert value["config"]["width"] == 16
        assert "candidate" in run("show", directory).stdout

    def test_shows_the_pools(self) -> None:
        assert "GConv-2-Diff" in run("show", "--pools").stdout
        classes = json.loads(run("show", "--pools", "--json").stdout)
        assert [entry["id"] for entry in classes] == list(range(1, 18))
        assert classes[0]["operator"] == "12123"


class TestReport:
    def test_says_what_was_found_and_where_the_report_is(self, tmp_path: Path) -> None:
        directory = finished_run(tmp_path / "run")
        result = run("report", directory)
        assert result.exit_code == 0
        assert str(directory / "report" / "index.html") in result.stdout
        assert "Transformer++" in result.stdout
        assert (directory / "report" / "index.html").is_file()

    def test_json(self, tmp_path: Path) -> None:
        directory = finished_run(tmp_path / "run")
        value = json.loads(run("report", directory, "--json").stdout)
        assert value["finished"] is True
        assert value["candidates"] == 12
        assert value["failed"] == 1
        assert set(value["references"]) == {"Transformer++", "StripedMamba", "LFM2"}
        assert value["best"] in [item["id"] for item in value["front"]]
        assert len(value["hypervolume"]) == 3


class TestBench:
    def test_times_every_backend_and_the_copy(self) -> None:
        result = run("bench", "glu", "--shape", "1,8,16", "--seconds", "0.01", "--threads", "1", "--json")
        assert result.exit_code == 0, result.stderr
        (measurement,) = json.loads(result.stdout)
        assert measurement["sizes"] == {"B": 1, "L": 8, "D": 16}
        assert measurement["bytes"] == 3 * 8 * 16 * 4
        assert measurement["copy_seconds"] > 0
        assert "reference" in measurement["backends"]
        assert measurement["backends"]["reference"]["median_seconds"] > 0

    def test_table(self) -> None:
        result = run("bench", "rms_norm", "--shape", "1,8,16", "--seconds", "0.01", "--backward")
        assert result.exit_code == 0, result.stderr
        assert "forward + backward" in result.stdout
        assert "of a copy" in result.stdout

    def test_lists_the_operators(self) -> None:
        listed = json.loads(run("bench", "--list", "--json").stdout)
        assert listed["selective_scan"] == {"B": 1, "L": 2048, "D": 1536, "N": 16}


class TestSearch:
    """Real searches of the smallest size, in processes of their own."""

    def test_from_text_to_report_and_generated_text(self, text: Path, tmp_path: Path) -> None:
        directory = tmp_path / "run"
        result = command(
            "search", directory, "--data", text, "--objectives", "quality,cache", *TINY, "--json"
        )
        assert result.returncode == 0, result.stderr
        value = json.loads(result.stdout)
        assert value["finished"] is True
        assert value["objectives"] == ["quality", "cache"]
        assert Path(value["report"]).is_file()
        assert "Generation 2 of 2" in result.stderr

        again = command("resume", directory)
        assert again.returncode == 0, again.stderr
        assert "are there already" in again.stdout

        written = run("generate", directory, "line", "--tokens", "5", "--json")
        assert written.exit_code == 0, written.stderr
        assert json.loads(written.stdout)["prompt"] == "line"

        rest = [path.stem for path in (directory / "weights").iterdir()]
        other = next(str(id) for id in range(value["evaluations"]) if str(id) not in rest)
        retrained = run("generate", directory, "--id", other, "--tokens", "5")
        assert retrained.exit_code == 0, retrained.stderr
        assert f"training candidate {other} again" in retrained.stderr
        assert (directory / "weights" / f"{other}.safetensors").is_file()

        longer = directory / "trained" / str(value["best"])
        trained = run("train", directory, "--steps", "6", "--json")
        assert trained.exit_code == 0, trained.stderr
        assert json.loads(trained.stdout)["status"] == "ok"
        assert run("generate", longer, "line", "--tokens", "5").exit_code == 0
        assert "--id is for runs" in refused("generate", longer, "--id", "1")

    def test_a_search_without_a_success_fails(self, tmp_path: Path) -> None:
        directory = record(tmp_path / "run", [failed(0, genomes(1)[0], 0)])
        with pytest.raises(Failed, match="no candidate"):
            carry_out(lambda listener: None, directory, with_report=True, as_json=False)
        assert (directory / "report" / "index.html").is_file()

    @pytest.mark.parametrize(
        ("budgets", "says"),
        [
            (
                {"cache": 1e3},
                "cache at most 1.00 kB at width 16; the nearest, candidate 2, has cache 2.00 kB",
            ),
            (
                {"size": 90.0, "cache": 3e3},
                "cache at most 3.00 kB at width 16 and parameters at most 90 at width 16; the nearest, "
                "candidate 2, has parameters 99",
            ),
        ],
    )
    def test_a_search_without_a_candidate_within_the_budget(
        self, tmp_path: Path, budgets: dict[str, float], says: str
    ) -> None:
        made, caches = genomes(4), (9e3, 2e3, 5e3)
        rows = [failed(0, made[0], 0)]
        rows += [
            evaluation(id, made[id], 0, objectives={"quality": 3.0, "size": 97.0 + id, "cache": amount})
            for id, amount in enumerate(caches, start=1)
        ]
        directory = record(tmp_path / "run", rows, settings=small_settings(budgets=budgets))
        with pytest.raises(Failed, match=f"^no candidate keeps the budget: {says}$"):
            carry_out(lambda listener: None, directory, with_report=False, as_json=False)

    def test_says_once_that_a_budget_can_not_bind(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        directory = finished_run(tmp_path / "run")
        settings = small_settings(budgets={"cache": 1e9, "size": 1e4})

        def begin(stored: int) -> str:
            carry_out(
                lambda listener: listener(RunStarted(directory, settings, stored, 12)),
                directory,
                False,
                False,
            )
            return capsys.readouterr().out

        said = "Warning: the budget cache at most 1.00 GB at width 16 keeps nobody off the front: no backbone"
        assert begin(0).count("Warning: ") == begin(0).count(said) == 1
        assert "Warning: " not in begin(3)

    def test_ctrl_c_says_how_to_go_on(self, text: Path, tmp_path: Path) -> None:
        directory = tmp_path / "run"
        arguments = ["search", directory, "--data", text, *TINY, "--generations", "200", "--no-report"]
        line = [sys.executable, "-m", "star.cli", *(str(argument) for argument in arguments)]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for said in process.stdout:
            if "candidate 0" in said:
                break
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 130
        assert complaint == f"star: search stopped; continue with: star resume {directory}\n"


class TestTrain:
    OPTIONS = ("--depth", "2", "--width", "16", "--length", "16", "--batch-size", "2")

    def test_goes_on_where_it_was_stopped(self, text: Path, tmp_path: Path) -> None:
        arguments = ("train", "lfm2", *self.OPTIONS, "--data", text, "--steps", "100000")
        line = [sys.executable, "-m", "star.cli", *map(str, arguments), "--out", str(tmp_path / "out")]
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
        assert "is not finished" in refused("generate", tmp_path / "out")

    def test_same_weights_with_and_without_a_stop(self, text: Path, tmp_path: Path) -> None:
        from star import training_directory
        from star.baselines import lfm2
        from star.config import ModelConfig
        from star.data import open_corpus
        from star.proxy import ProxySettings
        from star.search.settings import DataSettings

        corpus = open_corpus(str(text), cache_directory=tmp_path / "cache")
        settings = ProxySettings(steps=6, batch_size=2, length=16, warmup_steps=1, threads=1)
        given = (lfm2(2), ModelConfig(width=16, head_dim=4), settings, corpus, DataSettings())
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        assert training_directory.train(whole, *given).ok
        asked = iter([False, False, True])
        with pytest.raises(training_directory.StoppedTraining):
            training_directory.train(stopped, *given, should_stop=lambda: next(asked))
        outcome = training_directory.train(stopped, *given)
        assert outcome.quality == training_directory.train(whole, *given).quality
        weights = [directory / "model.safetensors" for directory in (whole, stopped)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert not (stopped / "checkpoint.safetensors").exists()

    def test_another_training_in_the_same_directory_is_refused(self, text: Path, tmp_path: Path) -> None:
        first = run("train", "lfm2", *self.OPTIONS, "--data", text, "--steps", "2", "--out", tmp_path / "out")
        assert first.exit_code == 0, first.stderr
        options = ("--data", text, "--steps", "3", "--out", tmp_path / "out", "--json")
        other = run("train", "lfm2", *self.OPTIONS, *options)
        assert other.exit_code == 2
        assert other.stdout == ""
        assert "holds a training with steps 2, not 3" in other.stderr.splitlines()[-1]

    def test_a_damaged_record_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "training.json").write_text('{"format": 1, "identity": {}}')
        assert "is damaged" in refused("generate", tmp_path)


def test_a_missing_extra_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no typer', name='typer')")
    result = command("--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert result.stderr.startswith("star: the package typer is missing")
    assert len(result.stderr.splitlines()) == 1


def test_a_closed_pipe_is_no_traceback() -> None:
    line = f"{sys.executable} -m star.cli show --pools | head -n 1"
    result = subprocess.run(line, shell=True, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in result.stderr
