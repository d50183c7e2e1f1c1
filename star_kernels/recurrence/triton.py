"""The recurrences in Triton: the linear scan and, imported here, all others of the family.

    h_t = decay_t ⊙ h_{t-1} + x_t

**One program walks.** It holds the state of a block of channels in registers, two neighbouring channels a
lane, and takes token after token, so that every input is read once and nothing is exchanged between threads.
Tokens come in tiles of TIME x CHANNELS whose copies into shared memory run STAGES tiles ahead; within a tile
all tokens of a channel lie in one lane, and :func:`row_picker` names one of them without any exchange.

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

from star_kernels import dispatch
from star_kernels.compiled import like
from star_kernels.launch import INTERPRETED, Configuration, Kernel, Operator, cdiv, chunks_of, rows
from star_kernels.recurrence import triton_cells as triton_cells
from star_kernels.recurrence import triton_delta_rule as triton_delta_rule
from star_kernels.recurrence import triton_linear_attention as triton_linear_attention
from star_kernels.recurrence.triton_blocks import contiguous, floats, load_tile, row_picker, token_strides

FILLED = 192
"""Programs from which on a walk over whole sequences keeps a data-centre GPU busy."""

SHORTEST = 16 if INTERPRETED else 64
"""Tokens that a piece has at least: shorter ones would cost more in states than they gain. In the interpreter
few, so that tests of few tokens have pieces."""


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


# linear_scan


@triton.jit
def _summary_of_tile(
    decay, x, decay_l, x_l, product, end, channel, width, tokens,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, TIME: tl.constexpr,
):  # fmt: skip
    tile_decay = tile_of(decay, decay_l, channel, width, tokens, MASKED, TIME, 1.0)
    tile_x = tile_of(x, x_l, channel, width, tokens, MASKED, TIME)
    row, nothing = row_picker(TIME)
    for t in tl.static_range(TIME):
        decay_t = tl.sum(tl.where(row == t, tile_decay, nothing), 0)
        product *= decay_t
        if REVERSE:
            end += product * tl.sum(tl.where(row == t, tile_x, nothing), 0)
        else:
            end = decay_t * end + tl.sum(tl.where(row == t, tile_x, nothing), 0)
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
    row, nothing = row_picker(TIME)
    for t in tl.static_range(TIME):
        h = tl.sum(tl.where(row == t, tile_decay, nothing), 0) * h + tl.sum(
            tl.where(row == t, tile_x, nothing), 0
        )
        inside = channel < width
        if MASKED:
            inside = inside & (t < tokens)
        tl.store(y + (t * width + channel), h, inside)
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
    row, nothing = row_picker(TIME)
    for t in tl.static_range(TIME):
        g = tl.sum(tl.where(row == t, tile_dh, nothing), 0) + handed
        h_before = tl.sum(tl.where(row == t, tile_h, nothing), 0)
        inside = channel < width
        if MASKED:
            h_before = tl.where(t < known, h_before, state)
            inside = inside & (t < tokens)
        tl.store(dx + (channel - t * width), g, inside)
        tl.store(ddecay + (channel - t * width), g * h_before, inside)
        handed = tl.sum(tl.where(row == t, tile_decay, nothing), 0) * g
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


# selective_scan


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _step_sizes(dt, bias, SOFTPLUS: tl.constexpr):
    """Step sizes of a tile, and what they would be without softplus."""
    value = dt + bias[None, :]
    if SOFTPLUS:
        small = tl.exp2(tl.abs(value) * -1.4426950408889634)
        # log(1 + e) loses a small e's digits, and step sizes are often small.
        series = small * (1.0 - small * (0.5 - small * (0.3333333333333333 - small * 0.25)))
        logarithm = tl.where(small < 0.03, series, tl.log(1.0 + small))
        return tl.maximum(value, 0.0) + logarithm, value
    else:
        return value, value


@triton.jit
def _channels_of_group(index, width, groups, CHANNELS: tl.constexpr, PER_LANE: tl.constexpr = 1):
    """Of a block of one group: its number in the batch, its group, its channels, and which of them exist."""
    of_group = width // groups
    blocks = tl.cdiv(of_group, CHANNELS)
    rest = index % (groups * blocks)
    within = rest % blocks * CHANNELS + tl.arange(0, CHANNELS)
    # With one channel a lane, all its states lie in the lane's registers.
    channel = tl.max_contiguous(rest // blocks * of_group + within, PER_LANE)
    return index // (groups * blocks), rest // blocks, rest % blocks, channel, within < of_group


@triton.jit
def _selective_summaries(
    x, dt, A, B, C, z, dt_bias, dy, products, ends, reverse_ends,
    count, length, chunk, offsets, sequence_of, first_of, width, groups, states,
    x_b, x_l, dt_b, dt_l, z_b, z_l, dy_b, dy_l,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, STATES: tl.constexpr,
    TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """P and E of a piece and, with REVERSE, R."""
    index, group, _, channel, inside = _channels_of_group(tl.program_id(0), width, groups, CHANNELS)
    _, batch, first, tokens, _ = piece(index, count, length, chunk, offsets, sequence_of, first_of)
    n = tl.arange(0, STATES)
    cell = n[:, None] * width + channel[None, :]
    known = (n[:, None] < states) & inside[None, :]
    a = tl.load(A + cell, known, other=0.0)
    bias = tl.zeros((CHANNELS,), tl.float32)
    if dt_bias is not None:
        bias += tl.load(dt_bias + channel, inside, other=0.0).to(tl.float32)
    product = tl.full((STATES, CHANNELS), 1.0, tl.float32)
    h = tl.zeros((STATES, CHANNELS), tl.float32)
    end = tl.zeros((STATES, CHANNELS), tl.float32)
    row, nothing = row_picker(TIME)
    for start in range(0, tokens, TIME):
        left = tokens - start
        at = first + start
        tile_x = load_tile(x + batch * x_b + at * x_l, x_l, channel, inside, left, TIME)
        tile_dt = load_tile(dt + batch * dt_b + at * dt_l, dt_l, channel, inside, left, TIME)
        step, _value = _step_sizes(tile_dt, bias, SOFTPLUS)
        step = tl.where(row < left, step, 0.0)
        update = step * tile_x
        if REVERSE:
            tile_dy = load_tile(dy + batch * dy_b + at * dy_l, dy_l, channel, inside, left, TIME)
            if z is not None:
                tile_dy *= _silu(load_tile(z + batch * z_b + at * z_l, z_l, channel, inside, left, TIME))
        shared = ((batch * length + at) * groups + group) * states + n
        for t in tl.static_range(TIME):
            here = (n < states) & (t < left)
            b_t = tl.load(B + shared + t * groups * states, here, other=0.0)
            decay = tl.exp2(a * tl.sum(tl.where(row == t, step, nothing), 0)[None, :])
            h = decay * h + b_t[:, None] * tl.sum(tl.where(row == t, update, nothing), 0)[None, :]
            product *= decay
            if REVERSE:
                c_t = tl.load(C + shared + t * groups * states, here, other=0.0)
                end += product * (c_t[:, None] * tl.sum(tl.where(row == t, tile_dy, nothing), 0)[None, :])
    place = index.to(tl.int64) * states * width + cell
    tl.store(products + place, product, known)
    tl.store(ends + place, h, known)
    if REVERSE:
        tl.store(reverse_ends + place, end, known)


@triton.jit
def _selective_scan(
    x, dt, A, B, C, D, z, dt_bias, before, y, final,
    count, length, chunk, offsets, sequence_of, first_of, width, groups, states,
    x_b, x_l, dt_b, dt_l, z_b, z_l,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr,
    TIME: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of a piece from the states before it; the last states into ``final`` where pieces are sequences."""
    index, group, _, channel, inside = _channels_of_group(tl.program_id(0), width, groups, CHANNELS)
    _, batch, first, tokens, _ = piece(index, count, length, chunk, offsets, sequence_of, first_of)
    n = tl.arange(0, STATES)
    cell = n[:, None] * width + channel[None, :]
    known = (n[:, None] < states) & inside[None, :]
    place = index.to(tl.int64) * states * width + cell
    a = tl.load(A + cell, known, other=0.0)
    bias = tl.zeros((CHANNELS,), tl.float32)
    if dt_bias is not None:
        bias += tl.load(dt_bias + channel, inside, other=0.0).to(tl.float32)
    skip = tl.zeros((CHANNELS,), tl.float32)
    if D is not None:
        skip += tl.load(D + channel, inside, other=0.0).to(tl.float32)
    h = tl.zeros((STATES, CHANNELS), tl.float32)
    if before is not None:
        h += tl.load(before + place, known, other=0.0)
    x += batch * x_b
    dt += batch * dt_b
    y += batch * length * width
    if z is not None:
        z += batch * z_b
    row, nothing = row_picker(TIME)
    # Two bytes a lane are too few for a copy that runs ahead by itself: the next tile waits in registers.
    next_x = load_tile(x + first * x_l, x_l, channel, inside, tokens, TIME)
    next_dt = load_tile(dt + first * dt_l, dt_l, channel, inside, tokens, TIME)
    next_z = next_x
    if z is not None:
        next_z = load_tile(z + first * z_l, z_l, channel, inside, tokens, TIME)
    for start in tl.range(0, tokens, TIME, num_stages=STAGES):
        left = tokens - start
        at = first + start
        tile_x, tile_dt, tile_z = next_x, next_dt, next_z
        next_x = load_tile(x + (at + TIME) * x_l, x_l, channel, inside, left - TIME, TIME)
        next_dt = load_tile(dt + (at + TIME) * dt_l, dt_l, channel, inside, left - TIME, TIME)
        if z is not None:
            next_z = load_tile(z + (at + TIME) * z_l, z_l, channel, inside, left - TIME, TIME)
        step, _value = _step_sizes(tile_dt, bias, SOFTPLUS)
        step = tl.where(row < left, step, 0.0)
        update = step * tile_x
        through = skip[None, :] * tile_x
        shared = ((batch * length + at) * groups + group) * states + n
        for t in tl.static_range(TIME):
            here = (n < states) & (t < left)
            b_t = tl.load(B + shared + t * groups * states, here, other=0.0)
            c_t = tl.load(C + shared + t * groups * states, here, other=0.0)
            decay = tl.exp2(a * tl.sum(tl.where(row == t, step, nothing), 0)[None, :])
            h = decay * h + b_t[:, None] * tl.sum(tl.where(row == t, update, nothing), 0)[None, :]
            y_t = tl.sum(h * c_t[:, None], 0) + tl.sum(tl.where(row == t, through, nothing), 0)
            if z is not None:
                y_t *= _silu(tl.sum(tl.where(row == t, tile_z, nothing), 0))
            tl.store(y + (at + t) * width + channel, y_t, inside & (t < left))
    if final is not None:
        tl.store(final + place, h, known)


@triton.jit
def _selective_backward(
    dy, x, dt, A, B, C, D, z, dt_bias, before, behind, history,
    dx, ddt, dz, dA, dB, dC, dD, dbias,
    total, programs, slots, count, length, chunk, offsets, sequence_of, first_of, width, groups, states,
    dy_b, dy_l, x_b, x_l, dt_b, dt_l, z_b, z_l,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
    TIME: tl.constexpr, PER_LANE: tl.constexpr,
):  # fmt: skip
    """All gradients of a piece, from the states before it and G behind it.

    The states at every TIME-th token go to ``history``, which is the program's own and stays in the L2 cache;
    on the way back those between are computed again and held in registers. Programs take piece after piece.
    """
    n = tl.arange(0, STATES)
    row, nothing = row_picker(TIME)
    slot_cell = n[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    history += tl.program_id(0).to(tl.int64) * slots * STATES * CHANNELS
    for number in range(tl.program_id(0), total, programs):
        index, group, block, channel, inside = _channels_of_group(number, width, groups, CHANNELS, PER_LANE)
        _, batch, first, tokens, _ = piece(index, count, length, chunk, offsets, sequence_of, first_of)
        cell = n[:, None] * width + channel[None, :]
        known = (n[:, None] < states) & inside[None, :]
        place = index.to(tl.int64) * states * width + cell
        a = tl.load(A + cell, known, other=0.0)
        bias = tl.zeros((CHANNELS,), tl.float32)
        if dt_bias is not None:
            bias += tl.load(dt_bias + channel, inside, other=0.0).to(tl.float32)
        skip = tl.zeros((CHANNELS,), tl.float32)
        if D is not None:
            skip += tl.load(D + channel, inside, other=0.0).to(tl.float32)
        h = tl.load(before + place, known, other=0.0)
        tl.debug_barrier()  # the history of the piece before has been read
        for start in range(0, tokens, TIME):
            tl.store(history + start // TIME * STATES * CHANNELS + slot_cell, h)
            left, at = tokens - start, first + start
            tile_x = load_tile(x + batch * x_b + at * x_l, x_l, channel, inside, left, TIME)
            tile_dt = load_tile(dt + batch * dt_b + at * dt_l, dt_l, channel, inside, left, TIME)
            step, value = _step_sizes(tile_dt, bias, SOFTPLUS)
            step = tl.where(row < left, step, 0.0)
            update = step * tile_x
            shared = ((batch * length + at) * groups + group) * states + n
            for t in tl.static_range(TIME):
                b_t = tl.load(B + shared + t * groups * states, (n < states) & (t < left), other=0.0)
                decay = tl.exp2(a * tl.sum(tl.where(row == t, step, nothing), 0)[None, :])
                h = decay * h + b_t[:, None] * tl.sum(tl.where(row == t, update, nothing), 0)[None, :]
        tl.debug_barrier()
        handed = tl.load(behind + place, known, other=0.0)
        sum_a = tl.zeros((STATES, CHANNELS), tl.float32)
        sum_skip = tl.zeros((CHANNELS,), tl.float32)
        sum_bias = tl.zeros((CHANNELS,), tl.float32)
        tiles = tl.cdiv(tokens, TIME)
        for done in range(0, tiles):
            start = (tiles - 1 - done) * TIME
            left, at = tokens - start, first + start
            tile_x = load_tile(x + batch * x_b + at * x_l, x_l, channel, inside, left, TIME)
            tile_dt = load_tile(dt + batch * dt_b + at * dt_l, dt_l, channel, inside, left, TIME)
            tile_dy = load_tile(dy + batch * dy_b + at * dy_l, dy_l, channel, inside, left, TIME)
            step, value = _step_sizes(tile_dt, bias, SOFTPLUS)
            step = tl.where(row < left, step, 0.0)
            update = step * tile_x
            slope = tl.where(row < left, 1.0, 0.0) + tl.zeros((TIME, CHANNELS), tl.float32)
            if SOFTPLUS:
                slope *= 1.0 / (1.0 + tl.exp2(value * -1.4426950408889634))
            gated = tile_dy
            if z is not None:
                tile_z = load_tile(z + batch * z_b + at * z_l, z_l, channel, inside, left, TIME)
                gate = 1.0 / (1.0 + tl.exp2(tile_z * -1.4426950408889634))
                gated = tile_dy * tile_z * gate
                gate_slope = tile_dy * gate * (1.0 + tile_z * (1.0 - gate))
            sum_skip += tl.sum(gated * tile_x, 0)
            shared = ((batch * length + at) * groups + group) * states + n
            h = tl.load(history + start // TIME * STATES * CHANNELS + slot_cell)
            states_before = ()
            decays = ()
            for t in tl.static_range(TIME):
                b_t = tl.load(B + shared + t * groups * states, (n < states) & (t < left), other=0.0)
                decay = tl.exp2(a * tl.sum(tl.where(row == t, step, nothing), 0)[None, :])
                states_before = states_before + (h,)  # type: ignore[assignment]  # noqa: RUF005
                decays = decays + (decay,)  # type: ignore[assignment]  # noqa: RUF005
                h = decay * h + b_t[:, None] * tl.sum(tl.where(row == t, update, nothing), 0)[None, :]
            for t in tl.static_range(TIME - 1, -1, -1):
                here = (n < states) & (t < left)
                b_t = tl.load(B + shared + t * groups * states, here, other=0.0)
                c_t = tl.load(C + shared + t * groups * states, here, other=0.0)
                x_t = tl.sum(tl.where(row == t, tile_x, nothing), 0)
                step_t = tl.sum(tl.where(row == t, step, nothing), 0)
                gated_t = tl.sum(tl.where(row == t, gated, nothing), 0)
                g = handed + c_t[:, None] * gated_t[None, :]
                partial = (
                    ((batch * length + at + t) * groups + group) * tl.cdiv(width // groups, CHANNELS) + block
                ) * states + n
                tl.store(dC + partial, tl.sum(h * gated_t[None, :], 1), here)
                tl.store(dB + partial, tl.sum(g * (step_t * x_t)[None, :], 1), here)
                through = tl.sum(g * b_t[:, None], 0)
                out = (batch * length + at + t) * width + channel
                exists = inside & (t < left)
                if z is not None:
                    y_t = tl.sum(h * c_t[:, None], 0) + skip * x_t
                    tl.store(dz + out, y_t * tl.sum(tl.where(row == t, gate_slope, nothing), 0), exists)
                tl.store(dx + out, through * step_t + skip * gated_t, exists)
                h = states_before[t]
                handed = g * decays[t]
                dexponent = handed * h
                sum_a += dexponent * step_t[None, :]
                dstep = through * x_t + tl.sum(dexponent * a, 0) * 0.6931471805599453
                dvalue = dstep * tl.sum(tl.where(row == t, slope, nothing), 0)
                sum_bias += dvalue
                tl.store(ddt + out, dvalue, exists)
        tl.store(dA + place, sum_a, known)
        tl.store(dD + index.to(tl.int64) * width + channel, sum_skip, inside)
        tl.store(dbias + index.to(tl.int64) * width + channel, sum_bias, inside)


def _states_label(arguments: dict[str, Any]) -> str:
    return f"states={arguments['STATES']}"


def _lanes(time: int, warps: int, **others: int) -> Configuration:
    """One channel a lane."""
    return Configuration({"TIME": time, "CHANNELS": 32 * warps, **others}, num_warps=warps, num_stages=1)


SELECTIVE_SUMMARIES = Kernel(
    "selective_scan_summaries",
    _selective_summaries,
    (_lanes(4, 1), _lanes(2, 1), _lanes(4, 2), _lanes(4, 4)),
    shape=_states_label,
)
SELECTIVE = Kernel(
    "selective_scan_forward",
    _selective_scan,
    (
        _lanes(8, 1, STAGES=2),
        _lanes(8, 2, STAGES=2),
        _lanes(8, 4, STAGES=2),
        _lanes(8, 1, STAGES=3),
        _lanes(4, 1, STAGES=3),
    ),
    shape=_states_label,
)
SELECTIVE_BACKWARD = Kernel(
    "selective_scan_backward",
    _selective_backward,
    tuple(
        Configuration({"TIME": time, "PER_LANE": channels}, num_warps=1, num_stages=1)
        for time, channels in ((2, 2), (2, 1), (4, 2), (2, 4), (4, 4))
    ),
    shape=_states_label,
)

MOST_STATES = 64
"""States of a channel that fit a lane's registers, if barely; calls with more go to the reference."""

BACKWARD_PROGRAMS = 2048
"""Programs of the backward pass at most: enough to fill a GPU, and few enough that all their histories stay
in the L2 cache."""


@dataclass(frozen=True)
class _Selective:
    """A call's tensors as the kernels take them: A (N, D) over log 2; B, C (B, L, G, N) float32."""

    tensors: dict[str, Tensor | None]
    sizes: dict[str, Any]

    @staticmethod
    def of(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor | None,
        dt_bias: Tensor | None,
        dt_softplus: bool,
    ) -> _Selective:
        groups = B.shape[2] if B.dim() == 4 else 1
        tensors = {
            "x": rows(x), "dt": rows(dt), "A": (A.float() * 1.4426950408889634).t().contiguous(),
            "B": B.float().contiguous(), "C": C.float().contiguous(),
            "z": None if z is None else rows(z), "dt_bias": contiguous(dt_bias),
        }  # fmt: skip
        sizes = {
            "width": x.shape[2], "groups": groups, "states": A.shape[1],
            "SOFTPLUS": dt_softplus, "STATES": triton.next_power_of_2(A.shape[1]),
            **token_strides(x=tensors["x"], dt=tensors["dt"], z=tensors["z"]),
        }  # fmt: skip
        return _Selective(tensors, sizes)

    def blocks(self, channels: int) -> int:
        """Blocks of channels in all groups."""
        groups: int = self.sizes["groups"]
        return groups * cdiv(self.sizes["width"] // groups, channels)

    def grid(self, pieces: Pieces) -> Any:
        return lambda blocks: (pieces.total * self.blocks(blocks["CHANNELS"]),)

    def pass_states(
        self, pieces: Pieces, summaries: tuple[Tensor, Tensor], first_state: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """The states before every piece, in place of the second summary, and the last ones (S, N, D)."""
        products, ends = summaries
        width = self.sizes["states"] * self.sizes["width"]
        last = floats(products, pieces.sequences, self.sizes["states"], self.sizes["width"])
        CARRIES.launch(
            _grid(pieces.sequences, width),
            products=products, ends=ends, first_state=first_state, before=ends, last_state=last,
            count=pieces.arguments["count"], offsets=pieces.arguments["offsets"], starts=pieces.starts,
            chunk=pieces.arguments["chunk"], width=width, REVERSE=reverse,
        )  # fmt: skip
        return ends, last

    def summaries(self, pieces: Pieces, dy: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """P, E and, given dy, R of every piece, each (pieces, N, D)."""
        x = self.tensors["x"]
        assert x is not None
        shape = (pieces.total, self.sizes["states"], self.sizes["width"])
        products, ends = floats(x, *shape), floats(x, *shape)
        reverse_ends = None if dy is None else floats(x, *shape)
        SELECTIVE_SUMMARIES.launch(
            self.grid(pieces),
            **self.tensors, dy=dy, products=products, ends=ends, reverse_ends=reverse_ends,
            **pieces.arguments, **self.sizes, **token_strides(dy=dy), REVERSE=dy is not None,
        )  # fmt: skip
        return products, ends, reverse_ends


def _turned(state: Tensor | None) -> Tensor | None:
    """A state (S, D, N) as the kernels hold it, (S, N, D), in float32."""
    return None if state is None else state.float().transpose(1, 2).contiguous()


def _selective(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    given = _Selective.of(x, dt, A, B, C, z, dt_bias, dt_softplus)
    pieces = cut(x, cu_seqlens, given.blocks(32))
    before = _turned(initial_state)
    final = floats(x, pieces.sequences, A.shape[1], x.shape[2])
    if not pieces.whole:
        products, ends, _ = given.summaries(pieces, None)
        before, final = given.pass_states(pieces, (products, ends), before, reverse=False)
    SELECTIVE.launch(
        given.grid(pieces),
        **given.tensors, D=contiguous(D), before=before, y=y, final=final if pieces.whole else None,
        **pieces.arguments, **given.sizes,
    )  # fmt: skip
    return y, final.transpose(1, 2).contiguous()


def _selective_gradients(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    given = _Selective.of(x, dt, A, B, C, z, dt_bias, dt_softplus)
    (batch, length, width), states, groups = x.shape, A.shape[1], given.sizes["groups"]
    dy = rows(dy)
    pieces = cut(x, cu_seqlens, given.blocks(32), chunk=SHORTEST)
    products, ends, reverse_ends = given.summaries(pieces, dy)
    before, _ = given.pass_states(pieces, (products, ends), _turned(initial_state), reverse=False)
    assert reverse_ends is not None
    behind, dinitial = given.pass_states(
        pieces, (products, reverse_ends), _turned(dfinal_state), reverse=True
    )
    dx, ddt = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    dz = torch.empty((0,) if z is None else x.shape, dtype=x.dtype, device=x.device)
    dA = products  # nobody needs the decays any more
    dD, dbias = floats(x, pieces.total, width), floats(x, pieces.total, width)
    blocks = given.blocks(32) // groups
    dB, dC = (floats(x, batch, length, groups, blocks, states) for _ in range(2))
    total = pieces.total * groups * blocks
    programs, slots = min(total, BACKWARD_PROGRAMS), SHORTEST // 2
    history = floats(x, programs * slots * given.sizes["STATES"] * 32)
    SELECTIVE_BACKWARD.launch(
        lambda blocks: (programs,),
        **given.tensors, dy=dy, D=contiguous(D), before=before, behind=behind, history=history,
        dx=dx, ddt=ddt, dz=dz, dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias,
        total=total, programs=programs, slots=slots, **pieces.arguments, **given.sizes,
        **token_strides(dy=dy), CHANNELS=32,
    )  # fmt: skip
    of_tokens = (dB.sum(3).reshape(B.shape).to(B.dtype), dC.sum(3).reshape(C.shape).to(C.dtype))
    return (
        dx,
        ddt,
        dA.sum(0).t().contiguous(),
        *of_tokens,
        dD.sum(0),
        dz,
        dbias.sum(0),
        dinitial.transpose(1, 2).contiguous(),
    )


def _selective_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.dt_softplus, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _selective_autograd(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = SELECTIVE_GRADIENTS(
        dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, initial_state, cu_seqlens
    )
    parameters = like(dA, A), dB, dC, like(dD, D), None if z is None else dz, like(dbias, dt_bias)
    return dx, ddt, *parameters, None, like(dstate, initial_state), None


_SELECTIVE_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? initial_state, Tensor? cu_seqlens"
)
SELECTIVE_GRADIENTS = Operator(
    "selective_scan_backward",
    f"(Tensor dy, Tensor? dfinal_state, {_SELECTIVE_ARGUMENTS}) -> ({', '.join(['Tensor'] * 9)})",
    _selective_gradients,
)
SELECTIVE_SCAN = Operator("selective_scan", f"({_SELECTIVE_ARGUMENTS}) -> (Tensor, Tensor)", _selective)
SELECTIVE_SCAN.differentiate(_selective_autograd, _selective_setup, partner=SELECTIVE_GRADIENTS)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.selective_scan`. More than 64 states a channel go to the reference."""
    if A.shape[1] > MOST_STATES:
        form: Any = dispatch.form("selective_scan", "reference")
        result: Tensor | tuple[Tensor, Tensor] = form(
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            dt_softplus=dt_softplus,
            initial_state=initial_state,
            return_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
        )
        return result
    y, final_state = SELECTIVE_SCAN(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    return (y, final_state) if return_final_state else y


SELECTIVE_SCAN.register(selective_scan)
