"""What rungs would have saved in searches that trained every candidate to its end, and at what cost.

    python -m benchmarks.rungs RUN...       # writes benchmarks/results/rungs.md

Each generation of a recorded run is judged as the search would have judged it (star.search.rungs), by the
records of the generations before it. Of the candidates that would have been stopped, the table says how many
survived their generation all the same, and how many were on the front of everything known by then. Later
generations are taken as they were recorded: a stopped candidate would have had other children.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from star.search.budgets import judged
from star.search.errors import RunError
from star.search.front import front
from star.search.objectives import find
from star.search.rungs import bars
from star.search.settings import RIVALS, SearchSettings
from star.search.store import Evaluation, RunStore

RESULT = Path(__file__).parent / "results" / "rungs.md"
RUNGS = ((0.25,), (0.5,), (0.25, 0.5, 0.75), tuple(part / 20 for part in range(5, 20)))
CONFIDENCES = (0.8, 0.95)


@dataclass(frozen=True)
class Replay:
    """A run under a choice of rungs.

    Attributes:
        judged: candidates behind the first generation that were trained to their end.
        stopped: those of them that would not have been.
        survivors: those of the stopped that survived their generation.
        members: those of the stopped that were on the front after their generation.
        saved: share of all steps of the judged that would not have been taken.
    """

    judged: int
    stopped: int
    survivors: int
    members: int
    saved: float


@dataclass(frozen=True)
class Recorded:
    """What a run's record holds."""

    name: str
    settings: SearchSettings
    evaluations: Sequence[Evaluation]
    populations: Sequence[Sequence[str]]


def read(path: Path) -> Recorded:
    """The record of a run; recall, which no rung can judge, is left out of its objectives."""
    with RunStore.open(path) as store:
        settings, evaluations, populations = store.settings(), store.evaluations(), store.populations()
    names = [name for name in settings.objectives if name == "quality" or not _takes_training(name)]
    return Recorded(path.name, replace(settings, objectives=tuple(names)), evaluations, populations)


def _takes_training(name: str) -> bool:
    objective = find(name)
    return objective is not None and objective.trained


def replay(run: Recorded, rungs: tuple[float, ...], rivals: str, confidence: float) -> Replay:
    """What would have been stopped."""
    settings = replace(run.settings, rungs=rungs, rung_rivals=rivals, rung_confidence=confidence)
    count, stopped, survivors, members, saved = 0, 0, 0, 0, 0.0
    for generation in range(1, len(run.populations)):
        known = {item.key: item for item in run.evaluations if (item.generation or 0) < generation}
        passing = bars(settings, known, run.populations[generation - 1])
        so_far = [item for item in run.evaluations if (item.generation or 0) <= generation]
        best = {item.id for item in front(judged(so_far, settings.budgets), settings.objectives)}
        for item in run.evaluations:
            if item.generation != generation or not item.ok:
                continue
            count += 1
            for end in range(1, len(item.curve)) if passing is not None else ():
                if passing is not None and passing.verdict(item.curve[:end], item.objectives, settings):
                    stopped += 1
                    survivors += item.key in run.populations[generation]
                    members += item.id in best
                    saved += 1 - item.curve[end - 1][0] / settings.proxy.steps
                    break
    return Replay(count, stopped, survivors, members, saved / count if count else 0.0)


def document(runs: Sequence[Recorded]) -> str:
    """The whole file."""
    parts = [
        "# Rungs, replayed over searches that trained every candidate to its end",
        "`python -m benchmarks.rungs RUN…`. Stopped: candidates whose training a rung would have ended. "
        "Survivors, front: how many of those survived their generation, or were on the front after it, when "
        "they were trained to the end. Saved: training steps of all generations but the first.",
    ]
    for run in runs:
        settings, proxy = run.settings, run.settings.proxy
        parts.append(
            f"## {run.name}\n\n{' and '.join(settings.objectives)}; population {settings.population} x "
            f"{len(run.populations)} generations, {settings.depth} LIVs of width {settings.model.width}, "
            f"{proxy.steps} steps, {proxy.schedule} schedule, {settings.algorithm}."
        )
        lines = [
            "| rungs | rivals | confidence | candidates | stopped | survivors | front | saved |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for rungs in RUNGS:
            for rivals in RIVALS:
                for confidence in CONFIDENCES:
                    found = replay(run, rungs, rivals, confidence)
                    lines.append(
                        f"| {_named(rungs)} | {rivals} | {confidence:g} | {found.judged} | {found.stopped} | "
                        f"{found.survivors} | {found.members} | {100 * found.saved:.0f} % |"
                    )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _named(rungs: tuple[float, ...]) -> str:
    if len(rungs) <= 3:
        return ", ".join(f"{part:g}" for part in rungs)
    return f"{rungs[0]:g} to {rungs[-1]:g}, {len(rungs)} of them"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    try:
        text = document([read(path) for path in given.runs])
        given.out.write_text(text, encoding="utf-8")
    except (RunError, ValueError, OSError) as error:
        print(f"benchmarks.rungs: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
