"""The record: append-only, equal bytes for equal decisions, and no trust in what it reads."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import settings as small_settings

from star.search import store as store_module
from star.search.errors import DiskFull, RunDamaged, RunError
from star.search.store import Evaluation, RunStore, canonical_json

GOOD = Evaluation(
    id=0,
    key="11111",
    genome="11211",
    generation=0,
    origin="random",
    status="ok",
    reason=None,
    objectives={"quality": 0.1, "size": 4096},
    curve=([1, 5.5, None], [2, 4.25, 4.5]),
    seconds=1.5,
    finished_at=7.0,
)
FAILED = replace(
    GOOD, id=2, key="21111", status="failed", reason="diverged", objectives={}, origin="reference:LFM2"
)


def facts() -> dict[str, Any]:
    settings = small_settings()
    return {
        "settings": settings.identity(),
        "execution": {"workers": 2, "engine": "local"},
        "evaluator": "synthetic:score",
        "data": {"key": "0"},
    }


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A record with two evaluations, a population and an event."""
    path = tmp_path / "run.db"
    with RunStore.create(path, facts()) as store:
        store.append_evaluation(FAILED)
        store.append_evaluation(GOOD)
        store.append_population(0, ("11111",))
        store.append_event("generation", seconds=10.0, vary_seconds=0.25, select_seconds=0.5)
    return path


def test_what_is_written_is_read(written: Path) -> None:
    with RunStore.open(written.parent) as store:
        assert store.evaluations() == [GOOD, FAILED]
        assert store.evaluations()[0].finished_at == 7.0
        assert store.references() == {"LFM2": FAILED}
        assert store.populations() == [("11111",)]
        assert store.settings() == small_settings()
        assert [event.kind for event in store.events()] == ["generation"]
        assert store.events("other") == []
        assert store.overhead() == (0.75, 10.0)


def test_the_archive_knows_no_times_and_no_order(tmp_path: Path, written: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with RunStore.create(other / "run.db", {**facts(), "execution": {"workers": 9}}) as store:
        store.append_event("session", process=1)
        store.append_evaluation(replace(GOOD, seconds=99.0, finished_at=99.0))
        store.append_evaluation(FAILED)
        store.append_population(0, ("11111",))
        with RunStore.open(written) as first:
            assert store.archive() == first.archive()
        store.append_population(1, ("11111",))
        with RunStore.open(written) as first:
            assert store.archive() != first.archive()


def test_nothing_can_be_changed_or_recorded_twice(written: Path) -> None:
    with RunStore.open(written, write=True) as store:
        with pytest.raises(RunError, match="UNIQUE"):
            store.append_evaluation(replace(GOOD, id=5))
        with pytest.raises(RunError, match="UNIQUE"):
            store.append_population(0, ())
    connection = sqlite3.connect(written)
    for table in ("run", "evaluations", "populations", "events"):
        for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET rowid = 9"):
            if table == "run":
                statement = statement.replace("rowid = 9", "name = 'x'")
            with pytest.raises(sqlite3.IntegrityError, match=f"{table} is append-only"):
                connection.execute(statement)
    connection.close()


def test_a_reader_changes_nothing(written: Path) -> None:
    with RunStore.open(written) as store, pytest.raises(RunError, match="readonly"):
        store.append_event("no")


def test_no_nan_is_written(written: Path) -> None:
    with RunStore.open(written, write=True) as store, pytest.raises(ValueError, match="Out of range"):
        store.append_evaluation(replace(GOOD, id=9, key="9", objectives={"quality": float("nan")}))


def test_a_second_search_is_not_begun_over_a_first(written: Path) -> None:
    with pytest.raises(RunError, match="already holds a search: continue it with: star resume"):
        RunStore.create(written, facts())


def test_a_file_that_was_left_empty_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    store_module._connect(path, write=True).close()
    assert not RunStore.begun(path)
    with pytest.raises(RunError, match="holds no search"):
        RunStore.open(path)
    RunStore.create(path, facts()).close()
    assert RunStore.begun(path)


def test_a_missing_record(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no search: begin one with: star search"):
        RunStore.open(tmp_path)


def damaged(written: Path, *statements: str) -> None:
    """Change a record behind the search's back: its triggers are dropped and made again."""
    connection = sqlite3.connect(written, isolation_level=None)
    triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        connection.execute(statement)
    for _, sql in triggers:
        connection.execute(sql)
    connection.close()


def read_all(path: Path) -> None:
    with RunStore.open(path) as store:
        store.settings()
        store.archive()
        store.events()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE evaluations SET objectives = '{\"quality\": NaN}'",
        "UPDATE evaluations SET objectives = '{\"quality\": 1e999}'",
        "UPDATE evaluations SET objectives = '{\"quality\": true}'",
        "UPDATE evaluations SET objectives = '[]'",
        "UPDATE evaluations SET objectives = '{'",
        "UPDATE evaluations SET curve = '" + "[" * 100_000 + "'",
        "UPDATE evaluations SET curve = '3'",
        "UPDATE evaluations SET curve = hex(zeroblob(3000000))",
        "UPDATE evaluations SET origin = 'reference:../../etc/passwd'",
        "UPDATE evaluations SET origin = 'elsewhere'",
        "UPDATE evaluations SET status = 'ok' WHERE id = 2",
        "UPDATE evaluations SET status = x'00'",
        "UPDATE evaluations SET status = 'stopped' WHERE id = 0",
        "UPDATE evaluations SET id = -5 WHERE id = 2",
        "UPDATE evaluations SET generation = 'x'",
        "UPDATE evaluations SET seconds = 9e999",
        "UPDATE evaluations SET key = x'ff' WHERE id = 0",
        "UPDATE populations SET generation = 3",
        "UPDATE populations SET keys = '[1]'",
        "UPDATE populations SET keys = x'5b5d'",
        "UPDATE events SET data = '[]'",
        "UPDATE events SET at = 'noon'",
        "UPDATE run SET value = '{\"population\": 1}' WHERE name = 'settings'",
        "UPDATE run SET value = '[]' WHERE name = 'execution'",
        "DELETE FROM run WHERE name = 'settings'",
        "CREATE TRIGGER own AFTER INSERT ON events BEGIN SELECT 1; END",
        "CREATE VIEW other AS SELECT * FROM evaluations",
        "DROP TABLE populations",
    ],
)
def test_wrong_content_is_one_clear_error(written: Path, statement: str) -> None:
    if statement.startswith("DROP TABLE"):
        connection = sqlite3.connect(written)
        connection.execute(statement)
        connection.commit()
        connection.close()
    else:
        damaged(written, statement)
    with pytest.raises(RunDamaged, match=r"^[^\n]+$"):
        read_all(written)


def test_text_that_is_no_unicode(written: Path) -> None:
    damaged(written, "UPDATE evaluations SET reason = CAST(x'ff41' AS TEXT) WHERE id = 2")
    with pytest.raises(RunDamaged, match=r"^[^\n]+$"):
        read_all(written)


def test_truncated_and_flipped_files_never_give_another_error(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    rng = random.Random(7)
    target = tmp_path / "damaged" / "run.db"
    target.parent.mkdir()
    refused = 0
    for case in range(120):
        data = bytearray(whole)
        if case % 2:
            del data[rng.randrange(1, len(data)) :]
        else:
            for _ in range(rng.randrange(1, 40)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        target.write_bytes(data)
        try:
            read_all(target)
        except RunError as error:
            refused += "\n" not in str(error)
        for leftover in target.parent.glob("run.db-*"):
            leftover.unlink()
    assert refused > 60


@pytest.mark.parametrize("content", [b"", b"not a database at all, but text of some length" * 40])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.db").write_bytes(content)
    with pytest.raises(RunError, match=r"^[^\n]+$"):
        RunStore.open(tmp_path)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.abort, ())


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_bytes(pickle.dumps(_Bomb()) * 100)
    with pytest.raises(RunDamaged):
        RunStore.open(tmp_path)


def test_another_database(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "run.db")
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()
    with pytest.raises(RunDamaged, match="not the record of a search"):
        RunStore.open(tmp_path)
    with pytest.raises(RunError, match="already holds"):
        RunStore.create(tmp_path / "run.db", facts())


def test_a_symbolic_link_is_refused(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "run.db").symlink_to(written)
    with pytest.raises(RunDamaged, match="symbolic link"):
        RunStore.open(folder)


def test_a_killed_writers_log_is_read(written: Path, tmp_path: Path) -> None:
    """What a killed process leaves: a write-ahead log that nobody has folded into the database."""
    store = RunStore.open(written, write=True)
    store.append_evaluation(replace(GOOD, id=7, key="7"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in written.parent.glob("run.db*"):
        if not file.name.endswith("-shm"):
            shutil.copy(file, copy)
    store.close()
    assert (copy / "run.db-wal").stat().st_size > 0
    with RunStore.open(copy) as reader:
        assert [evaluation.id for evaluation in reader.evaluations()] == [0, 2, 7]


def test_a_full_disk_is_said_and_loses_nothing(written: Path) -> None:
    store = RunStore.open(written, write=True)
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for id in range(10, 1000):
            store.append_evaluation(replace(GOOD, id=id, key=f"{id}"))

    with pytest.raises(DiskFull, match="make room, then continue with: star resume"):
        fill()
    kept = len(store.evaluations())
    store._connection.execute("PRAGMA max_page_count = 100000")
    store.append_event("room")
    store.close()
    with RunStore.open(written) as reader:
        assert len(reader.evaluations()) == kept > 2


def test_canonical_json() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "ä"}) == '{"a":"\\u00e4","b":[1,2.5,null]}'
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("inf"))


def test_a_record_on_a_disk_that_can_not_be_written(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with RunStore.open(written) as store:
        assert [evaluation.id for evaluation in store.evaluations()] == [0, 2]
        with pytest.raises(RunError, match="readonly"):
            store.append_event("no")
    assert not written.with_name("run.db-wal").exists()
