"""What is measured on a device, and how its values are named.

    ttft         ms from the prompt to the logits of the first new token
    prefill      prompt tokens a second while it is read; more is better
    decode_p50   ms a token over a full cache, the median
    decode_p95   ms a token that 95 of 100 tokens stay within
    peak_memory  bytes: weights, cache and what the computation takes beside them, at its peak

All at batch 1 and at one context: "ttft@4096". A name without a context means the smallest of those measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

__all__ = ["QUANTITIES", "at", "percentile", "relative_errors", "split", "value_of", "values_of_context"]

QUANTITIES = ("ttft", "prefill", "decode_p50", "decode_p95", "peak_memory")


def at(name: str, context: int) -> str:
    """The name of a quantity at a context."""
    return f"{name}@{context}"


def split(name: str) -> tuple[str, int | None]:
    """("ttft", 4096) of "ttft@4096", ("ttft", None) of "ttft".

    Raises:
        ValueError: what stands behind the @ is no context.
    """
    base, sign, context = name.partition("@")
    if not sign:
        return base, None
    if not context.isascii() or not context.isdecimal() or int(context) < 1:
        raise ValueError(f"{name!r} names no context, takes {base}@TOKENS, like {base}@4096")
    return base, int(context)


def value_of(values: Mapping[str, float], name: str) -> float | None:
    """A quantity, by its name with a context or without, from what was measured at some contexts."""
    base, context = split(name)
    if context is None:
        known = [split(key)[1] or 0 for key in values if split(key)[0] == base]
        if not known:
            return None
        context = min(known)
    return values.get(at(base, context))


def values_of_context(
    context: int, ttft: float, steps: Sequence[float], memory: int | None
) -> dict[str, float]:
    """The five quantities by name, from what was timed.

    Args:
        context: tokens of the prompt.
        ttft: ms.
        steps: ms of the tokens that were decoded, one each.
        memory: bytes; None where this machine can not say.
    """
    values = {
        at("ttft", context): ttft,
        at("prefill", context): 1e3 * context / ttft,
        at("decode_p50", context): statistics.median(steps),
        at("decode_p95", context): percentile(steps, 95),
    }
    return values if memory is None else {**values, at("peak_memory", context): float(memory)}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of 100 values stay within (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def relative_errors(
    pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
) -> dict[str, list[float]]:
    """By quantity at its context, |predicted - measured| / measured of every (predicted, measured) pair."""
    errors: dict[str, list[float]] = {}
    for predicted, measured in pairs:
        for name in measured:
            if name in predicted and measured[name] > 0:
                error = abs(predicted[name] - measured[name]) / measured[name]
                errors.setdefault(name, []).append(error)
    return errors
