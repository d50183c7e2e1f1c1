"""The report as one HTML page, from a run's summary and its plots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from star import pools
from star.draw import FAMILY_COLOURS, family_colour
from star.genome import Genome, GenomeError
from star.report.device import device_section
from star.report.fidelity import fidelity_section
from star.report.figures import svg
from star.report.html import Html, element, join
from star.report.numbers import change, count, difference, duration, measured_objectives, sign, title, value
from star.report.plots import Plot
from star.report.rungs import rungs_section
from star.report.style import CSS
from star.report.summary import MAIN_REFERENCE, RunSummary
from star.search.store import Evaluation
from star.sharing import resolve

__all__ = ["BACKBONES_AT_MOST", "page"]

BACKBONES_AT_MOST = 24
_ROWS_AT_MOST = 100
_FAILURES_AT_MOST = 50
# Nothing is loaded from anywhere, and nothing runs, whatever may have got into the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def page(run: RunSummary, plots: Sequence[Plot], backbones: Mapping[int, str]) -> str:
    """The whole page.

    Args:
        run: what to report.
        plots: of `star.report.plots`.
        backbones: candidate id -> inline SVG of its backbone.
    """
    first = _beside_front(plots)
    sections = [
        _header(run),
        _front(run, plots),
        _fidelity(run, plots),
        _backbones(run, backbones),
        _device(run, plots),
        _section(
            "How the search went",
            _PROGRESS,
            _figures([plot for plot in plots if plot.section == "progress" and plot not in first]),
        ),
        _section(
            "What evolution favours",
            _EVOLUTION,
            _figures([plot for plot in plots if plot.section == "evolution"]),
        ),
        rungs_section(run),
        _failures(run),
        _limits(run),
        _settings(run),
        element(
            "footer", "Written by star report. This file needs nothing else: it can be sent and archived."
        ),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", f"{run.directory.name or 'run'} · STAR search"),
        Html(f"<style>{CSS}</style>"),
    )
    body = element("body", element("main", *sections))
    return f'<!DOCTYPE html>\n<html lang="en">{head}{body}</html>\n'


_PROGRESS = "Each generation is bred from the best of all before it: recombined, mutated, repaired, trained."
_EVOLUTION = "What the survivors of each generation are made of."


def _section(heading: str, lead: str, content: Html, *, id: str | None = None) -> Html | None:
    """A heading with what belongs to it; None where there is nothing."""
    if not content:
        return None
    return join(element("h2", heading, id=id), element("p", lead, class_="lead"), content)


def _beside_front(plots: Sequence[Plot]) -> list[Plot]:
    """The plots of the front; a single one has room for the hypervolume at its side."""
    fronts = [plot for plot in plots if plot.section == "front"]
    return fronts if len(fronts) > 1 else [*fronts, *(plot for plot in plots if plot.name == "hypervolume")]


def _figures(plots: Sequence[Plot]) -> Html:
    return element("div", *(_figure(plot) for plot in plots), class_="grid") if plots else Html()


def _figure(plot: Plot) -> Html:
    return element(
        "figure",
        element("h3", plot.title),
        Html(svg(plot.figure, plot.name, f"{plot.title}. {plot.caption}")),
        element("figcaption", plot.caption),
    )


# ---- what was found ----------------------------------------------------------------------------------


def _header(run: RunSummary) -> Html:
    settings = run.settings
    what = (
        f"Backbones of {count(settings.depth, 'LIV')} at width {settings.model.width}, searched for "
        f"{' and '.join(settings.objectives)} on {_corpus(run).get('name', 'unknown text')}. "
    )
    return join(
        element("h1", run.directory.resolve().name),
        element("p", what + run.status(), class_="lead"),
        element("div", *_cards(run), class_="cards"),
        _verdicts(run),
    )


def _cards(run: RunSummary) -> list[Html]:
    facts: list[tuple[str, str]] = [(f"{len(run.candidates)}", "candidates trained")]
    if run.failures:
        facts.append((str(len(run.failures)), "failed"))
    if run.stopped:
        facts.append((str(len(run.stopped)), "stopped early"))
    if run.over_budget:
        facts.append((str(len(run.over_budget)), "over budget"))
    facts.append((str(len(run.front)), "on the front"))
    if run.champion is not None:
        facts.append((value("quality", run.champion.objectives["quality"]), "best bits per byte"))
        for comparison in run.comparisons:
            if comparison.name == MAIN_REFERENCE and comparison.quality is not None:
                theirs = comparison.reference.objectives["quality"]
                relative = change(run.champion.objectives["quality"], theirs)
                facts.append((relative, f"bits per byte against {comparison.name}"))
    known = [volume for volume in run.hypervolumes if volume is not None]
    if len(known) > 1 and known[0] > 0:
        facts.append((f"×{known[-1] / known[0]:.2f}", "hypervolume since generation 1"))
    if run.overhead[1]:
        facts.append((duration(run.overhead[1]), "for the finished generations"))
    return [
        element("div", element("b", number), element("span", text), class_="card") for number, text in facts
    ]


def _verdicts(run: RunSummary) -> Html:
    """The sentences, coloured by whether they are what one hopes for."""
    return element(
        "ul",
        *(
            element("li", _unbroken(text), class_={True: "good", False: "bad", None: None}[good])
            for text, good in run.judged()
        ),
        class_="verdicts",
    )


def _unbroken(text: str) -> str:
    """Percentages stay on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _front(run: RunSummary, plots: Sequence[Plot]) -> Html | None:
    if not run.front and not run.references:
        return None
    return _section(
        "The front",
        "Candidates that no other beats in every objective at once, beside the layouts that people designed, "
        "trained under the same proxy.",
        join(_figures(_beside_front(plots)), _front_table(run), _legend()),
        id="front",
    )


def _front_table(run: RunSummary) -> Html:
    rows = [(f"{item.id}", item) for item in run.front[:_ROWS_AT_MOST]]
    others = [(name, item) for name, item in run.references.items()]
    columns = measured_objectives([item for _, item in [*rows, *others]], run.settings.objectives)
    main = run.references.get(MAIN_REFERENCE)
    base: Mapping[str, float] = main.objectives if main is not None and main.ok else {}
    head = element(
        "tr",
        element("th", "candidate"),
        *(element("th", title(name), class_="number") for name in columns),
        element("th", "generation", class_="number"),
        element("th", "backbone, first LIV left"),
    )
    body = [
        *(
            _row(Html(element("a", name, href=f"#candidate-{item.id}")), item, columns, base)
            for name, item in rows
        ),
        *(
            _row(name, item, columns, {} if item is main else base, class_="reference")
            for name, item in others
        ),
    ]
    more = len(run.front) - len(rows)
    note = element("p", f"and {more} more on the front", class_="lead") if more else None
    compared = element("p", f"Percentages are against {MAIN_REFERENCE}.", class_="lead") if base else None
    table = element("table", element("thead", head), element("tbody", *body))
    return join(element("div", table, class_="wide"), note, compared)


def _row(
    name: str,
    item: Evaluation,
    columns: Sequence[str],
    base: Mapping[str, float],
    class_: str | None = None,
) -> Html:
    cells = []
    for column in columns:
        number = item.objectives.get(column)
        relative = None
        if number is not None and column in base:
            text = difference(number, base[column])
            good, bad = ("less", "more") if sign(column) > 0 else ("more", "less")
            judged = "better" if text.endswith(good) else "worse" if text.endswith(bad) else None
            relative = element("small", text, class_=judged)
        cells.append(element("td", value(column, number), relative, class_="number"))
    generation = "" if item.generation is None else item.generation + 1
    said = None
    if item.reason is not None:
        said = element("small", item.reason if item.ok else f"{item.status}: {item.reason}")
    return element(
        "tr",
        element("td", name),
        *cells,
        element("td", generation, class_="number"),
        element("td", _strip(item.key), said),
        class_=class_,
    )


def _strip(genome: str) -> Html:
    """A backbone as a row of coloured bars, each with its class as a tooltip."""
    try:
        genes = Genome.parse(genome).genes
    except GenomeError as error:
        return element("small", f"no genome: {error}")
    bars = []
    for number, gene in enumerate(genes[:400], start=1):
        entry = pools.find(gene.liv_class)
        name, colour = ("unknown", "gray") if entry is None else (entry.name, family_colour(entry.family))
        bars.append(element("i", style=f"background:{colour}", title=f"{number}: {name}"))
    return element(
        "span", *bars, class_="strip", role="img", aria_label=f"backbone of {count(len(genes), 'LIV')}"
    )


def _legend() -> Html:
    return element(
        "div",
        *(
            element("span", element("i", style=f"background:{colour}"), family)
            for family, colour in FAMILY_COLOURS.items()
        ),
        class_="legend",
    )


def _backbones(run: RunSummary, backbones: Mapping[int, str]) -> Html | None:
    shown = [item for item in run.front if item.id in backbones]
    if not shown:
        return None
    more = len(run.front) - len(shown)
    note = f" The first {len(shown)} of {len(run.front)} are drawn." if more else ""
    return _section(
        "Backbones of the front",
        "From the embedding (top) to the logits. Lines on the left join LIVs that use the same featurizer "
        f"weights; arrows on the right lead from features to the LIVs that reuse them; a double bar marks "
        f"differential classes.{note}",
        element("div", *(_backbone(item, run, backbones[item.id]) for item in shown), class_="backbones"),
        id="backbones",
    )


def _backbone(item: Evaluation, run: RunSummary, drawing: str) -> Html:
    columns = measured_objectives([item], run.settings.objectives)
    numbers = " · ".join(f"{value(name, item.objectives[name])} {title(name)}" for name in columns)
    return element(
        "figure",
        element("h3", f"Candidate {item.id}"),
        element("p", numbers, class_="numbers"),
        Html(drawing),
        element("p", element("code", item.key), class_="genome"),
        class_="backbone",
        id=f"candidate-{item.id}",
    )


def _fidelity(run: RunSummary, plots: Sequence[Plot]) -> Html | None:
    if not run.front:
        return None
    return join(
        element("h2", "How far to believe the order", id="fidelity"),
        fidelity_section(run.certificate, len(run.evaluations), run.directory),
        _figures([plot for plot in plots if plot.section == "fidelity"]),
    )


def _device(run: RunSummary, plots: Sequence[Plot]) -> Html | None:
    if run.device is None:
        return None
    drawn = _figures([plot for plot in plots if plot.section == "device"])
    return join(element("h2", "On the device", id="device"), device_section(run.device), drawn)


# ---- what went wrong, and what to believe ------------------------------------------------------------


def _failures(run: RunSummary) -> Html:
    heading = element("h2", "Failures", id="failures")
    if not run.failures:
        sentence = "No candidate failed." if run.evaluations else "Nothing has been trained yet."
        return join(heading, element("p", sentence, class_="lead"))
    kinds = [
        element(
            "tr",
            element("td", kind or "no reason recorded"),
            element("td", len(items), class_="number"),
            element("td", items[0].reason, element("small", f"candidate {items[0].id}")),
        )
        for kind, items in run.failure_reasons()
    ]
    head = element(
        "tr",
        element("th", "kind"),
        element("th", "candidates", class_="number"),
        element("th", "for example"),
    )
    table = element("div", element("table", element("thead", head), element("tbody", *kinds)), class_="wide")
    each = [
        element(
            "tr",
            element("td", item.id, class_="number"),
            element("td", item.reason),
            element("td", _strip(item.key)),
        )
        for item in run.failures[:_FAILURES_AT_MOST]
    ]
    listed = element(
        "details",
        element("summary", f"The {'first ' if len(run.failures) > len(each) else ''}{len(each)} one by one"),
        element("table", element("tbody", *each)),
    )
    lead = (
        f"{count(len(run.failures), 'training')} of {len(run.evaluations)} failed. A failed candidate is "
        "kept out of the front and never stops the search."
    )
    return join(heading, element("p", lead, class_="lead"), table, listed)


def _limits(run: RunSummary) -> Html:
    """What these numbers are not."""
    proxy = run.settings.proxy
    noise = math.nan if run.certificate is None else run.certificate.noise.deviation
    spread = "was not measured here" if math.isnan(noise) else f"is {noise:.4f} after longer training"
    sentences = [
        f"Quality is a proxy: bits per byte on held-out text after {count(proxy.steps, 'step')} of "
        f"{proxy.batch_size} × {proxy.length} tokens ({proxy.tokens:,} in all). A fully trained model reads "
        "thousands of times as much, and the order of candidates may change on the way. Train those that "
        "you care about for longer (star train) before you believe it.",
        "Every candidate and every reference was trained once in the search, from one seed, with one set of "
        "hyperparameters that was tuned for none of them. Differences of about the spread between seeds "
        f"mean nothing; that spread {spread}.",
        "The best of many tries looks better than it is: the winner's quality is partly luck. The same "
        "held-out text chose it and judges it.",
        "Bits per byte hide what a model can recall from its context."
        if "recall" not in run.settings.objectives
        else "Recall was measured on a synthetic task; real texts ask for more than one kind of it.",
        "Caches and FLOPs are counted, not measured: speed on a device may rank candidates differently."
        if run.device is None
        else "Values of the device are predicted from single LIVs at batch 1; other batch sizes, other "
        "software, and a device that is busy or hot may rank candidates differently.",
    ]
    return join(
        element("h2", "What these numbers do not say", id="limits"),
        element("ul", *(element("li", sentence) for sentence in sentences)),
    )


# ---- settings ----------------------------------------------------------------------------------------


def _settings(run: RunSummary) -> Html:
    corpus = _corpus(run)
    versions = run.facts.get("versions")
    beside, total = run.overhead
    share = f"{100 * beside / total:.2f} % of {duration(total)}" if total else "no finished generation"
    lost = sum(event.kind == "worker_lost" for event in run.events)
    sessions = sum(event.kind == "session" for event in run.events)
    facts: list[tuple[str, object]] = [
        ("directory", run.directory),
        ("begun", _clock(run.events[0].at) if run.events else "–"),
        ("last event", _clock(run.events[-1].at) if run.events else "–"),
        ("sessions", f"{sessions}" + (f", {count(lost, 'worker')} lost" if lost else "")),
        ("beside training", f"{share} (select, vary, store)"),
        (
            "all trainings",
            f"{duration(run.training_seconds)} on {count(run.workers, 'worker')}",
        ),
        ("text", corpus.get("name", "–")),
        ("content hash", element("code", corpus.get("content_hash", "–"))),
        ("tokens and split", element("code", corpus.get("key", "–"))),
        (
            "versions",
            ", ".join(f"{name} {number}" for name, number in versions.items())
            if isinstance(versions, dict)
            else "–",
        ),
    ]
    listed = element("dl", *_definitions(facts))
    details = element(
        "details",
        element("summary", "All settings"),
        element("dl", *_definitions(_flat({**run.settings.to_json(), "profile": _profile_name(run)}))),
    )
    return join(
        element("h2", "The run", id="run"),
        listed,
        element("p", "Draw, use, or carry on:", class_="lead"),
        element("pre", _commands(run), class_="command"),
        details,
    )


def _profile_name(run: RunSummary) -> str | None:
    """The device's table, which is long, by its checksum."""
    table = run.settings.profile
    return None if table is None else f"{table.checksum[:12]} of {table.device_name}"


def _commands(run: RunSummary) -> str:
    if run.champion is None:
        return f"star resume {run.directory}"
    id = run.champion.id
    lines = [
        f"star show {run.directory} --id {id}",
        f'star generate {run.directory} --id {id} "Once"',
        f"star train {run.directory} --id {id} --steps 5000",
    ]
    return "\n".join(lines if run.finished else [f"star resume {run.directory}", *lines])


def _corpus(run: RunSummary) -> Mapping[str, Any]:
    corpus = run.facts.get("data")
    return corpus if isinstance(corpus, dict) else {}


def _definitions(pairs: Sequence[tuple[str, object]]) -> list[Html]:
    as_child: Callable[[object], str] = lambda item: item if isinstance(item, Html) else str(item)  # noqa: E731
    return [part for name, item in pairs for part in (element("dt", name), element("dd", as_child(item)))]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested settings as pairs with dotted names."""
    pairs: list[tuple[str, object]] = []
    for name, item in settings.items():
        if isinstance(item, dict):
            pairs += _flat(item, f"{prefix}{name}.")
        else:
            shown = ", ".join(str(part) for part in item) if isinstance(item, (list, tuple)) else item
            pairs.append((f"{prefix}{name}", "–" if shown in (None, "") else shown))
    return pairs


def _clock(seconds: float) -> str:
    """A time of the record, in UTC, so that the page does not depend on where it is written."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "–"


def draw_backbones(run: RunSummary) -> dict[int, str]:
    """Inline SVG of the front's backbones, as many as the page shows."""
    from star import draw

    drawings = {}
    for item in run.front[:BACKBONES_AT_MOST]:
        try:
            genome = Genome.parse(item.key)
            resolve(genome)
            figure = draw.figure(genome, compact=True)
        except ValueError:
            continue  # no genome, or too deep for a picture; the table says so
        drawings[item.id] = svg(figure, f"backbone-{item.id}", f"Backbone of candidate {item.id}")
    return drawings
