"""What the Triton kernels of linear attention and of the delta rule share: chunks, decays and state passing.

**Chunks.** A sequence is cut into chunks of C tokens. What a chunk's queries see of the chunk itself is a
product of (C, C) matrices, what they see of the past goes through the state before the chunk, and only these
states are made one after another (arXiv 2312.06635, section 4; 2405.21060, section 6). Kernels that need no
state run on all chunks at once. What they hand to each other lies chunk by chunk, (N, H, C, D), filled up
with zeros behind a sequence's end, so that only the caller's own tensors need masks for rows.

**Decays.** Every decay is exp of a sum of log-decays over an interval of tokens, and the sums are taken over
the interval itself, never as a difference of two running sums: no exponent is positive, strong decays cancel
nothing, and a log-decay of -inf is exact.

One decay a head: the (C, C) sums of all intervals are one scan (:func:`decay_between`).

One decay a key dimension: a sum over all (t, s, key) would leave the tensor cores idle. Any two tokens s < t
of a chunk are separated for the first time when it is halved again and again: they lie in the two halves of
exactly one block of 2h tokens, h = 1, 2, 4, ... C/2. There the decay between them is (from the second half's
first token to t) times (from behind s to the first half's end), so that each h is one (C, D)x(D, C) product
under a mask, of queries and keys multiplied with the same (C, D) decays (:func:`decay_of_level`). The sums
for 2h follow from those for h (:func:`widen`), and those for C are the decays to and from the states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.launch import INTERPRETED, Configuration, Kernel, cdiv, chunks_of, rising, rows

WIDEST_KEY = 256
"""Key dimensions that fit a program; calls with more go to the reference."""


@triton.jit
def place(chunk, count, length, sequence_of, first_of, offsets, C: tl.constexpr):
    """A chunk's batch entry, its first token there, and how many of its C tokens exist."""
    if offsets is None:
        first = (chunk % count) * C
        return chunk // count, first, tl.minimum(length - first, C)
    else:
        sequence = tl.load(sequence_of + chunk)
        first = tl.load(first_of + chunk)
        end = tl.load(offsets + tl.maximum(sequence, 0) + 1)
        # Tables are longer than the chunks that there are: the rest has no token, and nothing to do.
        return chunk * 0, first, tl.where(sequence < 0, 0, tl.minimum(end - first, C))


@triton.jit
def chunks_in(sequence, count, offsets, starts, C: tl.constexpr):
    """A sequence's first chunk, and how many it has."""
    if offsets is None:
        return sequence * count, count
    else:
        tokens = tl.load(offsets + sequence + 1) - tl.load(offsets + sequence)
        return tl.load(starts + sequence), (tokens + C - 1) // C


@triton.jit
def load_tile(pointer, stride, rows, columns, C: tl.constexpr, D: tl.constexpr, first_column=0):
    """(C, D) in float32, zeros behind ``rows`` and ``columns``."""
    row, column = tl.arange(0, C)[:, None], first_column + tl.arange(0, D)[None, :]
    inside = (row < rows) & (column < columns)
    return tl.load(pointer + row * stride + column, inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, stride, tile, rows, columns, C: tl.constexpr, D: tl.constexpr, first_column=0):
    row, column = tl.arange(0, C)[:, None], first_column + tl.arange(0, D)[None, :]
    inside = (row < rows) & (column < columns)
    tl.store(pointer + row * stride + column, tile, inside)


@triton.jit
def load_vector(pointer, stride, rows, C: tl.constexpr, shift: tl.constexpr = 0):
    """(C,) in float32: tokens shift, shift + 1, ...; zeros behind ``rows``."""
    row = tl.arange(0, C) + shift
    return tl.load(pointer + row * stride, row < rows, other=0.0).to(tl.float32)


@triton.jit
def product(a, b, OPERAND: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision="ieee")


# One decay a head


@triton.jit
def decay_between(after, C: tl.constexpr):
    """(C, C): exp of the sum over s+1..t for s <= t, and 0 above; after (C,) are the tokens s+1."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    spread = tl.where(column < row, tl.broadcast_to(after[None, :], (C, C)), 0.0)
    return tl.where(column <= row, tl.exp(tl.cumsum(spread, 1, reverse=True)), 0.0)


@triton.jit
def decay_from_start(pointer, stride, rows, C: tl.constexpr):
    """(C,): what a query sees of the state before the chunk."""
    return tl.exp(tl.cumsum(load_vector(pointer, stride, rows, C), 0))


@triton.jit
def decay_until_end(pointer, stride, rows, C: tl.constexpr):
    """(C,): what is left of a key in the state after the chunk."""
    return tl.exp(tl.cumsum(load_vector(pointer, stride, rows, C, 1), 0, reverse=True))


# One decay a key dimension


@triton.jit
def widen(from_start, until_end, total, size, C: tl.constexpr, D: tl.constexpr):
    """Sums over blocks of ``size`` tokens become sums over blocks of twice as many; all are (C, D).

    from_start: over the tokens of the own block up to t. until_end: over those behind s. total: over all.
    """
    row = tl.broadcast_to(tl.arange(0, C)[:, None], (C, D))
    of_other_half = tl.gather(total, row ^ size, 0)
    second = (row & size) != 0
    from_start += tl.where(second, of_other_half, 0.0)
    until_end += tl.where(second, 0.0, of_other_half)
    return from_start, until_end, total + of_other_half


@triton.jit
def decay_of_level(from_start, until_end, size, C: tl.constexpr):
    """(C, D): of queries in second halves from the half's start, of keys in first halves until its end."""
    return tl.exp(tl.where((tl.arange(0, C)[:, None] & size) != 0, from_start, until_end))


@triton.jit
def pairs_of_level(size, C: tl.constexpr):
    """(C, C): whether t and s lie in the second and the first half of one block of 2 size tokens."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (row // size == column // size + 1) & ((row & size) != 0)


# State passing


@triton.jit
def _states(
    a, b, log_decay, whole, initial, states, final,
    count, length, offsets, starts, sequence_of, first_of,
    heads, group, keys, values, scale,
    a_b, a_l, a_h, b_b, b_l, b_h, g_b, g_l, g_h,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr, OPERAND: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """state <- decay state + scale aᵀ b, chunk after chunk, storing every chunk's state before its update.

    Forward, a and b are keys and values, and a key decays until its chunk's end. In REVERSE they are queries
    and the gradients of the outputs, a query's decay begins with its chunk, and the states are gradients of
    the states after each chunk. With a decay a key, ``a`` comes decayed and (N, H, C, Dk).
    """
    blocks = tl.cdiv(keys, KEYS) * tl.cdiv(values, VALUES)
    sequence, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first_key = block // tl.cdiv(values, VALUES) * KEYS
    first_value = block % tl.cdiv(values, VALUES) * VALUES
    head = tl.program_id(1).to(tl.int64)
    start, chunks = chunks_in(sequence, count, offsets, starts, C)
    key, value = first_key + tl.arange(0, KEYS), first_value + tl.arange(0, VALUES)
    inside = (key[:, None] < keys) & (value[None, :] < values)
    cell = key[:, None] * values + value[None, :]
    one = (sequence * heads + head) * keys * values
    state = tl.zeros((KEYS, VALUES), tl.float32)
    if initial is not None:
        state += tl.load(initial + one + cell, inside, other=0.0).to(tl.float32)
    for step in range(0, chunks):
        chunk = start + step
        if REVERSE:
            chunk = start + chunks - 1 - step
        slot = chunk * heads + head
        tl.store(states + slot * keys * values + cell, state, inside)
        batch, first, rows = place(chunk, count, length, sequence_of, first_of, offsets, C)
        batch, first = batch.to(tl.int64), first.to(tl.int64)
        tile_b = load_tile(
            b + batch * b_b + first * b_l + head * b_h, b_l, rows, values, C, VALUES, first_value
        )
        if DECAY == "key":
            tile_a = load_tile(a + slot * C * keys, keys, C, keys, C, KEYS, first_key)
            state *= tl.load(whole + slot * keys + key, key < keys, other=0.0)[:, None]
        else:
            a_at = a + batch * a_b + first * a_l + head // group * a_h
            tile_a = load_tile(a_at, a_l, rows, keys, C, KEYS, first_key)
        if DECAY == "head":
            g = log_decay + batch * g_b + first * g_l + head * g_h
            decay = decay_from_start(g, g_l, rows, C) if REVERSE else decay_until_end(g, g_l, rows, C)
            tile_a *= decay[:, None]
            state *= tl.exp(tl.sum(load_vector(g, g_l, rows, C), 0))
        state += product(tl.trans(tile_a), tile_b, OPERAND) * scale
    if final is not None:
        tl.store(final + one + cell, state, inside)


def label(arguments: dict[str, Any]) -> str:
    """Which launches a tuned table tells apart."""
    values = f",values={arguments['values']}" if "values" in arguments else ""
    decay = f",decay={arguments['DECAY']}" if "DECAY" in arguments else ""
    return f"keys={arguments['keys']}{values}{decay}"


def large(arguments: dict[str, Any]) -> bool:
    """Whether a launch's tiles of all key dimensions take the registers of twice 128 in half precision.

    Rows that no 16 elements divide are loaded one element at a time, and every one has its own address.
    """
    ragged = arguments["keys"] % 16 or arguments.get("values", 0) % 16
    return bool(arguments["OPERAND"] == tl.float32 or arguments["keys"] > 128 or ragged)


STATES = Kernel(
    "matrix_states",
    _states,
    (
        Configuration({"KEYS": 64, "VALUES": 32}, num_warps=4, num_stages=3),
        Configuration({"KEYS": 32, "VALUES": 32}, num_warps=2, num_stages=2),
        Configuration({"KEYS": 64, "VALUES": 64}, num_warps=4, num_stages=2),
        Configuration({"KEYS": 64, "VALUES": 64}, num_warps=4, num_stages=3),
        Configuration({"KEYS": 128, "VALUES": 64}, num_warps=8, num_stages=2),
    ),
    shape=label,
)


# Python


@dataclass(frozen=True)
class Chunks:
    """How a call is cut: ``size`` tokens a chunk, ``total`` chunks of ``sequences`` sequences.

    ``of_chunks`` and ``of_sequences`` are the arguments of :func:`place` and :func:`chunks_in`.
    """

    size: int
    total: int
    sequences: int
    of_chunks: dict[str, Any]
    of_sequences: dict[str, Any]


def chunk_size(k: Tensor) -> int:
    """Tokens a chunk: what leaves room for a program's tiles in registers and shared memory."""
    fits = 8192 if k.element_size() == 2 else 2048
    return max(16, min(64, fits // key_block(k)))


def cut(v: Tensor, cu_seqlens: Tensor | None, size: int) -> Chunks:
    """Cuts v (B, L, H, Dv) into chunks of ``size`` tokens."""
    batch, length = v.shape[:2]
    sequence_of: Tensor | None = None
    first_of: Tensor | None = None
    starts: Tensor | None = None
    sequences, total = batch, batch * cdiv(length, size)
    if cu_seqlens is not None:
        cu_seqlens = rising(cu_seqlens, length)
        sequences = cu_seqlens.shape[0] - 1
        if sequences == 0 or length == 0:
            sequence_of = first_of = cu_seqlens.new_zeros(0)
        else:
            sequence_of, first_of = chunks_of(cu_seqlens, length, size)
        of_each = (cu_seqlens[1:] - cu_seqlens[:-1] + size - 1) // size
        starts = (of_each.cumsum(0) - of_each).int()
        total = sequence_of.shape[0]
    of_chunks = {
        "count": cdiv(length, size), "length": length, "offsets": cu_seqlens,
        "sequence_of": sequence_of, "first_of": first_of,
    }  # fmt: skip
    return Chunks(size, total, sequences, of_chunks, {**of_chunks, "starts": starts})


def handed_on(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what one kernel leaves for another's matrix products: their operands', as they round it.

    The interpreter cuts off what bfloat16 can't hold instead of rounding: there it is float32.
    """
    return torch.float32 if INTERPRETED else dtype


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """q=q gives q_b, q_l and q_h: how far batches, tokens and heads are apart."""
    named = {}
    for name, tensor in tensors.items():
        for position, axis in enumerate("blh"):
            named[f"{name}_{axis}"] = 0 if tensor is None else tensor.stride(position)
    return named


def kind_of(log_decay: Tensor | None) -> str:
    """Which decay a kernel applies: "none", "head" or "key"."""
    return "none" if log_decay is None else "head" if log_decay.dim() == 3 else "key"


def key_block(k: Tensor) -> int:
    """A power of two that holds all key dimensions."""
    return max(16, triton.next_power_of_2(k.shape[-1]))


def pass_states(
    chunks: Chunks,
    a: Tensor,
    b: Tensor,
    *,
    group: int,
    log_decay: Tensor | None,
    whole: Tensor | None,
    initial: Tensor | None,
    scale: float = 1.0,
    reverse: bool = False,
    operand: Any,
) -> tuple[Tensor, Tensor]:
    """Runs :func:`_states`: every chunk's state (N, H, Dk, Dv), and the last ones in float32."""
    heads, values, keys = b.shape[2], b.shape[3], a.shape[-1]
    states = b.new_empty(chunks.total, heads, keys, values, dtype=handed_on(b.dtype))
    final = torch.empty(chunks.sequences, heads, keys, values, dtype=torch.float32, device=b.device)
    decay = kind_of(log_decay)
    STATES.launch(
        lambda blocks: (
            chunks.sequences * cdiv(keys, blocks["KEYS"]) * cdiv(values, blocks["VALUES"]), heads,
        ),
        a=a, b=b, log_decay=log_decay, whole=whole, initial=initial, states=states, final=final,
        **chunks.of_sequences, heads=heads, group=group, keys=keys, values=values, scale=scale,
        **strides(a=a, b=b, g=log_decay),
        DECAY=decay, REVERSE=reverse, C=chunks.size, OPERAND=operand,
    )  # fmt: skip
    return states, final


def sum_group(gradient: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """The gradient (B, L, H, D) of heads that share one, summed over those that do."""
    batch, length, _, width = gradient.shape
    if gradient.shape[2] != heads:
        gradient = gradient.reshape(batch, length, heads, gradient.shape[2] // heads, width).sum(3)
    return gradient.to(dtype)


def decay_rows(log_decay: Tensor | None) -> Tensor | None:
    """Kernels take decays of heads with any strides."""
    return log_decay if log_decay is None or log_decay.dim() == 3 else rows(log_decay)


def contiguous(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.contiguous()
