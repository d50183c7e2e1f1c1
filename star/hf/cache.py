"""The memory of a `StarForCausalLM` in transformers' `generate`: grows, reorders, holds rows of any padding.

A padded batch is read row by row length: rows of one length are one batch of their own, without padding,
and decode side by side afterwards, each at its own place. So padding is never read, in no LIV class.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from star.decoding import GraphStep, give_back, require_by_row, take
from star.hf.padding import first_tokens
from star_kernels.cache import ModelCache

if TYPE_CHECKING:
    from star.model import StarModel

__all__ = ["StarCache"]

_LEAST_ROOM = 64


class StarCache(Cache):
    """What a model remembers of the tokens it has read.

    Args:
        max_length: tokens there shall be room for at once; it grows where more are read.
        cuda_graph: replay a captured CUDA graph for single tokens (`star.decoding`).

    Attributes:
        memory: the layers' caches; None before the first call.
        columns: tokens read, those of the padding included.
    """

    def __init__(self, max_length: int = 0, *, cuda_graph: bool = False) -> None:
        super().__init__(layers=[])
        self.room = max_length
        self.cuda_graph = cuda_graph
        self.step: GraphStep | None = None
        self.memory: ModelCache | None = None
        self.columns = 0

    def read(self, model: StarModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, D) of tokens (B, L) that follow those read.

        Args:
            model: the same in every call.
            ids: padding is allowed in front of the first tokens of all.
            mask: (B, tokens read + L), nonzero at tokens; None: no padding.

        Raises:
            ValueError: another batch than before, or padding elsewhere than in front.
        """
        if self.memory is not None and self.columns:
            return self._continue(model, self.memory, ids, mask)
        batch, length = ids.shape
        starts = first_tokens(mask, ids.shape)
        if mask is not None and not bool((mask[:, -1] != 0).all()):
            raise ValueError("attention_mask ends with padding; with a cache it takes padding in front only")
        if self.memory is None or self.memory.max_length < length:
            self.memory = self._allocate(model, batch, max(self.room, length, _LEAST_ROOM))
        self._require_batch(self.memory, ids)
        self.columns = length
        if starts is None:
            return model.hidden(ids, self.memory)
        return _read_rows(model, self.memory, ids, starts)

    def _continue(self, model: StarModel, memory: ModelCache, ids: Tensor, mask: Tensor | None) -> Tensor:
        length = ids.shape[1]
        self._require_batch(memory, ids)
        # A single token is never padding; not to look spares a wait for the device at every token.
        if mask is not None and length > 1 and not bool((mask[:, -length:] != 0).all()):
            raise ValueError("attention_mask has padding behind tokens that were read; it takes none there")
        if memory.position + length > memory.max_length:
            memory = self.memory = self._larger(model, memory, 2 * (memory.position + length))
        self.columns += length
        if length == 1 and self.step is not None and self.step.cache is memory:
            return self.step(model, ids)
        return model.hidden(ids, memory)

    def _allocate(self, model: StarModel, batch: int, max_length: int) -> ModelCache:
        """An empty memory: where a graph is wanted its own, which is given back when this cache goes."""
        if not self.cuda_graph:
            return model.allocate_cache(batch, max_length)
        self.step = take(model, batch, max_length)
        weakref.finalize(self, _give_back, weakref.ref(model), self.step)
        return self.step.cache

    def _larger(self, model: StarModel, memory: ModelCache, max_length: int) -> ModelCache:
        """The same memory with room for more tokens."""
        batch = _batch(memory) or 1
        larger = self._allocate(model, batch, max_length)
        larger.put_rows(torch.arange(batch, device=model.head_weight.device), memory)
        for mine, theirs in zip(larger.layers, memory.layers, strict=True):
            mine.position = theirs.position
        lengths = memory.lengths if memory.lengths is not None else larger.lengths
        if lengths is not None:
            larger.track(lengths, longest=memory.position, ragged=memory.ragged)
        return larger

    def _require_batch(self, memory: ModelCache, ids: Tensor) -> None:
        if (batch := _batch(memory)) is not None and batch != ids.shape[0]:
            raise ValueError(f"input_ids has {ids.shape[0]} rows; the cache holds {batch}")

    # What transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, those of the padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes a copy of row beam_idx[b]."""
        if self.memory is not None:
            self.memory.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        if self.memory is not None:
            self.memory = _selected(self.memory, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row this many times, copies side by side."""
        if self.memory is not None and (batch := _batch(self.memory)) is not None:
            device = next(self.memory.tensors()).device
            rows = torch.arange(batch, device=device).repeat_interleave(repeats)
            self.memory = _selected(self.memory, rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Recurrent states can not forget: nothing but 0 is taken."""
        if tokens_to_remove:
            raise ValueError(f"StarCache can not forget {tokens_to_remove} tokens: its states have read them")

    def reset(self) -> None:
        """Forgets all tokens."""
        self.columns = 0
        if self.memory is not None:
            self.memory.reset()

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        batch = None if self.memory is None else _batch(self.memory)
        return -1 if batch is None else batch


def _read_rows(model: StarModel, memory: ModelCache, ids: Tensor, starts: Tensor) -> Tensor:
    """Hidden states of rows that begin at `starts` (B,); zeros at the padding."""
    require_by_row(model)
    length = ids.shape[1]
    states: Tensor | None = None
    for start in sorted(set(starts.tolist())):
        rows = (starts == start).nonzero()[:, 0]
        alone = model.allocate_cache(len(rows), length - start)
        hidden = model.hidden(ids[rows, start:], alone)
        memory.put_rows(rows, alone)
        if states is None:
            states = hidden.new_zeros(len(ids), length, hidden.shape[-1])
        states[rows, start:] = hidden
    assert states is not None
    lengths = length - starts
    memory.track(lengths, longest=int(lengths.max()), ragged=True)
    return states


def _give_back(model: weakref.ref[StarModel], step: GraphStep) -> None:
    if (alive := model()) is not None:
        give_back(alive, step)


def _selected(memory: ModelCache, rows: Tensor) -> ModelCache:
    """A cache of these rows."""
    made: dict[int, Tensor] = {id(tensor): tensor.index_select(0, rows) for tensor in memory.tensors()}
    layers = []
    for layer in memory.layers:
        copied = type(layer)(
            {name: made[id(tensor)] for name, tensor in layer.tensors.items()},
            layer.max_length,
            layer.aliased,
            layer.position,
        )
        layers.append(copied)
    selected = ModelCache(layers)
    if memory.lengths is not None:
        lengths = memory.lengths.index_select(0, rows)
        selected.track(lengths, longest=memory.position, ragged=memory.ragged)
    return selected


def _batch(memory: ModelCache) -> int | None:
    """Rows of the cache; None where no layer remembers anything."""
    return next((tensor.shape[0] for tensor in memory.tensors()), None)
