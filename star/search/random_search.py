"""Random search: every generation is drawn anew. What any other algorithm has to beat."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from star.genome import Genome
from star.search.proposals import Proposals
from star.search.ranking import ranked_keys
from star.search.settings import SearchSettings
from star.search.store import Evaluation

__all__ = ["RandomSearch"]


class RandomSearch:
    """See the module. The survivors are the best of everything that was drawn, in NSGA-II's order."""

    later_origin = "random"

    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings
        self._proposals = Proposals(settings, np.random.default_rng(settings.seed))
        self._genomes: dict[str, Genome] = {}

    def propose(self) -> list[Genome]:
        drawn = self._proposals.complete(())
        self._genomes |= {genome.key: genome for genome in drawn}
        return drawn

    def select(self, evaluations: Mapping[str, Evaluation]) -> list[Genome]:
        settings = self._settings
        keys = ranked_keys(list(self._genomes), evaluations, settings.objectives, settings.population)
        return [self._genomes[key] for key in keys]
