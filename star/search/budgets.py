"""Budgets: limits that a candidate must keep, such as 200 ms to the first token. They are constraints and no
objectives: within them nothing is gained by using less, and whoever exceeds one is kept off the front.

A budget limits a quantity from its worse side: of a quantity of which less is better it is the most, of one
of which more is better (`prefill`) the least. What follows from the genome (size, cache, FLOPs) is
counted at the width that is trained; what the device takes is known at the target's width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from star.search.objectives import Objective, find, known_names

if TYPE_CHECKING:
    from star.search.settings import SearchSettings
    from star.search.store import Evaluation

__all__ = [
    "FAILED",
    "STOPPED",
    "excess",
    "is_over_budget",
    "judged",
    "loose_budgets",
    "over_budget",
    "parse_budgets",
    "require_budgets",
    "violation",
    "width_of",
]

FAILED = 1e6
"""The violation of a candidate that failed; far more than that of any budget."""

STOPPED = 1e-9
"""The violation of a candidate that was stopped at a rung: behind those that were trained to their end,
before those over a budget."""

_OVER = "over budget: "
_COUNTED = ("size", "cache", "flops")
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([^\s0-9]*)\s*")
_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS: dict[str, dict[str, float]] = {
    "milliseconds": {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3},
    "bytes": {
        **{"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12},
        **{"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40},
    },
    "percent": {"": 1.0, "%": 0.01},
    "decimal": {"": 1.0},
    "count": _COUNTS,
    "rate": {**_COUNTS, **{f"{prefix}tokens/s": factor for prefix, factor in _COUNTS.items()}},
}


def parse_budgets(most: Iterable[str], least: Iterable[str] = ()) -> dict[str, float]:
    """Budgets as people write them, "ttft=200ms" and "cache=40MB", in the objectives' own units.

    Args:
        most: limits that must not be exceeded.
        least: limits that must be reached.

    Raises:
        ValueError: an unknown quantity, a wrong unit, the wrong side, or one named twice; one line.
    """
    budgets: dict[str, float] = {}
    for option, texts in (("--max", most), ("--min", least)):
        for text in texts:
            name, sign, amount = (part.strip() for part in text.partition("="))
            if not sign:
                raise ValueError(f"{option} is {text!r}, takes NAME=LIMIT, like ttft=200ms or cache=40MB")
            objective = find(name)
            if objective is None:
                raise ValueError(f"{option} has {name!r}, takes one of {known_names()}")
            if (option == "--min") != objective.maximised:
                other, side = ("--min", "more") if objective.maximised else ("--max", "less")
                raise ValueError(f"{option} {text}: {side} {name} is better, so its budget is a {other}")
            if name in budgets:
                raise ValueError(f"{option} has {name} twice, takes each quantity once")
            budgets[name] = _amount(option, text, objective, amount)
    return budgets


def require_budgets(budgets: Any) -> dict[str, float]:
    """Budgets in the objectives' own units, checked.

    Raises:
        ValueError: an unknown quantity, or no positive number.
    """
    if not isinstance(budgets, Mapping):
        raise ValueError(f"budgets are {budgets!r}, take names with limits")
    for name, limit in budgets.items():
        if not isinstance(name, str) or find(name) is None:
            raise ValueError(f"budgets has {name!r}, takes one of {known_names()}")
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
            raise ValueError(f"budget of {name} is {limit!r}, takes a number above 0")
    return {name: float(limit) for name, limit in budgets.items()}


def width_of(name: str, settings: SearchSettings) -> int | None:
    """Width of the model that a budget means: the target's for what the device takes, else the width that is
    trained. None for what a training measures."""
    objective = find(name)
    if objective is None or objective.trained:
        return None
    if not objective.device:
        return settings.model.width
    return (settings.measure if settings.profile is None else settings.profile.settings).width


def loose_budgets(settings: SearchSettings) -> dict[str, float]:
    """Budgets that no genome of the search can exceed, with a bound of what one can have.

    Only of size, cache and FLOPs, which are sums over LIVs and shrink where LIVs share: none has more than
    `depth` times the class that has most.
    """
    counted = [
        item for item in settings.measured() if item.name in settings.budgets and item.name in _COUNTED
    ]
    if not counted:
        return {}
    # Only here: the costs need torch.
    from star.genome import Gene, Genome
    from star.proxy import Outcome
    from star.search.layouts import seeds
    from star.search.measures import Candidate

    classes = {*settings.pool.classes, *(gene.liv_class for layout in seeds(settings) for gene in layout)}
    alone = [Candidate(Genome((Gene(number),)), settings, Outcome("ok")) for number in sorted(classes)]
    largest = {item.name: settings.depth * max(map(item.load(), alone)) for item in counted}
    return {name: most for name, most in largest.items() if most <= settings.budgets[name]}


def excess(name: str, value: float, limit: float) -> float:
    """How far a value is beyond its limit, relative to the limit; 0 or less within it."""
    objective = find(name)
    beyond = value - limit
    return (-beyond if objective is not None and objective.maximised else beyond) / limit


def violation(values: Mapping[str, float], budgets: Mapping[str, float]) -> float:
    """0 within all budgets; otherwise the sum of the excesses, each bounded by 1 so that no budget hides
    another. A missing value counts as 1."""
    total = 0.0
    for name, limit in budgets.items():
        beyond = excess(name, values[name], limit) if name in values else math.inf
        if beyond > 0:
            total += 1.0 if math.isinf(beyond) else beyond / (1 + beyond)
    return total


def judged(evaluations: Iterable[Evaluation], budgets: Mapping[str, float]) -> list[Evaluation]:
    """The evaluations, with those over a budget as failed, with their values: that keeps them off fronts and
    out of volumes."""
    return [_judge(evaluation, budgets) for evaluation in evaluations] if budgets else list(evaluations)


def over_budget(values: Mapping[str, float], budgets: Mapping[str, float]) -> str:
    """Which budgets the values exceed, in words; empty where none."""
    over = [name for name in budgets if violation(values, {name: budgets[name]}) > 0]
    return _OVER + ", ".join(over) if over else ""


def is_over_budget(evaluation: Evaluation) -> bool:
    """Whether a candidate exceeds a budget, by `judged` or at a rung, and did not fail."""
    return not evaluation.ok and (evaluation.reason or "").startswith(_OVER)


def _judge(evaluation: Evaluation, budgets: Mapping[str, float]) -> Evaluation:
    if not evaluation.ok:
        return evaluation
    over = over_budget(evaluation.objectives, budgets)
    return replace(evaluation, status="failed", reason=over) if over else evaluation


def _amount(option: str, text: str, objective: Objective, amount: str) -> float:
    units = _UNITS[objective.form]
    named = [unit for unit in units if unit]
    takes = " or ".join(filter(None, ["a plain number" if "" in units else "", ", ".join(named)]))
    found = _AMOUNT.fullmatch(amount)
    if found is None:
        raise ValueError(f"{option} {text}: {amount!r} is no amount, takes a number with {takes}")
    number, unit = float(found[1]), found[2]
    if unit not in units:
        said = f"unit {unit!r} does not fit {objective.name}" if unit else f"the value {found[1]} has no unit"
        raise ValueError(f"{option} {text}: {said}, takes {takes}")
    if objective.form == "percent" and number * units[unit] > 1:
        raise ValueError(f"{option} {text}: {amount} is more than all, takes a share up to 1, or up to 100%")
    if math.isinf(number * units[unit]):
        raise ValueError(f"{option} {text}: {amount} is not finite, takes a number that is")
    if not number * units[unit] > 0:
        raise ValueError(f"{option} {text}: a limit must be more than 0")
    return number * units[unit]
