"""Which LIV classes and sharing motifs a search favours, against evolution for an inherited, neutral fitness.

The null: evolutions by the search's own algorithm (star.search.algorithms: same initialisation, tournaments,
crossover, mutation, repair and survival, same population, generations and number of objectives), in which
only the objectives are others. Each evolution draws a landscape for each objective: every whole gene at every
place of a backbone has an effect, standard normal, and effects add up. So no class and no motif is preferred
on average, but fitness is inherited: lineages take over, and whatever else their genes are or stand beside
spreads with them. What differs from such a null is not explained by descent and hitch-hiking alone.

The test, for each search alone: every statistic is put in standard deviations from its mean, and the p-value
of a statistic is the share of evolutions whose furthest statistic is as far out (the search's population
counted among them). That is Westfall and Young's maximum (1993, section 2.3): it holds for all statistics of
a search together, takes their dependence as it is, and its smallest p-value does not grow with their number.
Means and deviations are those of the evolutions and the population together, so that under the null the
population is treated as each evolution is. By those of the evolutions alone, a statistic that is 0 in all of
them would be infinitely far out as soon as a population has any of it, and of rare structures there are many.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

from star import pools
from star.genome import Gene, Genome
from star.search.algorithms import begin
from star.search.settings import SearchSettings
from star.search.store import Evaluation
from star.sharing import LivPlan, resolve

__all__ = ["Comparison", "Drift", "class_identity", "compare", "drift", "many_drifts", "statistics_of"]

DIFFERENTIAL_SHORT_CONVOLUTION = 16
"""GConv-1-Diff: the paper names two of them joined by a featurizer as a motif that is favoured."""

_NEUTRAL = ("quality", "size", "cache", "decode_p50")
"""Names of the landscapes: objectives that are all minimised, as a search knows them."""

_ROUNDING = 1e-9

Statistics = Mapping[str, "float | None"]


class Drift(NamedTuple):
    """What is kept of one evolution.

    Attributes:
        objectives: how many.
        number: from 0, among those of as many objectives.
        statistics: `statistics_of` its final population.
        identity: `class_identity` of it.
    """

    objectives: int
    number: int
    statistics: Statistics
    identity: float


# ---- what is counted -----------------------------------------------------------------------------------


def statistics_of(population: Sequence[Genome]) -> dict[str, float | None]:
    """Shares over all LIVs of a population, by name; None where there is nothing to take a share of.

    LIVs of class NAME                      of all LIVs
    FAMILY with an earlier featurizer       of the family's LIVs
    FAMILY with earlier features            of the family's LIVs
    GConv-1-Diff pairs with one featurizer  a backbone
    """
    plans = [plan for genome in population for plan in resolve(genome)]
    found: dict[str, float | None] = {}
    for entry in pools.all_classes():
        found[f"LIVs of class {entry.name}"] = _share(plans, lambda plan, id=entry.id: plan.entry.id == id)  # type: ignore[misc]
    for family in dict.fromkeys(entry.family for entry in pools.all_classes()):
        members = [plan for plan in plans if plan.entry.family == family]
        found[f"{family} with an earlier featurizer"] = _share(members, _borrows_featurizer)
        found[f"{family} with earlier features"] = _share(members, lambda plan: plan.source is not None)
    pairs = sum(
        plan.entry.id == DIFFERENTIAL_SHORT_CONVOLUTION and _borrows_featurizer(plan) for plan in plans
    )
    found["GConv-1-Diff pairs with one featurizer"] = pairs / len(population) if population else None
    return found


def class_identity(population: Sequence[Genome]) -> float:
    """Mean share of the places at which two genomes of a population have LIVs of the same class; 1 for fewer
    than two genomes."""
    classes = np.array([[gene.liv_class for gene in genome.genes] for genome in population])
    shares = [float((classes[i] == classes[j]).mean()) for i, j in combinations(range(len(classes)), 2)]
    return float(np.mean(shares)) if shares else 1.0


def _share(plans: Sequence[LivPlan], holds: Callable[[LivPlan], bool]) -> float | None:
    return sum(map(holds, plans)) / len(plans) if plans else None


def _borrows_featurizer(plan: LivPlan) -> bool:
    return plan.featurizer_owner != plan.index


# ---- drift ---------------------------------------------------------------------------------------------


class Landscapes:
    """Additive effects of every whole gene at every place, one a landscape, drawn when first asked for."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        self._count = count
        self._rng = rng
        self._effects: dict[tuple[int, Gene], np.ndarray] = {}

    def fitness(self, genome: Genome) -> np.ndarray:
        """(count,): the sums of a genome's effects, less being better.

        Of the genome as it is spelled: labels of the canonical spelling change with earlier genes, so that
        an inherited gene would not keep its effect.
        """
        total = np.zeros(self._count)
        for place, gene in enumerate(genome.genes):
            if (place, gene) not in self._effects:
                self._effects[place, gene] = self._rng.standard_normal(self._count)
            total += self._effects[place, gene]
        return total


def drift(settings: SearchSettings, objectives: int, number: int) -> list[Genome]:
    """The final population of one evolution on landscapes of its own.

    Args:
        settings: of the search that it is the null of, but for objectives and seed.
        objectives: how many landscapes, 1 to 4.
        number: of the evolution; equal numbers give equal evolutions.
    """
    rng = np.random.default_rng([settings.seed, objectives, number])
    names = _NEUTRAL[:objectives]
    algorithm = begin(replace(settings, objectives=names, budgets={}, seed=int(rng.integers(2**63 - 1))))
    landscapes = Landscapes(objectives, rng)
    known: dict[str, Evaluation] = {}
    population: list[Genome] = []
    for generation in range(settings.generations):
        proposals = algorithm.propose()
        if not proposals:
            break
        for genome in proposals:
            if genome.key in known:
                continue
            values = dict(zip(names, landscapes.fitness(genome).tolist(), strict=True))
            known[genome.key] = Evaluation(
                len(known), genome.key, str(genome), generation, "neutral", "ok", None, values
            )
        population = algorithm.select(known)
    return population


def many_drifts(
    settings: SearchSettings, objectives: int, numbers: Sequence[int], workers: int
) -> Iterator[Drift]:
    """The drifts of these numbers, as they come."""
    jobs = [(settings.to_json(), objectives, number) for number in numbers]
    if workers == 1 or len(jobs) < 2:
        yield from map(_one, jobs)
        return
    # Spawned: a fork would copy locks of torch's threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_one, jobs, chunksize=5)


def _one(job: tuple[Mapping[str, object], int, int]) -> Drift:
    given, objectives, number = job
    population = drift(SearchSettings.from_json(given), objectives, number)
    return Drift(objectives, number, statistics_of(population), class_identity(population))


# ---- tests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A statistic of one search's final population against the drifts of as many objectives.

    Attributes:
        search, statistic: which.
        observed: in the final population.
        expected: mean of the drifts.
        deviations: how far the population is from the mean of it and all drifts, in their standard
            deviations; at most √drifts, and 0 where all are equal.
        p: two-sided, for all statistics of the search together.
    """

    search: str
    statistic: str
    observed: float
    expected: float
    deviations: float
    p: float


def compare(search: str, population: Sequence[Genome], drifts: Sequence[Statistics]) -> list[Comparison]:
    """Every statistic of a search's final population, in their order.

    Args:
        search: its name.
        population: final.
        drifts: `statistics_of` each drift's final population; not empty.
    """
    observed = statistics_of(population)
    table = np.array([[_number(item.get(name)) for name in observed] for item in (observed, *drifts)])
    far = _deviations(table)  # row 0 is the population's
    furthest = np.abs(far[1:]).max(axis=1)
    found = []
    for place, (name, value) in enumerate(observed.items()):
        known = [item for item in table[1:, place] if not np.isnan(item)]
        if value is None or not known:
            continue
        reached = int((furthest >= abs(far[0, place]) - _ROUNDING).sum())
        p = (1 + reached) / (1 + len(drifts))
        found.append(Comparison(search, name, value, float(np.mean(known)), float(far[0, place]), p))
    return found


def _deviations(table: np.ndarray) -> np.ndarray:
    """(populations, statistics) in standard deviations from each column's mean; 0 where a population has no
    share (NaN), which is no evidence in any direction, and where all are equal."""
    defined = ~np.isnan(table)
    counts = np.maximum(1, defined.sum(axis=0))
    away = np.where(defined, table - np.where(defined, table, 0.0).sum(axis=0) / counts, 0.0)
    spread = np.sqrt((away**2).sum(axis=0) / counts)
    return np.where(spread > _ROUNDING, away / np.where(spread > _ROUNDING, spread, 1.0), 0.0)


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
