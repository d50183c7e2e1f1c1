"""The training loop of proxies and of longer runs: one model, one text, AdamW, checkpoints.

Everything a step does is a function of the settings, the text and the step's number, so a run that is
killed and resumed from its checkpoint ends with the same weights as one that was not.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from star import parametrization, weights
from star.data import Corpus
from star.extrapolation import evaluation_steps, quality_of
from star.optimizer import AdamW, learning_rate
from star.proxy import ADDED_SETTINGS, CurvePoint, Outcome, Progress, ProxySettings
from star_kernels import linear_cross_entropy

__all__ = [
    "Diverged",
    "Training",
    "evaluate",
    "failure_reason",
    "release_memory",
    "thread_count",
    "train_model",
    "training_device",
    "training_dtype",
]

CURVE_POINTS = 20
"""Points of a learning curve when `evaluate_every` does not say."""

DIVERGED_NATS = 1.0
"""A training has diverged when its recent mean loss is this far above its first, in nats a token."""

_RECENT_LOSSES = 8
_CUDA_CHECK_STEPS = 16
_AMX_WIDTH = 512


class Diverged(ArithmeticError):
    """Training can't go on: a loss or gradient that is not finite, or a loss far above the first."""


def training_device(settings: ProxySettings) -> torch.device:
    """The device that the settings name; "auto" is CUDA where there is one. Raises ValueError without it."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(settings.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {settings.device!r}, but there are {torch.cuda.device_count()} CUDA devices"
        )
    return device


def training_dtype(settings: ProxySettings, device: torch.device, width: int) -> torch.dtype:
    """float32, or bfloat16 for autocast, of a model of `width`.

    "auto" is bfloat16 on GPUs that compute in it, and on CPUs with matrix units for it (AMX) from width 512
    on. Elsewhere it is float32: plain vector units gain little from bfloat16 products, and in narrow models
    autocast's casts cost more than the products save.
    """
    if settings.dtype != "auto":
        return torch.float32 if settings.dtype == "float32" else torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = width >= _AMX_WIDTH and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Sets torch's thread count inside and restores it; None leaves it alone."""
    if threads is None or threads == torch.get_num_threads():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_model(
    model: nn.Module,
    settings: ProxySettings,
    corpus: Corpus,
    *,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
) -> Outcome:
    """Trains `model` in place and evaluates it on held-out text; the outcome is always "ok".

    progress: called after every step (every 16 on CUDA, which must not wait for each).
    checkpoint: a safetensors file, written every `checkpoint_every` steps and at the end. When it exists,
        training goes on from it.

    Raises:
        Diverged: see there.
        ValueError: a text shorter than `settings.length`, or a checkpoint of another training.
        OSError: the checkpoint can't be written.
    """
    training = Training(model, settings, corpus, progress)
    if checkpoint is not None and Path(checkpoint).exists():
        training.restore(checkpoint)
    while not training.done:
        training.train_step()
        if checkpoint is not None and (training.step % checkpoint_every == 0 or training.done):
            training.save(checkpoint)
    return training.outcome()


@dataclass
class _Watch:
    """Looks at losses and gradient norms without making a GPU wait: `check` reads what `add` kept.

    All losses are nats a token. `total` and `count` sum those since the last point of the curve.
    """

    first: float | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_LOSSES))
    total: float = 0.0
    count: int = 0
    waiting: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        self.waiting.append((step, loss, norm))

    def check(self) -> None:
        """Raises Diverged when a step that was added since the last call has gone wrong."""
        waiting, self.waiting = self.waiting, []
        for step, loss_tensor, norm_tensor in waiting:
            loss, norm = loss_tensor.item(), norm_tensor.item()
            if not math.isfinite(loss):
                raise Diverged(f"loss is {loss} at step {step}")
            if not math.isfinite(norm):
                raise Diverged(f"gradient norm is {norm} at step {step}")
            self.first = loss if self.first is None else self.first
            self.recent.append(loss)
            self.total += loss
            self.count += 1
            mean = sum(self.recent) / len(self.recent)
            if len(self.recent) == _RECENT_LOSSES and mean > self.first + DIVERGED_NATS:
                raise Diverged(f"loss rose from {self.first:.3f} to {mean:.3f} nats a token at step {step}")

    def take_mean(self) -> float:
        """Mean loss since the last call."""
        mean = self.total / self.count
        self.total, self.count = 0.0, 0
        return mean


class Training:
    """One training between two steps; `train_model` is its whole use.

    `step` optimizer steps are done, `curve` is the learning curve so far.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ProxySettings,
        corpus: Corpus,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        corpus.check_length(settings.length)
        self.settings = settings
        self.corpus = corpus
        self.progress = progress
        self.curve: list[CurvePoint] = []
        self.device = training_device(settings)
        self.dtype = training_dtype(settings, self.device, _head_weight(model).shape[1])
        self.model = model.to(self.device).train()
        self.optimizer = AdamW(
            self.model.named_parameters(),
            weight_decay=settings.weight_decay,
            rate_scales=parametrization.rate_scales(model, settings),
        )
        self.watch = _Watch()
        self.step = 0
        self.earlier_seconds = 0.0
        self.started = time.perf_counter()
        self.check_every = 1 if self.device.type == "cpu" else _CUDA_CHECK_STEPS
        self.point_every = settings.evaluate_every or max(1, settings.steps // CURVE_POINTS)
        self.evaluated_steps = evaluation_steps(settings)

    @property
    def done(self) -> bool:
        return self.step >= self.settings.steps

    @property
    def at_point(self) -> bool:
        """Whether the last step has given a point of the curve."""
        return bool(self.curve) and self.curve[-1].step == self.step

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self.step * self.settings.batch_size * self.settings.length

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    def train_step(self) -> None:
        """One optimizer step, and a point of the curve where one is due."""
        settings, optimizer = self.settings, self.optimizer
        batch = self.corpus.batch(self.step, settings.batch_size, settings.length, settings.seed)
        inputs, targets = (torch.from_numpy(part).to(self.device, non_blocking=True) for part in batch)
        loss = _loss(self.model, inputs, targets, self.dtype)
        loss.backward()
        norm = optimizer.gradient_norm()
        self.watch.add(self.step, loss.detach(), norm)
        last = self.step + 1 == settings.steps
        due = (self.step + 1) % self.point_every == 0
        evaluating = last or (due and settings.evaluate_every > 0) or self.step + 1 in self.evaluated_steps
        point = due or evaluating
        checking = point or (self.step + 1) % self.check_every == 0
        if checking:
            self.watch.check()
        rate = learning_rate(
            self.step,
            steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            peak=settings.learning_rate,
            final_rate=settings.final_rate,
            schedule=settings.schedule,
        )
        optimizer.step(rate, torch.clamp(norm / settings.gradient_clip, min=1.0))
        optimizer.zero_gradients()
        self.step += 1
        if point:
            self._add_point(evaluating)
        if checking and self.progress is not None:
            train = _bits_per_byte(self.watch.recent[-1], self.corpus)
            validation = self.curve[-1].validation if self.curve else None
            self.progress(Progress(self.step, settings.steps, train, validation))

    def _add_point(self, evaluating: bool) -> None:
        validation = self._held_out() if evaluating else None
        train = _bits_per_byte(self.watch.take_mean(), self.corpus)
        self.curve.append(CurvePoint(self.step, train, validation))

    def _held_out(self) -> float:
        """Bits per byte on held-out text. Raises Diverged where it is no number."""
        validation = evaluate(self.model, self.corpus, self.settings)
        if not math.isfinite(validation):
            raise Diverged(f"held-out loss is {validation} after step {self.step}")
        return validation

    def outcome(self) -> Outcome:
        """The outcome of a training that is done."""
        quality, reason = quality_of(self.curve, self.settings)
        return Outcome("ok", reason, quality, tuple(self.curve), self.seconds, self.tokens)

    def stopped(self, reason: str) -> Outcome:
        """The outcome of a training that ends at the last point of its curve, before it is done: its quality
        is that of the model as it is. Raises Diverged."""
        point = self.curve[-1]
        if point.validation is None:
            point = point._replace(validation=self._held_out())
            self.curve[-1] = point
        return Outcome("stopped", reason, point.validation, tuple(self.curve), self.seconds, self.tokens)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to belong to this training."""
        settings = self.settings.to_json()
        del settings["threads"], settings["device"]
        return {"settings": settings, "corpus": self.corpus.key}

    def save(self, path: str | Path) -> None:
        """Writes model, optimizer and progress as one file. Raises OSError."""
        self.watch.check()
        tensors = {f"model.{name}": tensor for name, tensor in weights.unique_tensors(self.model).items()}
        tensors |= {f"first.{name}": tensor for name, tensor in self.optimizer.first.items()}
        tensors |= {f"second.{name}": tensor for name, tensor in self.optimizer.second.items()}
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "curve": [list(point) for point in self.curve],
            "first_loss": self.watch.first,
            "recent_losses": list(self.watch.recent),
            "sum_of_losses": self.watch.total,
            "count_of_losses": self.watch.count,
        }
        weights.write_tensors(tensors, path, {"training": self._identity(), "state": state})

    def restore(self, path: str | Path) -> None:
        """Goes on where `save` stood. Raises ValueError for a damaged file or one of another training."""
        tensors, about = weights.read_tensors(path)
        where = f"checkpoint {str(path)!r}"
        if "training" not in about or "state" not in about:
            raise ValueError(f"{where}: holds weights only, no training to go on with")
        saved, own = about["training"], self._identity()
        if saved["corpus"] != own["corpus"]:
            raise ValueError(f"{where}: was trained on another text, tokenizer or split")
        there, wanted = ({**ADDED_SETTINGS, **part["settings"]} for part in (saved, own))
        for name in {**wanted, **there}:
            if there.get(name) != wanted.get(name):
                raise ValueError(
                    f"{where}: has {name} {there.get(name)!r}, the settings {wanted.get(name)!r}"
                )
        target = {f"model.{name}": tensor for name, tensor in weights.unique_tensors(self.model).items()}
        target |= {f"first.{name}": tensor for name, tensor in self.optimizer.first.items()}
        target |= {f"second.{name}": tensor for name, tensor in self.optimizer.second.items()}
        weights.copy_tensors(tensors, target, where)
        state = about["state"]
        self.step = self.optimizer.steps = state["step"]
        self.earlier_seconds = state["seconds"]
        self.curve[:] = [CurvePoint(*point) for point in state["curve"]]
        self.watch.first = state["first_loss"]
        self.watch.recent.extend(state["recent_losses"])
        self.watch.total, self.watch.count = state["sum_of_losses"], state["count_of_losses"]


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, settings: ProxySettings) -> float:
    """Bits per byte on held-out text: nats per token / ln 2 / bytes per token; the windows are fixed."""
    device = next(model.parameters()).device
    dtype = training_dtype(settings, device, _head_weight(model).shape[1])
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for batch in corpus.validation_batches(settings.batch_size, settings.length, settings.validation_batches):
        inputs, targets = (torch.from_numpy(part).to(device, non_blocking=True) for part in batch)
        total += _loss(model, inputs, targets, dtype).double() * targets.numel()
        tokens += targets.numel()
    model.train(training)
    return _bits_per_byte(total.item() / tokens, corpus)


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean nats per token, a float32 scalar; inputs and targets (batch, length)."""
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype is not torch.float32):
        hidden = cast(Callable[[Tensor], Tensor], model.hidden)(inputs)
        return linear_cross_entropy(hidden.flatten(0, 1), _head_weight(model), targets.flatten())


def _head_weight(model: nn.Module) -> Tensor:
    """(V, D), which turns hidden states into logits."""
    return cast(Tensor, model.head_weight)


def _bits_per_byte(nats_per_token: float, corpus: Corpus) -> float:
    return nats_per_token / math.log(2) / corpus.bytes_per_token


def failure_reason(error: Exception) -> str:
    """One line: "diverged: …", "out of memory: …", or the exception's type and message."""
    lines = str(error).strip().splitlines()
    message = lines[0][:500] if lines else "no message"
    if isinstance(error, Diverged):
        return f"diverged: {message}"
    # The CPU's allocator reports a refused allocation as a plain RuntimeError.
    refused = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    if refused or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"out of memory: {message}"
    return f"{type(error).__name__}: {message}"


def release_memory() -> None:
    """Gives back what a failed candidate held; tracebacks keep models alive in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
