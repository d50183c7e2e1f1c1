"""What the seed of a training alone does to a trained objective: the ceiling of every surrogate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from star.comparison.table import Row
from star.fidelity.statistics import bootstrap_interval, kendall_tau, pooled_deviation

__all__ = ["SeedAgreement", "agreement", "values_by_seed"]

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SeedAgreement:
    """How far trainings that differ in their seed alone agree.

    Attributes:
        genomes: trained with more than one seed.
        seeds: columns that they are compared in.
        tau: Kendall's tau between two seeds, the mean over pairs of seeds; NaN where none has an order.
        interval: of 95 %, by a bootstrap over the genomes; None where none was asked for.
        deviation: standard deviation between the seeds of a genome, pooled; in the objective's unit.
    """

    genomes: int
    seeds: int
    tau: float
    interval: tuple[float, float] | None
    deviation: float

    def to_json(self) -> dict[str, Any]:
        """A plain dict; what is not defined is null."""
        low, high = self.interval or (math.nan, math.nan)
        numbers = {"tau": self.tau, "low": low, "high": high, "deviation": self.deviation}
        defined = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        return {"genomes": self.genomes, "seeds": self.seeds, **defined}


def values_by_seed(rows: Sequence[Row], name: str) -> dict[str, dict[int, float]]:
    """genome -> seed -> value, of the rows that succeeded and have it.

    Several devices predict for one training: it counts once.
    """
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.ok and name in row.objectives:
            found.setdefault(row.genome, {}).setdefault(row.seed, row.objectives[name])
    return found


def agreement(rows: Sequence[Row], name: str, rounds: int = 0) -> SeedAgreement | None:
    """Of rows of one set of conditions; None where no genome has two seeds.

    Args:
        rows: of a table.
        name: of an objective.
        rounds: draws of the bootstrap; 0 for no interval.
    """
    repeated = [values for values in values_by_seed(rows, name).values() if len(values) > 1]
    if not repeated:
        return None
    seeds = sorted({seed for values in repeated for seed in values})
    table = np.array([[values.get(seed, math.nan) for seed in seeds] for values in repeated])
    deviation, _ = pooled_deviation(list(values.values()) for values in repeated)
    interval = bootstrap_interval(_mean_tau, table, rounds=rounds) if rounds else None
    return SeedAgreement(len(repeated), len(seeds), _mean_tau(table), interval, deviation)


def _mean_tau(table: Values) -> float:
    """Mean of Kendall's tau over pairs of columns of (genomes, seeds), each by the genomes that have both."""
    taus = []
    for one, other in combinations(table.T, 2):
        both = ~np.isnan(one) & ~np.isnan(other)
        taus.append(kendall_tau(one[both], other[both]) if both.any() else math.nan)
    known = [tau for tau in taus if not math.isnan(tau)]
    return math.fsum(known) / len(known) if known else math.nan
