"""A plain genetic algorithm on one number: tournament, 2-point crossover, mutation, repair, elitism of 2.

What the paper's NSGA-II is compared with there. One number is made of several objectives as their mean, each
scaled so that the first generation's best is 0 and its worst 1; failed candidates are worse than all others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from star.genome import Genome
from star.search.objectives import objective_vector
from star.search.proposals import Proposals
from star.search.settings import SearchSettings
from star.search.store import Evaluation
from star.search.variation import mutate, recombine

__all__ = ["ELITE", "GeneticAlgorithm"]

ELITE = 2


class GeneticAlgorithm:
    """See the module. The survivors are the two best parents and the children, the best of those first."""

    later_origin = "offspring"

    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings
        self._rng = np.random.default_rng(settings.seed)
        self._proposals = Proposals(settings, self._rng)
        self._population: list[Genome] = []
        self._fitness: dict[str, float] = {}
        self._units: tuple[np.ndarray, np.ndarray] | None = None

    def propose(self) -> list[Genome]:
        settings = self._settings
        children: dict[str, Genome] = {}
        for _ in range(settings.attempts * settings.population if self._population else 0):
            if len(children) >= settings.population:
                break
            new = filter(self._proposals.is_new, self._children())
            children |= {child.key: child for child in new if child.key not in children}
        return self._proposals.complete(children.values())

    def select(self, evaluations: Mapping[str, Evaluation]) -> list[Genome]:
        vectors = {
            genome.key: objective_vector(evaluations[genome.key].objectives, self._settings.objectives)
            for genome in self._proposals.latest
            if evaluations[genome.key].ok
        }
        if self._units is None and vectors:
            points = np.array(list(vectors.values()))
            spread = points.max(axis=0) - points.min(axis=0)
            self._units = points.min(axis=0), np.where(spread > 0, spread, 1.0)
        for genome in self._proposals.latest:
            self._fitness[genome.key] = self._number(vectors.get(genome.key))
        children = sorted(self._proposals.latest, key=self._fitness_of)
        kept = min(ELITE, self._settings.population - 1)  # or no child would ever come in
        elite = sorted(self._population, key=self._fitness_of)[:kept]
        self._population = [*elite, *children][: self._settings.population]
        return self._population

    def _number(self, vector: tuple[float, ...] | None) -> float:
        if vector is None or self._units is None:
            return float("inf")
        best, spread = self._units
        return float(np.mean((np.array(vector) - best) / spread))

    def _fitness_of(self, genome: Genome) -> float:
        return self._fitness[genome.key]

    def _children(self) -> list[Genome]:
        settings, rng = self._settings, self._rng
        left, right = self._parent(), self._parent()
        pair = recombine(left, right, rng) if rng.random() < settings.crossover_rate else (left, right)
        return [
            mutate(child, settings.mutation_rate, rng, settings.pool).repair(rng, settings.pool)
            for child in pair
        ]

    def _parent(self) -> Genome:
        count = min(self._settings.tournament, len(self._population))
        contenders = self._rng.choice(len(self._population), size=count, replace=False)
        return min((self._population[index] for index in contenders), key=self._fitness_of)
