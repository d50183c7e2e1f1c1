"""What a search tells while it runs. A callback gets each of these in the searching process's own thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from star.search.settings import SearchSettings
from star.search.store import Evaluation

__all__ = [
    "CandidateFinished",
    "CandidateStarted",
    "CorpusOpened",
    "DeviceMeasured",
    "DeviceUnsteady",
    "Event",
    "GenerationFinished",
    "GenerationStarted",
    "Listener",
    "RunFinished",
    "RunStarted",
    "WorkerLost",
    "ignore",
]


@dataclass(frozen=True)
class RunStarted:
    """The record is open. `stored` evaluations of at most `planned` are there already (0 in a new run)."""

    directory: Path
    settings: SearchSettings
    stored: int
    planned: int


@dataclass(frozen=True)
class CorpusOpened:
    """The corpus is on the disk, with this name and content hash."""

    name: str
    content_hash: str


@dataclass(frozen=True)
class DeviceMeasured:
    """Something begins to be measured on the device that the search is for, in words."""

    what: str


@dataclass(frozen=True)
class DeviceUnsteady:
    """The table of the device should not be believed; one line says why and what to do."""

    warning: str


@dataclass(frozen=True)
class GenerationStarted:
    """`candidates` of the generation have to be trained (those in the record are not counted)."""

    generation: int
    candidates: int


@dataclass(frozen=True)
class CandidateStarted:
    """A worker has begun with a candidate, for the first time or again."""

    candidate_id: int
    genome: str
    worker: int


@dataclass(frozen=True)
class CandidateFinished:
    """An evaluation is in the record. `front` are the ids of the best so far (see star.search.front)."""

    evaluation: Evaluation
    front: tuple[int, ...]
    finished: int
    planned: int


@dataclass(frozen=True)
class WorkerLost:
    """A worker died. Its candidate is tried again, or marked failed."""

    candidate_id: int
    reason: str
    retried: bool


@dataclass(frozen=True)
class GenerationFinished:
    """The survivors of a generation are in the record.

    `hypervolume` is that of everything evaluated up to here (star.search.front), None when all failed.
    `replayed` says that the generation was already in the record when this process began.
    """

    generation: int
    population: tuple[str, ...]
    front: tuple[int, ...]
    hypervolume: float | None
    seconds: float
    overhead_seconds: float
    replayed: bool


@dataclass(frozen=True)
class RunFinished:
    """All generations are in the record, or no further candidate could be made (`exhausted`)."""

    directory: Path
    evaluations: int
    failed: int
    stopped: int
    front: tuple[int, ...]
    seconds: float
    exhausted: bool


Event = (
    RunStarted
    | CorpusOpened
    | DeviceMeasured
    | DeviceUnsteady
    | GenerationStarted
    | CandidateStarted
    | CandidateFinished
    | WorkerLost
    | GenerationFinished
    | RunFinished
)
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of those who do not want to know."""
