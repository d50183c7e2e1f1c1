"""Who evaluates candidates: the interface of all engines, and the local one, a few persistent processes.

An engine takes tasks and gives answers in whatever order they come; an answer is what
`star.search.results.plain_result` makes of the evaluator's return value, so every engine answers alike.
A lost worker is not an error of the search: its candidate is tried once more and then answered as failed.

Local workers are fresh interpreters (nothing is forked, so no lock of ours is copied), spoken to in JSON
over a socket pair. A second pipe, of which the parent alone holds the other end, tells a worker that the
parent is gone, even by SIGKILL. Workers run in process groups of their own: Ctrl-C reaches the parent alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any, Protocol

from star.search.errors import DiskFull, RunError
from star.search.events import CandidateStarted, Listener, WorkerLost, ignore
from star.search.results import failure

__all__ = ["ATTEMPTS", "Engine", "LocalEngine", "Task", "lost_twice", "settings_for", "timed_out"]

# How often a candidate is given to a worker before its deaths are blamed on it.
ATTEMPTS = 2
ANSWER_BYTES_AT_MOST = 64 << 20
_STARTS_THAT_MAY_FAIL = 3
_BOOTSTRAP = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from star.search.worker_process import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True)
class Task:
    """A candidate to evaluate.

    Attributes:
        id: in the search.
        genome: canonical.
        weights: where they may be saved.
        bars: what it has to pass on its way (star.search.rungs), as JSON; given to the evaluator with the
            settings, as settings["bars"].
    """

    id: int
    genome: str
    weights: str | None
    bars: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as workers get it."""
        return asdict(self)


def settings_for(task: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluator's settings for a task, as `Task.to_json` gives it."""
    return {**settings} if task["bars"] is None else {**settings, "bars": task["bars"]}


class Engine(Protocol):
    """Evaluates tasks. Used by one thread, one `evaluate` at a time."""

    def evaluate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (task id, plain result) as they come, one for every task.

        Raises:
            RunError: nothing can be evaluated at all (no such evaluator, workers that do not start).
            DiskFull: a worker had no room to write.
        """

    def close(self) -> None:
        """Stop whatever is running, at once. May be called twice."""


def lost_twice(reason: str) -> dict[str, Any]:
    """The answer for a candidate that has taken `ATTEMPTS` workers with it."""
    return failure(f"its worker died {ATTEMPTS} times, last: {reason}")


def timed_out(seconds: float) -> dict[str, Any]:
    """The answer for a candidate that has not come back."""
    return failure(f"timed out: no answer after {seconds:g} s")


class LocalEngine:
    """Persistent worker processes on this machine, started when they are first needed.

    Args:
        evaluator: "package.module:function", imported by each worker.
        settings: the evaluator's second argument, sent to each worker once.
        directory: the run directory, for messages.
        workers: how many processes.
        threads: of torch and of the libraries below it, in each.
        gpus: given to the workers by turns, each as its only one (as CUDA_VISIBLE_DEVICES names them); none
            for leaving all to each.
        timeout: seconds after which a worker that has not answered is killed, and its candidate has failed.
        listener: hears of starts and losses.
    """

    def __init__(
        self,
        evaluator: str,
        settings: Mapping[str, Any],
        *,
        directory: Path,
        workers: int,
        threads: int = 1,
        gpus: Sequence[str] = (),
        timeout: float | None = None,
        listener: Listener = ignore,
    ) -> None:
        self._first_message = {"evaluator": evaluator, "settings": dict(settings)}
        self._directory = directory
        self._limit = workers
        self._threads = threads
        self._gpus = tuple(gpus)
        self._timeout = timeout
        self._listener = listener
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def evaluate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        waiting = deque(tasks)
        losses: Counter[int] = Counter()
        while waiting or any(worker.task for worker in self._workers):
            self._hand_out(waiting)
            for worker in self._ready():
                answer = worker.receive()
                if answer is None:
                    task, reason = worker.task, self._bury(worker)
                    if task is None:
                        continue
                    losses[task.id] += 1
                    again = losses[task.id] < ATTEMPTS
                    self._listener(WorkerLost(task.id, reason, retried=again))
                    if again:
                        waiting.appendleft(task)
                    else:
                        yield task.id, lost_twice(reason)
                elif "result" in answer and worker.task is not None:
                    task, worker.task = worker.task, None
                    self._hand_out(waiting)  # before the caller takes its time with the answer
                    yield task.id, answer["result"]
                else:
                    self._heed(worker, answer)
            for worker in self._overdue():
                task, seconds = worker.task, self._timeout
                assert task is not None
                assert seconds is not None
                self._remove(worker)
                result = timed_out(seconds)
                self._listener(WorkerLost(task.id, result["reason"], retried=False))
                self._hand_out(waiting)
                yield task.id, result

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.forget()
        self._workers.clear()

    def _hand_out(self, waiting: deque[Task]) -> None:
        """Give waiting tasks to idle workers, and start workers for the rest up to the limit."""
        for worker in self._workers:
            if waiting and worker.idle:
                task = waiting.popleft()
                worker.send(task)
                self._listener(CandidateStarted(task.id, task.genome, worker.number))
        starting = sum(not worker.started for worker in self._workers)
        while len(self._workers) < self._limit and starting < len(waiting):
            number = min(set(range(self._limit)) - {worker.number for worker in self._workers})
            gpu = self._gpus[number % len(self._gpus)] if self._gpus else None
            self._workers.append(_Worker(number, self._first_message, self._threads, gpu))
            starting += 1

    def _ready(self) -> list[_Worker]:
        """Wait until workers have something to say or are dead; none of them, where one is overdue."""
        while True:
            # The time-out is for the overdue, and a death that leaves the connection open in a grandchild.
            speaking = set(wait([worker.connection for worker in self._workers], timeout=1.0))
            ready = [w for w in self._workers if w.connection in speaking or w.process.poll() is not None]
            if ready or self._overdue():
                return ready

    def _overdue(self) -> list[_Worker]:
        """Workers that have been at one candidate for longer than is allowed."""
        if self._timeout is None:
            return []
        latest = time.monotonic() - self._timeout
        return [worker for worker in self._workers if worker.task is not None and worker.began < latest]

    def _remove(self, worker: _Worker) -> None:
        """End a worker, whatever it is doing."""
        self._workers.remove(worker)
        worker.kill()
        worker.forget()

    def _heed(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        """What a worker says other than a result."""
        if "ready" in message:
            worker.started = True
            self._failed_starts = 0
        elif "disk_full" in message:
            raise DiskFull(message["disk_full"], self._directory)
        else:
            raise RunError(str(message.get("fatal", f"worker {worker.number} sent an unknown message")))

    def _bury(self, worker: _Worker) -> str:
        """Remove a dead worker and say what it died of.

        Raises:
            RunError: workers die again and again before they can be given anything.
        """
        self._workers.remove(worker)
        reason = worker.end()
        if not worker.started:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS_THAT_MAY_FAIL:
                raise RunError(f"worker processes do not start: {reason}{worker.last_words()}")
        worker.forget()
        return reason


class _Worker:
    """One process and the parent's ends of its connection and its lifeline."""

    def __init__(self, number: int, first_message: Mapping[str, Any], threads: int, gpu: str | None) -> None:
        self.number = number
        self.task: Task | None = None
        self.began = 0.0  # with the task, on the monotonic clock
        self.started = False
        self.connection, theirs = Pipe(duplex=True)
        lifeline, self._lifeline = os.pipe()
        # Unnamed, so that nothing is left behind; what it holds explains a crash.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, _search_path(), str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
                env={**os.environ, **_thread_environment(threads), **_gpu_environment(gpu)},
            )
        finally:
            theirs.close()
            os.close(lifeline)
        self._post(first_message)

    @property
    def idle(self) -> bool:
        return self.started and self.task is None

    def send(self, task: Task) -> None:
        self.task, self.began = task, time.monotonic()
        self._post(task.to_json())

    def _post(self, message: Mapping[str, Any]) -> None:
        # If it is dead, `receive` finds out, where deaths are dealt with.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> dict[str, Any] | None:
        """Its next message, or None when it is dead."""
        try:
            if not self.connection.poll():
                return None
            message = json.loads(self.connection.recv_bytes(ANSWER_BYTES_AT_MOST))
        except (EOFError, OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def end(self) -> str:
        """Wait for a worker that has closed its connection; how it ended, in words."""
        try:
            status = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            status = None
        self.kill()
        return _describe_end(status)

    def kill(self) -> None:
        """Make sure that the process and its children are gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no such group any more
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def last_words(self) -> str:
        """The last line that it printed, as " (line)", or nothing."""
        self._output.seek(0)
        lines = self._output.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
        return f" ({lines[-1].strip()[:300]})" if lines else ""

    def forget(self) -> None:
        self._output.close()


def _search_path() -> str:
    """sys.path for the worker, where "" would mean another folder."""
    return json.dumps([entry or os.getcwd() for entry in sys.path])


def _thread_environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return dict.fromkeys(names, str(threads))


def _gpu_environment(gpu: str | None) -> dict[str, str]:
    # ROCm has a name of its own, and takes NVIDIA's as well.
    return {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}


def _describe_end(status: int | None) -> str:
    if status is None:
        return "it stopped answering"
    if status >= 0:
        return f"it exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"it was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
