"""Better, clearly better, not clearly worse; and how far the proxy agrees with the longer trainings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from benchmarks.paper_retrain import Longer
from star.fidelity.certificate import Interval
from star.fidelity.statistics import bootstrap_interval, kendall_tau, pooled_deviation

__all__ = ["LEVEL", "Judge", "agreement"]

LEVEL = 0.05
"""Of a family of tests: of the longer trainings of one search with a layout, of one search with the null."""

_ROUNDS = 1000  # of each bootstrap: the report is written after every stage


@dataclass(frozen=True)
class Judge:
    """Compares longer trainings.

    A difference is clear where Student's test of the two means finds it, two-sided, with the variance between
    seeds pooled over all genomes that were trained longer, at `LEVEL` shared among the `comparisons` of one
    search (Bonferroni). A genome of which a training has failed or is missing is never better or as good.

    Attributes:
        deviation: between seeds, pooled; NaN where no genome has two.
        degrees: its degrees of freedom.
        comparisons: that share the level.
        seeds: trainings that each genome should have.
    """

    deviation: float
    degrees: int
    comparisons: int
    seeds: int

    @classmethod
    def of(cls, trained: Iterable[Longer], comparisons: int, seeds: int) -> Judge:
        return cls(*pooled_deviation([item.quality for item in trained]), comparisons, seeds)

    @property
    def can_tell(self) -> bool:
        """Whether seeds say anything of noise."""
        return self.degrees > 0

    def margin(self, one: Longer, other: Longer) -> float:
        """A larger difference of their means is clear; NaN where nothing is known of noise."""
        if not self.can_tell or not one.quality or not other.quality:
            return math.nan
        quantile = float(student.ppf(1 - LEVEL / (2 * self.comparisons), self.degrees))
        return quantile * self.deviation * math.sqrt(1 / len(one.quality) + 1 / len(other.quality))

    def complete(self, item: Longer) -> bool:
        """Whether all its trainings have succeeded."""
        return len(item.quality) == self.seeds and not item.failed

    def better(self, one: Longer, other: Longer) -> bool:
        """Whether the mean of `one` is below that of `other`."""
        return self._gain(one, other) > 0

    def clearly_better(self, one: Longer, other: Longer) -> bool:
        return self._gain(one, other) > self.margin(one, other)

    def as_good(self, one: Longer, other: Longer) -> bool:
        """Whether `one` is not clearly worse; never where nothing is known of noise."""
        return self._gain(one, other) >= -self.margin(one, other)

    def _gain(self, one: Longer, other: Longer) -> float:
        """NaN, which no comparison holds of, where one of the two is not complete."""
        if not (self.complete(one) and self.complete(other)) or one.mean is None or other.mean is None:
            return math.nan
        return other.mean - one.mean


def agreement(proxy: Sequence[float], sizes: Sequence[float], means: Sequence[float]) -> dict[str, Interval]:
    """Kendall's tau of an order with that of the longer trainings' means, under "proxy" and "parameters"
    (more of them taken to be better), with bootstrap intervals over genomes."""
    given = {"proxy": np.asarray(proxy, dtype=float), "parameters": -np.asarray(sizes, dtype=float)}
    return {name: _interval(kendall_tau, values, np.asarray(means)) for name, values in given.items()}


def _interval(statistic: Callable[..., float], *columns: np.ndarray) -> Interval:
    if len(columns[0]) < 2:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(statistic(*columns), *bootstrap_interval(statistic, *columns, rounds=_ROUNDS))
