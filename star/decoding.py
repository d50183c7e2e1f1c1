"""Decoding one token a call: eagerly, or as a captured CUDA graph that is replayed.

A captured step is one launch for all kernels of a token, whose own launches otherwise cost more than small
models compute. It reads and writes the same tensors every time: the token in `DecodeStep.ids`, all places on
the device (`ModelCache.track`), the hidden states in `DecodeStep.hidden`.

One graph serves a batch size and a room for tokens, rounded up, and is kept for the next call; it is captured
anew when the weights have changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from star_kernels.cache import ModelCache
from star_kernels.layers import LivLayer

if TYPE_CHECKING:
    from star.model import StarModel

__all__ = ["DecodeStep", "GraphStep", "give_back", "graph_step", "require_by_row", "require_cuda", "take"]

_ROOM = 256
"""Rooms are multiples of it, so that prompts of many lengths find one graph."""

_WARM_UPS = 3
_KEPT = 2
"""Idle graphs of a model at most: each holds a cache."""


class DecodeStep:
    """A step through tensors that stay where they are; runs anywhere, eagerly.

    Args:
        model: whose step it is; not kept.
        batch: rows.
        max_length: tokens there is room for.
        dtype: of the cache; by default the weights'.

    Attributes:
        cache: of the rows; a prompt is read into it by `model.hidden(ids, cache)`.
        ids: (B, 1) int64, the tokens of the next step.
        hidden: (B, 1, D), the last step's result.
    """

    def __init__(
        self, model: StarModel, batch: int, max_length: int, dtype: torch.dtype | None = None
    ) -> None:
        require_by_row(model)
        weight = model.head_weight
        self.cache: ModelCache = model.allocate_cache(batch, max_length, dtype)
        lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.cache.track(lengths, longest=0, ragged=False)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=weight.device)
        self.hidden = torch.zeros(batch, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)

    def compute(self, model: StarModel) -> None:
        """`hidden` of `ids`: what a graph captures. Nothing in it depends on a number of the host."""
        self.hidden.copy_(model.hidden(self.ids, self.cache))

    def __call__(self, model: StarModel, ids: Tensor) -> Tensor:
        """Hidden states (B, 1, D) of the next tokens (B, 1); overwritten by the next call."""
        self.ids.copy_(ids)
        self.compute(model)
        return self.hidden


class GraphStep(DecodeStep):
    """A step as a CUDA graph.

    Raises:
        ValueError: the model is not on a CUDA device, or the step can not be captured; one line.
    """

    def __init__(
        self, model: StarModel, batch: int, max_length: int, dtype: torch.dtype | None = None
    ) -> None:
        require_cuda(model.head_weight.device)
        super().__init__(model, batch, max_length, dtype)
        self.weights = _weights_version(model)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(model.head_weight.device):
            self._capture(model)
        self.cache.reset()

    @torch.no_grad()
    def _capture(self, model: StarModel) -> None:
        """Warm-ups compile kernels and make what the cache derives from the weights; they and the captured
        step leave tokens in the cache, which is emptied afterwards."""
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    self.compute(model)
                    self.cache.reset()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self.graph):
                self.compute(model)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"cuda_graph: the step can not be captured: {reason}") from error

    def __call__(self, model: StarModel, ids: Tensor) -> Tensor:
        """Hidden states (B, 1, D) of the next tokens (B, 1); overwritten by the next call."""
        for layer in self.cache.layers:
            layer.require_room(1)
        self.ids.copy_(ids)
        self.graph.replay()
        self.cache.skip(1)
        return self.hidden


def require_by_row(model: StarModel) -> None:
    """Raises ValueError unless every layer can put single tokens at each row's own place."""
    for plan, layer in zip(model.plans, model.layers, strict=True):
        assert isinstance(layer, LivLayer)
        has_places = any(spec.kind == "position" for spec in layer.cache_tensors(1))
        if has_places and not layer.decodes_by_row:
            raise ValueError(
                f"LIV {plan.index + 1} ({plan.entry.name}) decodes all rows at one place (its layer has no "
                "decodes_by_row), so it takes neither padding with a cache nor cuda_graph"
            )


def require_cuda(device: torch.device) -> None:
    """Raises ValueError unless a graph can be captured there."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph is true and the model is on {device.type!r}; it takes a CUDA device")
    if torch.is_autocast_enabled("cuda"):
        raise ValueError("cuda_graph is true under autocast; it takes weights of the dtype to compute in")


# --------------------------------------------------------------------------------------------------------
# Steps that wait for their next use


_Key = tuple[int, int, torch.dtype | None]
_idle: weakref.WeakKeyDictionary[StarModel, list[tuple[_Key, GraphStep]]] = weakref.WeakKeyDictionary()


@contextmanager
def graph_step(
    model: StarModel, batch: int, max_length: int, dtype: torch.dtype | None = None
) -> Iterator[GraphStep]:
    """A captured step with an empty cache, this block's alone.

    Raises:
        ValueError: as `GraphStep`.
    """
    step = take(model, batch, max_length, dtype)
    try:
        yield step
    finally:
        give_back(model, step, dtype)


def take(model: StarModel, batch: int, max_length: int, dtype: torch.dtype | None = None) -> GraphStep:
    """A captured step with an empty cache, one that waits or a new one. Raises as `GraphStep`."""
    require_cuda(model.head_weight.device)
    room = -(-max_length // _ROOM) * _ROOM
    waiting = _idle.setdefault(model, [])
    version = _weights_version(model)
    waiting[:] = [(key, step) for key, step in waiting if step.weights == version]
    for place, (key, step) in enumerate(waiting):
        if key == (batch, room, dtype):
            del waiting[place]
            step.cache.reset()
            return step
    return GraphStep(model, batch, room, dtype)


def give_back(model: StarModel, step: GraphStep, dtype: torch.dtype | None = None) -> None:
    """Lets another call have the step; the idle ones that were used longest ago are given up."""
    waiting = _idle.setdefault(model, [])
    waiting.append(((step.ids.shape[0], step.cache.max_length, dtype), step))
    del waiting[:-_KEPT]


def _weights_version(model: StarModel) -> tuple[tuple[int, int], ...]:
    """Changes whenever a weight moves or is written to."""
    return tuple(
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in model.parameters()
    )
