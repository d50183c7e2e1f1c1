"""Making the certificate of a run: the sample, the longer trainings that its record lacks, the file.

There is no saved state beside the record of trainings: killed at any instant, the same call goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from star.fidelity.certificate import Certificate, certify
from star.fidelity.device import prediction_errors
from star.fidelity.document import write_certificate
from star.fidelity.record import Retraining, TrainingRecord, identity
from star.fidelity.sample import Member, stratified_sample
from star.fidelity.settings import FidelitySettings
from star.proxy import ProxySettings
from star.search.corpus import CorpusRecord, open_corpus_of
from star.search.directory import RunDirectory
from star.search.errors import RunDamaged, RunError
from star.search.events import Event as SearchEvent
from star.search.events import Listener, WorkerLost
from star.search.front import candidates
from star.search.gpus import Placement, place, visible_gpus
from star.search.results import failure
from star.search.settings import SearchSettings
from star.search.store import Evaluation, RunStore
from star.search.workers import LocalEngine, Task

__all__ = ["Event", "RetrainingFinished", "RetrainingStarted", "make_certificate"]

EVALUATOR = "star.fidelity.retrain:retrain"


@dataclass(frozen=True)
class RetrainingStarted:
    """The trainings begin: `planned` in all, `stored` of them were recorded before.

    `seconds`: what the rest takes one after the other, going by how long the search took; divided by
    `workers` it is an estimate.
    """

    planned: int
    stored: int
    candidates: int
    workers: int
    seconds: float


@dataclass(frozen=True)
class RetrainingFinished:
    """A training of a candidate is in the record, which holds `finished` of those that are planned."""

    candidate_id: int
    seed: int
    done: Retraining
    finished: int
    planned: int


Event = RetrainingStarted | RetrainingFinished | WorkerLost


@dataclass(frozen=True)
class _Job:
    """A training that the certificate needs; `id` is the task's number (star.fidelity.retrain)."""

    id: int
    member: Member
    training: ProxySettings

    @property
    def candidate(self) -> int:
        """Its id in the run."""
        return self.member.evaluation.id

    @property
    def genome(self) -> str:
        return self.member.evaluation.key


def make_certificate(
    directory: Path | str,
    settings: FidelitySettings | None = None,
    *,
    workers: int | None = None,
    evaluator: str = EVALUATOR,
    open_corpus: Callable[[SearchSettings], CorpusRecord] = open_corpus_of,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Certificate:
    """Retrain a sample of a run's candidates and write fidelity.json into its directory.

    Trainings that the run's record of them holds (star.fidelity.record) are not done again. The run need not
    be finished; it is not changed, and no search goes on in its directory meanwhile.

    Args:
        directory: of the run.
        settings: of the certificate.
        workers: processes; None for as many as the search had.
        evaluator: "package.module:function", imported by the workers.
        open_corpus: opens the text, which must be the run's.
        on_event: called with each event.

    Raises:
        RunError: there is no run, too little in it, another text, or nothing can be trained.
        RunDamaged: a file of the directory is not what star writes.
        RunInUse: a search, or another certificate, is being made there.
        ValueError: settings out of range, or a text that can not be opened.
    """
    settings = settings or FidelitySettings()
    run = RunDirectory(directory)
    run.require()
    with run.locked():
        run.check()
        with RunStore.open(run.database) as store:
            search, facts, evaluations = store.settings(), store.facts(), store.evaluations()
            errors = prediction_errors(search, evaluations, store.events())
        key = str(facts["data"].get("key") if isinstance(facts.get("data"), dict) else None)
        sample = _sample(run, evaluations, search, settings.sample)
        trainings = settings.trainings(search.proxy)
        record = TrainingRecord(run.path, search, key)
        jobs = _jobs(sample, trainings)
        missing = {job.id: job for job in jobs if record.find(job.genome, job.training) is None}
        search = _here(search, workers)
        placement = place(search, visible_gpus)
        corpus = _own_corpus(open_corpus, search, key) if missing else None
        on_event(_started(jobs, missing, search, placement))
        if corpus is not None:
            given = _worker_settings(search, trainings, corpus)
            with closing(_engine(run, evaluator, given, search, placement, missing, on_event)) as engine:
                _retrain(engine, missing, record, len(jobs), on_event)
        done_of = {item.evaluation.key: _found(record, item, trainings) for item in sample}
        certificate = certify(sample, done_of, evaluations, settings, search, prediction_errors=errors)
        write_certificate(certificate, run.path)
    return certificate


def _sample(
    run: RunDirectory, evaluations: Sequence[Evaluation], search: SearchSettings, count: int
) -> list[Member]:
    trained = candidates(evaluations)
    for item in trained:
        if missing := {"quality", "size", *search.objectives} - set(item.objectives):
            raise RunDamaged(f"{run.database} is damaged: evaluation {item.id} has no {min(missing)}")
    if len(trained) < 2:
        raise RunError(
            f"{run} has {len(trained)} candidates that were trained; to compare their order with that of "
            "longer trainings takes at least 2"
        )
    return stratified_sample(evaluations, search, count)


def _here(search: SearchSettings, workers: int | None) -> SearchSettings:
    """The search with the workers that this machine is to have: those asked for, or its own if it had any
    here."""
    if workers is not None:
        return replace(search, engine="local", workers=workers, workers_per_gpu=None)
    if search.engine != "local":
        return replace(search, engine="local", workers=None, workers_per_gpu=None)
    return search


def _jobs(sample: Sequence[Member], trainings: Sequence[ProxySettings]) -> list[_Job]:
    """Seed by seed, so that what is stopped half way has compared all candidates with fewer seeds."""
    return [
        _Job(number * len(trainings) + turn, member, training)
        for turn, training in enumerate(trainings)
        for number, member in enumerate(sample)
    ]


def _started(
    jobs: Sequence[_Job], missing: Mapping[int, _Job], search: SearchSettings, placement: Placement
) -> RetrainingStarted:
    longer = jobs[0].training.steps / search.proxy.steps
    return RetrainingStarted(
        planned=len(jobs),
        stored=len(jobs) - len(missing),
        candidates=len({job.candidate for job in jobs}),
        workers=placement.workers,
        seconds=sum(job.member.evaluation.seconds * longer for job in missing.values()),
    )


def _own_corpus(
    open_corpus: Callable[[SearchSettings], CorpusRecord], search: SearchSettings, key: str
) -> CorpusRecord:
    """The run's text, which must be as it was."""
    corpus = open_corpus(search)
    if corpus.key != key:
        raise RunError(
            f"the text {corpus.name!r} is not what this run began with (content hash "
            f"{corpus.content_hash[:12]} now): bring it back as it was"
        )
    return corpus


def _worker_settings(
    search: SearchSettings, trainings: Sequence[ProxySettings], corpus: CorpusRecord
) -> dict[str, Any]:
    """A search for quality alone, by the longer trainings."""
    longer = replace(search, objectives=("quality",), budgets={}, rungs=(), profile=None, proxy=trainings[0])
    seeds = [training.seed for training in trainings]
    return {**longer.to_json(), "corpus": asdict(corpus), "seeds": seeds}


def _engine(
    run: RunDirectory,
    evaluator: str,
    given: Mapping[str, Any],
    search: SearchSettings,
    placement: Placement,
    missing: Mapping[int, _Job],
    on_event: Callable[[Event], None],
) -> LocalEngine:
    """Workers as the search's; a limit of time grows with the training."""
    times = given["proxy"]["steps"] / search.proxy.steps
    return LocalEngine(
        evaluator,
        given,
        directory=run.path,
        workers=min(placement.workers, len(missing)),
        threads=search.proxy.threads or 1,
        gpus=placement.gpus,
        timeout=None if search.timeout is None else search.timeout * times,
        listener=_losses(missing, on_event),
    )


def _retrain(
    engine: LocalEngine,
    missing: Mapping[int, _Job],
    record: TrainingRecord,
    planned: int,
    on_event: Callable[[Event], None],
) -> None:
    """Do what is missing, and record each training as it comes."""
    tasks = [Task(job.id, job.genome, None) for job in missing.values()]
    finished = planned - len(missing)
    for id, result in engine.evaluate(tasks):
        job, done = missing[id], _retraining(missing[id], result)
        record.append(done)
        finished += 1
        on_event(RetrainingFinished(job.candidate, job.training.seed, done, finished, planned))


def _retraining(job: _Job, result: dict[str, Any]) -> Retraining:
    """What a worker answered, as the record takes it."""
    quality = result["objectives"].get("quality") if result["status"] == "ok" else None
    if result["status"] == "ok" and quality is None:
        result = failure("the training measured no quality")
    return Retraining(
        genome=job.genome,
        training=identity(job.training),
        status=result["status"],
        reason=result["reason"],
        quality=quality,
        seconds=result.get("seconds", 0.0),
    )


def _found(
    record: TrainingRecord, member: Member, trainings: Sequence[ProxySettings]
) -> tuple[Retraining, ...]:
    found = (record.find(member.evaluation.key, training) for training in trainings)
    return tuple(done for done in found if done is not None)


def _losses(jobs: Mapping[int, _Job], on_event: Callable[[Event], None]) -> Listener:
    """Hands lost workers on, with the candidate in the task's place."""

    def listen(event: SearchEvent) -> None:
        if isinstance(event, WorkerLost):
            on_event(replace(event, candidate_id=jobs[event.candidate_id].candidate))

    return listen
