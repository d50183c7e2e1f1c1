"""Fronts and their hypervolume. All vectors are minimised.

The front is taken over every candidate that was evaluated, not over the last population: NSGA-II may lose a
good one to crowding, the record does not. References are compared with the front and are no part of it.

Hypervolumes are measured in the units of the first generation: each objective is scaled so that the best
value among the first generation's candidates is 0 and the worst is 1, and the reference point is 1.1 in
each. So the number never changes afterwards, grows from generation to generation, and exceeds 1.21 (two
objectives) only where the search has left the first generation's box. Candidates beyond the reference point
count nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from star.search.objectives import objective_vector
from star.search.store import Evaluation

__all__ = [
    "REFERENCE_POINT",
    "Dominance",
    "candidates",
    "dominates",
    "dominates_first_generation",
    "front",
    "hypervolume",
    "hypervolume_by_generation",
    "non_dominated",
]

REFERENCE_POINT = 1.1

Vector = tuple[float, ...]
Points = npt.NDArray[np.float64]


def dominates(left: Sequence[float], right: Sequence[float]) -> bool:
    """Whether `left` is nowhere worse than `right` and somewhere better."""
    pairs = list(zip(left, right, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def non_dominated(vectors: Sequence[Sequence[float]] | Points) -> list[int]:
    """Indices of the vectors that no other dominates, in their order. Equal vectors stay together."""
    points = np.asarray(vectors, dtype=np.float64)
    return [
        index
        for index, point in enumerate(points)
        if not bool(np.any(np.all(points <= point, axis=1) & np.any(points < point, axis=1)))
    ]


def candidates(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """The successful evaluations that belong to a generation (references that do not, do not count)."""
    return [evaluation for evaluation in evaluations if evaluation.ok and evaluation.generation is not None]


def front(evaluations: Iterable[Evaluation], objectives: Sequence[str]) -> list[Evaluation]:
    """The candidates that no other dominates, by the first objective, then the others, then id."""
    competing = candidates(evaluations)
    vectors = [objective_vector(evaluation.objectives, objectives) for evaluation in competing]
    best = [(vectors[index], competing[index].id, competing[index]) for index in non_dominated(vectors)]
    return [evaluation for _, _, evaluation in sorted(best, key=lambda item: item[:2])]


def hypervolume(
    evaluations: Iterable[Evaluation], objectives: Sequence[str], generation: int
) -> float | None:
    """Hypervolume of everything evaluated up to a generation; see the module for its units.

    None as long as no candidate has succeeded; the first generation with one gives the units.
    """
    from pymoo.indicators.hv import HV

    vectors: dict[int, list[Vector]] = {}
    for item in candidates(evaluations):
        if item.generation is not None and item.generation <= generation:
            vectors.setdefault(item.generation, []).append(objective_vector(item.objectives, objectives))
    if not vectors:
        return None
    best, spread = _units(vectors[min(vectors)])
    points = (np.array([vector for group in vectors.values() for vector in group]) - best) / spread
    measure = HV(ref_point=np.full(len(objectives), REFERENCE_POINT))
    return float(measure(points[non_dominated(points)]))


def hypervolume_by_generation(
    evaluations: Iterable[Evaluation], objectives: Sequence[str], generations: int
) -> list[float | None]:
    """`hypervolume` at each of the generations from 0."""
    everything = list(evaluations)
    return [hypervolume(everything, objectives, generation) for generation in range(generations)]


@dataclass(frozen=True)
class Dominance:
    """How the final front stands to the front of the first generation.

    Attributes:
        total: candidates on the first generation's front.
        dominated: those of them that a member of the final front dominates; the others are on it themselves.
    """

    total: int
    dominated: int

    @property
    def holds(self) -> bool:
        """Every one of the first front is dominated or kept, and at least one is dominated: the final front
        is better as a set (it can not be worse, being taken over everything)."""
        return self.dominated > 0

    @property
    def strict(self) -> bool:
        """Every one of the first front is dominated."""
        return 0 < self.dominated == self.total

    def __str__(self) -> str:
        if self.total == 0:
            return (
                "The first generation has no front (all failed, or exceeded a budget): there is nothing to "
                "compare with."
            )
        if self.strict:
            return f"The front dominates all {self.total} candidates of the first generation's front."
        kept = self.total - self.dominated
        verb = "is" if kept == 1 else "are"
        if self.holds:
            return (
                f"The front dominates {self.dominated} of the {self.total} candidates of the first "
                f"generation's front; {kept} {verb} still on it."
            )
        return f"The front does not dominate the first generation's: all {self.total} are still on it."


def dominates_first_generation(evaluations: Sequence[Evaluation], objectives: Sequence[str]) -> Dominance:
    """Compare the front over everything with the front of generation 0 alone."""
    first = front((item for item in evaluations if item.generation == 0), objectives)
    final = [objective_vector(item.objectives, objectives) for item in front(evaluations, objectives)]
    beaten = [
        item
        for item in first
        if any(dominates(vector, objective_vector(item.objectives, objectives)) for vector in final)
    ]
    return Dominance(total=len(first), dominated=len(beaten))


def _units(vectors: Sequence[Vector]) -> tuple[Points, Points]:
    """Best value of each objective, and the distance from it to the worst (where all are equal: the value
    itself, or 1)."""
    points = np.array(vectors)
    best = points.min(axis=0)
    spread = points.max(axis=0) - best
    spread = np.where(spread > 0, spread, np.abs(best))
    return best, np.where(spread > 0, spread, 1.0)
