"""The proxy: train a candidate for a moment on real text and say how well it predicts held-out text.

`train_candidate` takes a genome and gives an `Outcome`, whatever happens to the candidate: divergence,
memory that runs out and exceptions are outcomes too. torch is imported when the first candidate is
trained, so that settings and outcomes cost nothing to those who only read and store them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from star.config import ModelConfig
from star.data import Corpus
from star.genome import Genome

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CurvePoint", "Outcome", "Progress", "ProxySettings", "is_remark", "train_candidate"]

DTYPES = ("auto", "float32", "bfloat16")
PARAMETRIZATIONS = ("standard", "mup")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class ProxySettings:
    """How a candidate is trained; equal settings, text and threads give equal results, bit for bit on a CPU.

    Args:
        steps: optimizer steps.
        batch_size, length: sequences a step, tokens a sequence.
        learning_rate: peak rate of AdamW, reached after `warmup_steps`.
        weight_decay: on matrices only (two or more dimensions).
        gradient_clip: largest norm of all gradients together.
        validation_batches: held-out batches of the same size in one evaluation.
        evaluate_every: steps between evaluations; 0: at the end only.
        seed: of the initialisation and of the order of the data.
        dtype: "float32", "bfloat16" (autocast), or "auto": as `star.training.training_dtype` says.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        threads: of torch while it trains; None leaves them as they are.
        schedule: the rate after its peak. "cosine": lowered along a half cosine to `final_rate` times it.
            "constant": as it is, so that the first steps of a training are a shorter training.
        parametrization: "standard": the learning rate is meant as it is. "mup": it is that of a model of
            width `base_width`, and `star.parametrization` carries it over to the width at hand; at
            `base_width` itself both are the same.
        base_width: see there.
        average_evaluations: quality is the mean of so many evaluations, spread evenly over the last quarter
            of the training (as many as it has steps, if fewer). 1: the last one alone.
        extrapolate_to: quality is what `star.extrapolation` expects after so many steps, from evaluations on
            the way (`evaluate_every`, or eight of them). No more than `steps`: nothing is extrapolated.

    Raises:
        ValueError: a value out of range; one line that names it.
    """

    steps: int = 200
    batch_size: int = 8
    length: int = 256
    learning_rate: float = 4e-3
    warmup_steps: int = 20
    final_rate: float = 0.1
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    validation_batches: int = 16
    evaluate_every: int = 0
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    schedule: str = "cosine"
    parametrization: str = "standard"
    base_width: int = 64
    average_evaluations: int = 1
    extrapolate_to: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "length", "validation_batches", "base_width"):
            self._require_integer(name, 1)
        self._require_integer("average_evaluations", 1)
        for name in ("warmup_steps", "evaluate_every", "seed", "extrapolate_to"):
            self._require_integer(name, 0)
        if self.threads is not None:
            self._require_integer("threads", 1)
        if self.seed >= 2**63:
            raise ValueError(f"ProxySettings: seed is {self.seed}, takes less than 2**63")
        for name, low in (("learning_rate", 0.0), ("gradient_clip", 0.0)):
            self._require_number(name, above=low)
        for name in ("weight_decay", "final_rate"):
            self._require_number(name, above=None)
        if self.final_rate > 1:
            raise ValueError(f"ProxySettings: final_rate is {self.final_rate}, takes 0 to 1")
        self._require_one_of("dtype", DTYPES)
        self._require_one_of("schedule", SCHEDULES)
        self._require_one_of("parametrization", PARAMETRIZATIONS)
        kind, _, index = str(self.device).partition(":")
        if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
            raise ValueError(f"ProxySettings: device is {self.device!r}, takes auto, cpu, cuda or cuda:N")

    def _require_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"ProxySettings: {name} is {value!r}, takes an integer of at least {least}")

    def _require_number(self, name: str, above: float | None) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        if not good or (above is not None and value <= above):
            least = "at least 0" if above is None else f"more than {above:g}"
            raise ValueError(f"ProxySettings: {name} is {value!r}, takes a number of {least}")

    def _require_one_of(self, name: str, values: tuple[str, ...]) -> None:
        if getattr(self, name) not in values:
            raise ValueError(
                f"ProxySettings: {name} is {getattr(self, name)!r}, takes one of {', '.join(values)}"
            )

    @property
    def tokens(self) -> int:
        """Tokens that a whole training reads."""
        return self.steps * self.batch_size * self.length

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `from_json` turns it back.

        The settings of `ADDED_SETTINGS` are in it only where they differ from their defaults: what was
        recorded before there were any equals what is recorded now, in checkpoints, runs and tables.
        """
        missing = object()
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if ADDED_SETTINGS.get(name, missing) != value
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProxySettings:
        """The settings that `to_json` wrote. Raises ValueError for a name that is no field."""
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(data) - set(names)):
            raise ValueError(f"ProxySettings: unknown field {unknown[0]!r}, takes {', '.join(names)}")
        return cls(**data)


ADDED_SETTINGS: Mapping[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(ProxySettings)
    if field.name in ("schedule", "parametrization", "base_width", "average_evaluations", "extrapolate_to")
}
"""Settings that there were not from the beginning, and their defaults: what a record without them means."""


class CurvePoint(NamedTuple):
    """A point of the learning curve after `step` steps, in bits per byte.

    `train`: mean over the steps since the point before; `validation`: None where it was not evaluated.
    """

    step: int
    train: float
    validation: float | None


class Progress(NamedTuple):
    """Where a training stands: `step` of `steps` done, the latest losses in bits per byte."""

    step: int
    steps: int
    train: float
    validation: float | None


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate.

    status "ok": `quality` is its bits per byte on held-out text (lower is better); a `reason` says what kept
    it from being extrapolated. status "stopped": `reason` says why the training ended early, and quality is
    what it had reached. status "failed": `reason` says why in one line, and quality is None. `tokens` were
    read in training, `seconds` went by in all.
    """

    status: str
    reason: str = ""
    quality: float | None = None
    curve: tuple[CurvePoint, ...] = ()
    seconds: float = 0.0
    tokens: int = 0

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def to_json(self) -> dict[str, Any]:
        """A plain dict, the curve as lists; `from_json` turns it back."""
        return dataclasses.asdict(self) | {"curve": [list(point) for point in self.curve]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """The outcome that `to_json` wrote."""
        curve = tuple(CurvePoint(*point) for point in data.get("curve", ()))
        return cls(**{**data, "curve": curve})


REMARK = "not extrapolated: "
"""How the reason of an outcome begins that is ok all the same."""


def is_remark(reason: object) -> bool:
    """Whether it may be the reason of an outcome that is ok."""
    return isinstance(reason, str) and reason.startswith(REMARK)


def train_candidate(
    genome: Genome,
    config: ModelConfig,
    settings: ProxySettings,
    corpus: Corpus,
    *,
    progress: Callable[[Progress], None] | None = None,
    save_to: str | Path | None = None,
    stop: Callable[[Sequence[CurvePoint]], str | None] | None = None,
    build: Callable[[Genome, ModelConfig, int], nn.Module] | None = None,
) -> Outcome:
    """Builds `genome` at `config`, trains it on `corpus`, and gives its outcome.

    Whatever goes wrong with the candidate (divergence, memory, an exception anywhere in its model) makes a
    failed outcome; KeyboardInterrupt passes. `save_to`: the trained weights are written there as safetensors,
    atomically, when the outcome is ok. `stop`: gets the curve after each of its points but the last, and may
    say in one line why the training ends there. `build`: makes the model from genome, config and seed instead
    of `star.build_model`.

    Raises:
        ValueError: settings that no candidate could meet: a vocabulary that is not the corpus's, a text
            shorter than `settings.length`, a device that is not there.
        OSError: the weights can't be written.
    """
    from star import parametrization, training, weights

    if config.vocab_size != corpus.vocab_size:
        raise ValueError(f"vocab_size is {config.vocab_size}, but the text has {corpus.vocab_size} token ids")
    corpus.check_length(settings.length)
    training.training_device(settings)

    start = time.perf_counter()
    model: nn.Module | None = None
    run: training.Training | None = None
    try:
        with training.thread_count(settings.threads):
            model = (build or _build)(genome, config, settings.seed)
            parametrization.scale_initial_weights(model, settings)
            run = training.Training(model, settings, corpus, progress)
            reason = None
            while not run.done and reason is None:
                run.train_step()
                if stop is not None and run.at_point and not run.done:
                    reason = stop(run.curve)
            outcome = run.outcome() if reason is None else run.stopped(reason)
    except Exception as error:
        # A candidate may fail in any way that torch or a layer knows; the search goes on without it.
        reason = training.failure_reason(error)
        outcome = Outcome(
            "failed", reason, None, tuple(run.curve) if run else (), 0.0, run.tokens if run else 0
        )
    if outcome.ok and save_to is not None and model is not None:
        about = {"genome": str(genome), "config": config.to_json(), "content_hash": corpus.content_hash}
        weights.save_weights(model, save_to, about)
    del model, run
    if outcome.status == "failed":
        training.release_memory()
    return dataclasses.replace(outcome, seconds=time.perf_counter() - start)


def _build(genome: Genome, config: ModelConfig, seed: int) -> nn.Module:
    from star.model import build_model

    return build_model(genome, config, seed=seed)
