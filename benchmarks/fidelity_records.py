"""Records of `benchmarks.fidelity`: JSON lines while it trains, one CSV file to keep."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.fidelity_plan import Plan, Training
from star.proxy import CurvePoint, Outcome, ProxySettings

CLOCK = ("build_seconds", "step_seconds", "evaluation_seconds")
COLUMNS = ("training", "genome", "seed", "corpus", "status", "reason", "curve", "seconds", *CLOCK)

Key = tuple[str, str, int]
"""Training, genome, seed."""


class RecordError(ValueError):
    """Records that can not be read, or are of something else."""


@dataclass(frozen=True)
class Record:
    """One training. The clock's parts are processor seconds, NaN where they were not taken: of building the
    model, of one step, of one evaluation. `seconds` went by in all."""

    training: str
    genome: str
    seed: int
    corpus: str
    status: str
    reason: str
    curve: tuple[CurvePoint, ...]
    seconds: float
    build_seconds: float = math.nan
    step_seconds: float = math.nan
    evaluation_seconds: float = math.nan

    @property
    def key(self) -> Key:
        return self.training, self.genome, self.seed

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def processor_seconds(self) -> float:
        """Of the whole training; the clock's where it was taken."""
        evaluations = sum(point.validation is not None for point in self.curve)
        steps = self.curve[-1].step if self.curve else 0
        total = self.build_seconds + steps * self.step_seconds + evaluations * self.evaluation_seconds
        return self.seconds if math.isnan(total) else total


def to_line(
    training: Training,
    genome: str,
    settings: ProxySettings,
    corpus: str,
    outcome: Outcome,
    clock: Mapping[str, float],
) -> str:
    """What `from_line` reads, with the newline."""
    value = {
        "genome": genome,
        "choice": training.name,
        "seed": settings.seed,
        "settings": settings.to_json(),
        "model": training.config.to_json(),
        "corpus": corpus,
        "outcome": outcome.to_json(),
        "clock": dict(clock),
    }
    return json.dumps(value) + "\n"


def from_line(line: str, plan: Plan) -> Record:
    """The record that `to_line` wrote.

    Raises:
        RecordError: no record, or one of other settings than the plan's.
    """
    try:
        value = json.loads(line)
        return _from_json(value, plan)
    except RecordError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(f"no record: {error!r}") from None


def read(paths: Iterable[Path], plan: Plan) -> dict[Key, Record]:
    """The records of all files that exist, by training, genome and seed; the first of equal ones counts.

    Raises:
        RecordError: a line or row that is no record, or is of other settings than the plan's.
        OSError: a file that can not be read.
    """
    found: dict[Key, Record] = {}
    for path in paths:
        if not path.exists():
            continue
        for place, record in _rows(path, plan) if path.suffix == ".csv" else _lines(path, plan):
            training = plan.trainings.get(record.training)
            if training is None:
                raise RecordError(f"{path}:{place}: training {record.training!r} is not in the plan")
            if record.seed not in training.seeds or record.genome not in map(str, training.genomes):
                raise RecordError(
                    f"{path}:{place}: genome {record.genome} with seed {record.seed} is not in the plan"
                )
            found.setdefault(record.key, record)
    if len(corpora := {record.corpus for record in found.values()}) > 1:
        raise RecordError(f"records are of {len(corpora)} texts, take one")
    return found


def _lines(path: Path, plan: Plan) -> Iterable[tuple[int, Record]]:
    text = path.read_text("utf-8")
    # A killed run may have left half a line behind.
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            yield number, from_line(line, plan)
        except RecordError as error:
            raise RecordError(f"{path}:{number}: {error}") from None


def _from_json(value: Mapping[str, Any], plan: Plan) -> Record:
    name, outcome = value["choice"], Outcome.from_json(value["outcome"])
    training = plan.trainings.get(name)
    if training is None:
        raise RecordError(f"training {name!r} is not in the plan")
    expected = {**training.settings.to_json(), "seed": value["seed"]}
    if ProxySettings.from_json(value["settings"]).to_json() != expected:
        raise RecordError(f"{name!r} was trained with other settings than the plan's")
    if value["model"] != training.config.to_json():
        raise RecordError(f"{name!r} was trained with another model configuration than the plan's")
    return Record(
        name,
        value["genome"],
        value["seed"],
        value["corpus"],
        outcome.status,
        outcome.reason,
        outcome.curve,
        outcome.seconds,
        **value.get("clock", {}),
    )


def write_csv(records: Iterable[Record], path: Path) -> None:
    """All records, sorted, curves as step:train:validation with spaces; `read` reads it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for record in sorted(records, key=lambda item: item.key):
            points = (
                f"{point.step}:{point.train:.6g}:{'' if point.validation is None else repr(point.validation)}"
                for point in record.curve
            )
            row = asdict(record) | {"curve": " ".join(points)}
            row |= {name: _short(row[name]) for name in ("seconds", *CLOCK)}
            writer.writerow([row[name] for name in COLUMNS])


def _short(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _rows(path: Path, plan: Plan) -> Iterable[tuple[int, Record]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise RecordError(f"{path}: columns are {reader.fieldnames}, take {', '.join(COLUMNS)}")
        for row in reader:
            try:
                clock = {name: float(row[name] or "nan") for name in CLOCK}
                points = (point.split(":") for point in row["curve"].split())
                yield (
                    reader.line_num,
                    Record(
                        row["training"],
                        row["genome"],
                        int(row["seed"]),
                        row["corpus"],
                        row["status"],
                        row["reason"],
                        tuple(CurvePoint(int(s), float(t), float(v) if v else None) for s, t, v in points),
                        float(row["seconds"]),
                        **clock,
                    ),
                )
            except (ValueError, TypeError) as error:
                raise RecordError(f"{path}:{reader.line_num}: no record: {error}") from None
