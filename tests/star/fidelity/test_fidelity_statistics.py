"""Rank correlation, intervals and probabilities, against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from star.fidelity.statistics import (
    bootstrap_interval,
    kendall_tau,
    pooled_deviation,
    probability_non_dominated,
)

small = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12)


def literal_tau(pairs: list[tuple[int, int]]) -> float:
    """tau-b pair by pair."""
    same = opposite = tied_first = tied_second = 0
    for (a, b), (c, d) in itertools.combinations(pairs, 2):
        if a == c and b == d:
            continue
        tied_first += a == c
        tied_second += b == d
        same += (a - c) * (b - d) > 0
        opposite += (a - c) * (b - d) < 0
    scale = math.sqrt((same + opposite + tied_first) * (same + opposite + tied_second))
    return (same - opposite) / scale if scale else math.nan


@settings(deadline=None, max_examples=50)
@given(small)
def test_kendall_tau_is_its_definition(pairs: list[tuple[int, int]]) -> None:
    got = kendall_tau([a for a, _ in pairs], [b for _, b in pairs])
    assert got == pytest.approx(literal_tau(pairs), nan_ok=True)


def test_kendall_tau_is_scipys() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=60), rng.integers(0, 9, 60)
    assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic)


def test_kendall_tau_of_known_rankings() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))
    assert math.isnan(kendall_tau([1], [2]))


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    sample = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(lambda column: float(column.mean()), sample)
    half = 1.96 * sample.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.03)


def test_bootstrap_interval_keeps_rows_together_and_repeats_itself() -> None:
    rows = np.arange(12.0)
    assert bootstrap_interval(kendall_tau, rows, rows * 2, rounds=50) == (1.0, 1.0)
    other = np.random.default_rng(0).permutation(rows)
    assert bootstrap_interval(kendall_tau, rows, other, rounds=50) == bootstrap_interval(
        kendall_tau, rows, other, rounds=50
    )
    wide = bootstrap_interval(kendall_tau, rows, other, rounds=200)
    narrow = bootstrap_interval(kendall_tau, rows, other, rounds=200, confidence=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bootstrap_interval_leaves_out_undefined_draws() -> None:
    low, high = bootstrap_interval(kendall_tau, [1.0, 2.0], [1.0, 2.0], rounds=100)
    assert (low, high) == (1.0, 1.0)
    assert all(math.isnan(end) for end in bootstrap_interval(kendall_tau, [1.0], [2.0], rounds=10))


def test_two_candidates_differ_by_their_errors_as_the_normal_distribution_says() -> None:
    first, second = probability_non_dominated([1.0, 2.0], [1.0, 1.0], rounds=5000)
    expected = 0.5 * math.erfc(-1 / 2)  # Φ((2 - 1) / √2)
    assert first == pytest.approx(expected, abs=0.02)
    assert first + second == 1.0


def test_without_errors_the_front_is_certain() -> None:
    exact = [[3.0, 1.0], [2.0, 1.0], [1.0, 1.0], [3.0, 1.0], [1.0, 2.0]]
    got = probability_non_dominated([1.0, 2.0, 3.0, 1.5, 3.0], [0.0] * 5, exact, rounds=3)
    assert got.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_equal_candidates_do_not_dominate_each_other() -> None:
    got = probability_non_dominated([1.0, 1.0], [0.0, 0.0], [[5.0], [5.0]], rounds=2)
    assert got.tolist() == [1.0, 1.0]


def test_a_candidate_of_smallest_size_is_never_dominated() -> None:
    got = probability_non_dominated([9.0, 1.0, 1.1], [0.5] * 3, [[1.0], [2.0], [2.0]], rounds=500)
    assert got[0] == 1.0
    assert got[1] > got[2] > 0.0
    assert got[1] + got[2] == 1.0


def test_columns_known_up_to_a_factor_are_drawn() -> None:
    # The first is dominated where the second is smaller too: ln 2 of a factor apart, each with a spread of 1.
    first, second = probability_non_dominated(
        [2.0, 1.0], [0.0, 0.0], [[1.0, 5.0], [2.0, 5.0]], rounds=5000, spreads=[1.0, 0.0]
    )
    assert first == pytest.approx(1 - 0.5 * math.erfc(math.log(2) / 2), abs=0.02)
    assert second == 1.0
    # Negative columns (of objectives that are maximised) keep their sign.
    first, second = probability_non_dominated(
        [2.0, 1.0], [0.0, 0.0], [[-2.0], [-1.0]], rounds=5000, spreads=[1.0]
    )
    assert first == pytest.approx(1 - 0.5 * math.erfc(math.log(2) / 2), abs=0.02)
    assert second == 1.0


def test_a_spread_of_nothing_changes_nothing() -> None:
    arguments = [1.0, 1.1, 1.2], [0.2] * 3, [[3.0], [2.0], [2.0]]
    plain = probability_non_dominated(*arguments, rounds=200)
    assert plain.tolist() == probability_non_dominated(*arguments, rounds=200, spreads=[0.0]).tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kendall_tau([1, 2], [1]), "takes the 2 of a"),
        (lambda: kendall_tau([1, math.nan], [1, 2]), "a has a value that is not finite"),
        (lambda: kendall_tau([[1, 2]], [1, 2]), "a has shape"),
        (lambda: bootstrap_interval(kendall_tau), "columns have"),
        (lambda: bootstrap_interval(kendall_tau, [1, 2], [1]), "columns have"),
        (lambda: bootstrap_interval(kendall_tau, [], []), "columns have"),
        (lambda: bootstrap_interval(kendall_tau, [1], rounds=0), "rounds is 0"),
        (lambda: bootstrap_interval(kendall_tau, [1], confidence=1.0), "confidence is 1.0"),
        (lambda: probability_non_dominated([1, 2], [1]), "standard_errors has 1 values"),
        (lambda: probability_non_dominated([1, 2], [1, -1]), "standard_errors has -1.0"),
        (lambda: probability_non_dominated([1, 2], [1, 1], [[1]]), "exact has shape"),
        (lambda: probability_non_dominated([1, 2], [1, 1], [[1.0], [math.inf]]), "exact has shape"),
        (lambda: probability_non_dominated([1], [1], rounds=0), "rounds is 0"),
        (lambda: probability_non_dominated([1], [1], [[1]], spreads=[-1]), "spreads are"),
        (lambda: probability_non_dominated([1], [1], [[1]], spreads=[0.1, 0.1]), "spreads are"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_pooled_deviation_is_by_hand() -> None:
    # Squares about the means: 2 of one degree, 8 of two; a single value says nothing.
    deviation, degrees = pooled_deviation([[1.0, 3.0], [0.0, 2.0, 4.0], [7.0], []])
    assert deviation == pytest.approx(math.sqrt(10 / 3))
    assert degrees == 3
    nothing, none = pooled_deviation([[1.0], []])
    assert math.isnan(nothing)
    assert none == 0
    with pytest.raises(ValueError, match="not finite"):
        pooled_deviation([[1.0, math.inf]])
