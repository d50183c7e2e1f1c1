"""Measuring in a process of its own, so that what breaks there costs one row of a table and no more.

A kernel that writes where it must not leaves its process unable to use the GPU; a package may crash, hang, or
take all memory. The process that measures is then ended, and the next row gets a new one.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu_decode import DecodeRow, decode_rows, measure_decode
from benchmarks.gpu_models import ModelRow, measure_model, model_names
from benchmarks.gpu_rows import GpuRow, rows_of
from star import bench
from star_kernels import dispatch

__all__ = ["Lost", "Worker", "measured"]

STARTING = 60.0
"""Seconds that a new process has to import what it needs, beyond its task's own."""


class Lost(Exception):
    """A task got no answer; the message says why in one line."""


@dataclass(frozen=True)
class _Settings:
    device: str
    dtype: str
    seconds: float
    quick: bool


class Worker:
    """A process that measures the rows of :func:`benchmarks.gpu_rows.rows_of` by their numbers."""

    def __init__(self, device: str, dtype: str, seconds: float, quick: bool) -> None:
        self._settings = _Settings(device, dtype, seconds, quick)
        self._process: Any = None
        self._pipe: Connection | None = None

    def ask(self, task: Callable[..., Any], *arguments: Any, limit: float) -> Any:
        """``task(settings, *arguments)``, a module's function, computed there within ``limit`` seconds.

        Raises:
            Lost: it raised, took longer, or took the process with it. The process is ended.
        """
        new = self._process is None
        if new:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send((task, arguments))
            if not self._pipe.poll(limit + (STARTING if new else 0.0)):
                raise Lost(f"no answer within {limit:.0f} s")
            answer, problem = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.stop()
            raise Lost(f"its process ended with exit code {code}") from None
        except Lost:
            self.stop()
            raise
        if problem:
            self.stop()
            raise Lost(problem)
        return answer

    def stop(self) -> None:
        """Ends the process; the next task starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        # A forked process could not use a GPU that this one has looked at.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # No daemon: torch.compile, which one of the peers needs, may start processes of its own.
        self._process = context.Process(target=_serve, args=(theirs, self._settings))
        self._process.start()
        theirs.close()


def _serve(pipe: Connection, settings: _Settings) -> None:
    while True:
        try:
            task, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer, problem = task(settings, *arguments), ""
        except Exception as error:  # whatever it is, it is this task's answer
            answer, problem = None, one_line(error)
        pipe.send((answer, problem))
        if settings.device != "cpu" and not problem:
            torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


# --------------------------------------------------------------------------------------------------------
# Tasks


def row(settings: _Settings, number: int, backends: Sequence[str], peers: Sequence[str]) -> bench.Measurement:
    """One row's times."""
    chosen = rows_of(None, quick=settings.quick)[number]
    return bench.measure(
        chosen.case,
        dtype=settings.dtype,
        device=settings.device,
        passes=chosen.passes,
        seconds=settings.seconds,
        backends=tuple(backends),
        peers=tuple(peers),
    )


def step(settings: _Settings, number: int) -> DecodeRow:
    """One decode step's times."""
    case = decode_rows(None, quick=settings.quick)[number]
    dtype, place = bench.DTYPES[settings.dtype], torch.device(settings.device)
    return measure_decode(case, device=place, dtype=dtype, seconds=settings.seconds / 4)


def model(settings: _Settings, number: int) -> ModelRow:
    """One whole model's times."""
    name, batch = model_names()[number]
    dtype, place = bench.DTYPES[settings.dtype], torch.device(settings.device)
    return measure_model(
        name, batch, device=place, dtype=dtype, seconds=settings.seconds / 2, quick=settings.quick
    )


def memory(settings: _Settings, number: int) -> dict[str, float]:
    """Bytes that a row's call takes beyond its arguments at most, ours and its peers'."""
    place = torch.device(settings.device)
    if place.type != "cuda":
        return {}
    chosen = rows_of(None, quick=settings.quick)[number]
    calls = bench.calls(
        chosen.case, "both", dtype=settings.dtype, device=settings.device, backends=("triton",)
    )
    taken = {}
    for name, call in calls.items():
        torch.cuda.synchronize(place)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place)
        before = torch.cuda.memory_allocated(place)
        try:
            call()
        except Exception:  # a peer that refuses is named among the absent of its row
            if name == "triton":
                raise
            continue
        torch.cuda.synchronize(place)
        taken[name] = float(torch.cuda.max_memory_allocated(place) - before)
    return taken


# --------------------------------------------------------------------------------------------------------
# Attempts


def measured(
    worker: Worker, number: int, chosen: GpuRow, limit: Callable[[], float]
) -> tuple[bench.Measurement | None, str]:
    """A row, with less and less of it until it can be measured; and what was lost on the way, in one line.

    First with all peers, then without, then each of our backends alone.

    Args:
        limit: the seconds that are left for the next attempt; 0 ends them.
    """
    backends = tuple(name for name in chosen.backends if dispatch.form(chosen.case.operator, name))
    if not set(backends) & {"cuda", "triton"}:
        return None, "it has no kernel for GPUs"
    problems: list[str] = []
    for ours, peers in _attempts(backends):
        allowed = limit()
        if allowed <= 0:
            problems.append("the time of the whole run was over")
            break
        try:
            answer: bench.Measurement = worker.ask(row, number, ours, peers, limit=allowed)
        except Lost as lost:
            problems.append(str(lost))
            continue
        return _with_losses(answer, backends, ours, peers, problems)
    return None, "; ".join(dict.fromkeys(problems))


def _attempts(backends: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    yield backends, ("",)
    yield backends, ()
    gpu = [name for name in backends if name in ("cuda", "triton")]
    if len(gpu) > 1:
        for backend in gpu:
            yield (backend,), ()


def _with_losses(
    answer: bench.Measurement,
    backends: tuple[str, ...],
    ours: tuple[str, ...],
    peers: tuple[str, ...],
    problems: list[str],
) -> tuple[bench.Measurement, str]:
    """The measurement with its missing peers named; and what of ours failed: a failure of the run."""
    why = problems[-1] if problems else ""
    if not peers and why:
        answer = replace(answer, absent={**answer.absent, "all peers": f"with them: {why}"})
    lost = [name for name in backends if name not in ours and name != "reference"]
    failed = [f"{name}: {why}" for name in lost]
    failed += [f"{name}: {answer.absent[name]}" for name in ours if name in answer.absent]
    return answer, "; ".join(failed)
