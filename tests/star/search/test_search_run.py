"""Runs in their folders: beginning, resuming, and what they refuse."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
from synthetic import settings as small_settings

from star.search import directory as directory_module
from star.search import run as run_module
from star.search.corpus import CorpusRecord
from star.search.directory import RunDirectory
from star.search.errors import RunDamaged, RunError, RunInUse, SearchInterrupted
from star.search.events import CandidateFinished, Event, RunStarted, WorkerLost
from star.search.run import resume, search
from star.search.settings import DataSettings
from star.search.store import RunStore

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def begin(folder: Path, evaluator: str = "score", **options: Any) -> Any:
    settings = options.pop("settings", small_settings(generations=2))
    corpus = options.pop("open_corpus", synthetic.open_corpus)
    return search(settings, folder, evaluator=f"synthetic:{evaluator}", open_corpus=corpus, **options)


def go_on(folder: Path, evaluator: str = "score", **options: Any) -> Any:
    corpus = options.pop("open_corpus", synthetic.open_corpus)
    return resume(folder, evaluator=f"synthetic:{evaluator}", open_corpus=corpus, **options)


def archive(folder: Path) -> bytes:
    with RunStore.open(folder) as store:
        return store.archive()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, only to be read."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    begin(folder)
    return folder


def cut_short(folder: Path, after: int, evaluator: str = "score", **options: Any) -> None:
    """A run that stops after some candidates as if Ctrl-C had been pressed."""
    seen = 0

    def interrupt(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, CandidateFinished)
        if seen == after and isinstance(event, CandidateFinished):
            raise KeyboardInterrupt

    with pytest.raises(SearchInterrupted, match="search stopped; continue with: star resume"):
        begin(folder, evaluator, on_event=interrupt, **options)


# ---- beginning and resuming ----------------------------------------------------------------------------


def test_a_run_directory(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names == {"run.db", "config.json", "run.lock", "weights", "report", "export"}
    config = json.loads((whole / "config.json").read_text())
    with RunStore.open(whole) as store:
        assert store.settings().to_json() == config == small_settings(generations=2).to_json()
        facts = store.facts()
        assert facts["data"] == {
            "name": "synthetic",
            "content_hash": "0" * 64,
            "key": "0" * 64,
            "vocab_size": 256,
        }
        assert set(facts["versions"]) == {"python", "star-kernels", "numpy", "pymoo", "torch"}


def test_the_vocabulary_comes_from_the_corpus(tmp_path: Path) -> None:
    def corpus(settings: Any) -> CorpusRecord:
        return CorpusRecord("tokens", "1" * 64, "2" * 64, vocab_size=4096)

    begin(tmp_path / "run", open_corpus=corpus, settings=small_settings(generations=1, population=2))
    with RunStore.open(tmp_path / "run") as store:
        assert store.settings().model.vocab_size == 4096


def test_paths_are_recorded_as_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    settings = small_settings(
        generations=1, population=2, data=DataSettings(source=("text.txt", "some/dataset"))
    )
    begin(Path("run"), settings=settings)
    with RunStore.open("run") as store:
        assert store.settings().data.source == (str(tmp_path / "text.txt"), "some/dataset")


def test_an_interrupted_run_goes_on_with_other_workers(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    cut_short(folder, after=5)
    with RunStore.open(folder) as store:
        stored = len(store.evaluations())
        assert [event.kind for event in store.events()][-1] == "interrupted"
    assert 5 <= stored < 15
    events: list[Event] = []
    go_on(folder, workers=1, on_event=events.append)
    assert archive(folder) == archive(whole)
    started = events[0]
    assert isinstance(started, RunStarted)
    assert (started.stored, started.planned, started.settings.workers) == (stored, 15, 1)
    assert sum(isinstance(event, CandidateFinished) for event in events) == 15 - stored


def test_a_finished_run_can_be_resumed_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = begin(folder)
    before = archive(folder)
    again = go_on(folder)
    assert archive(folder) == before
    assert again.front == first.front


def test_lost_workers_are_in_the_record(tmp_path: Path) -> None:
    events: list[Event] = []
    begin(tmp_path / "run", "deadly", on_event=events.append)
    with RunStore.open(tmp_path / "run") as store:
        recorded = [
            (event.data["candidate_id"], event.data["retried"]) for event in store.events("worker_lost")
        ]
        failed = {item.id: item.reason for item in store.evaluations() if not item.ok}
    told = [(event.candidate_id, event.retried) for event in events if isinstance(event, WorkerLost)]
    assert recorded == told
    assert sorted(told) == [(2, False), (2, True), (4, True), (6, False), (6, True)]
    assert set(failed) == {2, 6}


# ---- refusals ------------------------------------------------------------------------------------------


def refused(action: Callable[[], Any], *words: str, error: type[RunError] = RunError) -> None:
    with pytest.raises(error, match=r"^[^\n]+$") as caught:
        action()
    for word in words:
        assert word in str(caught.value)


def test_a_directory_that_holds_a_run_is_not_overwritten(whole: Path) -> None:
    before = archive(whole)
    refused(lambda: begin(whole), "already holds a search", f"star resume {whole}")
    assert archive(whole) == before


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    refused(lambda: go_on(tmp_path / "nothing"), "does not exist")
    refused(lambda: go_on(tmp_path), "holds no search", "star search")
    (tmp_path / "file").write_text("")
    refused(lambda: begin(tmp_path / "file"), "can not be made")


def test_other_peoples_weights_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "1.safetensors").write_text("precious")
    refused(lambda: begin(tmp_path), "weights is not empty")
    assert (tmp_path / "weights" / "1.safetensors").read_text() == "precious"


def test_changed_settings_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    cut_short(folder, after=2)
    path = folder / "config.json"
    text = path.read_text()
    for change, words in (
        ({"population": 7}, "population (7 and 6)"),
        ({"seed": False}, "seed (False and 0)"),
        ({"extra": 1}, "extra (only one has it)"),
        ({"model": {**json.loads(text)["model"], "width": 128}}, "model.width (128 and 64)"),
    ):
        path.write_text(json.dumps({**json.loads(text), **change}))
        refused(lambda: go_on(folder), "disagree on", words)
    path.write_text(json.dumps({**json.loads(text), "workers": 77, "engine": "ray"}))
    go_on(folder)


def test_a_missing_config_is_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    cut_short(folder, after=2)
    text = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    go_on(folder)
    assert (folder / "config.json").read_text() == text


def test_another_text_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    cut_short(folder, after=2)

    def other(settings: Any) -> CorpusRecord:
        return replace(synthetic.open_corpus(settings), content_hash="f" * 64, key="f" * 64)

    refused(lambda: go_on(folder, open_corpus=other), "is not what this run began with", "ffffffffffff now")


def test_another_evaluator_is_refused_and_none_is_taken_from_the_record(whole: Path) -> None:
    refused(lambda: go_on(whole, "slow_score"), "evaluator 'synthetic:score', not 'synthetic:slow_score'")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b" " * (2 << 20)])
def test_a_damaged_config_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "run"
    cut_short(folder, after=1)
    (folder / "config.json").write_bytes(content)
    refused(lambda: go_on(folder), "config.json", error=RunDamaged)


@pytest.mark.parametrize("name", ["run.db", "config.json", "weights", "run.db-wal"])
def test_symbolic_links_are_refused(tmp_path: Path, name: str) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    cut_short(folder, after=1)
    entry = folder / name
    if entry.exists():
        entry.rename(elsewhere)
    elif name == "run.db-wal":
        elsewhere.write_bytes(b"")
    entry.symlink_to(elsewhere)
    refused(lambda: go_on(folder), f"{name} is a symbolic link", error=RunDamaged)


def test_folders_in_the_place_of_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    cut_short(folder, after=1)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(lambda: go_on(folder), "must be a plain file", error=RunDamaged)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.abort, ())


def test_pickles_lying_around_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    cut_short(folder, after=3)
    bombs = [folder / "run.pkl", folder / "weights" / "3.pt", folder / "weights" / "99.safetensors.pkl"]
    for bomb in bombs[:2]:
        bomb.write_bytes(pickle.dumps(_Bomb()))
    go_on(folder)
    assert all(bomb.exists() for bomb in bombs[:2])


def test_keeping_weights_touches_only_what_the_search_names(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create()
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for name in (
        "1.safetensors",
        "2.safetensors",
        "3.safetensors.partial",
        "01.safetensors",
        "x.safetensors",
    ):
        (run.weights / name).write_text("")
    (run.weights / "4.safetensors").symlink_to(outside)
    run.keep_weights({2})
    assert {path.name for path in run.weights.iterdir()} == {
        "2.safetensors",
        "01.safetensors",
        "x.safetensors",
    }
    assert outside.read_text() == "precious"


# ---- one search a directory ----------------------------------------------------------------------------


def test_a_second_search_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    running, release = threading.Event(), threading.Event()

    def hold(event: Event) -> None:
        if isinstance(event, CandidateFinished):
            running.set()
            assert release.wait(60)

    thread = threading.Thread(target=begin, args=(folder,), kwargs={"on_event": hold})
    thread.start()
    try:
        assert running.wait(60)
        words = f"is in use by process {os.getpid()}: a search runs there"
        refused(lambda: go_on(folder), words, error=RunInUse)
        refused(lambda: begin(folder), words, error=RunInUse)
        with RunStore.open(folder) as store:  # reading is always possible
            assert len(store.evaluations()) == 1
    finally:
        release.set()
        thread.join()
    go_on(folder)


def test_a_lock_that_outlives_its_search_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does for a moment in a worker that was being started when the search was killed."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run = RunDirectory(tmp_path)
    run.lock.write_text(f"{gone.pid}\n")
    descriptor = os.open(run.lock, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    monkeypatch.setattr(directory_module, "_SECONDS_FOR_DYING_WORKERS", 0.1)
    with pytest.raises(RunInUse, match=f"in use by process {gone.pid}"), run.locked():
        pass
    monkeypatch.setattr(directory_module, "_SECONDS_FOR_DYING_WORKERS", 60.0)
    end = threading.Timer(0.2, os.close, [descriptor])
    end.start()
    with run.locked():
        assert run.lock.read_text() == f"{os.getpid()}\n"
    end.join()


def test_a_lock_file_with_nonsense_in_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.lock.write_bytes(b"\xff\x1b[31m" * 1000)
    with run.locked():
        assert run.lock.read_text() == f"{os.getpid()}\n"
        with pytest.raises(RunInUse), RunDirectory(tmp_path).locked():
            pass


def test_the_corpus_is_opened_before_anything_is_recorded(tmp_path: Path) -> None:
    def missing(settings: Any) -> CorpusRecord:
        raise ValueError("data 'x': can't be read")

    with pytest.raises(ValueError, match="data 'x'"):
        begin(tmp_path / "run", open_corpus=missing)
    begin(tmp_path / "run", settings=small_settings(generations=1, population=2))


def test_ray_is_asked_for_in_one_line_when_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    settings = small_settings(generations=1, population=2, engine="ray")
    refused(lambda: begin(tmp_path / "run", settings=settings), "pip install 'star-kernels[ray]'")
    # The run is begun, and may go on with local workers.
    go_on(tmp_path / "run", engine="local")


def test_nothing_is_unpickled() -> None:
    folder = Path(run_module.__file__).parent
    for path in folder.glob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text
        assert "torch.load" not in text
