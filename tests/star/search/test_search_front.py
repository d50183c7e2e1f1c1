"""Fronts, hypervolumes and the statement about the first generation."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from star.search.front import (
    REFERENCE_POINT,
    Dominance,
    dominates,
    dominates_first_generation,
    front,
    hypervolume_by_generation,
    non_dominated,
)
from star.search.objectives import objective_vector
from star.search.store import Evaluation

OBJECTIVES = ("quality", "size")

vectors = st.lists(
    st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float), st.integers(0, 2).map(float)),
    max_size=12,
)


def evaluation(
    id: int, quality: float, size: float, generation: int | None = 0, status: str = "ok"
) -> Evaluation:
    objectives = {"quality": quality, "size": size} if status == "ok" else {}
    reason = None if status == "ok" else "diverged"
    return Evaluation(id, f"k{id}", f"g{id}", generation, "random", status, reason, objectives)


@given(vectors)
def test_non_dominated_is_the_definition(points: list[tuple[float, ...]]) -> None:
    chosen = non_dominated(points)
    for index, point in enumerate(points):
        beaten = any(dominates(other, point) for other in points)
        assert (index in chosen) == (not beaten)


@given(vectors)
def test_the_front_of_a_front_and_one_more_is_the_front_of_all(points: list[tuple[float, ...]]) -> None:
    running: list[tuple[float, ...]] = []
    for point in points:
        running.append(point)
        running = [running[index] for index in non_dominated(running)]
    assert sorted(running) == sorted(points[index] for index in non_dominated(points))


@given(st.lists(st.floats(allow_nan=False), min_size=2, max_size=4))
def test_nothing_dominates_itself(point: list[float]) -> None:
    assert not dominates(point, point)


def test_front_leaves_out_failures_and_references() -> None:
    found = front(
        [
            evaluation(0, 0.0, 0.0, generation=None),
            evaluation(1, 2.0, 1.0),
            evaluation(2, 1.0, 2.0),
            evaluation(3, 2.0, 2.0),
            evaluation(4, 0.0, 0.0, status="failed"),
            evaluation(5, 1.0, 2.0, generation=3),
        ],
        OBJECTIVES,
    )
    assert [item.id for item in found] == [2, 5, 1]
    assert front([], OBJECTIVES) == []


def test_hypervolume_in_the_first_generations_units() -> None:
    evaluations = [
        evaluation(0, 1.0, 30.0),
        evaluation(1, 3.0, 10.0),
        evaluation(2, 2.0, 20.0, generation=1),
        evaluation(3, 0.0, 10.0, generation=2),
        evaluation(4, 1000.0, 1000.0, generation=3),
        evaluation(5, 0.0, 0.0, generation=None),
    ]
    volumes = hypervolume_by_generation(evaluations, OBJECTIVES, 4)
    # Scaled: (0, 1), (1, 0); then (0.5, 0.5); then (-0.5, 0), which dominates them all.
    edge = REFERENCE_POINT
    assert volumes[0] == pytest.approx(edge * 0.1 + (edge - 1) * 1.0)
    assert volumes[1] == pytest.approx(edge * 0.1 + 0.6 * 0.5 + 0.1 * 0.5)
    assert volumes[2] == pytest.approx((edge + 0.5) * edge)
    assert volumes[3] == volumes[2]


def test_hypervolume_without_success_and_without_spread() -> None:
    failures = [evaluation(0, 1.0, 1.0, status="failed"), evaluation(1, 4.0, 0.0, generation=1)]
    first, second = hypervolume_by_generation(failures, OBJECTIVES, 2)
    assert first is None
    assert second == pytest.approx(REFERENCE_POINT**2)


@given(
    st.lists(st.tuples(st.floats(0.5, 8), st.integers(1, 10**9), st.integers(0, 5)), min_size=1, max_size=20)
)
def test_hypervolume_never_falls(rows: list[tuple[float, int, int]]) -> None:
    evaluations = [evaluation(id, *row) for id, row in enumerate(rows)]
    volumes = [v for v in hypervolume_by_generation(evaluations, OBJECTIVES, 6) if v is not None]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(volumes))
    assert all(math.isfinite(volume) and volume >= 0 for volume in volumes)


@pytest.mark.parametrize(
    ("later", "expected", "words"),
    [
        ([], Dominance(2, 0), "does not dominate the first generation's: all 2 are still on it"),
        ([(0.5, 30.0)], Dominance(2, 1), "dominates 1 of the 2 candidates"),
        ([(0.5, 5.0)], Dominance(2, 2), "dominates all 2 candidates"),
    ],
)
def test_the_first_generation(later: list[tuple[float, float]], expected: Dominance, words: str) -> None:
    evaluations = [evaluation(0, 1.0, 30.0), evaluation(1, 3.0, 10.0), evaluation(2, 4.0, 40.0)]
    evaluations += [evaluation(10 + id, *point, generation=1) for id, point in enumerate(later)]
    found = dominates_first_generation(evaluations, OBJECTIVES)
    assert found == expected
    assert found.holds == (expected.dominated > 0)
    assert words in str(found)


def test_a_first_generation_that_failed() -> None:
    found = dominates_first_generation([evaluation(0, 1, 1, status="failed")], OBJECTIVES)
    assert not found.holds
    assert not found.strict
    assert "nothing to compare" in str(found)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "3"])
def test_objectives_must_be_finite_numbers(value: object) -> None:
    with pytest.raises(ValueError, match=r"objective size is .*, takes a finite number"):
        objective_vector({"quality": 1.0, "size": value}, OBJECTIVES)  # type: ignore[dict-item]
