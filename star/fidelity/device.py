"""How far off a run's predictions for its device are, by the candidates that it has measured as a whole."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from star.genome import Genome
from star.measure.quantities import relative_errors, value_of
from star.search.device import read_measured
from star.search.settings import SearchSettings
from star.search.store import Evaluation, StoredEvent

__all__ = ["prediction_errors"]


def prediction_errors(
    search: SearchSettings, evaluations: Sequence[Evaluation], events: Sequence[StoredEvent]
) -> dict[str, float]:
    """Median relative error of each objective of the device; none of those that nothing was measured of.

    Args:
        search: of the run.
        evaluations, events: of its record.

    Raises:
        RunDamaged: what was measured is no list of numbers.
    """
    from star.profile.predict import Predictor

    measured = read_measured(events)
    if search.profile is None or not measured:
        return {}
    predictor = Predictor(search.profile)
    pairs = [
        (predictor.predict(Genome.parse(item.key)), measured[item.id])
        for item in evaluations
        if measured.get(item.id)
    ]
    medians = {name: statistics.median(errors) for name, errors in relative_errors(pairs).items()}
    known = {item.name: value_of(medians, item.name) for item in search.measured() if item.device}
    return {name: error for name, error in known.items() if error is not None and name in search.objectives}
