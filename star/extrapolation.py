"""From a learning curve to one number: at which steps a proxy is evaluated, and what its quality is.

Quality is the last evaluation, the mean of the last few, or what a power law through them expects later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from star.proxy import REMARK

if TYPE_CHECKING:
    from star.proxy import CurvePoint, ProxySettings

__all__ = ["FEWEST_POINTS", "evaluation_steps", "extrapolate", "quality_of"]

FEWEST_POINTS = 4
"""Evaluations after the warm-up that a power law is fitted to, at least; it has three parameters."""

_POINTS = 8
_EXPONENTS: NDArray[np.float64] = np.geomspace(0.05, 2.0, 60)
_THRESHOLD = 1e-3
_ROUNDS = 30


def evaluation_steps(settings: ProxySettings) -> frozenset[int]:
    """The steps after which a training with these settings is evaluated, besides `evaluate_every`."""
    steps, count = settings.steps, settings.average_evaluations
    quarter = steps / 4
    wanted = {max(1, round(steps - quarter * index / count)) for index in range(count)}
    if settings.extrapolate_to > steps and not settings.evaluate_every:
        # Even in the logarithm, as the power law bends; none before the rate has reached its peak.
        first = min(steps, max(settings.warmup_steps, steps // _POINTS, 1))
        wanted |= {round(float(step)) for step in np.geomspace(first, steps, _POINTS)}
    return frozenset(wanted)


def quality_of(curve: Sequence[CurvePoint], settings: ProxySettings) -> tuple[float, str]:
    """(quality, why it was not extrapolated): of the whole curve of a training, in bits per byte.

    The reason is empty where nothing was to be extrapolated, or was.
    """
    evaluated = {point.step: point.validation for point in curve if point.validation is not None}
    if settings.extrapolate_to > settings.steps:
        later = {step: value for step, value in evaluated.items() if step >= settings.warmup_steps}
        if len(later) < FEWEST_POINTS:
            reason = f"{REMARK}{len(later)} evaluations after the warm-up, takes {FEWEST_POINTS}"
            return evaluated[settings.steps], reason
        expected = extrapolate(list(later), list(later.values()), settings.extrapolate_to)
        if expected is None:
            return evaluated[settings.steps], f"{REMARK}the held-out loss does not fall"
        return expected, ""
    if settings.average_evaluations == 1:
        return evaluated[settings.steps], ""
    last = evaluation_steps(settings)
    values = [value for step, value in evaluated.items() if step in last]
    return sum(values) / len(values), ""


def extrapolate(steps: Sequence[int], losses: Sequence[float], to: int) -> float | None:
    """The loss that a power law with an offset, c + a step^-b, expects after `to` steps.

    a > 0, c >= 0 and 0.05 <= b <= 2 minimise Huber's loss of the relative residuals with threshold 0.001
    (Hoffmann et al., arXiv 2203.15556, fit their scaling laws so): a few bad evaluations do not bend it. For
    every b of a grid, c and a are those of iteratively reweighted least squares.

    Args:
        steps: (N,) positive; losses: (N,) positive, N >= 3.
        to: steps after which.

    Returns:
        The expected loss, or None where no power law falls.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    # Steps in units of the last one keep the products near 1.
    powers = (x / x[-1]) ** -_EXPONENTS[:, None]
    offset, gain, cost = _fitted(powers, y)
    usable = (gain > 0) & (offset >= 0)
    if not usable.any():
        return None
    best = int(np.argmin(np.where(usable, cost, np.inf)))
    return float(offset[best] + gain[best] * (to / x[-1]) ** -_EXPONENTS[best])


def _fitted(
    powers: NDArray[np.float64], losses: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(offset, gain, Huber's loss), (G,) each, for losses (N,) and each exponent's powers (G, N)."""
    weights = np.broadcast_to(losses**-2, powers.shape)
    for _ in range(_ROUNDS):
        total = weights.sum(1)
        mean_power = (weights * powers).sum(1) / total
        mean_loss = (weights * losses).sum(1) / total
        centred = powers - mean_power[:, None]
        gain = (weights * centred * losses).sum(1) / (weights * centred**2).sum(1)
        offset = mean_loss - gain * mean_power
        residual = np.abs((offset[:, None] + gain[:, None] * powers) / losses - 1)
        weights = losses**-2 * np.minimum(1.0, _THRESHOLD / np.maximum(residual, 1e-12))
    huber = np.where(residual <= _THRESHOLD, residual**2 / 2, _THRESHOLD * (residual - _THRESHOLD / 2))
    return offset, gain, huber.sum(1)
