"""Local workers: answers, deaths, and that nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from star.genome import Genome
from star.search.errors import DiskFull, RunError
from star.search.events import CandidateStarted, Event, WorkerLost
from star.search.workers import LocalEngine, Task


def tasks(count: int, run: Path) -> list[Task]:
    rng = np.random.default_rng(0)
    (run / "weights").mkdir(exist_ok=True)
    return [
        Task(id, Genome.random(4, rng).key, str(run / "weights" / f"{id}.safetensors")) for id in range(count)
    ]


class Engines:
    """Makes engines that are closed when the test ends, and keeps what they tell."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.events: list[Event] = []
        self.made: list[LocalEngine] = []

    def __call__(self, evaluator: str, workers: int = 2, **settings: Any) -> LocalEngine:
        engine = LocalEngine(
            f"synthetic:{evaluator}" if ":" not in evaluator else evaluator,
            settings,
            directory=self.run,
            workers=workers,
            listener=self.events.append,
        )
        self.made.append(engine)
        return engine


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    made = Engines(tmp_path)
    yield made
    for engine in made.made:
        engine.close()


def test_every_task_is_answered_once_and_workers_stay(engines: Engines, tmp_path: Path) -> None:
    engine = engines("slow_score")
    given = tasks(12, tmp_path)
    answers = dict(engine.evaluate(given[:7]))
    processes = {worker.process.pid for worker in engine._workers}
    answers |= dict(engine.evaluate(given[7:]))
    assert {worker.process.pid for worker in engine._workers} == processes
    assert len(processes) == 2
    assert sorted(answers) == list(range(12))
    assert {answer["status"] for answer in answers.values()} == {"ok", "failed"}
    started = [event for event in engines.events if isinstance(event, CandidateStarted)]
    assert {event.worker for event in started} <= {0, 1}
    assert len(started) == 12


def test_no_worker_is_started_for_nothing(engines: Engines, tmp_path: Path) -> None:
    engine = engines("score", workers=8)
    assert list(engine.evaluate([])) == []
    assert engine._workers == []
    assert len(list(engine.evaluate(tasks(1, tmp_path)))) == 1
    assert len(engine._workers) == 1


def test_a_lost_worker_costs_one_retry_then_its_candidate(engines: Engines, tmp_path: Path) -> None:
    answers = dict(engines("deadly").evaluate(tasks(8, tmp_path)))
    assert sorted(answers) == list(range(8))
    assert {id for id, answer in answers.items() if answer["status"] == "failed"} == {2, 6}
    assert answers[2]["reason"] == (
        "its worker died 2 times, last: it was killed by SIGKILL (out of memory?)"
    )
    assert answers[6]["reason"] == "its worker died 2 times, last: it exited with status 3"
    lost = [(event.candidate_id, event.retried) for event in engines.events if isinstance(event, WorkerLost)]
    assert sorted(lost) == [(2, False), (2, True), (4, True), (6, False), (6, True)]


def test_strange_results_are_failures_with_a_reason(engines: Engines, tmp_path: Path) -> None:
    answers = dict(engines("strange").evaluate(tasks(9, tmp_path)))
    reasons = [answers[id]["reason"] for id in range(9)]
    expected = [
        "the evaluator returned NoneType, not a dict",
        "the evaluator returned status 'maybe', not 'ok' or 'failed'",
        "the evaluator returned no objectives",
        "quality is nan, not a finite number",
        None,
        "the evaluator returned more than",
        "no reason given",
        "MemoryError: out of",
        None,
    ]
    for reason, words in zip(reasons, expected, strict=True):
        assert reason == words or (words is not None and reason.startswith(words))
    assert all(answer["seconds"] >= 0 for answer in answers.values())


@pytest.mark.parametrize(
    ("evaluator", "words"),
    [
        ("nowhere:evaluate", "evaluator 'nowhere:evaluate' can not be imported: No module named 'nowhere'"),
        ("synthetic:nothing", "has no 'nothing'"),
        ("synthetic:", "takes 'package.module:name'"),
        ("antigravity_of_death:x", "worker processes do not start: it exited with status 7 (the end)"),
    ],
)
def test_an_evaluator_that_can_not_be_used_stops_the_search(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluator: str, words: str
) -> None:
    (tmp_path / "antigravity_of_death.py").write_text("import os\nos.write(2, b'the end\\n')\nos._exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RunError, match=r"^[^\n]+$") as caught:
        list(engines(evaluator).evaluate(tasks(3, tmp_path)))
    assert words in str(caught.value)


def test_a_worker_without_room_stops_the_search(engines: Engines, tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"3\.safetensors: make room, then continue with: star resume"):
        list(engines("full_disk", workers=1).evaluate(tasks(6, tmp_path)))


def test_one_thread_each(engines: Engines, tmp_path: Path) -> None:
    engine = engines("score", workers=1)
    list(engine.evaluate(tasks(1, tmp_path)))
    environment = Path(f"/proc/{engine._workers[0].process.pid}/environ")
    if not environment.exists():
        pytest.skip("needs /proc")
    assert b"\0OMP_NUM_THREADS=1\0" in b"\0" + environment.read_bytes()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    # An orphan that nobody reaps stays as a zombie: it does not run.
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(condition: Any, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_parent(tmp_path: Path, stop: signal.Signals) -> None:
    code = (
        "import test_search_workers as t, pathlib, sys; run = pathlib.Path(sys.argv[1]); "
        "list(t.Engines(run)('endless').evaluate(t.tasks(2, run)))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    files = [tmp_path / "pid-0", tmp_path / "pid-1"]
    try:
        assert wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        workers = [int(file.read_text()) for file in files]
        assert all(is_running(worker) for worker in workers)
    finally:
        parent.send_signal(stop)
        parent.wait()
    assert wait_until(lambda: not any(is_running(worker) for worker in workers))


def test_closing_ends_workers_in_the_middle_of_a_task(engines: Engines, tmp_path: Path) -> None:
    engine = engines("endless", workers=1)
    answers = engine.evaluate(tasks(1, tmp_path))
    # The first thing that can come from an endless evaluation is the interrupt of whoever waits for it.
    timer = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 3.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(answers)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, timer)
    process = engine._workers[0].process.pid
    engine.close()
    engine.close()
    assert not is_running(process)


def test_a_candidate_that_hangs_is_killed_and_failed(engines: Engines, tmp_path: Path) -> None:
    engine = engines("hanging")
    engine._timeout = 0.5
    answers = dict(engine.evaluate(tasks(6, tmp_path)))
    assert sorted(answers) == list(range(6))
    assert {id for id, answer in answers.items() if answer["status"] == "failed"} == {1, 4}
    assert answers[1]["reason"] == answers[4]["reason"] == "timed out: no answer after 0.5 s"
    lost = [event for event in engines.events if isinstance(event, WorkerLost)]
    assert sorted(lost, key=lambda event: event.candidate_id) == [
        WorkerLost(id, "timed out: no answer after 0.5 s", retried=False) for id in (1, 4)
    ]
