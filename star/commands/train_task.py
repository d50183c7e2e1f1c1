"""`star train --task`: train one architecture on a synthetic task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star.commands.errors import BadInput, Failed, Stopped

if TYPE_CHECKING:
    from rich.console import Console

    from star.proxy import ProxySettings
    from star.targets import Target
    from star.tasks import Task
    from star.tasks.training import TaskOutcome

__all__ = ["POINTS", "WIDTH", "directory_of", "settings_of", "train_task"]

WIDTH = 64
"""Of a genome that comes without a run, as in the papers' smallest models."""
POINTS = 20
"""Of the curve, where nothing else is said."""
_BARS = "▁▂▃▄▅▆▇█"


def settings_of(chosen: Target, steps: int, options: dict[str, Any]) -> ProxySettings:
    """How to train: as the recall objective is trained, with what the options say."""
    from star.proxy import ProxySettings
    from star.search.settings import RecallSettings

    recall = RecallSettings() if chosen.settings is None else chosen.settings.recall
    base = ProxySettings(
        batch_size=recall.batch_size,
        learning_rate=recall.learning_rate,
        validation_batches=recall.validation_batches,
        weight_decay=0.0,
        threads=1 if chosen.settings is None else chosen.settings.proxy.threads,
    )
    given = {name: value for name, value in options.items() if value is not None}
    return replace(base, steps=steps, warmup_steps=max(1, steps // 10), **given)


def directory_of(chosen: Target, task: Task) -> Path:
    """Where a training goes that was not told: into the run."""
    if chosen.run is None or chosen.evaluation is None:
        raise BadInput("train takes --out DIR with a genome or a baseline")
    return chosen.run / "trained" / f"{chosen.evaluation.id}-{task.name}"


def train_task(
    chosen: Target,
    task: Task,
    settings: ProxySettings,
    out: Path,
    evaluate_every: int,
    checkpoint_every: int,
    as_json: bool,
) -> None:
    """Train, and say what came of it."""
    from star.commands.progress import training_progress
    from star.commands.stopping import stop_signal
    from star.commands.terminal import say, screen
    from star.report.task_curve import task_curve
    from star.tasks import directory
    from star.training_directory import StoppedTraining, write_whole

    console = screen(as_json)
    say(console, f"Training {chosen.name} on {task.name} in {out}")
    try:
        with stop_signal() as stopped, training_progress(console, "training", "bits an answer") as progress:
            outcome = directory.train(
                out,
                chosen.genome,
                chosen.config,
                task,
                settings,
                evaluate_every=evaluate_every,
                progress=progress,
                should_stop=lambda: bool(stopped),
                checkpoint_every=checkpoint_every,
            )
    except StoppedTraining:
        raise Stopped(f"training stopped; the same command goes on with it (checkpoint in {out})") from None
    except KeyboardInterrupt:
        raise Stopped(
            f"training stopped; the same command goes on from its last checkpoint in {out}"
        ) from None
    if not outcome.ok:
        raise Failed(f"training {chosen.name} failed: {outcome.reason}")
    write_whole(out / directory.CURVE, task_curve(task, outcome))
    _conclude(console, chosen, task, outcome, out, as_json)


def _conclude(
    console: Console, chosen: Target, task: Task, outcome: TaskOutcome, out: Path, as_json: bool
) -> None:
    from star.commands.terminal import emit, say
    from star.report.numbers import duration
    from star.tasks.directory import CURVE

    if as_json:
        about = {"genome": str(chosen.genome), "directory": str(out), "task": task.to_json()}
        emit({**about, "chance": task.chance, **outcome.to_json()})
        return
    assert outcome.accuracy is not None, "an outcome that is ok has one"
    say(
        console,
        f"{100 * outcome.accuracy:.1f} % of the answers are right after {outcome.curve[-1].step:,} steps "
        f"({duration(outcome.seconds)}); chance is {100 * task.chance:.1f} %",
        "bold",
    )
    bars = "".join(_BARS[min(7, int(8 * point.accuracy))] for point in outcome.curve)
    say(console, f"accuracy by steps: {bars}   ({out / CURVE})")
