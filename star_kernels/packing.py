"""Packed batches: S sequences of different lengths laid end to end in a batch of 1."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def over_sequences(
    function: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
    cu_seqlens: Tensor,
    tensors: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Applies a dense operator to each packed sequence on its own, so that nothing crosses a boundary.

    ``function(*tensors, *states)`` takes (1, length, ...) pieces and (1, ...) states and returns
    (output, final states); ``tensors`` are (1, L, ...) or None, ``states`` (S, ...) or None.
    """
    offsets = cu_seqlens.tolist()
    outputs, finals = [], []
    for sequence, (start, end) in enumerate(itertools.pairwise(offsets)):
        pieces = [None if tensor is None else tensor[:, start:end] for tensor in tensors]
        before = [None if state is None else state[sequence : sequence + 1] for state in states]
        output, after = function(*pieces, *before)
        outputs.append(output)
        finals.append(after)
    if not outputs:
        output, after = function(*tensors, *(None for _ in states))
        return output, tuple(state[:0] for state in after)
    return torch.cat(outputs, dim=1), tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
