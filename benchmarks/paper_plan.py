"""What `python -m benchmarks.paper` does, as one plain value, and the files that it keeps in its folder.

    plan.json          the plan; the same command goes on with it, another plan is refused
    environment.json   versions, processor and text that it was begun with
    device.json        the table of the device, which `decode_p50` is predicted from
    NAME/              the run directory of each search
    retrained.jsonl    one line a genome and seed that was trained longer
    drift.jsonl        one line a simulated evolution for a neutral fitness
    measured.jsonl     one line a genome whose whole model was measured on the device
    paper.md, .json    the report, written anew after each stage

The .jsonl files only grow, a whole line at a time, so that a killed process loses the line that it was
writing.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from star.fidelity.settings import longer_training
from star.search import SearchSettings, preset
from star.search.store import canonical_json
from star.training_directory import write_whole

__all__ = ["SEARCHES", "Folder", "Plan", "append_line", "first_difference", "read_lines"]

SEARCHES: dict[str, tuple[str, ...]] = {
    "quality": ("quality",),
    "quality-size": ("quality", "size"),
    "quality-cache": ("quality", "cache"),
    "joint": ("quality", "size", "cache", "decode_p50"),
}
"""The paper's three searches, and the joint one that it did not run."""

FORMAT = 2

HELD_OUT_TIMES = 8
"""A longer training is evaluated on so many times the windows that the search's proxy was."""


def _two_cores() -> SearchSettings:
    """The paper's population, generations and depth, with a proxy of about five seconds a candidate."""
    base = preset("demo", population=16, generations=18, depth=24)
    return replace(base, proxy=replace(base.proxy, steps=50, warmup_steps=5))


@dataclass(frozen=True)
class Plan:
    """Everything that decides the results.

    Attributes:
        search: settings of the searches; objectives and seed are replaced for each.
        best: candidates of each search that are trained longer.
        longer: how many times as many steps, of the proxy and of the recall task.
        seeds: trainings of each, with the seeds that follow the proxy's own.
        drifts: evolutions for a neutral fitness that are simulated for each number of objectives.
        cpu_time: whether the device's table counts processor seconds of one thread instead of the clock's,
            for machines that have something else to do.
        quick: whether it only tries the path.
        preset: of star search that the options named; None for none.

    Raises:
        ValueError: a number below 1, or processor seconds of another device.
    """

    search: SearchSettings = field(default_factory=_two_cores)
    best: int = 8
    longer: int = 5
    seeds: int = 3
    drifts: int = 400
    cpu_time: bool = False
    quick: bool = False
    preset: str | None = None

    def __post_init__(self) -> None:
        for name in ("best", "longer", "seeds", "drifts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, takes an integer of at least 1")
        if self.cpu_time and self.search.measure.device != "cpu":
            raise ValueError(f"processor seconds are for the device cpu, not {self.search.measure.device}")

    def settings_of(self, name: str) -> SearchSettings:
        """The settings of one of `SEARCHES`: its own seed, so that the four are independent samples."""
        seed = self.search.seed + list(SEARCHES).index(name)
        return replace(self.search, objectives=SEARCHES[name], seed=seed, references=True, keep_weights=False)

    def longer_settings(self) -> SearchSettings:
        """The settings of the trainings of the best: quality and recall, with `longer` times the steps.

        They are evaluated on `HELD_OUT_TIMES` the windows.
        """
        proxy, recall = self.search.proxy, self.search.recall
        return replace(
            self.search,
            objectives=("quality", "recall"),
            proxy=replace(
                longer_training(proxy, self.longer),
                validation_batches=proxy.validation_batches * HELD_OUT_TIMES,
            ),
            recall=replace(
                recall, steps=recall.steps * self.longer, warmup_steps=recall.warmup_steps * self.longer
            ),
        )

    def longer_seeds(self) -> list[int]:
        """Seeds of the longer trainings. The proxy's own is none of them, as in a certificate: the luck with
        initialisation and data that a candidate was chosen for must not be found again."""
        first = self.search.proxy.seed + 1
        return [(first + place) % 2**63 for place in range(self.seeds)]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON without what may change from one start to the next: workers and engine.

        Every setting is in it, those too that other records leave out where they are the defaults: a begun
        experiment goes on as it was when defaults change.
        """
        search = self.search
        return {
            "format": FORMAT,
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(self)},
            "search": {
                **search.identity(),
                "proxy": dataclasses.asdict(search.proxy),
                "rungs": list(search.rungs),
                "rung_rivals": search.rung_rivals,
                "rung_confidence": search.rung_confidence,
            },
        }

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: it is not that; one line.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            raise ValueError("is no plan of this version")
        rest = {name: item for name, item in value.items() if name not in ("format", "search")}
        try:
            return cls(search=SearchSettings.from_json(value["search"]), **rest)
        except (KeyError, TypeError) as error:
            raise ValueError(f"is damaged: {error}") from error


@dataclass(frozen=True)
class Folder:
    """The folder of one experiment."""

    path: Path

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def device_file(self) -> Path:
        return self.path / "device.json"

    @property
    def retrained_file(self) -> Path:
        return self.path / "retrained.jsonl"

    @property
    def drift_file(self) -> Path:
        return self.path / "drift.jsonl"

    @property
    def measured_file(self) -> Path:
        return self.path / "measured.jsonl"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def report_files(self) -> tuple[Path, Path]:
        """The page and its numbers."""
        return self.path / "paper.md", self.path / "paper.json"

    def run(self, name: str) -> Path:
        """The run directory of one of `SEARCHES`."""
        return self.path / name

    def begin(self, plan: Plan) -> None:
        """Record the plan, or see that it is the recorded one.

        Raises:
            ValueError: another plan was begun here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.plan_file.exists():
            there, given = self.plan().to_json(), plan.to_json()
            difference = first_difference(there, given)
            if difference:
                raise ValueError(f"{self.path} holds an experiment with other settings: {difference}")
            return
        write_whole(self.plan_file, (json.dumps(plan.to_json(), indent=1) + "\n").encode())

    def plan(self) -> Plan:
        """The recorded plan.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        try:
            return Plan.from_json(json.loads(self.plan_file.read_bytes()))
        except FileNotFoundError:
            raise ValueError(f"{self.path} holds no experiment: {self.plan_file} is missing") from None
        except ValueError as error:
            raise ValueError(f"{self.plan_file} {str(error).splitlines()[0]}") from error


def first_difference(there: Any, given: Any, name: str = "") -> str | None:
    """Where two JSON values differ first, as "search.proxy.steps is 50 there, 80 here"."""
    if isinstance(there, dict) and isinstance(given, dict):
        for key in sorted({*there, *given}):
            found = first_difference(there.get(key), given.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if there == given else f"{name} is {there!r} there, {given!r} here"


# ---- files that only grow ------------------------------------------------------------------------------


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one line of JSON, on the disk when this returns. A half line of a killed process is removed."""
    with open(path, "ab+") as file:
        file.truncate(_whole_bytes(path))
        file.write(canonical_json(dict(value)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; none where there is no file.

    Raises:
        ValueError: one of them is no JSON object.
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes()[: _whole_bytes(path)].splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"{path} is damaged: line {number} is no JSON object")
        lines.append(value)
    return lines


def _whole_bytes(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1
