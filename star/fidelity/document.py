"""`fidelity.json`: a certificate as a file of the run directory, written whole and read with distrust."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from star.fidelity.certificate import Candidate, Certificate, FrontMember, Interval, SeedNoise
from star.fidelity.checksum import require_checksum, with_checksum
from star.fidelity.record import LARGEST_QUALITY
from star.fidelity.settings import FidelitySettings
from star.search.errors import RunDamaged, RunError, is_disk_full

__all__ = ["NAME", "from_json", "read_certificate", "to_json", "write_certificate"]

NAME = "fidelity.json"
FORMAT = 2
BYTES_AT_MOST = 16 << 20
_LARGEST = 1e100
_LARGEST_INTEGER = 10**12


def to_json(certificate: Certificate) -> dict[str, Any]:
    """Plain JSON with a checksum; what is not defined is null. `from_json` turns it back."""
    errors = certificate.standard_error
    content = {
        "format": FORMAT,
        "settings": certificate.settings.to_json(),
        "proxy_steps": certificate.steps,
        "evaluations": certificate.evaluations,
        "seconds": certificate.seconds,
        "kendall_tau": _interval_json(certificate.tau),
        "kendall_tau_better_half": _interval_json(certificate.tau_better_half),
        "kendall_tau_parameter_count": _interval_json(certificate.parameter_count),
        "gain_over_parameter_count": _interval_json(certificate.gain),
        "seed_noise": {
            "standard_deviation": _or_null(certificate.noise.deviation),
            "flipped_pairs": _or_null(certificate.noise.flips),
            "kendall_tau": _or_null(certificate.noise.tau),
        },
        "failed_trainings": len(certificate.failures),
        "prediction_errors": dict(certificate.prediction_errors),
        "taken_as_exact": list(certificate.taken_as_exact),
        "front": [
            {
                "id": member.id,
                "proxy": member.proxy,
                "among_retrained": _or_null(member.among_retrained),
                "among_all": _or_null(member.among_all),
            }
            for member in certificate.front
        ],
        "candidates": [
            {
                "id": item.id,
                "genome": item.genome,
                "on_front": item.on_front,
                "proxy": item.proxy,
                "size": item.size,
                "qualities": list(item.qualities),
                "reasons": list(item.reasons),
                "mean": item.mean,
                "standard_error": _or_null(errors.get(item.id, math.nan)),
            }
            for item in certificate.candidates
        ],
    }
    return with_checksum(content)


def from_json(value: object) -> Certificate:
    """The certificate that `to_json` wrote.

    Raises:
        ValueError: anything else; one line that says which part.
    """
    whole = _object("certificate", value)
    if whole.get("format") != FORMAT:
        raise ValueError(f"format is {str(whole.get('format'))[:20]!r}, takes {FORMAT}")
    noise = _object("seed_noise", whole.get("seed_noise"))
    settings = FidelitySettings.from_json(_object("settings", whole.get("settings")))
    items = tuple(_candidate(item, settings.seeds) for item in _list("candidates", whole.get("candidates")))
    ids = {item.id for item in items}
    if len(ids) < len(items):
        raise ValueError("candidates have an id twice")
    certificate = Certificate(
        settings=settings,
        steps=_integer("proxy_steps", whole.get("proxy_steps")),
        evaluations=_integer("evaluations", whole.get("evaluations")),
        seconds=_number("seconds", whole.get("seconds"), 0.0, _LARGEST),
        tau=_interval("kendall_tau", whole, -1.0),
        tau_better_half=_interval("kendall_tau_better_half", whole, -1.0),
        parameter_count=_interval("kendall_tau_parameter_count", whole, -1.0),
        gain=_interval("gain_over_parameter_count", whole, -2.0),
        noise=SeedNoise(
            _or_nan("standard_deviation", noise.get("standard_deviation"), 0.0, LARGEST_QUALITY),
            _or_nan("flipped_pairs", noise.get("flipped_pairs"), 0.0, 1.0),
            _or_nan("kendall_tau of seeds", noise.get("kendall_tau"), -1.0, 1.0),
        ),
        prediction_errors=_errors(whole.get("prediction_errors")),
        taken_as_exact=tuple(
            _text("taken_as_exact", name) for name in _list("taken_as_exact", whole.get("taken_as_exact"))
        ),
        front=tuple(_front_member(item) for item in _list("front", whole.get("front"))),
        candidates=items,
    )
    require_checksum(whole)  # last, since the messages above say more
    return certificate


def write_certificate(certificate: Certificate, directory: Path) -> Path:
    """Write fidelity.json into the run directory at once, and return its path.

    Raises:
        RunError: it can not be written; no part of it stays.
    """
    path = directory / NAME
    unfinished = directory / f".{NAME}.partial"
    text = json.dumps(to_json(certificate), indent=2, allow_nan=False) + "\n"
    try:
        unfinished.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(unfinished, flags, 0o644), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        why = "no room on the disk" if is_disk_full(error) else error.strerror or str(error)
        raise RunError(f"{path} can not be written: {why}") from error
    return path


def read_certificate(directory: Path) -> Certificate | None:
    """The certificate of a run directory, or None where there is none yet.

    Raises:
        RunDamaged: the file is not what star fidelity writes.
    """
    path = directory / NAME
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise RunDamaged(f"{path} must be a plain file")
    try:
        with open(path, "rb") as file:
            data = file.read(BYTES_AT_MOST + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunDamaged(f"{path} can not be read: {error.strerror or error}") from error
    if len(data) > BYTES_AT_MOST:
        raise RunDamaged(f"{path} is larger than {BYTES_AT_MOST} bytes: star fidelity wrote no such")
    try:
        return from_json(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise RunDamaged(
            f"{path} is damaged: {str(error).splitlines()[0]}; star fidelity makes it anew"
        ) from error


# ---- values into JSON and back -------------------------------------------------------------------------


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _interval_json(interval: Interval) -> dict[str, float | None]:
    return {name: _or_null(value) for name, value in interval._asdict().items()}


def _candidate(value: object, seeds: int) -> Candidate:
    item = _object("a candidate", value)
    qualities = tuple(
        None if quality is None else _number("a quality", quality, 0.0, LARGEST_QUALITY)
        for quality in _list("qualities", item.get("qualities"))
    )
    reasons = tuple(_text("a reason", reason) for reason in _list("reasons", item.get("reasons")))
    if len(qualities) != seeds or len(reasons) != qualities.count(None):
        raise ValueError("a candidate's qualities and reasons are not one a seed")
    on_front = item.get("on_front")
    if not isinstance(on_front, bool):
        raise ValueError(f"on_front is {str(on_front)[:20]!r}, takes true or false")
    return Candidate(
        id=_integer("id", item.get("id")),
        genome=_text("genome", item.get("genome")),
        on_front=on_front,
        proxy=_number("proxy", item.get("proxy"), 0.0, LARGEST_QUALITY),
        size=_number("size", item.get("size"), 0.0, _LARGEST),
        qualities=qualities,
        reasons=reasons,
    )


def _front_member(value: object) -> FrontMember:
    item = _object("a member of the front", value)
    return FrontMember(
        _integer("id", item.get("id")),
        _number("proxy", item.get("proxy"), 0.0, LARGEST_QUALITY),
        _or_nan("among_retrained", item.get("among_retrained"), 0.0, 1.0),
        _or_nan("among_all", item.get("among_all"), 0.0, 1.0),
    )


def _errors(value: object) -> dict[str, float]:
    items = _object("prediction_errors", value).items()
    return {name: _number(f"error of {name}", error, 0.0, _LARGEST) for name, error in items}


def _interval(name: str, whole: Mapping[str, Any], low: float) -> Interval:
    item = _object(name, whole.get(name))
    # The bounds' own rounding may be a hair beyond 1.
    ends = (_or_nan(name, item.get(part), low - 1e-9, 1e-9 - low) for part in Interval._fields)
    return Interval(*ends)


def _checked(name: str, value: object, kind: Callable[[object], bool], takes: str) -> Any:
    if not kind(value):
        raise ValueError(f"{name} is {str(value)[:40]!r}, takes {takes}")
    return value


def _object(name: str, value: object) -> Mapping[str, Any]:
    return _checked(name, value, lambda item: isinstance(item, dict), "an object")


def _list(name: str, value: object) -> list[Any]:
    return _checked(name, value, lambda item: isinstance(item, list), "a list")


def _text(name: str, value: object) -> str:
    return _checked(name, value, lambda item: isinstance(item, str), "a text")


def _integer(name: str, value: object) -> int:
    return _checked(
        name,
        value,
        lambda item: type(item) is int and 0 <= item <= _LARGEST_INTEGER,
        "an integer of at least 0",
    )


def _number(name: str, value: object, low: float, high: float) -> float:
    return float(
        _checked(
            name,
            value,
            lambda item: type(item) in (int, float) and low <= item <= high,  # type: ignore[operator]
            f"a number from {low:g} to {high:g}",
        )
    )


def _or_nan(name: str, value: object, low: float, high: float) -> float:
    return math.nan if value is None else _number(name, value, low, high)
