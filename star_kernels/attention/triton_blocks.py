"""What the Triton attentions share: which blocks a block of tokens sees, tiles of rows, launching.

A query at position p sees the keys from p - behind to p + ahead, cut to the keys there are or, packed, to
its own sequence. So each query sees one interval of keys, both ends of which rise with the query; and each
key is seen by one interval of queries, with behind and ahead exchanged. Causal order, windows, packed
sequences and unequal lengths are ways to set that interval, and no kernel knows them apart. A block of tokens
walks over the blocks of the other side in three phases:

    begin                 full                             trailing              end
      |  some tokens see   |  all tokens see all of a block   |  some tokens see  |

Nothing outside them is read, and in the middle one no mask is computed. The three are one loop with a branch,
so that the pipeline of loads runs through them without a stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from star_kernels.launch import INTERPRETED, Configuration, cdiv, operand_type, rising

LOG2_E = 1.4426950408889634


# --------------------------------------------------------------------------------------------------------
# Inside kernels


@triton.jit
def seen(index, count, other_count, behind, ahead, bounds):
    """The interval [lower, upper) that a token sees of the other side; empty where upper <= lower.

    ``bounds`` (2, count) holds where the token's sequence begins and ends, or is None.
    """
    shift = other_count - count
    if bounds is None:
        first = 0
        last = other_count
    else:
        first = tl.load(bounds + index)
        last = tl.load(bounds + count + index)
    lower = tl.maximum(index + (shift - behind), first)
    upper = tl.minimum(index + (shift + ahead + 1), last)
    return lower, tl.maximum(upper, 0)


@triton.jit
def phases(
    first, count, other_count, behind, ahead, bounds,
    LEADING: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Where the three phases of the tokens from ``first`` begin, and where the last one ends.

    Without LEADING, the lower ends of all intervals are 0, and the first phase is empty.
    """
    lower, full_upper = seen(first, count, other_count, behind, ahead, bounds)
    last = tl.minimum(first + BLOCK, count) - 1
    full_lower, upper = seen(last, count, other_count, behind, ahead, bounds)
    if LEADING:
        begin = lower // OTHER * OTHER
        # Not behind the end: tokens may have no key in common.
        full = tl.minimum((full_lower + OTHER - 1) // OTHER, (upper + OTHER - 1) // OTHER) * OTHER
    else:
        begin = 0
        full = 0
    trailing = tl.maximum(full_upper // OTHER * OTHER, full)
    return begin, full, trailing, upper


@triton.jit
def visible_pairs(
    first, first_other, count, other_count, behind, ahead, bounds,
    BLOCK: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """The mask (BLOCK, OTHER): which of the other side's tokens from ``first_other`` are seen by those from
    ``first``."""
    token = tl.minimum(first + tl.arange(0, BLOCK), count - 1)
    lower, upper = seen(token, count, other_count, behind, ahead, bounds)
    other = first_other + tl.arange(0, OTHER)[None, :]
    return (other >= lower[:, None]) & (other < upper[:, None])


@triton.jit
def row_source(
    base, count, stride,
    DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """What :func:`tile` reads from: a tensor descriptor, whose tiles the TMA unit copies, or the pointer."""
    if DESCRIBED:
        return tl.make_tensor_descriptor(base, [count, DIM], [stride, 1], [ROWS, WIDTH])
    else:
        return base


@triton.jit
def tile(
    source, first, count, stride,
    DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    OPERAND: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The rows from ``first``, (ROWS, WIDTH); zeros from row ``count`` and column DIM on."""
    if DESCRIBED:
        return source.load([first, 0]).to(OPERAND)
    else:
        row = tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, WIDTH)[None, :]
        places = source + tl.cast(stride, tl.int64) * first + (row * stride + column)
        inside = (row + first < count) & (column < DIM)
        return tl.load(places, inside, other=0.0).to(OPERAND)


@triton.jit
def put_tile(
    base, values, first, count, stride,
    DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Stores the rows from ``first`` that there are."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    places = base + tl.cast(stride, tl.int64) * first + (row * stride + column)
    tl.store(places, values.to(base.dtype.element_ty), (row + first < count) & (column < DIM))


@triton.jit
def products(a, b, inner, CAPPED: tl.constexpr):
    """The raw scores a bᵀ; with a soft cap, tanh(inner · a bᵀ / (2 log2 e)), of negative powers alone."""
    x = tl.dot(a, tl.trans(b), input_precision="ieee")
    if CAPPED:
        x *= inner
        power = tl.exp2(-tl.abs(x))
        t = (1.0 - power) / (1.0 + power)
        x = tl.where(x < 0.0, -t, t)
    return x


@triton.jit
def accumulate(total, peak, x, slope):
    """One step of the running softmax in powers of two: the weights of a block of raw scores, the factor for
    what was summed before, and the new sum and peak (of slope · x; slope > 0). Masked scores are -inf."""
    new = tl.maximum(peak, tl.max(x, 1) * slope)
    # A row that has seen no key yet stays at -inf, of which no difference may be taken.
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(x * slope - base[:, None])
    factor = tl.exp2(peak - base)
    return weights, factor, total * factor + tl.sum(weights, 1), new


@triton.jit
def finish(total, peak):
    """1 / total and log2 Σ exp2 of the scores: 0 and +inf for a query that sees nothing, so that its output
    is 0 and every weight that backward recomputes is exp2(-inf)."""
    nothing = total == 0.0
    some = tl.where(nothing, 1.0, total)
    return tl.where(nothing, 0.0, 1.0 / some), tl.where(nothing, float("inf"), peak + tl.log2(some))


# --------------------------------------------------------------------------------------------------------
# For launchers


def padded(width: int) -> int:
    """A head's width as a tile has it: a power of two, at least the 16 that tensor cores take."""
    return max(16, triton.next_power_of_2(width))


def described(*tensors: Tensor) -> bool:
    """Whether the TMA unit can read the rows of these (B, L, H, D): everything on 16-byte boundaries."""
    for tensor in tensors:
        size = tensor.element_size()
        start = tensor.storage_offset() * size if isinstance(tensor, FakeTensor) else tensor.data_ptr()
        steps = (stride * size for stride in tensor.stride()[:-1])
        if 0 in tensor.shape or start % 16 or any(step % 16 for step in steps):
            return False
    return True


def strides(**tensors: Tensor) -> dict[str, int]:
    """name_batch, name_row, name_head: the strides of (B, L, H, D) tensors, by the names kernels have."""
    parts = ("batch", "row", "head")
    return {
        f"{name}_{part}": stride
        for name, tensor in tensors.items()
        for part, stride in zip(parts, tensor.stride(), strict=False)
    }


def visibility(
    queries: int, keys: int, causal: bool, window: int, cu_seqlens: Tensor | None
) -> dict[str, Any]:
    """The kernels' arguments that say which keys a query sees; window 0 is none."""
    unlimited = queries + keys
    behind = window - 1 if window else unlimited
    ahead = 0 if causal else behind
    return {
        "query_count": queries,
        "key_count": keys,
        "behind": min(behind, unlimited),
        "ahead": min(ahead, unlimited),
        "bounds": None if cu_seqlens is None else _bounds(cu_seqlens, queries),
    }


def _bounds(cu_seqlens: Tensor, length: int) -> Tensor:
    """(2, L) int32: where each token's sequence begins and where it ends."""
    token = torch.arange(length, dtype=torch.int32, device=cu_seqlens.device)
    cu_seqlens = rising(cu_seqlens, length)
    following = torch.searchsorted(cu_seqlens, token, right=True).clamp(1, cu_seqlens.shape[0] - 1)
    return torch.stack([cu_seqlens[following - 1], cu_seqlens[following]])


def positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """q and the scale with the scale's sign moved into q, as the running maximum needs it: (sign · q,
    |scale|, sign), and for a scale of 0, zeros with any scale."""
    if scale > 0.0:
        return q, scale, 1.0
    return (-q, -scale, -1.0) if scale < 0.0 else (torch.zeros_like(q), 1.0, 0.0)


def precision(tensor: Tensor) -> dict[str, Any]:
    return {"OPERAND": operand_type(tensor.dtype)}


def query_grid(batch: int, heads: int, queries: int) -> Any:
    return lambda blocks: (batch * heads * cdiv(queries, blocks["QUERIES"]),)


def key_grid(batch: int, parts: int, keys: int) -> Any:
    return lambda blocks: (batch * parts * cdiv(keys, blocks["KEYS"]),)


def key_parts(batch: int, heads: int, key_heads: int, keys: int) -> int:
    """By how many programs a block of keys' gradients is summed, over all heads: one for each key head, or,
    where those would not fill a GPU of some 132 multiprocessors twice, one for each query head."""
    programs = batch * key_heads * cdiv(keys, 128)
    return key_heads if programs >= 264 else heads


def summed(parts: Tensor, key_heads: int, like: Tensor) -> Tensor:
    """(B, L, parts, D) float32 partial sums as (B, L, key_heads, D); key_heads divides parts."""
    if parts.shape[2] == key_heads:
        return parts
    return parts.unflatten(2, (key_heads, parts.shape[2] // key_heads)).sum(dim=3).to(like.dtype)


def too_wide(*tensors: Tensor) -> bool:
    """Whether the tiles of these (B, L, H, D) would not fit the registers."""
    return any(tensor.shape[3] * tensor.element_size() > 512 for tensor in tensors)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def allow_descriptors() -> None:
    """Gives Triton memory for the tensor descriptors that kernels make.

    Triton keeps the allocator for each thread apart, and autograd runs backward in threads of its own, so
    every launching function says this again; it costs nothing.
    """
    triton.set_allocator(_scratch)


allow_descriptors()


# --------------------------------------------------------------------------------------------------------
# Configurations


def blocks_of(queries: int, keys: int, loads: int, num_warps: int, num_stages: int) -> Configuration:
    return Configuration({"QUERIES": queries, "KEYS": keys, "LOADS": loads}, num_warps, num_stages)


def _demanding(arguments: dict[str, Any]) -> bool:
    """Whether a call takes more registers than its widths say: for a soft cap, or for rows that aren't read
    in 16 bytes at a time."""
    ragged = any(arguments[name] % 8 for name in ("DIM", "VALUE_DIM"))
    return ragged or not arguments["ALIGNED"] or bool(arguments.get("CAPPED"))


def label(arguments: dict[str, Any]) -> str:
    """What tuned tables tell apart."""
    return (
        f"head_dim={arguments['WIDTH']},value_dim={arguments['VALUE_WIDTH']},"
        f"bytes={arguments['v'].element_size()}{',demanding' if _demanding(arguments) else ''}"
    )


def by_width(sizes: Mapping[int, tuple[tuple[int, Configuration], ...]]) -> Any:
    """Chooses by the bytes of an element and the width of the widest tile: the first that is wide enough."""

    def choose(arguments: dict[str, Any]) -> Configuration:
        width = max(arguments["WIDTH"], arguments["VALUE_WIDTH"]) * (2 if _demanding(arguments) else 1)
        limits = sizes[2 if INTERPRETED else arguments["v"].element_size()]  # there, programs cost
        return next((configuration for limit, configuration in limits if width <= limit), limits[-1][1])

    return choose
