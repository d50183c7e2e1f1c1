"""The gated delta rule in Triton: chunks in parallel on the tensor cores, states passed between them.

Within a chunk, the rows that the rule writes, u_t = β_t (v_t − (decayed S_{t-1})ᵀ k_t), depend on each other.
Written out from the state S before the chunk they solve a unit triangular system (the WY form of arXiv
2406.06484, with decays 2412.06464 and 2510.26692):

    (I + M) U = βV − βK° S,   M_ts = β_t (decay over s+1..t of k_s)·k_t for s < t

with K° decayed from the chunk's start. T = (I + M)⁻¹ needs no state, so that all chunks make it at once
(`_systems`), W = T βK° and U° = T βV with it (`_solutions`); the pass between chunks is two products,
U = U° − W S and S⁺ = decay S + K'ᵀ U (`_states`). The rest is linear attention with U for V.

Backward keeps A and T where they are all that a chunk's tokens decide, and makes the states again. With dS⁺
the gradient of the state after a chunk and the scale in dY (`_dstates`):

    dU = Aᵀ dY + K' dS⁺,   dS = decay dS⁺ + Q'ᵀ dY − Wᵀ dU

Then no more order (`_gradients`, `_key_gradients`): with X = Tᵀ dU, the gradient of the right hand side,

    d(βV) = X,   d(βK°) = −X Sᵀ,   dM = −tril(X Uᵀ, −1)

which have the form of what linear attention has for its queries: K asks a second time, as a query of its own
past, with −X for dY. So do the gradients of the log-decays: of the pairs s < t of a chunk, g_r counts in
those with s < r <= t, running sums of q ⊙ dq and of −k ⊙ dk; see `triton_linear_attention`.
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
from star_kernels.recurrence.triton_linear_attention import OUTPUTS
from star_kernels.recurrence.triton_matrix_states import (
    WIDEST_KEY,
    Chunks,
    chunk_size,
    chunks_in,
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
    place,
    product,
    store_tile,
    strides,
    sum_group,
    widen,
)

KEYS_WITH_DECAYS = 16
"""Key dimensions with a decay each whose gradients one program makes."""


@triton.jit
def _precise(a, b, OPERAND: tl.constexpr):
    """A product as exact as float32's on tensor cores that take halves: of the two halves of each number."""
    if OPERAND == tl.float32:  # noqa: SIM300
        return tl.dot(a, b, input_precision="ieee")
    else:
        high_a, high_b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        low_a, low_b = (
            (a - high_a.to(tl.float32)).to(tl.bfloat16),
            (b - high_b.to(tl.float32)).to(tl.bfloat16),
        )
        return tl.dot(high_a, high_b) + (tl.dot(high_a, low_b) + tl.dot(low_a, high_b))


@triton.jit
def _invert(m, C: tl.constexpr, OPERAND: tl.constexpr):
    """(I + m)⁻¹ of a strictly lower triangular (C, C), by blocked forward substitution.

    Row by row in the blocks of 16 on the diagonal, all of them at once: row i of the inverse is
    e_i − Σ_k m_ik row_k. Then two blocks at a time become one: [[P, 0], [N, Q]]⁻¹ has −Q⁻¹ N P⁻¹ in its
    corner.
    """
    BLOCKS: tl.constexpr = C // 16
    same = tl.arange(0, BLOCKS)[:, None, None, None] == tl.arange(0, BLOCKS)[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(m, (BLOCKS, 16, BLOCKS, 16)), 0.0), 2)
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    inverse = tl.where(row == column, 1.0, tl.zeros((BLOCKS, 16, 16), tl.float32))
    for i in range(1, 16):
        factors = tl.sum(tl.where(row == i, diagonal, 0.0), 1)
        known = tl.sum(factors[:, :, None] * inverse, 1)
        inverse -= tl.where(row == i, known[:, None, :], 0.0)
    spread = tl.broadcast_to(inverse[:, :, None, :], (BLOCKS, 16, BLOCKS, 16))
    whole = tl.reshape(tl.where(same, spread, 0.0), (C, C))
    if C > 16:
        corner = tl.where(pairs_of_level(16, C), m, 0.0)
        whole -= _precise(_precise(whole, corner, OPERAND), whole, OPERAND)
    if C > 32:
        corner = tl.where(pairs_of_level(32, C), m, 0.0)
        whole -= _precise(_precise(whole, corner, OPERAND), whole, OPERAND)
    return whole


@triton.jit
def _systems(
    q, k, beta, log_decay, pairs, inverse, queries, starts, ends, whole,
    count, length, offsets, sequence_of, first_of,
    heads, group, keys,
    q_b, q_l, q_h, k_b, k_l, k_h, beta_b, beta_l, beta_h, g_b, g_l, g_h,
    DECAY: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, OPERAND: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A and T of a chunk; with a decay a key dimension also Q', K°, K' and the decay of the whole chunk."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
    if rows == 0:
        return
    batch, first = batch.to(tl.int64), first.to(tl.int64)
    q += batch * q_b + first * q_l + head // group * q_h
    k += batch * k_b + first * k_l + head // group * k_h
    slot = chunk * heads + head
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    a = tl.zeros((C, C), tl.float32)
    m = tl.zeros((C, C), tl.float32)
    for block in range(0, keys, KEYS):
        tile_q = load_tile(q, q_l, rows, keys, C, KEYS, block)
        tile_k = load_tile(k, k_l, rows, keys, C, KEYS, block)
        if DECAY == "key":
            g = log_decay + batch * g_b + first * g_l + head * g_h
            total = load_tile(g, g_l, rows, keys, C, KEYS, block)
            a += tl.where(row == column, tl.sum(tile_q * tile_k, 1)[:, None], 0.0)
            from_start, until_end = total, tl.zeros((C, KEYS), tl.float32)
            for level in range(0, LEVELS):
                size = 1 << level
                decay = decay_of_level(from_start, until_end, size, C)
                past = tl.trans(tile_k * decay)
                a += tl.where(pairs_of_level(size, C), product(tile_q * decay, past, OPERAND), 0.0)
                m += tl.where(pairs_of_level(size, C), product(tile_k * decay, past, OPERAND), 0.0)
                from_start, until_end, total = widen(from_start, until_end, total, size, C, KEYS)
            at = slot * C * keys
            store_tile(queries + at, keys, tile_q * tl.exp(from_start), C, keys, C, KEYS, block)
            store_tile(starts + at, keys, tile_k * tl.exp(from_start), C, keys, C, KEYS, block)
            store_tile(ends + at, keys, tile_k * tl.exp(until_end), C, keys, C, KEYS, block)
            key = block + tl.arange(0, KEYS)
            tl.store(whole + slot * keys + key, tl.exp(tl.max(total, 0)), key < keys)
        else:
            a += product(tile_q, tl.trans(tile_k), OPERAND)
            m += product(tile_k, tl.trans(tile_k), OPERAND)
    if DECAY == "head":
        g = log_decay + batch * g_b + first * g_l + head * g_h
        between = decay_between(load_vector(g, g_l, rows, C, 1), C)
        a *= between
        m *= between
    store_tile(pairs + slot * C * C, C, tl.where(row >= column, a, 0.0), C, C, C, C)
    m *= load_vector(beta + batch * beta_b + first * beta_l + head * beta_h, beta_l, rows, C)[:, None]
    result = _invert(tl.where(row > column, m, 0.0), C, OPERAND)
    store_tile(inverse + slot * C * C, C, result, C, C, C, C)


@triton.jit
def _solutions(
    k, v, beta, log_decay, inverse, starts, w, u,
    count, length, offsets, sequence_of, first_of,
    heads, group, keys, values,
    k_b, k_l, k_h, v_b, v_l, v_h, beta_b, beta_l, beta_h, g_b, g_l, g_h,
    DECAY: tl.constexpr, C: tl.constexpr, OPERAND: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """W = T βK° (N, H, C, Dk) and U° = T βV (N, H, C, Dv) of a chunk, WIDTH columns at a time."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
    if rows == 0:
        return
    batch, first = batch.to(tl.int64), first.to(tl.int64)
    k += batch * k_b + first * k_l + head // group * k_h
    v += batch * v_b + first * v_l + head * v_h
    slot = chunk * heads + head
    t = load_tile(inverse + slot * C * C, C, C, C, C, C)
    rate = load_vector(beta + batch * beta_b + first * beta_l + head * beta_h, beta_l, rows, C)[:, None]
    for block in range(0, values, WIDTH):
        tile_v = load_tile(v, v_l, rows, values, C, WIDTH, block)
        solved = product(t, tile_v * rate, OPERAND)
        store_tile(u + slot * C * values, values, solved, C, values, C, WIDTH, block)
    if DECAY == "head":
        rate *= decay_from_start(log_decay + batch * g_b + first * g_l + head * g_h, g_l, rows, C)[:, None]
    for block in range(0, keys, WIDTH):
        if DECAY == "key":
            tile_k = load_tile(starts + slot * C * keys, keys, C, keys, C, WIDTH, block)
        else:
            tile_k = load_tile(k, k_l, rows, keys, C, WIDTH, block)
        solved = product(t, tile_k * rate, OPERAND)
        store_tile(w + slot * C * keys, keys, solved, C, keys, C, WIDTH, block)


@triton.jit
def _states(
    k, log_decay, ends, whole, w, u, initial, states, written, final,
    count, length, offsets, starts, sequence_of, first_of,
    heads, group, keys, values,
    k_b, k_l, k_h, g_b, g_l, g_h,
    DECAY: tl.constexpr, C: tl.constexpr, OPERAND: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """S before every chunk, U (``written``, (B, L, H, Dv)) and the last states, VALUES columns of them."""
    blocks = tl.cdiv(values, VALUES)
    sequence, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks * VALUES
    head = tl.program_id(1).to(tl.int64)
    start, chunks = chunks_in(sequence, count, offsets, starts, C)
    one = (sequence * heads + head) * keys * values
    state = tl.zeros((KEYS, VALUES), tl.float32)
    if initial is not None:
        state += load_tile(initial + one, values, keys, values, KEYS, VALUES, block)
    for step in range(0, chunks):
        chunk = start + step
        slot = chunk * heads + head
        store_tile(states + slot * keys * values, values, state, keys, values, KEYS, VALUES, block)
        batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
        batch, first = batch.to(tl.int64), first.to(tl.int64)
        tile_w = load_tile(w + slot * C * keys, keys, C, keys, C, KEYS)
        tile_u = load_tile(u + slot * C * values, values, C, values, C, VALUES, block)
        tile_u -= product(tile_w, state, OPERAND)
        at = written + ((batch * length + first) * heads + head) * values
        store_tile(at, heads * values, tile_u, rows, values, C, VALUES, block)
        if DECAY == "key":
            tile_k = load_tile(ends + slot * C * keys, keys, C, keys, C, KEYS)
            key = tl.arange(0, KEYS)
            state *= tl.load(whole + slot * keys + key, key < keys, other=0.0)[:, None]
        else:
            k_at = k + batch * k_b + first * k_l + head // group * k_h
            tile_k = load_tile(k_at, k_l, rows, keys, C, KEYS)
        if DECAY == "head":
            g = log_decay + batch * g_b + first * g_l + head * g_h
            tile_u *= decay_until_end(g, g_l, rows, C)[:, None]
            state *= tl.exp(tl.sum(load_vector(g, g_l, rows, C), 0))
        state += product(tl.trans(tile_k), tile_u, OPERAND)
    store_tile(final + one, values, state, keys, values, KEYS, VALUES, block)


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


def _kernel(name: str, function: Any, *candidates: Configuration, choose: Any = None) -> Kernel:
    return Kernel(f"gated_delta_rule_{name}", function, candidates, shape=label, choose=choose)


def _safe_states(arguments: dict[str, Any]) -> Configuration:
    """Registers hold (KEYS, VALUES) of a state beside (C, KEYS) tiles: fewer columns where keys are many."""
    if large(arguments):
        return Configuration({"VALUES": 16}, num_warps=8, num_stages=1)
    return Configuration({"VALUES": 32}, num_warps=4 if arguments["keys"] <= 64 else 8, num_stages=1)


def _safe_systems(arguments: dict[str, Any]) -> Configuration:
    if arguments["DECAY"] != "key":
        return Configuration({"KEYS": 32}, num_warps=4, num_stages=1)
    return Configuration({"KEYS": 16 if large(arguments) else 32}, num_warps=8, num_stages=1)


SYSTEMS = _kernel(
    "systems",
    _systems,
    Configuration({"KEYS": 32}, num_warps=8, num_stages=1),
    Configuration({"KEYS": 32}, num_warps=4, num_stages=1),
    Configuration({"KEYS": 64}, num_warps=4, num_stages=1),
    Configuration({"KEYS": 64}, num_warps=8, num_stages=1),
    choose=_safe_systems,
)
SOLUTIONS = _kernel(
    "solutions",
    _solutions,
    Configuration({"WIDTH": 64}, num_warps=4, num_stages=2),
    Configuration({"WIDTH": 128}, num_warps=8, num_stages=1),
    Configuration({"WIDTH": 64}, num_warps=4, num_stages=3),
    Configuration({"WIDTH": 32}, num_warps=4, num_stages=3),
)
STATES = _kernel(
    "states",
    _states,
    Configuration({"VALUES": 16}, num_warps=8, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=4, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=4, num_stages=2),
    Configuration({"VALUES": 32}, num_warps=8, num_stages=2),
    Configuration({"VALUES": 64}, num_warps=4, num_stages=2),
    Configuration({"VALUES": 64}, num_warps=8, num_stages=2),
    choose=_safe_states,
)
DSTATES = _kernel(
    "dstates",
    _dstates,
    Configuration({"VALUES": 16}, num_warps=8, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=4, num_stages=1),
    Configuration({"VALUES": 16}, num_warps=4, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=8, num_stages=2),
    Configuration({"VALUES": 64}, num_warps=8, num_stages=1),
    choose=_safe_states,
)
GRADIENTS = _kernel(
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
KEY_GRADIENTS = _kernel(
    "key_gradients",
    _key_gradients,
    Configuration({}, num_warps=8, num_stages=1),
    Configuration({}, num_warps=4, num_stages=1),
)


class _Call:
    """One call's inputs and what its passes, in this order, leave for each other.

    Backward runs them again but for ``systems``, the A and T that the forward call found, where they are no
    more than a tensor's bytes: with a decay a key dimension, Q', K° and K' come with them.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        systems: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.q, self.k, self.v, self.beta, self.log_decay = (
            rows(q),
            rows(k),
            rows(v),
            beta,
            decay_rows(log_decay),
        )
        self.initial_state = contiguous(initial_state)
        self.heads, self.keys, self.values = v.shape[2], k.shape[3], v.shape[3]
        self.decay, self.group = kind_of(log_decay), self.heads // q.shape[2]
        self.chunks: Chunks = cut(v, cu_seqlens, chunk_size(k))
        self.operand = operand_type(v.dtype)
        self.levels = self.chunks.size.bit_length() - 1
        self.queries: Tensor | None = None
        self.starts: Tensor | None = None
        self.ends: Tensor | None = None
        self.whole: Tensor | None = None
        if systems is None or self.decay == "key":
            self._make_systems()
        else:
            self.pairs, self.inverse = systems
        self._make_states()

    def by_chunk(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """(N, H, C, width), uninitialised."""
        shape = (self.chunks.total, self.heads, self.chunks.size, width)
        return torch.empty(shape, dtype=dtype or handed_on(self.v.dtype), device=self.v.device)

    def _make_systems(self) -> None:
        chunks, of_keys = self.chunks, self.decay == "key"
        self.pairs, self.inverse = self.by_chunk(chunks.size), self.by_chunk(chunks.size)
        self.queries, self.starts, self.ends = (
            self.by_chunk(self.keys) if of_keys else None for _ in range(3)
        )
        shape = (chunks.total, self.heads, self.keys)
        self.whole = torch.empty(shape, dtype=torch.float32, device=self.v.device) if of_keys else None
        SYSTEMS.launch(
            lambda blocks: (chunks.total, self.heads),
            q=self.q, k=self.k, beta=self.beta, log_decay=self.log_decay, pairs=self.pairs,
            inverse=self.inverse, queries=self.queries, starts=self.starts, ends=self.ends, whole=self.whole,
            **chunks.of_chunks, heads=self.heads, group=self.group, keys=self.keys,
            **strides(q=self.q, k=self.k, beta=self.beta, g=self.log_decay),
            DECAY=self.decay, C=chunks.size, LEVELS=self.levels, OPERAND=self.operand,
        )  # fmt: skip

    def _make_states(self) -> None:
        chunks, v = self.chunks, self.v
        self.w, self.u = self.by_chunk(self.keys), self.by_chunk(self.values)
        SOLUTIONS.launch(
            lambda blocks: (chunks.total, self.heads),
            k=self.k, v=self.v, beta=self.beta, log_decay=self.log_decay, inverse=self.inverse,
            starts=self.starts, w=self.w, u=self.u,
            **chunks.of_chunks, heads=self.heads, group=self.group, keys=self.keys, values=self.values,
            **strides(k=self.k, v=self.v, beta=self.beta, g=self.log_decay),
            DECAY=self.decay, C=chunks.size, OPERAND=self.operand,
        )  # fmt: skip

        dtype = handed_on(v.dtype)
        self.states = v.new_empty(chunks.total, self.heads, self.keys, self.values, dtype=dtype)
        self.written = torch.empty(v.shape, dtype=dtype, device=v.device)
        shape = (chunks.sequences, self.heads, self.keys, self.values)
        self.final = torch.empty(shape, dtype=torch.float32, device=v.device)
        STATES.launch(
            self.of_sequences,
            k=self.k, log_decay=self.log_decay, ends=self.ends, whole=self.whole, w=self.w, u=self.u,
            initial=self.initial_state, states=self.states, written=self.written, final=self.final,
            **chunks.of_sequences, heads=self.heads, group=self.group, keys=self.keys, values=self.values,
            **strides(k=self.k, g=self.log_decay),
            DECAY=self.decay, C=chunks.size, OPERAND=self.operand, KEYS=key_block(self.k),
        )  # fmt: skip

    def of_sequences(self, blocks: Configuration) -> tuple[int, int]:
        """The grid of the passes between chunks."""
        return self.chunks.sequences * cdiv(self.values, blocks["VALUES"]), self.heads


def _delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    call = _Call(q, k, v, beta, log_decay, initial_state, cu_seqlens)
    OUTPUTS.launch(
        lambda blocks: (call.chunks.total * cdiv(call.values, blocks["VALUES"]), call.heads),
        q=call.q, k=call.k, v=call.written, log_decay=call.log_decay, pairs=call.pairs,
        queries=call.queries, states=call.states, y=y,
        **call.chunks.of_chunks, heads=call.heads, group=call.group, keys=call.keys, values=call.values,
        scale=scale, **strides(q=call.q, k=call.k, v=call.written, g=call.log_decay),
        DECAY=call.decay, C=call.chunks.size, OPERAND=call.operand, KEYS=key_block(call.k),
    )  # fmt: skip
    if call.decay == "key":
        return y, call.final, y.new_empty(0), y.new_empty(0)
    return y, call.final, call.pairs, call.inverse


def _delta_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    pairs: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy = rows(dy)
    call = _Call(q, k, v, beta, log_decay, initial_state, cu_seqlens, (pairs, inverse))
    dstates, dwritten, dinitial = _pass_back(call, dy, dfinal_state, scale)
    dq, dk, dv, dbeta, dg = _combine(call, dy, dwritten, dstates, scale)
    if initial_state is None:
        dinitial = v.new_empty(0)
    return (
        sum_group(dq, q.shape[2], q.dtype), sum_group(dk, k.shape[2], k.dtype),
        dv, dbeta.to(beta.dtype), dg, dinitial,
    )  # fmt: skip


def _pass_back(
    call: _Call, dy: Tensor, dfinal_state: Tensor | None, scale: float
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


def _combine(
    call: _Call, dy: Tensor, dwritten: Tensor, dstates: Tensor, scale: float
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, *nothing: Any) -> tuple[Any, ...]:
    q, k, v, beta, log_decay, initial_state, cu_seqlens, pairs, inverse = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    dq, dk, dv, dbeta, ddecay, dstate = BACKWARD_OPERATOR(
        dy, dfinal_state, q, k, v, beta, log_decay, ctx.scale, initial_state, cu_seqlens, pairs, inverse
    )
    return dq, dk, dv, dbeta, like(ddecay, log_decay), None, like(dstate, initial_state), None


BACKWARD_OPERATOR = Operator(
    "gated_delta_rule_backward",
    "(Tensor dy, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, "
    "float scale, Tensor? initial_state, Tensor? cu_seqlens, Tensor pairs, Tensor inverse) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _delta_backward,
)
OPERATOR = Operator(
    "gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)",
    _delta,
)
OPERATOR.differentiate(_autograd, _setup, partner=BACKWARD_OPERATOR)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.gated_delta_rule`. More than 256 key dimensions go to the reference."""
    if k.shape[-1] > WIDEST_KEY:
        form: Any = dispatch.form("gated_delta_rule", "reference")
        result: Tensor | tuple[Tensor, Tensor] = form(
            q,
            k,
            v,
            beta,
            log_decay,
            scale=scale,
            initial_state=initial_state,
            return_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
        )
        return result
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, final_state, _, _ = OPERATOR(q, k, v, beta, log_decay, scale, initial_state, cu_seqlens)
    return (y, final_state) if return_final_state else y


OPERATOR.register(gated_delta_rule)
