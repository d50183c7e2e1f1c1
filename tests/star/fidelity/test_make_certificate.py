"""Certificates of run directories: made, gone on with, refused, shown; with workers and the command."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import retrainings
from longer import longer_quality
from recorded_runs import evaluation, finished_run, genomes, record, small_settings
from retrainings import lines
from typer.testing import CliRunner

import star.fidelity.run as run_module
from star.commands import app
from star.data import open_corpus
from star.fidelity.certificate import Certificate, certify
from star.fidelity.checksum import with_checksum
from star.fidelity.document import read_certificate
from star.fidelity.retrain import retrain
from star.fidelity.run import Event, RetrainingFinished, RetrainingStarted, make_certificate
from star.fidelity.settings import FidelitySettings
from star.proxy import ProxySettings, train_candidate
from star.report import read_run
from star.report.fidelity import fidelity_section
from star.report.page import page
from star.search.corpus import CorpusRecord
from star.search.directory import RunDirectory
from star.search.errors import RunDamaged, RunError, RunInUse
from star.search.events import WorkerLost
from star.search.settings import DataSettings
from star.search.store import RunStore

SETTINGS = FidelitySettings(sample=5, budget=4, seeds=2)
ROUNDS = 40
OPTIONS = ("--sample", "5", "--budget", "4", "--seeds", "2")


def make(
    run: Path, settings: FidelitySettings = SETTINGS, evaluator: str = "score", **options: Any
) -> Certificate:
    options.setdefault("open_corpus", retrainings.open_corpus)
    return make_certificate(run, settings, evaluator=f"longer:{evaluator}", **options)


@pytest.fixture(autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds of the bootstrap, and real workers only where a test asks for them."""
    monkeypatch.setattr(run_module, "certify", partial(certify, rounds=ROUNDS))
    if request.node.get_closest_marker("usefixtures") is None:
        monkeypatch.setattr(run_module, "LocalEngine", retrainings.InlineEngine)


@pytest.fixture
def workers() -> None:
    """Marks a test of worker processes."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its certificate, only to be read."""
    run = finished_run(tmp_path_factory.mktemp("certified") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "LocalEngine", retrainings.InlineEngine)
        patch.setattr(run_module, "certify", partial(certify, rounds=ROUNDS))
        make(run)
    return run


def test_longer_trainings_end_well_whatever_the_proxy_does() -> None:
    proxy = ProxySettings(steps=8, warmup_steps=2, schedule="constant", extrapolate_to=80, seed=4)
    longer = FidelitySettings(budget=5, seeds=2).trainings(proxy)
    assert [item.seed for item in longer] == [5, 6]
    for item in longer:
        assert (item.steps, item.warmup_steps, item.schedule, item.extrapolate_to) == (40, 10, "cosine", 0)


def test_every_candidate_of_the_sample_is_retrained_with_every_seed(certified: Path) -> None:
    certificate = read_certificate(certified)
    assert certificate is not None
    assert len(certificate.candidates) == 5
    with RunStore.open(certified) as store:
        recorded = {item.id: item for item in store.evaluations()}
        proxy = store.settings().proxy
    seeds = (proxy.seed + 1, proxy.seed + 2)
    for item in certificate.candidates:
        assert item.genome == recorded[item.id].key
        assert item.proxy == recorded[item.id].objectives["quality"]
        assert item.qualities == tuple(longer_quality(item.genome, seed) for seed in seeds)
    rows = [json.loads(line) for line in lines(certified)[1:]]
    assert len(rows) == 10
    assert {row["training"]["steps"] for row in rows} == {4 * proxy.steps}
    # Seed by seed, so that what is stopped half way has compared all candidates once.
    assert [row["training"]["seed"] for row in rows] == [seeds[0]] * 5 + [seeds[1]] * 5
    assert certificate.seconds == 20.0


def test_nothing_is_trained_twice_and_a_larger_certificate_goes_on(run: Path) -> None:
    make(run)
    events: list[Event] = []
    first = lines(run)
    again = make(run, on_event=events.append, evaluator="nothing_of_this_name")
    assert lines(run) == first
    assert [type(event) for event in events] == [RetrainingStarted]
    assert again.settings == SETTINGS
    make(run, FidelitySettings(sample=6, budget=4, seeds=3))
    longer = lines(run)
    assert longer[: len(first)] == first
    assert len(longer) == 1 + 6 * 3
    make(run, FidelitySettings(sample=5, budget=3, seeds=1))
    assert len(lines(run)) == 1 + 6 * 3 + 5


def test_killed_anywhere_it_ends_as_if_it_had_not_been(certified: Path, run: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(event: Event) -> None:
        if isinstance(event, RetrainingFinished) and event.finished in (3, 7):
            raise Killed

    with pytest.raises(Killed):
        make(run, on_event=kill)
    assert not (run / "fidelity.json").exists()
    with open(run / "fidelity.jsonl", "ab") as file:
        file.write(b'{"genome": "half a li')
    with pytest.raises(Killed):
        make(run, on_event=kill)
    assert len(lines(run)) == 1 + 7
    make(run)
    assert (run / "fidelity.json").read_bytes() == (certified / "fidelity.json").read_bytes()
    assert lines(run) == lines(certified)


def test_killed_before_the_first_line_was_whole(run: Path, certified: Path) -> None:
    (run / "fidelity.jsonl").write_bytes(b'{"corpus":"cdcd')
    make(run)
    assert lines(run) == lines(certified)


def test_a_full_disk_loses_no_training(run: Path, certified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    appended = 0

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal appended
        appended += b'"genome"' in data
        return write(descriptor, data[:20] if appended == 4 else data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(RunError, match=r"fidelity\.jsonl can not be written: no room on the disk"):
            make(run)
    assert len(lines(run)) == 1 + 3 + 1
    make(run)
    assert lines(run) == lines(certified)


@pytest.mark.usefixtures("workers")
def test_the_number_of_workers_changes_nothing(run: Path, certified: Path) -> None:
    make(run, workers=3)
    assert (run / "fidelity.json").read_bytes() == (certified / "fidelity.json").read_bytes()


@pytest.mark.usefixtures("workers")
def test_a_lost_worker_costs_no_training(run: Path) -> None:
    events: list[Event] = []
    certificate = make(run, evaluator="deadly", on_event=events.append)
    lost = [event for event in events if isinstance(event, WorkerLost)]
    ids = [item.id for item in certificate.candidates]
    assert [(event.candidate_id, event.retried) for event in lost] == [(ids[0], True), (ids[0], False)]
    (failure,) = certificate.failures
    assert failure[0].id == ids[0]
    assert "its worker died 2 times" in failure[1]


def test_failures_are_recorded_and_not_tried_again(run: Path) -> None:
    certificate = make(run, evaluator="some_fail")
    assert len(certificate.failures) == 3
    assert len(certificate.ranked) == 4
    again = make(run)
    assert again.failures == certificate.failures


def test_the_run_is_as_it_was(run: Path) -> None:
    with RunStore.open(run) as store:
        before = store.archive()
    make(run)
    with RunStore.open(run) as store:
        assert store.archive() == before
    assert {path.name for path in run.iterdir()} == {
        *("run.db", "config.json", "run.lock", "weights", "report", "export"),
        *("fidelity.json", "fidelity.jsonl"),
    }


def test_a_worker_trains_as_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAR_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} of a text that says little" for number in range(400)))
    corpus = open_corpus([str(text)])
    search = replace(
        small_settings(objectives=("quality",)),
        data=DataSettings(source=(str(text),)),
        proxy=ProxySettings(
            steps=2, batch_size=1, length=16, warmup_steps=1, validation_batches=1, threads=1
        ),
    )
    found = CorpusRecord(
        corpus.name, corpus.content_hash, corpus.key, corpus.vocab_size, str(corpus.directory)
    )
    longer = FidelitySettings(budget=2, seeds=2).trainings(search.proxy)
    given = run_module._worker_settings(search, longer, found)
    genome = genomes(1, 2)[0]
    for task, seed in ((6, 0), (7, 1)):
        expected = train_candidate(genome, search.model, longer[seed], corpus)
        result = retrain(genome.key, given, task, None)
        assert result["objectives"]["quality"] == expected.quality is not None
        assert expected.tokens == 4 * 16


class TestRefuses:
    def test_another_text(self, run: Path) -> None:
        with pytest.raises(RunError, match="'other text' is not what this run began with"):
            make(run, open_corpus=retrainings.open_other_corpus)
        assert not (run / "fidelity.jsonl").exists()

    def test_a_run_in_use(self, run: Path) -> None:
        with RunDirectory(run).locked(), pytest.raises(RunInUse):
            make(run)

    def test_a_run_of_one_candidate(self, tmp_path: Path) -> None:
        run = record(tmp_path / "run", [evaluation(0, genomes(1)[0], 0)])
        with pytest.raises(RunError, match="has 1 candidates that were trained"):
            make(run)

    def test_evaluations_that_lack_what_was_searched_for(self, tmp_path: Path) -> None:
        made = genomes(3)
        rows = [evaluation(id, genome, 0) for id, genome in enumerate(made)]
        rows[1] = evaluation(1, made[1], 0, objectives={"quality": 1.0})
        run = record(tmp_path / "run", rows)
        with pytest.raises(RunDamaged, match="evaluation 1 has no size"):
            make(run)

    @pytest.mark.usefixtures("workers")
    def test_workers_that_can_not_start(self, run: Path) -> None:
        with pytest.raises(RunError, match="can not be imported"):
            make(run, evaluator="nothing_of_this_name")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda rows: ["no json", *rows[1:]], "line 1 is not JSON"),
            (lambda rows: ["[]", *rows[1:]], "no record of star fidelity"),
            (lambda rows: [rows[0].replace('"format":2', '"format":9'), *rows[1:]], "another version"),
            (lambda rows: [rows[0].replace("cdcd", "efef"), *rows[1:]], "another model or text"),
            (lambda rows: [rows[0], "", *rows[1:]], "line 2 is not JSON"),
            (lambda rows: [rows[0], "7", *rows[1:]], "line 2: takes genome, quality"),
            (lambda rows: [rows[0], "[" * 100_000, *rows[1:]], "line 2 is not JSON"),
            (lambda rows: [*rows[:3], re.sub('"quality":[0-9.]+', '"quality":NaN', rows[3])], "line 4"),
            (lambda rows: [*rows[:3], re.sub('"quality":[0-9.]+', '"quality":-1', rows[3])], "line 4"),
            (lambda rows: [*rows[:3], re.sub('"quality":[0-9.]+', '"quality":1e300', rows[3])], "line 4"),
            (lambda rows: [*rows[:3], re.sub('"seconds":[0-9.]+', '"seconds":null', rows[3])], "line 4"),
            (lambda rows: [*rows[:3], rows[3].replace('"ok"', '"failed"')], "line 4"),
            (lambda rows: [*rows[:3], rows[3].replace('"steps":', '"stepz":')], "unknown field 'stepz'"),
            (lambda rows: [*rows[:3], rows[3].replace('"steps":', '"steps":-')], "steps is -"),
            (lambda rows: [*rows[:3], re.sub('"dtype":"[a-z]+"', '"dtype":[]', rows[3])], "dtype is"),
            (lambda rows: [*rows[:3], re.sub('"quality":[0-9.]+', '"quality":1.5', rows[3])], "line 4: its"),
            (lambda rows: [*rows[:3], re.sub('"seed":[0-9]+', '"seed":77', rows[3])], "line 4: its checksum"),
            (
                lambda rows: [*rows[:3], re.sub('"checksum":"[0-9a-f]+",', "", rows[3])],
                "line 4: its checksum",
            ),
            (
                lambda rows: [*rows[:3], re.sub('"checksum":"[0-9a-f]+"', '"checksum":[]', rows[3])],
                "line 4: its",
            ),
        ],
    )
    def test_a_damaged_record(self, certified: Path, run: Path, change: Any, says: str) -> None:
        rows = change(lines(certified))
        (run / "fidelity.jsonl").write_text("".join(f"{row}\n" for row in rows))
        with pytest.raises(RunDamaged, match=re.escape(says)) as caught:
            make(run, evaluator="nothing_of_this_name")
        assert "fidelity.jsonl" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_record_that_is_a_link(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("")
        (run / "fidelity.jsonl").symlink_to(tmp_path / "precious")
        with pytest.raises(RunDamaged, match="must be a plain file"):
            make(run)
        assert (tmp_path / "precious").read_text() == ""


class TestReport:
    def test_says_that_it_has_not_been_run(self, run: Path) -> None:
        summary = read_run(run)
        text = page(summary, [], {})
        assert "How far to believe the order" in text
        assert f"star fidelity {run}" in text
        assert "that spread was not measured here" in text
        assert summary.to_json()["fidelity"] is None

    def test_says_that_the_run_has_gone_on(self, certified: Path) -> None:
        certificate = read_certificate(certified)
        assert certificate is not None
        section = fidelity_section(certificate, certificate.evaluations + 1, certified)
        assert "The run has gone on since, from 15 to 16 evaluations." in section
        assert "has gone on" not in fidelity_section(certificate, certificate.evaluations, certified)

    def test_refuses_the_certificate_of_another_run(self, certified: Path, tmp_path: Path) -> None:
        other = finished_run(tmp_path / "other")
        whole = json.loads((certified / "fidelity.json").read_text())
        whole["candidates"][0]["proxy"] = 1.25
        (other / "fidelity.json").write_text(json.dumps(with_checksum(whole)))
        with pytest.raises(RunDamaged, match="is of another run: candidate"):
            read_run(other)

    @pytest.mark.parametrize("name", ["value", "high"])
    def test_refuses_a_tau_that_was_edited(self, certified: Path, tmp_path: Path, name: str) -> None:
        other = finished_run(tmp_path / "other")
        whole = json.loads((certified / "fidelity.json").read_text())
        whole["kendall_tau"][name] = 0.99
        (other / "fidelity.json").write_text(json.dumps(whole))
        result = CliRunner().invoke(app, ["report", str(other)])
        assert result.exit_code == 2
        assert re.fullmatch(r"star: .*fidelity\.json is damaged: its checksum.*anew\n", result.stderr)

    def test_says_in_the_terminal_whether_the_ranking_is_certified(self, run: Path, certified: Path) -> None:
        def printed(directory: Path, *options: str) -> str:
            result = CliRunner().invoke(app, ["report", str(directory), *options])
            assert result.exit_code == 0, result.output
            return result.stdout

        said = f"The ranking is not certified: star fidelity {run}"
        assert f"• {said}\n" in printed(run)
        assert json.loads(printed(run, "--json"))["verdicts"][-1] == said
        assert said in (run / "report" / "index.html").read_text("utf-8")
        certificate = read_certificate(certified)
        assert certificate is not None
        tau = f"is {certificate.tau.value:.2f} (95 %: ".replace("-", "−")
        for text in (printed(certified), " ".join(json.loads(printed(certified, "--json"))["verdicts"])):
            assert "not certified" not in text
            assert tau in text


class TestCommand:
    @pytest.fixture(autouse=True)
    def without_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run_module, "EVALUATOR", "longer:score")

        def make_without_text(*arguments: Any, **options: Any) -> Certificate:
            return make_certificate(
                *arguments, evaluator="longer:score", open_corpus=retrainings.open_corpus, **options
            )

        monkeypatch.setattr(run_module, "make_certificate", make_without_text)

    def call(self, *arguments: object) -> Any:
        return CliRunner().invoke(app, ["fidelity", *map(str, arguments)])

    def test_prints_the_certificate_and_writes_the_report(self, run: Path) -> None:
        result = self.call(run, *OPTIONS)
        assert result.exit_code == 0, result.output
        assert "10 longer trainings of 5 candidates" in result.stdout
        assert "Kendall's tau between the order under the proxy" in result.stdout
        assert "among retrained" in result.stdout
        text = (run / "report" / "index.html").read_text("utf-8")
        certificate = read_certificate(run)
        assert certificate is not None
        assert f"{certificate.tau.value:.2f}".replace("-", "−") in text
        assert "Parameter count alone reaches" in text
        assert "among retrained" in text
        assert "Quality in the search and after longer training" in text
        assert f"star fidelity {run}" not in text
        assert f"that spread is {certificate.noise.deviation:.4f}" in text
        assert (run / "report" / "fidelity.png").is_file()

    def test_json_is_the_file(self, run: Path) -> None:
        result = self.call(run, *OPTIONS, "--json", "--no-report")
        assert result.exit_code == 0, result.output
        printed = json.loads(result.stdout)
        written = json.loads((run / "fidelity.json").read_text())
        assert {name: printed[name] for name in written} == written
        assert printed["report"] is None
        assert not (run / "report" / "index.html").exists()

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--sample", "1"), "sample is 1, takes an integer from 2"),
            (("--budget", "0"), "budget is 0"),
            (("--seeds", "1000"), "seeds is 1000"),
        ],
    )
    def test_refuses_wrong_numbers(self, run: Path, arguments: tuple[str, ...], says: str) -> None:
        result = self.call(run, *arguments)
        assert result.exit_code == 2
        assert says in result.stderr

    @pytest.mark.parametrize("kind", ["missing", "empty", "no run", "damaged", "file"])
    def test_refuses_what_is_no_run(self, tmp_path: Path, run: Path, kind: str) -> None:
        directory = {"missing": tmp_path / "nowhere", "empty": tmp_path / "empty"}.get(kind, run)
        (tmp_path / "empty").mkdir()
        if kind == "no run":
            (run / "run.db").write_bytes(b"")
        elif kind == "damaged":
            (run / "fidelity.jsonl").write_text("[]\n")
        elif kind == "file":
            directory = run / "run.db"
        result = self.call(directory)
        assert result.exit_code == 2
        assert ("is not a directory" in result.stderr) == (kind == "file")
        assert re.fullmatch(r"star: .+\n", result.stderr)

    def test_stopped_by_hand(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*arguments: Any, **options: Any) -> Certificate:
            raise KeyboardInterrupt

        monkeypatch.setattr(run_module, "make_certificate", stop)
        result = self.call(run, *OPTIONS)
        assert result.exit_code == 130
        assert "the same command goes on" in result.stderr

    def test_all_failures_are_a_failure(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def make_failing(*arguments: Any, **options: Any) -> Certificate:
            return make_certificate(
                *arguments, evaluator="longer:all_fail", open_corpus=retrainings.open_corpus, **options
            )

        monkeypatch.setattr(run_module, "make_certificate", make_failing)
        result = self.call(run, *OPTIONS, "--no-report")
        assert result.exit_code == 1
        assert "every longer training" in result.stderr
        assert "10 of 10 longer trainings failed" in result.stdout
