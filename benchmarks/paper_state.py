"""Everything that an experiment has recorded by now, read and checked."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.paper_drift import Comparison, compare
from benchmarks.paper_plan import SEARCHES, Folder, Plan, read_lines
from benchmarks.paper_retrain import Longer, best, layouts, read_longer, read_retrained
from star import cost
from star.config import ModelConfig
from star.genome import Genome
from star.measure.quantities import value_of
from star.profile.predict import predictor
from star.profile.table import ProfileTable, read_table
from star.search import Evaluation, RunStore
from star.search.measures import CACHE_LENGTH

__all__ = ["Found", "State", "all_genomes", "read_state", "sizes"]


@dataclass(frozen=True)
class Found:
    """What one search has found.

    Attributes:
        name: of `SEARCHES`.
        evaluations: all of them, references among them.
        populations: the survivors' keys of each generation.
        finished: whether it ran to its end.
        chosen: who is trained longer, best first; none before it is finished.
    """

    name: str
    evaluations: list[Evaluation]
    populations: list[tuple[str, ...]]
    finished: bool
    chosen: list[Evaluation]
    model: ModelConfig

    @property
    def references(self) -> dict[str, Evaluation]:
        """The layouts as the proxy saw them, by name."""
        split = ((item.origin.partition(":"), item) for item in self.evaluations)
        return {name: item for (kind, _, name), item in split if kind == "reference" and item.ok}

    def mean_quality(self, generation: int) -> float | None:
        """Of a generation's survivors."""
        if not self.populations:
            return None
        keys = set(self.populations[generation])
        known = [item.objectives["quality"] for item in self.evaluations if item.key in keys and item.ok]
        return statistics.mean(known) if known else None


@dataclass(frozen=True)
class State:
    """Everything that is recorded in the folder of an experiment."""

    plan: Plan
    searches: list[Found]
    longer: dict[str, Longer]
    table: ProfileTable | None
    drifts: list[dict[str, float | None]]

    @property
    def finished(self) -> list[Found]:
        return [item for item in self.searches if item.finished]

    def tests(self) -> list[Comparison]:
        """The final populations against the drifts."""
        populations = {
            item.name: [Genome.parse(key) for key in item.populations[-1]] for item in self.finished
        }
        return compare(populations, self.drifts) if self.drifts and populations else []


def read_state(folder: Folder) -> State:
    """All that is recorded by now."""
    plan = folder.plan()
    table = read_table(folder.device_file) if folder.device_file.exists() else None
    retrained = read_retrained(folder)
    searches = [
        _found(folder, plan, name) for name in SEARCHES if RunStore.begun(folder.run(name) / "run.db")
    ]
    genomes = {item.key for found in searches for item in found.chosen}
    genomes |= set(layouts(plan.search.depth).values())
    return State(
        plan=plan,
        searches=searches,
        longer={genome: read_longer(retrained, genome) for genome in sorted(genomes)},
        table=table,
        drifts=[_drift(folder, line) for line in read_lines(folder.drift_file)],
    )


def _found(folder: Folder, plan: Plan, name: str) -> Found:
    with RunStore.open(folder.run(name)) as store:
        evaluations, populations = store.evaluations(), store.populations()
        finished, model = bool(store.events("finished")), store.settings().model
        reference = store.references().get("Transformer++")
    chosen = best(evaluations, SEARCHES[name], plan.best, reference) if finished else []
    return Found(name, evaluations, populations, finished, chosen, model)


def _drift(folder: Folder, line: Mapping[str, Any]) -> dict[str, float | None]:
    found = line.get("statistics")
    if not isinstance(found, dict) or not all(
        item is None or isinstance(item, (int, float)) for item in found.values()
    ):
        raise ValueError(f"{folder.drift_file} is damaged: a line is no drift")
    return found


def all_genomes(state: State) -> list[str]:
    """The layouts and the chosen ones of the finished searches: who is to be trained longer."""
    chosen = [item.key for found in state.finished for item in found.chosen]
    return list(dict.fromkeys([*layouts(state.plan.search.depth).values(), *chosen]))


def sizes(state: State, genome: str) -> dict[str, float]:
    """What follows from a genome: parameters, bytes, and ms a token where a device was measured."""
    parsed = Genome.parse(genome)
    # The vocabulary is the text's only where a search has begun; no cost depends on it.
    model = state.searches[0].model if state.searches else state.plan.search.model
    found: dict[str, float] = {
        "size": cost.parameters(parsed, model),
        "cache": cost.cache_bytes(parsed, model, length=CACHE_LENGTH),
    }
    decode = None
    if state.table is not None:
        decode = value_of(predictor(state.table).predict(parsed), "decode_p50")
    return found if decode is None else {**found, "decode_p50": decode}
