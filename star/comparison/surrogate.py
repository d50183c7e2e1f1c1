"""What a trained objective would be for a genome that a table does not hold, and how far to believe it.

Extremely randomised trees (Geurts et al., 2006) on plain counts of the genome: how many LIVs of each class,
of each family in each third of the depth, how many share, and its analytic costs. Trees average what they
have seen, so no prediction is better than the best of the table. The rank correlation is from
cross-validation, where every genome is predicted by trees that have not seen it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from star import cost, pools
from star.config import ModelConfig
from star.genome import Genome
from star.sharing import resolve

__all__ = ["FEWEST_ROWS", "Fidelity", "Surrogate", "cross_validate", "feature_matrix", "features", "fidelity"]

Values = npt.NDArray[np.float64]

FEWEST_ROWS = 10
FOLDS = 10
THIRDS = 3
TREES = 200


def features(genome: Genome, config: ModelConfig) -> Values:
    """(F,): the numbers by which the surrogate knows a genome; the last two are its parameters and cache."""
    entries = pools.all_classes()
    classes = {entry.id: index for index, entry in enumerate(entries)}
    families = {name: index for index, name in enumerate(sorted({entry.family for entry in entries}))}
    plans = resolve(genome)
    count = np.zeros(len(classes))
    place = np.zeros((THIRDS, len(families)))
    for plan in plans:
        count[classes[plan.entry.id]] += 1
        place[THIRDS * plan.index // len(plans), families[plan.entry.family]] += 1
    weights_shared = sum(plan.featurizer_owner != plan.index for plan in plans)
    features_shared = sum(plan.source is not None for plan in plans)
    rest = [
        weights_shared,
        features_shared,
        cost.parameters(genome, config),
        cost.cache_bytes(genome, config),
    ]
    return np.concatenate([count, place.ravel(), np.array(rest, dtype=np.float64)])


def feature_matrix(genomes: Sequence[Genome], config: ModelConfig) -> Values:
    """(N, F)."""
    return np.array([features(genome, config) for genome in genomes])


@dataclass(frozen=True)
class Fidelity:
    """How predictions rank genomes.

    Attributes:
        tau: Kendall's tau-b.
        rho: Spearman's rank correlation.
        rows: genomes that it is computed from.
    """

    tau: float
    rho: float
    rows: int


class Surrogate:
    """One objective, from features to values.

    Args:
        inputs: (N, F), from `features`.
        targets: (N,).
    """

    def __init__(self, inputs: Values, targets: Values) -> None:
        from sklearn.ensemble import ExtraTreesRegressor

        self._trees: Any = ExtraTreesRegressor(TREES, min_samples_leaf=2, max_features=0.5, random_state=0)
        self._trees.fit(inputs, targets)

    def predict(self, inputs: Values) -> Values:
        """(N, F) -> (N,)."""
        return np.asarray(self._trees.predict(inputs), dtype=np.float64)


def cross_validate(inputs: Values, targets: Values, seed: int = 0) -> Fidelity:
    """FOLDS-fold: every row is predicted by a surrogate of the other folds.

    Raises:
        ValueError: fewer rows than FEWEST_ROWS.
    """
    if len(targets) < FEWEST_ROWS:
        raise ValueError(f"the table has {len(targets)} genomes to fit a surrogate to, takes {FEWEST_ROWS}")
    order = np.random.default_rng(seed).permutation(len(targets))
    predicted = np.empty(len(targets))
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        kept = np.setdiff1d(order, held)
        predicted[held] = Surrogate(inputs[kept], targets[kept]).predict(inputs[held])
    return fidelity(predicted, targets)


def fidelity(predicted: Values, targets: Values) -> Fidelity:
    """How `predicted` ranks `targets`, (N,) each; of constants, which have no ranks, not at all."""
    from scipy.stats import kendalltau, spearmanr

    if len(targets) < 2 or np.ptp(predicted) == 0 or np.ptp(targets) == 0:
        return Fidelity(0.0, 0.0, len(targets))
    tau = float(kendalltau(predicted, targets).statistic)
    return Fidelity(tau, float(spearmanr(predicted, targets).statistic), len(targets))
