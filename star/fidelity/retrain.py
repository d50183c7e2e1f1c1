"""What a worker does for a certificate: evaluate a candidate as the search did, for longer and by quality
alone."""

from __future__ import annotations

from typing import Any

from star.search.evaluate import evaluate

__all__ = ["retrain"]


def retrain(genome: str, settings: dict[str, Any], task: int, weights: str | None) -> dict[str, Any]:
    """Train one candidate with one seed; an evaluator (star.search.results).

    Args:
        genome: a valid genome.
        settings: what `star.search.evaluate.evaluate` takes, and under "seeds" those of all trainings.
        task: its number; the remainder by the number of seeds is the place of its seed.
        weights: must be None, since nothing is kept.
    """
    seeds = settings["seeds"]
    given = {name: value for name, value in settings.items() if name != "seeds"}
    given["proxy"] = {**given["proxy"], "seed": seeds[task % len(seeds)]}
    return evaluate(genome, given, task, weights)
