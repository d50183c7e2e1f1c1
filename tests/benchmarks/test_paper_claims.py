"""Who is trained longer, what counts as better, and what the page of the paper's experiment says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student

from benchmarks.paper_choice import NEXT, choose
from benchmarks.paper_claims import claims
from benchmarks.paper_drift import Drift, statistics_of
from benchmarks.paper_favoured import MOTIFS, PAPER_CLASSES, favoured
from benchmarks.paper_judgement import Judge, agreement
from benchmarks.paper_plan import SEARCHES, Plan
from benchmarks.paper_report import markdown, numbers
from benchmarks.paper_retrain import Longer, layouts
from benchmarks.paper_state import Found, State
from star import cost
from star.genome import Genome
from star.search import Evaluation
from star.search.measures import CACHE_LENGTH

PLAN = Plan(search=replace(Plan().search, population=8, generations=4, depth=6), best=2, seeds=2)
LAYOUTS = layouts(6)

# ---- who is trained longer -----------------------------------------------------------------------------


def evaluation(
    id: int, quality: float, size: float = 0.0, cache: float = 0.0, decode: float = 0.0
) -> Evaluation:
    values = {"quality": quality, "size": size, "cache": cache, "decode_p50": decode}
    return Evaluation(id, f"k{id}", f"k{id}", 0, "random", "ok", None, values)


def chosen(
    field: Sequence[Evaluation], search: str, count: int, limit: float | None
) -> list[tuple[int, str]]:
    base = None if limit is None else replace(evaluation(99, limit), generation=None)
    return [(choice.evaluation.id, choice.why) for choice in choose(field, SEARCHES[search], count, base)]


def test_half_are_the_best_and_half_the_smallest_that_are_good_enough() -> None:
    field = [evaluation(id, 1.0 + 0.1 * id, 100.0 - id) for id in range(10)]  # all of them are the front
    dominated = evaluation(10, 1.05, 100.5)
    wanted = [(0, "quality"), (1, "quality"), (5, "size"), (4, "size")]
    assert chosen([*field, dominated], "quality-size", 4, 1.55) == wanted
    # Three are good enough, and two of these are taken for their quality; then the next of the front.
    wanted = [(0, "quality"), (1, "quality"), (2, "size"), (3, NEXT)]
    assert chosen([*field, dominated], "quality-size", 4, 1.25) == wanted
    assert chosen(field, "quality-size", 4, 1.2)[2] == (2, "size")  # as good is good enough


def test_a_front_that_is_too_small_is_filled_from_the_fronts_behind_it() -> None:
    field = [
        evaluation(0, 1.0, 5.0),
        evaluation(1, 2.0, 6.0),
        evaluation(2, 1.5, 9.0),
        evaluation(3, 1.2, 7.0),
    ]
    assert chosen(field, "quality-size", 3, 3.0) == [(0, "quality"), (3, NEXT), (1, NEXT)]


def test_the_joint_search_takes_the_smallest_of_each_by_turns() -> None:
    field = [
        evaluation(0, 1.0, 9.0, 9.0, 9.0),
        evaluation(1, 1.1, 8.0, 8.0, 8.5),
        evaluation(2, 1.2, 1.0, 8.0, 8.0),
        evaluation(3, 1.3, 8.0, 1.0, 8.0),
        evaluation(4, 1.4, 8.0, 8.0, 1.0),
        evaluation(5, 1.5, 2.0, 7.0, 7.0),
    ]
    wanted = [(0, "quality"), (1, "quality"), (2, "quality"), (5, "size"), (3, "cache"), (4, "decode_p50")]
    assert chosen(field, "joint", 6, 2.0) == wanted


def test_the_search_for_quality_alone_takes_the_best() -> None:
    field = [evaluation(id, 2.0 - 0.1 * id) for id in range(6)]
    assert chosen(field, "quality", 3, 5.0) == [(5, "quality"), (4, NEXT), (3, NEXT)]


def test_a_failed_reference_leaves_the_next_by_quality() -> None:
    field = [evaluation(id, 1.0 + 0.1 * id, 100.0 - id) for id in range(6)]
    without = [(0, "quality"), (1, "quality"), (2, NEXT), (3, NEXT)]
    assert chosen(field, "quality-size", 4, None) == without
    failed = replace(evaluation(99, 0.0), status="failed", objectives={}, generation=None)
    assert [item.evaluation.id for item in choose(field, SEARCHES["quality-size"], 4, failed)] == [0, 1, 2, 3]
    assert choose([failed], SEARCHES["quality"], 4, failed) == []


# ---- better --------------------------------------------------------------------------------------------


def longer(genome: str, *quality: float, failed: int = 0) -> Longer:
    return Longer(genome, quality, tuple(0.5 for _ in quality), failed)


def test_clear_is_by_the_pooled_noise_of_all_and_shared_among_the_comparisons() -> None:
    everyone = [longer(str(place), 2.0, 2.0 + 0.1 * place) for place in range(4)]
    judge = Judge.of(everyone, comparisons=8, seeds=2)
    pooled = math.sqrt(sum((0.1 * place) ** 2 / 2 for place in range(4)) / 4)
    assert (judge.deviation, judge.degrees) == (pytest.approx(pooled), 4)
    margin = student.ppf(1 - 0.05 / 16, 4) * pooled * math.sqrt(1 / 2 + 1 / 2)
    assert judge.margin(everyone[0], everyone[1]) == pytest.approx(margin)
    base = longer("base", 3.0, 3.0)  # its own seeds agree, which is no proof of little noise
    near, far = longer("near", 3.0 - 0.99 * margin, 3.0 - 0.99 * margin), longer("far", 2.0, 2.0)
    assert margin < 1
    assert judge.better(near, base)
    assert not judge.clearly_better(near, base)
    assert judge.clearly_better(far, base)
    assert judge.as_good(base, near)
    assert not judge.better(base, near)
    assert not judge.as_good(base, far)


def test_who_has_failed_trainings_is_neither_better_nor_as_good() -> None:
    judge = Judge(0.1, 10, 8, seeds=2)
    base, failed = longer("a", 2.0, 2.1), longer("b", 1.0, failed=1)
    for holds in (judge.better, judge.clearly_better, judge.as_good):
        assert not holds(failed, base)
        assert not holds(longer("c", 1.0, 1.0), replace(base, failed=1, quality=(2.0,)))
        assert not holds(longer("d", 1.0), base)  # one of two is still to come


def test_one_seed_tells_nothing_of_noise() -> None:
    judge = Judge.of([longer("a", 2.0), longer("b", 3.0)], comparisons=8, seeds=1)
    assert not judge.can_tell
    assert judge.better(longer("a", 2.0), longer("b", 3.0))
    assert not judge.clearly_better(longer("a", 2.0), longer("b", 3.0))
    assert not judge.as_good(longer("a", 2.0), longer("b", 3.0))


def test_agreement_of_proxy_and_parameters() -> None:
    taus = agreement([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], [1.1, 1.2, 1.3, 1.4])
    assert taus["proxy"].value == 1
    assert taus["parameters"].value == -1  # the largest are worst
    assert taus["proxy"].low <= taus["proxy"].value <= taus["proxy"].high
    assert not agreement([1.0], [1.0], [1.0])["proxy"].defined


# ---- the page ------------------------------------------------------------------------------------------

SMALL_ATTENTION = Genome.parse("-".join(["2.1.1.1.1", "9.1.1.1.1"] * 3)).key
CONVOLUTIONS = Genome.parse("-".join(["7.1.1.1.1", "9.1.1.1.1"] * 3)).key


def sizes(genome: str) -> dict[str, float]:
    parsed, model = Genome.parse(genome), PLAN.search.model
    return {
        "size": cost.parameters(parsed, model),
        "cache": cost.cache_bytes(parsed, model, length=CACHE_LENGTH),
    }


def state(trained: dict[str, Longer], reference_status: str = "ok") -> State:
    """Two finished searches of two candidates each, drawn at random, and the layouts."""
    evaluations = [
        Evaluation(
            id,
            genome,
            genome,
            None,
            f"reference:{name}",
            reference_status,
            None,
            {"quality": 3.0 + id, **sizes(genome)} if reference_status == "ok" else {},
        )
        for id, (name, genome) in enumerate(LAYOUTS.items())
    ]
    for id, genome in enumerate((SMALL_ATTENTION, CONVOLUTIONS), start=3):
        values = {"quality": 2.5 + 0.1 * id, "decode_p50": 1.0, **sizes(genome)}
        evaluations.append(Evaluation(id, genome, genome, 0, "random", "ok", None, values))
    base = evaluations[0]
    found = [
        Found(
            name,
            evaluations,
            [(SMALL_ATTENTION, CONVOLUTIONS)],
            True,
            choose(evaluations, SEARCHES[name], 2, base),
            PLAN.search.model,
        )
        for name in ("quality", "quality-cache")
    ]
    everyone = {genome: longer(genome, 2.0, 2.1) for genome in (*LAYOUTS.values(), *trained)}
    rng = np.random.default_rng(0)
    drifts = [
        Drift(count, number, statistics_of([Genome.random(6, rng) for _ in range(4)]), 0.25)
        for count in (1, 2)
        for number in range(5)
    ]
    grouped = {count: [item for item in drifts if item.objectives == count] for count in (1, 2)}
    return State(PLAN, {}, found, everyone | trained, None, grouped, {})


def line(lines: Sequence[str], start: str) -> str:
    return next(item for item in lines if item.startswith(f"| {start}"))


def test_claims_are_judged_on_the_longer_trainings() -> None:
    trained = {
        SMALL_ATTENTION: longer(SMALL_ATTENTION, 1.0, 1.1),
        CONVOLUTIONS: longer(CONVOLUTIONS, 2.05, 2.15),
    }
    rows = claims(state(trained))
    every = line(rows, "quality: all evaluated backbones")
    assert "of 2 trained longer 1 better than Transformer++, 1 of them clearly" in every
    # Its proxy's verdict is another: both are better than Transformer++ there, and it is said which is which.
    assert "of all 2 candidates, after the proxy's training alone, better are 2 than Transformer++" in every
    cache = line(rows, "quality + cache")
    assert "least cache of those better: " in cache
    assert "least cache of those not clearly worse: " in cache
    better, as_good = (
        cache.split(f"least cache of those {words}: ")[1] for words in ("better", "not clearly worse")
    )
    assert "(id 3)" in better.split(";")[0]
    assert "(id 4)" in as_good.split(";")[0]  # the convolutions need next to no cache
    assert "cache: median " in cache.split("|")[3]


def test_failed_trainings_count_as_neither() -> None:
    trained = {
        SMALL_ATTENTION: longer(SMALL_ATTENTION, 1.0, failed=1),
        CONVOLUTIONS: longer(CONVOLUTIONS, 1.0, 1.1),
    }
    every = line(claims(state(trained)), "quality: all evaluated backbones")
    assert "of 2 trained longer 1 better than Transformer++" in every
    base = LAYOUTS["Transformer++"]
    every = line(claims(state(trained | {base: longer(base, 2.0, failed=1)})), "quality: all evaluated")
    assert "trainings of Transformer++ failed, so nothing is compared with it" in every
    assert "1 better than StripedMamba" in every


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_the_page_of_a_state(status: str) -> None:
    trained = {genome: longer(genome, 1.0, 1.1) for genome in (SMALL_ATTENTION, CONVOLUTIONS)}
    found = state(trained, status)
    page = markdown(found)
    assert "**Not finished.** Missing: the search for quality + size; the search" in page
    assert "parameters and cache (of 4096 tokens in bfloat16) are those of this width" in page
    assert "Each objective was searched once" in page
    assert "barely been trained" in page
    assert ("| Transformer++ failed |" in page) == (status == "failed")
    row = line(page.splitlines(), "Transformer++ |")
    assert ("| 3.000 |" in row) == (status == "ok")  # the proxy's column
    assert f"| all, with the layouts | {5 if status == 'ok' else 2} |" in page
    assert numbers(found)["agreement"]["quality"]["genomes"] == 2


def test_what_exceeds_transformer_pp_is_marked_by_exact_sizes() -> None:
    large = Genome.parse("-".join(["1.1.1.1.1"] * 6)).key
    assert sizes(large)["cache"] > sizes(LAYOUTS["Transformer++"])["cache"]
    trained = {genome: longer(genome, 1.0, 1.1) for genome in (SMALL_ATTENTION, CONVOLUTIONS, large)}
    found = state(trained, "failed")
    search = found.searches[1]
    values = {"quality": 1.0, **sizes(large)}
    added = Evaluation(5, large, large, 0, "random", "ok", None, values)
    everything = [*search.evaluations, added]
    other = replace(search, evaluations=everything, choices=choose(everything, search.objectives, 3, None))
    lines = markdown(replace(found, searches=[found.searches[0], other])).splitlines()
    assert "(id 5) ▲" in line(lines, "quality + cache, 1")
    assert "▲" not in line(lines, "quality + cache, 3 (id 4)")
    assert "▲" not in line(lines, "quality, 1")


def test_what_the_paper_names_is_always_listed() -> None:
    trained = {genome: longer(genome, 1.0, 1.1) for genome in (SMALL_ATTENTION, CONVOLUTIONS)}
    text = "\n".join(favoured(state(trained)))
    for name in (*(f"LIVs of class {name}" for name in PAPER_CLASSES), *MOTIFS.values()):
        assert text.count(f"{name} |") == 2  # one for each search
    assert "this one run of each search" in text
    assert "| quality | 5 | 0.500 | 0.250 ± 0.000 |" in text
    assert favoured(replace(state(trained), drifts={}))[0].startswith("Not simulated")
