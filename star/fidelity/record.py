"""The record of a certificate's trainings: `fidelity.jsonl` in the run directory, append-only.

Its first line says which run it belongs to, every other line is one training. A line is written at once and
synchronised to the disk; of a killed process a part of the last line may be left, which counts as nothing and
is cut off before the next is written. Trainings are found again by what they were (genome, settings, seed),
so a certificate of a larger sample, or of more seeds, goes on from a smaller one.

The file may come from someone else: its size is limited, every value is checked, nothing is unpickled. Every
training has a checksum, or a quality that was edited would be certified as one that was measured.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from star.fidelity.checksum import FIELD, require_checksum, with_checksum
from star.proxy import ProxySettings
from star.search.errors import RunDamaged, RunError, is_disk_full
from star.search.settings import SearchSettings
from star.search.store import canonical_json

__all__ = ["LARGEST_QUALITY", "Retraining", "TrainingRecord", "identity"]

FORMAT = 2
BYTES_AT_MOST = 64 << 20
LARGEST_QUALITY = 1e6
"""No text takes more bits per byte; a number beyond it is damage."""

_REASON_CHARACTERS = 500
_FIELDS = frozenset(("genome", "training", "status", "reason", "quality", "seconds"))


@dataclass(frozen=True)
class Retraining:
    """One longer training of one candidate.

    Attributes:
        genome: the candidate's key.
        training: how it was trained; what only says where it ran is left out (`identity`).
        status: "ok" or "failed".
        reason: why it failed, None when it did not.
        quality: bits per byte on held-out text, None when it failed.
        seconds: what it took.
    """

    genome: str
    training: ProxySettings
    status: str
    reason: str | None
    quality: float | None
    seconds: float

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def key(self) -> tuple[str, ProxySettings]:
        """What no two trainings of a record share."""
        return self.genome, self.training

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `from_json` turns it back."""
        return {
            "genome": self.genome,
            "training": self.training.to_json(),
            "status": self.status,
            "reason": self.reason,
            "quality": self.quality,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, value: object) -> Retraining:
        """The training that `to_json` wrote. Raises ValueError for anything else."""
        if not isinstance(value, Mapping) or set(value) != _FIELDS:
            raise ValueError(f"takes {', '.join(sorted(_FIELDS))}")
        genome, status, reason, quality, seconds = (
            value[name] for name in ("genome", "status", "reason", "quality", "seconds")
        )
        good = status == "ok" and reason is None and _is_number(quality, LARGEST_QUALITY)
        bad = status == "failed" and isinstance(reason, str) and quality is None
        if not (good or bad):
            raise ValueError("takes a quality, or a reason why there is none")
        if not isinstance(genome, str) or not _is_number(seconds, 1e12):
            raise ValueError("takes a genome's text and seconds")
        if not isinstance(value["training"], Mapping):
            raise ValueError("takes the settings of a training")
        training = identity(ProxySettings.from_json(value["training"]))
        reason = None if reason is None else reason[:_REASON_CHARACTERS]
        return cls(
            genome, training, status, reason, None if quality is None else float(quality), float(seconds)
        )


def identity(training: ProxySettings) -> ProxySettings:
    """The settings without what says where a training runs and not what it is."""
    return replace(training, threads=None, device="auto")


class TrainingRecord:
    """Reads and appends to the trainings of one run. One process writes.

    Args:
        directory: of the run.
        settings: of the run.
        corpus_key: of the text that it was searched on.

    Raises:
        RunDamaged: the file is none of ours, of another run, or damaged.
    """

    def __init__(self, directory: Path, settings: SearchSettings, corpus_key: str) -> None:
        self.path = directory / "fidelity.jsonl"
        self._head = {"format": FORMAT, "model": settings.model.to_json(), "corpus": corpus_key}
        self._known = self._read()

    def find(self, genome: str, training: ProxySettings) -> Retraining | None:
        """What became of this training, or None where it was not done yet."""
        return self._known.get((genome, identity(training)))

    def append(self, done: Retraining) -> None:
        """Record a training.

        Raises:
            RunError: it can not be written; no part of it counts.
        """
        lines = [] if self._whole_bytes else [canonical_json(self._head)]
        lines.append(canonical_json(with_checksum(done.to_json())))
        data = "".join(f"{line}\n" for line in lines).encode("ascii")
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, 0o644)
            try:
                os.ftruncate(descriptor, self._whole_bytes)
                written = os.pwrite(descriptor, data, self._whole_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            why = "no room on the disk" if is_disk_full(error) else error.strerror or str(error)
            raise RunError(f"{self.path} can not be written: {why}") from error
        if written < len(data):
            raise RunError(f"{self.path} can not be written: no room on the disk")
        self._whole_bytes += len(data)
        self._known[done.key] = done

    def _read(self) -> dict[tuple[str, ProxySettings], Retraining]:
        """What the file holds, which may be nothing; `_whole_bytes` of it are whole lines."""
        self._whole_bytes = 0
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            raise RunDamaged(f"{self.path} must be a plain file")
        try:
            with open(self.path, "rb") as file:
                data = file.read(BYTES_AT_MOST + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RunDamaged(f"{self.path} can not be read: {error.strerror or error}") from error
        if len(data) > BYTES_AT_MOST:
            raise RunDamaged(f"{self.path} is larger than {BYTES_AT_MOST} bytes: star fidelity wrote no such")
        self._whole_bytes = data.rfind(b"\n") + 1
        known: dict[tuple[str, ProxySettings], Retraining] = {}
        for number, line in enumerate(data[: self._whole_bytes].split(b"\n")[:-1], start=1):
            value = self._parse(number, line)
            if number == 1:
                self._require_own(value)
                continue
            try:
                done = _training(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise RunDamaged(
                    f"{self.path} is damaged: line {number}: {str(error).splitlines()[0]}"
                ) from error
            known[done.key] = done
        return known

    def _parse(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunDamaged(f"{self.path} is damaged: line {number} is not JSON") from error

    def _require_own(self, head: object) -> None:
        if not isinstance(head, dict) or "format" not in head:
            raise RunDamaged(f"{self.path} is no record of star fidelity")
        if head["format"] != FORMAT:
            raise RunDamaged(f"{self.path} is of another version of star")
        if head != self._head:
            raise RunDamaged(f"{self.path} belongs to a run of another model or text")


def _training(value: object) -> Retraining:
    """What a line holds. Raises ValueError for anything that `append` has not written."""
    if not isinstance(value, dict):
        return Retraining.from_json(value)
    done = Retraining.from_json({name: item for name, item in value.items() if name != FIELD})
    require_checksum(value)
    return done


def _is_number(value: object, largest: float) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value <= largest
        and math.isfinite(value)
    )
