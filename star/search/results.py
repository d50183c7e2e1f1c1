"""What an evaluator may return, and what the search makes of it: the same in every engine.

An evaluator is `callable(genome_text, settings, candidate_id, weights_path | None) -> dict` with the keys

    status       "ok", "failed", or "stopped" (where settings["bars"] says so: star.search.rungs)
    reason       text, when it failed or was stopped; else, if at all, why quality was not extrapolated
    objectives   name -> number in the objective's own direction, unless it failed
    curve        list of points of the learning curve, optional
    seconds      what it took, optional
"""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from star.proxy import is_remark
from star.search.errors import RunError, is_disk_full

__all__ = ["Evaluator", "describe", "evaluate_safely", "failure", "plain_result"]

Evaluator = Callable[[str, dict[str, Any], int, "str | None"], Mapping[str, Any]]

_REASON_CHARACTERS = 500
_RESULT_BYTES = 2 << 20


def evaluate_safely(
    evaluator: Evaluator, genome: str, settings: dict[str, Any], candidate_id: int, weights: str | None
) -> dict[str, Any]:
    """The evaluator's plain result; whatever goes wrong inside makes a failed candidate.

    Raises:
        OSError: the disk is full, which is no fault of the candidate.
        RunError: the evaluator says that no candidate can be evaluated.
    """
    began = time.perf_counter()
    try:
        result = plain_result(evaluator(genome, settings, candidate_id, weights))
    except RunError:
        raise
    except Exception as error:  # the candidate's failure, recorded with its reason
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, describe(error), getattr(error, "filename", None)) from error
        result = failure(describe(error))
    result.setdefault("seconds", time.perf_counter() - began)
    return result


def plain_result(raw: object) -> dict[str, Any]:
    """The result as plain JSON, checked: finite numbers, short texts. What can not be read is a failure."""
    if not isinstance(raw, Mapping):
        return failure(f"the evaluator returned {type(raw).__name__}, not a dict")
    status = raw.get("status")
    if status == "failed":
        plain = failure(str(raw.get("reason") or "no reason given"))
    elif status not in ("ok", "stopped"):
        return failure(f"the evaluator returned status {status!r}, not 'ok' or 'failed'")
    else:
        plain = {"status": status, "reason": _one_line(raw.get("reason") or "no reason given")}
        if status == "ok" and not is_remark(plain["reason"]):
            plain["reason"] = None
        try:
            plain["objectives"] = _finite_numbers(raw.get("objectives"))
        except ValueError as error:
            plain = failure(str(error))
    plain["curve"] = _plain(list(raw.get("curve") or ()))
    seconds = raw.get("seconds")
    if isinstance(seconds, (int, float)) and math.isfinite(seconds):
        plain["seconds"] = float(seconds)
    if len(json.dumps(plain, allow_nan=False)) > _RESULT_BYTES:
        return failure(f"the evaluator returned more than {_RESULT_BYTES} bytes")
    return plain


def failure(reason: str) -> dict[str, Any]:
    """A failed candidate's result. The reason becomes one short line."""
    return {"status": "failed", "reason": _one_line(reason), "objectives": {}, "curve": []}


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:_REASON_CHARACTERS]


def describe(error: BaseException) -> str:
    """An exception as one line: its first line, after its type where that says more."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _finite_numbers(values: object) -> dict[str, float]:
    if not isinstance(values, Mapping) or not values:
        raise ValueError("the evaluator returned no objectives")
    plain = {}
    for name, value in values.items():
        number = _plain(value)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError(f"{name} is {value!r}, not a finite number")
        plain[str(name)] = number
    return plain


def _plain(value: object) -> Any:
    """Plain JSON of nested lists, dicts and numbers (numpy's and torch's too); NaN and infinity are null."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)
