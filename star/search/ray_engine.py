"""The search's candidates on a Ray cluster: the same answers as local workers, from any machine.

Needs the extra `ray` (pip install 'star-kernels[ray]'). `RAY_ADDRESS` names the cluster; without it Ray
starts on this machine alone. Ray's own retries are switched off, since it would repeat without saying so:
the search itself tries a lost candidate once more, as it does with local workers.

Weights travel as bytes, so the machines need no common disk. The text does not: a machine without the
search's token files builds them from the settings' data, which must be there, and compares their hash.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from star.search.errors import DiskFull, RunError, is_disk_full
from star.search.events import CandidateStarted, Listener, WorkerLost, ignore
from star.search.workers import ATTEMPTS, Task, lost_twice, settings_for, timed_out

__all__ = ["RayEngine", "run_task"]


class RayEngine:
    """Evaluates tasks as Ray tasks, at most `workers` at a time. See `star.search.workers.Engine`.

    Args:
        evaluator: "package.module:function", imported where the task runs.
        settings: the evaluator's second argument.
        directory: the run directory, for messages.
        workers: tasks in flight.
        threads: processor cores that Ray reserves for each, and its number of threads.
        workers_per_gpu: tasks that share a GPU; None for tasks that reserve none.
        timeout: seconds after which a task that has not come back is killed, and its candidate has failed;
            where the cluster is busy, they begin with the wait for a place on it.
        listener: hears of starts and losses.

    Raises:
        RunError: ray is not installed, or the cluster can not be reached.
    """

    def __init__(
        self,
        evaluator: str,
        settings: Mapping[str, Any],
        *,
        directory: Path,
        workers: int,
        threads: int = 1,
        workers_per_gpu: int | None = None,
        timeout: float | None = None,
        listener: Listener = ignore,
    ) -> None:
        self._ray = _import_ray()
        self._directory = directory
        self._limit = workers
        self._listener = listener
        self._timeout = timeout
        self._running: dict[Any, tuple[Task, int, float]] = {}  # Ray's reference -> task, slot, its beginning
        self._started_ray = not self._ray.is_initialized()
        if self._started_ray:
            try:
                self._ray.init(log_to_driver=False, include_dashboard=False)
            except Exception as error:  # Ray's own and gRPC's: none of them share a base
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise RunError(f"engine 'ray' does not start: {reason}") from error
        environment = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
        remote = self._ray.remote(run_task)
        self._remote = remote.options(
            max_retries=0,
            retry_exceptions=False,
            num_cpus=threads,
            num_gpus=0 if workers_per_gpu is None else 1 / workers_per_gpu,
            runtime_env=environment,
        )
        # Sent to the cluster once instead of with each task.
        self._first = self._ray.put(json.dumps({"evaluator": evaluator, "settings": dict(settings)}))

    def evaluate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        waiting = deque(tasks)
        losses: Counter[int] = Counter()
        while waiting or self._running:
            self._hand_out(waiting)
            done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=self._patience())
            for reference in done:
                task, *_ = self._running.pop(reference)
                try:
                    text, weights = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    losses[task.id] += 1
                    again = losses[task.id] < ATTEMPTS
                    self._listener(WorkerLost(task.id, reason, retried=again))
                    if again:
                        waiting.appendleft(task)
                    else:
                        # Ray's text names processes and addresses: it would differ from run to run.
                        yield task.id, lost_twice(f"Ray says {type(error).__name__}")
                    continue
                yield task.id, self._understood(json.loads(text), task, weights)
            yield from self._overdue()

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._started_ray:
            self._ray.shutdown()
            self._started_ray = False

    def _patience(self) -> float | None:
        """Seconds until the first of the running tasks is overdue."""
        if self._timeout is None:
            return None
        first = min(began for *_, began in self._running.values())
        return max(0.0, first + self._timeout - time.monotonic())

    def _overdue(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Ends the tasks that have been running for longer than is allowed, and gives their answers."""
        if self._timeout is None:
            return
        latest = time.monotonic() - self._timeout
        for reference, (task, _, began) in list(self._running.items()):
            if began <= latest:
                del self._running[reference]
                self._ray.cancel(reference, force=True)
                result = timed_out(self._timeout)
                self._listener(WorkerLost(task.id, result["reason"], retried=False))
                yield task.id, result

    def _hand_out(self, waiting: deque[Task]) -> None:
        while waiting and len(self._running) < self._limit:
            task = waiting.popleft()
            slot = min(set(range(self._limit)) - {slot for _, slot, _ in self._running.values()})
            # The path is of this machine: there, it only says whether weights are wanted.
            reference = self._remote.remote(self._first, task.to_json())
            self._running[reference] = (task, slot, time.monotonic())
            self._listener(CandidateStarted(task.id, task.genome, slot))

    def _understood(self, message: dict[str, Any], task: Task, weights: bytes | None) -> dict[str, Any]:
        if "disk_full" in message:
            raise DiskFull(message["disk_full"], self._directory)
        if "fatal" in message:
            raise RunError(message["fatal"])
        if weights is not None and task.weights is not None:
            _save(weights, Path(task.weights), self._directory)
        result: dict[str, Any] = message["result"]
        return result


def run_task(first: str, task: dict[str, Any]) -> tuple[str, bytes | None]:
    """What runs on the cluster, for a task as `Task.to_json` gives it: the message of a local worker as JSON,
    and the weights' bytes.

    Raises nothing that the search should know of: whatever comes out of here as an exception is Ray's.
    """
    from star.pools import load_object
    from star.search.results import evaluate_safely

    given = json.loads(first)
    try:
        evaluator = load_object(given["evaluator"])
    except (ImportError, ValueError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return json.dumps({"fatal": f"evaluator {given['evaluator']!r} can not be imported: {line}"}), None
    try:
        with tempfile.TemporaryDirectory(prefix="star-") as folder:
            path = Path(folder) / f"{task['id']}.safetensors"
            place = None if task["weights"] is None else str(path)
            settings = settings_for(task, given["settings"])
            result = evaluate_safely(evaluator, task["genome"], settings, task["id"], place)
            weights = path.read_bytes() if path.exists() else None
    except RunError as error:
        return json.dumps({"fatal": str(error)}), None
    except OSError as error:
        if not is_disk_full(error):
            raise
        return json.dumps({"disk_full": str(error.filename or "a worker's file")}), None
    return json.dumps({"result": result}, allow_nan=False), weights


def _save(weights: bytes, path: Path, directory: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(weights)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFull(path, directory) from error
        raise RunError(f"{path} can not be written: {error.strerror or error}") from error


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise RunError(
            "engine 'ray' needs the package ray (pip install 'star-kernels[ray]'); engine 'local' does not"
        ) from error
    return ray
