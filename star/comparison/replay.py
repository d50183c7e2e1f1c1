"""Search algorithms under one budget, over a table of trained genomes and a surrogate fitted on it.

A genome that the table holds has its recorded values (means over seeds, where it was trained with several);
another has its true analytic costs,
and what the surrogate says of the objectives that take training. So hundreds of searches cost seconds.
Whether their order would be that of real searches depends on how well the surrogate ranks, which is reported
with them; and what the trees can not see, chance of training above all, is missing from the landscape.

Hypervolumes are in the table's units: in each objective 0 is its best value and 1 its worst, and the
reference point is 1.1 in each. They are taken over everything that a search has asked for.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from star.comparison.seeds import SeedAgreement, agreement
from star.comparison.surrogate import Fidelity, Surrogate, cross_validate, feature_matrix, fidelity
from star.comparison.table import Row, main_conditions
from star.config import ModelConfig
from star.fidelity.statistics import bootstrap_interval
from star.genome import Genome
from star.proxy import Outcome, ProxySettings
from star.search.algorithms import ALGORITHMS, Algorithm, begin, require_algorithm
from star.search.front import REFERENCE_POINT, non_dominated
from star.search.measures import Candidate
from star.search.objectives import Objective, find, objective_vector, require_objectives
from star.search.settings import SearchSettings
from star.search.store import Evaluation

__all__ = ["Comparison", "Interval", "Landscape", "Result", "compare"]

Values = npt.NDArray[np.float64]

BOOTSTRAPS = 2000
CONFIDENCE = 0.95


class Landscape:
    """The values of any genome of the table's depth, without training.

    Args:
        rows: of the table, of any conditions; those are used that most rows have.
        objectives: of which every successful row must have a value.

    Raises:
        ValueError: unknown objectives, ones that the table lacks, several depths, or too few rows.
    """

    def __init__(self, rows: Sequence[Row], objectives: Sequence[str]) -> None:
        began = time.perf_counter()
        self.objectives = require_objectives(objectives)
        if not rows:
            raise ValueError("the table is empty: add runs to it with: star table --extend FILE RUN")
        self.rows = len(rows)
        self.conditions = main_conditions(rows)
        self.left_out = sum(row.conditions != self.conditions for row in rows)
        rows = [row for row in rows if row.conditions == self.conditions]
        self._require_values(rows)
        rows = _of_one_device(rows, self.objectives)
        self.known = _means(rows, self.objectives)
        self.failed = {row.genome for row in rows if not row.ok} - self.known.keys()
        self.settings = _settings_of(rows[0], self.objectives)
        genomes = [Genome.parse(key) for key in self.known]
        depths = sorted({genome.depth for genome in genomes})
        if len(depths) != 1:
            raise ValueError(
                f"the table has genomes of depths {', '.join(map(str, depths))}, takes one depth"
            )
        self.depth = depths[0]
        self.points = np.array([objective_vector(values, self.objectives) for values in self.known.values()])
        trained = (name for name in self.objectives if _objective(name).trained)
        found = {name: agreement(rows, name) for name in trained}
        self.seeds: dict[str, SeedAgreement] = {name: item for name, item in found.items() if item}
        self._fit(genomes)
        self.seconds = time.perf_counter() - began

    def _require_values(self, rows: Sequence[Row]) -> None:
        for name in self.objectives:
            if not any(name in row.objectives for row in rows):
                raise ValueError(f"the table has no values of {name}")
        if not any(all(name in row.objectives for name in self.objectives) for row in rows):
            raise ValueError(f"no genome of the table has all of {', '.join(self.objectives)}")

    def _fit(self, genomes: list[Genome]) -> None:
        inputs = feature_matrix(genomes, self.settings.model)
        parameters = inputs[:, -2]
        self.surrogates: dict[str, Surrogate] = {}
        self.fidelity: dict[str, Fidelity] = {}
        self.parameter_count: dict[str, Fidelity] = {}
        for name in self.objectives:
            if not _follows_from_the_genome(name):
                values = np.array([float(measured[name]) for measured in self.known.values()])
                self.fidelity[name] = cross_validate(inputs, values)
                objective = _objective(name)
                falls = objective.trained or objective.maximised
                self.parameter_count[name] = fidelity(-parameters if falls else parameters, values)
                self.surrogates[name] = Surrogate(inputs, values)

    def values(self, genomes: Sequence[Genome]) -> list[Mapping[str, float] | None]:
        """The objectives of each genome; None for one that failed when it was trained."""
        unknown = [g for g in genomes if g.key not in self.known and g.key not in self.failed]
        foretold = dict(zip((genome.key for genome in unknown), self._foretell(unknown), strict=True))
        return [
            None if genome.key in self.failed else self.known.get(genome.key) or foretold[genome.key]
            for genome in genomes
        ]

    def _foretell(self, genomes: Sequence[Genome]) -> list[Mapping[str, float]]:
        if not genomes:
            return []
        inputs = feature_matrix(genomes, self.settings.model)
        columns: dict[str, Sequence[float]] = {
            "size": inputs[:, -2].tolist(),
            "cache": inputs[:, -1].tolist(),
        }
        for name in self.objectives:
            if name in self.surrogates:
                columns[name] = self.surrogates[name].predict(inputs).tolist()
            elif name not in columns:
                measure = _objective(name).load()
                columns[name] = [measure(Candidate(g, self.settings, Outcome("ok"))) for g in genomes]
        return [{name: columns[name][index] for name in self.objectives} for index in range(len(genomes))]


def _objective(name: str) -> Objective:
    objective = find(name)
    assert objective is not None, "a landscape checks its names"
    return objective


def _follows_from_the_genome(name: str) -> bool:
    """Whether a value needs neither training nor a device."""
    objective = _objective(name)
    return not (objective.trained or objective.device)


def _of_one_device(rows: Sequence[Row], objectives: Sequence[str]) -> Sequence[Row]:
    """Rows of the device that most of those have which have all objectives, where these need a device."""
    if not any(_objective(name).device for name in objectives):
        return rows
    whole = [row.device for row in rows if all(name in row.objectives for name in objectives)]
    device = Counter(whole).most_common(1)[0][0]
    return [row for row in rows if row.device == device]


def _means(rows: Sequence[Row], objectives: Sequence[str]) -> dict[str, Mapping[str, float]]:
    """The mean over seeds of every genome that has all objectives; a training counts once, whatever devices
    were predicted for."""
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for row in rows:
        if row.ok and all(name in row.objectives for name in objectives):
            found.setdefault(row.genome, {}).setdefault(row.seed, row.objectives)
    return {
        key: {name: float(np.mean([values[name] for values in several.values()])) for name in objectives}
        for key, several in found.items()
    }


def _settings_of(row: Row, objectives: tuple[str, ...]) -> SearchSettings:
    """The search that the row's conditions belong to."""
    try:
        return SearchSettings(
            objectives=objectives,
            model=ModelConfig.from_json(row.settings["model"]),
            proxy=ProxySettings.from_json(row.settings["proxy"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the table's settings can not be read: {str(error).splitlines()[0]}") from error


# ---- searches ------------------------------------------------------------------------------------------


@dataclass
class _Search:
    """One algorithm with one seed, between two generations."""

    name: str
    seed: int
    algorithm: Algorithm
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    front: list[tuple[float, ...]] = field(default_factory=list)
    volumes: list[float] = field(default_factory=list)
    exhausted: bool = False

    def told(self, genome: Genome, values: Mapping[str, float] | None) -> None:
        self.evaluations[genome.key] = Evaluation(
            id=len(self.evaluations),
            key=genome.key,
            genome=str(genome),
            generation=0,
            origin="random",
            status="failed" if values is None else "ok",
            reason="it failed when it was trained" if values is None else None,
            objectives=values or {},
        )


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its bootstrap interval of CONFIDENCE."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One algorithm.

    Attributes:
        algorithm: its name.
        volumes: (seeds, generations), the hypervolume after each generation.
        final: over seeds, after the last.
        half: over seeds, after half of the generations (rounded up).
        wins: share of seeds in which it ended above random search (ties count half); None without it.
    """

    algorithm: str
    volumes: Values
    final: Interval
    half: Interval
    wins: float | None


@dataclass(frozen=True)
class Comparison:
    """All algorithms on one landscape, the best first; `seconds` are those of the surrogates too."""

    landscape: Landscape
    population: int
    generations: int
    seeds: int
    results: tuple[Result, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        landscape = self.landscape
        return {
            "objectives": list(landscape.objectives),
            "conditions": landscape.conditions,
            "genomes": len(landscape.known),
            "rows": landscape.rows,
            "rows_of_other_conditions": landscape.left_out,
            "population": self.population,
            "generations": self.generations,
            "seeds": self.seeds,
            "surrogates": {
                name: {
                    "tau": value.tau,
                    "rho": value.rho,
                    "parameter_count_tau": landscape.parameter_count[name].tau,
                }
                for name, value in landscape.fidelity.items()
            },
            "seed_agreement": {name: value.to_json() for name, value in landscape.seeds.items()},
            "algorithms": {
                result.algorithm: {
                    "hypervolume": vars(result.final),
                    "hypervolume_at_half": vars(result.half),
                    "above_random": result.wins,
                    "by_generation": result.volumes.mean(axis=0).tolist(),
                }
                for result in self.results
            },
            "seconds": self.seconds,
        }


def compare(
    landscape: Landscape,
    *,
    algorithms: Sequence[str] = tuple(ALGORITHMS),
    population: int = 16,
    generations: int = 18,
    seeds: int = 10,
    processes: int | None = None,
) -> Comparison:
    """Replay every algorithm with every seed. What comes out does not depend on the processes.

    Args:
        algorithms: names; none twice.
        population, generations: the budget, as of a search.
        seeds: searches of each algorithm.
        processes: that share the seeds; None for one a core.

    Raises:
        ValueError: an unknown algorithm, or a number out of range.
    """
    began = time.perf_counter()
    if not 1 <= seeds <= 10_000:
        raise ValueError(f"seeds is {seeds}, takes 1 to 10000")
    if not algorithms:
        raise ValueError(f"algorithms is empty, takes one or more of {', '.join(ALGORITHMS)}")
    names = [require_algorithm(name) for name in dict.fromkeys(algorithms)]
    base = replace(
        landscape.settings,
        depth=landscape.depth,
        population=population,
        generations=generations,
        tournament=min(2, population),
    )
    count = min(seeds, processes or os.cpu_count() or 1)
    shares = [range(first, seeds, count) for first in range(count)]
    if count == 1:
        found = _replay(landscape, base, names, shares[0])
    else:
        # Fresh interpreters: a fork would copy the locks of torch's threads.
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(_replay, landscape, base, names, share) for share in shares]
            found = {key: volumes for future in waiting for key, volumes in future.result().items()}
    results = [_result(name, found, seeds) for name in names]
    results.sort(key=lambda result: -result.final.mean)
    seconds = landscape.seconds + time.perf_counter() - began
    return Comparison(landscape, population, generations, seeds, tuple(results), seconds)


def _replay(
    landscape: Landscape, base: SearchSettings, names: Sequence[str], seeds: Sequence[int]
) -> dict[tuple[str, int], list[float]]:
    """Hypervolumes by generation of each algorithm and seed."""
    searches = [
        _Search(name, seed, begin(replace(base, algorithm=name, seed=seed)))
        for name in names
        for seed in seeds
    ]
    units = _Units(landscape.points)
    for _ in range(base.generations):
        _generation(landscape, searches, units)
    return {(search.name, search.seed): search.volumes for search in searches}


def _generation(landscape: Landscape, searches: Sequence[_Search], units: _Units) -> None:
    """One generation of every search; all their genomes are looked up together, which makes it fast."""
    proposed = [[] if search.exhausted else search.algorithm.propose() for search in searches]
    wanted = {
        genome.key: genome
        for search, genomes in zip(searches, proposed, strict=True)
        for genome in genomes
        if genome.key not in search.evaluations
    }
    values = dict(zip(wanted, landscape.values(list(wanted.values())), strict=True))
    for search, genomes in zip(searches, proposed, strict=True):
        search.exhausted = not genomes
        for genome in genomes:
            if genome.key not in search.evaluations:
                search.told(genome, values[genome.key])
        if genomes:
            search.algorithm.select(search.evaluations)
        # Which points dominate all others is decided by those that did before, and the new ones.
        told = (search.evaluations[genome.key] for genome in genomes)
        new = [objective_vector(item.objectives, landscape.objectives) for item in told if item.ok]
        vectors = [*search.front, *new]
        search.front = [vectors[index] for index in non_dominated(vectors)] if vectors else []
        search.volumes.append(units.volume(search.front))


class _Units:
    """The table's best and worst of each objective, in which hypervolumes are measured."""

    def __init__(self, points: Values) -> None:
        from pymoo.indicators.hv import HV

        self._best = points.min(axis=0)
        spread = points.max(axis=0) - self._best
        self._spread = np.where(spread > 0, spread, 1.0)
        self._measure = HV(ref_point=np.full(points.shape[1], REFERENCE_POINT))

    def volume(self, front: Sequence[tuple[float, ...]]) -> float:
        if not front:
            return 0.0
        return float(self._measure((np.array(front) - self._best) / self._spread))


def _result(name: str, found: Mapping[tuple[str, int], list[float]], seeds: int) -> Result:
    volumes = np.array([found[name, seed] for seed in range(seeds)])
    wins = None
    if ("random", 0) in found:
        difference = volumes[:, -1] - np.array([found["random", seed][-1] for seed in range(seeds)])
        wins = float(np.mean(np.where(difference > 0, 1.0, np.where(difference == 0, 0.5, 0.0))))
    middle = (volumes.shape[1] + 1) // 2 - 1
    return Result(name, volumes, bootstrap(volumes[:, -1]), bootstrap(volumes[:, middle]), wins)


def bootstrap(values: Values, seed: int = 0) -> Interval:
    """The mean of (N,) values, and the percentile interval of the means of BOOTSTRAPS resamples."""
    limits = bootstrap_interval(np.mean, values, rounds=BOOTSTRAPS, seed=seed, confidence=CONFIDENCE)
    return Interval(float(values.mean()), *limits)
