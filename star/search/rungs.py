"""Rungs: on its way through the proxy training, a candidate that can no longer survive is stopped.

What a candidate will be worth is foretold from its partial curve. Of every candidate of earlier generations
that was trained to its end, the record holds the training loss at the rung and the final quality; all of them
read the same text in the same order, so these losses compare without noise of sampling. A straight line
through them foretells a new candidate's final quality, and the lower end of its one-sided prediction interval
is the quality that the candidate may still reach. With that quality, and with the other objectives, which its
genome tells exactly, it is put among its rivals, sorted into fronts, and is stopped if it comes behind the
last of these. The rivals are

    survivors    of the generation before: who is behind them all would not survive even as the only child of
                 its generation, so the search goes on as it would have, for less. In `ga` and `regularised`
                 children survive whatever they are worth: there who comes behind the whole population is
                 stopped, and rungs rest for a generation after one whose survivors were stopped
    front        of everything before: who can not reach it is stopped; saves more, and populations are
                 renewed by members of the front alone

A candidate over a budget is stopped at the first rung, where all rivals keep theirs.

Successive halving (arXiv 1502.07943; for several objectives, arXiv 2106.12639) compares candidates with those
beside them, which makes its workers wait for each other, and drops a fixed share, however good. Here every
decision follows from the candidate itself and from what earlier generations have recorded. So it is the same
whatever the number of workers, the order in which they finish, and how often the search was killed.

The first generation is trained to its end, and so are the references: they are what is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from star.search.budgets import judged, over_budget
from star.search.front import dominates, front
from star.search.objectives import objective_vector
from star.search.ranking import fronts
from star.search.settings import SearchSettings
from star.search.store import Evaluation

__all__ = ["LEAST_CURVES", "WINDOW", "Bars", "Rung", "bars", "partial_loss", "saved_seconds"]

LEAST_CURVES = 8
"""Complete trainings that it takes to foretell one."""

WINDOW = 0.1
"""Part of a whole training over which the loss at a rung is averaged."""

_LARGEST = 1e6
"""Bits per byte beyond which a curve is none."""

_FORWARD_SHARE = 1 / 3
"""Of a training step's time; the other two thirds are its backward pass."""


@dataclass(frozen=True)
class Rung:
    """Where candidates are judged, and the line that foretells final qualities from losses there.

    Attributes:
        step: the first point of the curve at or after it is the rung.
        intercept, slope: of the line.
        mean: of the losses that it was fitted on.
        scatter: sum of their squared distances from it.
        count: how many they are.
        margin: standard deviation of the qualities from the line, times Student's quantile.
    """

    step: int
    intercept: float
    slope: float
    mean: float
    scatter: float
    count: int
    margin: float

    def optimistic(self, loss: float) -> float:
        """The final quality that a candidate with this loss at the rung may still reach."""
        width = math.sqrt(1 + 1 / self.count + (loss - self.mean) ** 2 / self.scatter)
        return self.intercept + self.slope * loss - self.margin * width


@dataclass(frozen=True)
class Bars:
    """What the candidates of one generation have to pass: a plain value that is sent to workers.

    Attributes:
        rungs: in rising order of steps.
        rivals: objective vectors of their last front. Who comes behind it is dominated by one of these.
    """

    rungs: tuple[Rung, ...]
    rivals: tuple[tuple[float, ...], ...]

    def verdict(
        self, curve: Sequence[Sequence[Any]], exact: Mapping[str, float], settings: SearchSettings
    ) -> str | None:
        """Why a candidate is stopped at the last point of its curve; None if it goes on, or no rung is there.

        Args:
            curve: of the training so far.
            exact: the objectives and budgets that take no training.
            settings: of the search.
        """
        rung = self._reached(curve)
        if rung is None:
            return None
        where = f"at step {curve[-1][0]} of {settings.proxy.steps}"
        over = over_budget(exact, {name: limit for name, limit in settings.budgets.items() if name in exact})
        if over:
            return f"{over} ({where})"
        loss = partial_loss(curve, rung.step, settings.proxy.steps)
        if loss is None:
            return None
        quality = rung.optimistic(loss)
        if self.is_behind(objective_vector({**exact, "quality": quality}, settings.objectives)):
            return f"behind the {settings.rung_rivals} {where}: {quality:.4f} bits per byte at best"
        return None

    def is_behind(self, vector: Sequence[float]) -> bool:
        """Whether a vector, sorted into fronts with all rivals, comes behind their last."""
        return any(dominates(rival, vector) for rival in self.rivals)

    def _reached(self, curve: Sequence[Sequence[Any]]) -> Rung | None:
        """The last rung between the two last points of the curve."""
        before = curve[-2][0] if len(curve) > 1 else 0
        reached = [rung for rung in self.rungs if before < rung.step <= curve[-1][0]]
        return reached[-1] if reached else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` turns it back."""
        return {"rungs": [asdict(rung) for rung in self.rungs], "rivals": [*map(list, self.rivals)]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Bars:
        """The bars that `to_json` wrote."""
        return cls(
            tuple(Rung(**rung) for rung in value["rungs"]),
            tuple(tuple(vector) for vector in value["rivals"]),
        )


def bars(settings: SearchSettings, known: Mapping[str, Evaluation], survivors: Sequence[str]) -> Bars | None:
    """What the next generation has to pass; None where there are no rungs, or nothing to judge by yet.

    Args:
        settings: of the search.
        known: all evaluations of earlier generations.
        survivors: keys of the generation before.
    """
    if not settings.rungs:
        return None
    if settings.rung_rivals == "front":
        members = front(judged(known.values(), settings.budgets), settings.objectives)
    else:
        members = judged((known[key] for key in survivors), settings.budgets)
    # Whoever is trained to the end would survive a failed, a stopped or an over-budget one.
    if not members or not all(member.ok for member in members):
        return None
    steps = settings.proxy.steps
    fitted = (_fit(known.values(), math.ceil(part * steps), settings) for part in settings.rungs)
    rungs = tuple(rung for rung in fitted if rung is not None)
    vectors = [objective_vector(member.objectives, settings.objectives) for member in members]
    rank = fronts(np.array(vectors))
    last = tuple(vectors[index] for index in np.flatnonzero(rank == rank.max()))
    return Bars(rungs, last) if rungs else None


def _fit(evaluations: Iterable[Evaluation], step: int, settings: SearchSettings) -> Rung | None:
    """The line from losses at a rung to final qualities (least squares); None where the losses foretell
    nothing, or there are too few."""
    pairs: list[tuple[float, float]] = []
    for item in sorted(evaluations, key=lambda item: item.id):
        loss = partial_loss(item.curve, step, settings.proxy.steps)
        if item.ok and loss is not None and abs(item.objectives["quality"]) < _LARGEST:
            pairs.append((loss, item.objectives["quality"]))
    count = len(pairs)
    if count < LEAST_CURVES:
        return None
    # Sums are rounded once: they are the same on every machine.
    mean = math.fsum(loss for loss, _ in pairs) / count
    height = math.fsum(quality for _, quality in pairs) / count
    scatter = math.fsum((loss - mean) ** 2 for loss, _ in pairs)
    if scatter <= 0:
        return None
    slope = math.fsum((loss - mean) * (quality - height) for loss, quality in pairs) / scatter
    if slope <= 0:
        return None
    intercept = height - slope * mean
    residual = math.fsum((quality - intercept - slope * loss) ** 2 for loss, quality in pairs)
    margin = _student(settings.rung_confidence, count - 2) * math.sqrt(residual / (count - 2))
    return Rung(step, intercept, slope, mean, scatter, count, margin)


def _student(confidence: float, freedom: int) -> float:
    """The one-sided quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(confidence, freedom))


def partial_loss(curve: Sequence[Any], step: int, steps: int) -> float | None:
    """The training loss around a rung: the mean over the last `WINDOW` of a training of `steps` before the
    first point at or after `step`. None where the curve does not come so far, or is none."""
    taken: list[tuple[int, float]] = []
    before = 0
    for point in curve:
        if not (isinstance(point, (list, tuple)) and len(point) == 3):
            return None
        at, loss = point[0], point[1]
        if not (isinstance(at, int) and at > before):
            return None
        if not (isinstance(loss, (int, float)) and abs(loss) < _LARGEST):
            return None
        taken.append((at - before, loss))
        before = at
        if at >= step:
            break
    if before < step:
        return None
    return _mean_of_last(taken, WINDOW * steps)


def _mean_of_last(taken: Sequence[tuple[int, float]], window: float) -> float:
    """Mean over the last points, each weighted by its steps, until `window` steps are covered."""
    weights: list[int] = []
    products: list[float] = []
    for length, loss in reversed(taken):
        weights.append(length)
        products.append(length * loss)
        if sum(weights) >= window:
            break
    return math.fsum(products) / sum(weights)


def saved_seconds(stopped: Iterable[Evaluation], settings: SearchSettings) -> float:
    """About how much longer the stopped candidates would have been trained, on one worker.

    A candidate's seconds went to its steps and to one evaluation on held-out text, of which a batch takes as
    long as a step's forward pass.
    """
    total, batches = settings.proxy.steps, settings.proxy.validation_batches
    saved = 0.0
    for item in stopped:
        last = item.curve[-1] if item.curve else None
        done = last[0] if isinstance(last, (list, tuple)) and last else None
        if isinstance(done, int) and 0 < done < total:
            saved += item.seconds * (total - done) / (done + _FORWARD_SHARE * batches)
    return saved
