"""The selective scan (Mamba, arXiv 2312.00752) in Triton.

    h_t = exp(dt_t A) ⊙ h_{t-1} + dt_t x_t B_t,   y_t = (h_t·C_t + D ⊙ x_t) ⊙ silu(z_t)

Forward, one program walks, a channel a lane, all N states of the channel in the lane's registers: a state
costs one exponential and four multiplications a token, and sums over states need no other lane. The next TIME
tokens of x, dt and z wait in registers; B and C, which all lanes share, come through shared memory, copied
ahead. Where programs would be too few, sequences are walked in pieces (see
:mod:`star_kernels.recurrence.triton_blocks`).

Backward, G being the gradient of the state that a token hands on, dy that of y before its gate, a the decay:

    g_t = G_t + C_t dy_t,   dC_t = Σ_channels h_t dy_t,   dB_t = Σ_channels g_t dt_t x_t,   G_{t-1} = a_t g_t
    d(dt_t A) = a_t g_t h_{t-1},   dx_t = dt_t Σ_states g_t B_t + D dy_t

in pieces, always: g needs every h, which is computed again from the state before its piece. One pass over all
pieces makes P and E and, from the same exponentials, R = Σ_t (Π_{s<=t} a_s) C_t dy_t, with which gradients
are passed from piece to piece; a second one makes all gradients. Sums over channels leave one partial sum a
block of channels, sums over tokens one a piece; they are added at the end, in a fixed order.
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
from star_kernels.launch import Configuration, Kernel, Operator, cdiv, rows
from star_kernels.recurrence.triton_blocks import (
    SHORTEST,
    Pieces,
    contiguous,
    cut,
    floats,
    load_tile,
    pass_states,
    piece,
    row_picker,
    token_strides,
)


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
            parts = tl.cdiv(width // groups, CHANNELS)
            partial = (((batch * length + at) * groups + group) * parts + block) * states + n
            out = (batch * length + at) * width + channel
            for t in tl.static_range(TIME):
                here = (n < states) & (t < left)
                b_t = tl.load(B + shared + t * groups * states, here, other=0.0)
                c_t = tl.load(C + shared + t * groups * states, here, other=0.0)
                decay = tl.exp2(a * tl.sum(tl.where(row == t, step, nothing), 0)[None, :])
                states_before = states_before + (h,)  # type: ignore[assignment]  # noqa: RUF005
                decays = decays + (decay,)  # type: ignore[assignment]  # noqa: RUF005
                h = decay * h + b_t[:, None] * tl.sum(tl.where(row == t, update, nothing), 0)[None, :]
                # What needs the state behind a token is done here, so that it need not wait in registers.
                gated_t = tl.sum(tl.where(row == t, gated, nothing), 0)
                tl.store(dC + partial + t * groups * parts * states, tl.sum(h * gated_t[None, :], 1), here)
                if z is not None:
                    y_t = tl.sum(h * c_t[:, None], 0) + skip * tl.sum(tl.where(row == t, tile_x, nothing), 0)
                    dz_t = y_t * tl.sum(tl.where(row == t, gate_slope, nothing), 0)
                    tl.store(dz + out + t * width, dz_t, inside & (t < left))
            for t in tl.static_range(TIME - 1, -1, -1):
                here = (n < states) & (t < left)
                b_t = tl.load(B + shared + t * groups * states, here, other=0.0)
                c_t = tl.load(C + shared + t * groups * states, here, other=0.0)
                x_t = tl.sum(tl.where(row == t, tile_x, nothing), 0)
                step_t = tl.sum(tl.where(row == t, step, nothing), 0)
                gated_t = tl.sum(tl.where(row == t, gated, nothing), 0)
                g = handed + c_t[:, None] * gated_t[None, :]
                db_t = tl.sum(g * (step_t * x_t)[None, :], 1)
                tl.store(dB + partial + t * groups * parts * states, db_t, here)
                through = tl.sum(g * b_t[:, None], 0)
                exists = inside & (t < left)
                tl.store(dx + out + t * width, through * step_t + skip * gated_t, exists)
                if t == 0:  # the history has it: it need not wait in registers
                    h = tl.load(history + start // TIME * STATES * CHANNELS + slot_cell)
                else:
                    h = states_before[t]
                handed = g * decays[t]
                dexponent = handed * h
                sum_a += dexponent * step_t[None, :]
                dstep = through * x_t + tl.sum(dexponent * a, 0) * 0.6931471805599453
                dvalue = dstep * tl.sum(tl.where(row == t, slope, nothing), 0)
                sum_bias += dvalue
                tl.store(ddt + out + t * width, dvalue, exists)
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


def _backward_configuration(time: int, channels: int) -> Configuration:
    return Configuration({"TIME": time, "PER_LANE": channels}, num_warps=1, num_stages=1)


_BACKWARD = tuple(_backward_configuration(*sizes) for sizes in ((2, 2), (2, 1), (2, 4), (4, 2), (4, 4)))


def _aligned(sizes: dict[str, Any]) -> bool:
    """Whether the compiler sees that two neighbouring channels may be loaded at once."""
    return bool(sizes["width"] % 16 == 0 and sizes["groups"] == 1)


def _least_time(sizes: dict[str, Any]) -> int:
    """Tokens between two states in the history: where a lane has a channel for itself, fewer fit."""
    return 2 if _aligned(sizes) else 1


def _backward_choice(sizes: dict[str, Any]) -> Configuration:
    if _aligned(sizes):
        return _BACKWARD[0]
    return _backward_configuration(1 if sizes["STATES"] > 2 else 2, 1)


SELECTIVE_BACKWARD = Kernel(
    "selective_scan_backward",
    _selective_backward,
    _BACKWARD,
    shape=lambda arguments: f"{_states_label(arguments)}{'' if _aligned(arguments) else ',unaligned'}",
    choose=_backward_choice,
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
        before, final = pass_states(pieces, products, ends, before, reverse=False)
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
    before, _ = pass_states(pieces, products, ends, _turned(initial_state), reverse=False)
    assert reverse_ends is not None
    behind, dinitial = pass_states(pieces, products, reverse_ends, _turned(dfinal_state), reverse=True)
    dx, ddt = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    dz = torch.empty((0,) if z is None else x.shape, dtype=x.dtype, device=x.device)
    dA = products  # nobody needs the decays any more
    dD, dbias = floats(x, pieces.total, width), floats(x, pieces.total, width)
    blocks = given.blocks(32) // groups
    dB, dC = (floats(x, batch, length, groups, blocks, states) for _ in range(2))
    total = pieces.total * groups * blocks
    programs, slots = min(total, BACKWARD_PROGRAMS), SHORTEST // _least_time(given.sizes)
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
