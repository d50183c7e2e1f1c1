"""The backward pass of the gated delta rule: dS⁺ from the last chunk on, then all gradients, without order.

What is computed, :mod:`star_kernels.recurrence.triton_delta_rule` says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.launch import Configuration, cdiv
from star_kernels.recurrence.triton_delta_systems import Call, kernel, safe_states
from star_kernels.recurrence.triton_matrix_states import (
    chunks_in,
    contiguous,
    decay_between,
    decay_from_start,
    decay_of_level,
    decay_until_end,
    key_block,
    large,
    load_tile,
    load_vector,
    pairs_of_level,
    place,
    product,
    store_tile,
    strides,
    widen,
)

KEYS_WITH_DECAYS = 16
"""Key dimensions with a decay each whose gradients one program makes."""


@triton.jit
def _dstates(
    dy, q, k, log_decay, pairs, queries, ends, whole, w, dfinal, dstates, dwritten, dinitial,
    count, length, offsets, starts, sequence_of, first_of,
    heads, group, keys, values, scale,
    dy_b, dy_l, dy_h, q_b, q_l, q_h, k_b, k_l, k_h, g_b, g_l, g_h,
    DECAY: tl.constexpr, C: tl.constexpr, OPERAND: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dS⁺ behind every chunk, dU (``dwritten``) and the first states' gradient, from the last chunk on."""
    blocks = tl.cdiv(values, VALUES)
    sequence, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks * VALUES
    head = tl.program_id(1).to(tl.int64)
    start, chunks = chunks_in(sequence, count, offsets, starts, C)
    one = (sequence * heads + head) * keys * values
    dstate = tl.zeros((KEYS, VALUES), tl.float32)
    if dfinal is not None:
        dstate += load_tile(dfinal + one, values, keys, values, KEYS, VALUES, block)
    for step in range(0, chunks):
        chunk = start + chunks - 1 - step
        slot = chunk * heads + head
        store_tile(dstates + slot * keys * values, values, dstate, keys, values, KEYS, VALUES, block)
        batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
        batch, first = batch.to(tl.int64), first.to(tl.int64)
        dy_at = dy + batch * dy_b + first * dy_l + head * dy_h
        tile_dy = load_tile(dy_at, dy_l, rows, values, C, VALUES, block) * scale
        if DECAY == "key":
            tile_k = load_tile(ends + slot * C * keys, keys, C, keys, C, KEYS)
            tile_q = load_tile(queries + slot * C * keys, keys, C, keys, C, KEYS)
        else:
            tile_k = load_tile(k + batch * k_b + first * k_l + head // group * k_h, k_l, rows, keys, C, KEYS)
            tile_q = load_tile(q + batch * q_b + first * q_l + head // group * q_h, q_l, rows, keys, C, KEYS)
        du = product(tile_k, dstate, OPERAND)
        if DECAY == "head":
            g = log_decay + batch * g_b + first * g_l + head * g_h
            du *= decay_until_end(g, g_l, rows, C)[:, None]
        a = load_tile(pairs + slot * C * C, C, C, C, C, C)
        du += product(tl.trans(a), tile_dy, OPERAND)
        at = dwritten + ((batch * length + first) * heads + head) * values
        store_tile(at, heads * values, du, rows, values, C, VALUES, block)
        if DECAY == "head":
            tile_dy *= decay_from_start(g, g_l, rows, C)[:, None]
            dstate *= tl.exp(tl.sum(load_vector(g, g_l, rows, C), 0))
        elif DECAY == "key":
            key = tl.arange(0, KEYS)
            dstate *= tl.load(whole + slot * keys + key, key < keys, other=0.0)[:, None]
        dstate += product(tl.trans(tile_q), tile_dy, OPERAND)
        tile_w = load_tile(w + slot * C * keys, keys, C, keys, C, KEYS)
        dstate -= product(tl.trans(tile_w), du, OPERAND)
    store_tile(dinitial + one, values, dstate, keys, values, KEYS, VALUES, block)


@triton.jit
def _gradients(
    dy, q, k, v, beta, log_decay, inverse, written, dwritten, states, dstates,
    dq, dk, dv, dbeta, dg, dpairs, dsystem, rewrites, dwhole,
    count, length, offsets, sequence_of, first_of,
    heads, group, keys, values, scale, tokens,
    dy_b, dy_l, dy_h, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, beta_b, beta_l, beta_h, g_b, g_l, g_h,
    DECAY: tl.constexpr, C: tl.constexpr, OPERAND: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk as far as a block of KEYS decides them; the first block's program stores dV.

    dβ and dG are (blocks, B, L, H), to be summed over blocks. With a decay a key dimension, `_key_gradients`
    makes dQ, dK, dG and the rest of dβ of what this leaves: dA, dM (``dsystem``), and without decays dY Sᵀ,
    U dS⁺ᵀ, −X Sᵀ (``dq``, ``dk``, ``rewrites``) and ⟨S, dS⁺⟩ (``dwhole``).
    """
    blocks = tl.cdiv(keys, KEYS)
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    head = tl.program_id(1).to(tl.int64)
    batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
    if rows == 0:
        return
    batch, first = batch.to(tl.int64), first.to(tl.int64)
    dy += batch * dy_b + first * dy_l + head * dy_h
    v += batch * v_b + first * v_l + head * v_h
    slot = chunk * heads + head
    token = (batch * length + first) * heads + head
    rate = load_vector(beta + batch * beta_b + first * beta_l + head * beta_h, beta_l, rows, C)[:, None]
    turned = tl.trans(load_tile(inverse + slot * C * C, C, C, C, C, C))
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    from_state = tl.zeros((C, KEYS), tl.float32)
    to_state = tl.zeros((C, KEYS), tl.float32)
    rewrite = tl.zeros((C, KEYS), tl.float32)
    through = tl.zeros((KEYS,), tl.float32)
    da = tl.zeros((C, C), tl.float32)
    dm = tl.zeros((C, C), tl.float32)
    sum_beta = tl.zeros((C,), tl.float32)
    first_key = block * KEYS
    key = first_key + tl.arange(0, KEYS)
    for value in range(0, values, VALUES):
        column_v = value + tl.arange(0, VALUES)
        inside = (key[:, None] < keys) & (column_v[None, :] < values)
        cell = key[:, None] * values + column_v[None, :]
        state = tl.load(states + slot * keys * values + cell, inside, other=0.0).to(tl.float32)
        dstate = tl.load(dstates + slot * keys * values + cell, inside, other=0.0).to(tl.float32)
        tile_u = load_tile(written + token * values, heads * values, rows, values, C, VALUES, value)
        tile_du = load_tile(dwritten + token * values, heads * values, rows, values, C, VALUES, value)
        tile_dy = load_tile(dy, dy_l, rows, values, C, VALUES, value)
        x = product(turned, tile_du, OPERAND)
        da += product(tile_dy, tl.trans(tile_u), OPERAND)
        dm -= product(x, tl.trans(tile_u), OPERAND)
        from_state += product(tile_dy, tl.trans(state), OPERAND)
        to_state += product(tile_u, tl.trans(dstate), OPERAND)
        rewrite -= product(x, tl.trans(state), OPERAND)
        through += tl.sum(state * dstate, 1)
        if block == 0:
            sum_beta += tl.sum(x * load_tile(v, v_l, rows, values, C, VALUES, value), 1)
            store_tile(dv + token * values, heads * values, x * rate, rows, values, C, VALUES, value)
    da = tl.where(row >= column, da * scale, 0.0)
    dm = tl.where(row > column, dm, 0.0)
    from_state *= scale
    at_beta = dbeta + block.to(tl.int64) * tokens + token + tl.arange(0, C) * heads
    if DECAY == "key":
        at = slot * C * keys
        store_tile(dq + at, keys, from_state, C, keys, C, KEYS, first_key)
        store_tile(dk + at, keys, to_state, C, keys, C, KEYS, first_key)
        store_tile(rewrites + at, keys, rewrite, C, keys, C, KEYS, first_key)
        tl.store(dwhole + slot * keys + key, through, key < keys)
        if block == 0:
            store_tile(dpairs + slot * C * C, C, da, C, C, C, C)
            store_tile(dsystem + slot * C * C, C, dm, C, C, C, C)
            tl.store(at_beta, sum_beta, tl.arange(0, C) < rows)
    else:
        q_at = q + batch * q_b + first * q_l + head // group * q_h
        k_at = k + batch * k_b + first * k_l + head // group * k_h
        tile_k = load_tile(k_at, k_l, rows, keys, C, KEYS, first_key)
        diagonal = tl.sum(tl.where(row == column, da, 0.0), 1)[:, None]
        da = tl.where(row > column, da, 0.0)
        if DECAY == "head":
            g = log_decay + batch * g_b + first * g_l + head * g_h
            between = decay_between(load_vector(g, g_l, rows, C, 1), C)
            da *= between
            dm *= between
            start = decay_from_start(g, g_l, rows, C)[:, None]
            from_state *= start
            rewrite *= start
            to_state *= decay_until_end(g, g_l, rows, C)[:, None]
        tile_dq = from_state + product(da, tile_k, OPERAND)
        asked = rewrite + product(dm, tile_k, OPERAND)
        sum_beta += tl.sum(asked * tile_k, 1)
        tl.store(at_beta, sum_beta, tl.arange(0, C) < rows)
        asked *= rate
        tile_q = load_tile(q_at, q_l, rows, keys, C, KEYS, first_key)
        tile_dk = product(tl.trans(da), tile_q, OPERAND) + product(tl.trans(dm), tile_k * rate, OPERAND)
        if DECAY == "head":
            rising = tl.sum(tile_q * tile_dq + tile_k * (asked - tile_dk), 1)
            falling = tl.sum(tile_k * to_state, 1)
            slope = tl.cumsum(rising, 0, reverse=True) + tl.cumsum(falling, 0) - falling
            slope += tl.exp(tl.sum(load_vector(g, g_l, rows, C), 0)) * tl.sum(through, 0)
            at_g = dg + block.to(tl.int64) * tokens + token + tl.arange(0, C) * heads
            tl.store(at_g, slope, tl.arange(0, C) < rows)
        tile_dq += diagonal * tile_k
        tile_dk += to_state + diagonal * tile_q + asked
        store_tile(dq + token * keys, heads * keys, tile_dq, rows, keys, C, KEYS, first_key)
        store_tile(dk + token * keys, heads * keys, tile_dk, rows, keys, C, KEYS, first_key)


@triton.jit
def _key_gradients(
    q, k, beta, log_decay, dpairs, dsystem, from_states, to_states, rewrites, dwhole, dq, dk, dbeta, dg,
    count, length, offsets, sequence_of, first_of,
    heads, group, keys, tokens,
    q_b, q_l, q_h, k_b, k_l, k_h, beta_b, beta_l, beta_h, g_b, g_l, g_h,
    C: tl.constexpr, LEVELS: tl.constexpr, OPERAND: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dG and the keys' part of dβ, (blocks, B, L, H), of a chunk and KEYS keys with a decay each."""
    blocks = tl.cdiv(keys, KEYS)
    chunk, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks * KEYS
    head = tl.program_id(1).to(tl.int64)
    batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
    if rows == 0:
        return
    batch, first = batch.to(tl.int64), first.to(tl.int64)
    q += batch * q_b + first * q_l + head // group * q_h
    k += batch * k_b + first * k_l + head // group * k_h
    log_decay += batch * g_b + first * g_l + head * g_h
    slot = chunk * heads + head
    token = (batch * length + first) * heads + head
    dpairs += slot * C * C
    dsystem += slot * C * C
    rate = load_vector(beta + batch * beta_b + first * beta_l + head * beta_h, beta_l, rows, C)[:, None]
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    diagonal = tl.load(dpairs + tl.arange(0, C) * (C + 1))[:, None]
    tile_q = load_tile(q, q_l, rows, keys, C, KEYS, block)
    tile_k = load_tile(k, k_l, rows, keys, C, KEYS, block)
    total = load_tile(log_decay, g_l, rows, keys, C, KEYS, block)
    tile_dq = tl.zeros((C, KEYS), tl.float32)
    tile_dk = tl.zeros((C, KEYS), tl.float32)
    asked = tl.zeros((C, KEYS), tl.float32)
    from_start, until_end = total, tl.zeros((C, KEYS), tl.float32)
    for level in range(0, LEVELS):
        size = 1 << level
        decay = decay_of_level(from_start, until_end, size, C)
        mask = pairs_of_level(size, C)
        da = tl.load(dpairs + row * C + column, mask, other=0.0)
        dm = tl.load(dsystem + row * C + column, mask, other=0.0)
        past = tile_k * decay
        tile_dq += product(da, past, OPERAND) * decay
        asked += product(dm, past, OPERAND) * decay
        back = product(tl.trans(da), tile_q * decay, OPERAND)
        tile_dk += (back + product(tl.trans(dm), past * rate, OPERAND)) * decay
        from_start, until_end, total = widen(from_start, until_end, total, size, C, KEYS)
    at = slot * C * keys
    start = tl.exp(from_start)
    tile_dq += load_tile(from_states + at, keys, C, keys, C, KEYS, block) * start
    asked += load_tile(rewrites + at, keys, C, keys, C, KEYS, block) * start
    at_beta = dbeta + (tl.program_id(0) % blocks).to(tl.int64) * tokens + token + tl.arange(0, C) * heads
    tl.store(at_beta, tl.sum(asked * tile_k, 1), tl.arange(0, C) < rows)
    asked *= rate
    to_state = load_tile(to_states + at, keys, C, keys, C, KEYS, block) * tl.exp(until_end)
    rising = tile_q * tile_dq + tile_k * (asked - tile_dk)
    falling = tile_k * to_state
    key = block + tl.arange(0, KEYS)
    through = tl.load(dwhole + slot * keys + key, key < keys, other=0.0) * tl.exp(tl.max(total, 0))
    slope = tl.cumsum(rising, 0, reverse=True) + tl.cumsum(falling, 0) - falling + through[None, :]
    store_tile(dg + token * keys, heads * keys, slope, rows, keys, C, KEYS, block)
    tile_dq += diagonal * tile_k
    tile_dk += to_state + diagonal * tile_q + asked
    store_tile(dq + token * keys, heads * keys, tile_dq, rows, keys, C, KEYS, block)
    store_tile(dk + token * keys, heads * keys, tile_dk, rows, keys, C, KEYS, block)


DSTATES = kernel(
    "dstates",
    _dstates,
    Configuration({"VALUES": 16}, num_warps=8, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=4, num_stages=1),
    Configuration({"VALUES": 16}, num_warps=4, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=8, num_stages=2),
    Configuration({"VALUES": 64}, num_warps=8, num_stages=1),
    choose=safe_states,
)
GRADIENTS = kernel(
    "gradients",
    _gradients,
    Configuration({"VALUES": 16}, num_warps=8, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=8, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=4, num_stages=1),
    Configuration({"VALUES": 64}, num_warps=4, num_stages=1),
    Configuration({"VALUES": 64}, num_warps=8, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=8, num_stages=2),
    choose=lambda arguments: Configuration(
        {"VALUES": 16 if large(arguments) else 32}, num_warps=8, num_stages=1
    ),
)
KEY_GRADIENTS = kernel(
    "key_gradients",
    _key_gradients,
    Configuration({}, num_warps=8, num_stages=1),
    Configuration({}, num_warps=4, num_stages=1),
)


def pass_back(
    call: Call, dy: Tensor, dfinal_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dstates, dinitial = torch.empty_like(call.states), torch.empty_like(call.final)
    dwritten = torch.empty_like(call.written)
    DSTATES.launch(
        call.of_sequences,
        dy=dy, q=call.q, k=call.k, log_decay=call.log_decay, pairs=call.pairs, queries=call.queries,
        ends=call.ends, whole=call.whole, w=call.w, dfinal=contiguous(dfinal_state),
        dstates=dstates, dwritten=dwritten, dinitial=dinitial,
        **call.chunks.of_sequences, heads=call.heads, group=call.group, keys=call.keys, values=call.values,
        scale=scale, **strides(dy=dy, q=call.q, k=call.k, g=call.log_decay),
        DECAY=call.decay, C=call.chunks.size, OPERAND=call.operand, KEYS=key_block(call.k),
    )  # fmt: skip
    return dstates, dwritten, dinitial


def combine(
    call: Call, dy: Tensor, dwritten: Tensor, dstates: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk (of H heads), dv, dbeta and dg."""
    batch, length = call.v.shape[:2]
    device, wide, size = call.v.device, torch.float32, call.chunks.size
    # Heads that share keys are summed afterwards, in float32.
    dtype = call.v.dtype if call.group == 1 else wide
    dq, dk = (torch.empty(batch, length, call.heads, call.keys, dtype=dtype, device=device) for _ in range(2))
    dv = torch.empty(call.v.shape, dtype=call.v.dtype, device=device)
    block = min(64, key_block(call.k))
    blocks = cdiv(call.keys, block)
    dbeta, dg = (torch.empty(blocks, batch, length, call.heads, dtype=wide, device=device) for _ in range(2))
    left: dict[str, Tensor | None] = dict.fromkeys(("dpairs", "dsystem", "rewrites", "dwhole"))
    from_states, to_states = dq, dk
    if call.decay == "key":
        left = {
            "dpairs": call.by_chunk(size, wide), "dsystem": call.by_chunk(size, wide),
            "rewrites": call.by_chunk(call.keys, wide),
            "dwhole": torch.empty(call.chunks.total, call.heads, call.keys, dtype=wide, device=device),
        }  # fmt: skip
        from_states, to_states = call.by_chunk(call.keys, wide), call.by_chunk(call.keys, wide)
    GRADIENTS.launch(
        lambda configuration: (call.chunks.total * blocks, call.heads),
        dy=dy, q=call.q, k=call.k, v=call.v, beta=call.beta, log_decay=call.log_decay, inverse=call.inverse,
        written=call.written, dwritten=dwritten, states=call.states, dstates=dstates,
        dq=from_states, dk=to_states, dv=dv, dbeta=dbeta, dg=dg, **left,
        **call.chunks.of_chunks, heads=call.heads, group=call.group, keys=call.keys, values=call.values,
        scale=scale, tokens=batch * length * call.heads,
        **strides(dy=dy, q=call.q, k=call.k, v=call.v, beta=call.beta, g=call.log_decay),
        DECAY=call.decay, C=size, OPERAND=call.operand, KEYS=block,
    )  # fmt: skip
    if call.decay != "key":
        return dq, dk, dv, dbeta.sum(0), dg.sum(0) if call.decay == "head" else dg.new_empty(0)
    assert call.log_decay is not None
    block = min(KEYS_WITH_DECAYS, key_block(call.k))
    of_keys = dbeta.new_empty(cdiv(call.keys, block), batch, length, call.heads)
    dg = torch.empty(call.log_decay.shape, dtype=wide, device=device)
    KEY_GRADIENTS.launch(
        lambda configuration: (call.chunks.total * of_keys.shape[0], call.heads),
        q=call.q, k=call.k, beta=call.beta, log_decay=call.log_decay,
        from_states=from_states, to_states=to_states, **left, dq=dq, dk=dk, dbeta=of_keys, dg=dg,
        **call.chunks.of_chunks, heads=call.heads, group=call.group, keys=call.keys,
        tokens=batch * length * call.heads,
        **strides(q=call.q, k=call.k, beta=call.beta, g=call.log_decay),
        C=size, LEVELS=call.levels, OPERAND=call.operand, KEYS=block,
    )  # fmt: skip
    return dq, dk, dv, dbeta[0] + of_keys.sum(0), dg
