"""Training on a synthetic task: the training loop of texts, with a task in the text's place.

Loss: cross entropy at the positions that ask for something. Accuracy: the share of those positions, over
held sequences that are the same for every model, at which the likeliest token of the whole vocabulary is the
answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star.config import ModelConfig
from star.data import Corpus
from star.genome import Genome
from star.model import build_model
from star.proxy import Progress, ProxySettings
from star.tasks.base import IGNORED, Sequences, Task
from star.training import (
    Training,
    failure_reason,
    release_memory,
    thread_count,
    training_device,
    training_dtype,
)

__all__ = [
    "Autoencoder",
    "TaskOutcome",
    "TaskPoint",
    "TaskRun",
    "TaskSequences",
    "score",
    "task_model",
    "train_on_task",
]

# Streams of random numbers that never meet: training steps, and the held sequences of all models.
_TRAINING, _HELD = 0, 1


class TaskPoint(NamedTuple):
    """A point of the curve: mean training loss since the last one, bits an answer; held accuracy, 0 to 1."""

    step: int
    train: float
    accuracy: float


@dataclass(frozen=True)
class TaskOutcome:
    """What became of a model on a task.

    status "ok": `accuracy` on held sequences (0 to 1) and `bits`, their cross entropy in bits an answer.
    status "failed": `reason` says why in one line. `tokens` were read in training, `seconds` went by in all.
    """

    status: str
    reason: str = ""
    accuracy: float | None = None
    bits: float | None = None
    curve: tuple[TaskPoint, ...] = ()
    seconds: float = 0.0
    tokens: int = 0

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def to_json(self) -> dict[str, Any]:
        """A plain dict, the curve as lists; `from_json` turns it back."""
        return dataclasses.asdict(self) | {"curve": [list(point) for point in self.curve]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TaskOutcome:
        return cls(**{**data, "curve": tuple(TaskPoint(*point) for point in data.get("curve", ()))})


class TaskSequences:
    """A task where `star.training` expects a text: endless training sequences, and held ones.

    Sequences are a function of the seed and the step alone; the held ones of neither.
    """

    bytes_per_token = 1.0  # so that losses are bits an answer

    def __init__(self, task: Task) -> None:
        self.task = task
        self.vocab_size = task.vocab_size
        text = json.dumps(task.to_json(), sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()

    def check_length(self, length: int) -> None:
        """Raises ValueError unless it is the task's."""
        if length != self.task.length:
            raise ValueError(f"length is {length}, but the task {self.task.name} has {self.task.length}")

    def batch(self, step: int, batch_size: int, length: int, seed: int) -> Sequences:
        self.check_length(length)
        return self.task.sample(batch_size, np.random.default_rng([_TRAINING, seed, step]))

    def validation_batches(self, batch_size: int, length: int, count: int) -> Iterator[Sequences]:
        self.check_length(length)
        for index in range(count):
            yield self.task.sample(batch_size, np.random.default_rng([_HELD, index]))


class Autoencoder(nn.Module):
    """A model whose last output alone must tell the whole sequence (MAD's compression).

    The decoder is MAD's: the model's output at the last position plus a sine-cosine code of the position
    asked for, then twice (norm, linear, GELU), a norm and a head.

    Args:
        model: with `hidden` (B, L) -> (B, L, D).
        vocab_size, width, length: V, D, L.
    """

    def __init__(self, model: nn.Module, vocab_size: int, width: int, length: int) -> None:
        super().__init__()
        self.model = model
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.RMSNorm(width), nn.Linear(width, width), nn.GELU()]
        self.decoder = nn.Sequential(*layers, nn.RMSNorm(width))
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.register_buffer("code", _position_code(length, width), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D)."""
        return self.head.weight

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, L) tokens -> (B, L, D), each position decoded from the model's last output."""
        last = cast(Tensor, cast(Any, self.model).hidden(ids)[:, -1:])
        return cast(Tensor, self.decoder(last + cast(Tensor, self.code)[: ids.shape[1]].to(last.dtype)))


def _position_code(length: int, width: int) -> Tensor:
    """(L, D): half sines, half cosines, of wavelengths from 2 pi to 10000 times that."""
    half = width // 2
    rates = 10000.0 ** (-torch.arange(half) / max(1, half - 1))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def task_model(genome: Genome, config: ModelConfig, task: Task, seed: int) -> nn.Module:
    """The model that is trained on `task`: the genome's, with the task's vocabulary, and a decoder where the
    task reads the last position."""
    model = build_model(genome, dataclasses.replace(config, vocab_size=task.vocab_size), seed=seed)
    if not task.reads_last:
        return model
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Autoencoder(model, task.vocab_size, config.width, task.length)


class TaskRun:
    """One training on a task, between two steps. `done`, `step`, `save` and `restore` as of `Training`.

    Args:
        model: from `task_model`; trained in place.
        task: what it learns.
        settings: its `length` is replaced by the task's; `validation_batches` batches are held.
        evaluate_every: steps between points of the curve; the end is one always.
        progress: called after every step, losses in bits an answer.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: ProxySettings,
        *,
        evaluate_every: int | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.task = task
        self.sequences = TaskSequences(task)
        # The loop's own evaluations would be second ones; its curve gives the training losses.
        every = evaluate_every or settings.steps
        self.settings = dataclasses.replace(settings, length=task.length, evaluate_every=0)
        self.every = every
        # `Training` reads nothing of a corpus but what TaskSequences has. `score` evaluates on all held
        # batches; the loop's own evaluation at its end only needs to be there.
        looped = dataclasses.replace(self.settings, validation_batches=1)
        self.training = Training(model, looped, cast(Corpus, self.sequences), progress)
        self.training.point_every = every
        self.curve: list[TaskPoint] = []
        self._bits: float | None = None

    @property
    def done(self) -> bool:
        return self.training.done

    @property
    def step(self) -> int:
        return self.training.step

    def train_step(self) -> None:
        """One optimizer step, and a point of the curve where one is due. Raises `star.training.Diverged`."""
        self.training.train_step()
        if self.training.done or self.training.step % self.every == 0:
            right, self._bits = score(self.training.model, self.task, self.settings)
            self.curve.append(TaskPoint(self.step, self.training.curve[-1].train, right))

    def save(self, path: Any) -> None:
        self.training.save(path)

    def restore(self, path: Any, curve: list[TaskPoint]) -> None:
        """Go on where `save` stood, with the curve that there was."""
        self.training.restore(path)
        self.curve = [point for point in curve if point.step <= self.step]

    def outcome(self) -> TaskOutcome:
        """The outcome of a training that is done."""
        last = self.curve[-1].accuracy
        training = self.training
        return TaskOutcome("ok", "", last, self._bits, tuple(self.curve), training.seconds, training.tokens)


@torch.no_grad()
def score(model: nn.Module, task: Task, settings: ProxySettings) -> tuple[float, float]:
    """(accuracy 0 to 1, cross entropy in bits an answer) on the held sequences."""
    device = next(model.parameters()).device
    weight = cast(Tensor, model.head_weight)
    dtype = training_dtype(settings, device, weight.shape[1])
    was_training = model.training
    model.eval()
    right, nats = torch.zeros(2, dtype=torch.float64, device=device)
    questions = 0
    sequences = TaskSequences(task)
    for batch in sequences.validation_batches(settings.batch_size, task.length, settings.validation_batches):
        inputs, targets = (torch.from_numpy(part).to(device) for part in batch)
        asked = targets != IGNORED
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            logits = F.linear(cast(Any, model).hidden(inputs)[asked], weight).float()
        right += (logits.argmax(dim=-1) == targets[asked]).sum()
        nats += F.cross_entropy(logits, targets[asked], reduction="sum").double()
        questions += int(asked.sum())
    model.train(was_training)
    return right.item() / questions, nats.item() / questions / math.log(2)


def train_on_task(
    genome: Genome,
    config: ModelConfig,
    task: Task,
    settings: ProxySettings,
    *,
    evaluate_every: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TaskOutcome:
    """Build the model of `genome`, train it on `task`, and give its outcome.

    Equal arguments give equal outcomes but for the seconds, bit for bit on a CPU with as many threads.
    Whatever goes wrong with the model (divergence, memory, an exception anywhere in it) is a failed outcome.

    Raises:
        ValueError: a device that is not there.
    """
    training_device(settings)
    began = time.perf_counter()
    run: TaskRun | None = None
    try:
        with thread_count(settings.threads):
            model = task_model(genome, config, task, settings.seed)
            run = TaskRun(model, task, settings, evaluate_every=evaluate_every, progress=progress)
            while not run.done:
                run.train_step()
            outcome = run.outcome()
    except Exception as error:
        # As in `star.proxy`: a candidate may fail in any way that torch or a layer knows.
        curve, tokens = (tuple(run.curve), run.training.tokens) if run else ((), 0)
        outcome = TaskOutcome("failed", failure_reason(error), None, None, curve, 0.0, tokens)
        del run
        release_memory()
    return dataclasses.replace(outcome, seconds=time.perf_counter() - began)
