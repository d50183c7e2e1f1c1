"""Small run directories made through the record itself, without training anything."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from star.config import ModelConfig
from star.genome import Genome
from star.search.directory import RunDirectory
from star.search.evolution import BASELINES
from star.search.run import EVALUATOR
from star.search.settings import SearchSettings, preset
from star.search.store import Evaluation, RunStore

DEPTH = 6
POPULATION = 4
GENERATIONS = 3


def small_settings(**changes: Any) -> SearchSettings:
    """A search of a few small models."""
    base = preset("demo", depth=DEPTH, population=POPULATION, generations=GENERATIONS, workers=1)
    return replace(base, model=ModelConfig(width=16, head_dim=4), **changes)


def measured(genome: Genome) -> dict[str, float]:
    """Objectives that depend on the genome alone and disagree with each other."""
    attentions = sum(gene.liv_class <= 4 for gene in genome)
    noise = hashlib.sha256(genome.key.encode()).digest()[0] / 255
    return {
        "quality": 3.0 - attentions / genome.depth + 0.3 * noise,
        "size": 1000 * genome.depth + 512 * attentions,
        "cache": 4096 * attentions,
        "flops": 1_000_000 + 3 * attentions,
    }


def evaluation(id: int, genome: Genome, generation: int | None, **changes: Any) -> Evaluation:
    """A successful candidate, or what `changes` make of it."""
    made = Evaluation(
        id=id,
        key=genome.key,
        genome=str(genome),
        generation=generation,
        origin="random" if generation == 0 else "offspring",
        status="ok",
        reason=None,
        objectives=measured(genome),
        curve=(*([step, 8.0 - step / 10 - id / 50, None] for step in range(1, 20)), [20, 5.9, 6.0]),
        seconds=1.5,
        finished_at=1.6e9 + id,
    )
    return replace(made, **changes)


def failed(
    id: int, genome: Genome, generation: int | None, reason: str = "diverged: loss is nan"
) -> Evaluation:
    return evaluation(id, genome, generation, status="failed", reason=reason, objectives={})


def record(
    directory: Path,
    evaluations: Sequence[Evaluation],
    *,
    settings: SearchSettings | None = None,
    populations: Sequence[Sequence[str]] = (),
    finished: bool = False,
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run directory with exactly these rows."""
    settings = settings or small_settings()
    run = RunDirectory(directory)
    run.create()
    facts = {
        "settings": settings.identity(),
        "execution": {"workers": 1, "engine": "local"},
        "evaluator": EVALUATOR,
        "data": data or {"name": "some text", "content_hash": "ab" * 32, "key": "cd" * 32, "vocab_size": 256},
        "versions": {"python": "3.11", "torch": "2.13"},
    }
    with RunStore.create(run.database, facts) as store:
        run.write_config(settings.to_json())
        store.append_event("session", process=1, stored=0, workers=1)
        for item in evaluations:
            store.append_evaluation(item)
        for generation, keys in enumerate(populations):
            store.append_population(generation, tuple(keys))
            store.append_event(
                "generation",
                generation=generation,
                seconds=10.0,
                vary_seconds=0.01,
                select_seconds=0.02,
                store_seconds=0.01,
            )
        if finished:
            store.append_event("finished", evaluations=len(evaluations), failed=0, exhausted=False)
    return directory


def genomes(count: int, depth: int = DEPTH) -> list[Genome]:
    """Different random genomes, the same every time."""
    rng = np.random.default_rng(0)
    found: dict[str, Genome] = {}
    while len(found) < count:
        genome = Genome.random(depth, rng)
        found.setdefault(genome.key, genome)
    return list(found.values())


def finished_run(directory: Path, **changes: Any) -> Path:
    """Three generations of four, references, one failure."""
    settings = small_settings(**changes)
    rows = [
        evaluation(id, layout(settings.depth), None, origin=f"reference:{name}")
        for id, (name, layout) in enumerate(BASELINES.items())
    ]
    members = genomes(POPULATION * GENERATIONS, settings.depth)
    for place, genome in enumerate(members):
        id, generation = len(BASELINES) + place, place // POPULATION
        make = failed if place == 5 else evaluation
        rows.append(make(id, genome, generation))
    populations = [
        [item.key for item in rows if item.generation == generation and item.ok]
        for generation in range(GENERATIONS)
    ]
    return record(directory, rows, settings=settings, populations=populations, finished=True)
