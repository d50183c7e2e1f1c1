"""The table of a device: what each LIV costs there at the target size. Plain values, without torch.

A file is JSON with a checksum over its content, so that a damaged one is noticed and never believed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from star.measure.settings import MeasureSettings

__all__ = ["Calibration", "Ends", "LivRow", "ProfileDamaged", "ProfileTable", "Steadiness", "read_table"]

FORMAT = 1
_BYTES_AT_MOST = 2 << 20

AGREEMENT = 0.2
"""By how much the two fastest measurements of a whole model may differ."""

_PLAUSIBLE = 2.0  # a whole model against the sum of its parts, or the other way round


class ProfileDamaged(ValueError):
    """A file is no profile table of this version, or damaged. One line."""


@dataclass(frozen=True)
class LivRow:
    """An LIV at one context, alone, at batch 1.

    Attributes:
        liv_class: number of its class.
        computed: the feature groups that it computes itself; the others it takes from another LIV.
        context: tokens.
        prefill: ms for a prompt of the context's length, chunk by chunk.
        decode_p50, decode_p95: ms for one token over a full cache.
        held: bytes that it keeps beside weights and cache (a kernel computed once).
        transient: bytes that it takes while it reads the prompt; None where the machine can not say.
        features: bytes of all its features of one chunk, which stay while another LIV waits for them.
    """

    liv_class: int
    computed: tuple[str, ...]
    context: int
    prefill: float
    decode_p50: float
    decode_p95: float
    held: int
    transient: int | None
    features: int

    @property
    def key(self) -> tuple[int, tuple[str, ...], int]:
        return self.liv_class, self.computed, self.context

    def line(self) -> str:
        """The row as a line of text, fields in their order; nothing is "-"."""
        parts = [
            "+".join(self.computed) if f.name == "computed" else getattr(self, f.name) for f in fields(self)
        ]
        return " ".join("-" if part in ("", None) else str(part) for part in parts)

    @classmethod
    def parse(cls, line: str) -> LivRow:
        """What `line` wrote.

        Raises:
            ValueError: it is not that.
        """
        parts = line.split(" ")
        if len(parts) != len(fields(cls)):
            raise ValueError(f"row {line!r} has {len(parts)} fields, not {len(fields(cls))}")
        kinds: tuple[Callable[[str], Any], ...] = (
            int,
            _groups,
            int,
            float,
            float,
            float,
            int,
            _optional,
            int,
        )
        return _numbers(
            cls, {f.name: kind(part) for f, kind, part in zip(fields(cls), kinds, parts, strict=True)}
        )


@dataclass(frozen=True)
class Ends:
    """What a model does beside its LIVs, at one context, in ms.

    Attributes:
        prefill, decode: embedding, final norm, and head on one token.
        norm_prefill, norm_decode: residual sum and norm of one LIV.
        norm_transient: bytes of these; None where the machine can not say.
    """

    context: int
    prefill: float
    decode: float
    norm_prefill: float
    norm_decode: float
    norm_transient: int | None


@dataclass(frozen=True)
class Calibration:
    """A whole model, of one LIV of each class, against the sum of its parts, at one context.

    Attributes:
        livs: of the model.
        prefill, decode: ms that it takes beyond the sum, for each LIV; negative where it takes less.
        tail: its decode_p95 over its decode_p50; how unsteady this device is.
        memory: bytes beyond the sum, of all LIVs together (allocators keep some for each); None where the
            machine can not say.
    """

    context: int
    livs: int
    prefill: float
    decode: float
    tail: float
    memory: int | None


@dataclass(frozen=True)
class Steadiness:
    """How well repeated measurements agreed, at one context.

    Attributes:
        wholes: how often the calibration's model was measured.
        prefill, decode: relative difference of its two fastest measurements.
        livs: LIVs whose own repetitions disagree widely (star.profile.livs says how widely).
    """

    context: int
    wholes: int
    prefill: float
    decode: float
    livs: int


@dataclass(frozen=True)
class ProfileTable:
    """See the module.

    Attributes:
        device_name: the chip.
        versions: of torch and of this package.
        settings: what was measured, with nothing left open.
        rows: one an LIV class, what it computes itself, and context.
        ends, calibrations: one a context.
        seconds: that the measurement took.
        steadiness: one a context; none in tables from before it was measured.
    """

    device_name: str
    versions: Mapping[str, str]
    settings: MeasureSettings
    rows: tuple[LivRow, ...]
    ends: tuple[Ends, ...]
    calibrations: tuple[Calibration, ...]
    seconds: float
    steadiness: tuple[Steadiness, ...] = ()

    @property
    def classes(self) -> frozenset[int]:
        return frozenset(row.liv_class for row in self.rows)

    @property
    def checksum(self) -> str:
        """Of everything in it; a short name for it as well."""
        return hashlib.sha256(_canonical(self._content()).encode()).hexdigest()

    def require_classes(self, classes: Iterable[int]) -> ProfileTable:
        """The table itself.

        Raises:
            ValueError: one of these classes is not in it.
        """
        missing = sorted(set(classes) - self.classes)
        if missing:
            listed = ", ".join(str(number) for number in missing)
            raise ValueError(f"profile table has no LIV class {listed}: measure one with star profile")
        return self

    def doubts(self) -> list[str]:
        """Why its predictions should not be believed, each in a few words; empty where nothing speaks
        against them."""
        found = []
        for item in self.steadiness:
            for name, difference in (("prompts", item.prefill), ("tokens", item.decode)):
                if difference > AGREEMENT:
                    found.append(
                        f"{name} of {item.wholes} whole models differ by {difference:.0%} "
                        f"at {item.context} tokens"
                    )
            if item.livs:
                found.append(f"repetitions of {item.livs} LIVs disagree at {item.context} tokens")
        for calibration in self.calibrations:
            for name, parts, whole in self._sums(calibration):
                if not 1 / _PLAUSIBLE <= whole / parts <= _PLAUSIBLE:
                    found.append(
                        f"{name} of a whole model takes {whole:.3g} ms and its parts {parts:.3g} ms "
                        f"at {calibration.context} tokens"
                    )
        return found

    def warning(self) -> str | None:
        """One line for people where there are doubts, which says what to do."""
        doubts = self.doubts()
        if not doubts:
            return None
        more = f" and {len(doubts) - 1} more" if len(doubts) > 1 else ""
        return (
            f"the profile table is unsteady ({doubts[0]}{more}), so predictions may be far off: "
            "close other programs and measure it anew with star profile --anew"
        )

    def _sums(self, calibration: Calibration) -> list[tuple[str, float, float]]:
        """(name, ms of the parts, ms of the whole) of the model of the calibration."""
        context = calibration.context
        alone: dict[int, LivRow] = {}  # those that share nothing
        for row in self.rows:
            known = alone.get(row.liv_class)
            if row.context == context and (known is None or len(row.computed) > len(known.computed)):
                alone[row.liv_class] = row
        sums = []
        for ends in self.ends:
            if ends.context == context:
                livs = calibration.livs
                prefill = ends.prefill + livs * ends.norm_prefill + sum(r.prefill for r in alone.values())
                decode = ends.decode + livs * ends.norm_decode + sum(r.decode_p50 for r in alone.values())
                sums.append(("a prompt", prefill, prefill + livs * calibration.prefill))
                sums.append(("a token", decode, decode + livs * calibration.decode))
        return [(name, parts, whole) for name, parts, whole in sums if parts > 0]

    def _content(self) -> dict[str, Any]:
        content = {
            "format": FORMAT,
            "device_name": self.device_name,
            "versions": dict(self.versions),
            "settings": self.settings.to_json(),
            "columns": " ".join(item.name for item in fields(LivRow)),
            "rows": [row.line() for row in self.rows],
            "ends": [asdict(item) for item in self.ends],
            "calibrations": [asdict(item) for item in self.calibrations],
            "seconds": self.seconds,
        }
        if self.steadiness:  # older tables have none, and a checksum without it
            content["steadiness"] = [asdict(item) for item in self.steadiness]
        return content

    def to_json(self) -> dict[str, Any]:
        """Plain JSON with its checksum; `from_json` turns it back."""
        return {**self._content(), "checksum": self.checksum}

    @classmethod
    def from_json(cls, value: object) -> ProfileTable:
        """The table that `to_json` wrote.

        Raises:
            ProfileDamaged: it is not that, to the last digit.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ProfileDamaged("not a profile table, or one of another version of star")
        try:
            table = cls(
                device_name=_text(value["device_name"]),
                versions={_text(name): _text(number) for name, number in value["versions"].items()},
                settings=MeasureSettings.from_json(value["settings"]),
                rows=tuple(LivRow.parse(_text(line)) for line in value["rows"]),
                ends=tuple(_numbers(Ends, item) for item in value["ends"]),
                calibrations=tuple(_numbers(Calibration, item) for item in value["calibrations"]),
                seconds=value["seconds"],
                steadiness=tuple(_numbers(Steadiness, item) for item in value.get("steadiness", ())),
            )
            intact = table.checksum == value["checksum"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ProfileDamaged(f"damaged: {str(error).splitlines()[0][:200]}") from error
        if not intact:
            raise ProfileDamaged("damaged: its checksum is not that of its content")
        return table

    def write(self, path: Path) -> None:
        """Write the table; a reader sees the old file or the new one, never a part."""
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            unfinished.write_text(
                json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise


def read_table(path: Path) -> ProfileTable:
    """The table in a file.

    Raises:
        ProfileDamaged: it is not one that `ProfileTable.write` has written, or can not be read.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_BYTES_AT_MOST + 1)
    except OSError as error:
        raise ProfileDamaged(f"profile table {path} can not be read: {error.strerror or error}") from error
    try:
        if len(raw) > _BYTES_AT_MOST:
            raise ProfileDamaged(f"larger than {_BYTES_AT_MOST} bytes")
        return ProfileTable.from_json(json.loads(raw))
    except ProfileDamaged as error:
        raise ProfileDamaged(f"profile table {path} is {error}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileDamaged(f"profile table {path} is damaged: {str(error).splitlines()[0]}") from error


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _groups(text: str) -> tuple[str, ...]:
    return () if text == "-" else tuple(text.split("+"))


def _optional(text: str) -> int | None:
    return None if text == "-" else int(text)


def _numbers(kind: Any, value: Mapping[str, Any]) -> Any:
    """A dataclass of numbers, checked: finite, and no field more or less."""
    for field in fields(kind):
        number = value[field.name]
        if field.name == "computed" or (number is None and "None" in str(field.type)):
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{field.name} is {number!r}, no number")
    return kind(**value)
