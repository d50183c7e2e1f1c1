"""Parameter count alone: candidates are chosen by what their genome tells, and no training is ever looked at.

Decoder parameter count ranks perplexity well (LiteTransformerSearch, arXiv 2203.02094), so a search that
trains must beat one that does not. More parameters stand for less of every objective that takes training to
know, and for more of every one of a device that has no table here; the others are computed. Each generation,
DRAWS times as many genomes as there are places are drawn at random, and the best of them and of those left
over, in NSGA-II's order, are proposed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from star import cost
from star.genome import Genome
from star.proxy import Outcome
from star.search.layouts import seeds
from star.search.measures import Candidate
from star.search.objectives import find
from star.search.ranking import best, ranked_keys
from star.search.settings import SearchSettings
from star.search.store import Evaluation
from star.search.variation import different_genomes

__all__ = ["DRAWS", "ParameterCount"]

DRAWS = 2


class ParameterCount:
    """See the module. The survivors are the best by their evaluations, for the record alone."""

    later_origin = "random"

    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings
        self._rng = np.random.default_rng(settings.seed)
        self._genomes: dict[str, Genome] = {}
        self._waiting: dict[str, tuple[Genome, tuple[float, ...]]] = {}

    def propose(self) -> list[Genome]:
        settings = self._settings
        drawn = different_genomes(
            DRAWS * settings.population,
            settings.depth,
            self._rng,
            settings.pool,
            unwanted=self._genomes.keys() | self._waiting.keys(),
        )
        self._waiting |= {genome.key: (genome, self._foretold(genome)) for genome in drawn}
        first = [] if self._genomes else seeds(settings)[: settings.population]
        for genome in first:
            self._waiting.pop(genome.key, None)
        waiting = list(self._waiting.values())
        vectors = np.array([vector for _, vector in waiting]).reshape(len(waiting), len(settings.objectives))
        order = best(vectors, settings.population - len(first))
        chosen = [*first, *(waiting[index][0] for index in order)]
        for genome in chosen:
            self._waiting.pop(genome.key, None)
        self._genomes |= {genome.key: genome for genome in chosen}
        return chosen

    def select(self, evaluations: Mapping[str, Evaluation]) -> list[Genome]:
        settings = self._settings
        keys = ranked_keys(list(self._genomes), evaluations, settings.objectives, settings.population)
        return [self._genomes[key] for key in keys]

    def _foretold(self, genome: Genome) -> tuple[float, ...]:
        """What the genome tells of each objective."""
        parameters = float(cost.parameters(genome, self._settings.model))
        candidate = Candidate(genome, self._settings, Outcome("ok"))
        foretold = []
        for name in self._settings.objectives:
            objective = find(name)
            assert objective is not None, "settings check their names"
            if objective.trained:
                foretold.append(-parameters)
            elif objective.device and self._settings.profile is None:
                foretold.append(parameters)
            else:
                sign = -1.0 if objective.maximised else 1.0
                foretold.append(sign * objective.load()(candidate))
        return tuple(foretold)
