"""Decoding whole models on a GPU, one captured CUDA graph a token, for `benchmarks.gpu`.

The bound at batch 1 is the time in which the weights are read once, at the rate of a copy measured in turns
with the steps. Weights are random; the cache counts as filled up to `CONTEXT`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import report
from benchmarks.checks import Check
from star import ModelConfig, baselines, build_model
from star.bench.timing import copy_call, interleaved
from star.decoding import DecodeStep, GraphStep

__all__ = ["MODELS", "ModelRow", "measure_model", "model_checks", "model_names", "model_table"]

DEPTH, WIDTH, HEAD_DIM, VOCABULARY, CONTEXT = 24, 768, 64, 32000, 4096
BATCHES = (1, 64)
WEIGHTS = 1.5
"""Times the time to read the weights once that a token may take at batch 1."""

MODELS = {
    "Transformer++": baselines.transformer_pp,
    "StripedMamba": baselines.striped_mamba,
    "LFM2": baselines.lfm2,
}


@dataclass(frozen=True)
class ModelRow:
    """One model at one batch: seconds a step, what it reads, and seconds of a copy that moves the weights."""

    name: str
    batch: int
    context: int
    seconds: float
    weight_bytes: int
    cache_bytes: int
    weights_seconds: float

    @property
    def ratio(self) -> float:
        """Times the time in which the weights are read once."""
        return self.seconds / self.weights_seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def model_names() -> list[tuple[str, int]]:
    """The rows: models and batches."""
    return [(name, batch) for batch in BATCHES for name in MODELS]


@torch.no_grad()
def measure_model(
    name: str, batch: int, *, device: torch.device, dtype: torch.dtype, seconds: float, quick: bool = False
) -> ModelRow:
    """Times one decode step; where there is no CUDA, the same step without a graph."""
    depth, width, head_dim, vocabulary, context = (
        (4, 32, 8, 61, 20) if quick else (DEPTH, WIDTH, HEAD_DIM, VOCABULARY, CONTEXT)
    )
    config = ModelConfig(width=width, vocab_size=vocabulary, head_dim=head_dim)
    model = build_model(MODELS[name](depth), config, seed=0).to(device, dtype).eval()
    kind = GraphStep if device.type == "cuda" else DecodeStep
    step = kind(model, batch, context + 1)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    timings = interleaved(
        {"step": _token(model, step, batch, context), "weights": copy_call(weight_bytes, device)},
        seconds,
        device,
    )
    return ModelRow(
        name,
        batch,
        context,
        timings["step"].median,
        weight_bytes,
        step.cache.nbytes,
        timings["weights"].median,
    )


def _token(model: Any, step: DecodeStep, batch: int, context: int) -> Callable[[], object]:
    """One token after `context` others, every time at the same place."""
    lengths = step.cache.lengths
    assert lengths is not None

    def token() -> None:
        step.cache.track(lengths.fill_(context), longest=context, ragged=False)
        if isinstance(step, GraphStep):
            step.graph.replay()
        else:
            step.compute(model)

    return token


def model_checks(rows: Sequence[ModelRow]) -> list[Check]:
    """The limit of every model at batch 1."""
    return [
        Check(
            f"{row.name}, decode",
            "weights",
            f"{DEPTH} LIVs of width {WIDTH}, batch 1, context {row.context}",
            f"{WEIGHTS:g}x reading the weights",
            f"{row.ratio:.2f}x",
            row.ratio <= WEIGHTS,
        )
        for row in rows
        if row.batch == 1
    ]


def model_table(rows: Sequence[ModelRow]) -> str:
    """The Markdown table of all models."""
    lines = [
        (
            row.name,
            str(row.batch),
            str(row.context),
            report.time_text(row.seconds),
            f"{row.batch / row.seconds:,.0f}",
            f"{row.weight_bytes / 2**20:.0f} MiB",
            f"{row.cache_bytes / 2**20:.0f} MiB",
            f"{row.ratio:.2f}x",
        )
        for row in rows
    ]
    heads = ("model", "batch", "context", "a step", "tokens/s", "weights", "cache", "of reading the weights")
    return report.table(heads, lines, right=(1, 2, 3, 4, 5, 6, 7))
