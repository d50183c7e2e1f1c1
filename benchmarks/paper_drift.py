"""Which LIV classes and sharing motifs a search favours, against evolution without selection.

Neutral drift: random genomes, tournaments, 2-point crossover, mutation, repair and survival as in a search,
with the same population and number of generations, but every candidate's fitness is a random number that it
is born with. So a lucky genome survives and has many children, as a good one would, and whatever it carries
spreads with it; the structures that spread in many such drifts by chance are what a search is compared with.

The p-value of a statistic of a search's final population: twice the smaller share of drifts at or beyond it
(with the population itself counted among them: Davison and Hinkley, 1997, section 4.2), at most 1. Those of
all statistics of all searches are adjusted together (Benjamini and Hochberg, 1995).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from star import pools
from star.genome import Genome
from star.search.settings import SearchSettings
from star.search.variation import different_genomes, mutate, recombine
from star.sharing import LivPlan, resolve

__all__ = ["Comparison", "adjusted", "compare", "drift", "many_drifts", "statistics_of", "two_sided"]

DIFFERENTIAL_SHORT_CONVOLUTION = 16
"""GConv-1-Diff: the paper names two of them joined by a featurizer as a motif that is favoured."""


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


def _share(plans: Sequence[LivPlan], holds: Callable[[LivPlan], bool]) -> float | None:
    return sum(map(holds, plans)) / len(plans) if plans else None


def _borrows_featurizer(plan: LivPlan) -> bool:
    return plan.featurizer_owner != plan.index


# ---- drift ---------------------------------------------------------------------------------------------


def drift(settings: SearchSettings, number: int) -> list[Genome]:
    """The final population of one evolution without selection, the `number`-th."""
    rng = np.random.default_rng([settings.seed, number])
    population = different_genomes(settings.population, settings.depth, rng, settings.pool)
    fitness = rng.random(len(population)).tolist()
    for _ in range(settings.generations - 1):
        children: list[Genome] = []
        while len(children) < settings.population:
            pair = [population[_winner(fitness, settings.tournament, rng)] for _ in range(2)]
            if rng.random() < settings.crossover_rate:
                pair = list(recombine(pair[0], pair[1], rng))
            for child in pair:
                mutant = mutate(child, settings.mutation_rate, rng, settings.pool)
                children.append(mutant.repair(rng, settings.pool))
        everyone = [*population, *children[: settings.population]]
        luck = [*fitness, *rng.random(len(everyone) - len(population)).tolist()]
        survivors = np.argsort(luck, kind="stable")[: settings.population].tolist()
        population = [everyone[index] for index in survivors]
        fitness = [luck[index] for index in survivors]
    return population


def _winner(fitness: Sequence[float], contenders: int, rng: np.random.Generator) -> int:
    drawn = rng.choice(len(fitness), size=min(contenders, len(fitness)), replace=False).tolist()
    return min(drawn, key=lambda index: fitness[index])


def many_drifts(
    settings: SearchSettings, numbers: Sequence[int], workers: int
) -> Iterator[tuple[int, dict[str, float | None]]]:
    """(number, `statistics_of` its final population) of each drift, as they come."""
    jobs = [(settings.to_json(), number) for number in numbers]
    if workers == 1 or len(jobs) < 2:
        yield from map(_one, jobs)
        return
    # Spawned: a fork would copy locks of torch's threads.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_one, jobs, chunksize=5)


def _one(job: tuple[Mapping[str, object], int]) -> tuple[int, dict[str, float | None]]:
    settings = SearchSettings.from_json(job[0])
    return job[1], statistics_of(drift(settings, job[1]))


# ---- tests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A statistic of one search's final population against the drifts.

    Attributes:
        search, statistic: which.
        observed: in the final population.
        expected: mean of the drifts.
        p: two-sided; `adjusted`: for all tests together.
    """

    search: str
    statistic: str
    observed: float
    expected: float
    p: float
    adjusted: float = 1.0


def two_sided(observed: float, drifts: Sequence[float]) -> float:
    """See the module: (1 + the smaller number of drifts at or beyond `observed`) / (1 + N), twice."""
    values = np.asarray(drifts, dtype=np.float64)
    # Shares of the same LIVs may differ by rounding where they are equal.
    below, above = (values <= observed + 1e-12).sum(), (values >= observed - 1e-12).sum()
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(values))))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's: the false discovery rate at which each would just be a discovery."""
    count = len(p_values)
    order = sorted(range(count), key=lambda index: p_values[index], reverse=True)
    result = [1.0] * count
    least = 1.0
    for place, index in enumerate(order):
        least = min(least, p_values[index] * count / (count - place))
        result[index] = least
    return result


def compare(
    populations: Mapping[str, Sequence[Genome]], drifts: Sequence[Mapping[str, float | None]]
) -> list[Comparison]:
    """Every statistic of every search's final population, in their order.

    Args:
        populations: by the search's name.
        drifts: `statistics_of` each drift's final population; not empty.
    """
    found: list[Comparison] = []
    for search, population in populations.items():
        for name, observed in statistics_of(population).items():
            values = [value for item in drifts if (value := item.get(name)) is not None]
            if observed is None or not values:
                continue
            p = two_sided(observed, values)
            found.append(Comparison(search, name, observed, float(np.mean(values)), p))
    corrected = adjusted([test.p for test in found])
    return [
        Comparison(**{**vars(test), "adjusted": value}) for test, value in zip(found, corrected, strict=True)
    ]
