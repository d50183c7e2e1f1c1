"""Searches for a device: predictions, budgets, whole models, resuming, and the report of it all."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import measured_search
import pytest
from known_tables import SETTINGS, Whole, table
from typer.testing import CliRunner

from star.commands import app
from star.config import ModelConfig
from star.fidelity.device import prediction_errors
from star.genome import Genome
from star.measure.errors import MeasurementError, OtherDevice
from star.measure.settings import MeasureSettings
from star.profile.predict import Predictor
from star.profile.table import ProfileTable
from star.report import read_run, write_report
from star.search.errors import RunDamaged, RunError, SearchInterrupted
from star.search.events import CandidateFinished, DeviceMeasured, DeviceUnsteady, Event
from star.search.run import resume, search
from star.search.settings import SearchSettings
from star.search.store import RunStore

ASKED = MeasureSettings(width=64, device="cpu", contexts=(64, 256), every=4)


def settings(**changes: Any) -> SearchSettings:
    base = SearchSettings(
        objectives=("quality", "ttft", "decode_p50@256"),
        population=6,
        generations=3,
        depth=4,
        model=ModelConfig(width=16, head_dim=4),
        measure=ASKED,
        workers=1,
        keep_weights=False,
    )
    return replace(base, **changes)


def find_table(asked: MeasureSettings, classes: Collection[int], tell: Callable[[str], None]) -> ProfileTable:
    tell("every LIV alone")
    return table(asked)


def begin(folder: Path, whole: Any = None, **options: Any) -> Any:
    return search(
        options.pop("settings", settings()),
        folder,
        evaluator="measured_search:score",
        open_corpus=measured_search.open_corpus,
        find_table=options.pop("find_table", find_table),
        measure_whole=Whole() if whole is None else whole,
        **options,
    )


def go_on(folder: Path, whole: Any, **options: Any) -> Any:
    return resume(
        folder,
        evaluator="measured_search:score",
        open_corpus=measured_search.open_corpus,
        measure_whole=whole,
        **options,
    )


def archive(folder: Path) -> bytes:
    with RunStore.open(folder) as store:
        return store.archive()


def measured_ids(folder: Path) -> list[int]:
    with RunStore.open(folder) as store:
        return [event.data["id"] for event in store.events("measured")]


@pytest.fixture(scope="module")
def whole() -> Whole:
    return Whole(factor=1.25)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, whole: Whole) -> Path:
    """A finished run, only to be read."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    begin(folder, whole)
    return folder


class TestSearch:
    def test_values_are_predictions_from_the_recorded_table(self, run: Path) -> None:
        with RunStore.open(run) as store:
            recorded = store.settings()
            evaluations = store.evaluations()
        assert recorded.profile is not None
        assert recorded.measure.threads is not None  # nothing is left open
        known = Predictor(recorded.profile)
        for item in evaluations:
            predicted = known.predict(Genome.parse(item.key))
            assert item.objectives["ttft"] == predicted["ttft@64"]
            assert item.objectives["decode_p50@256"] == predicted["decode_p50@256"]

    def test_the_front_and_every_fourth_are_measured_once(self, run: Path, whole: Whole) -> None:
        with RunStore.open(run) as store:
            ids = {item.id for item in store.evaluations()}
        on_front = {item.id for item in read_run(run).front}
        assert sorted(measured_ids(run)) == sorted({id for id in ids if id % 4 == 0} | on_front)
        assert len(whole.asked) == len(measured_ids(run))

    def test_resuming_a_finished_run_measures_nothing(self, run: Path) -> None:
        again = Whole()
        before = archive(run)
        go_on(run, again)
        assert again.asked == []
        assert archive(run) == before

    def test_killed_and_resumed_is_the_same(self, run: Path, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        seen = 0

        def interrupt(event: Event) -> None:
            nonlocal seen
            seen += isinstance(event, CandidateFinished)
            if seen == 11 and isinstance(event, CandidateFinished):
                raise KeyboardInterrupt

        with pytest.raises(SearchInterrupted):
            begin(folder, on_event=interrupt)
        go_on(folder, Whole())
        assert archive(folder) == archive(run)
        assert sorted(measured_ids(folder)) == sorted(measured_ids(run))

    def test_killed_while_measuring(self, run: Path, tmp_path: Path) -> None:
        folder = tmp_path / "run"

        def stop(genome: Genome, found: ProfileTable) -> dict[str, float]:
            raise KeyboardInterrupt

        with pytest.raises(SearchInterrupted):
            begin(folder, stop)
        assert measured_ids(folder) == []
        go_on(folder, Whole())
        assert archive(folder) == archive(run)
        assert sorted(measured_ids(folder)) == sorted(measured_ids(run))

    def test_no_device_no_table(self, tmp_path: Path) -> None:
        def refuse(*_: Any, **__: Any) -> ProfileTable:
            raise AssertionError("nobody asked for a device")

        begin(tmp_path / "run", settings=settings(objectives=("quality",)), find_table=refuse)
        assert measured_ids(tmp_path / "run") == []
        assert read_run(tmp_path / "run").device is None

    def test_a_given_table_is_used(self, tmp_path: Path) -> None:
        def refuse(*_: Any, **__: Any) -> ProfileTable:
            raise AssertionError("there is a table")

        given = settings(profile=table(), measure=replace(SETTINGS, every=0), generations=1)
        begin(tmp_path / "run", settings=given, find_table=refuse)
        with RunStore.open(tmp_path / "run") as store:
            assert store.settings().profile == table()

    def test_people_are_told(self, tmp_path: Path) -> None:
        told: list[str] = []

        def listen(event: Event) -> None:
            if isinstance(event, DeviceMeasured):
                told.append(event.what)

        begin(tmp_path / "run", settings=settings(generations=1), on_event=listen)
        assert told[0] == "every LIV alone"
        assert told[1] == "candidate 0 as a whole"

    def test_people_are_told_that_the_table_is_unsteady(self, tmp_path: Path) -> None:
        told: list[str] = []
        known = table()
        unsteady = replace(known, calibrations=tuple(replace(c, decode=1e4) for c in known.calibrations))

        def listen(event: Event) -> None:
            if isinstance(event, DeviceUnsteady):
                told.append(event.warning)

        given = settings(profile=unsteady, measure=replace(SETTINGS, every=0), generations=1)
        begin(tmp_path / "run", settings=given, on_event=listen)
        assert told == [unsteady.warning()]
        assert "\n" not in told[0]
        assert any("profile table is unsteady" in line for line in read_run(tmp_path / "run").verdicts())

    def test_people_are_told_that_the_table_is_of_another_vocabulary(self, tmp_path: Path) -> None:
        told: list[str] = []

        def listen(event: Event) -> None:
            if isinstance(event, DeviceUnsteady):
                told.append(event.warning)

        asked = replace(SETTINGS, vocab_size=1000, every=0)
        given = settings(profile=replace(table(), settings=asked), measure=asked, generations=1)
        begin(tmp_path / "run", settings=given, on_event=listen)
        (warning,) = told
        assert f"is of models of 1000 token ids, and the text has {SETTINGS.vocab_size}" in warning

    def test_survivors_by_hypervolume_are_others(self, run: Path, tmp_path: Path) -> None:
        begin(tmp_path / "run", settings=settings(survival="hv"))
        with RunStore.open(tmp_path / "run") as store, RunStore.open(run) as other:
            assert (
                store.populations()[0] != other.populations()[0] or store.populations() != other.populations()
            )
            assert all(len(keys) == 6 for keys in store.populations())


class TestRefusals:
    def test_a_context_that_is_not_measured(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"ttft@512 is asked for, and the contexts .* are 64, 256"):
            begin(tmp_path / "run", settings=settings(objectives=("quality", "ttft@512")))

    def test_a_table_of_another_width(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="was measured with width 64, not 128"):
            begin(tmp_path / "run", settings=settings(profile=table(), measure=MeasureSettings(width=128)))

    def test_a_table_without_the_classes(self, tmp_path: Path) -> None:
        given = settings(profile=table(classes=[1, 9]), measure=SETTINGS)
        with pytest.raises(ValueError, match="profile table has no LIV class 2, 3"):
            begin(tmp_path / "run", settings=given)

    def test_a_device_that_can_not_be_measured(self, tmp_path: Path) -> None:
        def fail(*_: Any, **__: Any) -> ProfileTable:
            raise MeasurementError("no memory")

        with pytest.raises(RunError, match="the device can not be measured: no memory"):
            begin(tmp_path / "run", find_table=fail)

    def test_a_damaged_record(self, tmp_path: Path) -> None:
        begin(tmp_path / "run", settings=settings(generations=1))
        with RunStore.open(tmp_path / "run", write=True) as store:
            store.append_event("measured", id=1, values={"ttft@64": "fast"})
        with pytest.raises(RunDamaged, match="what was measured on the device"):
            read_run(tmp_path / "run")


class TestBudgets:
    LIMIT = 250.0

    @pytest.fixture(scope="class")
    @classmethod
    def kept(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("budget") / "run"
        begin(folder, settings=settings(budgets={"ttft": cls.LIMIT}, objectives=("quality", "prefill")))
        return folder

    def test_the_front_is_within(self, kept: Path) -> None:
        summary = read_run(kept)
        assert summary.front
        assert all(item.objectives["ttft"] <= self.LIMIT for item in summary.front)
        over = [item for item in summary.candidates if item.objectives["ttft"] > self.LIMIT]
        assert {item.id for item in summary.over_budget} == {item.id for item in over}
        assert over
        assert any(item.objectives["quality"] < summary.front[0].objectives["quality"] for item in over)

    def test_evolution_comes_within(self, kept: Path) -> None:
        with RunStore.open(kept) as store:
            by_key = {item.key: item for item in store.evaluations()}
            populations = store.populations()
        shares = [
            sum(by_key[key].objectives["ttft"] <= self.LIMIT for key in keys) / len(keys)
            for keys in populations
        ]
        assert shares == sorted(shares)  # who keeps the budget is never replaced by one who does not
        assert shares[0] < shares[-1]

    def test_more_prefill_is_better(self, kept: Path) -> None:
        summary = read_run(kept)
        fastest = max(
            item.objectives["prefill"] for item in summary.candidates if item.objectives["ttft"] <= self.LIMIT
        )
        assert fastest in [item.objectives["prefill"] for item in summary.front]

    def test_the_report_says_so(self, kept: Path) -> None:
        summary = read_run(kept)
        told = " ".join(summary.verdicts())
        assert "keep the budget (time to first token at most 250 ms at width 64)" in told
        broken = [item.id for item in summary.front if 1.25 * item.objectives["ttft"] > self.LIMIT]
        assert summary.device is not None
        assert summary.device.broken == tuple(sorted(broken))
        page = write_report(kept).read_text()
        assert "over budget" in page
        plain = summary.to_json()
        assert plain["budgets"] == {"ttft": self.LIMIT}
        assert plain["over_budget"] == len(summary.over_budget)
        json.dumps(plain, allow_nan=False)


class TestReport:
    def test_prediction_errors(self, run: Path) -> None:
        device = read_run(run).device
        assert device is not None
        assert device.errors["ttft@64"] == pytest.approx(0.2)  # measured is 1.25 times predicted
        sentence, good = device.judged()[0]
        assert "off by 20.0 % (time to first token), 20.0 % (decode p50 at 256)" in sentence
        assert good is False

    def test_a_certificate_knows_them(self, run: Path, tmp_path: Path) -> None:
        with RunStore.open(run) as store:
            recorded = store.settings(), store.evaluations(), store.events()
        errors = prediction_errors(*recorded)
        assert errors == {"ttft": pytest.approx(0.2), "decode_p50@256": pytest.approx(0.2)}
        assert prediction_errors(*recorded[:2], []) == {}

    def test_page_and_pictures(self, run: Path) -> None:
        page = write_report(run).read_text()
        for text in ("On the device", "abacus", "time to first token", "predicted −20.0 %", "256 tokens"):
            assert text in page
        names = {path.name for path in (run / "report").iterdir()}
        assert {"device-ttft.png", "device-decode-p50-256.png", "front-ttft-quality.png"} <= names

    def test_nothing_measured_yet(self, tmp_path: Path) -> None:
        def elsewhere(genome: Genome, found: ProfileTable) -> dict[str, float]:
            raise OtherDevice("the table is of abacus, and this machine has fingers")

        begin(tmp_path / "run", elsewhere, settings=settings(generations=1))
        summary = read_run(tmp_path / "run")
        assert measured_ids(tmp_path / "run") == []
        assert "predictions are not checked" in summary.verdicts()[-2]
        assert "abacus" in write_report(tmp_path / "run").read_text()

    def test_what_could_not_be_measured(self, tmp_path: Path) -> None:
        def fail(genome: Genome, found: ProfileTable) -> dict[str, float]:
            raise MeasurementError("no memory for the model")

        begin(tmp_path / "run", fail, settings=settings(generations=1))
        with RunStore.open(tmp_path / "run") as store:
            assert {event.data["reason"] for event in store.events("measured")} == {"no memory for the model"}
        assert read_run(tmp_path / "run").verdicts()


def star(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="star")


class TestCommands:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "table.json"
        table().write(path)
        return path

    def test_profile_of_a_genome(self, file: Path) -> None:
        result = star("profile", "11111-91111", "--profile", file, "--json")
        assert result.exit_code == 0, result.output
        answer = json.loads(result.stdout)
        assert answer["predicted"] == Predictor(table()).predict(Genome.parse("11111-91111"))
        assert [liv["name"] for liv in answer["livs"]["64"]] == ["SA-1", "GMemless"]
        shown = star("profile", "lfm2", "--depth", "4", "--profile", file)
        assert all(text in shown.stdout for text in ("abacus", "GConv-1", "time to first token", "beyond"))

    def test_profile_of_all_classes(self, file: Path, tmp_path: Path) -> None:
        out = tmp_path / "copy.json"
        shown = star("profile", "--profile", file, "--out", out)
        assert shown.exit_code == 0, shown.output
        assert "SA-1-Diff" in shown.stdout
        assert out.read_bytes() == file.read_bytes()

    def test_profile_of_a_run_uses_its_table(self, run: Path) -> None:
        result = star("profile", run, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["device"] == "abacus"

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("profile", "--device", "tpu"), "takes auto, cpu, cuda or cuda:N"),
            (("profile", "--device", "cuda:99"), "this machine has"),
            (("profile", "--measure"), "--measure takes a genome"),
            (("profile", "21211-2x"), "gene 2 '2x'"),
            (("profile", "--context", "4k"), "context is '4k'"),
            (("profile", "--width", "30"), "width is 30"),
            (("profile", "--profile", "none.json"), "none.json can not be read"),
            (("search", "--objectives", "quality,speed"), "takes one or more of quality, size"),
            (("search", "--max", "ttft=40MB"), "unit 'MB' does not fit ttft"),
            (("search", "--survival", "best"), "survival is 'best'"),
            (("search", "--max", "ttft=1s", "--target-device", "gpu"), "device is 'gpu'"),
            (("search", "--profile", "none.json"), "none.json can not be read"),
        ],
    )
    def test_wrong_input_is_one_line(self, arguments: tuple[str, ...], says: str) -> None:
        result = star(*arguments)
        assert result.exit_code == 2, result.output
        lines = result.stderr.splitlines()
        assert len(lines) == 1
        assert says in lines[0]

    def test_a_damaged_table(self, file: Path) -> None:
        file.write_text(file.read_text().replace("abacus", "slide"))
        for arguments in (("profile", "lfm2", "--profile", file), ("search", "--profile", file)):
            result = star(*arguments)
            assert result.exit_code == 2, result.output
            assert "is damaged: its checksum" in result.stderr
            assert len(result.stderr.splitlines()) == 1

    def test_another_size_than_the_table_s(self, file: Path) -> None:
        result = star("profile", "lfm2", "--profile", file, "--width", "128", "--head-dim", "16")
        assert result.exit_code == 2
        assert "was measured with width 64, not 128" in result.stderr


def test_generations_tell_what_is_due(run: Path) -> None:
    """The front is measured at the end, every fourth candidate after its generation."""
    order = measured_ids(run)
    regular = [id for id in order if id % 4 == 0]
    assert order[: len(regular)] == regular == sorted(regular)
