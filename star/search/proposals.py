"""A generation filled up: children first, then models that were never proposed before, drawn at random."""

from __future__ import annotations

from collections.abc import Iterable

from numpy.random import Generator

from star.genome import Genome
from star.search.layouts import seeds
from star.search.settings import SearchSettings
from star.search.variation import different_genomes

__all__ = ["Proposals"]


class Proposals:
    """What an algorithm proposes, generation by generation, no model twice.

    Args:
        settings: of the search.
        rng: draws what children do not fill.
    """

    def __init__(self, settings: SearchSettings, rng: Generator) -> None:
        self._settings = settings
        self._rng = rng
        self._known: set[str] = set()
        self.latest: list[Genome] = []
        """Of the last generation."""

    @property
    def begun(self) -> bool:
        return bool(self._known)

    def is_new(self, genome: Genome) -> bool:
        """Whether no generation has proposed this model."""
        return genome.key not in self._known

    def complete(self, children: Iterable[Genome]) -> list[Genome]:
        """The next generation: different children that are new, as many as there are places, then random
        models (the first time, the known layouts before them where the settings say so)."""
        settings = self._settings
        chosen: dict[str, Genome] = {}
        for child in children:
            if len(chosen) < settings.population and self.is_new(child):
                chosen.setdefault(child.key, child)
        if len(chosen) < settings.population:
            drawn = different_genomes(
                settings.population - len(chosen),
                settings.depth,
                self._rng,
                settings.pool,
                first=() if self.begun else seeds(settings),
                unwanted=self._known.union(chosen),
            )
            chosen |= {genome.key: genome for genome in drawn}
        self._known.update(chosen)
        self.latest = list(chosen.values())
        return self.latest
