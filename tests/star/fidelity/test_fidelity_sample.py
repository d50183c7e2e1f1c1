"""Which candidates are retrained, and how."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from recorded_runs import evaluation, failed, genomes, small_settings

from star.fidelity.sample import stratified_sample
from star.fidelity.settings import FidelitySettings
from star.proxy import ProxySettings
from star.search.store import Evaluation

GENOMES = genomes(60)


def candidate(id: int, quality: float, size: float, **changes: Any) -> Evaluation:
    objectives = {"quality": quality, "size": size, "cache": 1.0, "flops": 1.0}
    return evaluation(id, GENOMES[id], 0, objectives=objectives, **changes)


def run_of(front: int, others: int) -> list[Evaluation]:
    """A front of ids from 0, the better the larger; then others, the better the smaller their id."""
    best = [candidate(id, 3.0 - 0.01 * id, 100.0 + id) for id in range(front)]
    return best + [candidate(front + place, 4.0 + 0.01 * place, 1e6) for place in range(others)]


def ids(evaluations: list[Evaluation], count: int, **settings: Any) -> list[int]:
    sample = stratified_sample(evaluations, small_settings(**settings), count)
    return [member.evaluation.id for member in sample]


def test_the_front_is_drawn_whole_and_marked() -> None:
    sample = stratified_sample(run_of(4, 40), small_settings(), 12)
    assert [member.evaluation.id for member in sample if member.on_front] == [0, 1, 2, 3]
    assert len(sample) == 12


def test_the_others_are_spread_over_their_ranks() -> None:
    ranks = [id - 4 for id in ids(run_of(4, 40), 12) if id >= 4]
    assert len(ranks) == 8
    gaps = [after - before for before, after in zip(ranks, [*ranks[1:], 40], strict=True)]
    assert ranks[0] == 0
    assert max(gaps) <= 10


def test_a_larger_sample_holds_a_smaller_one() -> None:
    run = run_of(4, 40)
    assert set(ids(run, 8)) < set(ids(run, 13)) < set(ids(run, 30))


def test_so_it_does_where_the_front_is_thinned() -> None:
    run = run_of(30, 20)
    samples = [set(ids(run, count)) for count in (3, 12, 24, 30, 45)]
    assert all(smaller < larger for smaller, larger in pairwise(samples))


def test_a_long_front_leaves_a_third_to_the_others() -> None:
    sample = stratified_sample(run_of(30, 20), small_settings(), 12)
    of_front = [member.evaluation.id for member in sample if member.on_front]
    assert len(of_front) == 8
    assert {0, 29} <= set(of_front)
    assert len(sample) == 12


def test_a_front_of_everything_is_drawn_as_far_as_it_goes() -> None:
    assert len(ids(run_of(10, 0), 6)) == 6
    assert ids(run_of(10, 2), 20) == list(range(12))


def test_failures_and_references_are_not_drawn() -> None:
    run = run_of(3, 5)
    run += [failed(20, GENOMES[20], 1), candidate(21, 1.0, 1.0, origin="reference:LFM2")]
    run[-1] = replace(run[-1], generation=None)
    assert ids(run, 50) == list(range(8))


def test_candidates_over_budget_are_no_front_but_have_an_order() -> None:
    sample = stratified_sample(run_of(3, 3), small_settings(budgets={"size": 101.0}), 6)
    assert [member.evaluation.id for member in sample if member.on_front] == [0, 1]
    assert len(sample) == 6
    assert all(member.evaluation.ok for member in sample)


def test_longer_trainings_are_scaled_and_from_fresh_seeds() -> None:
    proxy = ProxySettings(
        steps=80, warmup_steps=8, evaluate_every=20, seed=5, learning_rate=4e-3, extrapolate_to=400
    )
    longer = FidelitySettings(budget=10, seeds=3).trainings(proxy)
    expected = replace(proxy, steps=800, warmup_steps=80, evaluate_every=200, extrapolate_to=0)
    assert [replace(training, seed=5) for training in longer] == [expected] * 3
    assert [training.seed for training in longer] == [6, 7, 8]


def test_the_last_seed_is_followed_by_the_first() -> None:
    longer = FidelitySettings(seeds=2).trainings(ProxySettings(seed=2**63 - 2))
    assert [training.seed for training in longer] == [2**63 - 1, 0]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sample": 1}, "sample is 1, takes an integer from 2"),
        ({"budget": 0}, "budget is 0"),
        ({"seeds": 101}, "seeds is 101"),
        ({"seeds": True}, "seeds is True"),
        ({"budget": 2.5}, "budget is 2.5"),
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FidelitySettings(**values)
