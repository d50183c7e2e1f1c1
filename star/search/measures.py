"""The functions that measure objectives, from a trained candidate to a number in the objective's direction.

A measure that can not be taken raises MeasurementFailed: the candidate has failed then, with that reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from star import cost
from star.genome import Genome
from star.measure.quantities import value_of
from star.profile.predict import predictor
from star.proxy import Outcome
from star.search.settings import SearchSettings
from star.tasks import open_task
from star.tasks.training import train_on_task

__all__ = [
    "CACHE_LENGTH",
    "Candidate",
    "MeasurementFailed",
    "cache",
    "flops",
    "on_device",
    "quality",
    "recall",
    "size",
]

CACHE_LENGTH = 4096


class MeasurementFailed(ArithmeticError):
    """An objective of a candidate can not be measured; one line says why."""


@dataclass(frozen=True)
class Candidate:
    """What there is to measure.

    Attributes:
        genome: valid.
        settings: of the search, the model's sizes among them.
        outcome: of the proxy training, which has succeeded.
    """

    genome: Genome
    settings: SearchSettings
    outcome: Outcome


def quality(candidate: Candidate) -> float:
    """Bits per byte on held-out text after the proxy training."""
    if candidate.outcome.quality is None:
        raise MeasurementFailed("the proxy training measured no quality")
    return candidate.outcome.quality


def size(candidate: Candidate) -> float:
    """Weights without embeddings, norms and biases."""
    return cost.parameters(candidate.genome, candidate.settings.model)


def cache(candidate: Candidate) -> float:
    """Bytes of the inference cache of one sequence of CACHE_LENGTH tokens in bfloat16."""
    return cost.cache_bytes(candidate.genome, candidate.settings.model, length=CACHE_LENGTH)


def flops(candidate: Candidate) -> float:
    """FLOPs of the forward pass over one sequence of the proxy's length."""
    return cost.flops(candidate.genome, candidate.settings.model, candidate.settings.proxy.length)


def recall(candidate: Candidate) -> float:
    """Share of wrong answers, 0 to 1, of a new model of the genome after training on the recall task.

    The model is not the one that was trained on text: a candidate's recall should not depend on the text, and
    the saved weights should be those of the text.
    """
    settings = candidate.settings
    chosen = settings.recall
    training = replace(
        settings.proxy,
        parametrization="standard",  # the task's models begin with standard weights
        average_evaluations=1,
        extrapolate_to=0,
        steps=chosen.steps,
        batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        warmup_steps=chosen.warmup_steps,
        weight_decay=0.0,
        validation_batches=chosen.validation_batches,
    )
    outcome = train_on_task(candidate.genome, settings.model, open_task(chosen.task), training)
    if outcome.accuracy is None:
        raise MeasurementFailed(f"recall: {outcome.reason}")
    return 1.0 - outcome.accuracy


def on_device(candidate: Candidate, name: str) -> float:
    """A quantity of the device (star.measure.quantities), predicted from its table at the target size."""
    table = candidate.settings.profile
    if table is None:
        raise MeasurementFailed(f"{name}: the search has no table of a device")
    predicted = value_of(predictor(table).predict(candidate.genome), name)
    if predicted is None:
        raise MeasurementFailed(f"{name}: the table of {table.device_name} does not have it")
    return predicted
