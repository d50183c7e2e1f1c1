"""Survivors ranked by hypervolume improvement, as LFM2's search ranked them (arXiv 2511.23404).

From the candidates that keep all budgets, one after the other is taken: each time the one that adds most to
the hypervolume of those taken before. Volumes are measured with every objective scaled to the candidates'
best and worst, from a reference point at 1.1 (as star.search.front does for the first generation's). When
none adds anything, those that are left follow in NSGA-II's order of fronts, then those over budget by their
violation, then the failed ones. Crowding, which NSGA-II uses instead, spreads survivors out wherever the
front is; improvement prefers where the front bulges.

The volume that a set adds can only shrink as the set grows, so a candidate whose former gain is below the
best present one need not be asked again: that saves most of the computation.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt
from pymoo.core.population import Population
from pymoo.core.survival import Survival
from pymoo.indicators.hv import HV

from star.search.front import REFERENCE_POINT
from star.search.ranking import fronts

__all__ = ["HypervolumeSurvival", "improvements"]

_SMALLEST_GAIN = 1e-12  # below it volumes differ by rounding alone

Points = npt.NDArray[np.float64]


class HypervolumeSurvival(Survival):
    """pymoo's interface to `improvements`. Individuals get "rank", their front, and "crowding", the volume
    that each added: more wins a tournament, as it does with crowding distances."""

    def __init__(self) -> None:
        super().__init__(filter_infeasible=False)

    def _do(
        self, problem: Any, pop: Population, *args: Any, n_survive: int | None = None, **kwargs: Any
    ) -> Population:
        violations = np.array([float(individual.CV[0]) for individual in pop])
        feasible = np.flatnonzero(violations <= 0)
        others = sorted(np.flatnonzero(violations > 0).tolist(), key=lambda index: (violations[index], index))
        points = np.array([pop[int(index)].F for index in feasible], dtype=np.float64)
        order: list[int] = []
        if len(feasible):
            rank = fronts(points)
            for place, gain in improvements(points):
                individual = pop[int(feasible[place])]
                individual.set("rank", int(rank[place]))
                individual.set("crowding", gain)
                order.append(int(feasible[place]))
        for index in others:
            pop[index].set("rank", len(pop))
            pop[index].set("crowding", 0.0)
        return pop[[*order, *others][: len(pop) if n_survive is None else n_survive]]


def improvements(points: Points) -> list[tuple[int, float]]:
    """(N, M), minimised -> all N indices, best first, each with the volume that it added."""
    if len(points) == 0:
        return []
    best = points.min(axis=0)
    spread = points.max(axis=0) - best
    scaled = (points - best) / np.where(spread > 0, spread, 1.0)
    volume = HV(ref_point=np.full(points.shape[1], REFERENCE_POINT))
    taken: list[int] = []
    order: list[tuple[int, float]] = []
    reached = 0.0

    def gain(index: int) -> float:
        return float(volume(scaled[[*taken, index]])) - reached

    waiting = [(-gain(index), index, 0) for index in range(len(points))]
    heapq.heapify(waiting)
    while waiting:
        known, index, size = heapq.heappop(waiting)
        if size < len(taken):  # asked when fewer had been taken
            heapq.heappush(waiting, (-gain(index), index, len(taken)))
            continue
        if -known <= _SMALLEST_GAIN:
            waiting.append((known, index, size))
            break
        taken.append(index)
        order.append((index, -known))
        reached -= known
    rank = fronts(points)
    left = sorted((index for _, index, _ in waiting), key=lambda index: (rank[index], index))
    return [*order, *((index, 0.0) for index in left)]
