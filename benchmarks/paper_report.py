"""What has been found so far, beside what the paper found, as Markdown, and the numbers as JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper_choice import NEXT, RULE
from benchmarks.paper_claims import claims
from benchmarks.paper_environment import held_out
from benchmarks.paper_favoured import favoured
from benchmarks.paper_plan import SEARCHES, Folder
from benchmarks.paper_state import Found, State, read_state, search_title
from star.fidelity.certificate import Interval
from star.report.numbers import change, duration, title, value
from star.search.front import candidates, front
from star.search.measures import CACHE_LENGTH
from star.training_directory import write_whole

__all__ = ["markdown", "write_report"]

_NOTHING = "–"


def write_report(folder: Folder, *more: tuple[Path, Path]) -> str:
    """Write the page and its numbers into the folder and to `more` places; the page, for the terminal.

    Raises:
        ValueError, RunError: the folder holds no experiment, or a damaged one.
        OSError: the files can not be written.
    """
    state = read_state(folder)
    text, data = markdown(state), json.dumps(numbers(state), indent=1, allow_nan=False) + "\n"
    for page, plain in (folder.report_files, *more):
        for path, content in ((page, text), (plain, data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content.encode())
    return text


def markdown(state: State) -> str:
    """The whole page."""
    parts = [
        ["# The paper's experiment at this scale", "", *_progress(state), *_circumstances(state)],
        ["## The searches", "", *_searches(state)],
        ["## The best, trained longer", "", *_trained(state)],
        ["## Does the proxy agree with the longer trainings?", "", *_agreement(state)],
        ["## The paper's claims", "", *claims(state)],
        ["## What selection favours", "", *favoured(state)],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


# ---- the head ------------------------------------------------------------------------------------------


def _progress(state: State) -> list[str]:
    missing = state.missing()
    lines = [f"**Not finished.** Missing: {'; '.join(missing)}."] if missing else ["**All of it.**"]
    if state.plan.quick:
        lines.append("**Sizes of --quick: these numbers mean nothing.**")
    return ["\n".join(lines), ""]


def _circumstances(state: State) -> list[str]:
    plan, settings = state.plan, state.plan.search
    proxy, longer, model = settings.proxy, plan.longer_settings().proxy, settings.model
    seconds = sum(item.seconds for found in state.searches for item in found.evaluations)
    text = ", ".join(settings.data.source) or "Python source (the text that needs no download)"
    return [
        f"Population {settings.population} x {settings.generations} generations x {settings.depth} LIVs of "
        f"width {model.width} with heads of {model.head_dim}; parameters and cache (of {CACHE_LENGTH} tokens "
        f"in bfloat16) are those of this width. {_device(state)}",
        "",
        f"Proxy: {proxy.steps} steps of {proxy.batch_size} x {proxy.length} tokens ({proxy.tokens:,}), "
        f"peak rate {proxy.learning_rate:g}, schedule {proxy.schedule}. Longer: {longer.steps} steps "
        f"({longer.tokens:,} tokens), schedule {longer.schedule}, {plan.seeds} seeds, none of them the "
        "proxy's. Recall: right answers in "
        f"`{settings.recall.task}` after {settings.recall.steps * plan.longer} steps of training on it. "
        f"Text: {text}. {_held_out(state)}",
        "",
        "Each objective was searched once: what is said of a search is said of this one run of it. The paper "
        "trains 24 LIVs of width 768 on 1.3 billion tokens a candidate. At the scale here all models, the "
        "longer trained ones and the layouts too, have barely been trained: what is better here is what "
        "learns fastest at the beginning.",
        "",
        f"The candidates took {duration(seconds)} of one worker. {_environment(state)}",
        "",
        "`python -m benchmarks.paper --out FOLDER` makes all of it and goes on where it was stopped; with "
        "`--report-only` it writes this page from what is there.",
        "",
    ]


def _device(state: State) -> str:
    if state.table is None:
        return "No device is measured yet."
    measured = state.table.settings
    kind = "processor seconds of one thread" if state.plan.cpu_time else "wall time"
    context = ", ".join(map(str, measured.contexts))
    doubt = state.table.warning()
    return (
        f"Decoding is that of another width: {measured.width}, with heads of {measured.head_dim}, in "
        f"{measured.dtype} behind {context} tokens on {state.table.device_name} ({kind})."
    ) + ("" if doubt is None else f" Warning: {doubt}.")


def _held_out(state: State) -> str:
    """What evaluations read, and how much of it the search has selected on."""
    text = state.environment.get("text")
    if not text:
        return ""
    searched, few = held_out(state.plan.search.proxy, text)
    later, many = held_out(state.plan.longer_settings().proxy, text)
    return (
        f"Held-out text: {few:,} bytes in the search; {many:,} after the longer trainings, "
        f"{len(searched & later) / len(later):.1%} of which the search has selected on (windows are spread "
        "evenly, and every evaluation begins with the first)."
    )


def _environment(state: State) -> str:
    found = state.environment
    if not found:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = found.get("threads")
    return (
        f"Begun on {found.get('processor')}, {found.get('cores')} cores, {threads} "
        f"{'thread' if threads == 1 else 'threads'} a worker; {versions}."
    )


# ---- the tables ----------------------------------------------------------------------------------------


def _searches(state: State) -> list[str]:
    names = list(state.layouts)
    lines = [
        "Bits per byte after the proxy's training. Survivors: mean of the first and of the last population. "
        "Better than a layout: candidates, by the proxy.",
        "",
        _row(
            [
                *("search", "candidates", "failed", "front", "best", "survivors, first → last"),
                *(f"better than {name}" for name in names),
            ]
        ),
        "|---" * (6 + len(names)) + "|",
    ]
    for found in state.searches:
        competing = candidates(found.evaluations)
        asked = [item for item in found.evaluations if item.generation is not None]
        qualities = [item.objectives["quality"] for item in competing]
        first, last = found.mean_quality(0), found.mean_quality(-1)
        better = [_better_than(found, name, qualities) for name in names]
        cells = [
            search_title(found.name) + ("" if found.finished else " (unfinished)"),
            str(len(asked)),
            str(len(asked) - len(competing)),
            str(len(front(found.evaluations, found.objectives))),
            f"{min(qualities):.3f}" if qualities else _NOTHING,
            _NOTHING if first is None or last is None else f"{first:.3f} → {last:.3f}",
            *better,
        ]
        lines.append(_row(cells))
    if not state.searches:
        return ["None has begun."]
    return lines


def _better_than(found: Found, name: str, qualities: Sequence[float]) -> str:
    """How many of the candidates the proxy found better than a layout."""
    if name not in found.references:
        return f"{name} failed" if found.finished else _NOTHING
    limit = found.references[name].objectives["quality"]
    return str(sum(quality < limit for quality in qualities))


_HEAD = (
    *("", "chosen for", "parameters", "cache", "decode p50, predicted", "measured"),
    *("proxy", "bits per byte", "recall"),
)


def _trained(state: State) -> list[str]:
    count = state.plan.best
    first = count - count // 2
    named = state.layouts
    lines = [
        "Bits per byte and recall: mean ± standard deviation of the seeds; proxy: bits per byte in the "
        "search. Beside parameters, cache and decoding: how much less or more than Transformer++. ▲: more "
        "than Transformer++ of something that its search was for.",
        "",
        _row(_HEAD),
        "|---" * len(_HEAD) + "|",
    ]
    lines += [_trained_row(state, name, "", genome) for name, genome in named.items()]
    for found in state.finished:
        for number, (item, why) in enumerate(found.choices, start=1):
            over = " ▲" if _exceeds(state, found, item.key) else ""
            label = f"{search_title(found.name)}, {number} (id {item.id}){over}"
            reason = "next by proxy" if why == NEXT else title(why)
            lines.append(_trained_row(state, label, reason, item.key))
    rule = RULE.format(best=count, first=first, others=count - first)
    return [*lines, "", rule, "", *_prediction_error(state)]


def _exceeds(state: State, found: Found, genome: str) -> bool:
    """Whether it takes more than Transformer++ of what was searched for beside quality."""
    own, limits = state.sizes(genome), state.sizes(state.layouts["Transformer++"])
    return any(own[name] > limits[name] for name in found.objectives[1:] if name in own)


def _trained_row(state: State, label: str, why: str, genome: str) -> str:
    longer, base = state.longer[genome], state.layouts["Transformer++"]
    own, bases = state.sizes(genome), state.sizes(base)
    cells = [label, why]
    for name in ("size", "cache", "decode_p50"):
        if name not in own:
            cells.append(_NOTHING)
            continue
        relative = "" if genome == base or not bases[name] else f" ({change(own[name], bases[name])})"
        cells.append(f"{value(name, own[name])}{relative}")
    measured, proxy = state.measured_decode(genome), state.proxy_quality(genome)
    cells.append(_NOTHING if measured is None else value("decode_p50", measured))
    cells.append(_NOTHING if proxy is None else f"{proxy:.3f}")
    failed = f", {longer.failed} failed" if longer.failed else ""
    cells += [_spread(longer.quality, 1.0, "", 3) + failed, _spread(longer.recall, 100.0, " %", 1)]
    return _row(cells)


def _prediction_error(state: State) -> list[str]:
    errors = _decode_errors(state)
    if not errors:
        return ["Decoding is predicted from single LIVs; no whole model has been measured yet."]
    return [
        "Decoding is predicted from single LIVs; of the layouts and the joint search's candidates the whole "
        f"model was measured too. Median error of these {len(errors)} predictions: "
        f"{statistics.median(errors):.1%}, largest {max(errors):.1%}."
    ]


def _decode_errors(state: State) -> list[float]:
    """|predicted - measured| / measured of whole models."""
    errors = []
    for genome in state.measured:
        predicted, measured = state.sizes(genome).get("decode_p50"), state.measured_decode(genome)
        if predicted is not None and measured:
            errors.append(abs(predicted - measured) / measured)
    return errors


def _spread(values: Sequence[float], scale: float, unit: str, digits: int) -> str:
    if not values:
        return _NOTHING
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean}{unit} (one seed)"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}{unit}"


# ---- the proxy -----------------------------------------------------------------------------------------


def _agreement(state: State) -> list[str]:
    lines = [
        "Kendall's tau with the mean of the longer trainings, with its bootstrap interval of 95 % over "
        "genomes: of the proxy, and of parameter count alone (more taken to be better). Those of one search "
        "were selected by the proxy and span a narrow range of it, which lowers tau.",
        "",
        "| | genomes | proxy | parameter count |",
        "|---|---|---|---|",
    ]
    for name, (count, taus) in state.agreements.items():
        lines.append(
            _row(
                [
                    search_title(name) if name in SEARCHES else name,
                    str(count),
                    _interval(taus["proxy"]),
                    _interval(taus["parameters"]),
                ]
            )
        )
    return lines


def _interval(tau: Interval) -> str:
    return f"{tau.value:.2f} ({tau.low:.2f} to {tau.high:.2f})" if tau.defined else _NOTHING


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ---- the numbers ---------------------------------------------------------------------------------------


def numbers(state: State) -> dict[str, Any]:
    """What the page was made from, as plain JSON."""
    return {
        "plan": state.plan.to_json(),
        "environment": dict(state.environment),
        "missing": state.missing(),
        "device": None if state.table is None else state.table.device_name,
        "layouts": {name: _numbers_of(state, key) for name, key in state.layouts.items()},
        "searches": {
            found.name: {
                "finished": found.finished,
                "evaluations": len(found.evaluations),
                "seconds": round(sum(item.seconds for item in found.evaluations), 1),
                "references": {name: dict(item.objectives) for name, item in found.references.items()},
                "chosen": [
                    {
                        "id": item.id,
                        "why": why,
                        "proxy": dict(item.objectives),
                        **_numbers_of(state, item.key),
                    }
                    for item, why in found.choices
                ],
                "population": list(found.populations[-1]) if found.populations else [],
            }
            for found in state.searches
        },
        "agreement": {
            name: {"genomes": count, **{kind: _plain(tau) for kind, tau in taus.items()}}
            for name, (count, taus) in state.agreements.items()
        },
        "drifts": {str(objectives): len(items) for objectives, items in state.drifts.items()},
        "tests": [vars(test) for test in state.tests],
    }


def _plain(tau: Interval) -> list[float | None]:
    return [None if math.isnan(number) else round(number, 6) for number in tau]


def _numbers_of(state: State, genome: str) -> dict[str, Any]:
    longer = state.longer[genome]
    return {
        "genome": genome,
        **state.sizes(genome),
        "decode_p50_measured": state.measured_decode(genome),
        "quality": list(longer.quality),
        "recall": list(longer.recall),
        "failed": longer.failed,
    }
