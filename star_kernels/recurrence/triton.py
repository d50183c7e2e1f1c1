"""The recurrences in Triton: the linear scan and, imported here, all others of the family.

    h_t = decay_t ⊙ h_{t-1} + x_t

One program walks: it holds the state of a block of channels in registers, two neighbouring channels a lane,
and takes token after token, so that every input is read once and nothing is exchanged between threads. Copies
of tiles into shared memory run STAGES tiles ahead. Only a sequence's last tile has masks for tokens.

Where programs would be too few, sequences are walked in pieces (see
:mod:`star_kernels.recurrence.triton_blocks`), P = Π decay_t and E the last state from zero; inputs are then
read twice.

Backward, G being the gradient of the state that a token hands on:

    g_t = dh_t + G_t,   dx_t = g_t,   ddecay_t = g_t ⊙ h_{t-1},   G_{t-1} = decay_t ⊙ g_t

which is the same walk from the last token to the first, and the same pieces: P is the same, and from zero a
piece hands on R = Σ_t (Π_{s<=t} decay_s) ⊙ dh_t.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.compiled import like
from star_kernels.launch import Configuration, Kernel, Operator, cdiv, rows
from star_kernels.recurrence import triton_cells as triton_cells
from star_kernels.recurrence import triton_delta_rule as triton_delta_rule
from star_kernels.recurrence import triton_linear_attention as triton_linear_attention
from star_kernels.recurrence import triton_selective as triton_selective
from star_kernels.recurrence.triton_blocks import (
    Pieces,
    contiguous,
    cut,
    floats,
    grid_of,
    pass_states,
    piece,
    row_picker,
    token_strides,
)


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
        initial += tl.maximum(sequence, 0).to(tl.int64) * width
        state += tl.load(initial + channel, channel < width, other=0.0).to(tl.float32)
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
SCAN_BACKWARD = Kernel(
    "linear_scan_backward",
    _scan_backward,
    (_walk(8, 1, 8), _walk(8, 1, 6), _walk(8, 2, 8), _walk(16, 1, 5), _walk(16, 2, 5)),
)


def _pass_states(
    pieces: Pieces, decay: Tensor, x: Tensor, first_state: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The states before every piece, (pieces, D), and behind every sequence, in the order of the walk."""
    width = x.shape[2]
    products, ends = floats(x, pieces.total, width), floats(x, pieces.total, width)
    SUMMARIES.launch(
        grid_of(pieces.total, width),
        decay=decay, x=x, products=products, ends=ends, **pieces.arguments, width=width,
        **token_strides(decay=decay, x=x), REVERSE=reverse,
    )  # fmt: skip
    return pass_states(pieces, products, ends, first_state, reverse=reverse)


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
        grid_of(pieces.total, width),
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
        grid_of(pieces.total, width),
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
