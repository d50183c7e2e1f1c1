"""Evaluators of longer trainings that take no time, for workers to import: "longer:NAME"."""

from __future__ import annotations

import hashlib
import os
import signal
from typing import Any


def longer_quality(genome: str, seed: int) -> float:
    """By the genome, with a little noise by the seed."""
    digest = hashlib.sha256(genome.encode()).digest()
    noise = hashlib.sha256(f"{genome} {seed}".encode()).digest()
    return 2.0 + digest[0] / 255 + 0.01 * noise[0] / 255


def score(text: str, settings: dict[str, Any], task: int, weights: str | None) -> dict[str, Any]:
    """`longer_quality` with the seed that `star.fidelity.retrain` would take."""
    assert weights is None
    assert settings["objectives"] == ["quality"]
    seed = settings["seeds"][task % len(settings["seeds"])]
    return {"status": "ok", "objectives": {"quality": longer_quality(text, seed)}, "seconds": 2.0}


def some_fail(text: str, settings: dict[str, Any], task: int, weights: str | None) -> dict[str, Any]:
    """As `score`; all trainings of the first candidate fail, and the first training of the second."""
    if task < len(settings["seeds"]) + 1:
        return {"status": "failed", "reason": f"diverged: task {task}"}
    return score(text, settings, task, weights)


def all_fail(text: str, settings: dict[str, Any], task: int, weights: str | None) -> dict[str, Any]:
    """No training succeeds."""
    return {"status": "failed", "reason": "out of memory: always"}


def deadly(text: str, settings: dict[str, Any], task: int, weights: str | None) -> dict[str, Any]:
    """The first task kills its worker."""
    if task == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(text, settings, task, weights)
