"""Who proposes candidates and who survives: the interface of all algorithms, and their names.

    nsga2         the paper's: parents and offspring compete by fronts and crowding (star.search.evolution)
    ga            a plain genetic algorithm on one number (star.search.genetic_algorithm)
    regularised   regularised evolution: mutation alone, the oldest die (star.search.regularised_evolution)
    random        random search (star.search.random_search)
    parameters    parameter count alone, without looking at any training (star.search.parameter_count)

All get the same budget: `population` candidates a generation. Each is a function of the settings and of the
evaluations it is told, so that a run of any of them is resumed by replaying it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from star.genome import Genome
    from star.search.settings import SearchSettings
    from star.search.store import Evaluation

__all__ = ["ALGORITHMS", "Algorithm", "begin", "require_algorithm"]

ALGORITHMS: dict[str, str] = {
    "nsga2": "star.search.evolution:Evolution",
    "ga": "star.search.genetic_algorithm:GeneticAlgorithm",
    "regularised": "star.search.regularised_evolution:RegularisedEvolution",
    "random": "star.search.random_search:RandomSearch",
    "parameters": "star.search.parameter_count:ParameterCount",
}


class Algorithm(Protocol):
    """`propose` and `select` by turns, once a generation each. Made from the settings of the search."""

    later_origin: str
    """What its candidates behind the first generation are: "offspring", or "random"."""

    def propose(self) -> list[Genome]:
        """The next generation: different models, none proposed before as far as possible; empty: no more."""

    def select(self, evaluations: Mapping[str, Evaluation]) -> list[Genome]:
        """The survivors, given the evaluation of every key that was proposed so far."""


def begin(settings: SearchSettings) -> Algorithm:
    """The settings' algorithm, before its first generation."""
    module, _, name = ALGORITHMS[require_algorithm(settings.algorithm)].partition(":")
    return cast(Algorithm, getattr(import_module(module), name)(settings))


def require_algorithm(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: in one line.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm is {name!r}, takes {', '.join(ALGORITHMS)}")
    return name
