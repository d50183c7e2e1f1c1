"""The Ray engine: its logic against a stand-in for Ray, and a whole search where Ray is installed."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import synthetic
from synthetic import settings as small_settings
from test_search_workers import tasks

from star.search.errors import DiskFull, RunError
from star.search.events import CandidateStarted, Event, WorkerLost
from star.search.ray_engine import RayEngine, run_task
from star.search.run import search
from star.search.store import RunStore
from star.search.workers import Task


class RayError(Exception):
    """Ray's base of errors."""


@dataclass(eq=False)
class Reference:
    """Ray's to a task: hashable, whatever its arguments are."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


class StandIn(types.ModuleType):
    """As much of Ray as the engine uses, all in this process. `lost` says how often each task is lost."""

    def __init__(self, lost: dict[int, int]) -> None:
        super().__init__("ray")
        self.exceptions = types.ModuleType("ray.exceptions")
        self.exceptions.RayError = RayError  # type: ignore[attr-defined]
        self.lost, self.options_seen, self.cancelled = lost, {}, []  # type: ignore[var-annotated]
        self.running = False
        self.most_at_once = 0
        self.patience: list[float | None] = []

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **_: Any) -> None:
        self.running = True

    def shutdown(self) -> None:
        self.running = False

    def put(self, value: Any) -> Any:
        return value

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**chosen: Any) -> Any:
            self.options_seen = chosen
            return types.SimpleNamespace(remote=lambda *args: Reference(function, args))

        return types.SimpleNamespace(options=options)

    def wait(
        self, references: list[Any], num_returns: int, timeout: float | None
    ) -> tuple[list[Any], list[Any]]:
        self.patience.append(timeout)
        if timeout is not None:  # all hang
            time.sleep(timeout)
            return [], references
        self.most_at_once = max(self.most_at_once, len(references))
        return references[-num_returns:], references[:-num_returns]

    def get(self, reference: Any) -> Any:
        function, args = reference.function, reference.args
        id = args[1]["id"]
        if self.lost.get(id, 0) > 0:
            self.lost[id] -= 1
            raise RayError("The worker died\nunexpectedly, process 4711")
        return function(*args)

    def cancel(self, reference: Any, force: bool) -> None:
        self.cancelled.append(reference)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    ray = StandIn(lost={1: 1, 3: 2})
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
    return ray


def test_lost_tasks_are_retried_once_by_us_and_never_by_ray(stand_in: StandIn, tmp_path: Path) -> None:
    events: list[Event] = []
    engine = RayEngine("synthetic:score", {}, directory=tmp_path, workers=3, listener=events.append)
    answers = dict(engine.evaluate(tasks(8, tmp_path)))
    assert sorted(answers) == list(range(8))
    assert answers[3]["reason"] == "its worker died 2 times, last: Ray says RayError"
    assert answers[1]["status"] == "ok"
    assert stand_in.options_seen["max_retries"] == 0
    assert stand_in.options_seen["retry_exceptions"] is False
    assert stand_in.most_at_once == 3
    lost = [(event.candidate_id, event.retried) for event in events if isinstance(event, WorkerLost)]
    assert sorted(lost) == [(1, True), (3, False), (3, True)]
    assert {event.worker for event in events if isinstance(event, CandidateStarted)} == {0, 1, 2}
    saved = {int(path.stem) for path in (tmp_path / "weights").iterdir()}
    assert saved == {id for id, answer in answers.items() if answer["status"] == "ok"}
    assert stand_in.running
    engine.close()
    assert not stand_in.running


def test_a_task_that_hangs_is_cancelled_and_failed(stand_in: StandIn, tmp_path: Path) -> None:
    events: list[Event] = []
    engine = RayEngine(
        "synthetic:score", {}, directory=tmp_path, workers=2, timeout=0.05, listener=events.append
    )
    answers = dict(engine.evaluate(tasks(3, tmp_path)))
    assert {id: answer["reason"] for id, answer in answers.items()} == dict.fromkeys(
        range(3), "timed out: no answer after 0.05 s"
    )
    assert len(stand_in.cancelled) == 3
    assert all(patience is not None and 0 <= patience <= 0.05 for patience in stand_in.patience)
    assert [event.retried for event in events if isinstance(event, WorkerLost)] == [False] * 3


def test_tasks_reserve_their_share_of_a_gpu(stand_in: StandIn, tmp_path: Path) -> None:
    for sharing, share in ((None, 0), (4, 0.25)):
        RayEngine("synthetic:score", {}, directory=tmp_path, workers=2, workers_per_gpu=sharing).close()
        assert stand_in.options_seen["num_gpus"] == share


def test_closing_cancels_what_runs(stand_in: StandIn, tmp_path: Path) -> None:
    engine = RayEngine("synthetic:score", {}, directory=tmp_path, workers=2)
    next(engine.evaluate(tasks(4, tmp_path)))
    engine.close()
    assert len(stand_in.cancelled) == 1


def test_a_cluster_that_was_there_before_stays(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.running = True
    RayEngine("synthetic:score", {}, directory=tmp_path, workers=1).close()
    assert stand_in.running


@pytest.mark.parametrize(
    ("evaluator", "error", "words"),
    [
        ("synthetic:full_disk", DiskFull, "make room"),
        ("synthetic:nothing", RunError, "can not be imported"),
        ("nowhere:x", RunError, "No module named 'nowhere'"),
    ],
)
def test_what_stops_the_search(
    stand_in: StandIn, tmp_path: Path, evaluator: str, error: type[RunError], words: str
) -> None:
    engine = RayEngine(evaluator, {}, directory=tmp_path, workers=1)
    with pytest.raises(error, match=words):
        list(engine.evaluate(tasks(6, tmp_path)))


def test_no_weights_where_none_are_wanted() -> None:
    task = Task(0, "11111-91111", None).to_json()
    text, weights = run_task('{"evaluator": "synthetic:score", "settings": {}}', task)
    assert '"ok"' in text
    assert weights is None


def test_a_search_on_ray_equals_a_local_one(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for engine in ("ray", "local"):
        search(
            small_settings(generations=2, engine=engine),
            tmp_path / engine,
            evaluator="synthetic:score",
            open_corpus=synthetic.open_corpus,
        )
    with RunStore.open(tmp_path / "ray") as ray, RunStore.open(tmp_path / "local") as local:
        assert ray.archive() == local.archive()
