"""Workers on GPUs, without any GPU: the list of devices is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
from synthetic import settings as small_settings

from star.search import gpus
from star.search.errors import SearchInterrupted
from star.search.events import CandidateFinished, CandidateStarted, Event, RunStarted
from star.search.gpus import Placement, place, visible_gpus
from star.search.run import carried_out_otherwise, resume, search
from star.search.settings import SearchSettings
from star.search.store import RunStore

OPTIONS: dict[str, Any] = {"evaluator": "synthetic:gpu_of_worker", "open_corpus": synthetic.open_corpus}


def on(device: str, **changes: Any) -> SearchSettings:
    settings = small_settings(**{"workers": None, "generations": 1, **changes})
    return replace(settings, proxy=replace(settings.proxy, device=device))


def two() -> tuple[str, ...]:
    return ("3", "5")


def none() -> tuple[str, ...]:
    return ()


def never() -> tuple[str, ...]:
    raise AssertionError("nobody asked for a GPU")


def test_placement() -> None:
    assert place(on("auto", workers_per_gpu=4), two) == Placement(8, ("3", "5"))
    assert place(on("cuda", workers=3), two) == Placement(3, ("3", "5"))
    assert place(on("auto", workers=3), none) == Placement(3)
    # One GPU is named: all workers see all GPUs, and use this one.
    assert place(on("cuda:1", workers_per_gpu=4), never) == Placement(4)
    assert place(on("cpu", workers=2), never) == Placement(2)


def test_placement_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="workers_per_gpu is 4, and this machine has no GPU that torch can"):
        place(on("auto", workers_per_gpu=4), none)
    with pytest.raises(ValueError, match="device is 'cuda', and this machine has no GPU"):
        place(on("cuda", workers=1), none)
    with pytest.raises(ValueError, match="the device of the proxy is the CPU"):
        on("cpu", workers_per_gpu=4)
    with pytest.raises(ValueError, match="both given"):
        on("auto", workers_per_gpu=4, workers=2)
    with pytest.raises(ValueError, match="workers_per_gpu is 0, takes an integer from 1"):
        on("auto", workers_per_gpu=0)
    # Ray places its tasks itself: so many at once, each with its share of a GPU.
    assert on("auto", workers_per_gpu=4, workers=2, engine="ray").worker_count() == 2


def test_workers_get_the_gpus_by_turns(tmp_path: Path) -> None:
    """Four workers on two GPUs; then the run goes on with one on each."""
    settings = on("auto", workers_per_gpu=2, generations=2, population=8, references=False)
    events: list[Event] = []
    answered = 0

    def listen(event: Event) -> None:
        nonlocal answered
        events.append(event)
        answered += isinstance(event, CandidateFinished)
        if answered == 8:
            raise KeyboardInterrupt

    with pytest.raises(SearchInterrupted):
        search(settings, tmp_path / "run", find_gpus=two, on_event=listen, **OPTIONS)
    assert isinstance(events[0], RunStarted)
    assert events[0].settings.worker_count() == 4
    worker_of = {event.candidate_id: event.worker for event in events if isinstance(event, CandidateStarted)}
    sizes = {
        e.evaluation.id: e.evaluation.objectives["size"] for e in events if isinstance(e, CandidateFinished)
    }
    assert all(size == (3, 5)[worker_of[id] % 2] for id, size in sizes.items())
    assert set(sizes.values()) == {3, 5}
    resumed: list[Event] = []
    resume(tmp_path / "run", workers_per_gpu=1, find_gpus=two, on_event=resumed.append, **OPTIONS)
    assert {event.worker for event in resumed if isinstance(event, CandidateStarted)} <= {0, 1}
    with RunStore.open(tmp_path / "run") as store:
        assert store.settings().workers_per_gpu == 2  # as it began
        assert [event.data["workers"] for event in store.events("session")] == [4, 2]


def test_without_gpus_the_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    events: list[Event] = []
    settings = on("auto", workers=1, population=2, references=False)
    search(settings, tmp_path / "run", find_gpus=none, on_event=events.append, **OPTIONS)
    sizes = {e.evaluation.objectives["size"] for e in events if isinstance(e, CandidateFinished)}
    assert sizes == {7}


def test_cuda_without_a_gpu_begins_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device is 'cuda', and this machine has no GPU"):
        search(on("cuda"), tmp_path / "run", find_gpus=none, **OPTIONS)
    assert not (tmp_path / "run" / "run.db").exists()


def test_a_cluster_keeps_what_resume_does_not_change() -> None:
    """Of local workers one number takes the other's place; Ray takes both."""
    settings = on("auto", workers=16, workers_per_gpu=4, engine="ray")
    more = carried_out_otherwise(settings, workers=32)
    assert (more.workers, more.workers_per_gpu) == (32, 4)
    closer = carried_out_otherwise(settings, workers_per_gpu=8)
    assert (closer.workers, closer.workers_per_gpu) == (16, 8)
    local = carried_out_otherwise(on("auto", workers=2), workers_per_gpu=8)
    assert (local.workers, local.workers_per_gpu) == (None, 8)


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [
        (None, 2, ("0", "1")),
        ("", 2, ("0", "1")),
        ("4, 6", 2, ("4", "6")),
        ("4,6,9", 2, ("4", "6")),
        ("GPU-8a6c,MIG-1/2/3", 2, ("GPU-8a6c", "MIG-1/2/3")),
        ("-1", 0, ()),
    ],
)
def test_gpus_are_named_as_cuda_names_them(
    monkeypatch: pytest.MonkeyPatch, named: str | None, count: int, expected: tuple[str, ...]
) -> None:
    import torch

    monkeypatch.setattr(gpus, "_DEVICE_FILES", ("null",))  # as if the machine had one
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected
    monkeypatch.setattr(gpus, "_DEVICE_FILES", ("no-such-device*",))
    assert visible_gpus() == ()
