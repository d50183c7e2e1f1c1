"""Survivors by hypervolume improvement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pymoo.core.individual import Individual
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.indicators.hv import HV

from star.search.ranking import fronts
from star.search.settings import SearchSettings
from star.search.survival import HypervolumeSurvival, improvements

PROBLEM = Problem(n_var=1, n_obj=2, n_ieq_constr=1)


def literally(points: np.ndarray) -> list[int]:
    """Greedily, with every volume computed anew; then what is left, by fronts."""
    best, worst = points.min(axis=0), points.max(axis=0)
    scaled = (points - best) / np.where(worst > best, worst - best, 1.0)
    volume = HV(ref_point=np.full(points.shape[1], 1.1))
    taken: list[int] = []
    reached = 0.0
    while True:
        gains = {
            index: float(volume(scaled[[*taken, index]])) - reached
            for index in range(len(points))
            if index not in taken
        }
        if not gains or max(gains.values()) <= 1e-12:
            break
        index = max(gains, key=lambda index: (gains[index], -index))
        taken.append(index)
        reached += gains[index]
    rank = fronts(points)
    return taken + sorted(set(range(len(points))) - set(taken), key=lambda index: (rank[index], index))


@pytest.mark.parametrize(("count", "objectives"), [(1, 2), (2, 2), (12, 2), (12, 3), (9, 4)])
def test_is_the_greedy_order(count: int, objectives: int) -> None:
    points = np.random.default_rng(count).random((count, objectives))
    assert [index for index, _ in improvements(points)] == literally(points)


def test_gains_shrink_and_sum_to_the_volume() -> None:
    points = np.random.default_rng(1).random((20, 2))
    gains = [gain for _, gain in improvements(points)]
    assert gains == sorted(gains, reverse=True)
    scaled = (points - points.min(axis=0)) / np.ptp(points, axis=0)
    assert sum(gains) == pytest.approx(float(HV(ref_point=np.array([1.1, 1.1]))(scaled)))


def test_nothing_and_equals() -> None:
    assert improvements(np.empty((0, 2))) == []
    order = improvements(np.ones((3, 2)))
    assert [index for index, _ in order] == [0, 1, 2]
    assert [gain for _, gain in order][1:] == [0.0, 0.0]


def population(values: list[tuple[float, float, float]]) -> Population:
    """(two objectives, violation) each."""
    return Population.create(
        *(Individual(X=np.array([n]), F=np.array(v[:2]), G=np.array([v[2]])) for n, v in enumerate(values))
    )


def survivors(values: list[tuple[float, float, float]], count: int) -> list[int]:
    kept = HypervolumeSurvival().do(PROBLEM, population(values), n_survive=count)
    return [int(individual.X[0]) for individual in kept]


def test_within_budget_comes_first_then_by_violation() -> None:
    values = [(0.0, 0.0, 5.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.5, 0.25), (2.0, 2.0, 0.0)]
    assert survivors(values, 5)[:3] == [1, 2, 4] or survivors(values, 5)[:3] == [2, 1, 4]
    assert survivors(values, 5)[3:] == [3, 0]
    assert len(survivors(values, 2)) == 2


def test_all_over_budget() -> None:
    assert survivors([(0.0, 0.0, 3.0), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0)], 2) == [1, 2]


def test_the_bulge_is_preferred_to_the_spread() -> None:
    """A front with a knee: crowding keeps both ends, improvement takes the knee first."""
    knee = [(0.0, 1.0, 0.0), (0.1, 0.1, 0.0), (1.0, 0.0, 0.0)]
    for order in itertools.permutations(range(3)):
        kept = HypervolumeSurvival().do(PROBLEM, population([knee[index] for index in order]), n_survive=1)
        assert tuple(kept[0].F) == (0.1, 0.1)


def test_is_of_nsga2_alone() -> None:
    with pytest.raises(ValueError, match="survival 'hv' is of the algorithm nsga2, not of random"):
        SearchSettings(survival="hv", algorithm="random")
    with pytest.raises(ValueError, match="survival is 'best', takes crowding or hv"):
        SearchSettings(survival="best")
