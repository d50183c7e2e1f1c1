"""Differential attention in Triton, (softmax(q1 k1) - lam softmax(q2 k2)) v, both softmaxes in one pass.

Forward: as :mod:`star_kernels.attention.triton`, with two running softmaxes and two sums over one reading of
the values; only their difference is stored, and the log2-sums of both.

Backward, with p1, p2 recomputed and dp = dy · v, which both softmaxes share:

    delta2_i = Σ_j p2_ij dp_ij        delta1_i = dy_i · y_i + lam delta2_i
    ds1 = p1 (dp - delta1)            ds2 = -lam p2 (dp - delta2)
    dq1_i = scale Σ_j ds1_ij k1_j     dk1_j = scale Σ_i ds1_ij q1_i     (and so for 2)
    dv_j = Σ_i (p1_ij - lam p2_ij) dy_i                                 dlam = - Σ_i delta2_i

The second output alone, which delta2 would be an inner product with, was never stored: the kernel over
blocks of queries finds delta2 by a walk over the keys of its own. dv is one product of the difference of the
weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.attention import fused
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
from star_kernels.compiled import like
from star_kernels.launch import Kernel, Operator, rows

_LENGTHS = ("query_count", "key_count", "heads", "group", "behind", "ahead")


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(
    q1, k1, q2, k2, v, lam, y, log_sums,
    batches, query_count, key_count, heads, group, behind, ahead, slope, lam_stride,
    q1_batch, q1_row, q1_head, k1_batch, k1_row, k1_head,
    q2_batch, q2_row, q2_head, k2_batch, k2_row, k2_head, v_batch, v_row, v_head,
    LEADING: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    DESCRIBED: tl.constexpr = ALIGNED and LOADS == 2
    blocks = tl.cdiv(query_count, QUERIES)
    pair = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # the last queries see most
    head = (pair % heads).to(tl.int64)
    batch = (pair // heads).to(tl.int64)
    key_head = head // group

    q1 += batch * q1_batch + head * q1_head
    q2 += batch * q2_batch + head * q2_head
    k1 += batch * k1_batch + key_head * k1_head
    k2 += batch * k2_batch + key_head * k2_head
    v += batch * v_batch + key_head * v_head
    q1_tile = tile(q1, first, query_count, q1_row, DIM, QUERIES, WIDTH, OPERAND, False)
    q2_tile = tile(q2, first, query_count, q2_row, DIM, QUERIES, WIDTH, OPERAND, False)
    k1_rows = row_source(k1, key_count, k1_row, DIM, KEYS, WIDTH, DESCRIBED)
    k2_rows = row_source(k2, key_count, k2_row, DIM, KEYS, WIDTH, DESCRIBED)
    v_rows = row_source(v, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, DESCRIBED)

    sums1 = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    sums2 = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    total1 = tl.zeros([QUERIES], tl.float32)
    total2 = tl.zeros([QUERIES], tl.float32)
    peak1 = tl.full([QUERIES], float("-inf"), tl.float32)
    peak2 = tl.full([QUERIES], float("-inf"), tl.float32)
    begin, full, trailing, end = phases(
        first, query_count, key_count, behind, ahead, None, LEADING, QUERIES, KEYS
    )
    for start in range(begin, end, KEYS):
        masked = (start < full) | (start >= trailing)
        v_tile = tile(v_rows, start, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, OPERAND, DESCRIBED)
        k1_tile = tile(k1_rows, start, key_count, k1_row, DIM, KEYS, WIDTH, OPERAND, DESCRIBED)
        x = products(q1_tile, k1_tile, 0.0, False)
        if masked:
            seen = visible_pairs(first, start, query_count, key_count, behind, ahead, None, QUERIES, KEYS)
            x = tl.where(seen, x, float("-inf"))
        weights, factor, total1, peak1 = accumulate(total1, peak1, x, slope)
        sums1 = tl.dot(weights.to(OPERAND), v_tile, sums1 * factor[:, None], input_precision="ieee")

        k2_tile = tile(k2_rows, start, key_count, k2_row, DIM, KEYS, WIDTH, OPERAND, DESCRIBED)
        x = products(q2_tile, k2_tile, 0.0, False)
        if masked:
            seen = visible_pairs(first, start, query_count, key_count, behind, ahead, None, QUERIES, KEYS)
            x = tl.where(seen, x, float("-inf"))
        weights, factor, total2, peak2 = accumulate(total2, peak2, x, slope)
        sums2 = tl.dot(weights.to(OPERAND), v_tile, sums2 * factor[:, None], input_precision="ieee")

    inverse1, log_total1 = finish(total1, peak1)
    inverse2, log_total2 = finish(total2, peak2)
    inverse2 *= tl.load(lam + head * lam_stride).to(tl.float32)
    sums = sums1 * inverse1[:, None] - sums2 * inverse2[:, None]
    y += (batch * query_count * heads + head) * VALUE_DIM
    put_tile(y, sums, first, query_count, heads * VALUE_DIM, VALUE_DIM, QUERIES, VALUE_WIDTH)
    row = first + tl.arange(0, QUERIES)
    log_sums += (batch * heads + head) * query_count
    tl.store(log_sums + row, log_total1, row < query_count)
    log_sums += tl.cast(heads, tl.int64) * batches * query_count
    tl.store(log_sums + row, log_total2, row < query_count)


@triton.jit(do_not_specialize=_LENGTHS)
def _query_gradients(
    q1, k1, q2, k2, v, lam, y, dy, log_sums, deltas, dq1, dq2,
    batches, query_count, key_count, heads, group, behind, ahead, slope, scale, lam_stride,
    q1_batch, q1_row, q1_head, k1_batch, k1_row, k1_head,
    q2_batch, q2_row, q2_head, k2_batch, k2_row, k2_head, v_batch, v_row, v_head, dy_batch, dy_row, dy_head,
    LEADING: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    DESCRIBED: tl.constexpr = ALIGNED and LOADS == 2
    blocks = tl.cdiv(query_count, QUERIES)
    pair = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    head = (pair % heads).to(tl.int64)
    batch = (pair // heads).to(tl.int64)
    key_head = head // group
    weight = tl.load(lam + head * lam_stride).to(tl.float32)

    q1 += batch * q1_batch + head * q1_head
    q2 += batch * q2_batch + head * q2_head
    k1 += batch * k1_batch + key_head * k1_head
    k2 += batch * k2_batch + key_head * k2_head
    v += batch * v_batch + key_head * v_head
    dy += batch * dy_batch + head * dy_head
    y += (batch * query_count * heads + head) * VALUE_DIM
    dq1 += (batch * query_count * heads + head) * DIM
    dq2 += (batch * query_count * heads + head) * DIM
    q1_tile = tile(q1, first, query_count, q1_row, DIM, QUERIES, WIDTH, OPERAND, False)
    q2_tile = tile(q2, first, query_count, q2_row, DIM, QUERIES, WIDTH, OPERAND, False)
    dy_tile = tile(dy, first, query_count, dy_row, VALUE_DIM, QUERIES, VALUE_WIDTH, OPERAND, False)
    k1_rows = row_source(k1, key_count, k1_row, DIM, KEYS, WIDTH, DESCRIBED)
    k2_rows = row_source(k2, key_count, k2_row, DIM, KEYS, WIDTH, DESCRIBED)
    v_rows = row_source(v, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, DESCRIBED)
    row = first + tl.arange(0, QUERIES)
    line = (batch * heads + head) * query_count
    second = tl.cast(heads, tl.int64) * batches * query_count
    log_total1 = tl.load(log_sums + line + row, row < query_count, other=float("inf"))
    log_total2 = tl.load(log_sums + line + second + row, row < query_count, other=float("inf"))

    begin, full, trailing, end = phases(
        first, query_count, key_count, behind, ahead, None, LEADING, QUERIES, KEYS
    )
    delta2 = tl.zeros([QUERIES], tl.float32)
    for start in range(begin, end, KEYS):
        v_tile = tile(v_rows, start, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, OPERAND, DESCRIBED)
        k2_tile = tile(k2_rows, start, key_count, k2_row, DIM, KEYS, WIDTH, OPERAND, DESCRIBED)
        weights = tl.exp2(products(q2_tile, k2_tile, 0.0, False) * slope - log_total2[:, None])
        if (start < full) | (start >= trailing):
            seen = visible_pairs(first, start, query_count, key_count, behind, ahead, None, QUERIES, KEYS)
            weights = tl.where(seen, weights, 0.0)
        delta2 += tl.sum(weights * tl.dot(dy_tile, tl.trans(v_tile), input_precision="ieee"), 1)
    y_tile = tile(
        y, first, query_count, heads * VALUE_DIM, VALUE_DIM, QUERIES, VALUE_WIDTH, tl.float32, False
    )
    delta1 = tl.sum(y_tile * dy_tile.to(tl.float32), 1) + weight * delta2
    tl.store(deltas + line + row, delta1, row < query_count)
    tl.store(deltas + line + second + row, delta2, row < query_count)

    sums1 = tl.zeros([QUERIES, WIDTH], tl.float32)
    sums2 = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(begin, end, KEYS):
        masked = (start < full) | (start >= trailing)
        v_tile = tile(v_rows, start, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, OPERAND, DESCRIBED)
        dp = tl.dot(dy_tile, tl.trans(v_tile), input_precision="ieee")
        k1_tile = tile(k1_rows, start, key_count, k1_row, DIM, KEYS, WIDTH, OPERAND, DESCRIBED)
        weights = tl.exp2(products(q1_tile, k1_tile, 0.0, False) * slope - log_total1[:, None])
        if masked:
            seen = visible_pairs(first, start, query_count, key_count, behind, ahead, None, QUERIES, KEYS)
            weights = tl.where(seen, weights, 0.0)
        ds = weights * (dp - delta1[:, None])
        sums1 = tl.dot(ds.to(OPERAND), k1_tile, sums1, input_precision="ieee")

        k2_tile = tile(k2_rows, start, key_count, k2_row, DIM, KEYS, WIDTH, OPERAND, DESCRIBED)
        weights = tl.exp2(products(q2_tile, k2_tile, 0.0, False) * slope - log_total2[:, None])
        if masked:
            seen = visible_pairs(first, start, query_count, key_count, behind, ahead, None, QUERIES, KEYS)
            weights = tl.where(seen, weights, 0.0)
        ds = weights * (dp - delta2[:, None])
        sums2 = tl.dot(ds.to(OPERAND), k2_tile, sums2, input_precision="ieee")
    put_tile(dq1, sums1 * scale, first, query_count, heads * DIM, DIM, QUERIES, WIDTH)
    put_tile(dq2, sums2 * (-weight * scale), first, query_count, heads * DIM, DIM, QUERIES, WIDTH)


@triton.jit(do_not_specialize=_LENGTHS)
def _key_gradients(
    q1, k1, q2, k2, v, lam, dy, log_sums, deltas, dk1, dk2, dv,
    batches, query_count, key_count, heads, group, behind, ahead, slope, scale, lam_stride,
    q1_batch, q1_row, q1_head, k1_batch, k1_row, k1_head,
    q2_batch, q2_row, q2_head, k2_batch, k2_row, k2_head, v_batch, v_row, v_head, dy_batch, dy_row, dy_head,
    SUMMED: tl.constexpr, LEADING: tl.constexpr, ALIGNED: tl.constexpr, OPERAND: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """dk1, dk2 and dv (B, Lk, heads / SUMMED, D): of one block of keys, summed over SUMMED query heads."""
    DESCRIBED: tl.constexpr = ALIGNED and LOADS == 2
    blocks = tl.cdiv(key_count, KEYS)
    first = (tl.program_id(0) % blocks) * KEYS  # under causal order the first keys are seen most
    pair = tl.program_id(0) // blocks
    parts = heads // SUMMED
    part = (pair % parts).to(tl.int64)
    batch = (pair // parts).to(tl.int64)
    key_head = part * SUMMED // group
    second = tl.cast(heads, tl.int64) * batches * query_count

    k1 += batch * k1_batch + key_head * k1_head
    k2 += batch * k2_batch + key_head * k2_head
    v += batch * v_batch + key_head * v_head
    k1_tile = tile(k1, first, key_count, k1_row, DIM, KEYS, WIDTH, OPERAND, False)
    k2_tile = tile(k2, first, key_count, k2_row, DIM, KEYS, WIDTH, OPERAND, False)
    v_tile = tile(v, first, key_count, v_row, VALUE_DIM, KEYS, VALUE_WIDTH, OPERAND, False)
    dk1_sums = tl.zeros([KEYS, WIDTH], tl.float32)
    dk2_sums = tl.zeros([KEYS, WIDTH], tl.float32)
    dv_sums = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)
    begin, full, trailing, end = phases(
        first, key_count, query_count, ahead, behind, None, LEADING, KEYS, QUERIES
    )
    for number in range(SUMMED):
        head = part * SUMMED + number
        weight = tl.load(lam + head * lam_stride).to(tl.float32)
        line = (batch * heads + head) * query_count
        q1_rows = row_source(
            q1 + batch * q1_batch + head * q1_head, query_count, q1_row, DIM, QUERIES, WIDTH, DESCRIBED
        )
        q2_rows = row_source(
            q2 + batch * q2_batch + head * q2_head, query_count, q2_row, DIM, QUERIES, WIDTH, DESCRIBED
        )
        dy_rows = row_source(
            dy + batch * dy_batch + head * dy_head,
            query_count, dy_row, VALUE_DIM, QUERIES, VALUE_WIDTH, DESCRIBED,
        )  # fmt: skip
        for start in range(begin, end, QUERIES):
            masked = (start < full) | (start >= trailing)
            query = start + tl.arange(0, QUERIES)
            inside = query < query_count
            log_total1 = tl.load(log_sums + line + query, inside, other=float("inf"))
            log_total2 = tl.load(log_sums + line + second + query, inside, other=float("inf"))
            delta1 = tl.load(deltas + line + query, inside, other=0.0)
            delta2 = tl.load(deltas + line + second + query, inside, other=0.0)
            # Scores stand transposed, (keys, queries), as the products that use them take them.
            q1_tile = tile(q1_rows, start, query_count, q1_row, DIM, QUERIES, WIDTH, OPERAND, DESCRIBED)
            weights1 = tl.exp2(products(k1_tile, q1_tile, 0.0, False) * slope - log_total1[None, :])
            q2_tile = tile(q2_rows, start, query_count, q2_row, DIM, QUERIES, WIDTH, OPERAND, DESCRIBED)
            weights2 = tl.exp2(products(k2_tile, q2_tile, 0.0, False) * slope - log_total2[None, :]) * weight
            if masked:
                seen = visible_pairs(first, start, key_count, query_count, ahead, behind, None, KEYS, QUERIES)
                weights1 = tl.where(seen, weights1, 0.0)
                weights2 = tl.where(seen, weights2, 0.0)
            dy_tile = tile(
                dy_rows, start, query_count, dy_row, VALUE_DIM, QUERIES, VALUE_WIDTH, OPERAND, DESCRIBED
            )
            dv_sums = tl.dot((weights1 - weights2).to(OPERAND), dy_tile, dv_sums, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(dy_tile), input_precision="ieee")
            ds = weights1 * (dp - delta1[None, :])
            dk1_sums = tl.dot(ds.to(OPERAND), q1_tile, dk1_sums, input_precision="ieee")
            ds = weights2 * (delta2[None, :] - dp)
            dk2_sums = tl.dot(ds.to(OPERAND), q2_tile, dk2_sums, input_precision="ieee")
    place = batch * key_count * parts + part
    put_tile(dk1 + place * DIM, dk1_sums * scale, first, key_count, parts * DIM, DIM, KEYS, WIDTH)
    put_tile(dk2 + place * DIM, dk2_sums * scale, first, key_count, parts * DIM, DIM, KEYS, WIDTH)
    put_tile(
        dv + place * VALUE_DIM, dv_sums, first, key_count, parts * VALUE_DIM, VALUE_DIM, KEYS, VALUE_WIDTH
    )


# What any device runs (in float32, products take far more registers).
_SAFE_FORWARD = {
    2: (
        (64, blocks_of(64, 32, 1, 4, 2)),
        (128, blocks_of(64, 32, 1, 8, 2)),
        (256, blocks_of(32, 16, 1, 8, 2)),
    ),
    4: ((64, blocks_of(32, 32, 1, 8, 2)), (128, blocks_of(16, 16, 1, 8, 2))),
}
_SAFE_QUERIES = {
    2: (
        (64, blocks_of(64, 32, 1, 4, 2)),
        (128, blocks_of(32, 32, 1, 4, 2)),
        (256, blocks_of(16, 16, 1, 4, 2)),
    ),
    4: ((64, blocks_of(32, 16, 1, 8, 2)), (128, blocks_of(16, 16, 1, 8, 2))),
}
_SAFE_KEYS = {
    2: (
        (64, blocks_of(32, 64, 1, 4, 2)),
        (128, blocks_of(16, 32, 1, 8, 2)),
        (256, blocks_of(16, 16, 1, 4, 2)),
    ),
    4: ((64, blocks_of(16, 32, 1, 8, 2)), (128, blocks_of(16, 16, 1, 8, 2))),
}
FORWARD = Kernel(
    "diff_attention_forward",
    _forward,
    (
        _SAFE_FORWARD[2][0][1],
        blocks_of(128, 64, 1, 8, 2),
        blocks_of(128, 64, 2, 8, 2),
        blocks_of(128, 128, 2, 8, 2),
        blocks_of(64, 64, 2, 4, 2),
        blocks_of(128, 32, 2, 8, 3),
    ),
    shape=label,
    choose=by_width(_SAFE_FORWARD),
)
QUERY_GRADIENTS = Kernel(
    "diff_attention_backward_queries",
    _query_gradients,
    (
        _SAFE_QUERIES[2][0][1],
        blocks_of(128, 64, 1, 8, 2),
        blocks_of(128, 64, 2, 8, 2),
        blocks_of(64, 64, 2, 4, 2),
        blocks_of(128, 32, 2, 8, 2),
    ),
    shape=label,
    choose=by_width(_SAFE_QUERIES),
)
KEY_GRADIENTS = Kernel(
    "diff_attention_backward_keys",
    _key_gradients,
    (
        _SAFE_KEYS[2][0][1],
        blocks_of(32, 64, 1, 8, 2),
        blocks_of(32, 128, 2, 8, 2),
        blocks_of(64, 128, 2, 8, 2),
        blocks_of(64, 64, 2, 8, 2),
        blocks_of(32, 64, 2, 4, 2),
        blocks_of(16, 64, 2, 8, 2),
    ),
    shape=label,
    choose=by_width(_SAFE_KEYS),
)


def _settings(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, causal: bool, window: int, scale: float
) -> dict[str, Any]:
    """What the three kernels have in common but the tensors and their strides."""
    visible = visibility(q.shape[1], k.shape[1], causal, window, None)
    del visible["bounds"]
    return {
        **visible,
        **precision(q),
        "batches": q.shape[0],
        "heads": q.shape[2],
        "group": max(1, q.shape[2] // max(1, k.shape[2])),
        "slope": LOG2_E * scale,
        "lam": lam,
        "lam_stride": lam.stride(0) if lam.dim() else 0,
        "DIM": q.shape[3],
        "VALUE_DIM": v.shape[3],
        "WIDTH": padded(q.shape[3]),
        "VALUE_WIDTH": padded(v.shape[3]),
    }


def _diff_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y, and the log2-sums of both softmaxes, (2, B, H, Lq)."""
    q1, k1, q2, k2, v = (rows(tensor) for tensor in (q1, k1, q2, k2, v))
    batch, queries, heads, _ = q1.shape
    y = q1.new_empty(batch, queries, heads, v.shape[3])
    log_sums = q1.new_empty(2, batch, heads, queries, dtype=torch.float32)
    q1, size, _ = positive(q1, scale)
    q2, size, _ = positive(q2, scale)
    allow_descriptors()
    FORWARD.launch(
        query_grid(batch, heads, queries),
        q1=q1, k1=k1, q2=q2, k2=k2, v=v, y=y, log_sums=log_sums,
        LEADING=window > 0, ALIGNED=described(k1, k2, v),
        **_settings(q1, k1, v, lam, causal, window, size), **strides(q1=q1, k1=k1, q2=q2, k2=k2, v=v),
    )  # fmt: skip
    return y, log_sums


def _diff_attention_backward(
    dy: Tensor,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    y: Tensor,
    log_sums: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """The gradients of q1, k1, q2, k2, v, and, for each head, of lam."""
    dy, q1, k1, q2, k2, v = (rows(tensor) for tensor in (dy, q1, k1, q2, k2, v))
    batch, queries, heads, _ = q1.shape
    keys, key_heads = k1.shape[1:3]
    parts = key_parts(batch, heads, key_heads, keys)
    wide = k1.dtype if parts == key_heads else torch.float32
    dq1, dq2 = (torch.empty_like(q1, memory_format=torch.contiguous_format) for _ in range(2))
    dk1, dk2, dv = (k1.new_empty(batch, keys, parts, like.shape[3], dtype=wide) for like in (k1, k2, v))
    deltas = torch.empty_like(log_sums)
    q1, size, sign = positive(q1, scale)
    q2, size, sign = positive(q2, scale)
    settings = {
        **_settings(q1, k1, v, lam, causal, window, size),
        **strides(q1=q1, k1=k1, q2=q2, k2=k2, v=v, dy=dy),
        "q1": q1, "k1": k1, "q2": q2, "k2": k2, "v": v, "dy": dy, "log_sums": log_sums, "deltas": deltas,
        "scale": size,
    }  # fmt: skip
    allow_descriptors()
    QUERY_GRADIENTS.launch(
        query_grid(batch, heads, queries),
        **settings, y=y, dq1=dq1, dq2=dq2, LEADING=window > 0, ALIGNED=described(k1, k2, v),
    )  # fmt: skip
    KEY_GRADIENTS.launch(
        key_grid(batch, parts, keys),
        **settings, dk1=dk1, dk2=dk2, dv=dv, SUMMED=heads // parts,
        LEADING=window > 0 or causal, ALIGNED=described(q1, q2, dy),
    )  # fmt: skip
    dlam = -deltas[1].sum(dim=(0, 2))
    dq1, dq2 = (dq if sign == 1.0 else dq * sign for dq in (dq1, dq2))
    dk1, dk2, dv = (summed(gradient, key_heads, v) for gradient in (dk1, dk2, dv))
    return dq1, dk1, dq2, dk2, dv, dlam


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]


def _autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    lam = ctx.saved_tensors[5]
    *gradients, dlam = BACKWARD_OPERATOR(dy, *ctx.saved_tensors, *ctx.settings)
    dlam = dlam if lam.dim() else dlam.sum()
    return *gradients, like(dlam, lam), *(None for _ in ctx.settings)


_TENSORS = "Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, Tensor lam"
_SETTINGS = "bool causal, SymInt window, float scale"
BACKWARD_OPERATOR = Operator(
    "diff_attention_backward",
    f"(Tensor dy, {_TENSORS}, Tensor y, Tensor log_sums, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _diff_attention_backward,
)
OPERATOR = Operator("diff_attention", f"({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)", _diff_attention)
OPERATOR.differentiate(_autograd, _setup, partner=BACKWARD_OPERATOR)


def diff_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """See :func:`star_kernels.diff_attention`; heads over 512 bytes take the form "torch"."""
    if too_wide(q1, v):
        return fused.diff_attention(q1, k1, q2, k2, v, lam, causal=causal, window=window, scale=scale)
    scale = float(q1.shape[-1]) ** -0.5 if scale is None else float(scale)
    y: Tensor = OPERATOR(q1, k1, q2, k2, v, lam, causal, window or 0, scale)[0]
    return y


OPERATOR.register(diff_attention)
