"""Everything that an experiment has recorded by now, read and checked."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks.paper_choice import Choice, choose, quality_of
from benchmarks.paper_device import Measured, read_measured
from benchmarks.paper_drift import Comparison, Drift, compare
from benchmarks.paper_environment import read_environment
from benchmarks.paper_judgement import Judge, agreement
from benchmarks.paper_plan import SEARCHES, Folder, Plan, read_lines
from benchmarks.paper_retrain import Longer, layouts, read_longer, read_retrained
from star import cost
from star.config import ModelConfig
from star.fidelity.certificate import Interval
from star.genome import Genome
from star.measure.quantities import value_of
from star.profile.predict import predictor
from star.profile.table import ProfileTable, read_table
from star.report.numbers import title
from star.search import Evaluation, RunStore
from star.search.measures import CACHE_LENGTH

__all__ = [
    "Found",
    "State",
    "drift_objectives",
    "read_drifts",
    "read_found",
    "read_state",
    "search_title",
]


@dataclass(frozen=True)
class Found:
    """What one search has found.

    Attributes:
        name: of `SEARCHES`.
        evaluations: all of them, references among them.
        populations: the survivors' keys of each generation.
        finished: whether it ran to its end.
        choices: who is trained longer and why, in order; none before it is finished.
        model: sizes of its candidates.
    """

    name: str
    evaluations: list[Evaluation]
    populations: list[tuple[str, ...]]
    finished: bool
    choices: list[Choice]
    model: ModelConfig

    @property
    def objectives(self) -> tuple[str, ...]:
        return SEARCHES[self.name]

    @property
    def chosen(self) -> list[Evaluation]:
        return [choice.evaluation for choice in self.choices]

    @property
    def references(self) -> dict[str, Evaluation]:
        """The layouts as the proxy saw them, by name; without those that failed."""
        split = ((item.origin.partition(":"), item) for item in self.evaluations)
        return {name: item for (kind, _, name), item in split if kind == "reference" and item.ok}

    def mean_quality(self, generation: int) -> float | None:
        """Of a generation's survivors."""
        if not self.populations:
            return None
        keys = set(self.populations[generation])
        known = [item.objectives["quality"] for item in self.evaluations if item.key in keys and item.ok]
        return statistics.mean(known) if known else None

    def final_population(self) -> list[Genome]:
        return [Genome.parse(key) for key in self.populations[-1]] if self.populations else []


@dataclass(frozen=True)
class State:
    """Everything that is recorded in the folder of an experiment."""

    plan: Plan
    environment: Mapping[str, Any]
    searches: list[Found]
    longer: dict[str, Longer]
    table: ProfileTable | None
    drifts: dict[int, list[Drift]]
    measured: Measured

    @property
    def finished(self) -> list[Found]:
        return [item for item in self.searches if item.finished]

    @property
    def layouts(self) -> dict[str, str]:
        """Canonical genomes of the known layouts, by name."""
        return layouts(self.plan.search.depth)

    @cached_property
    def judge(self) -> Judge:
        """Compares the longer trainings; its noise is that of all genomes."""
        return Judge.of(self.longer.values(), self.plan.best, self.plan.seeds)

    @cached_property
    def tests(self) -> list[Comparison]:
        """The final populations against the drifts of as many objectives."""
        found = []
        for item in self.finished:
            drifts = [drift.statistics for drift in self.drifts_of(item.name)]
            if drifts and item.populations:
                found += compare(item.name, item.final_population(), drifts)
        return found

    @cached_property
    def agreements(self) -> dict[str, tuple[int, dict[str, Interval]]]:
        """By group of genomes (all, and those of each finished search) how many the proxy's quality and a
        longer training are known of, and `agreement` among them."""
        groups = {"all, with the layouts": self.all_genomes()}
        groups |= {found.name: [item.key for item in found.chosen] for found in self.finished}
        found = {}
        for name, genomes in groups.items():
            rows = [
                (proxy, self.sizes(genome)["size"], mean)
                for genome in genomes
                if (proxy := self.proxy_quality(genome)) is not None
                and (mean := self.longer[genome].mean) is not None
            ]
            columns = list(zip(*rows, strict=True)) or [(), (), ()]
            found[name] = len(rows), agreement(*columns)
        return found

    def drifts_of(self, search: str) -> list[Drift]:
        return self.drifts.get(len(SEARCHES[search]), [])

    def all_genomes(self) -> list[str]:
        """The layouts and the chosen ones of the finished searches: who is to be trained longer."""
        chosen = [item.key for found in self.finished for item in found.chosen]
        return list(dict.fromkeys([*self.layouts.values(), *chosen]))

    def to_measure(self) -> list[str]:
        """Whose whole models are to be measured: the layouts and the joint search's chosen."""
        joint = [item.key for found in self.finished if found.name == "joint" for item in found.chosen]
        return list(dict.fromkeys([*self.layouts.values(), *joint])) if joint else []

    def proxy_quality(self, genome: str) -> float | None:
        """Bits per byte after the proxy's training, which is the same in every search; None where it is not
        known or has failed."""
        known = (item for found in self.searches for item in found.evaluations if item.key == genome)
        return next((quality for item in known if (quality := quality_of(item)) is not None), None)

    def sizes(self, genome: str) -> dict[str, float]:
        """What follows from a genome: parameters, bytes, and ms a token where a device was measured."""
        parsed = Genome.parse(genome)
        # The vocabulary is the text's only where a search has begun; no cost depends on it.
        model = self.searches[0].model if self.searches else self.plan.search.model
        found: dict[str, float] = {
            "size": cost.parameters(parsed, model),
            "cache": cost.cache_bytes(parsed, model, length=CACHE_LENGTH),
        }
        decode = None
        if self.table is not None:
            decode = value_of(predictor(self.table).predict(parsed), "decode_p50")
        return found if decode is None else {**found, "decode_p50": decode}

    def measured_decode(self, genome: str) -> float | None:
        """ms a token of the whole model; None where it was not measured."""
        return value_of(self.measured.get(genome, {}), "decode_p50")

    def missing(self) -> list[str]:
        """What a complete experiment has and this has not, in words; empty when nothing is missing."""
        plan, done = self.plan, {item.name for item in self.finished}
        parts = [f"the search for {search_title(name)}" for name in SEARCHES if name not in done]
        wanted = len(self.all_genomes()) * plan.seeds
        trained = sum(len(item.quality) + item.failed for item in self.longer.values())
        if trained < wanted:
            parts.append(f"{wanted - trained} of {wanted} longer trainings of the layouts and what is chosen")
        for objectives in drift_objectives():
            there = len(self.drifts.get(objectives, []))
            if there < plan.drifts:
                parts.append(f"{plan.drifts - there} of {plan.drifts} drifts with {objectives} objectives")
        unmeasured = [genome for genome in self.to_measure() if genome not in self.measured]
        if unmeasured:
            parts.append(f"{len(unmeasured)} of {len(self.to_measure())} whole models to measure")
        return parts


def search_title(name: str) -> str:
    """One of `SEARCHES` in words, "quality + size"."""
    return " + ".join(title(objective) if "_" in objective else objective for objective in SEARCHES[name])


def drift_objectives() -> list[int]:
    """Numbers of objectives of the searches, each once."""
    return list(dict.fromkeys(map(len, SEARCHES.values())))


def read_state(folder: Folder) -> State:
    """All that is recorded by now.

    Raises:
        ValueError, RunError: there is no experiment, or a damaged record.
    """
    plan = folder.plan()
    table = read_table(folder.device_file) if folder.device_file.exists() else None
    retrained = read_retrained(folder)
    searches = [
        read_found(folder, plan, name) for name in SEARCHES if RunStore.begun(folder.run(name) / "run.db")
    ]
    genomes = {item.key for found in searches for item in found.chosen}
    genomes |= set(layouts(plan.search.depth).values())
    return State(
        plan=plan,
        environment=read_environment(folder),
        searches=searches,
        longer={genome: read_longer(retrained, genome) for genome in sorted(genomes)},
        table=table,
        drifts=read_drifts(folder),
        measured=read_measured(folder),
    )


def read_found(folder: Folder, plan: Plan, name: str) -> Found:
    """One of the searches."""
    with RunStore.open(folder.run(name)) as store:
        evaluations, populations = store.evaluations(), store.populations()
        finished, model = bool(store.events("finished")), store.settings().model
        reference = store.references().get("Transformer++")
    choices = choose(evaluations, SEARCHES[name], plan.best, reference) if finished else []
    return Found(name, evaluations, populations, finished, choices, model)


def read_drifts(folder: Folder) -> dict[int, list[Drift]]:
    """The recorded drifts, by their number of objectives.

    Raises:
        ValueError: a line is none.
    """
    found: dict[int, list[Drift]] = {}
    for line in read_lines(folder.drift_file):
        try:
            item = Drift(**line)
            parts = [item.objectives, item.number, item.identity, *item.statistics.values()]
        except (TypeError, AttributeError):
            raise ValueError(f"{folder.drift_file} is damaged: a line is no drift") from None
        if not all(part is None or isinstance(part, (int, float)) for part in parts):
            raise ValueError(f"{folder.drift_file} is damaged: a line is no drift")
        found.setdefault(item.objectives, []).append(item)
    return found
