"""The paper's experiment: its plan, its files, its longer trainings, and the whole path in parts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import paper, paper_retrain
from benchmarks.paper_environment import held_out, read_environment, record_environment
from benchmarks.paper_options import parser, plan_of
from benchmarks.paper_plan import SEARCHES, Folder, Plan, append_line, read_lines
from benchmarks.paper_retrain import layouts, read_longer, read_retrained, retrain
from benchmarks.paper_state import read_drifts
from star.data import Corpus
from star.genome import Genome
from star.pools import load_object
from star.proxy import ProxySettings
from star.search import RunStore, SearchSettings, preset, run
from star.search.corpus import CorpusRecord
from star.search.directory import RunDirectory
from star.search.results import evaluate_safely, failure
from star.search.settings import EXECUTION
from star.search.workers import Task, lost_twice

SMALL = replace(Plan().search, population=8, generations=4, depth=6)


# ---- files ---------------------------------------------------------------------------------------------


def test_half_a_line_of_a_killed_process_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": 2')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("line", ['{"genome": 1}', "[1]", '{"genome": "a", "seed": 0, "result": {}}'])
def test_a_damaged_record_is_named(tmp_path: Path, line: str) -> None:
    folder = Folder(tmp_path)
    folder.retrained_file.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"retrained.jsonl is damaged: line 1"):
        read_retrained(folder)


def test_a_plan_is_recorded_and_no_other_goes_on(tmp_path: Path) -> None:
    plan = Plan(search=SMALL)
    folder = Folder(tmp_path)
    folder.begin(plan)
    assert folder.plan().to_json() == plan.to_json()
    folder.begin(plan)
    with pytest.raises(ValueError, match=r"search.proxy.steps is 50 there, 60 here"):
        folder.begin(replace(plan, search=replace(SMALL, proxy=replace(SMALL.proxy, steps=60))))


def test_a_recorded_plan_has_every_setting() -> None:
    recorded = Plan(search=SMALL).to_json()["search"]
    assert set(recorded["proxy"]) == {item.name for item in dataclasses.fields(ProxySettings)}
    beside_execution = {item.name for item in dataclasses.fields(SearchSettings)} - set(EXECUTION)
    assert set(recorded) == beside_execution


def test_what_differs_from_the_beginning_is_named(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    then = {"versions": {"torch": "2.12", "numpy": "2.0"}, "processor": "A", "text": {}}
    assert record_environment(folder, then) == []
    assert record_environment(folder, then) == []
    now = {"versions": {"torch": "2.13", "numpy": "2.0"}, "processor": "A", "text": {}}
    assert record_environment(folder, now) == ["torch was 2.12, is 2.13"]
    assert read_environment(folder) == then
    folder.environment_file.write_text("[]")
    with pytest.raises(ValueError, match=r"environment.json is damaged"):
        read_environment(folder)


def test_a_damaged_drift_is_named(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    append_line(folder.drift_file, {"number": 0, "statistics": {}})  # of how many objectives?
    with pytest.raises(ValueError, match=r"drift.jsonl is damaged"):
        read_drifts(folder)


# ---- longer trainings ----------------------------------------------------------------------------------


def test_longer_trainings_share_neither_seed_nor_all_windows_with_the_search() -> None:
    plan = Plan(search=replace(SMALL, proxy=replace(SMALL.proxy, seed=7, extrapolate_to=400)))
    longer = plan.longer_settings()
    assert plan.longer_seeds() == [8, 9, 10]
    assert longer.proxy.validation_batches == 128
    assert longer.proxy.steps == 250
    assert longer.proxy.extrapolate_to == 0
    text = {"held_out_tokens": 10**6, "bytes_per_token": 1.0}
    searched, few = held_out(plan.search.proxy, text)
    later, many = held_out(longer.proxy, text)
    assert many == 8 * few == 8 * 32 * 128
    assert len(searched & later) == len(later) / 8  # as the page says


def test_held_out_windows_are_those_that_evaluations_read() -> None:
    proxy = replace(SMALL.proxy, batch_size=2, length=8, validation_batches=3)
    corpus = object.__new__(Corpus)
    corpus.train = corpus.validation = np.arange(1003, dtype=np.uint16)
    starts = [row[0] for inputs, _ in corpus.validation_batches(2, 8, 3) for row in inputs.tolist()]
    windows, _ = held_out(proxy, {"held_out_tokens": 1003, "bytes_per_token": 1.0})
    assert starts == [8 * window for window in sorted(windows)]


class Answers:
    """An engine that gives each training the same answer, and remembers which it was given."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.result, self.genomes = dict(result), list[str]()

    def evaluate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        for task in tasks:
            self.genomes.append(task.genome)
            yield task.id, self.result

    def close(self) -> None:
        """Nothing runs."""


def test_a_training_that_was_lost_with_its_worker_is_done_again(tmp_path: Path) -> None:
    folder, plan = Folder(tmp_path), Plan(search=SMALL, seeds=1)
    corpus = CorpusRecord("text", "hash", "key", 256)
    engine = Answers(lost_twice("it was killed by SIGKILL"))

    def start(lost: set[tuple[str, int]]) -> None:
        retrain(folder, plan, ["71111"], corpus, engine, lambda text: None, lost)

    first: set[tuple[str, int]] = set()
    start(first)
    start(first)  # a later stage of the same start leaves it
    assert engine.genomes == ["71111"]
    assert read_longer(read_retrained(folder), "71111").failed == 1
    engine.result = {"status": "ok", "reason": None, "objectives": {"quality": 2.0, "recall": 0.25}}
    start(set())
    assert engine.genomes == ["71111"] * 2
    found = read_longer(read_retrained(folder), "71111")
    assert (found.quality, found.recall, found.failed) == ((2.0,), (0.75,), 0)
    engine.result = {"status": "failed", "reason": "loss is nan", "objectives": {}}
    start(set())
    assert len(engine.genomes) == 2


def test_a_training_that_failed_by_itself_stays_failed(tmp_path: Path) -> None:
    folder, plan = Folder(tmp_path), Plan(search=SMALL, seeds=1)
    engine = Answers({"status": "failed", "reason": "loss is nan", "objectives": {}})
    for _ in range(2):
        retrain(
            folder, plan, ["71111"], CorpusRecord("text", "hash", "key", 256), engine, lambda _: None, set()
        )
    assert len(engine.genomes) == 1


# ---- the command ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def inline(lives: list[int], failing: Sequence[str] = ()) -> Callable[..., Any]:
    """A maker of engines that evaluate in this process; all of them together answer `lives[0]` times, and
    genomes of `failing` fail."""

    class Inline:
        def __init__(self, evaluator: str, settings: Mapping[str, Any], **_: object) -> None:
            self.evaluate_one, self.settings = load_object(evaluator), settings

        def evaluate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
            for task in tasks:
                if lives[0] == 0:
                    raise Killed
                lives[0] -= 1
                if task.genome in failing:
                    yield task.id, failure("made to fail")
                    continue
                yield (
                    task.id,
                    evaluate_safely(self.evaluate_one, task.genome, dict(self.settings), task.id, None),
                )

        def close(self) -> None:
            """Nothing runs."""

    return Inline


def without_seconds(data: Any) -> Any:
    """Without what two runs can not have the same: times, and what was measured on the device."""
    changing = ("seconds", "decode_p50_measured")
    if isinstance(data, dict):
        return {key: without_seconds(value) for key, value in data.items() if key not in changing}
    return [without_seconds(item) for item in data] if isinstance(data, list) else data


QUICK = ("--quick", "--workers", "1", "--drifts", "2")


def test_the_whole_path_stopped_and_gone_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lives = [0]
    for module in (run, paper_retrain):
        monkeypatch.setattr(module, "LocalEngine", inline(lives))
    monkeypatch.setattr(paper, "RESULTS", tmp_path / "published.md")

    def go(name: str, answers: int, *more: str) -> int:
        lives[0] = answers
        return paper.main(["--out", str(tmp_path / name), *more])

    assert go("whole", 10**6, *QUICK) == 0
    whole = Folder(tmp_path / "whole")
    page, data = whole.report_files[0].read_text(), json.loads(whole.report_files[1].read_text())
    assert "**All of it.**" in page
    assert page.count("| quality + size, ") == 2
    assert "Median error of these 5 predictions" in page
    assert list(data["searches"]) == list(SEARCHES)
    assert all(len(item["quality"]) == 2 for item in data["layouts"].values())
    assert data["drifts"] == {"1": 2, "2": 2, "4": 2}
    assert data["missing"] == []
    # Whole models are measured of the joint search's chosen and the layouts, and by no search.
    assert len(read_lines(whole.measured_file)) == 5
    with RunStore.open(whole.run("joint")) as store:
        assert not store.events("measured")

    # The same device for both, since two measurements differ.
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "device.json").write_bytes(whole.device_file.read_bytes())
    for answers in (5, 9, 17):
        with pytest.raises(Killed):
            go("parts", answers, *QUICK)
    parts = Folder(tmp_path / "parts")
    assert "Missing: the search for quality + size;" in parts.report_files[0].read_text()
    assert go("parts", 10**6, "--workers", "1") == 0  # all else as it was begun
    assert without_seconds(json.loads(parts.report_files[1].read_text())) == without_seconds(data)

    capsys.readouterr()
    assert go("parts", 0, *QUICK, "--steps", "3") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert go("none", 0, "--report-only") == 2
    assert "holds no experiment" in capsys.readouterr().err
    assert go("parts", 0, "--report-only", "--publish") == 2  # it is a quick one
    assert "--publish" in capsys.readouterr().err
    assert not (tmp_path / "published.md").exists()


def test_layouts_that_fail_everywhere_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = list(layouts(4).values())
    for module in (run, paper_retrain):
        monkeypatch.setattr(module, "LocalEngine", inline([10**6], failing))
    assert paper.main(["--out", str(tmp_path), *QUICK]) == 0
    page = (tmp_path / "paper.md").read_text()
    assert "**All of it.**" in page
    assert "Transformer++ failed" in page
    assert "trainings of Transformer++ failed, so nothing is compared with it" in page
    assert "▲" in page  # what Transformer++ costs is known without a training


def test_an_incomplete_experiment_is_published_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, data = tmp_path / "results" / "paper.md", tmp_path / "data" / "paper.json"
    monkeypatch.setattr(paper, "RESULTS", page)
    monkeypatch.setattr(paper, "DATA", data)
    Folder(tmp_path / "out").begin(Plan(search=SMALL))
    report = ["--out", str(tmp_path / "out"), "--report-only"]
    assert paper.main(report) == 0
    assert not page.exists()
    assert not data.exists()
    assert paper.main([*report, "--publish"]) == 0
    assert (
        "**Not finished.** Missing: the search for quality; the search for quality + size;"
        in page.read_text()
    )
    assert len(json.loads(data.read_text())["missing"]) == 8
    assert paper.main(["--out", str(tmp_path / "other"), "--quick", "--publish"]) == 2
    assert not (tmp_path / "other").exists()


def test_two_processes_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory(tmp_path).locked():
        assert paper.main(["--out", str(tmp_path), *QUICK]) == 2
    assert "is in use" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


# ---- options -------------------------------------------------------------------------------------------


def options(*arguments: str, recorded: Plan | None = None) -> Plan:
    return plan_of(parser(None).parse_args(["--out", "x", *arguments]), recorded)


def test_the_plan_that_options_describe() -> None:
    plan = options()
    assert (plan.search.population, plan.search.generations, plan.search.depth) == (16, 18, 24)
    assert (plan.best, plan.longer, plan.seeds, plan.drifts) == (8, 5, 3, 400)
    demo = preset("demo").proxy
    assert (plan.search.proxy.steps, plan.search.proxy.warmup_steps) == (50, 5)
    assert plan.search.proxy.schedule == demo.schedule
    assert (plan.search.proxy.device, plan.search.measure.device) == ("cpu", "cpu")
    wide = options("--width", "128", "--steps", "80")
    assert wide.search.proxy.learning_rate == pytest.approx(plan.search.proxy.learning_rate / 2)
    assert (wide.search.proxy.steps, wide.search.proxy.warmup_steps) == (80, 8)
    seeds = [plan.settings_of(name).seed for name in SEARCHES]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(ValueError, match="processor seconds"):
        options("--cpu-time", "--device", "cuda")
    with pytest.raises(ValueError, match="steps is 0"):
        options("--steps", "0")


def test_what_is_not_given_stays_as_it_was_begun() -> None:
    given = ("--preset", "laptop", "--width", "96", "--steps", "60", "--seeds", "2", "--text", "README.md")
    begun = options(*given, "--device", "cuda")
    # As if all defaults and the preset had been others then.
    proxy = replace(begun.search.proxy, schedule="cosine", average_evaluations=3, learning_rate=0.123)
    begun = replace(begun, longer=7, drifts=11, search=replace(begun.search, proxy=proxy, mutation_rate=0.2))
    recorded = Plan.from_json(json.loads(json.dumps(begun.to_json())))
    assert options(recorded=recorded).to_json() == begun.to_json()
    assert options(*given, recorded=recorded).to_json() == begun.to_json()
    assert options("--seeds", "4", recorded=recorded).seeds == 4
    assert options("--preset", "demo", recorded=recorded).to_json() != begun.to_json()
    with pytest.raises(ValueError, match="begun without it"):
        options("--quick", recorded=recorded)
    quick = options("--quick")
    assert (
        options(recorded=quick).to_json() == options("--quick", recorded=quick).to_json() == quick.to_json()
    )


def test_layouts_are_canonical() -> None:
    assert all(Genome.parse(key).key == key for key in layouts(24).values())
