"""Padding that no token may see: where the tokens of every row are, and rows that begin with them.

Every LIV is causal, so what stands behind a row's tokens does not reach them: a batch padded on the left
becomes one padded on the right, and its tokens give exactly what they give alone, in every class.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first_tokens", "shifted"]


def first_tokens(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The place of the first token in every row, (B,) int64; None where all rows begin with a token.

    Args:
        mask: (B, L), nonzero at tokens; None: no padding.
        shape: (B, L) of the tokens.

    Raises:
        ValueError: another shape, a row without a token, or padding between tokens.
    """
    if mask is None:
        return None
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it takes {tuple(shape)}, as input_ids"
        )
    is_token = mask != 0
    counts = is_token.sum(1)
    starts = is_token.int().argmax(1)
    length = shape[1]
    ends = length - is_token.flip(1).int().argmax(1)
    empty, between, begin = torch.stack(
        [(counts == 0).any(), (ends - starts != counts).any(), (starts > 0).any()]
    ).tolist()  # one wait for the device
    if empty:
        raise ValueError("attention_mask has a row without a token; every row takes at least one")
    if between:
        raise ValueError("attention_mask has padding between tokens; it takes padding before or behind them")
    return starts if begin else None


def shifted(rows: Tensor, by: Tensor) -> Tensor:
    """Rows (B, L, ...) turned to the left by (B,) places; what leaves in front comes back behind."""
    length = rows.shape[1]
    places = (torch.arange(length, device=rows.device) + by[:, None]) % length
    for _ in range(2, rows.dim()):
        places = places[..., None]
    return rows.gather(1, places.expand(rows.shape))
