"""A table of evaluated genomes: one Parquet or CSV file that grows with every run.

One row a genome, conditions, seed and device. Columns:

    genome       canonical genome
    depth        its LIVs
    conditions   hash of all that decides the values but the seed (model, proxy, text, recall task); values of
                 different conditions must not be compared
    seed         of weights and data order
    device       whose table objectives of a device were predicted from: chip and checksum; empty without any
    origin       "random", "offspring", "baseline:NAME" or "reference:NAME"
    status       "ok" or "failed"
    reason       why it failed
    seconds      of the evaluation, with all its trainings
    NAME         one column an objective, empty where it was not measured: quality, size, cache, flops, …
    curve        the learning curve as JSON, rows of (step, training, held-out or null) in bits per byte
    settings     the conditions as JSON
    checksum     of all that the row says (`checksum_of`); files from before there was one are read without

A table may come from someone else: everything that is read is checked.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from star.genome import Genome, GenomeError
from star.profile.table import ProfileTable
from star.search.errors import RunError
from star.search.objectives import OBJECTIVES, find
from star.search.settings import SearchSettings
from star.search.store import Evaluation, RunStore, canonical_json

__all__ = [
    "Row",
    "TableDamaged",
    "checksum_of",
    "conditions_name",
    "conditions_of",
    "device_label",
    "extend",
    "main_conditions",
    "read",
    "rows_of_run",
    "write",
]

SUFFIXES = (".parquet", ".csv")
FIXED = ("genome", "depth", "conditions", "seed", "device", "origin", "status", "reason", "seconds")
TEXTS = ("curve", "settings")
CHECKSUM = "checksum"
_BYTES_AT_MOST = 1 << 30
_RANGES = {"quality": (0.0, 100.0), "recall": (0.0, 1.0)}  # a guess at random takes 8 bits per byte
_LARGEST = 1e18  # of anything else: sizes, bytes, times
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_@")  # @ as in ttft@32768


class TableDamaged(ValueError):
    """A file is no table of evaluated genomes, or damaged; one line."""


@dataclass(frozen=True)
class Row:
    """One evaluated genome; see the module."""

    genome: str
    conditions: str
    seed: int
    origin: str
    status: str
    reason: str
    seconds: float
    objectives: Mapping[str, float]
    curve: tuple[Any, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    device: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def training(self) -> tuple[str, str, int]:
        """What decides all values but those of a device."""
        return self.genome, self.conditions, self.seed

    @property
    def identity(self) -> tuple[str, str, int, str]:
        return (*self.training, self.device)


def checksum_of(row: Row) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the row's canonical JSON.

    Of values and not of bytes: equal rows have equal checksums in every format, whatever columns others have.
    """
    plain = {
        **vars(row),
        "seconds": _finite(row.seconds),
        "objectives": {name: _finite(value) for name, value in row.objectives.items()},
        "curve": list(row.curve),
        "settings": dict(row.settings),
    }
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:16]


# ---- from runs -----------------------------------------------------------------------------------------


def conditions_of(settings: SearchSettings, corpus_key: str) -> dict[str, Any]:
    """What must be equal for two evaluations of a genome to be comparable, the seed apart."""
    plain = settings.to_json()
    proxy = {
        name: value for name, value in plain["proxy"].items() if name not in ("seed", "threads", "device")
    }
    return {"model": plain["model"], "proxy": proxy, "recall": plain["recall"], "corpus": corpus_key}


def conditions_name(conditions: Mapping[str, Any]) -> str:
    """The column `conditions` of rows with these settings."""
    return hashlib.sha256(canonical_json(dict(conditions)).encode()).hexdigest()[:12]


def rows_of_run(run: Path) -> list[Row]:
    """The evaluations of a run, failed ones and references among them; not those that were stopped at a rung,
    whose values compare with no others.

    Raises:
        RunError: there is no run, or it has evaluated nothing.
        RunDamaged: its record is damaged.
    """
    with RunStore.open(run) as store:
        evaluations, settings = store.evaluations(), store.settings()
        data = store.facts().get("data")
    if not evaluations:
        raise RunError(f"{run} has evaluated no candidate yet: there is nothing to add to a table")
    key = str(data.get("key")) if isinstance(data, dict) else ""
    conditions = conditions_of(settings, key)
    name = conditions_name(conditions)
    device = "" if settings.profile is None else device_label(settings.profile)
    return [
        _row(item, name, conditions, settings.proxy.seed, device) for item in evaluations if not item.stopped
    ]


def device_label(table: ProfileTable) -> str:
    """A row's `device`: whose table its latencies were predicted from."""
    return f"{table.device_name} {table.checksum[:12]}"


def _row(item: Evaluation, name: str, conditions: Mapping[str, Any], seed: int, device: str) -> Row:
    row = Row(
        genome=item.key,
        conditions=name,
        seed=seed,
        origin=item.origin,
        status=item.status,
        reason=item.reason or "",
        seconds=round(item.seconds, 3),
        objectives=dict(item.objectives),
        curve=item.curve,
        settings=conditions,
        device=device,
    )
    return without_absurd_values(row)


def without_absurd_values(row: Row) -> Row:
    """The row, or a failed one if a value is out of its range: a training that went astray without a NaN."""
    try:
        _require_ranges(row.objectives)
    except ValueError as error:
        return replace(row, status="failed", reason=str(error), objectives={})
    return row


def extend(path: Path, rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Add rows to the table, which is made if it is missing. Rows that it holds already stay as they are, but
    gain the objectives that they lack; a row without a device is one with those of any device.

    Returns:
        all rows, and how many of them are new.

    Raises:
        TableDamaged: the file is no table.
        OSError: it can not be written; it is then as it was.
    """
    require_suffix(path)
    every = read(path) if path.exists() else []
    before = len(every)
    places: dict[tuple[str, str, int], list[int]] = {}
    for place, row in enumerate(every):
        places.setdefault(row.training, []).append(place)
    for row in rows:
        known = places.setdefault(row.training, [])
        same = [place for place in known if every[place].device == row.device]
        # Without a device on either side, the rows differ by nothing that was trained.
        same = same or [place for place in known if "" in (row.device, every[place].device)]
        for place in same:
            every[place] = _merged(every[place], row)
        if not same:
            known.append(len(every))
            every.append(row)
    write(path, every)
    return every, len(every) - before


def _merged(old: Row, new: Row) -> Row:
    """The old row with what it lacks: a device, objectives, or a training that did not fail."""
    device = old.device or new.device
    if new.ok and not old.ok:
        return replace(new, device=device)
    if not new.ok:
        return replace(old, device=device)
    return replace(old, device=device, objectives={**new.objectives, **old.objectives})


def main_conditions(rows: Sequence[Row]) -> str:
    """The conditions that most rows have; of equals, the first."""
    return Counter(row.conditions for row in rows).most_common(1)[0][0]


# ---- the file ------------------------------------------------------------------------------------------


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Names of all columns: the fixed ones, the objectives that any row has, the long texts."""
    found = {name for row in rows for name in row.objectives}
    ordered = [name for name in OBJECTIVES if name in found] + sorted(found - OBJECTIVES.keys())
    return [*FIXED, *ordered, *TEXTS, CHECKSUM]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write the table whole, or leave what is there. Equal rows give equal bytes.

    Raises:
        ValueError: the name ends in neither .parquet nor .csv, or a row that `read` would refuse.
        OSError: it can not be written.
    """
    require_suffix(path)
    for row in rows:
        _require_sound(row)
    columns = columns_of(rows)
    plain = [_to_plain(row, columns) for row in rows]
    data = _csv_bytes(columns, plain) if path.suffix == ".csv" else _parquet_bytes(columns, plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read(path: Path) -> list[Row]:
    """All rows of a table.

    Raises:
        TableDamaged: the file is none, or damaged; the message names the row.
        ValueError: there is no such file, or its name ends in neither .parquet nor .csv.
    """
    require_suffix(path)
    if not path.is_file():
        raise ValueError(f"table {path} does not exist")
    if path.stat().st_size > _BYTES_AT_MOST:
        raise TableDamaged(f"table {path} is larger than {_BYTES_AT_MOST} bytes")
    plain = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    rows = [_to_row(path, number, record) for number, record in enumerate(plain, start=1)]
    seen: set[tuple[str, str, int, str]] = set()
    for number, row in enumerate(rows, start=1):
        if row.identity in seen:
            raise TableDamaged(f"table {path} is damaged: row {number} repeats another one")
        seen.add(row.identity)
    return rows


def require_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"table is {str(path)!r}, takes a name that ends in {' or '.join(SUFFIXES)}")


def _to_plain(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    fixed = {
        "genome": row.genome,
        "depth": row.genome.count("-") + 1,
        "conditions": row.conditions,
        "seed": row.seed,
        "device": row.device,
        "origin": row.origin,
        "status": row.status,
        "reason": row.reason,
        "seconds": _finite(row.seconds),
        "curve": canonical_json(list(row.curve)),
        "settings": canonical_json(dict(row.settings)),
        CHECKSUM: checksum_of(row),
    }
    # As they are read back, so that a file does not change by being read and written.
    measured = {name: _finite(value) for name, value in row.objectives.items()}
    objectives = {name: measured.get(name) for name in columns if name not in fixed}
    return {name: fixed[name] if name in fixed else objectives[name] for name in columns}


def _to_row(path: Path, number: int, record: Mapping[str, Any]) -> Row:
    where = f"table {path} is damaged: row {number}"
    try:
        genome = Genome.parse(record["genome"]).require_valid()
        curve, settings = json.loads(record["curve"]), json.loads(record["settings"])
        if not isinstance(curve, list):
            raise ValueError("its curve is no list")
        row = Row(
            genome=record["genome"],
            conditions=record["conditions"],
            seed=int(record["seed"]),
            origin=record["origin"],
            status=record["status"],
            reason=record["reason"],
            seconds=_finite(record["seconds"]),
            objectives={
                name: _finite(value)
                for name, value in record.items()
                if name not in (*FIXED, *TEXTS, CHECKSUM) and value not in (None, "")
            },
            curve=tuple(curve),
            settings=settings,
            device=record["device"],
        )
        if genome.key != row.genome or int(record["depth"]) != genome.depth:
            raise ValueError("its genome is not in canonical form, or of another depth")
        _require_sound(row)
        if CHECKSUM in record and record[CHECKSUM] != checksum_of(row):
            raise ValueError(f"its checksum is {record[CHECKSUM]!r}, that of its values {checksum_of(row)!r}")
    except (GenomeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TableDamaged(f"{where}: {reason}") from error
    except RecursionError as error:
        raise TableDamaged(f"{where}: its curve or settings are nested too deeply") from error
    return row


def _require_sound(row: Row) -> None:
    """Refuse, with ValueError, a row that no training gives."""
    if row.status not in ("ok", "failed") or row.ok == (not row.objectives):
        raise ValueError(f"its status {row.status!r} does not fit its values")
    if not isinstance(row.settings, Mapping):
        raise ValueError("its settings are no object")
    if row.conditions != conditions_name(row.settings):
        raise ValueError(f"its conditions {row.conditions!r} are not those of its settings")
    if row.seed < 0 or row.seconds < 0:
        raise ValueError(f"its seed is {row.seed} and its seconds {row.seconds}, takes 0 or more")
    _require_ranges(row.objectives)


def _require_ranges(objectives: Mapping[str, float]) -> None:
    for name, value in objectives.items():
        low, high = _RANGES.get(name, (-_LARGEST if find(name) is None else 0.0, _LARGEST))
        if not low <= value <= high:
            raise ValueError(f"{name} is {value!r}, takes {low:g} to {high:g}")


def _finite(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{value!r} is no finite number")
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _check_columns(path: Path, names: Sequence[str]) -> None:
    missing = [name for name in (*FIXED, *TEXTS) if name not in names]
    if missing:
        raise TableDamaged(f"table {path} is none of evaluated genomes: the column {missing[0]} is missing")
    strange = [name for name in names if not set(name) <= _NAME_CHARACTERS or names.count(name) > 1]
    if strange:
        raise TableDamaged(f"table {path} is damaged: the column {strange[0][:40]!r} is none of a table")


def _csv_bytes(columns: Sequence[str], plain: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return text.getvalue().encode()


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(1 << 24)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_columns(path, list(reader.fieldnames or ()))
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise TableDamaged(f"table {path} is damaged: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(rows, start=1):
        if None in row or any(value is None for value in row.values()):
            raise TableDamaged(f"table {path} is damaged: row {number} has not as many fields as columns")
    return rows


def _parquet_bytes(columns: Sequence[str], plain: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    kinds = {"depth": pyarrow.int32(), "seed": pyarrow.int64()}
    texts = {"genome", "conditions", "device", "origin", "status", "reason", *TEXTS, CHECKSUM}
    schema = pyarrow.schema(
        [
            (name, kinds.get(name, pyarrow.string() if name in texts else pyarrow.float64()))
            for name in columns
        ]
    )
    table = pyarrow.Table.from_pylist(
        [{name: _as(schema.field(name).type, value) for name, value in row.items()} for row in plain], schema
    )
    data = io.BytesIO()
    parquet.write_table(table, data, compression="zstd")
    return data.getvalue()


def _as(kind: Any, value: Any) -> Any:
    return float(value) if str(kind) == "double" and value is not None else value


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    data = path.read_bytes()
    try:
        table = parquet.read_table(io.BytesIO(data))
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, ArithmeticError, LookupError) as error:
        # What pyarrow can not make sense of is an OSError too; the file itself has been read by now.
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TableDamaged(f"table {path} is no Parquet file or damaged: {line}") from error
    _check_columns(path, table.column_names)
    return rows
