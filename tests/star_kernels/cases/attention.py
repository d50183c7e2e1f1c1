"""Situations of softmax attention."""

from __future__ import annotations

from typing import Any

import torch

from tests.star_kernels.cases import Case, Maker, offsets


def full(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    packed: tuple[int, ...] | None = None,
    **others: Any,
) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "q": draw.normal(batch, queries, heads, width),
            "k": draw.normal(batch, keys, kv_heads, width),
            "v": draw.normal(batch, keys, kv_heads, value_width),
        }
        if packed:
            arguments["cu_seqlens"] = offsets(*packed)
        return arguments | others

    return make


def differential(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    lam_per_head: bool = False,
    **others: Any,
) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "q1": draw.normal(batch, queries, heads, width),
            "k1": draw.normal(batch, keys, kv_heads, width),
            "q2": draw.normal(batch, queries, heads, width),
            "k2": draw.normal(batch, keys, kv_heads, width),
            "v": draw.normal(batch, keys, kv_heads, value_width),
            "lam": draw.uniform(heads) if lam_per_head else draw.uniform(),
        }
        return arguments | others

    return make


def decode(
    heads: int, kv_heads: int, width: int, value_width: int, capacity: int, lengths: list[int], **others: Any
) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        return {
            "q": draw.normal(len(lengths), heads, width),
            "k_cache": draw.normal(len(lengths), capacity, kv_heads, width),
            "v_cache": draw.normal(len(lengths), capacity, kv_heads, value_width),
            "lengths": torch.tensor(lengths, dtype=torch.int32),
        } | others

    return make


LAM = frozenset({"lam"})
SCORED = frozenset({"q", "k"})  # where one key alone is seen, their gradients are zero but for rounding

CASES = [
    Case("attention", "window", full(2, 37, 37, 4, 2, 16, 16, window=9)),
    Case("attention", "causal", full(2, 37, 37, 4, 4, 16, 16), interpreted=False),
    Case("attention", "causal-grouped", full(1, 70, 70, 6, 2, 24, 24), interpreted=False),
    Case("attention", "causal-long", full(1, 150, 150, 1, 1, 16, 16)),
    Case("attention", "grouped", full(2, 20, 20, 2, 1, 24, 24)),
    Case("attention", "not-causal", full(2, 19, 33, 2, 1, 8, 8, causal=False)),
    Case("attention", "fewer-queries", full(2, 7, 21, 4, 2, 16, 16), interpreted=False),
    Case("attention", "more-queries", full(2, 21, 7, 4, 2, 16, 16), interpreted=False),
    Case("attention", "one-query", full(2, 1, 21, 4, 2, 16, 16), interpreted=False),
    Case(
        "attention",
        "one-query-window-softcap",
        full(2, 1, 90, 4, 2, 16, 16, softcap=0.9, window=80),
        interpreted=False,
    ),
    Case("attention", "one-token", full(2, 1, 1, 4, 2, 16, 16), constant=SCORED, interpreted=False),
    Case("attention", "no-query", full(2, 0, 5, 4, 2, 16, 16)),
    Case("attention", "no-key", full(2, 5, 0, 4, 2, 16, 16)),
    Case("attention", "no-batch", full(0, 5, 5, 4, 2, 16, 16)),
    Case("attention", "odd-widths", full(1, 45, 45, 3, 1, 13, 21, scale=0.4)),
    Case("attention", "negative-scale", full(1, 19, 19, 2, 1, 8, 8, scale=-0.4)),
    Case("attention", "no-scale", full(1, 9, 9, 2, 1, 8, 8, scale=0.0)),
    Case("attention", "window-of-one", full(1, 20, 20, 2, 2, 8, 8, window=1), constant=SCORED),
    Case("attention", "window-both-sides", full(1, 30, 30, 2, 2, 8, 8, causal=False, window=5)),
    Case("attention", "both-sides-blind", full(1, 30, 9, 2, 2, 8, 8, causal=False, window=5)),
    Case("attention", "window-fewer-queries", full(1, 9, 30, 2, 1, 8, 8, window=6)),
    Case("attention", "window-more-queries", full(1, 30, 9, 2, 1, 8, 8, window=6)),
    Case("attention", "window-long", full(1, 150, 150, 2, 2, 16, 16, window=40)),
    Case("attention", "softcap", full(2, 33, 33, 4, 2, 16, 16, softcap=1.5), interpreted=False),
    Case("attention", "softcap-window", full(1, 40, 40, 2, 2, 16, 16, softcap=2.0, window=11)),
    Case("attention", "packed", full(1, 29, 29, 4, 2, 16, 16, packed=(0, 1, 1, 14, 29))),
    Case("attention", "packed-window", full(1, 90, 90, 2, 2, 16, 16, packed=(0, 50, 90), window=7)),
    Case("attention", "packed-not-causal", full(1, 29, 29, 2, 1, 8, 8, packed=(0, 9, 29), causal=False)),
    Case("diff_attention", "window", differential(1, 80, 80, 2, 2, 16, 16, window=13), float32=LAM),
    Case("diff_attention", "causal-long", differential(1, 150, 150, 1, 1, 8, 16), float32=LAM),
    Case(
        "diff_attention", "shared-keys", differential(2, 20, 20, 2, 1, 24, 24, lam_per_head=True), float32=LAM
    ),
    Case("diff_attention", "blind", differential(1, 21, 7, 1, 1, 16, 16), float32=LAM),
    Case("diff_attention", "causal", differential(2, 37, 37, 4, 4, 8, 16), float32=LAM, interpreted=False),
    Case(
        "diff_attention",
        "grouped",
        differential(1, 70, 70, 6, 2, 24, 24, lam_per_head=True),
        float32=LAM,
        interpreted=False,
    ),
    Case("diff_attention", "not-causal", differential(2, 19, 33, 2, 1, 13, 21, causal=False), float32=LAM),
    Case(
        "diff_attention",
        "fewer-queries",
        differential(2, 7, 21, 4, 2, 16, 32, scale=0.3),
        float32=LAM,
        interpreted=False,
    ),
    Case(
        "diff_attention", "more-queries", differential(2, 21, 7, 4, 2, 16, 16), float32=LAM, interpreted=False
    ),
    Case(
        "diff_attention",
        "one-query",
        differential(2, 1, 140, 4, 2, 8, 16, lam_per_head=True),
        float32=LAM,
        interpreted=False,
    ),
    Case("diff_attention", "two-tokens", differential(2, 2, 2, 4, 2, 8, 16), float32=LAM, interpreted=False),
    Case("diff_attention", "no-token", differential(2, 0, 0, 4, 2, 8, 16), float32=LAM),
    Case("attention_decode", "lengths", decode(4, 2, 16, 16, 40, [40, 7, 1])),
    Case("attention_decode", "empty", decode(4, 4, 16, 16, 9, [0, 9])),
    Case("attention_decode", "window", decode(6, 2, 24, 24, 70, [70, 33, 4], window=9)),
    Case("attention_decode", "odd-widths", decode(3, 1, 13, 21, 50, [50, 49], scale=0.4)),
    Case("attention_decode", "wide", decode(8, 2, 24, 1100, 12, [12, 3])),
    Case("attention_decode", "wider", decode(2, 2, 8, 2100, 5, [5])),
    Case("attention_decode", "no-capacity", decode(2, 1, 8, 8, 0, [0])),
    Case("attention_decode", "no-batch", decode(2, 1, 8, 8, 5, [])),
]
