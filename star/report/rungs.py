"""The report's section on candidates that were stopped at a rung, and what that saved."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from star.report.html import Html, element, join
from star.report.numbers import count, duration
from star.search.rungs import saved_seconds
from star.search.store import Evaluation

if TYPE_CHECKING:
    from star.report.summary import RunSummary

__all__ = ["rungs_section", "rungs_sentence"]


def rungs_sentence(run: RunSummary) -> str:
    """How many candidates were stopped, where, and what it saved; empty for a run without rungs."""
    if not run.settings.rungs:
        return ""
    if not run.stopped:
        return "No candidate was stopped at a rung."
    saved = saved_seconds(run.stopped, run.settings)
    stopped = f"{len(run.stopped)} of {count(len(run.candidates), 'candidate')} stopped at a rung"
    whole = saved + run.training_seconds
    share = f" ({100 * saved / whole:.0f} % of {duration(whole)})" if whole else ""
    return f"{stopped}, which saved about {duration(saved)} of training{share}."


def rungs_section(run: RunSummary) -> Html | None:
    """The section; None for a run without rungs."""
    if not run.settings.rungs:
        return None
    settings = run.settings
    parts = " and ".join(f"{100 * part:g} %" for part in settings.rungs)
    rivals = "every survivor of the generation before"
    if settings.rung_rivals == "front":
        rivals = "the front of the generations before"
    lead = (
        f"At {parts} of its training a candidate is stopped if, with a confidence of "
        f"{100 * settings.rung_confidence:g} %, it will come behind {rivals}. "
        "What it will reach is foretold from its training loss by those that were trained to their end. A "
        "stopped candidate is not on the front, and its quality is that of an unfinished training."
    )
    steps = Counter(_steps_of(item) for item in run.stopped)
    rows = [
        element(
            "tr",
            element("td", f"step {step} of {settings.proxy.steps}"),
            element("td", number, class_="number"),
        )
        for step, number in sorted(steps.items())
    ]
    head = element("tr", element("th", "stopped at"), element("th", "candidates", class_="number"))
    table = element("table", element("thead", head), element("tbody", *rows)) if rows else None
    return join(
        element("h2", "Rungs", id="rungs"),
        element("p", lead, class_="lead"),
        element("p", rungs_sentence(run)),
        table,
    )


def _steps_of(item: Evaluation) -> int:
    """Where its curve ends; 0 where it has none."""
    last = item.curve[-1] if item.curve else None
    step = last[0] if isinstance(last, (list, tuple)) and last else 0
    return step if isinstance(step, int) else 0
