"""A training on a task in a directory of its own, which can be stopped, resumed, and looked at.

    task.json                what is trained on what, the curve, how it ended
    checkpoint.safetensors   model, optimizer and progress, while it is unfinished
    model.safetensors        the weights, when it is finished
    curve.png                accuracy by steps, beside chance (written by the command)

Nothing in it is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star import weights
from star.config import ModelConfig
from star.genome import Genome
from star.proxy import Progress, ProxySettings
from star.tasks.base import Task
from star.tasks.training import TaskOutcome, TaskPoint, TaskRun, task_model
from star.training import Diverged, failure_reason, thread_count
from star.training_directory import CHECKPOINT, WEIGHTS, StoppedTraining, locked, read_record, write_whole

__all__ = ["CURVE", "RECORD", "TaskRecord", "read", "train"]

FORMAT = 1
RECORD = "task.json"
CURVE = "curve.png"


@dataclass(frozen=True)
class TaskRecord:
    """task.json: `identity` decides the result; the outcome's status is "unfinished" until there is one."""

    identity: Mapping[str, Any]
    outcome: TaskOutcome


def train(
    directory: Path,
    genome: Genome,
    config: ModelConfig,
    task: Task,
    settings: ProxySettings,
    *,
    evaluate_every: int,
    progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_every: int = 200,
) -> TaskOutcome:
    """Train `genome` on `task` in `directory`, or go on with a training of the same that was stopped there.

    A finished training is not repeated: its outcome is returned.

    Args:
        directory: made if it is missing.
        evaluate_every: steps between points of the curve.
        progress: called after every step.
        should_stop: asked after every step; True writes a checkpoint and raises StoppedTraining.
        checkpoint_every: steps between checkpoints.

    Raises:
        StoppedTraining: see `should_stop`.
        ValueError: the directory holds another training, or a damaged record.
        OSError: something can not be written.
    """
    identity = _identity(genome, config, task, settings, evaluate_every)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        curve: tuple[TaskPoint, ...] = ()
        if (directory / RECORD).is_file():
            record = read(directory)
            _require_same(directory, record.identity, identity)
            if record.outcome.ok and (directory / WEIGHTS).is_file():
                return record.outcome
            curve = record.outcome.curve
        else:
            _write(directory, identity, TaskOutcome("unfinished"))

        with thread_count(settings.threads):
            model = task_model(genome, config, task, settings.seed)
            run = TaskRun(model, task, settings, evaluate_every=evaluate_every, progress=progress)

            def save() -> None:
                _write(directory, identity, TaskOutcome("unfinished", curve=tuple(run.curve)))
                run.save(directory / CHECKPOINT)  # last, as `restore` drops points beyond its step

            if (directory / CHECKPOINT).is_file():
                run.restore(directory / CHECKPOINT, list(curve))
            outcome = _finish(run, save, should_stop, checkpoint_every)
        if outcome.ok:
            about = {"genome": str(genome), "config": config.to_json(), "task": task.to_json()}
            weights.save_weights(model, directory / WEIGHTS, about)
        _write(directory, identity, outcome)
        if outcome.ok:
            (directory / CHECKPOINT).unlink(missing_ok=True)
        return outcome


def _finish(
    run: TaskRun, save: Callable[[], None], should_stop: Callable[[], bool], checkpoint_every: int
) -> TaskOutcome:
    try:
        while not run.done:
            run.train_step()
            stopping = should_stop()
            if not run.done and (stopping or run.step % checkpoint_every == 0):
                save()
            if stopping and not run.done:
                raise StoppedTraining
    except (Diverged, RuntimeError, MemoryError) as error:
        training = run.training
        return TaskOutcome(
            "failed",
            failure_reason(error),
            curve=tuple(run.curve),
            seconds=training.seconds,
            tokens=training.tokens,
        )
    return run.outcome()


def read(directory: Path) -> TaskRecord:
    """The record of a training on a task.

    Raises:
        ValueError: it is damaged.
        OSError: it can not be read.
    """
    return read_record(
        directory / RECORD,
        FORMAT,
        lambda value: TaskRecord(value["identity"], TaskOutcome.from_json(value["outcome"])),
    )


def _identity(
    genome: Genome, config: ModelConfig, task: Task, settings: ProxySettings, evaluate_every: int
) -> dict[str, Any]:
    """What must be equal for a directory to be gone on with; threads and device may change."""
    training = dataclasses.replace(settings, length=task.length).to_json()
    del training["threads"], training["device"]
    return {
        "genome": str(genome),
        "config": config.to_json(),
        "task": task.to_json(),
        "settings": {**training, "evaluate_every": evaluate_every},
    }


def _require_same(directory: Path, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for section, value in wanted.items():
        there = recorded.get(section)
        if there == value:
            continue
        if isinstance(value, dict) and isinstance(there, dict):
            name = next((name for name in value if there.get(name) != value[name]), section)
            raise ValueError(
                f"{directory} holds a training with {name} {there.get(name)!r}, not {value.get(name)!r}: "
                "take another --out, or the same options to go on with it"
            )
        raise ValueError(f"{directory} holds a training of another {section}: take another --out")


def _write(directory: Path, identity: Mapping[str, Any], outcome: TaskOutcome) -> None:
    value = {"format": FORMAT, "identity": identity, "outcome": outcome.to_json()}
    write_whole(directory / RECORD, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
