"""The search, as the paper draws it: assess, select, recombine and mutate and repair, and again.

    evolve      the loop over generations
    number      proposals get ids and origins, in the order of asking
    assess      each is looked up in the record, or trained by a worker and recorded
    evaluated   what a worker answers, as an evaluation
    conclude    the survivors are recorded, weights that nobody needs are deleted

The algorithm (star.search.algorithms; NSGA-II by default) holds the population; `Edges` are the places where
the search touches the world.

There is no saved state. Everything follows from the settings and the evaluations, so a run is resumed by
running it again: what is in the record is not trained, and the loop arrives where it was killed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from star.genome import Genome
from star.search.algorithms import begin
from star.search.budgets import judged
from star.search.directory import RunDirectory
from star.search.errors import RunDamaged
from star.search.events import (
    CandidateFinished,
    GenerationFinished,
    GenerationStarted,
    Listener,
    RunFinished,
)
from star.search.front import front, hypervolume
from star.search.layouts import BASELINES
from star.search.objectives import objective_vector
from star.search.results import failure
from star.search.rungs import Bars, bars
from star.search.settings import SearchSettings
from star.search.store import Evaluation, RunStore
from star.search.workers import Engine, Task

__all__ = ["Edges", "evolve"]


@dataclass(frozen=True)
class Edges:
    """Where a search touches the world: its record, its files, its workers, and whoever listens."""

    store: RunStore
    directory: RunDirectory
    engine: Engine
    listener: Listener


@dataclass(frozen=True)
class Memory:
    """What the record held when this process began, and what the search has asked for until now.

    `record` may be ahead of `known`: those candidates are looked up when the loop comes to ask for them.
    """

    record: Mapping[str, Evaluation]
    populations: Sequence[tuple[str, ...]]
    known: dict[str, Evaluation] = field(default_factory=dict)

    @classmethod
    def of(cls, store: RunStore) -> Memory:
        return cls({item.key: item for item in store.evaluations()}, store.populations())

    def judged(self, budgets: Mapping[str, float]) -> dict[str, Evaluation]:
        """What the search has asked for, as selection sees it: over a budget is failed."""
        return {item.key: item for item in judged(self.known.values(), budgets)}

    def replays(self, generation: int) -> bool:
        """Whether the record holds the generation's survivors."""
        return generation < len(self.populations)


@dataclass(frozen=True)
class Request:
    """A candidate that the search asks for. `generation` is None for one that only serves as a reference."""

    id: int
    genome: Genome
    generation: int | None
    origin: str


@dataclass
class Clock:
    """Seconds that a generation spends beside training, by what they go to."""

    began: float = field(default_factory=time.perf_counter)
    spent: dict[str, float] = field(default_factory=lambda: {"vary": 0.0, "select": 0.0, "store": 0.0})

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


def evolve(settings: SearchSettings, edges: Edges) -> RunFinished:
    """Run all generations, or what the record does not hold of them."""
    began = time.perf_counter()
    memory = Memory.of(edges.store)
    algorithm = begin(settings)
    exhausted = False
    survivors: tuple[str, ...] = ()
    for generation in range(settings.generations):
        clock = Clock()
        with clock.timing("vary"):
            proposals = algorithm.propose()
        if not proposals:
            exhausted = True
            break
        requests = number(proposals, generation, memory.known, settings, algorithm.later_origin)
        passing = bars(settings, memory.known, survivors)
        for evaluation in assess(requests, generation, passing, memory, settings, edges, clock):
            memory.known[evaluation.key] = evaluation
        with clock.timing("select"):
            survivors = tuple(genome.key for genome in algorithm.select(memory.judged(settings.budgets)))
        conclude(generation, survivors, memory, settings, edges, clock)
    _require_nothing_else(memory, settings)
    return _finish(memory.known, settings, edges, time.perf_counter() - began, exhausted)


def number(
    proposals: Sequence[Genome],
    generation: int,
    known: Mapping[str, Evaluation],
    settings: SearchSettings,
    later_origin: str = "offspring",
) -> list[Request]:
    """Requests for what has not been asked for before; in generation 0, the references come first."""
    layouts = {name: layout(settings.depth) for name, layout in BASELINES.items()}
    names = {genome.key: name for name, genome in layouts.items()}
    proposed = {genome.key for genome in proposals}
    wanted: dict[str, tuple[Genome, int | None, str]] = {}
    if generation == 0 and settings.references:
        for name, genome in layouts.items():
            member = 0 if genome.key in proposed else None
            wanted.setdefault(genome.key, (genome, member, f"reference:{name}"))
    for genome in proposals:
        if generation > 0:
            origin = later_origin
        elif settings.seed_baselines and genome.key in names:
            origin = f"baseline:{names[genome.key]}"
        else:
            origin = "random"
        if genome.key not in known:
            wanted.setdefault(genome.key, (genome, generation, origin))
    return [Request(id, *parts) for id, parts in enumerate(wanted.values(), start=len(known))]


def assess(
    requests: Sequence[Request],
    generation: int,
    passing: Bars | None,
    memory: Memory,
    settings: SearchSettings,
    edges: Edges,
    clock: Clock,
) -> Iterator[Evaluation]:
    """The evaluation of each request: first those in the record, then the others as they are trained, to
    their end or to where they do not pass."""
    new: dict[int, Request] = {}
    recorded_ids = {evaluation.id: evaluation for evaluation in memory.record.values()}
    for request in requests:
        stored = memory.record.get(request.genome.key) or recorded_ids.get(request.id)
        if stored is None:
            new[request.id] = request
        else:
            _require_same(stored, request)
            yield stored
    edges.listener(GenerationStarted(generation, len(new)))
    if not new:
        return
    best = front(judged(memory.known.values(), settings.budgets), settings.objectives)
    finished = len(memory.known)
    tasks = [_task(request, passing, settings, edges) for request in new.values()]
    for id, result in edges.engine.evaluate(tasks):
        evaluation = evaluated(new[id], result, [*settings.objectives, *settings.budgets])
        with clock.timing("store"):
            edges.store.append_evaluation(evaluation)
        with clock.timing("select"):
            best = front([*best, *judged([evaluation], settings.budgets)], settings.objectives)
        finished += 1
        ids = tuple(member.id for member in best)
        edges.listener(CandidateFinished(evaluation, ids, finished, planned(settings)))
        yield evaluation


def evaluated(request: Request, result: Mapping[str, Any], objectives: Sequence[str]) -> Evaluation:
    """A worker's plain result as an evaluation; one that lacks an objective of the search has failed."""
    if result["status"] != "failed":
        try:
            objective_vector(result["objectives"], objectives)
        except ValueError as error:
            result = {**result, **failure(str(error)), "curve": result["curve"]}
    return Evaluation(
        id=request.id,
        key=request.genome.key,
        genome=str(request.genome),
        generation=request.generation,
        origin=request.origin,
        status=result["status"],
        reason=result["reason"],
        objectives=result["objectives"],
        curve=tuple(result["curve"]),
        seconds=result.get("seconds", 0.0),
        finished_at=time.time(),
    )


def planned(settings: SearchSettings) -> int:
    """Evaluations that a run makes if no proposal repeats another."""
    return settings.planned + (len(BASELINES) if settings.references else 0)


def _task(request: Request, passing: Bars | None, settings: SearchSettings, edges: Edges) -> Task:
    # The canonical genome is trained: what a model is must not depend on how it was spelled.
    path = edges.directory.weights_of(request.id).resolve() if settings.keep_weights else None
    return Task(
        id=request.id,
        genome=request.genome.key,
        weights=None if path is None else str(path),
        # References are what all others are compared with.
        bars=None if passing is None or request.generation is None else passing.to_json(),
    )


def conclude(
    generation: int,
    survivors: tuple[str, ...],
    memory: Memory,
    settings: SearchSettings,
    edges: Edges,
    clock: Clock,
) -> None:
    """Record the survivors (or see that they are the recorded ones), and keep only useful weights."""
    replayed = memory.replays(generation)
    if replayed and memory.populations[generation] != survivors:
        raise RunDamaged(
            f"population {generation} of the record is not what its settings and evaluations lead to: "
            "the record is damaged, or another version of numpy or pymoo draws differently"
        )
    with clock.timing("select"):
        within = list(memory.judged(settings.budgets).values())
        best = front(within, settings.objectives)
        volume = hypervolume(within, settings.objectives, generation)
    with clock.timing("store"):
        if not replayed:
            edges.store.append_population(generation, survivors)
        edges.directory.keep_weights(_useful({**memory.record, **memory.known}.values(), settings))
    if not replayed:
        seconds = {f"{name}_seconds": value for name, value in clock.spent.items()}
        edges.store.append_event("generation", generation=generation, seconds=clock.seconds, **seconds)
    edges.listener(
        GenerationFinished(
            generation=generation,
            population=survivors,
            front=tuple(member.id for member in best),
            hypervolume=volume,
            seconds=clock.seconds,
            overhead_seconds=sum(clock.spent.values()),
            replayed=replayed,
        )
    )


def _useful(evaluations: Iterable[Evaluation], settings: SearchSettings) -> set[int]:
    """Ids of the candidates whose weights are worth their place: the front's and the references'. The
    evaluations are all there are, later generations of a replayed record among them."""
    everything = judged(evaluations, settings.budgets)
    references = {item.id for item in everything if item.origin.startswith("reference:")}
    return references | {member.id for member in front(everything, settings.objectives)}


def _finish(
    known: Mapping[str, Evaluation],
    settings: SearchSettings,
    edges: Edges,
    seconds: float,
    exhausted: bool,
) -> RunFinished:
    within = judged(known.values(), settings.budgets)
    best = tuple(member.id for member in front(within, settings.objectives))
    failed = sum(evaluation.failed for evaluation in known.values())
    stopped = sum(evaluation.stopped for evaluation in known.values())
    edges.store.append_event(
        "finished", evaluations=len(known), failed=failed, stopped=stopped, exhausted=exhausted
    )
    event = RunFinished(edges.directory.path, len(known), failed, stopped, best, seconds, exhausted)
    edges.listener(event)
    return event


def _require_same(stored: Evaluation, request: Request) -> None:
    expected = (request.id, str(request.genome), request.generation, request.origin)
    if (stored.id, stored.genome, stored.generation, stored.origin) != expected:
        raise RunDamaged(
            f"evaluation {stored.id} of the record is not what its settings lead to: the record is damaged, "
            "or another version of numpy or pymoo draws differently"
        )


def _require_nothing_else(memory: Memory, settings: SearchSettings) -> None:
    foreign = sorted(item.id for key, item in memory.record.items() if key not in memory.known)
    if foreign:
        raise RunDamaged(f"evaluation {foreign[0]} of the record belongs to no generation of these settings")
    if memory.replays(settings.generations):
        raise RunDamaged(
            f"the record holds {len(memory.populations)} generations, its settings {settings.generations}"
        )
