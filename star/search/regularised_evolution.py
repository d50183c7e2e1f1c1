"""Regularised evolution (Real et al., arXiv 1802.01548): tournament, mutation alone, and the oldest die.

The paper's: the population is a queue; a parent is the best of a random sample of it; the child is a mutation
of the parent; every child enters, whatever it is worth, and the oldest leaves, whatever it is worth.

Ours, to have the budget and the workers of the others: children come by generations of `population`, all of
them from the queue as it stood (the paper's many workers see an older queue as well), and the queue holds
`QUEUE` generations, so that a model lives long enough to be a parent. With several objectives, the best of a
sample is one that none of the sample dominates, by chance where there are several. The sample is a quarter
of the queue, as the paper's 25 of 100, and at least 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

import numpy as np

from star.genome import Genome
from star.search.objectives import objective_vector
from star.search.proposals import Proposals
from star.search.ranking import fronts
from star.search.settings import SearchSettings
from star.search.store import Evaluation
from star.search.variation import mutate

__all__ = ["QUEUE", "RegularisedEvolution"]

QUEUE = 2
SAMPLE = 0.25


class RegularisedEvolution:
    """See the module. The survivors are the queue."""

    later_origin = "offspring"

    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings
        self._rng = np.random.default_rng(settings.seed)
        self._proposals = Proposals(settings, self._rng)
        self._queue: deque[Genome] = deque(maxlen=QUEUE * settings.population)
        self._vectors: dict[str, tuple[float, ...] | None] = {}

    def propose(self) -> list[Genome]:
        children: dict[str, Genome] = {}
        for _ in range(self._settings.population if self._queue else 0):
            child = self._child(children)
            if child is not None:
                children[child.key] = child
        return self._proposals.complete(children.values())

    def select(self, evaluations: Mapping[str, Evaluation]) -> list[Genome]:
        for genome in self._proposals.latest:
            evaluation = evaluations[genome.key]
            self._vectors[genome.key] = (
                objective_vector(evaluation.objectives, self._settings.objectives) if evaluation.ok else None
            )
            self._queue.append(genome)
        return list(self._queue)

    def _child(self, siblings: Collection[str]) -> Genome | None:
        """A mutation of a parent that is a model not seen before; None where many attempts gave none."""
        settings = self._settings
        for _ in range(settings.attempts):
            mutant = mutate(self._parent(), settings.mutation_rate, self._rng, settings.pool)
            child = mutant.repair(self._rng, settings.pool)
            if self._proposals.is_new(child) and child.key not in siblings:
                return child
        return None

    def _parent(self) -> Genome:
        members = list(self._queue)
        size = min(len(members), max(2, round(SAMPLE * len(members))))
        sample = [members[index] for index in self._rng.choice(len(members), size=size, replace=False)]
        succeeded = [genome for genome in sample if self._vectors[genome.key] is not None]
        if not succeeded:
            return sample[0]
        rank = fronts(np.array([self._vectors[genome.key] for genome in succeeded], dtype=np.float64))
        first = np.flatnonzero(rank == 0)
        return succeeded[int(first[self._rng.integers(len(first))])]
