"""Runs survive kills, interrupts and full disks, and end with the archive that they would have had anyway."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic import settings as small_settings
from test_search_run import ENVIRONMENT, archive, begin, go_on, refused
from test_search_run import whole as whole
from test_search_workers import is_running, wait_until

from star.search.directory import RunDirectory
from star.search.errors import DiskFull
from star.search.store import RunStore

# ---- kills ---------------------------------------------------------------------------------------------

DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import synthetic
from star.search import RunError, RunStore, resume, search
import star.search.loop  # before the fork, so that the kills fall into the search and not into imports

def work(folder, settings):
    options = {"evaluator": "synthetic:slow_score", "open_corpus": synthetic.open_corpus}
    if (folder / "run.db").exists() and RunStore.begun(folder / "run.db"):
        resume(folder, **options)
    else:
        search(settings, folder, **options)

def start(folder, settings):
    process = os.fork()
    if process == 0:
        try:
            work(folder, settings)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return process

root, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
settings = synthetic.settings(population=6, generations=3, workers=2)
began = time.monotonic()
assert os.waitpid(start(root / "whole", settings), 0)[1] == 0
whole = time.monotonic() - began
count, run, survived = 0, 0, []
while count < kills or survived[-1:] == [run]:
    folder = root / str(run)
    process = start(folder, settings)
    if count < kills:
        time.sleep(rng.uniform(0, 1.2 * whole))
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        count += 1
        survived = [run]
        continue
    assert status == 0, status
    run += 1
    survived = []
print(f"{count} kills", *range(run))
"""


def test_twenty_kills_leave_the_archive_as_it_is(tmp_path: Path) -> None:
    """A run is killed at random moments until it finishes all the same, then the next; 20 kills in all."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), "20", "20261"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:2] == ["20", "kills"]
    finished = [tmp_path / name for name in words[2:]]
    assert finished
    expected = archive(tmp_path / "whole")
    assert len(expected.splitlines()) == 1 + 3 + 18 + 3
    for folder in finished:
        assert archive(folder) == expected


def test_control_c_stops_the_process_and_its_workers_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = (
        "import sys, synthetic; from star.search import SearchInterrupted, search\n"
        "try: search(synthetic.settings(), sys.argv[1], evaluator='synthetic:endless', "
        "open_corpus=synthetic.open_corpus)\n"
        "except SearchInterrupted as error: print(error)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    files = [folder / "pid-0", folder / "pid-1"]
    assert wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    workers = [int(file.read_text()) for file in files]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output == f"search stopped; continue with: star resume {folder}\n"
    assert process.returncode == 0
    assert wait_until(lambda: not any(is_running(worker) for worker in workers))
    with RunDirectory(folder).locked():
        pass


# ---- full disks ----------------------------------------------------------------------------------------


def test_a_worker_without_room_stops_the_run_which_goes_on_later(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    refused(
        lambda: begin(folder, "full_disk"), "no room on the disk", f"star resume {folder}", error=DiskFull
    )
    with RunStore.open(folder) as store:
        assert all(item.ok or item.reason.startswith("diverged") for item in store.evaluations())  # type: ignore[union-attr]
    (folder / "room").write_text("")
    go_on(folder, "full_disk")
    with RunStore.open(folder) as store:
        assert len(store.evaluations()) == 15


def test_a_record_without_room_stops_the_run_which_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    settings = small_settings(generations=6)
    begin(whole, settings=settings)
    insert = RunStore._insert
    calls = 0

    def insert_until_full(self: RunStore, *row: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 9:  # no page more than there are
            self._connection.execute("PRAGMA max_page_count = 1")
        insert(self, *row)

    monkeypatch.setattr(RunStore, "_insert", insert_until_full)
    words = ("no room on the disk to write", "run.db", f"star resume {folder}")
    refused(lambda: begin(folder, settings=settings), *words, error=DiskFull)
    refused(lambda: go_on(folder), *words, error=DiskFull)
    monkeypatch.setattr(RunStore, "_insert", insert)
    with RunStore.open(folder) as store:
        assert 0 < len(store.evaluations()) < 39
    go_on(folder)
    assert archive(folder) == archive(whole)


@pytest.mark.parametrize("kilobytes", [1, 40, 90])
def test_every_file_may_be_the_one_without_room(tmp_path: Path, whole: Path, kilobytes: int) -> None:
    """A limit on the size of files makes any write beyond it fail with EFBIG, much as a full disk would."""
    folder = tmp_path / "run"
    code = (
        "import resource, signal, sys; import synthetic; from star.search import RunError, search\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes * 1024}, resource.RLIM_INFINITY))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: search(synthetic.settings(generations=2), sys.argv[1], evaluator='synthetic:score', "
        "open_corpus=synthetic.open_corpus)\n"
        "except RunError as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.startswith("DiskFull no room on the disk to write")
    assert done.stdout.count("\n") == 1
    if RunStore.begun(folder / "run.db"):
        go_on(folder)
    else:
        begin(folder)
    assert archive(folder) == archive(whole)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_config_without_room_leaves_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run = RunDirectory(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    refused(lambda: run.write_config({"a": 1}), "config.json", error=DiskFull)
    assert list(tmp_path.iterdir()) == []
