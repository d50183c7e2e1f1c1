"""Rank correlation, bootstrap intervals, and the probability of being non-dominated under noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["bootstrap_interval", "kendall_tau", "pooled_deviation", "probability_non_dominated"]

Values = NDArray[np.float64]


def kendall_tau(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b of two rankings of the same things: 1 the same order, -1 the opposite, 0 none.

    tau-b = (P - Q) / √((P + Q + A) (P + Q + B)) with P pairs in the same order, Q in opposite orders, A pairs
    tied in `b` alone and B tied in `a` alone (Kendall, "The treatment of ties in ranking problems", 1945).

    Args:
        a, b: (N,) finite numbers.

    Returns:
        tau-b; NaN where it is not defined: fewer than two values, or a column without an order.

    Raises:
        ValueError: columns of different lengths, or a value that is not finite.
    """
    first, second = _column("a", a), _column("b", b)
    if len(first) != len(second):
        raise ValueError(f"kendall_tau: b has {len(second)} values, takes the {len(first)} of a")
    orders = [np.sign(column[:, None] - column[None, :]).ravel() for column in (first, second)]
    # √ of the pairs not tied in the one times those not tied in the other; every pair counts twice.
    scale = math.sqrt((orders[0] @ orders[0]) * (orders[1] @ orders[1]))
    return float(orders[0] @ orders[1]) / scale if scale else math.nan


def bootstrap_interval(
    statistic: Callable[..., float],
    *columns: ArrayLike,
    rounds: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """The percentile bootstrap's interval of `statistic(*columns)` (Efron, 1979).

    Rows are drawn with replacement, the same rows of every column, `rounds` times. Draws whose statistic is
    NaN (a correlation of one row drawn N times) don't count.

    Args:
        statistic: of columns like `columns`, a float.
        columns: (N, ...) each, one row a genome.
        rounds: how many draws.
        seed: equal seeds give equal intervals.
        confidence: the share of draws within the interval.

    Returns:
        (low, high); (NaN, NaN) where no draw has a statistic.

    Raises:
        ValueError: no column, no row, columns of different lengths, or an argument out of range.
    """
    if rounds < 1:
        raise ValueError(f"bootstrap_interval: rounds is {rounds}, takes at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"bootstrap_interval: confidence is {confidence}, takes more than 0 and less than 1")
    arrays = [np.asarray(column) for column in columns]
    lengths = [len(array) if array.ndim else 0 for array in arrays]
    if not lengths or min(lengths) == 0 or len(set(lengths)) > 1:
        raise ValueError(
            f"bootstrap_interval: columns have {lengths} rows, takes one or more of equal length"
        )
    rng = np.random.default_rng(seed)
    drawn = np.empty(rounds)
    for index in range(rounds):
        rows = rng.integers(0, lengths[0], lengths[0])
        drawn[index] = statistic(*(array[rows] for array in arrays))
    defined = drawn[~np.isnan(drawn)]
    if len(defined) == 0:
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def pooled_deviation(groups: Iterable[ArrayLike]) -> tuple[float, int]:
    """The standard deviation within groups of one variance, and its degrees of freedom.

    s² = Σ_groups Σ_i (x_i - x̄_group)² / Σ_groups (n_group - 1).

    Args:
        groups: (n,) finite numbers each; groups of fewer than two say nothing.

    Returns:
        (s, degrees of freedom); (NaN, 0) where no group has two values.

    Raises:
        ValueError: a group that is no column, or a value that is not finite.
    """
    columns = [column for column in (_column("group", group) for group in groups) if len(column) > 1]
    degrees = sum(len(column) - 1 for column in columns)
    if degrees == 0:
        return math.nan, 0
    squares = math.fsum(float(((column - column.mean()) ** 2).sum()) for column in columns)
    return math.sqrt(squares / degrees), degrees


def probability_non_dominated(
    means: ArrayLike,
    standard_errors: ArrayLike,
    exact: ArrayLike | None = None,
    rounds: int = 2000,
    seed: int = 0,
    spreads: ArrayLike | None = None,
) -> Values:
    """How probably each candidate is truly non-dominated, when one objective is known with errors only.

    The uncertain objective is drawn from Normal(mean, standard error) for every candidate independently,
    `rounds` times; a candidate counts where no other is as good in all objectives and better in one. Smaller
    is better throughout.

    Args:
        means, standard_errors: (N,) of the uncertain objective.
        exact: (N, M) the objectives that are known exactly; None or M = 0: there are none.
        rounds: how many draws.
        seed: equal seeds give equal probabilities.
        spreads: (M,) for columns of `exact` that are known up to a factor: the standard deviation of the
            factor's logarithm, which is drawn for every candidate independently too; 0: the column is
            exact. None: all are.

    Returns:
        (N,) shares of the draws, 0 to 1.

    Raises:
        ValueError: columns of different lengths, a value that is not finite, a negative error, no round.
    """
    centres, errors = _column("means", means), _column("standard_errors", standard_errors)
    count = len(centres)
    known = np.zeros((count, 0)) if exact is None else np.asarray(exact, dtype=np.float64)
    if len(errors) != count:
        raise ValueError(
            f"probability_non_dominated: standard_errors has {len(errors)} values, takes {count}"
        )
    if (errors < 0).any():
        raise ValueError(f"probability_non_dominated: standard_errors has {errors.min()}, takes at least 0")
    if known.ndim != 2 or len(known) != count or not np.isfinite(known).all():
        raise ValueError(
            f"probability_non_dominated: exact has shape {known.shape}, takes ({count}, M) finite numbers"
        )
    if rounds < 1:
        raise ValueError(f"probability_non_dominated: rounds is {rounds}, takes at least 1")
    widths = np.zeros(known.shape[1]) if spreads is None else _column("spreads", spreads)
    if len(widths) != known.shape[1] or (widths < 0).any():
        raise ValueError(
            f"probability_non_dominated: spreads are {widths.tolist()}, take {known.shape[1]} numbers from 0"
        )
    factors = known[:, widths > 0], widths[widths > 0]
    as_good, better = _compared(known[:, widths == 0])
    rng = np.random.default_rng(seed)
    survived = np.zeros(count)
    for _ in range(rounds):
        columns = [rng.normal(centres, errors)[:, None]]
        if len(factors[1]):
            columns.append(factors[0] * np.exp(rng.normal(0.0, factors[1], factors[0].shape)))
        no_worse, less = _compared(np.concatenate(columns, axis=1))
        survived += ~((better & no_worse) | (as_good & less)).any(axis=1)
    return survived / rounds


def _compared(known: Values) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of (N, M) columns, at [i, j]: whether j is nowhere worse than i; and better somewhere, too."""
    as_good = np.ones((len(known), len(known)), dtype=np.bool_)
    less = np.zeros_like(as_good)
    for (
        column
    ) in known.T:  # one after the other: reducing over an axis as short as M takes several times longer
        as_good &= column[None, :] <= column[:, None]
        less |= column[None, :] < column[:, None]
    return as_good, as_good & less


def _column(name: str, values: ArrayLike) -> Values:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name} has shape {column.shape}, takes (N,)")
    if not np.isfinite(column).all():
        raise ValueError(f"{name} has a value that is not finite, takes finite numbers")
    return column
