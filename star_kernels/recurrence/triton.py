"""The recurrences in Triton: the linear scan and, imported here, all others of the family.

    h_t = decay_t ⊙ h_{t-1} + x_t

**One program walks.** It holds the state of a block of channels in registers, two neighbouring channels a
lane, and takes token after token, so that every input is read once and nothing is exchanged between threads.
Tokens come in tiles of TIME x CHANNELS whose copies into shared memory run STAGES tiles ahead; within a tile
all tokens of a channel lie in one lane, and :func:`row_of` names one of them without any exchange.

**Pieces.** Where sequences x channels are too few to fill a GPU, sequences are cut into pieces that run in
parallel (the chunked scan of arXiv 2312.06635, section 4, for a diagonal decay): `_summaries` makes of every
piece its decay P = Π decay_t and the state E that it reaches from zero, `_carries` passes the states through,

    before the next piece = P ⊙ before + E,

and the walk starts every piece from the state before it. The inputs are then read twice. Packed sequences are
pieces as well, of the lengths that they have.

Backward, G being the gradient of the state that a token hands on:

    g_t = dh_t + G_t,   dx_t = g_t,   ddecay_t = g_t ⊙ h_{t-1},   G_{t-1} = decay_t ⊙ g_t

which is the same walk from the last token to the first, and the same pieces: P is the same, and from zero a
piece hands on R = Σ_t (Π_{s<=t} decay_s) ⊙ dh_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.compiled import like
from star_kernels.launch import Configuration, Kernel, Operator, cdiv, chunks_of, rows
from star_kernels.recurrence import triton_delta_rule as triton_delta_rule
from star_kernels.recurrence import triton_linear_attention as triton_linear_attention

FILLED = 192
"""Programs from which on a walk over whole sequences keeps a data-centre GPU busy."""

SHORTEST = 64
"""Tokens that a piece has at least: shorter ones would cost more in states than they gain."""


# What the walks have in common


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
def channel_block(block, CHANNELS: tl.constexpr, PER_LANE: tl.constexpr):
    """A block's channels. The compiler is told of PER_LANE neighbours and no more, and gives a lane so many:
    with more, a tile's tokens would be spread over lanes."""
    return tl.max_contiguous(block * CHANNELS + tl.arange(0, CHANNELS), PER_LANE)


@triton.jit
def tile_of(pointer, stride, channel, width, tokens, MASKED: tl.constexpr, TIME: tl.constexpr, fill=0.0):
    """TIME rows from ``pointer`` on, in float32; only MASKED tiles ask whether ``tokens`` are fewer."""
    row = tl.arange(0, TIME)[:, None]
    at = pointer + (row * stride + channel[None, :])
    if MASKED:
        return tl.load(at, (channel[None, :] < width) & (row < tokens), other=fill).to(tl.float32)
    else:
        return tl.load(at, channel[None, :] < width, other=0.0).to(tl.float32)


@triton.jit
def row_of(tile, row: tl.constexpr):
    """One row of a tile that has all rows of a column in one lane: a sum of one number and many -0.0, which
    change nothing, so that the compiler leaves of it just the register."""
    index = tl.arange(0, tile.shape[0])[:, None]
    nothing = tl.zeros(tile.shape, tl.float32) * -1.0  # -0.0; a plain -0.0 would become 0.0
    return tl.sum(tl.where(index == row, tile, nothing), 0)


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


def cut(x: Tensor, cu_seqlens: Tensor | None, blocks: int, *, shortest: int = SHORTEST) -> Pieces:
    """Cuts x (B, L, ...) for a kernel that has ``blocks`` programs a piece, by sizes alone."""
    batch, length = x.shape[0], x.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    programs = sequences * blocks
    whole = programs == 0 or programs >= FILLED or length <= 2 * shortest
    chunk = shortest
    while programs * length > 4 * FILLED * chunk:
        chunk *= 2
    if whole:
        chunk = length
    count = 1 if whole else cdiv(length, chunk)
    total = sequences * count
    sequence_of = first_of = starts = None
    if cu_seqlens is not None:
        if whole:
            sequence_of = torch.arange(sequences, dtype=torch.int32, device=x.device)
            first_of = cu_seqlens[:-1].clone()
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


# linear_scan


@triton.jit
def _summary_of_tile(
    decay, x, decay_l, x_l, product, end, channel, width, tokens,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, TIME: tl.constexpr,
):  # fmt: skip
    tile_decay = tile_of(decay, decay_l, channel, width, tokens, MASKED, TIME, 1.0)
    tile_x = tile_of(x, x_l, channel, width, tokens, MASKED, TIME)
    for row in tl.static_range(TIME):
        decay_t = row_of(tile_decay, row)
        product *= decay_t
        if REVERSE:
            end += product * row_of(tile_x, row)
        else:
            end = decay_t * end + row_of(tile_x, row)
    return product, end


@triton.jit
def _summaries(
    decay, x, products, ends,
    count, length, chunk, offsets, sequence_of, first_of, width,
    decay_b, decay_l, x_b, x_l,
    REVERSE: tl.constexpr,
    TIME: tl.constexpr, CHANNELS: tl.constexpr, PER_LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """P and E of a piece; with REVERSE P and R, x being dh."""
    blocks = tl.cdiv(width, CHANNELS)
    index = tl.program_id(0) // blocks
    channel = channel_block(tl.program_id(0) % blocks, CHANNELS, PER_LANE)
    _, batch, first, tokens, _ = piece(index, count, length, chunk, offsets, sequence_of, first_of)
    decay += batch * decay_b
    x += batch * x_b
    product = tl.full((CHANNELS,), 1.0, tl.float32)
    end = tl.zeros((CHANNELS,), tl.float32)
    full = tokens // TIME * TIME
    for start in tl.range(0, full, TIME, num_stages=STAGES):
        product, end = _summary_of_tile(
            decay + (first + start) * decay_l, x + (first + start) * x_l, decay_l, x_l,
            product, end, channel, width, TIME, REVERSE, False, TIME,
        )  # fmt: skip
    if full < tokens:
        product, end = _summary_of_tile(
            decay + (first + full) * decay_l, x + (first + full) * x_l, decay_l, x_l,
            product, end, channel, width, tokens - full, REVERSE, True, TIME,
        )  # fmt: skip
    place = index.to(tl.int64) * width + channel
    tl.store(products + place, product, channel < width)
    tl.store(ends + place, end, channel < width)


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
        state += tl.load(first_state + sequence.to(tl.int64) * width + channel, inside, other=0.0)
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


@triton.jit
def _scan_tile(
    decay, x, y, decay_l, x_l, h, channel, width, tokens, MASKED: tl.constexpr, TIME: tl.constexpr,
):  # fmt: skip
    tile_decay = tile_of(decay, decay_l, channel, width, tokens, MASKED, TIME, 1.0)
    tile_x = tile_of(x, x_l, channel, width, tokens, MASKED, TIME)
    for row in tl.static_range(TIME):
        h = row_of(tile_decay, row) * h + row_of(tile_x, row)
        inside = channel < width
        if MASKED:
            inside = inside & (row < tokens)
        tl.store(y + (row * width + channel), h, inside)
    return h


@triton.jit
def _scan(
    decay, x, before, y, final,
    count, length, chunk, offsets, sequence_of, first_of, width,
    decay_b, decay_l, x_b, x_l,
    TIME: tl.constexpr, CHANNELS: tl.constexpr, PER_LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h of a piece from the state before it; the last one into ``final`` where pieces are sequences."""
    blocks = tl.cdiv(width, CHANNELS)
    index = tl.program_id(0) // blocks
    channel = channel_block(tl.program_id(0) % blocks, CHANNELS, PER_LANE)
    _, batch, first, tokens, _ = piece(index, count, length, chunk, offsets, sequence_of, first_of)
    decay += batch * decay_b
    x += batch * x_b
    y += batch * length * width
    place = index.to(tl.int64) * width + channel
    h = tl.zeros((CHANNELS,), tl.float32)
    if before is not None:
        h += tl.load(before + place, channel < width, other=0.0).to(tl.float32)
    full = tokens // TIME * TIME
    for start in tl.range(0, full, TIME, num_stages=STAGES):
        at = first + start
        h = _scan_tile(
            decay + at * decay_l, x + at * x_l, y + at * width, decay_l, x_l,
            h, channel, width, TIME, False, TIME,
        )  # fmt: skip
    if full < tokens:
        at = first + full
        h = _scan_tile(
            decay + at * decay_l, x + at * x_l, y + at * width, decay_l, x_l,
            h, channel, width, tokens - full, True, TIME,
        )  # fmt: skip
    if final is not None:
        tl.store(final + place, h, channel < width)


@triton.jit
def _backward_tile(
    dh, decay, h, ddecay, dx, dh_l, decay_l, h_l, handed, state, channel, width, tokens, past,
    MASKED: tl.constexpr, TIME: tl.constexpr,
):  # fmt: skip
    """Rows against time: pointers are at the tile's last token. A MASKED tile begins its piece."""
    tile_dh = tile_of(dh, -dh_l, channel, width, tokens, MASKED, TIME)
    tile_decay = tile_of(decay, -decay_l, channel, width, tokens, MASKED, TIME, 1.0)
    known = tokens
    if MASKED:
        known = tl.where(past > 0, tokens, tokens - 1)
    tile_h = tile_of(h - h_l, -h_l, channel, width, known, MASKED, TIME)
    for row in tl.static_range(TIME):
        g = row_of(tile_dh, row) + handed
        h_before = row_of(tile_h, row)
        inside = channel < width
        if MASKED:
            h_before = tl.where(row < known, h_before, state)
            inside = inside & (row < tokens)
        tl.store(dx + (channel - row * width), g, inside)
        tl.store(ddecay + (channel - row * width), g * h_before, inside)
        handed = row_of(tile_decay, row) * g
    return handed


@triton.jit
def _scan_backward(
    dh, decay, h, initial, before, ddecay, dx, dinitial,
    count, length, chunk, offsets, sequence_of, first_of, width,
    dh_b, dh_l, decay_b, decay_l, h_b, h_l,
    TIME: tl.constexpr, CHANNELS: tl.constexpr, PER_LANE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of a piece, last token first, from G behind it (``before`` in the walk's order)."""
    blocks = tl.cdiv(width, CHANNELS)
    index = tl.program_id(0) // blocks
    channel = channel_block(tl.program_id(0) % blocks, CHANNELS, PER_LANE)
    sequence, batch, first, tokens, past = piece(index, count, length, chunk, offsets, sequence_of, first_of)
    last = first + tokens - 1
    dh += batch * dh_b
    decay += batch * decay_b
    h += batch * h_b
    ddecay += batch * length * width
    dx += batch * length * width
    place = index.to(tl.int64) * width + channel
    state = tl.zeros((CHANNELS,), tl.float32)
    if initial is not None:
        at = initial + tl.maximum(sequence, 0).to(tl.int64) * width + channel
        state += tl.load(at, channel < width, other=0.0).to(tl.float32)
    handed = tl.zeros((CHANNELS,), tl.float32)
    if before is not None:
        handed += tl.load(before + place, channel < width, other=0.0).to(tl.float32)
    full = tl.maximum(tokens - 1, 0) // TIME * TIME
    for start in tl.range(0, full, TIME, num_stages=STAGES):
        at = last - start
        handed = _backward_tile(
            dh + at * dh_l, decay + at * decay_l, h + at * h_l, ddecay + at * width, dx + at * width,
            dh_l, decay_l, h_l, handed, state, channel, width, TIME, past, False, TIME,
        )  # fmt: skip
    if full < tokens:
        at = last - full
        handed = _backward_tile(
            dh + at * dh_l, decay + at * decay_l, h + at * h_l, ddecay + at * width, dx + at * width,
            dh_l, decay_l, h_l, handed, state, channel, width, tokens - full, past, True, TIME,
        )  # fmt: skip
    if dinitial is not None:
        tl.store(dinitial + place, handed, channel < width)


def _walk(time: int, warps: int, stages: int) -> Configuration:
    """Two channels a lane: 64 a warp."""
    blocks = {"TIME": time, "CHANNELS": 64 * warps, "PER_LANE": 2, "STAGES": stages}
    return Configuration(blocks, num_warps=warps, num_stages=stages)


_WALKS = (_walk(16, 1, 5), _walk(32, 1, 3), _walk(16, 2, 5), _walk(8, 1, 8), _walk(32, 1, 4))
SUMMARIES = Kernel("linear_scan_summaries", _summaries, _WALKS)
SCAN = Kernel("linear_scan_forward", _scan, _WALKS)
SCAN_BACKWARD = Kernel("linear_scan_backward", _scan_backward, _WALKS)
CARRIES = Kernel(
    "linear_scan_carries",
    _carries,
    (
        Configuration({"CHANNELS": 32}, num_warps=1, num_stages=4),
        Configuration({"CHANNELS": 64}, num_warps=1, num_stages=4),
        Configuration({"CHANNELS": 128}, num_warps=4, num_stages=1),
    ),
)


def _grid(pieces: int, width: int) -> Any:
    return lambda blocks: (pieces * cdiv(width, blocks["CHANNELS"]),)


def _pass_states(
    pieces: Pieces, decay: Tensor, x: Tensor, first_state: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The states before every piece, (pieces, D), and behind every sequence, in the order of the walk."""
    width = x.shape[2]
    products, ends, before = (floats(x, pieces.total, width) for _ in range(3))
    last_state = floats(x, pieces.sequences, width)
    SUMMARIES.launch(
        _grid(pieces.total, width),
        decay=decay, x=x, products=products, ends=ends, **pieces.arguments, width=width,
        **token_strides(decay=decay, x=x), REVERSE=reverse,
    )  # fmt: skip
    CARRIES.launch(
        _grid(pieces.sequences, width),
        products=products, ends=ends, first_state=first_state, before=before, last_state=last_state,
        count=pieces.arguments["count"], offsets=pieces.arguments["offsets"], starts=pieces.starts,
        chunk=pieces.arguments["chunk"], width=width, REVERSE=reverse,
    )  # fmt: skip
    return before, last_state


def _linear_scan(
    decay: Tensor, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    decay, x, before = rows(decay), rows(x), contiguous(initial_state)
    width = x.shape[2]
    pieces = cut(x, cu_seqlens, cdiv(width, 64))
    final = floats(x, pieces.sequences, width)
    if not pieces.whole:
        before, final = _pass_states(pieces, decay, x, before, reverse=False)
    SCAN.launch(
        _grid(pieces.total, width),
        decay=decay, x=x, before=before, y=y, final=final if pieces.whole else None,
        **pieces.arguments, width=width, **token_strides(decay=decay, x=x),
    )  # fmt: skip
    return y, final


def _linear_scan_backward(
    dh: Tensor,
    dfinal_state: Tensor | None,
    decay: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ddecay = torch.empty(decay.shape, dtype=decay.dtype, device=decay.device)
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dh, decay, h, before = rows(dh), rows(decay), rows(h), contiguous(dfinal_state)
    width = h.shape[2]
    pieces = cut(h, cu_seqlens, cdiv(width, 64))
    dinitial = floats(h, pieces.sequences, width)
    if not pieces.whole:
        before, dinitial = _pass_states(pieces, decay, dh, before, reverse=True)
    SCAN_BACKWARD.launch(
        _grid(pieces.total, width),
        dh=dh, decay=decay, h=h, initial=contiguous(initial_state), before=before,
        ddecay=ddecay, dx=dx, dinitial=dinitial if pieces.whole else None,
        **pieces.arguments, width=width, **token_strides(dh=dh, decay=decay, h=h),
    )  # fmt: skip
    return ddecay, dx, dinitial


def _linear_scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    decay, _, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(decay, output[0], initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _linear_scan_autograd(ctx: Any, dh: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    decay, h, initial_state, cu_seqlens = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh
    ddecay, dx, dstate = LINEAR_BACKWARD(dh, dfinal_state, decay, h, initial_state, cu_seqlens)
    return ddecay, dx, like(dstate, initial_state), None


LINEAR_BACKWARD = Operator(
    "linear_scan_backward",
    "(Tensor dh, Tensor? dfinal_state, Tensor decay, Tensor h, Tensor? initial_state, Tensor? cu_seqlens) "
    "-> (Tensor, Tensor, Tensor)",
    _linear_scan_backward,
)
LINEAR = Operator(
    "linear_scan",
    "(Tensor decay, Tensor x, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _linear_scan,
)
LINEAR.differentiate(_linear_scan_autograd, _linear_scan_setup, partner=LINEAR_BACKWARD)


def linear_scan(
    decay: Tensor,
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.linear_scan`."""
    y, final_state = LINEAR(decay, x, initial_state, cu_seqlens)
    return (y, final_state) if return_final_state else y


LINEAR.register(linear_scan)
