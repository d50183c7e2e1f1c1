"""Everything that decides a search, as one plain value, and the presets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from star.config import ModelConfig
from star.measure.settings import MeasureSettings
from star.pools import Pool
from star.profile.table import ProfileTable
from star.proxy import ProxySettings
from star.search.algorithms import require_algorithm
from star.search.budgets import require_budgets
from star.search.objectives import Objective, measured, require_objectives
from star.tasks import open_task

__all__ = ["ENGINES", "EXECUTION", "PRESETS", "DataSettings", "RecallSettings", "SearchSettings", "preset"]

ENGINES = ("local", "ray")
SURVIVALS = ("crowding", "hv")
RIVALS = ("survivors", "front")
# What may change when a run is resumed: how it is carried out, not what it finds.
EXECUTION = ("workers", "workers_per_gpu", "timeout", "engine")
# Recorded only where they are not the defaults, so that runs from before there were any can be resumed.
_RECORDED_WHERE_CHOSEN = ("rungs", "rung_rivals", "rung_confidence")


@dataclass(frozen=True)
class DataSettings:
    """Which text the candidates are trained on (see star.data.open_corpus).

    Attributes:
        source: files, folders or a dataset's name; none for the text that needs no download.
        text_column: of a table, where the text is not found by itself.
        tokenizer: path of a `tokenizers` JSON file; None for bytes.
        validation_fraction: part of the text that is held out.
    """

    source: tuple[str, ...] = ()
    text_column: str | None = None
    tokenizer: str | None = None
    validation_fraction: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.source, str) or not all(isinstance(item, str) and item for item in self.source):
            raise ValueError(f"data source is {self.source!r}, takes a tuple of paths or names")
        object.__setattr__(self, "source", tuple(self.source))
        for name in ("text_column", "tokenizer"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"data {name} is {value!r}, takes a text or nothing")
        _require_number("validation_fraction", self.validation_fraction, above=0.0, at_most=0.5)

    def absolute(self) -> DataSettings:
        """The same with paths that stay right when the run is resumed from another folder."""
        source = tuple(str(Path(item).resolve()) if Path(item).exists() else item for item in self.source)
        tokenizer = None if self.tokenizer is None else str(Path(self.tokenizer).resolve())
        return replace(self, source=source, tokenizer=tokenizer)


@dataclass(frozen=True)
class RecallSettings:
    """How the objective `recall` is measured: a model of the genome is trained on a task of its own.

    Seed, threads, device, data type, schedule and clipping are the proxy's.

    Attributes:
        task: as `star.tasks.open_task` takes it.
        steps: optimizer steps.
        batch_size: sequences a step.
        learning_rate: peak, reached after `warmup_steps`.
        warmup_steps: of `steps`.
        validation_batches: held batches, the same for all candidates.
    """

    # The smallest that tells backbones of 24 LIVs apart within seconds; in larger ones, attention has not
    # begun to recall when the time is over.
    task: str = "mqar:vocab_size=16,length=12,pairs=3"
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    validation_batches: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.task, str):
            raise ValueError(f"recall task is {self.task!r}, takes a text")
        open_task(self.task)
        for name, most in (("steps", 10**9), ("batch_size", 10**6), ("validation_batches", 10**6)):
            _require_integer(name, getattr(self, name), at_least=1, at_most=most)
        _require_integer("warmup_steps", self.warmup_steps, at_least=0, at_most=self.steps)
        _require_number("learning_rate", self.learning_rate, above=0.0, at_most=1e3)


@dataclass(frozen=True)
class SearchSettings:
    """A search: what is looked for, where, how long, and by how many processes.

    Attributes:
        objectives: names of star.search.objectives.
        budgets: limits of such names, in their units; who exceeds one is kept off the front
            (star.search.budgets).
        population: survivors of a generation, and offspring of one.
        generations: the first, drawn at random, among them: population x generations candidates in all.
        algorithm: of star.search.algorithms; who proposes candidates and who survives.
        survival: what NSGA-II chooses survivors by, beside dominance: "crowding", or "hv" for hypervolume
            improvement (star.search.survival).
        depth: LIVs of a backbone.
        pool: the options of each position of a gene.
        seed: of every draw that the search makes; the proxy has its own.
        mutation_rate: probability with which each of a gene's five positions is redrawn (paper: 0.1).
        crossover_rate: probability that a pair of parents is recombined at all.
        tournament: how many contenders each parent is the best of.
        attempts: how often a generation is varied anew to replace proposals that were evaluated before.
        seed_baselines: begin with the Transformer++, StripedMamba and LFM2 layouts in the population.
        references: train those layouts, outside of the population, to compare with.
        rungs: parts of a training, like (0.25, 0.5), at which candidates that can no longer survive are
            stopped (star.search.rungs); none for training all to their end.
        rung_rivals: the "survivors" of the generation before, or the "front" of all, which they must not be
            behind.
        rung_confidence: with which they can not, by what earlier generations have recorded.
        keep_weights: keep the trained weights of the front and of the references.
        model: sizes of the models. Its vocabulary is set from the corpus when the search begins.
        proxy: the training that stands for a full one.
        data: the text.
        recall: how the objective of that name is measured.
        measure: how objectives and budgets of a device are measured.
        profile: the table of the device that they are predicted from. The search measures it when it begins,
            if they are among its objectives and budgets.
        workers: processes; None for `workers_per_gpu`, or else for as many as the cores can serve with
            `proxy.threads` (None: 1) each.
        workers_per_gpu: processes that share each GPU. Local ones: in place of `workers`; with the engine
            ray, `workers` tasks at once reserve their share of a GPU each.
        timeout: seconds after which a candidate that has not come back is killed and has failed; None for no
            limit. Who exceeds it depends on the machine.
        engine: "local" processes, or "ray".

    Raises:
        ValueError: a value that no search can have, in one line.
    """

    objectives: tuple[str, ...] = ("quality", "size")
    budgets: Mapping[str, float] = field(default_factory=dict)
    population: int = 16
    generations: int = 18
    algorithm: str = "nsga2"
    survival: str = "crowding"
    depth: int = 24
    pool: Pool = field(default_factory=Pool)
    seed: int = 0
    mutation_rate: float = 0.1
    crossover_rate: float = 0.9
    tournament: int = 2
    attempts: int = 20
    seed_baselines: bool = False
    references: bool = True
    rungs: tuple[float, ...] = ()
    rung_rivals: str = "survivors"
    rung_confidence: float = 0.95
    keep_weights: bool = True
    model: ModelConfig = field(default_factory=lambda: ModelConfig(width=128, head_dim=32))
    proxy: ProxySettings = field(default_factory=ProxySettings)
    data: DataSettings = field(default_factory=DataSettings)
    recall: RecallSettings = field(default_factory=RecallSettings)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    profile: ProfileTable | None = None
    workers: int | None = None
    workers_per_gpu: int | None = None
    timeout: float | None = None
    engine: str = "local"

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", require_objectives(self.objectives))
        object.__setattr__(self, "budgets", require_budgets(self.budgets))
        require_algorithm(self.algorithm)
        if self.survival not in SURVIVALS:
            raise ValueError(f"survival is {self.survival!r}, takes {' or '.join(SURVIVALS)}")
        if self.survival != "crowding" and self.algorithm != "nsga2":
            raise ValueError(f"survival {self.survival!r} is of the algorithm nsga2, not of {self.algorithm}")
        _require_integer("population", self.population, at_least=2, at_most=10_000)
        _require_integer("generations", self.generations, at_least=1, at_most=1_000_000)
        _require_integer("depth", self.depth, at_least=1, at_most=1_000)
        _require_integer("seed", self.seed, at_least=0, at_most=2**63 - 1)
        _require_integer("attempts", self.attempts, at_least=1, at_most=1_000)
        _require_integer("tournament", self.tournament, at_least=1, at_most=self.population)
        _require_number("mutation_rate", self.mutation_rate, above=None, at_most=1.0)
        _require_number("crossover_rate", self.crossover_rate, above=None, at_most=1.0)
        self._check_rungs()
        for name in ("workers", "workers_per_gpu"):
            if getattr(self, name) is not None:
                _require_integer(name, getattr(self, name), at_least=1, at_most=10_000)
        if self.engine == "local" and None not in (self.workers, self.workers_per_gpu):
            raise ValueError("workers and workers_per_gpu are both given, the engine local takes one of them")
        if self.workers_per_gpu is not None and self.proxy.device == "cpu":
            raise ValueError("workers_per_gpu is given, and the device of the proxy is the CPU")
        if self.timeout is not None:
            _require_number("timeout", self.timeout, above=0.0, at_most=1e9)
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}, takes {' or '.join(ENGINES)}")
        for name in ("seed_baselines", "references", "keep_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, takes true or false")

    def _check_rungs(self) -> None:
        if not isinstance(self.rungs, (list, tuple)):
            raise ValueError(f"rungs are {self.rungs!r}, take parts of a training like 0.25,0.5")
        for part in self.rungs:
            if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part < 1:
                raise ValueError(f"rungs has {part!r}, takes parts of a training between 0 and 1")
        if len(set(self.rungs)) < len(self.rungs):
            raise ValueError(f"rungs are {', '.join(map(str, self.rungs))}, take each part once")
        object.__setattr__(self, "rungs", tuple(sorted(self.rungs)))
        if self.rung_rivals not in RIVALS:
            raise ValueError(f"rung_rivals is {self.rung_rivals!r}, takes {' or '.join(RIVALS)}")
        _require_number("rung_confidence", self.rung_confidence, above=0.5, at_most=0.999999)
        if not self.rungs:
            return
        if "quality" not in self.objectives:
            raise ValueError("rungs foretell the objective quality, which is not searched for")
        late = [item.name for item in self.measured() if item.trained and item.name != "quality"]
        if late:
            raise ValueError(f"rungs take objectives that are known before a training ends, not {late[0]}")

    @property
    def planned(self) -> int:
        """Candidates that the generations ask for (references not counted)."""
        return self.population * self.generations

    def measured(self) -> tuple[Objective, ...]:
        """What is measured of every candidate: what is searched for, what has a budget, and what costs
        nothing."""
        return measured([*self.objectives, *self.budgets])

    def of_device(self) -> list[str]:
        """Names of the objectives and budgets that a device's table is needed for."""
        return [item.name for item in self.measured() if item.device]

    def worker_count(self) -> int:
        """`workers`, or as many as the cores that this process may use can serve."""
        if self.workers is not None:
            return self.workers
        # sched_getaffinity knows of containers and taskset; macOS does not have it.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // max(1, self.proxy.threads or 1))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` turns it back."""
        values = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in _RECORDED_WHERE_CHOSEN or getattr(self, item.name) != item.default
        }
        if "rungs" in values:
            values["rungs"] = list(self.rungs)
        return {
            **values,
            "objectives": list(self.objectives),
            "budgets": dict(self.budgets),
            "pool": self.pool.to_json(),
            "model": self.model.to_json(),
            "proxy": self.proxy.to_json(),
            "data": {**dataclasses.asdict(self.data), "source": list(self.data.source)},
            "recall": dataclasses.asdict(self.recall),
            "measure": self.measure.to_json(),
            "profile": None if self.profile is None else self.profile.to_json(),
        }

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run finds: all but `EXECUTION`."""
        return {name: value for name, value in self.to_json().items() if name not in EXECUTION}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SearchSettings:
        """The settings that `to_json` wrote, or some of them (the others are the defaults).

        Raises:
            ValueError: a name that is no setting, or a wrong value; one line.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"settings are {type(value).__name__}, take an object")
        names = [item.name for item in dataclasses.fields(cls)]
        for name in value:
            if name not in names:
                raise ValueError(f"setting {name!r} is unknown, takes {', '.join(names)}")
        nested: dict[str, Callable[[Any], Any]] = {
            "pool": Pool.from_json,
            "model": ModelConfig.from_json,
            "proxy": ProxySettings.from_json,
            "data": _data,
            "recall": lambda value: RecallSettings(**value),
            "measure": MeasureSettings.from_json,
            "profile": lambda value: None if value is None else ProfileTable.from_json(value),
        }
        try:
            parts: dict[str, Any] = {
                name: nested[name](item) if name in nested else item for name, item in value.items()
            }
            return cls(**parts)
        except (TypeError, KeyError) as error:
            raise ValueError(f"settings: {str(error).splitlines()[0]}") from error


def _data(value: Mapping[str, Any]) -> DataSettings:
    return DataSettings(**{**value, "source": tuple(value.get("source", ()))})


def _require_integer(name: str, value: object, *, at_least: int, at_most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        raise ValueError(f"{name} is {value!r}, takes an integer from {at_least} to {at_most}")


def _require_number(name: str, value: object, *, above: float | None, at_most: float) -> None:
    takes = f"a number {'from 0' if above is None else f'above {above:g}'} to {at_most:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}, takes {takes}")
    if not (value >= 0.0 if above is None else value > above) or value > at_most:
        raise ValueError(f"{name} is {value!r}, takes {takes}")


# Sizes by purpose: minutes on two cores; half an hour on two; the paper's own, which needs accelerators.
# The small ones are our own: for the same time, many small steps at a learning rate of about 0.5 / width
# brought candidates further, and further apart, than a few large ones. Steps and schedule are those that
# benchmarks/results/fidelity.md found best for their time.
_SMALL = ProxySettings(
    steps=80,
    batch_size=2,
    length=128,
    learning_rate=8e-3,
    warmup_steps=8,
    threads=1,
    schedule="constant",
)

PRESETS: dict[str, SearchSettings] = {
    "demo": SearchSettings(
        population=8,
        generations=5,
        model=ModelConfig(width=64, head_dim=16),
        proxy=_SMALL,
    ),
    "laptop": SearchSettings(
        model=ModelConfig(width=128, head_dim=32),
        proxy=replace(_SMALL, learning_rate=4e-3),
    ),
    "paper": SearchSettings(
        model=ModelConfig(width=768, head_dim=64),
        # 0.25M tokens a step, 1.3B tokens a candidate.
        proxy=ProxySettings(
            steps=4960,
            batch_size=64,
            length=4096,
            learning_rate=8e-4,
            warmup_steps=200,
            validation_batches=64,
            evaluate_every=500,
        ),
    ),
}


def preset(name: str, **changes: Any) -> SearchSettings:
    """The preset of this name, with some settings replaced.

    Raises:
        ValueError: no such preset or setting, or a wrong value; one line.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}, takes {', '.join(PRESETS)}")
    names = {item.name for item in dataclasses.fields(SearchSettings)}
    for change in changes:
        if change not in names:
            raise ValueError(f"setting {change!r} is unknown, takes {', '.join(sorted(names))}")
    return replace(PRESETS[name], **changes)
