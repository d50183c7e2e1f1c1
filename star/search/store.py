"""The record of a run: one SQLite file in write-ahead mode, append-only.

Four tables, all of them only ever inserted into (triggers see to it):

    run           name, value: what the run is (settings, evaluator, corpus, versions), written once
    evaluations   one row a candidate that was trained, in any order; ids are given in the order of asking
    populations   one row a generation: the keys of its survivors
    events        what happened and how long it took; nothing in it decides anything

Every row goes in within its own transaction, synchronised to the disk, so a process that is killed at any
instant leaves each row whole or absent. The archive (`RunStore.archive`) is everything that a run decides:
all but times and events. Two runs of the same settings, one of them killed and resumed as often as you
like, have the same archive, byte for byte.

A run.db may come from someone else. The schema must be exactly ours (no foreign triggers or views), values
are limited in size before they are parsed, JSON may hold no NaN, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from star.proxy import is_remark
from star.search.errors import DiskFull, RunDamaged, RunError, is_disk_full
from star.search.settings import SearchSettings

__all__ = ["Evaluation", "RunStore", "StoredEvent", "canonical_json"]

APPLICATION_ID = 0x53544152  # "STAR", so that file(1) and we know a run from another SQLite file
FORMAT = 1
VALUE_BYTES_AT_MOST = 4 << 20
_ORIGIN = re.compile(r"random|offspring|(baseline|reference):[A-Za-z0-9_+.-]{1,64}")

_TABLES = (
    "CREATE TABLE run (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE evaluations (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, genome TEXT NOT NULL, "
    "generation INTEGER, origin TEXT NOT NULL, status TEXT NOT NULL, reason TEXT, objectives TEXT NOT NULL, "
    "curve TEXT NOT NULL, seconds REAL NOT NULL, finished_at REAL NOT NULL)",
    "CREATE TABLE populations (generation INTEGER PRIMARY KEY, keys TEXT NOT NULL)",
    "CREATE TABLE events (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, data TEXT NOT NULL, at REAL NOT NULL)",
)
_SCHEMA = _TABLES + tuple(
    f"CREATE TRIGGER {table}_no_{action} BEFORE {action.upper()} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
    for table in ("run", "evaluations", "populations", "events")
    for action in ("update", "delete")
)


@dataclass(frozen=True)
class Evaluation:
    """One trained candidate, as it was measured.

    Attributes:
        id: in the order in which the search asked for candidates, from 0.
        key: the canonical genome; no two evaluations of a run have the same.
        genome: the genome as it was proposed.
        generation: from 0; None for a reference, which belongs to no generation.
        origin: "random", "offspring", "baseline:NAME" or "reference:NAME".
        status: "ok", "failed", or "stopped" at a rung (star.search.rungs).
        reason: why it failed or was stopped; None when it was trained to its end, unless its quality could
            not be extrapolated as was asked for.
        objectives: name -> measured value, in the objective's own direction; empty when it failed. When it
            was stopped, quality is that of the unfinished training, and what takes another one is missing.
        curve: the learning curve, rows as the evaluator gave them.
        seconds: wall time of the evaluation, in the worker.
        finished_at: seconds since 1970.
    """

    id: int
    key: str
    genome: str
    generation: int | None
    origin: str
    status: str
    reason: str | None
    objectives: Mapping[str, float]
    curve: tuple[Any, ...] = ()
    seconds: float = 0.0
    finished_at: float = field(default=0.0, compare=False)

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def failed(self) -> bool:
        return self.status == "failed"

    @property
    def stopped(self) -> bool:
        return self.status == "stopped"


@dataclass(frozen=True)
class StoredEvent:
    """One line of the run's diary: `data` depends on `kind`; `at` is seconds since 1970."""

    kind: str
    data: Mapping[str, Any]
    at: float


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no NaN or infinity (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


class RunStore:
    """Reads and appends to the record of one run. One process writes; any number may read meanwhile."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    # ---- opening -------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, facts: Mapping[str, Any]) -> RunStore:
        """Begin a record: the schema and the facts of the run in one transaction.

        A file that an earlier call left without any table (killed in between) is taken over.

        Raises:
            RunError: the file already holds something.
            DiskFull: there is no room.
        """
        with _translated(path):
            connection = _connect(path, write=True)
            if _schema(connection):
                connection.close()
                raise RunError(f"{path} already holds a search: continue it with: star resume {path.parent}")
            store = cls(path, connection)
            with store._transaction():
                for statement in _SCHEMA:
                    connection.execute(statement)
                for name, value in {"format": FORMAT, **facts}.items():
                    connection.execute("INSERT INTO run VALUES (?, ?)", (name, canonical_json(value)))
                # Not writable inside a transaction in old versions of SQLite: user_version is, and both are
                # only labels, since _check compares the schema itself.
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        return store

    @staticmethod
    def begun(path: Path) -> bool:
        """Whether a file is there and holds anything (one that a killed process left empty does not)."""
        if not path.is_file() or path.stat().st_size == 0:
            return False
        with _translated(path):
            connection = _connect(path, write=True)
            try:
                return bool(_schema(connection))
            finally:
                connection.close()

    @classmethod
    def open(cls, path: Path | str, *, write: bool = False) -> RunStore:
        """Open the record of a run, given its directory or its run.db.

        Raises:
            RunError: nothing was recorded there yet.
            RunDamaged: the file is no record of a search, or damaged.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "run.db"
        if path.is_symlink():
            raise RunDamaged(f"{path} is a symbolic link: a run directory must hold its own files")
        if not path.is_file() or path.stat().st_size == 0:
            raise RunError(f"{path.parent} holds no search: begin one with: star search {path.parent}")
        with _translated(path):
            connection = _connect(path, write=write)
            try:
                _check(path, connection)
            except BaseException:
                connection.close()
                raise
        return cls(path, connection)

    def close(self) -> None:
        with _translated(self.path):
            self._connection.close()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- reading -------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What was recorded when the run began: format, settings, evaluator, corpus, versions."""
        return {name: self._parse("run", name, value) for name, value in self._rows("SELECT * FROM run")}

    def settings(self) -> SearchSettings:
        """The search that is recorded, with the workers it began with.

        Raises:
            RunDamaged: they are not what a search records.
        """
        facts = self.facts()
        try:
            return SearchSettings.from_json({**facts["settings"], **facts["execution"]})
        except (KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunDamaged(f"{self.path} is damaged or of another version of star: {reason}") from error

    def evaluations(self) -> list[Evaluation]:
        """All evaluations, by id."""
        rows = self._rows(
            "SELECT id, key, genome, generation, origin, status, reason, objectives, curve, seconds, "
            "finished_at FROM evaluations ORDER BY id"
        )
        return [self._evaluation(row) for row in rows]

    def references(self) -> dict[str, Evaluation]:
        """The reference layouts that were trained, by name."""
        split = ((evaluation.origin.partition(":"), evaluation) for evaluation in self.evaluations())
        return {name: evaluation for (kind, _, name), evaluation in split if kind == "reference"}

    def populations(self) -> list[tuple[str, ...]]:
        """The survivors' keys of each finished generation, from generation 0."""
        populations: list[tuple[str, ...]] = []
        for generation, text in self._rows("SELECT generation, keys FROM populations ORDER BY generation"):
            keys = self._parse("populations", generation, text)
            if generation != len(populations) or not _is_list_of_text(keys):
                raise RunDamaged(f"{self.path} is damaged: population {generation!r} is no list of keys")
            populations.append(tuple(keys))
        return populations

    def events(self, kind: str | None = None) -> list[StoredEvent]:
        """What happened, in order; of one kind, or of all."""
        events = []
        for id, name, data, at in self._rows("SELECT id, kind, data, at FROM events ORDER BY id"):
            parsed = self._parse("events", id, data)
            if not (isinstance(name, str) and isinstance(parsed, dict) and _is_finite_number(at)):
                raise RunDamaged(f"{self.path} is damaged: events row {id!r} is not what a search writes")
            events.append(StoredEvent(name, parsed, at))
        return [event for event in events if kind in (None, event.kind)]

    def overhead(self) -> tuple[float, float]:
        """(seconds beside training, seconds in all) of the generations that were finished in one session.

        Beside training: selecting, varying, and writing the record, in the searching process, while workers
        may be training all the same.
        """
        generations = [event.data for event in self.events("generation")]
        spent = ("vary_seconds", "select_seconds", "store_seconds")
        beside = sum(float(data.get(name, 0.0)) for data in generations for name in spent)
        return beside, sum(float(data.get("seconds", 0.0)) for data in generations)

    def archive(self) -> bytes:
        """Everything that the run decided, as JSON lines without times: equal for equal searches."""
        facts = self.facts()
        lines: list[dict[str, Any]] = [{name: facts.get(name) for name in ("settings", "evaluator", "data")}]
        lines += [
            {
                "id": evaluation.id,
                "key": evaluation.key,
                "genome": evaluation.genome,
                "generation": evaluation.generation,
                "origin": evaluation.origin,
                "status": evaluation.status,
                "reason": evaluation.reason,
                "objectives": dict(evaluation.objectives),
                "curve": list(evaluation.curve),
            }
            for evaluation in self.evaluations()
        ]
        lines += [
            {"population": generation, "keys": list(keys)}
            for generation, keys in enumerate(self.populations())
        ]
        return "".join(canonical_json(line) + "\n" for line in lines).encode("ascii")

    # ---- appending -----------------------------------------------------------------------------------

    def append_evaluation(self, evaluation: Evaluation) -> None:
        values = (
            evaluation.id,
            evaluation.key,
            evaluation.genome,
            evaluation.generation,
            evaluation.origin,
            evaluation.status,
            evaluation.reason,
            canonical_json(dict(evaluation.objectives)),
            canonical_json(list(evaluation.curve)),
            evaluation.seconds,
            evaluation.finished_at,
        )
        self._insert("evaluations", values)

    def append_population(self, generation: int, keys: tuple[str, ...]) -> None:
        self._insert("populations", (generation, canonical_json(list(keys))))

    def append_event(self, kind: str, **data: Any) -> None:
        self._insert("events", (None, kind, canonical_json(data), time.time()))

    def _insert(self, table: str, values: tuple[Any, ...]) -> None:
        with _translated(self.path), self._transaction():
            places = ", ".join("?" * len(values))
            self._connection.execute(f"INSERT INTO {table} VALUES ({places})", values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite has already rolled back after a full disk
                self._connection.execute("ROLLBACK")
            raise

    # ---- parsing what is not trusted -----------------------------------------------------------------

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        with _translated(self.path):
            return self._connection.execute(query).fetchall()

    def _parse(self, table: str, row: object, text: object) -> Any:
        try:
            if not isinstance(text, str):
                raise ValueError(f"{type(text).__name__} instead of text")
            return json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise RunDamaged(f"{self.path} is damaged: {table} row {row!r} is not JSON: {reason}") from error

    def _evaluation(self, row: tuple[Any, ...]) -> Evaluation:
        id, key, genome, generation, origin, status, reason, objectives, curve, seconds, finished_at = row
        measured = self._parse("evaluations", id, objectives)
        points = self._parse("evaluations", id, curve)
        sound = (
            isinstance(id, int)
            and id >= 0
            and isinstance(key, str)
            and isinstance(genome, str)
            and (generation is None or (isinstance(generation, int) and generation >= 0))
            and isinstance(origin, str)
            and _ORIGIN.fullmatch(origin) is not None
            and status in ("ok", "failed", "stopped")
            and (reason is None or is_remark(reason) if status == "ok" else isinstance(reason, str))
            and isinstance(measured, dict)
            and all(_is_finite_number(value) for value in measured.values())
            and isinstance(points, list)
            and _is_finite_number(seconds)
            and _is_finite_number(finished_at)
        )
        if not sound:
            raise RunDamaged(f"{self.path} is damaged: evaluations row {id!r} is not what a search writes")
        return Evaluation(
            id, key, genome, generation, origin, status, reason, measured, tuple(points), seconds, finished_at
        )


def _is_finite_number(value: object) -> bool:
    # By comparison, since math.isfinite raises for integers beyond every float.
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= largest


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _connect(path: Path, *, write: bool) -> sqlite3.Connection:
    """A connection without implicit transactions. A reader may have to recover the write-ahead log of a
    killed search, which needs write access to the folder; where there is none, and no log either, the file
    is read as it is."""
    uri = path.resolve().as_uri()
    if write:
        query = "mode=rwc"
    elif os.access(path.parent, os.W_OK) or path.with_name(path.name + "-wal").exists():
        query = "mode=rw"
    else:
        query = "immutable=1"
    connection = sqlite3.connect(f"{uri}?{query}", uri=True, timeout=30.0, isolation_level=None)
    try:
        connection.execute("PRAGMA trusted_schema = OFF")
        if write:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        else:
            connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _schema(connection: sqlite3.Connection) -> set[str]:
    # Indexes that SQLite makes itself for UNIQUE have no text.
    return {row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}


def _check(path: Path, connection: sqlite3.Connection) -> None:
    schema = _schema(connection)
    if not schema:
        raise RunError(f"{path.parent} holds no search: begin one with: star search {path.parent}")
    if schema != set(_SCHEMA):
        raise RunDamaged(f"{path} is not the record of a search (or of another version of star)")
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise RunDamaged(f"{path} is damaged: {str(problem).splitlines()[-1]}")
    for table, columns in {
        "run": ("name", "value"),
        "evaluations": ("key", "genome", "origin", "status", "reason", "objectives", "curve"),
        "populations": ("keys",),
        "events": ("kind", "data"),
    }.items():
        too_long = " OR ".join(f"length(CAST({name} AS BLOB)) > {VALUE_BYTES_AT_MOST}" for name in columns)
        if connection.execute(f"SELECT 1 FROM {table} WHERE {too_long} LIMIT 1").fetchone():
            raise RunDamaged(f"{path} is damaged: {table} has a value of over {VALUE_BYTES_AT_MOST} bytes")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, one line each."""
    try:
        yield
    except (sqlite3.Error, UnicodeError) as error:
        if is_disk_full(error):
            raise DiskFull(path, path.parent) from error
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            raise RunError(f"{path} is locked by another program") from error
        if isinstance(error, sqlite3.IntegrityError):
            raise RunError(f"{path} refused a row: {error}") from error
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        # A text that is no Unicode is an OperationalError, like much that is no damage.
        if not isinstance(error, sqlite3.OperationalError) or "decode" in line:
            raise RunDamaged(f"{path} is damaged or not the record of a search: {line}") from error
        raise RunError(f"{path} can not be used: {line}") from error
