"""Gated linear attention in Triton: chunks in parallel on the tensor cores, states passed between them.

Forward, a chunk with queries Q, keys K, values V and the state S before it (arXiv 2312.06635, equation 6):

    Y = scale (A V + Q' S),   A_ts = q_t·(decay over s+1..t of k_s) for s <= t,   S⁺ = decay S + K'ᵀ V

with Q' decayed from the chunk's start, K' until its end. A pass makes every chunk's S (`pass_states`), a
second one, over all chunks at once, the outputs.

Backward, dS⁺ being the gradient of the state after a chunk and dY carrying the scale:

    dS = decay dS⁺ + Q'ᵀ dY,   dA = tril(dY Vᵀ),   dV = Aᵀ dY + K' dS⁺
    dQ = dA through A + decay (dY Sᵀ),   dK = dAᵀ through A + decay (V dS⁺ᵀ)

The states are computed again, their gradients by the same pass in reverse, and everything else in one pass
over all chunks. A log-decay g_r counts in every pair s < r <= t. Of the pairs that a query or a key forms
with a state, the sums over t >= r and s < r are running sums within a chunk; the pairs of a chunk with itself
are row sums minus column sums of dA ⊙ A; and from the state before to the one after it is decay ⟨S, dS⁺⟩.
Nothing is summed beyond its chunk, where large terms would have to cancel.

With a decay a key dimension, the decays are applied in passes of their own, before (`_prepare`) and after
(`_key_gradients`), to one block of key dimensions at a time; the passes between find A, Q' and K' ready.
See :mod:`star_kernels.recurrence.triton_matrix_states` for how decays are made.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels import dispatch
from star_kernels.compiled import like
from star_kernels.launch import Configuration, Kernel, Operator, cdiv, operand_type, rows
from star_kernels.recurrence.triton_matrix_states import (
    WIDEST_KEY,
    Chunks,
    chunk_size,
    contiguous,
    cut,
    decay_between,
    decay_from_start,
    decay_of_level,
    decay_rows,
    decay_until_end,
    handed_on,
    key_block,
    kind_of,
    label,
    large,
    load_tile,
    load_vector,
    pairs_of_level,
    pass_states,
    place,
    product,
    store_tile,
    strides,
    sum_group,
    widen,
)


@triton.jit
def _prepare(
    q, k, log_decay, pairs, queries, ends, whole,
    count, length, offsets, sequence_of, first_of,
    heads, group, keys,
    q_b, q_l, q_h, k_b, k_l, k_h, g_b, g_l, g_h,
    C: tl.constexpr, LEVELS: tl.constexpr, OPERAND: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A, Q', K' and the decay of a whole chunk, of a chunk with a decay a key dimension."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
    if rows == 0:
        return
    batch, first = batch.to(tl.int64), first.to(tl.int64)
    q += batch * q_b + first * q_l + head // group * q_h
    k += batch * k_b + first * k_l + head // group * k_h
    log_decay += batch * g_b + first * g_l + head * g_h
    slot = chunk * heads + head
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    a = tl.zeros((C, C), tl.float32)
    for block in range(0, keys, KEYS):
        tile_q = load_tile(q, q_l, rows, keys, C, KEYS, block)
        tile_k = load_tile(k, k_l, rows, keys, C, KEYS, block)
        total = load_tile(log_decay, g_l, rows, keys, C, KEYS, block)
        a += tl.where(row == column, tl.sum(tile_q * tile_k, 1)[:, None], 0.0)
        from_start, until_end = total, tl.zeros((C, KEYS), tl.float32)
        for level in range(0, LEVELS):
            size = 1 << level
            decay = decay_of_level(from_start, until_end, size, C)
            product_a = product(tile_q * decay, tl.trans(tile_k * decay), OPERAND)
            a += tl.where(pairs_of_level(size, C), product_a, 0.0)
            from_start, until_end, total = widen(from_start, until_end, total, size, C, KEYS)
        store_tile(queries + slot * C * keys, keys, tile_q * tl.exp(from_start), C, keys, C, KEYS, block)
        store_tile(ends + slot * C * keys, keys, tile_k * tl.exp(until_end), C, keys, C, KEYS, block)
        key = block + tl.arange(0, KEYS)
        tl.store(whole + slot * keys + key, tl.exp(tl.max(total, 0)), key < keys)
    store_tile(pairs + slot * C * C, C, a, C, C, C, C)


@triton.jit
def _outputs(
    q, k, v, log_decay, pairs, queries, states, y,
    count, length, offsets, sequence_of, first_of,
    heads, group, keys, values, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, g_b, g_l, g_h,
    DECAY: tl.constexpr, C: tl.constexpr, OPERAND: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Y of a chunk, VALUES columns of it. Blocks of one chunk are neighbours: they share its q and k."""
    blocks = tl.cdiv(values, VALUES)
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks * VALUES
    head = tl.program_id(1).to(tl.int64)
    batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
    if rows == 0:
        return
    batch, first = batch.to(tl.int64), first.to(tl.int64)
    slot = chunk * heads + head
    if DECAY == "key":
        a = load_tile(pairs + slot * C * C, C, C, C, C, C)
        tile_q = load_tile(queries + slot * C * keys, keys, C, keys, C, KEYS)
    else:
        tile_q = load_tile(q + batch * q_b + first * q_l + head // group * q_h, q_l, rows, keys, C, KEYS)
        tile_k = load_tile(k + batch * k_b + first * k_l + head // group * k_h, k_l, rows, keys, C, KEYS)
        a = product(tile_q, tl.trans(tile_k), OPERAND)
        if DECAY == "head":
            g = log_decay + batch * g_b + first * g_l + head * g_h
            a *= decay_between(load_vector(g, g_l, rows, C, 1), C)
            tile_q *= decay_from_start(g, g_l, rows, C)[:, None]
        else:
            a = tl.where(tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :], a, 0.0)
    state = load_tile(states + slot * keys * values, values, keys, values, KEYS, VALUES, block)
    tile_v = load_tile(v + batch * v_b + first * v_l + head * v_h, v_l, rows, values, C, VALUES, block)
    result = product(tile_q, state, OPERAND) + product(a, tile_v, OPERAND)
    at = y + ((batch * length + first) * heads + head) * values
    store_tile(at, heads * values, result * scale, rows, values, C, VALUES, block)


@triton.jit
def _gradients(
    dy, q, k, v, log_decay, pairs, ends, states, dstates, dq, dk, dv, dg, dpairs, dwhole,
    count, length, offsets, sequence_of, first_of,
    heads, group, keys, values, scale,
    dy_b, dy_l, dy_h, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, g_b, g_l, g_h,
    DECAY: tl.constexpr, C: tl.constexpr, OPERAND: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV and dG of a chunk; with a decay a key, dV and what `_key_gradients` makes the others of.

    That is dA (``dpairs``), dY Sᵀ and V dS⁺ᵀ without decays (``dq``, ``dk``) and ⟨S, dS⁺⟩ (``dwhole``).
    """
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
    if rows == 0:
        return
    batch, first = batch.to(tl.int64), first.to(tl.int64)
    dy += batch * dy_b + first * dy_l + head * dy_h
    v += batch * v_b + first * v_l + head * v_h
    slot = chunk * heads + head
    token = (batch * length + first) * heads + head
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if DECAY == "key":
        a = load_tile(pairs + slot * C * C, C, C, C, C, C)
        tile_ends = load_tile(ends + slot * C * keys, keys, C, keys, C, KEYS)
    else:
        tile_q = load_tile(q + batch * q_b + first * q_l + head // group * q_h, q_l, rows, keys, C, KEYS)
        tile_ends = load_tile(k + batch * k_b + first * k_l + head // group * k_h, k_l, rows, keys, C, KEYS)
        a = product(tile_q, tl.trans(tile_ends), OPERAND)
        if DECAY == "head":
            g = log_decay + batch * g_b + first * g_l + head * g_h
            between = decay_between(load_vector(g, g_l, rows, C, 1), C)
            until_end = decay_until_end(g, g_l, rows, C)[:, None]
            tile_ends *= until_end
        else:
            between = tl.where(row >= column, 1.0, 0.0)
        a *= between
    da = tl.zeros((C, C), tl.float32)
    from_state = tl.zeros((C, KEYS), tl.float32)
    to_state = tl.zeros((C, KEYS), tl.float32)
    through = tl.zeros((KEYS,), tl.float32)
    for block in range(0, values, VALUES):
        tile_dy = load_tile(dy, dy_l, rows, values, C, VALUES, block)
        tile_v = load_tile(v, v_l, rows, values, C, VALUES, block)
        state = load_tile(states + slot * keys * values, values, keys, values, KEYS, VALUES, block)
        dstate = load_tile(dstates + slot * keys * values, values, keys, values, KEYS, VALUES, block)
        da += product(tile_dy, tl.trans(tile_v), OPERAND)
        from_state += product(tile_dy, tl.trans(state), OPERAND)
        to_state += product(tile_v, tl.trans(dstate), OPERAND)
        through += tl.sum(state * dstate, 1)
        tile_dv = product(tl.trans(a), tile_dy, OPERAND) * scale + product(tile_ends, dstate, OPERAND)
        store_tile(dv + token * values, heads * values, tile_dv, rows, values, C, VALUES, block)
    da *= scale
    from_state *= scale
    if DECAY == "key":
        store_tile(dpairs + slot * C * C, C, tl.where(row >= column, da, 0.0), C, C, C, C)
        store_tile(dq + slot * C * keys, keys, from_state, C, keys, C, KEYS)
        store_tile(dk + slot * C * keys, keys, to_state, C, keys, C, KEYS)
        key = tl.arange(0, KEYS)
        tl.store(dwhole + slot * keys + key, through, key < keys)
    else:  # loaded again rather than held in registers
        tile_q = load_tile(q + batch * q_b + first * q_l + head // group * q_h, q_l, rows, keys, C, KEYS)
        tile_k = load_tile(k + batch * k_b + first * k_l + head // group * k_h, k_l, rows, keys, C, KEYS)
        if DECAY == "head":
            from_state *= decay_from_start(g, g_l, rows, C)[:, None]
            to_state *= until_end
            # Row sums minus column sums of dA ⊙ A: the pairs (t, t) have no decay and are left out.
            counted = tl.where(row > column, da * a, 0.0)
            rising = tl.sum(counted, 1) - tl.sum(tl.trans(counted), 1) + tl.sum(from_state * tile_q, 1)
            falling = tl.sum(to_state * tile_k, 1)
            total = tl.sum(load_vector(g, g_l, rows, C), 0)
            slope = tl.cumsum(rising, 0, reverse=True) + tl.cumsum(falling, 0) - falling
            slope += tl.exp(total) * tl.sum(through, 0)
            tl.store(dg + token + tl.arange(0, C) * heads, slope, tl.arange(0, C) < rows)
        da *= between
        tile_dq = from_state + product(da, tile_k, OPERAND)
        tile_dk = to_state + product(tl.trans(da), tile_q, OPERAND)
        store_tile(dq + token * keys, heads * keys, tile_dq, rows, keys, C, KEYS)
        store_tile(dk + token * keys, heads * keys, tile_dk, rows, keys, C, KEYS)


@triton.jit
def _key_gradients(
    q, k, log_decay, dpairs, from_states, to_states, dwhole, dq, dk, dg,
    count, length, offsets, sequence_of, first_of,
    heads, group, keys,
    q_b, q_l, q_h, k_b, k_l, k_h, g_b, g_l, g_h,
    C: tl.constexpr, LEVELS: tl.constexpr, OPERAND: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dG of a chunk and KEYS key dimensions: the decays applied to what `_gradients` left."""
    blocks = tl.cdiv(keys, KEYS)
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks * KEYS
    head = tl.program_id(1).to(tl.int64)
    batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
    if rows == 0:
        return
    batch, first = batch.to(tl.int64), first.to(tl.int64)
    slot = chunk * heads + head
    token = (batch * length + first) * heads + head
    q_at = q + batch * q_b + first * q_l + head // group * q_h
    k_at = k + batch * k_b + first * k_l + head // group * k_h
    tile_q = load_tile(q_at, q_l, rows, keys, C, KEYS, block)
    tile_k = load_tile(k_at, k_l, rows, keys, C, KEYS, block)
    g_at = log_decay + batch * g_b + first * g_l + head * g_h
    total = load_tile(g_at, g_l, rows, keys, C, KEYS, block)
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    dpairs += slot * C * C
    tile_dq = tl.zeros((C, KEYS), tl.float32)
    tile_dk = tl.zeros((C, KEYS), tl.float32)
    from_start, until_end = total, tl.zeros((C, KEYS), tl.float32)
    for level in range(0, LEVELS):
        size = 1 << level
        decay = decay_of_level(from_start, until_end, size, C)
        # Loaded level by level, out of the cache, rather than held in registers.
        da = tl.load(dpairs + row * C + column, pairs_of_level(size, C), other=0.0)
        tile_dq += product(da, tile_k * decay, OPERAND) * decay
        tile_dk += product(tl.trans(da), tile_q * decay, OPERAND) * decay
        from_start, until_end, total = widen(from_start, until_end, total, size, C, KEYS)
    rising = tile_q * tile_dq - tile_k * tile_dk
    from_state = load_tile(from_states + slot * C * keys, keys, C, keys, C, KEYS, block) * tl.exp(from_start)
    rising += tile_q * from_state
    to_state = load_tile(to_states + slot * C * keys, keys, C, keys, C, KEYS, block) * tl.exp(until_end)
    falling = tile_k * to_state
    key = block + tl.arange(0, KEYS)
    through = tl.load(dwhole + slot * keys + key, key < keys, other=0.0) * tl.exp(tl.max(total, 0))
    slope = tl.cumsum(rising, 0, reverse=True) + tl.cumsum(falling, 0) - falling + through[None, :]
    store_tile(dg + token * keys, heads * keys, slope, rows, keys, C, KEYS, block)
    diagonal = tl.load(dpairs + tl.arange(0, C) * (C + 1))[:, None]
    tile_dq += from_state + diagonal * tile_k
    tile_dk += to_state + diagonal * tile_q
    store_tile(dq + token * keys, heads * keys, tile_dq, rows, keys, C, KEYS, block)
    store_tile(dk + token * keys, heads * keys, tile_dk, rows, keys, C, KEYS, block)


PREPARE = Kernel(
    "gated_linear_attention_prepare",
    _prepare,
    (
        Configuration({"KEYS": 32}, num_warps=8, num_stages=1),
        Configuration({"KEYS": 32}, num_warps=4, num_stages=1),
        Configuration({"KEYS": 64}, num_warps=8, num_stages=1),
        Configuration({"KEYS": 16}, num_warps=4, num_stages=1),
    ),
    shape=label,
    choose=lambda arguments: Configuration(
        {"KEYS": 32}, num_warps=8 if large(arguments) else 4, num_stages=1
    ),
)
OUTPUTS = Kernel(
    "gated_linear_attention_outputs",
    _outputs,
    (
        Configuration({"VALUES": 16}, num_warps=4, num_stages=1),
        Configuration({"VALUES": 64}, num_warps=4, num_stages=1),
        Configuration({"VALUES": 32}, num_warps=4, num_stages=1),
        Configuration({"VALUES": 128}, num_warps=8, num_stages=1),
        Configuration({"VALUES": 64}, num_warps=8, num_stages=1),
    ),
    shape=label,
    choose=lambda arguments: Configuration(
        {"VALUES": 16 if large(arguments) else 64}, num_warps=4, num_stages=1
    ),
)
GRADIENTS = Kernel(
    "gated_linear_attention_gradients",
    _gradients,
    (
        Configuration({"VALUES": 16}, num_warps=8, num_stages=1),
        Configuration({"VALUES": 32}, num_warps=8, num_stages=1),
        Configuration({"VALUES": 64}, num_warps=8, num_stages=1),
        Configuration({"VALUES": 32}, num_warps=4, num_stages=1),
        Configuration({"VALUES": 64}, num_warps=4, num_stages=1),
        Configuration({"VALUES": 32}, num_warps=8, num_stages=2),
    ),
    shape=label,
)
KEY_GRADIENTS = Kernel(
    "gated_linear_attention_key_gradients",
    _key_gradients,
    (
        Configuration({"KEYS": 32}, num_warps=8, num_stages=1),
        Configuration({"KEYS": 16}, num_warps=4, num_stages=1),
        Configuration({"KEYS": 32}, num_warps=4, num_stages=1),
        Configuration({"KEYS": 64}, num_warps=8, num_stages=1),
    ),
    shape=label,
)


def _prepared(
    chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """A, Q', K' and the chunks' decays where each key dimension has its own; Nones otherwise."""
    if log_decay is None or log_decay.dim() == 3:
        return None, None, None, None
    heads, keys = v.shape[2], k.shape[3]
    shape, dtype = (chunks.total, heads, chunks.size), handed_on(v.dtype)
    pairs = v.new_empty(*shape, chunks.size, dtype=dtype)
    queries, ends = (v.new_empty(*shape, keys, dtype=dtype) for _ in range(2))
    whole = torch.empty(chunks.total, heads, keys, dtype=torch.float32, device=v.device)
    PREPARE.launch(
        lambda blocks: (chunks.total, heads),
        q=q, k=k, log_decay=log_decay, pairs=pairs, queries=queries, ends=ends, whole=whole,
        **chunks.of_chunks, heads=heads, group=heads // q.shape[2], keys=keys,
        **strides(q=q, k=k, g=log_decay),
        C=chunks.size, LEVELS=chunks.size.bit_length() - 1, OPERAND=operand_type(v.dtype),
    )  # fmt: skip
    return pairs, queries, ends, whole


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    q, k, v, log_decay = rows(q), rows(k), rows(v), decay_rows(log_decay)
    heads, keys, values = v.shape[2], k.shape[3], v.shape[3]
    chunks = cut(v, cu_seqlens, chunk_size(k))
    operand, group = operand_type(v.dtype), heads // q.shape[2]
    pairs, queries, ends, whole = _prepared(chunks, q, k, v, log_decay)
    states, final = pass_states(
        chunks, k if ends is None else ends, v, group=group, log_decay=log_decay, whole=whole,
        initial=contiguous(initial_state), operand=operand,
    )  # fmt: skip
    OUTPUTS.launch(
        lambda blocks: (chunks.total * cdiv(values, blocks["VALUES"]), heads),
        q=q, k=k, v=v, log_decay=log_decay, pairs=pairs, queries=queries, states=states, y=y,
        **chunks.of_chunks, heads=heads, group=group, keys=keys, values=values, scale=scale,
        **strides(q=q, k=k, v=v, g=log_decay),
        DECAY=kind_of(log_decay), C=chunks.size, OPERAND=operand, KEYS=key_block(k),
    )  # fmt: skip
    return y, final


def _attention_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    key_heads, dtype = q.shape[2], q.dtype
    dy, q, k, v, log_decay = rows(dy), rows(q), rows(k), rows(v), decay_rows(log_decay)
    (batch, length, heads, values), keys = v.shape, k.shape[3]
    chunks = cut(v, cu_seqlens, chunk_size(k))
    operand, group, decay = operand_type(v.dtype), heads // key_heads, kind_of(log_decay)
    pairs, queries, ends, whole = _prepared(chunks, q, k, v, log_decay)
    states, _ = pass_states(
        chunks, k if ends is None else ends, v, group=group, log_decay=log_decay, whole=whole,
        initial=contiguous(initial_state), operand=operand,
    )  # fmt: skip
    dstates, dinitial = pass_states(
        chunks, q if queries is None else queries, dy, group=group, log_decay=log_decay, whole=whole,
        initial=contiguous(dfinal_state), scale=scale, reverse=True, operand=operand,
    )  # fmt: skip
    # Heads that share keys are summed afterwards, in float32.
    wide = dtype if group == 1 else torch.float32
    dq, dk = (torch.empty(batch, length, heads, keys, dtype=wide, device=v.device) for _ in range(2))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dg = torch.empty((0,) if log_decay is None else log_decay.shape, dtype=torch.float32, device=v.device)
    dpairs = dwhole = from_states = to_states = None
    if decay == "key":
        shape = (chunks.total, heads, chunks.size, chunks.size)
        dpairs = torch.empty(shape, dtype=torch.float32, device=v.device)
        from_states, to_states = (dpairs.new_empty(*shape[:3], keys) for _ in range(2))
        dwhole = torch.empty(chunks.total, heads, keys, dtype=torch.float32, device=v.device)
    GRADIENTS.launch(
        lambda blocks: (chunks.total, heads),
        dy=dy, q=q, k=k, v=v, log_decay=log_decay, pairs=pairs, ends=ends, states=states, dstates=dstates,
        dq=dq if from_states is None else from_states, dk=dk if to_states is None else to_states,
        dv=dv, dg=dg, dpairs=dpairs, dwhole=dwhole,
        **chunks.of_chunks, heads=heads, group=group, keys=keys, values=values, scale=scale,
        **strides(dy=dy, q=q, k=k, v=v, g=log_decay),
        DECAY=decay, C=chunks.size, OPERAND=operand, KEYS=key_block(k),
    )  # fmt: skip
    if decay == "key":
        KEY_GRADIENTS.launch(
            lambda blocks: (chunks.total * cdiv(keys, blocks["KEYS"]), heads),
            q=q, k=k, log_decay=log_decay, dpairs=dpairs, from_states=from_states, to_states=to_states,
            dwhole=dwhole, dq=dq, dk=dk, dg=dg,
            **chunks.of_chunks, heads=heads, group=group, keys=keys,
            **strides(q=q, k=k, g=log_decay),
            C=chunks.size, LEVELS=chunks.size.bit_length() - 1, OPERAND=operand,
        )  # fmt: skip
    if initial_state is None:
        dinitial = v.new_empty(0)
    return sum_group(dq, key_heads, dtype), sum_group(dk, key_heads, dtype), dv, dg, dinitial


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    dq, dk, dv, ddecay, dstate = BACKWARD_OPERATOR(
        dy, dfinal_state, q, k, v, log_decay, ctx.scale, initial_state, cu_seqlens
    )
    return dq, dk, dv, like(ddecay, log_decay), None, like(dstate, initial_state), None


BACKWARD_OPERATOR = Operator(
    "gated_linear_attention_backward",
    "(Tensor dy, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor? log_decay, float scale, "
    "Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward,
)
OPERATOR = Operator(
    "gated_linear_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _attention,
)
OPERATOR.differentiate(_autograd, _setup, partner=BACKWARD_OPERATOR)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.gated_linear_attention`. More than 256 key dimensions go to the reference."""
    if k.shape[-1] > WIDEST_KEY:
        form: Any = dispatch.form("gated_linear_attention", "reference")
        result: Tensor | tuple[Tensor, Tensor] = form(
            q,
            k,
            v,
            log_decay,
            scale=scale,
            initial_state=initial_state,
            return_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
        )
        return result
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, final_state = OPERATOR(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    return (y, final_state) if return_final_state else y


OPERATOR.register(gated_linear_attention)
