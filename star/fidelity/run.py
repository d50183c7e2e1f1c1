"""Making the certificate of a run: the sample, the longer trainings that its record lacks, the file.

There is no saved state beside the record of trainings: killed at any instant, the same call goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from star.fidelity.certificate import Certificate, certify
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
    if not run.path.is_dir():
        raise RunError(f"run directory {run} does not exist")
    with run.locked():
        run.check()
        with RunStore.open(run.database) as store:
            search, facts, evaluations = store.settings(), store.facts(), store.evaluations()
        sample = _sample(run, evaluations, search, settings.sample)
        key = facts["data"].get("key") if isinstance(facts.get("data"), dict) else None
        record = TrainingRecord(run.path, search, str(key))
        trainings = settings.trainings(search.proxy)
        if workers is not None:
            search = replace(search, workers=workers)
        jobs = [
            _Job(place * len(trainings) + turn, member, training)
            for turn, training in enumerate(trainings)
            for place, member in enumerate(sample)
        ]
        _train(jobs, record, search, str(key), run, evaluator, open_corpus, on_event)
        done = {member.evaluation.key: _found(record, member, trainings) for member in sample}
        certificate = certify(sample, done, evaluations, settings, search)
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


def _train(
    jobs: Sequence[_Job],
    record: TrainingRecord,
    search: SearchSettings,
    key: str,
    run: RunDirectory,
    evaluator: str,
    open_corpus: Callable[[SearchSettings], CorpusRecord],
    on_event: Callable[[Event], None],
) -> None:
    """Do and record what the record lacks."""
    missing = {job.id: job for job in jobs if record.find(job.member.evaluation.key, job.training) is None}
    finished = len(jobs) - len(missing)
    corpus = _own_corpus(open_corpus, search, key) if missing else None
    longer = jobs[0].training.steps / search.proxy.steps
    seconds = sum(job.member.evaluation.seconds * longer for job in missing.values())
    sampled = len({job.member.evaluation.id for job in jobs})
    on_event(RetrainingStarted(len(jobs), finished, sampled, search.worker_count(), seconds))
    if corpus is None:
        return
    engine = LocalEngine(
        evaluator,
        _worker_settings(search, jobs, corpus),
        directory=run.path,
        workers=min(search.worker_count(), len(missing)),
        threads=search.proxy.threads or 1,
        listener=_losses(missing, on_event),
    )
    tasks = [Task(job.id, job.member.evaluation.key, None) for job in missing.values()]
    try:
        for id, result in engine.evaluate(tasks):
            job = missing[id]
            done = _retraining(job, result)
            record.append(done)
            finished += 1
            on_event(
                RetrainingFinished(job.member.evaluation.id, job.training.seed, done, finished, len(jobs))
            )
    finally:
        engine.close()


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


def _worker_settings(search: SearchSettings, jobs: Sequence[_Job], corpus: CorpusRecord) -> dict[str, Any]:
    """A search for quality alone, by the longer training."""
    longer = replace(search, objectives=("quality",), budgets={}, profile=None, proxy=jobs[0].training)
    seeds = list(dict.fromkeys(job.training.seed for job in jobs))
    return {**longer.to_json(), "corpus": asdict(corpus), "seeds": seeds}


def _retraining(job: _Job, result: dict[str, Any]) -> Retraining:
    """What a worker answered, as the record takes it."""
    quality = result["objectives"].get("quality") if result["status"] == "ok" else None
    if result["status"] == "ok" and quality is None:
        result = failure("the training measured no quality")
    return Retraining(
        genome=job.member.evaluation.key,
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
            on_event(replace(event, candidate_id=jobs[event.candidate_id].member.evaluation.id))

    return listen
