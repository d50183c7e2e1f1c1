"""NSGA-II over genomes, asked and told by the loop: `begin`, then `propose` and `select` by turns.

Everything that pymoo draws comes from the one generator seeded by the settings, and it sees nothing but
objectives and failures, so the same evaluations lead to the same proposals: that is what lets a run be
replayed from its record instead of being restored from a saved state.

Elitism: parents and offspring compete for the places of the next generation together, so the best front is
never lost while it fits, and the two extremes of every front have the largest crowding distance: the
paper's elitism of 2 is contained in NSGA-II's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.operators.selection.tournament import TournamentSelection
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

from star.genome import Genome
from star.search.budgets import FAILED, STOPPED, is_over_budget, violation
from star.search.layouts import BASELINES, seeds
from star.search.objectives import objective_vector
from star.search.settings import SearchSettings
from star.search.store import Evaluation
from star.search.survival import HypervolumeSurvival
from star.search.variation import (
    POSITIONS,
    KnownModels,
    PoolMutation,
    RandomGenomes,
    SharingRepair,
    TwoPointCrossover,
    Variation,
    decode,
    tournament,
)

__all__ = ["BASELINES", "Evolution"]

# pymoo reads no objective of an infeasible candidate, but a NaN or infinity would spread if it ever did.
_OBJECTIVE_OF_A_FAILURE = float(np.finfo(np.float64).max)


class Evolution:
    """The genetic algorithm between two evaluations.

    Args:
        settings: of the search.
    """

    later_origin = "offspring"

    def __init__(self, settings: SearchSettings) -> None:
        self._objectives = settings.objectives
        self._budgets = settings.budgets
        self._known = KnownModels()
        self._algorithm = _nsga2(settings, self._known)
        self._proposed: Population | None = None

    def propose(self) -> list[Genome]:
        """The next generation's genomes: different models, none proposed before as far as that is possible.

        Parents are selected, recombined, mutated and repaired; the first time, genomes are drawn. An empty
        list says that no further model could be found.
        """
        self._proposed = self._algorithm.ask()
        if self._proposed is None or len(self._proposed) == 0:
            return []
        genomes = [decode(individual.X) for individual in self._proposed]
        self._known.keys.update(genome.key for genome in genomes)
        return genomes

    def select(self, evaluations: Mapping[str, Evaluation]) -> list[Genome]:
        """The survivors among the population and the last proposals, given the evaluation of each key."""
        assert self._proposed is not None, "propose comes first"
        for individual in self._proposed:
            evaluation = evaluations[decode(individual.X).key]
            if evaluation.ok or is_over_budget(evaluation):
                individual.F = np.array(objective_vector(evaluation.objectives, self._objectives))
                violated = violation(evaluation.objectives, self._budgets)
            else:
                individual.F = np.full(len(self._objectives), _OBJECTIVE_OF_A_FAILURE)
                violated = STOPPED if evaluation.stopped else FAILED
            individual.G = np.array([violated])  # above 0 violates the constraint
        self._algorithm.tell(infills=self._proposed)
        return [decode(individual.X) for individual in self._algorithm.pop]


def _nsga2(settings: SearchSettings, known: KnownModels) -> NSGA2:
    repair = SharingRepair(settings.pool)
    algorithm = NSGA2(
        pop_size=settings.population,
        sampling=RandomGenomes(settings.depth, settings.pool, seeds(settings)),
        mating=Variation(
            TournamentSelection(func_comp=tournament, pressure=settings.tournament),
            TwoPointCrossover(settings.crossover_rate),
            PoolMutation(settings.mutation_rate, settings.pool),
            repair=repair,
            known=known,
            depth=settings.depth,
            pool=settings.pool,
            n_max_iterations=settings.attempts,
        ),
        repair=repair,
        eliminate_duplicates=known,
        seed=settings.seed,
        survival=HypervolumeSurvival() if settings.survival == "hv" else RankAndCrowding(),
    )
    problem = Problem(
        n_var=settings.depth * POSITIONS,
        n_obj=len(settings.objectives),
        n_ieq_constr=1,  # "the candidate was trained to its end, did not fail, and keeps all budgets"
    )
    return algorithm.setup(problem, termination=NoTermination())
