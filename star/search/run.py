"""Beginning and resuming a run: the folder, the lock, the record, the corpus, the workers; then the loop."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from star.measure.process import measure_in_process
from star.profile.cached import find_or_measure
from star.search.corpus import CorpusRecord, open_corpus_of
from star.search.device import FindTable, MeasureWhole, WholeModels, with_table
from star.search.directory import RunDirectory
from star.search.errors import RunError, SearchInterrupted
from star.search.events import CorpusOpened, Event, Listener, RunFinished, RunStarted, WorkerLost, ignore
from star.search.gpus import FindGpus, Placement, place, visible_gpus
from star.search.settings import EXECUTION, SearchSettings
from star.search.store import RunStore
from star.search.workers import Engine, LocalEngine

__all__ = ["EVALUATOR", "carried_out_otherwise", "resume", "search"]

EVALUATOR = "star.search.evaluate:evaluate"

OpenCorpus = Callable[[SearchSettings], CorpusRecord]


def search(
    settings: SearchSettings,
    directory: Path | str,
    *,
    evaluator: str = EVALUATOR,
    open_corpus: OpenCorpus = open_corpus_of,
    find_table: FindTable = find_or_measure,
    measure_whole: MeasureWhole = measure_in_process,
    find_gpus: FindGpus = visible_gpus,
    on_event: Listener = ignore,
) -> RunFinished:
    """Begin a search in a new run directory and carry it to its end.

    Args:
        settings: what to search.
        directory: made if it is missing; must not hold a run yet.
        evaluator: "package.module:function" (star.search.results says what it does), imported by the workers.
        open_corpus: makes the corpus and says which it is.
        find_table: finds or measures the table of the device, where it is needed (star.search.device).
        measure_whole: measures a whole model on the device.
        find_gpus: which GPUs local workers may share (star.search.gpus).
        on_event: called with each of star.search.events.

    Raises:
        RunError: the directory holds a run, or nothing can be evaluated.
        RunInUse: another search runs there.
        DiskFull: there is no room; the run can be resumed later.
        SearchInterrupted: Ctrl-C; the run can be resumed.
        ValueError: text or settings that can not be used.
    """
    run = RunDirectory(directory)
    run.create()
    with run.locked():
        run.check()
        if RunStore.begun(run.database):
            raise RunError(f"{run} already holds a search: continue it with: star resume {run}")
        if any(run.weights.iterdir()):  # a search deletes what it does not need there
            raise RunError(f"{run.weights} is not empty, and no search of this directory has filled it")
        placement = _placement(settings, find_gpus)
        settings = replace(settings, data=settings.data.absolute())
        corpus = open_corpus(settings)
        settings = replace(settings, model=replace(settings.model, vocab_size=corpus.vocab_size))
        settings = with_table(settings, on_event, find_table)
        facts = {
            "settings": settings.identity(),
            "execution": {name: getattr(settings, name) for name in EXECUTION},
            "evaluator": evaluator,
            "data": corpus.facts(),
            "versions": _versions(),
        }
        with RunStore.create(run.database, facts) as store:
            run.write_config(settings.to_json())
            return _carry_out(settings, placement, run, store, evaluator, corpus, measure_whole, on_event)


def resume(
    directory: Path | str,
    *,
    workers: int | None = None,
    workers_per_gpu: int | None = None,
    timeout: float | None = None,
    engine: str | None = None,
    evaluator: str = EVALUATOR,
    open_corpus: OpenCorpus = open_corpus_of,
    measure_whole: MeasureWhole = measure_in_process,
    find_gpus: FindGpus = visible_gpus,
    on_event: Listener = ignore,
) -> RunFinished:
    """Carry a run to its end that was killed, stopped, or ran out of disk. A finished run stays as it is.

    Args:
        directory: of the run. Its settings are the recorded ones.
        workers, workers_per_gpu, timeout, engine: other than the run began with; nothing else may change.
        evaluator, open_corpus, measure_whole, find_gpus, on_event: as for `search`; the evaluator is never
            taken from the directory.

    Raises:
        RunError: there is no run, or something that decides its results has changed.
        RunDamaged: the directory does not hold what a search writes.
        RunInUse, DiskFull, SearchInterrupted, ValueError: as for `search`.
    """
    run = RunDirectory(directory)
    run.require()
    with run.locked():
        run.check()
        with RunStore.open(run.database, write=True) as store:
            settings = store.settings()
            _agree(run, store, settings, evaluator)
            settings = carried_out_otherwise(
                settings, workers=workers, workers_per_gpu=workers_per_gpu, timeout=timeout, engine=engine
            )
            placement = _placement(settings, find_gpus)
            corpus = open_corpus(settings)
            _require_same_text(store.facts()["data"], corpus)
            return _carry_out(settings, placement, run, store, evaluator, corpus, measure_whole, on_event)


def _placement(settings: SearchSettings, find_gpus: FindGpus) -> Placement:
    """Of local workers; a cluster's are placed by Ray."""
    return place(settings, find_gpus) if settings.engine == "local" else Placement(settings.worker_count())


def carried_out_otherwise(
    settings: SearchSettings,
    *,
    workers: int | None = None,
    workers_per_gpu: int | None = None,
    timeout: float | None = None,
    engine: str | None = None,
) -> SearchSettings:
    """The settings of a search that is carried out in another way, where one is given."""
    changes: dict[str, Any] = {}
    given = {"workers": workers, "workers_per_gpu": workers_per_gpu}
    if any(number is not None for number in given.values()):
        local = (engine or settings.engine) == "local"  # which takes one of the two
        changes |= given if local else {name: number for name, number in given.items() if number is not None}
    if timeout is not None:
        changes["timeout"] = timeout
    if engine is not None:
        changes["engine"] = engine
    return replace(settings, **changes)


def _carry_out(
    settings: SearchSettings,
    placement: Placement,
    run: RunDirectory,
    store: RunStore,
    evaluator: str,
    corpus: CorpusRecord,
    measure_whole: MeasureWhole,
    on_event: Listener,
) -> RunFinished:
    """The loop between its edges: events also into the record, workers stopped whatever happens."""
    # Only here, since it needs pymoo, and refusals should not wait for it.
    from star.search.loop import Edges, evolve, planned

    def tell(event: Event) -> None:
        if isinstance(event, WorkerLost):
            store.append_event("worker_lost", **asdict(event))
        on_event(event)
        whole_models(event)

    if settings.engine == "local":  # as it turned out on this machine
        settings = replace(settings, workers=placement.workers, workers_per_gpu=None)
    whole_models = WholeModels(settings, store, on_event, measure_whole)
    stored = len(store.evaluations())
    store.append_event("session", process=os.getpid(), stored=stored, workers=settings.worker_count())
    tell(RunStarted(run.path, settings, stored, planned(settings)))
    tell(CorpusOpened(corpus.name, corpus.content_hash))
    run.keep_weights({evaluation.id for evaluation in store.evaluations()})
    given = {**settings.to_json(), "corpus": asdict(corpus)}
    try:
        with _engine(settings, placement, evaluator, given, run, tell) as engine:
            return evolve(settings, Edges(store, run, engine, tell))
    except KeyboardInterrupt as interrupt:
        store.append_event("interrupted")
        raise SearchInterrupted(run.path) from interrupt


@contextmanager
def _engine(
    settings: SearchSettings,
    placement: Placement,
    evaluator: str,
    given: Mapping[str, Any],
    run: RunDirectory,
    listener: Listener,
) -> Iterator[Engine]:
    engine: Engine
    common: dict[str, Any] = {
        "directory": run.path,
        "workers": settings.worker_count(),
        "threads": settings.proxy.threads or 1,
        "timeout": settings.timeout,
        "listener": listener,
    }
    if settings.engine == "ray":
        from star.search.ray_engine import RayEngine

        engine = RayEngine(evaluator, given, workers_per_gpu=settings.workers_per_gpu, **common)
    else:
        engine = LocalEngine(evaluator, given, gpus=placement.gpus, **common)
    try:
        yield engine
    finally:
        engine.close()


def _agree(run: RunDirectory, store: RunStore, settings: SearchSettings, evaluator: str) -> None:
    """config.json, the record and the caller must mean the same search."""
    recorded = store.facts()["evaluator"]
    if recorded != evaluator:
        raise RunError(f"{run} was begun with the evaluator {recorded!r}, not {evaluator!r}")
    config = run.read_config()
    if config is None:  # killed between the record and the file
        run.write_config(settings.to_json())
        return
    plain = {name: value for name, value in config.items() if name not in EXECUTION}
    difference = _first_difference(plain, settings.identity())
    if difference:
        raise RunError(
            f"{run.config} and run.db disagree on {difference}: "
            "settings of a run can not change; begin a new search for others"
        )


def _require_same_text(recorded: object, corpus: CorpusRecord) -> None:
    facts = corpus.facts()
    if not isinstance(recorded, dict) or recorded.get("key") != facts["key"]:
        then = str(recorded.get("content_hash"))[:12] if isinstance(recorded, dict) else "unknown"
        raise RunError(
            f"the text {corpus.name!r} is not what this run began with (content hash {then} then, "
            f"{corpus.content_hash[:12]} now): bring it back as it was, or begin a new search"
        )


def _first_difference(left: object, right: object, path: str = "") -> str | None:
    """Where two JSON values differ first, as "model.width (64 and 128)"."""
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted({*left, *right}):
            here = f"{path}.{name}" if path else str(name)
            if name not in left or name not in right:
                return f"{here[:100]} (only one has it)"
            difference = _first_difference(left[name], right[name], here)
            if difference:
                return difference
        return None
    if left == right and type(left) is type(right):
        return None
    return f"{path[:100]} ({str(left)[:60]} and {str(right)[:60]})"


def _versions() -> dict[str, str]:
    """Of what the results depend on; for people who ask why a replay differs."""
    versions = {"python": platform.python_version()}
    for name in ("star-kernels", "numpy", "pymoo", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions
