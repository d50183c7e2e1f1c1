"""The next token from its logits: greedy, by temperature, of the k likeliest, of the likeliest p."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row.

    Args:
        logits: (B, V).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: then, draw from the smallest set of likeliest tokens that together have at least this
            probability.
        generator: of the draws; torch's global one if None.

    Returns:
        (B,) int64.

    Raises:
        ValueError: temperature below 0, top_k below 1, top_p outside (0, 1].
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature!r}; it takes 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; it takes 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p!r}; it takes a number above 0, at most 1")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token stays where those before it do not reach top_p yet; the first one always stays.
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, places, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
