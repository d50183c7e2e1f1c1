"""What the Triton scans of a diagonal recurrence share: pieces of sequences, and tiles of tokens by channels.

**Pieces.** Where sequences x channels are too few to fill a GPU, and in backward passes that need states at
many tokens, sequences are cut into pieces that run in parallel (the chunked form of arXiv 2312.06635, section
4, for a diagonal decay): a first kernel makes of every piece its decay P and the state E that it reaches from
zero, `_carries` passes the states through them,

    before the next piece = P ⊙ before + E,

and the last kernel starts every piece from the state before it. Gradients go the same way in reverse. Packed
sequences are pieces as well, of the lengths that they have.

**Tiles.** A (TIME, CHANNELS) tile that is loaded with the compiler told of few neighbouring channels
(``tl.max_contiguous``) has all its tokens of a channel in one lane's registers. A loop over them then
exchanges nothing between threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.launch import INTERPRETED, Configuration, Kernel, cdiv, chunks_of, rising

FILLED = 192
"""Programs from which on a walk over whole sequences keeps a data-centre GPU busy."""

SHORTEST = 16 if INTERPRETED else 64
"""Tokens that a piece has at least: shorter ones would cost more in states than they gain. In the interpreter
few, so that tests of few tokens have pieces."""


def floats(tensor: Tensor, *shape: int) -> Tensor:
    """A float32 tensor on the device of ``tensor``."""
    return torch.empty(shape, dtype=torch.float32, device=tensor.device)


def token_strides(**tensors: Tensor | None) -> dict[str, int]:
    """x=x gives x_b and x_l: how far batch entries and tokens are apart."""
    named = {}
    for name, tensor in tensors.items():
        named[f"{name}_b"], named[f"{name}_l"] = (0, 0) if tensor is None else tensor.stride()[:2]
    return named


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# Tiles


@triton.jit
def load_tile(pointer, stride, channel, inside, tokens, TIME: tl.constexpr):
    row = tl.arange(0, TIME)[:, None]
    known = (row < tokens) & inside[None, :]
    return tl.load(pointer + (row * stride + channel[None, :]), known, other=0.0).to(tl.float32)


@triton.jit
def row_picker(TIME: tl.constexpr):
    """What picks row t of a tile: ``tl.sum(tl.where(row == t, tile, nothing), 0)``.

    In a tile whose columns lie in one lane each, that is a sum of one number and many -0.0, which change
    nothing, so that the compiler leaves just the register of it.
    """
    row = tl.arange(0, TIME)[:, None]
    return row, tl.zeros((TIME, 1), tl.float32) * -1.0  # a plain -0.0 would become 0.0


# Pieces


@triton.jit
def piece(index, count, length, chunk, offsets, sequence_of, first_of):
    """A piece's sequence, its batch entry, its first token there, its tokens, and how many came before it."""
    if offsets is None:
        sequence, past = index // count, index % count * chunk
        return sequence, sequence.to(tl.int64), past.to(tl.int64), tl.minimum(length - past, chunk), past
    else:
        sequence = tl.load(sequence_of + index)
        first = tl.load(first_of + index)
        begin = tl.load(offsets + tl.maximum(sequence, 0))
        end = tl.load(offsets + tl.maximum(sequence, 0) + 1)
        # Tables are longer than the pieces that there are: the rest has no token.
        tokens = tl.where(sequence < 0, 0, tl.minimum(end - first, chunk))
        return sequence, (index * 0).to(tl.int64), first.to(tl.int64), tokens, first - begin


@triton.jit
def _carries(
    products, ends, first_state, before, last_state,
    count, offsets, starts, chunk, width,
    REVERSE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The state before every piece of a sequence, in the order of the walk, and the last one."""
    blocks = tl.cdiv(width, CHANNELS)
    sequence = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    if offsets is None:
        start, pieces = sequence * count, count
    else:
        start = tl.load(starts + sequence)
        pieces = (tl.load(offsets + sequence + 1) - tl.load(offsets + sequence) + chunk - 1) // chunk
    state = tl.zeros((CHANNELS,), tl.float32)
    if first_state is not None:
        state += tl.load(first_state + sequence.to(tl.int64) * width + channel, inside, other=0.0).to(
            tl.float32
        )
    for step in range(0, pieces):
        index = start + step
        if REVERSE:
            index = start + pieces - 1 - step
        place = index.to(tl.int64) * width + channel
        product = tl.load(products + place, inside, other=0.0)
        end = tl.load(ends + place, inside, other=0.0)
        tl.store(before + place, state, inside)
        state = product * state + end
    tl.store(last_state + sequence.to(tl.int64) * width + channel, state, inside)


CARRIES = Kernel(
    "scan_carries",
    _carries,
    (
        Configuration({"CHANNELS": 32}, num_warps=1, num_stages=4),
        Configuration({"CHANNELS": 64}, num_warps=1, num_stages=4),
        Configuration({"CHANNELS": 128}, num_warps=4, num_stages=1),
    ),
)


@dataclass(frozen=True)
class Pieces:
    """How sequences are cut. With ``whole``, each is one piece and its states need no passing on.

    ``arguments`` are those of :func:`piece`; ``starts`` is each packed sequence's first piece.
    """

    total: int
    sequences: int
    whole: bool
    arguments: dict[str, Any]
    starts: Tensor | None


def cut(x: Tensor, cu_seqlens: Tensor | None, blocks: int, *, chunk: int | None = None) -> Pieces:
    """Cuts x (B, L, ...) into pieces, by sizes alone: as many as a kernel with ``blocks`` programs a piece
    needs, or of ``chunk`` tokens."""
    batch, length = x.shape[0], x.shape[1]
    cu_seqlens = None if cu_seqlens is None else rising(cu_seqlens, length)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    programs = sequences * blocks
    whole = chunk is None and (programs == 0 or programs >= FILLED or length <= 2 * SHORTEST)
    if whole:
        chunk = length
    elif chunk is None:
        chunk = SHORTEST
        while programs * length > 4 * FILLED * chunk:
            chunk *= 2
    count = 1 if whole else cdiv(length, chunk)
    total = sequences * count
    sequence_of = first_of = starts = None
    if cu_seqlens is not None:
        if whole:
            sequence_of = torch.arange(sequences, dtype=torch.int32, device=x.device)
            first_of = cu_seqlens[:-1].clone()
        elif programs == 0 or length == 0:
            sequence_of = first_of = cu_seqlens.new_zeros(0)
            starts = cu_seqlens.new_zeros(sequences)
        else:
            sequence_of, first_of = chunks_of(cu_seqlens, length, chunk)
            each = (cu_seqlens[1:] - cu_seqlens[:-1] + chunk - 1) // chunk
            starts = (each.cumsum(0) - each).int()
        total = sequence_of.shape[0]
    arguments = {
        "count": count, "length": length, "chunk": chunk,
        "offsets": cu_seqlens, "sequence_of": sequence_of, "first_of": first_of,
    }  # fmt: skip
    return Pieces(total, sequences, whole, arguments, starts)


def grid_of(programs: int, width: int) -> Any:
    """``programs`` times the blocks of channels."""
    return lambda blocks: (programs * cdiv(width, blocks["CHANNELS"]),)


def pass_states(
    pieces: Pieces, products: Tensor, ends: Tensor, first_state: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Puts the state before every piece, in the order of the walk, in the place of ``ends``.

    Args:
        products, ends: P and E, (pieces, ...) float32.
        first_state: (S, ...), contiguous; zeros if None.
        reverse: whether the walk goes from the last piece to the first.

    Returns:
        (``ends``, the states behind every sequence (S, ...)).
    """
    last_state = floats(ends, pieces.sequences, *ends.shape[1:])
    width = math.prod(ends.shape[1:])
    CARRIES.launch(
        grid_of(pieces.sequences, width),
        products=products, ends=ends, first_state=first_state, before=ends, last_state=last_state,
        count=pieces.arguments["count"], offsets=pieces.arguments["offsets"], starts=pieces.starts,
        chunk=pieces.arguments["chunk"], width=width, REVERSE=reverse,
    )  # fmt: skip
    return ends, last_state
