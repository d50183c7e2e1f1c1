"""What has been found so far, beside what the paper found, as Markdown, and the numbers as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper_claims import claims, favoured
from benchmarks.paper_drift import Comparison
from benchmarks.paper_plan import SEARCHES, Folder
from benchmarks.paper_retrain import layouts
from benchmarks.paper_state import State, all_genomes, read_state, sizes
from star.report.numbers import change, duration, title, value
from star.search.front import candidates, front
from star.search.measures import CACHE_LENGTH
from star.training_directory import write_whole

__all__ = ["write_report"]

_NOTHING = "–"


def write_report(folder: Folder, result: Path, data: Path) -> str:
    """Write the table and its numbers; the table, for the terminal.

    Raises:
        ValueError, RunError: the folder holds no experiment, or a damaged one.
        OSError: the files can not be written.
    """
    state = read_state(folder)
    tests = state.tests()
    text = markdown(state, tests)
    for path, content in ((result, text), (data, json.dumps(numbers(state, tests), indent=1) + "\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode())
    return text


# ---- the table -----------------------------------------------------------------------------------------


def markdown(state: State, tests: Sequence[Comparison]) -> str:
    """The whole page."""
    parts = [
        ["# The paper's experiment at this scale", "", *_circumstances(state)],
        ["## The searches", "", *_searches(state)],
        ["## The best, trained longer", "", *_trained(state)],
        ["## The paper's claims", "", *claims(state, tests)],
        ["## What selection favours", "", *favoured(state, tests)],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _circumstances(state: State) -> list[str]:
    plan, settings = state.plan, state.plan.search
    proxy, longer = settings.proxy, state.plan.longer_settings().proxy
    wanted = len(all_genomes(state)) * plan.seeds
    trained = sum(len(item.quality) + item.failed for item in state.longer.values())
    done = (
        f"{len(state.finished)} of {len(SEARCHES)} searches, {trained} of {wanted} longer trainings of the "
        f"finished ones and the layouts, {len(state.drifts)} of {plan.drifts} drifts have finished"
    )
    complete = len(state.finished) == len(SEARCHES) and trained == wanted
    complete = complete and len(state.drifts) == plan.drifts
    seconds = sum(item.seconds for found in state.searches for item in found.evaluations)
    device = "no device measured yet"
    if state.table is not None:
        kind = "processor seconds of one thread" if plan.cpu_time else "wall time"
        measured = state.table.settings
        context = ", ".join(map(str, measured.contexts))
        device = (
            f"decoding predicted for width {measured.width} in {measured.dtype} behind {context} tokens on "
            f"{state.table.device_name} ({kind})"
        )
    text = ", ".join(settings.data.source) or "Python source (the text that needs no download)"
    return [
        f"**{'All of it' if complete else 'Not finished'}**: {done}.",
        "",
        f"Population {settings.population} x {settings.generations} generations x {settings.depth} LIVs of "
        f"width {settings.model.width}; proxy: {proxy.steps} steps of {proxy.batch_size} x {proxy.length} "
        f"tokens, peak rate {proxy.learning_rate:g}; longer: {longer.steps} steps, {plan.seeds} seeds. "
        f"Text: {text}. Cache of {CACHE_LENGTH} tokens in bfloat16; {device}. Recall: right answers in "
        f"`{settings.recall.task}` after {settings.recall.steps * plan.longer} steps of training on it. The "
        f"candidates took {duration(seconds)} of one worker. The paper's own scale is 24 LIVs of width 768 "
        f"and 1.3 billion tokens a candidate; these are {proxy.tokens / 1e3:.3g} thousand.",
        "",
        "`python -m benchmarks.paper --out FOLDER` makes all of it and goes on where it was stopped; with "
        "`--report-only` it writes this page from what is there.",
    ]


def _searches(state: State) -> list[str]:
    lines = [
        "Bits per byte after the proxy's training. Survivors: mean of the first and of the last population.",
        "",
        "| search | candidates | failed | front | best | survivors, first → last | better than Transformer++ "
        "| better than StripedMamba | better than LFM2 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in state.searches:
        competing = candidates(found.evaluations)
        asked = [item for item in found.evaluations if item.generation is not None]
        qualities = [item.objectives["quality"] for item in competing]
        first, last = found.mean_quality(0), found.mean_quality(-1)
        better = [
            _NOTHING
            if name not in found.references
            else f"{sum(q < found.references[name].objectives['quality'] for q in qualities)}"
            for name in layouts(1)
        ]
        cells = [
            _search_name(found.name) + ("" if found.finished else " (unfinished)"),
            str(len(asked)),
            str(len(asked) - len(competing)),
            str(len(front(found.evaluations, SEARCHES[found.name]))),
            f"{min(qualities):.3f}" if qualities else _NOTHING,
            _NOTHING if first is None or last is None else f"{first:.3f} → {last:.3f}",
            *better,
        ]
        lines.append(_row(cells))
    if not state.searches:
        return ["None has begun."]
    return lines


def _trained(state: State) -> list[str]:
    lines = [
        "Bits per byte and recall: mean ± standard deviation of the seeds. Beside each size and cache: how "
        "much less or more than Transformer++.",
        "",
        "| | parameters | cache | decode p50 | bits per byte | recall |",
        "|---|---|---|---|---|---|",
    ]
    named = layouts(state.plan.search.depth)
    for name, genome in named.items():
        lines.append(_trained_row(state, name, genome, named["Transformer++"]))
    for found in state.finished:
        for number, item in enumerate(found.chosen, start=1):
            label = f"{_search_name(found.name)}, {number} (id {item.id})"
            lines.append(_trained_row(state, label, item.key, named["Transformer++"]))
    lines += ["", _chosen_how(state)]
    return lines


def _chosen_how(state: State) -> str:
    return (
        f"Of each search the {state.plan.best} that were trained longer are those that take no more than "
        "Transformer++ of what was searched for beside quality, front by front, and within a front by the "
        "proxy's quality."
    )


def _trained_row(state: State, label: str, genome: str, base: str) -> str:
    longer = state.longer[genome]
    own, bases = sizes(state, genome), sizes(state, base)
    cells = [label]
    for name, number in own.items():
        relative = "" if genome == base or not bases[name] else f" ({change(number, bases[name])})"
        cells.append(f"{value(name, number)}{relative}")
    if "decode_p50" not in own:
        cells.append(_NOTHING)
    failed = f", {longer.failed} failed" if longer.failed else ""
    cells += [_spread(longer.quality, 1.0, "", 3) + failed, _spread(longer.recall, 100.0, " %", 1)]
    return _row(cells)


def _spread(values: Sequence[float], scale: float, unit: str, digits: int) -> str:
    if not values:
        return _NOTHING
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean}{unit} (one seed)"
    return f"{mean} ± {scale * statistics.stdev(values):.{digits}f}{unit}"


def _search_name(name: str) -> str:
    return " + ".join(title(objective) if "_" in objective else objective for objective in SEARCHES[name])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ---- the numbers ---------------------------------------------------------------------------------------


def numbers(state: State, tests: Sequence[Comparison]) -> dict[str, Any]:
    """What the page was made from, as plain JSON."""
    return {
        "plan": state.plan.to_json(),
        "device": None if state.table is None else state.table.device_name,
        "layouts": {name: _numbers_of(state, key) for name, key in layouts(state.plan.search.depth).items()},
        "searches": {
            found.name: {
                "finished": found.finished,
                "evaluations": len(found.evaluations),
                "seconds": round(sum(item.seconds for item in found.evaluations), 1),
                "references": {name: dict(item.objectives) for name, item in found.references.items()},
                "chosen": [
                    {"id": item.id, "proxy": dict(item.objectives), **_numbers_of(state, item.key)}
                    for item in found.chosen
                ],
                "population": list(found.populations[-1]) if found.populations else [],
            }
            for found in state.searches
        },
        "drifts": len(state.drifts),
        "tests": [vars(test) for test in tests],
    }


def _numbers_of(state: State, genome: str) -> dict[str, Any]:
    longer = state.longer[genome]
    return {
        "genome": genome,
        **sizes(state, genome),
        "quality": list(longer.quality),
        "recall": list(longer.recall),
        "failed": longer.failed,
    }
