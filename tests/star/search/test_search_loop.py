"""The loop: what it records, that only evaluations decide it, and replay from any part of a record."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthetic import InlineEngine, Killed, measure, score
from synthetic import settings as small_settings

from star import baselines
from star.genome import Genome
from star.pools import Pool
from star.search.directory import RunDirectory
from star.search.errors import RunDamaged
from star.search.events import (
    CandidateFinished,
    Event,
    GenerationFinished,
    GenerationStarted,
    RunFinished,
)
from star.search.loop import Edges, evolve, planned
from star.search.settings import SearchSettings
from star.search.store import Evaluation, RunStore


class Run:
    """A record in a folder, and the loop on it with an engine in this process."""

    def __init__(self, folder: Path, settings: SearchSettings) -> None:
        self.directory, self.settings = RunDirectory(folder), settings
        self.directory.create()
        self.events: list[Event] = []
        if not RunStore.begun(self.directory.database):
            execution = {"workers": 1, "engine": "local"}
            facts = {"settings": settings.identity(), "execution": execution}
            RunStore.create(self.directory.database, facts).close()

    def go(self, engine: InlineEngine) -> RunFinished:
        with RunStore.open(self.directory.database, write=True) as store:
            # These tests kill no process: nothing has to reach the disk.
            store._connection.execute("PRAGMA synchronous = OFF")
            return evolve(self.settings, Edges(store, self.directory, engine, self.events.append))

    @property
    def record(self) -> RunStore:
        return RunStore.open(self.directory.database)

    def archive(self) -> bytes:
        with self.record as store:
            return store.archive()

    def evaluations(self) -> list[Evaluation]:
        with self.record as store:
            return store.evaluations()


def test_a_whole_run(tmp_path: Path) -> None:
    settings = small_settings()
    run, engine = Run(tmp_path, settings), InlineEngine()
    finished = run.go(engine)
    evaluations = run.evaluations()
    assert [item.id for item in evaluations] == list(range(27))
    assert finished.evaluations == planned(settings) == 27
    assert finished.failed == sum(not item.ok for item in evaluations) > 0
    assert [item.origin for item in evaluations[:3]] == [
        "reference:Transformer++",
        "reference:StripedMamba",
        "reference:LFM2",
    ]
    assert [item.generation for item in evaluations] == [None] * 3 + [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert {item.origin for item in evaluations[3:9]} == {"random"}
    assert {item.origin for item in evaluations[9:]} == {"offspring"}
    assert all(Genome.parse(item.genome).key == item.key for item in evaluations)
    assert len({*engine.evaluated}) == len(engine.evaluated) == 27
    with run.record as store:
        populations = store.populations()
        assert [len(keys) for keys in populations] == [6] * 4
        assert {key for keys in populations for key in keys} <= {item.key for item in evaluations[3:]}
        assert [event.kind for event in store.events()] == ["generation"] * 4 + ["finished"]
        beside, whole = store.overhead()
        assert 0 < beside <= whole


def test_events(tmp_path: Path) -> None:
    run = Run(tmp_path, small_settings(references=False))
    finished = run.go(InlineEngine())
    kinds = [type(event) for event in run.events]
    one = [GenerationStarted, *[CandidateFinished] * 6, GenerationFinished]
    assert kinds == one * 4 + [RunFinished]
    assert run.events[-1] == finished
    assert [e.generation for e in run.events if isinstance(e, GenerationStarted)] == [0, 1, 2, 3]
    counts = [(e.finished, e.planned) for e in run.events if isinstance(e, CandidateFinished)]
    assert counts == [(count, 24) for count in range(1, 25)]
    volumes = [e.hypervolume for e in run.events if isinstance(e, GenerationFinished)]
    assert all(volume is not None for volume in volumes)
    assert volumes == sorted(volumes)  # type: ignore[type-var]
    last = [e for e in run.events if isinstance(e, GenerationFinished)][-1]
    assert last.front == finished.front
    assert not last.replayed


def test_baselines_that_are_references_too_are_trained_once(tmp_path: Path) -> None:
    settings = small_settings(depth=24, seed_baselines=True, generations=2)
    run, engine = Run(tmp_path, settings), InlineEngine()
    run.go(engine)
    evaluations = run.evaluations()
    assert len(evaluations) == 12 == len(set(engine.evaluated))
    layouts = [
        layout(24).key for layout in (baselines.transformer_pp, baselines.striped_mamba, baselines.lfm2)
    ]
    assert [item.key for item in evaluations[:3]] == layouts
    assert [item.origin.partition(":")[0] for item in evaluations[:3]] == ["reference"] * 3
    assert [item.generation for item in evaluations[:3]] == [0, 0, 0]


def test_baselines_without_references(tmp_path: Path) -> None:
    run = Run(tmp_path, small_settings(depth=24, seed_baselines=True, references=False, generations=1))
    run.go(InlineEngine())
    origins = [item.origin for item in run.evaluations()]
    assert origins == ["baseline:Transformer++", "baseline:StripedMamba", "baseline:LFM2"] + ["random"] * 3


def test_the_order_of_answers_decides_nothing(tmp_path: Path) -> None:
    settings = small_settings()
    straight, shuffled = Run(tmp_path / "a", settings), Run(tmp_path / "b", settings)
    straight.go(InlineEngine())
    shuffled.go(InlineEngine(shuffle=random.Random(3)))
    assert straight.archive() == shuffled.archive()


def test_a_killed_run_ends_with_the_same_archive_wherever_it_was_killed(tmp_path: Path) -> None:
    """The process ends after each number of answers from 0 to all, in order; then it is run again."""
    settings = small_settings(population=4, generations=3)
    whole = Run(tmp_path / "whole", settings)
    whole.go(InlineEngine())
    for lives in range(planned(settings) + 1):
        run = Run(tmp_path / f"{lives}", settings)
        first = InlineEngine(lives=lives)
        if lives < planned(settings):
            with pytest.raises(Killed):
                run.go(first)
        else:
            run.go(first)
        second = InlineEngine()
        run.go(second)
        assert run.archive() == whole.archive()
        assert sorted(first.evaluated + second.evaluated) == sorted({*first.evaluated, *second.evaluated})


@given(st.integers(0, 2**32), st.lists(st.integers(0, 8), max_size=8), st.integers(0, 3))
@hypothesis_settings(max_examples=10)
def test_killed_again_and_again_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, order: int, lives: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("kills")
    settings = small_settings(population=4, generations=3, seed=seed)
    whole, run = Run(folder / "whole", settings), Run(folder / "killed", settings)
    whole.go(InlineEngine())
    shuffle = random.Random(order)
    for count in lives:
        try:
            run.go(InlineEngine(shuffle=shuffle, lives=count))
        except Killed:
            continue
    run.go(InlineEngine(shuffle=shuffle))
    assert run.archive() == whole.archive()


@pytest.mark.parametrize("method", ["append_evaluation", "append_population", "append_event"])
@pytest.mark.parametrize("after", [False, True])
def test_killed_around_every_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    settings = small_settings(population=3, generations=2, references=False)
    whole = Run(tmp_path / "whole", settings)
    whole.go(InlineEngine())
    write = getattr(RunStore, method)
    calls = {"append_evaluation": 6, "append_population": 2, "append_event": 3}[method]
    for fatal in range(calls):
        run = Run(tmp_path / f"{fatal}", settings)
        count = 0

        def dying(self: RunStore, *args: Any, fatal: int = fatal, **kwargs: Any) -> None:
            nonlocal count
            count += 1
            if after:
                write(self, *args, **kwargs)
            if count == fatal + 1:
                raise Killed
            if not after:
                write(self, *args, **kwargs)

        monkeypatch.setattr(RunStore, method, dying)
        with pytest.raises(Killed):
            run.go(InlineEngine())
        monkeypatch.setattr(RunStore, method, write)
        run.go(InlineEngine())
        assert run.archive() == whole.archive()


def test_a_finished_run_trains_nothing_when_it_is_run_again(tmp_path: Path) -> None:
    run = Run(tmp_path, small_settings())
    run.go(InlineEngine())
    before, engine = run.archive(), InlineEngine(lives=0)
    run.events.clear()
    run.go(engine)
    assert run.archive() == before
    assert engine.evaluated == []
    assert all(e.replayed for e in run.events if isinstance(e, GenerationFinished))


def saving(run: Run) -> Any:
    """An evaluator that saves weights; the engine of these tests passes no path."""

    def evaluate(
        text: str, settings: dict[str, Any], candidate_id: int, weights: str | None
    ) -> dict[str, Any]:
        run.directory.weights_of(candidate_id).write_text(text)
        return score(text, settings, candidate_id, None)

    return evaluate


def test_only_useful_weights_are_kept_also_by_a_replay(tmp_path: Path) -> None:
    settings = small_settings()
    run = Run(tmp_path, settings)
    finished = run.go(InlineEngine(saving(run)))
    (run.directory.weights / "mine.safetensors").write_text("not the search's")
    expected = {f"{id}.safetensors" for id in {*finished.front, 0, 1, 2}} | {"mine.safetensors"}
    names = {path.name for path in run.directory.weights.iterdir()}
    assert names | {f"{id}.safetensors" for id in (0, 1, 2)} == expected | (names & {"mine.safetensors"})
    run.go(InlineEngine())
    assert {path.name for path in run.directory.weights.iterdir()} == names


def test_a_missing_objective_is_a_failure(tmp_path: Path) -> None:
    def forgetful(text: str, *_: Any) -> dict[str, Any]:
        objectives = measure(Genome.parse(text))
        if sum(map(ord, text)) % 3 == 0:
            del objectives["size"]
        return {"status": "ok", "objectives": objectives}

    run = Run(tmp_path, small_settings())
    run.go(InlineEngine(forgetful))
    reasons = {item.reason for item in run.evaluations()}
    assert reasons == {None, "objective size is None, takes a finite number"}


def test_a_search_whose_candidates_all_fail_goes_to_its_end(tmp_path: Path) -> None:
    def failing(*_: Any) -> dict[str, Any]:
        raise RuntimeError("no\nway")

    run = Run(tmp_path, small_settings())
    finished = run.go(InlineEngine(failing))
    assert finished.failed == finished.evaluations == 27
    assert finished.front == ()
    assert {item.reason for item in run.evaluations()} == {"RuntimeError: no"}


def test_a_used_up_space_ends_early(tmp_path: Path) -> None:
    pool = Pool(classes=(1, 9), featurizer_sharing=False, feature_sharing=False)
    run = Run(tmp_path, small_settings(depth=2, pool=pool, references=False, generations=9))
    finished = run.go(InlineEngine())
    assert finished.exhausted
    assert finished.evaluations == 4
    run.go(InlineEngine(lives=0))


@pytest.mark.parametrize("objectives", [("quality",), ("cache", "flops", "quality", "size")])
def test_any_objectives(tmp_path: Path, objectives: tuple[str, ...]) -> None:
    finished = Run(tmp_path, small_settings(objectives=objectives)).go(InlineEngine())
    assert len(finished.front) >= 1


def test_records_of_other_searches_are_refused(tmp_path: Path) -> None:
    settings = small_settings(generations=2)
    run = Run(tmp_path, settings)
    run.go(InlineEngine())
    for other in (
        small_settings(generations=2, seed=1),
        small_settings(generations=1),
        small_settings(generations=2, population=5),
        small_settings(generations=2, references=False),
        small_settings(generations=2, mutation_rate=0.5),
        small_settings(generations=2, objectives=("cache",)),
    ):
        with pytest.raises(RunDamaged, match=r"^[^\n]+$"):
            Run(tmp_path, other).go(InlineEngine())
