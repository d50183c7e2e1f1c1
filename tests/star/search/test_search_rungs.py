"""Rungs: what a partial curve foretells, who is stopped, and that nothing but the record decides it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthetic import InlineEngine, Killed, climbing, foreseeable
from synthetic import settings as small_settings
from test_search_loop import Run

from benchmarks.rungs import Replay, document, read, replay
from star.search.algorithms import ALGORITHMS
from star.search.budgets import is_over_budget
from star.search.errors import SearchInterrupted
from star.search.events import CandidateFinished, Event, RunFinished
from star.search.front import front
from star.search.ranking import fronts
from star.search.run import resume, search
from star.search.rungs import LEAST_CURVES, Bars, Rung, bars, partial_loss, saved_seconds
from star.search.settings import SearchSettings
from star.search.store import Evaluation, RunStore

STEPS = synthetic.STEPS


def rung_settings(**changes: Any) -> SearchSettings:
    proxy = replace(small_settings().proxy, steps=STEPS, warmup_steps=0)
    values = {"population": 10, "generations": 4, "depth": 6, "rungs": (0.5, 0.3, 0.8), "proxy": proxy}
    return small_settings(**{**values, **changes})


def evaluation(id: int, quality: float, loss: float, size: float = 100.0, **changes: Any) -> Evaluation:
    """Of a training with `loss` in the middle and `quality` at the end."""
    values: dict[str, Any] = {
        "key": f"key-{id}",
        "genome": f"key-{id}",
        "generation": 0,
        "origin": "random",
        "status": "ok",
        "reason": None,
        "objectives": {"quality": quality, "size": size, "cache": 10.0, "flops": 1.0},
        "curve": ([20, loss, None], [40, quality, quality]),
    }
    return Evaluation(id=id, **{**values, **changes})


def line_of(count: int, noise: float = 0.0, seed: int = 0) -> list[Evaluation]:
    """Qualities of 1 + 0.5 x loss, from losses around 4."""
    rng = np.random.default_rng(seed)
    losses = rng.normal(4.0, 0.5, count)
    return [
        evaluation(id, float(1 + 0.5 * loss + noise * rng.normal()), float(loss))
        for id, loss in enumerate(losses)
    ]


def bars_after(
    evaluations: Sequence[Evaluation], settings: SearchSettings, survivors: int = 3
) -> Bars | None:
    known = {item.key: item for item in evaluations}
    return bars(settings, known, [item.key for item in evaluations[:survivors]])


# ---- curves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 7.0),
        (4, 7.0),
        (5, 5.0),  # reached at the point of step 8, which covers the whole window
        (10, (2 * 3.0 + 4 * 5.0) / 6),  # 2 steps of this point do not
        (12, (2 * 1.0 + 2 * 3.0) / 4),
        (13, None),
    ],
)
def test_the_loss_at_a_rung_is_a_mean_over_a_tenth_of_the_training(step: int, expected: float | None) -> None:
    curve = [[4, 7.0, None], [8, 5.0, None], [10, 3.0, None], [12, 1.0, 1.5]]
    assert partial_loss(curve, step, steps=40) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    "point", [None, 3, [4, 1.0], [4, "x", None], ["4", 1.0, None], [0, 1.0, None], [4, 1e300, None], {}]
)
def test_what_is_no_curve_foretells_nothing(point: Any) -> None:
    assert partial_loss([point], 1, steps=40) is None


# ---- foretelling -----------------------------------------------------------------------------------------


def test_the_line_is_least_squares_and_its_interval_that_of_a_new_value() -> None:
    """Against numpy, and against the textbook's formula with scipy's quantile."""
    from scipy.stats import t

    settings = rung_settings(rungs=(0.5,), rung_confidence=0.9)
    evaluations = line_of(12, noise=0.1)
    passing = bars_after(evaluations, settings)
    assert passing is not None
    (rung,) = passing.rungs
    x = np.array([item.curve[0][1] for item in evaluations])
    y = np.array([item.objectives["quality"] for item in evaluations])
    slope, intercept = np.polyfit(x, y, 1)
    assert (rung.step, rung.count) == (20, 12)
    assert (rung.slope, rung.intercept) == (pytest.approx(slope), pytest.approx(intercept))
    error = np.sqrt(np.sum((y - intercept - slope * x) ** 2) / 10)
    width = np.sqrt(1 + 1 / 12 + (5.0 - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))
    assert rung.optimistic(5.0) == pytest.approx(intercept + 5 * slope - t.ppf(0.9, 10) * error * width)


def test_as_many_candidates_as_promised_do_better_than_they_may() -> None:
    settings = rung_settings(rungs=(0.5,), rung_confidence=0.8)
    better = total = 0
    for seed in range(300):
        *before, last = line_of(LEAST_CURVES + 1, noise=0.2, seed=seed)
        passing = bars_after(before, settings)
        if passing is not None:  # by chance the line may fall
            total += 1
            better += last.objectives["quality"] < passing.rungs[0].optimistic(last.curve[0][1])
    assert total > 250
    assert 0.14 < better / total < 0.26


def test_where_nothing_is_foretold_nobody_is_stopped() -> None:
    settings, enough = rung_settings(rungs=(0.5,)), line_of(LEAST_CURVES)
    assert bars_after(enough, settings) is not None
    assert bars_after(enough, rung_settings(rungs=())) is None
    assert bars_after(enough[1:], settings) is None
    assert bars_after(enough, settings, survivors=0) is None
    falling = [replace(item, curve=([20, -item.curve[0][1], None],)) for item in enough]
    assert bars_after(falling, settings) is None
    flat = [replace(item, curve=([20, 3.0, None],)) for item in enough]
    assert bars_after(flat, settings) is None
    short = [replace(item, curve=([16, 3.0, None],)) for item in enough]
    assert bars_after(short, settings) is None
    for status in ("failed", "stopped"):  # whoever is trained to the end is ahead of these
        one = replace(enough[0], status=status, reason="so", objectives={})
        assert bars_after([one, *line_of(LEAST_CURVES + 1)[1:]], settings) is None
    tight = replace(settings, budgets={"size": 50.0})
    assert bars_after(enough, tight) is None
    assert bars_after(enough, replace(tight, rung_rivals="front")) is None


def test_stopped_candidates_teach_nothing() -> None:
    settings, enough = rung_settings(rungs=(0.5,)), line_of(LEAST_CURVES)
    stopped = evaluation(99, quality=50.0, loss=4.0, status="stopped", reason="behind")
    assert bars_after([*enough, stopped], settings) == bars_after(enough, settings)


# ---- judging ---------------------------------------------------------------------------------------------

A_RUNG = Rung(step=20, intercept=0.0, slope=1.0, mean=4.0, scatter=10.0, count=20, margin=0.1)
points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(points, st.tuples(st.integers(0, 5), st.integers(0, 5)))
@hypothesis_settings(max_examples=200)
def test_behind_is_behind_the_last_front(rivals: list[tuple[int, int]], vector: tuple[int, int]) -> None:
    """The short cut of keeping the last front alone, against sorting everything."""
    settings = rung_settings(rungs=(0.5,), objectives=("quality", "size"))
    members = [evaluation(id, float(q), float(q), float(s)) for id, (q, s) in enumerate(rivals)]
    filling = [replace(item, id=item.id + 100, key=f"line-{item.id}") for item in line_of(LEAST_CURVES)]
    passing = bars_after([*members, *filling], settings, survivors=len(members))
    rank = fronts(np.array([*rivals, vector], dtype=float))
    assert passing is not None
    assert passing.is_behind(vector) == bool(np.all(rank[:-1] < rank[-1]))


def test_verdicts() -> None:
    settings = rung_settings(objectives=("quality", "size"), budgets={"cache": 20.0})
    passing = Bars((A_RUNG,), ((3.0, 100.0),))
    assert Bars.from_json(passing.to_json()) == passing
    exact = {"size": 120.0, "cache": 10.0, "flops": 1.0}
    ahead, bad, over = [[20, 3.0, None]], [[20, 4.0, None]], {**exact, "cache": 21.0}
    reason = passing.verdict(bad, exact, settings)
    assert reason == "behind the survivors at step 20 of 40: 3.8975 bits per byte at best"
    assert passing.verdict(ahead, exact, settings) is None  # may still be better
    assert passing.verdict(bad, {**exact, "size": 99.0}, settings) is None  # smaller than all
    assert passing.verdict(ahead, over, settings) == "over budget: cache (at step 20 of 40)"
    assert passing.verdict([[16, 9.0, None]], over, settings) is None  # no rung yet
    assert passing.verdict([*bad, [24, 9.0, None]], over, settings) is None  # none any more
    assert passing.verdict([[16, 4.0, None], [24, 4.0, None]], exact, settings) is not None  # on the way
    front_alone = replace(settings, rung_rivals="front")
    assert "behind the front at" in (passing.verdict(bad, exact, front_alone) or "")


# ---- in a search -----------------------------------------------------------------------------------------


def go(folder: Path, settings: SearchSettings, evaluator: Any = climbing, **options: Any) -> Run:
    run = Run(folder, settings)
    run.go(InlineEngine(evaluator, settings=settings, **options))
    return run


def test_candidates_are_stopped_and_recorded_as_such(tmp_path: Path) -> None:
    settings = rung_settings()
    run = go(tmp_path, settings)
    evaluations = run.evaluations()
    stopped = [item for item in evaluations if item.stopped]
    assert len(stopped) > 3
    assert {item.curve[-1][0] for item in stopped} <= {12, 20, 32}
    assert all(item.generation and item.generation > 0 for item in stopped)
    assert all((item.reason or "").startswith("behind the survivors at step ") for item in stopped)
    assert all(item.objectives["quality"] == item.curve[-1][1] for item in stopped)
    assert all(not item.stopped for item in evaluations if item.origin.startswith("reference"))
    assert not {item.id for item in stopped} & {item.id for item in front(evaluations, settings.objectives)}
    with run.record as store:
        survivors = {key for keys in store.populations() for key in keys}
        assert not {item.key for item in stopped} & survivors
        assert store.events("finished")[0].data["stopped"] == len(stopped)
    finished = run.events[-1]
    assert isinstance(finished, RunFinished)
    assert finished.stopped == len(stopped)
    assert finished.failed == sum(item.failed for item in evaluations)
    assert sum(isinstance(event, CandidateFinished) for event in run.events) == len(evaluations)


def test_what_is_found_is_found_without_rungs_too(tmp_path: Path) -> None:
    """Where the curve tells the end exactly, rungs change what is spent and nothing else."""
    plain = go(tmp_path / "plain", rung_settings(rungs=()), foreseeable)
    saving = go(tmp_path / "saving", rung_settings(rungs=(0.3,)), foreseeable)
    with plain.record as one, saving.record as other:
        assert one.populations() == other.populations()
    assert [item.key for item in plain.evaluations()] == [item.key for item in saving.evaluations()]
    names = rung_settings().objectives
    fronts_of = [front(run.evaluations(), names) for run in (plain, saving)]
    assert [item.objectives for item in fronts_of[0]] == [item.objectives for item in fronts_of[1]]
    stopped = [item for item in saving.evaluations() if item.stopped]
    assert len(stopped) > 3
    assert {item.curve[-1][0] for item in stopped} == {12}
    # So says a replay of the search that was made without them.
    replayed = replay(read(plain.directory.path), (0.3,), "survivors", 0.95)
    done = [item for item in plain.evaluations() if item.generation and item.ok]
    assert replace(replayed, saved=0.0) == Replay(len(done), len(stopped), 0, 0, 0.0)
    assert replayed.saved == pytest.approx(len(stopped) / len(done) * (1 - 12 / STEPS))
    assert "| 0.5 | front | 0.95 | " in document([read(plain.directory.path)])


def test_rivals_on_the_front_stop_more(tmp_path: Path) -> None:
    runs = {
        rivals: go(tmp_path / rivals, rung_settings(rung_rivals=rivals)) for rivals in ("survivors", "front")
    }
    stopped = {name: sum(item.stopped for item in run.evaluations()) for name, run in runs.items()}
    assert stopped["front"] > stopped["survivors"] > 0


def test_over_a_budget_is_stopped_at_the_first_rung(tmp_path: Path) -> None:
    settings = rung_settings(budgets={"cache": 2 * 4096.0})
    evaluations = go(tmp_path, settings).evaluations()
    over = [item for item in evaluations if item.stopped and is_over_budget(item)]
    assert over
    assert {item.curve[-1][0] for item in over} == {12}
    assert {item.reason for item in over} == {"over budget: cache (at step 12 of 40)"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_order_of_answers_and_kills_decide_nothing(name: str, tmp_path: Path) -> None:
    settings = rung_settings(algorithm=name, generations=3)
    whole = go(tmp_path / "whole", settings)
    assert any(item.stopped for item in whole.evaluations())
    shuffle = random.Random(5)
    assert go(tmp_path / "shuffled", settings, shuffle=shuffle).archive() == whole.archive()
    for lives in (15, 29):
        run = Run(tmp_path / str(lives), settings)
        with pytest.raises(Killed):
            run.go(InlineEngine(climbing, settings=settings, shuffle=shuffle, lives=lives))
        run.go(InlineEngine(climbing, settings=settings, shuffle=shuffle))
        assert run.archive() == whole.archive()


def test_workers_decide_nothing(tmp_path: Path) -> None:
    """In processes: one, then three that are interrupted and go on as two."""
    settings = rung_settings(generations=3, workers=1)
    options: dict[str, Any] = {"evaluator": "synthetic:climbing", "open_corpus": synthetic.open_corpus}
    search(settings, tmp_path / "one", **options)

    def interrupt(event: Event) -> None:
        if isinstance(event, CandidateFinished) and event.finished == 27:
            raise KeyboardInterrupt

    with pytest.raises(SearchInterrupted):
        search(replace(settings, workers=3), tmp_path / "cut", on_event=interrupt, **options)
    resume(tmp_path / "cut", workers=2, **options)
    with RunStore.open(tmp_path / "one") as one, RunStore.open(tmp_path / "cut") as cut:
        assert any(item.stopped for item in one.evaluations())
        assert one.archive() == cut.archive()


# ---- settings, and what is saved -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rungs": 0.5}, "rungs are 0.5, take parts of a training"),
        ({"rungs": (0.5, 1.0)}, "rungs has 1.0, takes parts of a training between 0 and 1"),
        ({"rungs": (True,)}, "rungs has True"),
        ({"rungs": ("0.5",)}, "rungs has '0.5'"),
        ({"rungs": (0.5, 0.5)}, "take each part once"),
        ({"rungs": (0.5,), "rung_confidence": 0.4}, "rung_confidence is 0.4, takes a number above 0.5"),
        ({"rungs": (0.5,), "rung_rivals": "all"}, "rung_rivals is 'all', takes survivors or front"),
        ({"rungs": (0.5,), "objectives": ("size",)}, "rungs foretell the objective quality"),
        ({"rungs": (0.5,), "objectives": ("quality", "recall")}, "not recall"),
        ({"rungs": (0.5,), "budgets": {"recall": 0.5}}, "not recall"),
    ],
)
def test_wrong_rungs_are_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        small_settings(**changes)
    assert words in str(caught.value)


def test_settings_are_recorded_where_they_are_chosen() -> None:
    """Runs from before there were rungs have no such setting, and can be resumed."""
    plain, chosen = small_settings(), small_settings(rungs=(0.5, 0.25), rung_rivals="front")
    assert not {"rungs", "rung_rivals", "rung_confidence"} & set(plain.to_json())
    assert chosen.to_json()["rungs"] == [0.25, 0.5]
    assert SearchSettings.from_json(chosen.to_json()) == chosen
    assert SearchSettings.from_json(plain.to_json()) == plain


def test_saved_seconds_are_those_of_the_steps_that_were_not_taken() -> None:
    settings = rung_settings()
    settings = replace(settings, proxy=replace(settings.proxy, validation_batches=12))
    # 10 steps and 12 forward passes, each a third of a step, took 7 s: a step took half a second.
    item = evaluation(0, 3.0, 3.0, status="stopped", seconds=7.0, curve=([10, 3.0, 3.0],))
    assert saved_seconds([item, item], settings) == pytest.approx(2 * 30 * 0.5)
    strange = [replace(item, curve=curve) for curve in ((), (5,), ([True],), ([40, 1.0, 1.0],), (["x"],))]
    assert saved_seconds(strange[:2] + strange[3:], settings) == 0.0
