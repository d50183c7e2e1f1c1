"""Genomes of a table trained once more with further seeds, under the settings of their rows.

The table itself is the record: every training is in the file as soon as it is finished, and what the file
holds is not done again. So the same call goes on wherever it was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from star.comparison.table import Row, extend, main_conditions, without_absurd_values
from star.config import ModelConfig
from star.fidelity.record import Retraining, identity
from star.fidelity.run import EVALUATOR, Event, RetrainingFinished, RetrainingStarted
from star.fidelity.sample import spread
from star.proxy import ProxySettings
from star.search.corpus import CorpusRecord, open_corpus_of
from star.search.errors import RunError
from star.search.events import Event as SearchEvent
from star.search.events import WorkerLost
from star.search.gpus import place, visible_gpus
from star.search.objectives import find
from star.search.settings import DataSettings, RecallSettings, SearchSettings
from star.search.store import RunStore
from star.search.workers import LocalEngine, Task

__all__ = ["Plan", "plan", "text_of_runs", "train_again"]


@dataclass(frozen=True)
class Job:
    """One training: `source` is the row of the genome that was trained first."""

    source: Row
    seed: int


@dataclass(frozen=True)
class Plan:
    """What is to be trained.

    Attributes:
        settings: of the trainings, their seeds apart.
        corpus_key: of the text that the rows were trained on.
        jobs: all of them, seed by seed, so that what is stopped half way has compared all genomes with fewer.
        missing: those that the table does not hold yet.
    """

    settings: SearchSettings
    corpus_key: str
    jobs: tuple[Job, ...]
    missing: tuple[Job, ...]

    @property
    def genomes(self) -> set[str]:
        return {job.source.genome for job in self.jobs}


def plan(
    rows: Sequence[Row],
    count: int,
    seeds: int,
    *,
    data: DataSettings | None = None,
    workers: int | None = None,
) -> Plan:
    """`count` genomes of the conditions that most rows have, spread over the ranks of quality, each with
    `seeds` seeds after its lowest one.

    Nothing is random, and quality is that of the lowest seed: a table that has grown by a part of the plan
    gives the same plan, and one of more genomes or seeds takes over what is there.

    Args:
        data: the text; None for the one that needs no download.
        workers: processes; None for one a core.

    Raises:
        ValueError: the table has not so many trained genomes, or settings that can not be read.
    """
    if not rows:
        raise ValueError("the table is empty: add runs to it with: star table --extend FILE RUN")
    conditions = main_conditions(rows)
    rows = [row for row in rows if row.conditions == conditions]
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row.seed, row.genome)):
        if row.ok and "quality" in row.objectives:
            first.setdefault(row.genome, row)
    if not 2 <= count <= len(first):
        raise ValueError(f"--again is {count}, takes 2 to {len(first)}, the trained genomes of the table")
    ranked = sorted(first.values(), key=lambda row: (row.objectives["quality"], row.genome))
    chosen = [ranked[place] for place in spread(len(ranked))[:count]]
    done = {(row.genome, row.seed) for row in rows}
    jobs = tuple(Job(row, row.seed + turn) for turn in range(1, seeds + 1) for row in chosen)
    missing = tuple(job for job in jobs if (job.source.genome, job.seed) not in done)
    settings = _settings(chosen, data or DataSettings(), workers)
    return Plan(settings, str(ranked[0].settings.get("corpus")), jobs, missing)


def _settings(chosen: Sequence[Row], data: DataSettings, workers: int | None) -> SearchSettings:
    """A search for what the rows have measured; a device's numbers follow from the genome and stay."""
    conditions = chosen[0].settings
    names = {name for row in chosen for name in row.objectives}
    trained = [name for name in sorted(names) if (known := find(name)) is not None and not known.device]
    try:
        return SearchSettings(
            objectives=tuple(trained),
            model=ModelConfig.from_json(conditions["model"]),
            proxy=ProxySettings.from_json(conditions["proxy"]),
            recall=RecallSettings(**conditions["recall"]),
            data=data,
            workers=workers,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the table's settings can not be read: {str(error).splitlines()[0]}") from error


def text_of_runs(runs: Sequence[Path], rows: Sequence[Row]) -> DataSettings:
    """The text of the first of the runs that have that of the rows' main conditions, or else the one that
    needs no download.

    Raises:
        RunError, RunDamaged: as `star.search.store.RunStore.open`.
    """
    main = main_conditions(rows) if rows else ""
    keys = {row.settings.get("corpus") for row in rows if row.conditions == main}
    for run in runs:
        with RunStore.open(run) as store:
            data = store.facts().get("data")
            if isinstance(data, dict) and data.get("key") in keys:
                return store.settings().data
    return DataSettings()


def train_again(
    path: Path,
    plan: Plan,
    rows: Sequence[Row],
    *,
    evaluator: str = EVALUATOR,
    open_corpus: Callable[[SearchSettings], CorpusRecord] = open_corpus_of,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Row]:
    """Train what is missing, and add each training to the table at once.

    Args:
        path: of the table.
        plan: of its rows.
        rows: of the table.
        evaluator: "package.module:function", imported by the workers.
        open_corpus: opens the text, which must be that of the rows.
        on_event: called with each event; a candidate's id is the place of its genome among the plan's.

    Returns:
        all rows.

    Raises:
        RunError: the text is not that of the rows, or nothing can be trained.
        OSError: the table can not be written; what it holds stays.
    """
    number = {job.source.genome: place for place, job in enumerate(plan.jobs[: len(plan.genomes)])}
    placement = place(plan.settings, visible_gpus)
    corpus = _own_corpus(open_corpus, plan) if plan.missing else None
    on_event(
        RetrainingStarted(
            planned=len(plan.jobs),
            stored=len(plan.jobs) - len(plan.missing),
            candidates=len(number),
            workers=placement.workers,
            seconds=sum(job.source.seconds for job in plan.missing),
        )
    )
    every = list(rows)
    if corpus is None:
        return every
    seeds = sorted({job.seed for job in plan.missing})
    # The evaluator takes a seed's place from the remainder of the task's number.
    jobs = {turn * len(seeds) + seeds.index(job.seed): job for turn, job in enumerate(plan.missing)}

    def lost(event: SearchEvent) -> None:
        if isinstance(event, WorkerLost):
            on_event(replace(event, candidate_id=number[jobs[event.candidate_id].source.genome]))

    engine = LocalEngine(
        evaluator,
        {**plan.settings.to_json(), "corpus": asdict(corpus), "seeds": seeds},
        directory=path.parent,
        workers=min(placement.workers, len(jobs)),
        threads=plan.settings.proxy.threads or 1,
        gpus=placement.gpus,
        listener=lost,
    )
    finished = len(plan.jobs) - len(jobs)
    with closing(engine):
        for id, result in engine.evaluate([Task(id, job.source.genome, None) for id, job in jobs.items()]):
            job = jobs[id]
            every, _ = extend(path, _rows_of(job, result, every))
            finished += 1
            done = _retraining(plan, job, result)
            event = RetrainingFinished(number[job.source.genome], job.seed, done, finished, len(plan.jobs))
            on_event(event)
    return every


def _own_corpus(open_corpus: Callable[[SearchSettings], CorpusRecord], plan: Plan) -> CorpusRecord:
    corpus = open_corpus(plan.settings)
    if corpus.key != plan.corpus_key:
        raise RunError(
            f"the text {corpus.name!r} is not the one that the table's genomes were trained on: name a run "
            "of that text too (star table --extend FILE --again N RUN)"
        )
    return corpus


def _rows_of(job: Job, result: Mapping[str, Any], every: Sequence[Row]) -> list[Row]:
    """A row for each device that the first training has one of, with what was predicted for it."""
    source = job.source
    rows = []
    for twin in every:
        if twin.training != source.training:
            continue
        predicted = {
            name: value
            for name, value in twin.objectives.items()
            if (known := find(name)) is not None and known.device
        }
        ok = result["status"] == "ok"
        row = Row(
            genome=source.genome,
            conditions=source.conditions,
            seed=job.seed,
            origin=source.origin,
            status=result["status"],
            reason=result["reason"] or "",
            seconds=round(result.get("seconds", 0.0), 3),
            objectives={**result["objectives"], **predicted} if ok else {},
            curve=tuple(result["curve"]),
            settings=source.settings,
            device=twin.device,
        )
        rows.append(without_absurd_values(row))
    return rows


def _retraining(plan: Plan, job: Job, result: Mapping[str, Any]) -> Retraining:
    """What the progress shows."""
    quality = result["objectives"].get("quality") if result["status"] == "ok" else None
    return Retraining(
        genome=job.source.genome,
        training=identity(replace(plan.settings.proxy, seed=job.seed)),
        status=result["status"],
        reason=result["reason"],
        quality=quality,
        seconds=result.get("seconds", 0.0),
    )
