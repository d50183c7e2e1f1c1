"""Softmax attention in Triton: blocks of queries against blocks of keys, no matrix of scores in memory.

Forward (FlashAttention-2, arXiv 2307.08691): a program holds a block of queries and streams the key blocks
they see through a running softmax in powers of two, scores prescaled by log2 e; it stores y and, for
backward, the log2 of each row's sum. Which blocks are streamed, and which of them need a mask,
:mod:`star_kernels.attention.triton_blocks` says.

Backward (arXiv 2205.14135, section B.4), with p = exp2(score - log-sum) and dp = dy · v:

    delta_i = Σ_j p_ij dp_ij = dy_i · y_i
    ds_ij   = p_ij (dp_ij - delta_i),  times 1 - t² under a soft cap, t being the tanh
    dq_i = scale Σ_j ds_ij k_j        dk_j = scale Σ_i ds_ij q_i        dv_j = Σ_i p_ij dy_i

in two kernels without atomics: dq (and delta) over blocks of queries, dk and dv over blocks of keys. The
query heads that share a key head are summed in one program, or, where that would leave the GPU idle, in
partial sums that are added afterwards, always in the same order.

Long blocks come first in the grid, and the blocks of one head come together, so that its keys and values are
read from the L2 cache. Configurations with LOADS 2 read keys and values (in backward: queries and dy) by
tensor descriptors, which the TMA unit of sm_90 and later serves; other devices compile them to pointers.

Heads of more than 512 bytes (256 wide in half precision) take the form "torch".
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.attention import fused
from star_kernels.attention import triton_diff as triton_diff
from star_kernels.attention.triton_blocks import (
    LOG2_E,
    accumulate,
    allow_descriptors,
    blocks_of,
    by_width,
    described,
    finish,
    key_grid,
    key_parts,
    label,
    padded,
    phases,
    positive,
    precision,
    products,
    put_tile,
    query_grid,
    row_source,
    strides,
    summed,
    tile,
    too_wide,
    visibility,
    visible_pairs,
)
from star_kernels.launch import Kernel, Operator, rows

_LENGTHS = ("query_count", "key_count", "heads", "group", "behind", "ahead")


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(
    q, k, v, y, log_sum, bounds,
    query_count, key_count, heads, group, behind, ahead, inner, slope,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    CAPPED: tl.constexpr, LEADING: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    DESCRIBED: tl.constexpr = ALIGNED and LOADS == 2
    blocks = tl.cdiv(query_count, QUERIES)
    pair = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # the last queries see most
    head = pair % heads
    batch = (pair // heads).to(tl.int64)
    key_head = (head // group).to(tl.int64)

    q += batch * q_batch + head.to(tl.int64) * q_head
    k += batch * k_batch + key_head * k_head
    v += batch * v_batch + key_head * v_head
    q_tile = tile(q, first, query_count, q_row, DIM, QUERIES, WIDTH, OPERAND, False)
    k_rows = row_source(k, key_count, k_row, DIM, KEYS, WIDTH, DESCRIBED)
    v_rows = row_source(v, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, DESCRIBED)

    begin, full, trailing, end = phases(
        first, query_count, key_count, behind, ahead, bounds, LEADING, QUERIES, KEYS
    )
    sums = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    for start in range(begin, end, KEYS):
        k_tile = tile(k_rows, start, key_count, k_row, DIM, KEYS, WIDTH, OPERAND, DESCRIBED)
        x = products(q_tile, k_tile, inner, CAPPED)
        if (start < full) | (start >= trailing):
            x = tl.where(
                visible_pairs(first, start, query_count, key_count, behind, ahead, bounds, QUERIES, KEYS),
                x,
                float("-inf"),
            )
        weights, factor, total, peak = accumulate(total, peak, x, slope)
        v_tile = tile(v_rows, start, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, OPERAND, DESCRIBED)
        sums = tl.dot(weights.to(OPERAND), v_tile, sums * factor[:, None], input_precision="ieee")

    inverse, log_total = finish(total, peak)
    y += (batch * query_count * heads + head) * VALUE_DIM
    put_tile(
        y, sums * inverse[:, None], first, query_count, heads * VALUE_DIM, VALUE_DIM, QUERIES, VALUE_WIDTH
    )
    row = first + tl.arange(0, QUERIES)
    tl.store(log_sum + (batch * heads + head) * query_count + row, log_total, row < query_count)


@triton.jit(do_not_specialize=_LENGTHS)
def _query_gradient(
    q, k, v, y, dy, log_sum, delta, dq, bounds,
    query_count, key_count, heads, group, behind, ahead, inner, slope, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dy_batch, dy_row, dy_head,
    CAPPED: tl.constexpr, LEADING: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    DESCRIBED: tl.constexpr = ALIGNED and LOADS == 2
    blocks = tl.cdiv(query_count, QUERIES)
    pair = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    head = pair % heads
    batch = (pair // heads).to(tl.int64)
    key_head = (head // group).to(tl.int64)

    q += batch * q_batch + head.to(tl.int64) * q_head
    k += batch * k_batch + key_head * k_head
    v += batch * v_batch + key_head * v_head
    dy += batch * dy_batch + head.to(tl.int64) * dy_head
    y += (batch * query_count * heads + head) * VALUE_DIM
    dq += (batch * query_count * heads + head) * DIM
    q_tile = tile(q, first, query_count, q_row, DIM, QUERIES, WIDTH, OPERAND, False)
    dy_tile = tile(dy, first, query_count, dy_row, VALUE_DIM, QUERIES, VALUE_WIDTH, OPERAND, False)
    y_tile = tile(
        y, first, query_count, heads * VALUE_DIM, VALUE_DIM, QUERIES, VALUE_WIDTH, tl.float32, False
    )
    row = first + tl.arange(0, QUERIES)
    statistics = (batch * heads + head) * query_count + row
    log_total = tl.load(log_sum + statistics, row < query_count, other=float("inf"))
    inner_product = tl.sum(y_tile * dy_tile.to(tl.float32), 1)
    tl.store(delta + statistics, inner_product, row < query_count)

    k_rows = row_source(k, key_count, k_row, DIM, KEYS, WIDTH, DESCRIBED)
    v_rows = row_source(v, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, DESCRIBED)
    begin, full, trailing, end = phases(
        first, query_count, key_count, behind, ahead, bounds, LEADING, QUERIES, KEYS
    )
    sums = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(begin, end, KEYS):
        k_tile = tile(k_rows, start, key_count, k_row, DIM, KEYS, WIDTH, OPERAND, DESCRIBED)
        v_tile = tile(v_rows, start, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, OPERAND, DESCRIBED)
        x = products(q_tile, k_tile, inner, CAPPED)
        weights = tl.exp2(x * slope - log_total[:, None])
        if (start < full) | (start >= trailing):
            weights = tl.where(
                visible_pairs(first, start, query_count, key_count, behind, ahead, bounds, QUERIES, KEYS),
                weights,
                0.0,
            )
        dp = tl.dot(dy_tile, tl.trans(v_tile), input_precision="ieee")
        ds = weights * (dp - inner_product[:, None])
        if CAPPED:
            ds *= 1.0 - x * x
        sums = tl.dot(ds.to(OPERAND), k_tile, sums, input_precision="ieee")
    put_tile(dq, sums * scale, first, query_count, heads * DIM, DIM, QUERIES, WIDTH)


@triton.jit(do_not_specialize=_LENGTHS)
def _key_gradients(
    q, k, v, dy, log_sum, delta, dk, dv, bounds,
    query_count, key_count, heads, group, behind, ahead, inner, slope, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dy_batch, dy_row, dy_head,
    SUMMED: tl.constexpr,
    CAPPED: tl.constexpr, LEADING: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, Lk, heads / SUMMED, D): of one block of keys, summed over SUMMED query heads."""
    DESCRIBED: tl.constexpr = ALIGNED and LOADS == 2
    blocks = tl.cdiv(key_count, KEYS)
    first = (tl.program_id(0) % blocks) * KEYS  # under causal order the first keys are seen most
    pair = tl.program_id(0) // blocks
    parts = heads // SUMMED
    part = pair % parts
    batch = (pair // parts).to(tl.int64)
    key_head = (part * SUMMED // group).to(tl.int64)

    k += batch * k_batch + key_head * k_head
    v += batch * v_batch + key_head * v_head
    k_tile = tile(k, first, key_count, k_row, DIM, KEYS, WIDTH, OPERAND, False)
    v_tile = tile(v, first, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, OPERAND, False)
    begin, full, trailing, end = phases(
        first, key_count, query_count, ahead, behind, bounds, LEADING, KEYS, QUERIES
    )
    dk_sums = tl.zeros([KEYS, WIDTH], tl.float32)
    dv_sums = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)
    for number in range(SUMMED):
        head = part * SUMMED + number
        line = batch * heads + head
        q_rows = row_source(
            q + batch * q_batch + tl.cast(q_head, tl.int64) * head,
            query_count, q_row, DIM, QUERIES, WIDTH, DESCRIBED,
        )  # fmt: skip
        dy_rows = row_source(
            dy + batch * dy_batch + tl.cast(dy_head, tl.int64) * head,
            query_count, dy_row, VALUE_DIM, QUERIES, VALUE_WIDTH, DESCRIBED,
        )  # fmt: skip
        log_sums = log_sum + line * query_count
        deltas = delta + line * query_count
        for start in range(begin, end, QUERIES):
            q_tile = tile(q_rows, start, query_count, q_row, DIM, QUERIES, WIDTH, OPERAND, DESCRIBED)
            query = start + tl.arange(0, QUERIES)
            log_total = tl.load(log_sums + query, query < query_count, other=float("inf"))
            inner_product = tl.load(deltas + query, query < query_count, other=0.0)
            # Scores stand transposed, (keys, queries), as the products that use them take them.
            x = products(k_tile, q_tile, inner, CAPPED)
            weights = tl.exp2(x * slope - log_total[None, :])
            if (start < full) | (start >= trailing):
                weights = tl.where(
                    visible_pairs(first, start, key_count, query_count, ahead, behind, bounds, KEYS, QUERIES),
                    weights,
                    0.0,
                )
            dy_tile = tile(
                dy_rows, start, query_count, dy_row, VALUE_DIM, QUERIES, VALUE_WIDTH, OPERAND, DESCRIBED
            )
            dv_sums = tl.dot(weights.to(OPERAND), dy_tile, dv_sums, input_precision="ieee")
            ds = weights * (
                tl.dot(v_tile, tl.trans(dy_tile), input_precision="ieee") - inner_product[None, :]
            )
            if CAPPED:
                ds *= 1.0 - x * x
            dk_sums = tl.dot(ds.to(OPERAND), q_tile, dk_sums, input_precision="ieee")
    place = batch * key_count * parts + part
    put_tile(dk + place * DIM, dk_sums * scale, first, key_count, parts * DIM, DIM, KEYS, WIDTH)
    put_tile(
        dv + place * VALUE_DIM, dv_sums, first, key_count, parts * VALUE_DIM, VALUE_DIM, KEYS, VALUE_WIDTH
    )


# --------------------------------------------------------------------------------------------------------
# Configurations


# What any device runs (in float32, products take far more registers).
_SAFE_FORWARD = {
    2: ((128, blocks_of(64, 64, 1, 4, 2)), (256, blocks_of(64, 32, 1, 8, 1))),
    4: ((64, blocks_of(64, 32, 1, 8, 2)), (128, blocks_of(32, 32, 1, 8, 1))),
}
_SAFE_QUERIES = {
    2: (
        (64, blocks_of(64, 64, 1, 4, 2)),
        (128, blocks_of(64, 32, 1, 4, 2)),
        (256, blocks_of(32, 16, 1, 4, 1)),
    ),
    4: ((64, blocks_of(64, 32, 1, 8, 2)), (128, blocks_of(16, 16, 1, 8, 1))),
}
_SAFE_KEYS = {
    2: (
        (64, blocks_of(32, 64, 1, 4, 2)),
        (128, blocks_of(32, 64, 1, 4, 2)),
        (256, blocks_of(16, 32, 1, 4, 1)),
    ),
    4: ((64, blocks_of(32, 64, 1, 8, 2)), (128, blocks_of(16, 32, 1, 8, 1))),
}
FORWARD = Kernel(
    "attention_forward",
    _forward,
    (
        _SAFE_FORWARD[2][0][1],
        blocks_of(128, 64, 1, 8, 3),
        blocks_of(128, 128, 1, 8, 2),
        blocks_of(128, 128, 2, 8, 3),
        blocks_of(128, 128, 2, 8, 2),
        blocks_of(128, 64, 2, 8, 3),
        blocks_of(64, 128, 2, 4, 2),
    ),
    shape=label,
    choose=by_width(_SAFE_FORWARD),
)
QUERY_GRADIENT = Kernel(
    "attention_backward_queries",
    _query_gradient,
    (
        _SAFE_QUERIES[2][0][1],
        blocks_of(128, 64, 1, 8, 2),
        blocks_of(128, 64, 2, 8, 3),
        blocks_of(128, 128, 2, 8, 2),
        blocks_of(64, 64, 2, 4, 3),
    ),
    shape=label,
    choose=by_width(_SAFE_QUERIES),
)
KEY_GRADIENTS = Kernel(
    "attention_backward_keys",
    _key_gradients,
    (
        _SAFE_KEYS[2][0][1],
        blocks_of(64, 128, 1, 8, 2),
        blocks_of(64, 128, 2, 8, 2),
        blocks_of(64, 128, 2, 8, 3),
        blocks_of(32, 128, 2, 8, 3),
        blocks_of(64, 64, 2, 4, 2),
    ),
    shape=label,
    choose=by_width(_SAFE_KEYS),
)


# --------------------------------------------------------------------------------------------------------
# Operators


def _settings(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, softcap: float, packed: Any
) -> dict[str, Any]:
    """What the three kernels have in common but the strides."""
    heads = q.shape[2]
    return {
        **visibility(q.shape[1], k.shape[1], causal, window, packed),
        **precision(q),
        "heads": heads,
        "group": max(1, heads // max(1, k.shape[2])),
        "inner": 2.0 * LOG2_E * scale / softcap if softcap else 0.0,
        "slope": LOG2_E * (softcap or scale),
        "CAPPED": bool(softcap),
        "DIM": q.shape[3],
        "VALUE_DIM": v.shape[3],
        "WIDTH": padded(q.shape[3]),
        "VALUE_WIDTH": padded(v.shape[3]),
    }


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the log2-sums (B, H, Lq)."""
    q, k, v = rows(q), rows(k), rows(v)
    batch, queries, heads, _ = q.shape
    y = q.new_empty(batch, queries, heads, v.shape[3])
    log_sum = q.new_empty(batch, heads, queries, dtype=torch.float32)
    directed, scale, _ = positive(q, scale)
    allow_descriptors()
    FORWARD.launch(
        query_grid(batch, heads, queries),
        q=directed, k=k, v=v, y=y, log_sum=log_sum,
        LEADING=window > 0 or cu_seqlens is not None, ALIGNED=described(k, v),
        **_settings(q, k, v, causal, window, scale, softcap, cu_seqlens),
        **strides(q=directed, k=k, v=v),
    )  # fmt: skip
    return y, log_sum


def _attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    log_sum: Tensor,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, q, k, v = rows(dy), rows(q), rows(k), rows(v)
    batch, queries, heads, _ = q.shape
    keys, key_heads = k.shape[1:3]
    parts = key_parts(batch, heads, key_heads, keys)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = k.dtype if parts == key_heads else torch.float32
    dk = k.new_empty(batch, keys, parts, k.shape[3], dtype=wide)
    dv = v.new_empty(batch, keys, parts, v.shape[3], dtype=wide)
    directed, scale, sign = positive(q, scale)
    settings = {
        **_settings(q, k, v, causal, window, scale, softcap, cu_seqlens),
        **strides(q=directed, k=k, v=v, dy=dy),
        "q": directed, "k": k, "v": v, "dy": dy, "log_sum": log_sum, "delta": torch.empty_like(log_sum),
        "scale": scale,
    }  # fmt: skip
    limited = window > 0 or cu_seqlens is not None
    allow_descriptors()
    QUERY_GRADIENT.launch(
        query_grid(batch, heads, queries),
        **settings, y=y, dq=dq, LEADING=limited, ALIGNED=described(k, v),
    )  # fmt: skip
    KEY_GRADIENTS.launch(
        key_grid(batch, parts, keys),
        **settings, dk=dk, dv=dv, SUMMED=heads // parts,
        LEADING=limited or causal, ALIGNED=described(directed, dy),
    )  # fmt: skip
    return dq if sign == 1.0 else dq * sign, summed(dk, key_heads, k), summed(dv, key_heads, v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, *ctx.settings, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    gradients = BACKWARD_OPERATOR(dy, *tensors, *ctx.settings, cu_seqlens)
    return *gradients, *(None for _ in ctx.settings), None


_SETTINGS = "bool causal, SymInt window, float scale, float softcap, Tensor? cu_seqlens"
BACKWARD_OPERATOR = Operator(
    "attention_backward",
    f"(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor log_sum, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor)",
    _attention_backward,
)
OPERATOR = Operator(
    "attention", f"(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)", _attention
)
OPERATOR.differentiate(_autograd, _setup, partner=BACKWARD_OPERATOR)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """See :func:`star_kernels.attention`; heads over 512 bytes take the form "torch"."""
    if too_wide(q, v):
        return fused.attention(
            q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, cu_seqlens=cu_seqlens
        )
    scale = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    y: Tensor = OPERATOR(q, k, v, causal, window or 0, scale, float(softcap or 0.0), cu_seqlens)[0]
    return y


OPERATOR.register(attention)
