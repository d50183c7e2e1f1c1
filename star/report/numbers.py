"""Measured values in words: names, units, and as many digits as people read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from star.search.objectives import OBJECTIVES, find

if TYPE_CHECKING:
    from star.search.store import Evaluation

__all__ = [
    "axis",
    "change",
    "count",
    "difference",
    "duration",
    "measured_objectives",
    "sign",
    "slug",
    "spoken",
    "title",
    "value",
]

_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def title(objective: str) -> str:
    """An objective's name as the head of a column."""
    found = find(objective)
    return objective if found is None else found.title


def axis(objective: str) -> str:
    """An objective with its unit, for an axis."""
    found = find(objective)
    return objective if found is None else found.axis


def measured_objectives(evaluations: Iterable[Evaluation], searched: Sequence[str]) -> list[str]:
    """The searched objectives, then the others of ours that every successful evaluation has."""
    successes = [evaluation.objectives for evaluation in evaluations if evaluation.ok]
    known = dict.fromkeys(
        [*OBJECTIVES, *(name for name in (successes[0] if successes else ()) if find(name))]
    )
    others = [
        name
        for name in known
        if name not in searched and successes and all(name in measured for measured in successes)
    ]
    return [*searched, *others]


def value(objective: str, number: float | None) -> str:
    """A measured value with its unit: "3.2140", "1.20 M", "151 MB", "2.4 G", "12.5 % wrong"; "–" for None."""
    if number is None:
        return "–"
    found = find(objective)
    form = "count" if found is None else found.form
    if form == "decimal":
        return f"{number:.4f}"
    if form == "percent":
        return f"{100 * number:.1f} % wrong"
    if form == "bytes":
        return f"{_scaled(number)}B"
    if form == "milliseconds":
        return f"{number / 1e3:.3g} s" if number >= 1e4 else f"{number:.3g} ms"
    if form == "rate":
        return f"{_scaled(float(f'{number:.3g}'))}tokens/s"
    return _scaled(number).rstrip()


def change(new: float, old: float) -> str:
    """How much less or more, relative and short: "−13.2 %"; "±0 %" below a twentieth of a per cent."""
    text = difference(new, old)
    if text == "equal":
        return "±0 %"
    amount, _, direction = text.rpartition(" ")
    return f"{'−' if direction == 'less' else '+'}{amount}" if amount else direction


def count(number: int, noun: str) -> str:
    """ "1 candidate", "3 candidates"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def difference(new: float, old: float) -> str:
    """How much less or more, relative: "13.2 % less"; "equal" below a twentieth of a per cent."""
    if old == 0:
        return "equal" if new == 0 else "more"
    percent = 100 * (new - old) / abs(old)
    if abs(percent) < 0.05:
        return "equal"
    digits = 1 if abs(percent) < 99.95 else 0
    return f"{abs(percent):,.{digits}f} % {'less' if percent < 0 else 'more'}"


def duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min 20 s", "18 min", "2 h 05 min"."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if 10 <= minutes < 60:
        return f"{minutes} min"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def _scaled(number: float) -> str:
    """Three digits and a decimal prefix: "151 M", "1.20 k", "12 "."""
    for factor, prefix in _DECIMAL:
        if abs(number) >= factor * 0.9995:
            scaled = number / factor
            if abs(scaled) >= 1e6:
                return f"{scaled:.3g} {prefix}"
            digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
            return f"{scaled:,.{digits}f} {prefix}"
    return f"{number:g} "


def sign(objective: str) -> float:
    """-1 for an objective of which more is better."""
    found = find(objective)
    return -1.0 if found is not None and found.maximised else 1.0


def spoken(objective: str, *, capital: bool = True) -> str:
    """An objective within a sentence: its name, or its title where that is an abbreviation."""
    found = find(objective)
    text = found.title if found is not None and found.device else objective
    return text[:1].upper() + text[1:] if capital else text


def slug(objective: str) -> str:
    """An objective as part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", objective.lower())
