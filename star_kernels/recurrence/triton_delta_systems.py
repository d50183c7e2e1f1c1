"""The forward pass of the gated delta rule up to its states: A and T, W and U°, then U and S, chunk by chunk.

What they are, :mod:`star_kernels.recurrence.triton_delta_rule` says. The backward pass makes them again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.launch import Configuration, Kernel, cdiv, operand_type, rows
from star_kernels.recurrence.triton_matrix_states import (
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
    widen,
)


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


def kernel(name: str, function: Any, *candidates: Configuration, choose: Any = None) -> Kernel:
    return Kernel(f"gated_delta_rule_{name}", function, candidates, shape=label, choose=choose)


def safe_states(arguments: dict[str, Any]) -> Configuration:
    """Registers hold (KEYS, VALUES) of a state beside (C, KEYS) tiles: fewer columns where keys are many."""
    if large(arguments):
        return Configuration({"VALUES": 16}, num_warps=8, num_stages=1)
    return Configuration({"VALUES": 32}, num_warps=4 if arguments["keys"] <= 64 else 8, num_stages=1)


def _safe_systems(arguments: dict[str, Any]) -> Configuration:
    if arguments["DECAY"] != "key":
        return Configuration({"KEYS": 32}, num_warps=4, num_stages=1)
    return Configuration({"KEYS": 16 if large(arguments) else 32}, num_warps=8, num_stages=1)


SYSTEMS = kernel(
    "systems",
    _systems,
    Configuration({"KEYS": 32}, num_warps=8, num_stages=1),
    Configuration({"KEYS": 32}, num_warps=4, num_stages=1),
    Configuration({"KEYS": 64}, num_warps=4, num_stages=1),
    Configuration({"KEYS": 64}, num_warps=8, num_stages=1),
    choose=_safe_systems,
)
SOLUTIONS = kernel(
    "solutions",
    _solutions,
    Configuration({"WIDTH": 64}, num_warps=4, num_stages=2),
    Configuration({"WIDTH": 128}, num_warps=8, num_stages=1),
    Configuration({"WIDTH": 64}, num_warps=4, num_stages=3),
    Configuration({"WIDTH": 32}, num_warps=4, num_stages=3),
)
STATES = kernel(
    "states",
    _states,
    Configuration({"VALUES": 16}, num_warps=8, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=4, num_stages=1),
    Configuration({"VALUES": 32}, num_warps=4, num_stages=2),
    Configuration({"VALUES": 32}, num_warps=8, num_stages=2),
    Configuration({"VALUES": 64}, num_warps=4, num_stages=2),
    Configuration({"VALUES": 64}, num_warps=8, num_stages=2),
    choose=safe_states,
)


class Call:
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
