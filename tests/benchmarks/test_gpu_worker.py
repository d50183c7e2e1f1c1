"""What breaks while a row is measured costs that row: the measuring process, and the attempts at a row."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu_rows import GpuRow, rows_of
from benchmarks.gpu_worker import Lost, Worker, measured
from star.bench import Measurement, Timing
from star_kernels import dispatch


def double(settings: Any, number: int) -> int:
    return 2 * number


def sleep(settings: Any) -> None:
    time.sleep(600)


def leave(settings: Any) -> None:
    os._exit(3)


def refuse(settings: Any) -> None:
    raise ValueError("too large\nand more")


@pytest.mark.slow
def test_the_next_task_gets_a_new_process() -> None:
    worker = Worker("cpu", "float32", 0.0, quick=True)
    try:
        assert worker.ask(double, 3, limit=60) == 6
        with pytest.raises(Lost, match="no answer within"):
            worker.ask(sleep, limit=0.2)
        with pytest.raises(Lost, match="exit code 3"):
            worker.ask(leave, limit=60)
        with pytest.raises(Lost, match=r"^ValueError: too large$"):
            worker.ask(refuse, limit=60)
        assert worker.ask(double, 4, limit=60) == 8
    finally:
        worker.stop()


ROW = replace(rows_of(["glu"], quick=True)[0], backends=("cuda", "triton"))
TIMING = Timing("triton", 1.0, 1.0, 3)


class Scripted:
    """A worker whose tasks answer as ``answer(backends, peers)`` says."""

    def __init__(self, answer: Callable[[tuple[str, ...], tuple[str, ...]], dict[str, str]]) -> None:
        self.answer, self.asked = answer, 0

    def ask(self, task: Any, number: int, backends: Any, peers: Any, *, limit: float) -> Measurement:
        self.asked += 1
        absent = self.answer(backends, peers)
        timings = tuple(replace(TIMING, name=name) for name in backends if name not in absent)
        return Measurement(
            "glu", {}, "float32", "cpu", 1, "forward", 1, 1.0, timings, (), absent, TIMING, TIMING, 1.0
        )


def attempt(worker: Scripted, monkeypatch: pytest.MonkeyPatch, limit: float = 1.0) -> Any:
    monkeypatch.setattr(dispatch, "form", lambda operator, backend: object())
    row: GpuRow = ROW
    return measured(worker, 0, row, lambda: limit)  # type: ignore[arg-type]


def test_a_row_whose_peers_break_is_measured_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(backends: tuple[str, ...], peers: tuple[str, ...]) -> dict[str, str]:
        if peers:
            raise Lost("a peer hangs")
        return {}

    result, problem = attempt(Scripted(answer), monkeypatch)
    assert [timing.name for timing in result.backends] == ["cuda", "triton"]
    assert "a peer hangs" in result.absent["all peers"]
    assert problem == ""


def test_a_backend_that_breaks_is_a_failure_and_the_other_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(backends: tuple[str, ...], peers: tuple[str, ...]) -> dict[str, str]:
        if "cuda" in backends:
            raise Lost("its process ended with exit code -11")
        return {}

    result, problem = attempt(Scripted(answer), monkeypatch)
    assert [timing.name for timing in result.backends] == ["triton"]
    assert problem == "cuda: its process ended with exit code -11"
    refused, problem = attempt(Scripted(lambda backends, peers: {"cuda": "no image"}), monkeypatch)
    assert [timing.name for timing in refused.backends] == ["triton"]
    assert problem == "cuda: no image"


def test_without_time_nothing_is_attempted(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Scripted(lambda backends, peers: {})
    assert attempt(worker, monkeypatch, limit=0.0) == (None, "the time of the whole run was over")
    assert worker.asked == 0
