"""The certificate: how far the order in which a run's proxy put its candidates is that of longer training.

    certify        from a sample and what became of its longer trainings to the certificate
    Certificate    its numbers, and what they say in sentences

Quality is bits per byte throughout, so less is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np

from star.fidelity.record import Retraining
from star.fidelity.sample import Member
from star.fidelity.settings import FidelitySettings
from star.fidelity.statistics import (
    Values,
    bootstrap_interval,
    kendall_tau,
    pooled_deviation,
    probability_non_dominated,
)
from star.search.budgets import judged
from star.search.front import candidates, front
from star.search.objectives import find, objective_vector
from star.search.settings import SearchSettings
from star.search.store import Evaluation

__all__ = ["AIM", "Candidate", "Certificate", "FrontMember", "Interval", "SeedNoise", "certify"]

AIM = 0.8
"""Kendall's tau that a proxy should reach."""

_FEWEST_TO_FIT = 4
_HALF_OF_NORMAL = 0.6745
"""Standard deviations on either side that hold half of a normal distribution."""


class Interval(NamedTuple):
    """A statistic with its bootstrap interval of 95 % over candidates; NaN where it is not defined."""

    value: float
    low: float
    high: float

    @property
    def defined(self) -> bool:
        return not math.isnan(self.value)


@dataclass(frozen=True)
class Candidate:
    """A candidate of the sample.

    Attributes:
        id, genome: of its evaluation; the genome is the canonical one.
        on_front: whether it was on the run's front.
        proxy: its quality in the search.
        size: its parameters, as the search counts them.
        qualities: of the longer trainings, one a seed, None where it failed.
        reasons: why, one a failed training.
    """

    id: int
    genome: str
    on_front: bool
    proxy: float
    size: float
    qualities: tuple[float | None, ...]
    reasons: tuple[str, ...] = ()

    @property
    def known(self) -> list[float]:
        """Qualities of the trainings that succeeded."""
        return [quality for quality in self.qualities if quality is not None]

    @property
    def mean(self) -> float | None:
        """Quality of longer training; None where every one failed."""
        return math.fsum(self.known) / len(self.known) if self.known else None


class SeedNoise(NamedTuple):
    """What the seeds of longer training alone do.

    Attributes:
        deviation: standard deviation of one training's quality between seeds, pooled over the candidates.
        flips: share of the pairs of candidates that two seeds put in opposite orders.
        tau: Kendall's tau between one seed's qualities and the means of the others; a proxy that comes near
            it is as good as one longer training. All are NaN where there is one seed only.
    """

    deviation: float
    flips: float
    tau: float


class FrontMember(NamedTuple):
    """How probably a member of the front is truly non-dominated.

    Attributes:
        id: of its evaluation.
        proxy: its quality in the search.
        among_retrained: against the candidates that were trained for longer, by their means and seed noise;
            NaN where it was not trained for longer itself.
        among_all: against every candidate within the budgets; those that were not trained for longer have a
            quality predicted from the proxy's by a line through those that were, with the scatter about it.
            NaN where there are too few for a line.
    """

    id: int
    proxy: float
    among_retrained: float
    among_all: float


@dataclass(frozen=True)
class Certificate:
    """How far a run's proxy can be believed.

    Attributes:
        settings: of the certificate.
        steps: of the proxy; longer trainings take `settings.budget` times as many.
        evaluations: of the run when the certificate was made.
        seconds: that all longer trainings took together.
        tau: Kendall's tau between the proxy and the mean of the longer trainings.
        tau_better_half: the same among the half of the sample that the proxy prefers.
        parameter_count: the same as `tau` for the order by parameters, more of them taken to be better.
        gain: `tau` less that of the parameter count, by a bootstrap that draws the same candidates for both.
        noise: of the seeds.
        front: members of the front that a probability is known of; none where quality is no objective.
        candidates: the sample, by id.
        prediction_errors: objectives that were predicted for the device, and that the front's probabilities
            draw: each with the median relative error of the run's own predictions.
        taken_as_exact: objectives that are not known exactly, and that the front's probabilities take as they
            were recorded: recall, of one short training, and predictions whose error the run does not know.
    """

    settings: FidelitySettings
    steps: int
    evaluations: int
    seconds: float
    tau: Interval
    tau_better_half: Interval
    parameter_count: Interval
    gain: Interval
    noise: SeedNoise
    front: tuple[FrontMember, ...]
    candidates: tuple[Candidate, ...]
    prediction_errors: Mapping[str, float] = field(default_factory=dict)
    taken_as_exact: tuple[str, ...] = ()

    @property
    def ranked(self) -> list[Candidate]:
        """Candidates with at least one longer training that succeeded; all statistics are over these."""
        return [item for item in self.candidates if item.mean is not None]

    @property
    def failures(self) -> list[tuple[Candidate, str]]:
        """Every failed longer training, with its reason."""
        return [(item, reason) for item in self.candidates for reason in item.reasons]

    @property
    def standard_error(self) -> dict[int, float]:
        """Of each ranked candidate's mean, by its id, from the pooled seed noise; NaN with one seed."""
        return {item.id: self.noise.deviation / math.sqrt(len(item.known)) for item in self.ranked}


def certify(
    sample: Sequence[Member],
    trainings: Mapping[str, Sequence[Retraining]],
    evaluations: Sequence[Evaluation],
    settings: FidelitySettings,
    search: SearchSettings,
    rounds: int = 2000,
    prediction_errors: Mapping[str, float] | None = None,
) -> Certificate:
    """The certificate of a run.

    Args:
        sample: what was retrained.
        trainings: genome -> its longer trainings, one a seed.
        evaluations: of the run.
        settings: of the certificate.
        search: of the run.
        rounds: draws of each bootstrap and of the front's probabilities.
        prediction_errors: median relative errors of objectives of the device (star.fidelity.device).

    Raises:
        ValueError: a genome of the sample that has no trainings.
    """
    members = tuple(_candidate(member, trainings) for member in sample)
    ranked = [item for item in members if item.mean is not None]
    proxy = np.array([item.proxy for item in ranked])
    sizes = np.array([item.size for item in ranked])
    means = np.array([item.mean for item in ranked], dtype=np.float64)
    better = np.argsort(proxy, kind="stable")[: (len(ranked) + 1) // 2]
    noise = _seed_noise(ranked)
    errors = {name: e for name, e in (prediction_errors or {}).items() if name in search.objectives}
    return Certificate(
        settings=settings,
        steps=search.proxy.steps,
        evaluations=len(evaluations),
        seconds=math.fsum(done.seconds for member in sample for done in trainings[member.evaluation.key]),
        tau=_interval(kendall_tau, rounds, proxy, means),
        tau_better_half=_interval(kendall_tau, rounds, proxy[better], means[better]),
        parameter_count=_interval(kendall_tau, rounds, -sizes, means),
        gain=_interval(_gain, rounds, proxy, sizes, means),
        noise=noise,
        front=_front_members(members, noise, evaluations, search, rounds, errors),
        candidates=members,
        prediction_errors=errors,
        taken_as_exact=tuple(name for name in _uncertain(search.objectives) if name not in errors),
    )


def _candidate(member: Member, trainings: Mapping[str, Sequence[Retraining]]) -> Candidate:
    evaluation = member.evaluation
    done = trainings.get(evaluation.key)
    if not done:
        raise ValueError(f"candidate {evaluation.id} of the sample was not trained for longer")
    return Candidate(
        id=evaluation.id,
        genome=evaluation.key,
        on_front=member.on_front,
        proxy=evaluation.objectives["quality"],
        size=evaluation.objectives["size"],
        qualities=tuple(item.quality for item in done),
        reasons=tuple(f"seed {item.training.seed}: {item.reason}" for item in done if not item.ok),
    )


def _interval(statistic: Callable[..., float], rounds: int, *columns: Values) -> Interval:
    if len(columns[0]) == 0:
        return Interval(math.nan, math.nan, math.nan)
    return Interval(statistic(*columns), *bootstrap_interval(statistic, *columns, rounds=rounds))


def _gain(proxy: Values, sizes: Values, means: Values) -> float:
    return kendall_tau(proxy, means) - kendall_tau(-sizes, means)


def _seed_noise(ranked: Sequence[Candidate]) -> SeedNoise:
    """Between the seeds of the candidates that have more than one longer training."""
    repeated = [np.array(item.known) for item in ranked if len(item.known) > 1]
    if not repeated:
        return SeedNoise(math.nan, math.nan, math.nan)
    deviation, _ = pooled_deviation(repeated)
    # By seed: only candidates that both seeds have can be put in an order by both.
    table = np.array([[math.nan if q is None else q for q in item.qualities] for item in ranked])
    flipped = pairs = 0
    for one, other in combinations(range(table.shape[1]), 2):
        both = table[~np.isnan(table[:, [one, other]]).any(axis=1)]
        for left, right in combinations(both, 2):
            flipped += bool((left[one] - right[one]) * (left[other] - right[other]) < 0)
            pairs += 1
    taus = [_tau_of_seed(table, seed) for seed in range(table.shape[1])]
    known = [tau for tau in taus if not math.isnan(tau)]
    return SeedNoise(
        deviation,
        flipped / pairs if pairs else math.nan,
        math.fsum(known) / len(known) if known else math.nan,
    )


def _tau_of_seed(table: Values, seed: int) -> float:
    """Kendall's tau between a column of (candidates, seeds) and the means of the others."""
    others = np.delete(table, seed, axis=1)
    rows = ~np.isnan(table[:, seed]) & ~np.isnan(others).all(axis=1)
    return kendall_tau(table[rows, seed], np.nanmean(others[rows], axis=1)) if rows.any() else math.nan


# ---- the front ---------------------------------------------------------------------------------------


def _uncertain(objectives: Sequence[str]) -> list[str]:
    """Objectives beside quality that are trained or predicted; the others follow from the genome."""
    found = [item for name in objectives if name != "quality" and (item := find(name)) is not None]
    return [item.name for item in found if item.trained or item.device]


def _front_members(
    members: Sequence[Candidate],
    noise: SeedNoise,
    evaluations: Sequence[Evaluation],
    search: SearchSettings,
    rounds: int,
    prediction_errors: Mapping[str, float],
) -> tuple[FrontMember, ...]:
    """Every member of the front that a probability is known of; none where seeds say nothing of noise.

    Candidates whose longer trainings all failed are no members and nobody's rivals. Predictions are drawn
    from a lognormal distribution about them: ln(truth / prediction) ~ Normal(0, σ), and half of a normal
    distribution is within 0.6745 σ, so σ = median relative error / 0.6745. Who keeps the budgets stays as
    it was recorded.
    """
    if "quality" not in search.objectives or math.isnan(noise.deviation):
        return ()
    within = judged(evaluations, search.budgets)
    ranked = [item for item in members if item.mean is not None]
    fallen = {item.id for item in members if item.mean is None}
    rivals = [item for item in candidates(within) if item.id not in fallen]
    others = [name for name in search.objectives if name != "quality"]
    exact = np.array([objective_vector(item.objectives, others) for item in rivals])
    exact = exact.reshape(len(rivals), len(others))
    spreads = np.array([prediction_errors.get(name, 0.0) / _HALF_OF_NORMAL for name in others])
    retrained = {item.id: item for item in ranked}
    places = [place for place, item in enumerate(rivals) if item.id in retrained]
    means, errors = np.full(len(rivals), math.nan), np.full(len(rivals), math.nan)
    for place in places:
        item = retrained[rivals[place].id]
        means[place] = math.nan if item.mean is None else item.mean
        errors[place] = noise.deviation / math.sqrt(len(item.known))
    among_retrained = np.full(len(rivals), math.nan)
    among_retrained[places] = probability_non_dominated(
        means[places], errors[places], exact[places], rounds, spreads=spreads
    )
    among_all = np.full(len(rivals), math.nan)
    line = _predict(ranked, noise, np.array([item.objectives["quality"] for item in rivals]))
    if line is not None:
        unknown = np.isnan(means)
        means[unknown], errors[unknown] = line[0][unknown], line[1]
        among_all = probability_non_dominated(means, errors, exact, rounds, spreads=spreads)
    chances = {
        item.id: FrontMember(item.id, item.objectives["quality"], float(one), float(other))
        for item, one, other in zip(rivals, among_retrained, among_all, strict=True)
    }
    best = (chances[item.id] for item in front(within, search.objectives) if item.id not in fallen)
    return tuple(
        member for member in best if not (math.isnan(member.among_retrained) and math.isnan(member.among_all))
    )


def _predict(ranked: Sequence[Candidate], noise: SeedNoise, proxies: Values) -> tuple[Values, float] | None:
    """(N,) qualities after longer training by least squares from the proxy's, and their scatter.

    Residuals hold the noise of the means that the line goes through too, which the prediction has not.
    None with fewer than four candidates, or where the proxy tells none apart.
    """
    x = np.array([item.proxy for item in ranked])
    y = np.array([item.mean for item in ranked], dtype=np.float64)
    if len(x) < _FEWEST_TO_FIT or np.ptp(x) == 0:
        return None
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    residuals = y - y.mean() - slope * (x - x.mean())
    variance = float((residuals**2).sum()) / (len(x) - 2)
    of_means = float(np.mean([noise.deviation**2 / len(item.known) for item in ranked]))
    return y.mean() + slope * (proxies - x.mean()), math.sqrt(max(variance - of_means, 0.0))
