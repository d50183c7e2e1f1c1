"""The curve of a training on a task, as a picture."""

from __future__ import annotations

from star.report.figures import THEME, draw, new_figure, png
from star.tasks import Task
from star.tasks.training import TaskOutcome

__all__ = ["task_curve"]


def task_curve(task: Task, outcome: TaskOutcome) -> bytes:
    """Held accuracy by steps, with chance as a line, as a PNG file."""
    with draw():
        figure, axes = new_figure()
        steps = [point.step for point in outcome.curve]
        axes.plot(
            steps, [point.accuracy for point in outcome.curve], color=THEME["accent"], marker="o", ms=2.5
        )
        axes.axhline(task.chance, color=THEME["warm"], linestyle="--", linewidth=1.0)
        axes.annotate("chance", (steps[0], task.chance), xytext=(0, 3), textcoords="offset points")
        axes.set_ylim(0.0, 1.02)
        axes.set_xlabel("step")
        axes.set_ylabel(f"accuracy in {task.name}")
        return png(figure)
