"""NSGA-II's order of vectors that are minimised: by fronts, within a front by the distance to neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from star.search.objectives import objective_vector
from star.search.store import Evaluation

__all__ = ["best", "crowding", "fronts", "ranked_keys"]

Points = npt.NDArray[np.float64]


def fronts(points: Points) -> npt.NDArray[np.int64]:
    """(N, M) -> (N,): 0 for vectors that none dominates, 1 for those that only these dominate, and so on."""
    no_worse = np.all(points[:, None] <= points[None], axis=2)
    dominates = no_worse & np.any(points[:, None] < points[None], axis=2)
    rank = np.full(len(points), -1, dtype=np.int64)
    level = 0
    while np.any(rank < 0):
        left = rank < 0
        rank[left & ~np.any(dominates[left], axis=0)] = level
        level += 1
    return rank


def crowding(points: Points) -> Points:
    """(N, M) of one front -> (N,): the distance between the two neighbours, relative to its extent and
    summed over objectives; infinite at the ends (Deb et al., 2002)."""
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        extent = values[order[-1]] - values[order[0]]
        if extent > 0:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / extent
        distance[order[[0, -1]]] = np.inf
    return distance


def best(points: Points, count: int) -> list[int]:
    """Indices of the `count` best, best first; what is equal in all keeps its order."""
    if len(points) == 0:
        return []
    rank = fronts(points)
    room = np.zeros(len(points))
    for level in range(int(rank.max()) + 1):
        room[rank == level] = crowding(points[rank == level])
    order = sorted(range(len(points)), key=lambda index: (rank[index], -room[index], index))
    return order[:count]


def ranked_keys(
    keys: Sequence[str], evaluations: Mapping[str, Evaluation], objectives: Sequence[str], count: int
) -> list[str]:
    """The `count` best of `keys` by their evaluations, best first; failed ones behind all others."""
    succeeded = [key for key in keys if evaluations[key].ok]
    vectors = [objective_vector(evaluations[key].objectives, objectives) for key in succeeded]
    points = np.array(vectors, dtype=np.float64).reshape(len(succeeded), len(objectives))
    chosen = [succeeded[index] for index in best(points, count)]
    return [*chosen, *(key for key in keys if not evaluations[key].ok)][:count]
