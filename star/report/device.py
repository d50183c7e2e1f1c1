"""What a report says about the device: budgets, and how good the predictions are that the search believed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from star.measure.quantities import at, relative_errors, split, value_of
from star.profile.table import ProfileTable
from star.report.html import Html, element, join
from star.report.numbers import axis, change, count, duration, title, value
from star.search.budgets import excess, width_of
from star.search.objectives import find
from star.search.settings import SearchSettings
from star.search.store import Evaluation

__all__ = ["AIM", "DeviceReport", "Pair", "budget_text", "device_report", "device_section"]

AIM = 0.1
"""Median relative error that predictions should stay within."""

_ROWS_AT_MOST = 100


@dataclass(frozen=True)
class Pair:
    """A candidate's predicted and measured quantities, by their names with contexts."""

    evaluation: Evaluation
    predicted: Mapping[str, float]
    measured: Mapping[str, float]


@dataclass(frozen=True)
class DeviceReport:
    """How the search stands to its device.

    Attributes:
        table: that predictions came from.
        pairs: candidates that were measured as a whole, by id.
        names: the quantities that were searched for or have a budget, without those that need no device.
        budgets: of these.
        broken: ids of the front's members that exceed a budget as they were measured.
    """

    table: ProfileTable
    pairs: tuple[Pair, ...]
    names: tuple[str, ...]
    budgets: Mapping[str, float]
    broken: tuple[int, ...]

    @property
    def errors(self) -> dict[str, float]:
        """Median relative error of each quantity at each context."""
        pairs = [(pair.predicted, pair.measured) for pair in self.pairs]
        return {name: statistics.median(values) for name, values in relative_errors(pairs).items()}

    def error_of(self, name: str) -> float | None:
        """Of a searched quantity."""
        return value_of(self.errors, name)

    def judged(self) -> list[tuple[str, bool | None]]:
        """In sentences, and whether that is good."""
        judged: list[tuple[str, bool | None]] = []
        doubts = self.table.doubts()
        if doubts:
            judged.append((f"The profile table is unsteady: {'; '.join(doubts)}.", False))
        if not self.pairs:
            judged.append(
                ("No candidate has been measured as a whole, so predictions are not checked.", None)
            )
            return judged
        parts, good = [], True
        for name in self.names:
            error = self.error_of(name)
            if error is not None:
                parts.append(f"{100 * error:.1f} % ({title(name)})")
                good = good and error <= AIM
        if parts:
            measured = count(len(self.pairs), "candidate")
            judged.append(
                (f"Predictions for the device are off by {', '.join(parts)} in the median of {measured} "
                 "measured as a whole.", good)
            )  # fmt: skip
        if self.broken:
            ids = ", ".join(str(id) for id in self.broken)
            judged.append((f"Measured as a whole, candidates of the front exceed a budget: {ids}.", False))
        return judged


def device_report(
    settings: SearchSettings, front: Sequence[Evaluation], evaluations: Sequence[Evaluation],
    measured: Mapping[int, Mapping[str, float]],
) -> DeviceReport | None:  # fmt: skip
    """The report of a run; None where it searched for no device."""
    from star.genome import Genome
    from star.profile.predict import Predictor

    if settings.profile is None:
        return None
    predictor = Predictor(settings.profile)
    pairs = tuple(
        Pair(item, predictor.predict(Genome.parse(item.key)), measured[item.id])
        for item in evaluations
        if measured.get(item.id)
    )
    names = tuple(settings.of_device())
    budgets = {name: limit for name, limit in settings.budgets.items() if name in names}
    on_front = {item.id for item in front}
    broken = tuple(
        pair.evaluation.id
        for pair in pairs
        if pair.evaluation.id in on_front
        and any(_exceeds(pair.measured, name, limit) for name, limit in budgets.items())
    )
    return DeviceReport(settings.profile, pairs, names, budgets, broken)


def _exceeds(measured: Mapping[str, float], name: str, limit: float) -> bool:
    number = value_of(measured, name)
    return number is not None and excess(name, number, limit) > 0


def budget_text(settings: SearchSettings, name: str) -> str:
    """ "time to first token at most 200 ms at width 768"."""
    objective, width = find(name), width_of(name, settings)
    side = "at least" if objective is not None and objective.maximised else "at most"
    where = "" if width is None else f" at width {width}"
    return f"{title(name)} {side} {value(name, settings.budgets[name])}{where}"


# ---- the section of the page -----------------------------------------------------------------------------


def device_section(report: DeviceReport) -> Html:
    """Device, size, errors by quantity, and every candidate that was measured."""
    return join(element("p", _lead(report.table), class_="lead"), _errors(report), _candidates(report))


def _lead(table: ProfileTable) -> str:
    settings = table.settings
    config = settings.config()
    threads = f" with {count(settings.threads or 1, 'thread')}" if settings.device == "cpu" else ""
    return (
        f"{table.device_name} ({settings.device}{threads}), models of width {config.width} with heads of "
        f"{config.head_dim} in {settings.dtype}, untrained, one sequence. Each LIV was measured alone in "
        f"{duration(table.seconds)}, and every candidate's values are sums of these; the front and some "
        "others were then measured as a whole."
    )


def _errors(report: DeviceReport) -> Html:
    errors = report.errors
    if not errors:
        return Html()
    bases = list(dict.fromkeys(split(name)[0] for name in errors))
    contexts = report.table.settings.contexts
    head = element(
        "tr",
        element("th", "median error of the prediction"),
        *(element("th", f"{context:,} tokens", class_="number") for context in contexts),
    )
    body = []
    for base in bases:
        cells = []
        for context in contexts:
            error = errors.get(at(base, context))
            good = None if error is None else "better" if error <= AIM else "worse"
            text = "–" if error is None else f"{100 * error:.1f} %"
            cells.append(element("td", element("small", text, class_=good), class_="number"))
        body.append(element("tr", element("td", title(base)), *cells))
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", table, class_="wide")


def _candidates(report: DeviceReport) -> Html:
    """Measured values, each with how far off its prediction was."""
    if not report.pairs:
        return Html()
    names = [name for name in report.pairs[0].measured if split(name)[0] != "prefill"]
    head = element(
        "tr", element("th", "candidate"), *(element("th", axis(name), class_="number") for name in names)
    )
    body = []
    for pair in report.pairs[:_ROWS_AT_MOST]:
        cells = []
        for name in names:
            number, foretold = pair.measured.get(name), pair.predicted.get(name)
            known = number is not None and foretold is not None
            off = element("small", f"predicted {change(foretold, number)}") if known else None  # type: ignore[arg-type]
            cells.append(element("td", value(name, number), off, class_="number"))
        body.append(element("tr", element("td", str(pair.evaluation.id)), *cells))
    table = element("table", element("thead", head), element("tbody", *body))
    return join(element("h3", "Measured as a whole"), element("div", table, class_="wide"))
