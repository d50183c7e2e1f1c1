"""The GRU and the LSTM with diagonal recurrent weights in Triton: parallel over the length where that pays.

Both are s_t = f_t(s_{t-1}), every channel for itself; the GRU's state s is h, the LSTM's (c, h).

**In parallel** (ParaRNN, arXiv 2510.21450). A program has a block of channels and takes TIME tokens at a
time. All their states are unknowns of one system, which Newton's method solves: with p_t a guess of the state
before token t and J_t = f_t'(p_t), the next guess solves the linear recurrence

    s_t = J_t s_{t-1} + (f_t(p_t) - J_t p_t),

an associative scan over the block. J is a number for the GRU and 2x2 for the LSTM. States can't leave
[-b, b], b = max(1, |state before|), so guesses are cut off there. A program iterates until no state of its
block changes by more than ``tolerance``, which it finds out by itself: nothing waits for the host.

**Fallback.** What has not converged after ``max_iterations`` (or is not finite) is computed by the sequential
loop, inside the same kernel. So the result is always that of the sequential loop.

**One after another.** With thousands of channels a GPU is full without Newton's iterations, which would only
multiply the work; and a few tokens are not worth them. Then one program walks, a channel a lane.

Backward, λ_t being the gradient of s_t: λ_t = ds_t + J_{t+1}ᵀ λ_{t+1}, linear, so one scan a block of tokens
and no iteration. States are computed again, in float32. All else is a function of one token:

    GRU:  z and r before σ: λ(k - h)z(1 - z), κ aₕ h r(1 - r);  k before tanh: κ = λ z(1 - k²)
    LSTM: γ = λ_c + λ_h o(1 - tanh² c'):  f, o before σ: γ(c - z)f(1 - f), λ_h tanh(c') o(1 - o);
          z before tanh: γ(1 - f)(1 - z²)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.compiled import like
from star_kernels.launch import INTERPRETED, Configuration, Kernel, Operator, rows
from star_kernels.recurrence.triton_blocks import (
    contiguous,
    floats,
    grid_of,
    load_tile,
    row_picker,
    token_strides,
)

FILLED = 6144
"""Channels of all sequences together from which on programs that walk fill a data-centre GPU."""

FEW = 8 if INTERPRETED else 32
"""Tokens below which a walk is the faster form; in the interpreter, where tests are slow, fewer."""


@triton.jit
def _sigmoid(x):
    # For x far below 0, exp2 gives infinity and the quotient 0, as it should be.
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) with e = exp(-2 |x|) loses the digits of a small x: there the series.
    square = x * x
    tail = square * (0.021869488536155203 - square * 0.008863235529902197)
    tail = 0.05396825396825397 - tail
    series = 1.0 - square * (0.3333333333333333 - square * (0.13333333333333333 - square * tail))
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)
    magnitude = (1.0 - small) / (1.0 + small)
    return tl.where(square < 0.12, x * series, tl.where(x < 0.0, -magnitude, magnitude))


# The cells: x1, x2, x3 and a1, a2, a3 are inputs and weights in the order of the public function.


@triton.jit
def _gru(x1, x2, x3, a1, a2, a3, h):
    z = _sigmoid(x1 + a1 * h)
    r = _sigmoid(x2 + a2 * h)
    # In this order r is all that is waited for.
    k = _tanh(x3 + r * (a3 * h))
    return z, r, k, h + z * (k - h)


@triton.jit
def _gru_slope(a1, a2, a3, h, z, r, k):
    """J."""
    through_k = z * (1.0 - k * k) * a3 * (r + h * a2 * r * (1.0 - r))
    return (1.0 - z) + (k - h) * a1 * z * (1.0 - z) + through_k


@triton.jit
def _lstm(x1, x2, x3, a1, a2, a3, c, h):
    f = _sigmoid(x1 + a1 * h)
    o = _sigmoid(x2 + a2 * h)
    z = _tanh(x3 + a3 * h)
    after = z + f * (c - z)
    bent = _tanh(after)
    return f, o, z, after, bent, o * bent


@triton.jit
def _lstm_slopes(a1, a2, a3, c, f, o, z, bent):
    """J, row by row: ∂c'/∂c, ∂c'/∂h, ∂h'/∂c, ∂h'/∂h."""
    c_of_h = (c - z) * a1 * f * (1.0 - f) + (1.0 - f) * a3 * (1.0 - z * z)
    steep = o * (1.0 - bent * bent)
    return f, c_of_h, steep * f, a2 * o * (1.0 - o) * bent + steep * c_of_h


@triton.jit
def _after(a_first, b_first, a_then, b_then):
    """Two affine maps, one after the other."""
    return a_then * a_first, a_then * b_first + b_then


@triton.jit
def _after2(p1, q1, r1, s1, b1, d1, p2, q2, r2, s2, b2, d2):
    """The same in two dimensions: (c, h) -> (p c + q h + b, r c + s h + d)."""
    return (
        p2 * p1 + q2 * r1,
        p2 * q1 + q2 * s1,
        r2 * p1 + s2 * r1,
        r2 * q1 + s2 * s1,
        p2 * b1 + q2 * d1 + b2,
        r2 * b1 + s2 * d1 + d2,
    )


@triton.jit
def _shifted(tile, first, row):
    """The rows of a tile one later, ``first`` (C,) before them."""
    before = tl.gather(tile, tl.broadcast_to(tl.maximum(row - 1, 0), tile.shape), 0)
    return tl.where(row == 0, first[None, :], before)


@triton.jit
def _last(tile, row, TIME: tl.constexpr):
    return tl.sum(tl.where(row == TIME - 1, tile, 0.0), 0)


@triton.jit
def _load_vector(pointer, at, inside):
    return tl.load(pointer + at, inside, other=0.0).to(tl.float32)


@triton.jit
def _state(pointer, at, inside, CHANNELS: tl.constexpr):
    state = tl.zeros((CHANNELS,), tl.float32)
    if pointer is not None:
        state += tl.load(pointer + at, inside, other=0.0).to(tl.float32)
    return state


@triton.jit
def _step(x1, x2, x3, x1_l, x2_l, x3_l, a1, a2, a3, c, h, token, channel, inside, LSTM: tl.constexpr):
    """The state after one token, read from memory."""
    i1 = _load_vector(x1 + token * x1_l, channel, inside)
    i2 = _load_vector(x2 + token * x2_l, channel, inside)
    i3 = _load_vector(x3 + token * x3_l, channel, inside)
    if LSTM:
        _f, _o, _z, c, _bent, h = _lstm(i1, i2, i3, a1, a2, a3, c, h)
    else:
        _z, _r, _k, h = _gru(i1, i2, i3, a1, a2, a3, h)
    return c, h


@triton.jit
def _solve_gru(i1, i2, i3, a1, a2, a3, h0, left, tolerance, most, TIME: tl.constexpr, CHANNELS: tl.constexpr):
    """The states of a block of tokens, and how many have not converged."""
    row = tl.arange(0, TIME)[:, None]
    exists = (row < left) & (tl.arange(0, CHANNELS)[None, :] >= 0)
    bound = tl.maximum(tl.abs(h0), 1.0)[None, :]
    h = tl.zeros((TIME, CHANNELS), tl.float32) + h0[None, :]
    wrong = 1
    iteration = 0
    while (iteration < most) & (wrong > 0):
        guess = _shifted(h, h0, row)
        z, r, k, value = _gru(i1, i2, i3, a1[None, :], a2[None, :], a3[None, :], guess)
        slope = _gru_slope(a1[None, :], a2[None, :], a3[None, :], guess, z, r, k)
        # The state before the block is no unknown; behind the end, states stay.
        slope = tl.where(exists, tl.where(row == 0, 0.0, slope), 1.0)
        offset = tl.where(exists, value - slope * guess, 0.0)
        _product, solved = tl.associative_scan((slope, offset), 0, _after)
        # "not smaller" counts what is not a number as well.
        far = tl.where((tl.abs(solved - h) <= tolerance) | (row >= left), 0, 1)
        wrong = tl.sum(tl.sum(far, 1), 0)
        h = tl.minimum(tl.maximum(solved, -bound), bound)
        iteration += 1
    return h, wrong


@triton.jit
def _solve_lstm(
    i1, i2, i3, a1, a2, a3, c0, h0, left, tolerance, most, TIME: tl.constexpr, CHANNELS: tl.constexpr
):
    """The states of a block of tokens, and how many have not converged."""
    row = tl.arange(0, TIME)[:, None]
    exists = (row < left) & (tl.arange(0, CHANNELS)[None, :] >= 0)
    c_bound = tl.maximum(tl.abs(c0), 1.0)[None, :]
    c = tl.zeros((TIME, CHANNELS), tl.float32) + c0[None, :]
    h = tl.zeros((TIME, CHANNELS), tl.float32) + h0[None, :]
    wrong = 1
    iteration = 0
    while (iteration < most) & (wrong > 0):
        c_guess = _shifted(c, c0, row)
        h_guess = _shifted(h, h0, row)
        f, o, z, c_value, bent, h_value = _lstm(
            i1, i2, i3, a1[None, :], a2[None, :], a3[None, :], c_guess, h_guess
        )
        p, q, r, s = _lstm_slopes(a1[None, :], a2[None, :], a3[None, :], c_guess, f, o, z, bent)
        # The state before the block is no unknown; behind the end, states stay.
        unknown = row > 0
        p = tl.where(exists, tl.where(unknown, p, 0.0), 1.0)
        q = tl.where(exists & unknown, q, 0.0)
        r = tl.where(exists & unknown, r, 0.0)
        s = tl.where(exists, tl.where(unknown, s, 0.0), 1.0)
        c_offset = tl.where(exists, c_value - p * c_guess - q * h_guess, 0.0)
        h_offset = tl.where(exists, h_value - r * c_guess - s * h_guess, 0.0)
        _p, _q, _r, _s, c_solved, h_solved = tl.associative_scan((p, q, r, s, c_offset, h_offset), 0, _after2)
        # "not smaller" counts what is not a number as well.
        near = (tl.abs(c_solved - c) <= tolerance) & (tl.abs(h_solved - h) <= tolerance)
        wrong = tl.sum(tl.sum(tl.where(near | (row >= left), 0, 1), 1), 0)
        c = tl.minimum(tl.maximum(c_solved, -c_bound), c_bound)
        h = tl.minimum(tl.maximum(h_solved, -1.0), 1.0)
        iteration += 1
    return c, h, wrong


@triton.jit
def _solve(
    x1, x2, x3, a1, a2, a3, initial_c, initial_h, cs, hs, final_c, final_h,
    length, width, tolerance, most,
    x1_b, x1_l, x2_b, x2_l, x3_b, x3_l,
    LSTM: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Newton's method on TIME tokens after TIME tokens of a sequence; ``cs`` where the caller wants c too."""
    blocks = tl.cdiv(width, CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    x1 += batch * x1_b
    x2 += batch * x2_b
    x3 += batch * x3_b
    a1 = _load_vector(a1, channel, inside)
    a2 = _load_vector(a2, channel, inside)
    a3 = _load_vector(a3, channel, inside)
    c = _state(initial_c, batch * width + channel, inside, CHANNELS)
    h = _state(initial_h, batch * width + channel, inside, CHANNELS)
    row = tl.arange(0, TIME)[:, None]
    for start in range(0, length, TIME):
        left = length - start
        at = (batch * 0) + start
        i1 = load_tile(x1 + at * x1_l, x1_l, channel, inside, left, TIME)
        i2 = load_tile(x2 + at * x2_l, x2_l, channel, inside, left, TIME)
        i3 = load_tile(x3 + at * x3_l, x3_l, channel, inside, left, TIME)
        known = (row < left) & inside[None, :]
        out = (batch * length + at) * width + (row * width + channel[None, :])
        if LSTM:
            tile_c, tile_h, wrong = _solve_lstm(
                i1, i2, i3, a1, a2, a3, c, h, left, tolerance, most, TIME, CHANNELS
            )
        else:
            tile_h, wrong = _solve_gru(i1, i2, i3, a1, a2, a3, h, left, tolerance, most, TIME, CHANNELS)
        if wrong == 0:
            tl.store(hs + out, tile_h, known)
            h = _last(tile_h, row, TIME)
            if LSTM:
                if cs is not None:
                    tl.store(cs + out, tile_c, known)
                c = _last(tile_c, row, TIME)
        else:
            for token in range(0, tl.minimum(left, TIME)):
                c, h = _step(
                    x1, x2, x3, x1_l, x2_l, x3_l, a1, a2, a3, c, h, at + token, channel, inside, LSTM
                )
                one = (batch * length + at + token) * width + channel
                tl.store(hs + one, h, inside)
                if cs is not None:
                    tl.store(cs + one, c, inside)
    tl.store(final_h + batch * width + channel, h, inside)
    if LSTM:
        tl.store(final_c + batch * width + channel, c, inside)


@triton.jit
def _walk(
    x1, x2, x3, a1, a2, a3, initial_c, initial_h, cs, hs, final_c, final_h,
    length, width,
    x1_b, x1_l, x2_b, x2_l, x3_b, x3_l,
    LSTM: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The sequential loop, a channel a lane; the next TIME tokens wait in registers."""
    blocks = tl.cdiv(width, CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.max_contiguous(tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS), 1)
    inside = channel < width
    x1 += batch * x1_b
    x2 += batch * x2_b
    x3 += batch * x3_b
    a1 = _load_vector(a1, channel, inside)
    a2 = _load_vector(a2, channel, inside)
    a3 = _load_vector(a3, channel, inside)
    c = _state(initial_c, batch * width + channel, inside, CHANNELS)
    h = _state(initial_h, batch * width + channel, inside, CHANNELS)
    row, nothing = row_picker(TIME)
    next1 = load_tile(x1, x1_l, channel, inside, length, TIME)
    next2 = load_tile(x2, x2_l, channel, inside, length, TIME)
    next3 = load_tile(x3, x3_l, channel, inside, length, TIME)
    for start in range(0, length, TIME):
        i1, i2, i3 = next1, next2, next3
        left = length - start
        at = (batch * 0) + start
        next1 = load_tile(x1 + (at + TIME) * x1_l, x1_l, channel, inside, left - TIME, TIME)
        next2 = load_tile(x2 + (at + TIME) * x2_l, x2_l, channel, inside, left - TIME, TIME)
        next3 = load_tile(x3 + (at + TIME) * x3_l, x3_l, channel, inside, left - TIME, TIME)
        for t in tl.static_range(TIME):
            t1 = tl.sum(tl.where(row == t, i1, nothing), 0)
            t2 = tl.sum(tl.where(row == t, i2, nothing), 0)
            t3 = tl.sum(tl.where(row == t, i3, nothing), 0)
            here = inside & (t < left)
            out = (batch * length + at + t) * width + channel
            if LSTM:
                _f, _o, _z, c_new, _bent, h_new = _lstm(t1, t2, t3, a1, a2, a3, c, h)
                c = tl.where(t < left, c_new, c)
                if cs is not None:
                    tl.store(cs + out, c, here)
            else:
                _z, _r, _k, h_new = _gru(t1, t2, t3, a1, a2, a3, h)
            h = tl.where(t < left, h_new, h)
            tl.store(hs + out, h, here)
    tl.store(final_h + batch * width + channel, h, inside)
    if LSTM:
        tl.store(final_c + batch * width + channel, c, inside)


@triton.jit
def _gradients(
    dh, dfinal_c, dfinal_h, x1, x2, x3, a1, a2, a3, initial_c, initial_h, cs, hs,
    dx1, dx2, dx3, da1, da2, da3, dinitial_c, dinitial_h,
    length, width,
    dh_b, dh_l, x1_b, x1_l, x2_b, x2_l, x3_b, x3_l,
    LSTM: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """All gradients of a sequence's channels, TIME tokens before TIME tokens; row 0 is the latest."""
    blocks = tl.cdiv(width, CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < width
    place = batch * width + channel
    a1 = _load_vector(a1, channel, inside)[None, :]
    a2 = _load_vector(a2, channel, inside)[None, :]
    a3 = _load_vector(a3, channel, inside)[None, :]
    c0 = _state(initial_c, place, inside, CHANNELS)
    h0 = _state(initial_h, place, inside, CHANNELS)
    handed_c = _state(dfinal_c, place, inside, CHANNELS)
    handed_h = _state(dfinal_h, place, inside, CHANNELS)
    sum1 = tl.zeros((CHANNELS,), tl.float32)
    sum2 = tl.zeros((CHANNELS,), tl.float32)
    sum3 = tl.zeros((CHANNELS,), tl.float32)
    row = tl.arange(0, TIME)[:, None]
    for start in range(0, length, TIME):
        left = length - start
        last = (batch * 0) + left - 1
        known = (row < left) & inside[None, :]
        before = (row < left - 1) & inside[None, :]
        out = (batch * length + last) * width + (channel[None, :] - row * width)
        i1 = load_tile(x1 + batch * x1_b + last * x1_l, -x1_l, channel, inside, left, TIME)
        i2 = load_tile(x2 + batch * x2_b + last * x2_l, -x2_l, channel, inside, left, TIME)
        i3 = load_tile(x3 + batch * x3_b + last * x3_l, -x3_l, channel, inside, left, TIME)
        given = load_tile(dh + batch * dh_b + last * dh_l, -dh_l, channel, inside, left, TIME)
        h = tl.load(hs + out - width, before, other=0.0)
        h += tl.where(row == left - 1, h0[None, :], 0.0)
        if LSTM:
            c = tl.load(cs + out - width, before, other=0.0)
            c += tl.where(row == left - 1, c0[None, :], 0.0)
            f, o, z, _c_after, bent, _h_after = _lstm(i1, i2, i3, a1, a2, a3, c, h)
            p, q, r, s = _lstm_slopes(a1, a2, a3, c, f, o, z, bent)
            # Handed on is Jᵀ (λ_c, λ_h); before the first token it stays.
            c_offset = tl.where(known, r * given, 0.0)
            h_offset = tl.where(known, s * given, 0.0)
            p = tl.where(row < left, p, 1.0)
            q = tl.where(row < left, q, 0.0)
            r = tl.where(row < left, r, 0.0)
            s = tl.where(row < left, s, 1.0)
            c_offset += tl.where(row == 0, p * handed_c[None, :] + r * handed_h[None, :], 0.0)
            h_offset += tl.where(row == 0, q * handed_c[None, :] + s * handed_h[None, :], 0.0)
            _p, _q, _r, _s, c_out, h_out = tl.associative_scan((p, r, q, s, c_offset, h_offset), 0, _after2)
            lambda_c = _shifted(c_out, handed_c, row)
            lambda_h = given + _shifted(h_out, handed_h, row)
            handed_c = _last(c_out, row, TIME)
            handed_h = _last(h_out, row, TIME)
            gamma = lambda_c + lambda_h * o * (1.0 - bent * bent)
            d1 = gamma * (c - z) * f * (1.0 - f)
            d2 = lambda_h * bent * o * (1.0 - o)
            d3 = gamma * (1.0 - f) * (1.0 - z * z)
            through3 = d3 * h
        else:
            z, r, k, _after_token = _gru(i1, i2, i3, a1, a2, a3, h)
            slope = tl.where(row < left, _gru_slope(a1, a2, a3, h, z, r, k), 1.0)
            offset = tl.where(known, slope * given, 0.0)
            offset += tl.where(row == 0, slope * handed_h[None, :], 0.0)
            _product, h_out = tl.associative_scan((slope, offset), 0, _after)
            adjoint = given + _shifted(h_out, handed_h, row)
            handed_h = _last(h_out, row, TIME)
            d1 = adjoint * (k - h) * z * (1.0 - z)
            d3 = adjoint * z * (1.0 - k * k)
            d2 = d3 * a3 * h * r * (1.0 - r)
            through3 = d3 * r * h
        tl.store(dx1 + out, d1, known)
        tl.store(dx2 + out, d2, known)
        tl.store(dx3 + out, d3, known)
        sum1 += tl.sum(tl.where(known, d1 * h, 0.0), 0)
        sum2 += tl.sum(tl.where(known, d2 * h, 0.0), 0)
        sum3 += tl.sum(tl.where(known, through3, 0.0), 0)
    tl.store(da1 + place, sum1, inside)
    tl.store(da2 + place, sum2, inside)
    tl.store(da3 + place, sum3, inside)
    tl.store(dinitial_h + place, handed_h, inside)
    if LSTM:
        tl.store(dinitial_c + place, handed_c, inside)


def _interpretable(safe: Configuration) -> Any:
    """A scan in the interpreter is a loop in Python over all elements of a block: there blocks are small."""
    small = Configuration({"TIME": 8, "CHANNELS": 2})
    return lambda arguments: small if INTERPRETED else safe


def _block(time: int, channels: int, warps: int) -> Configuration:
    return Configuration({"TIME": time, "CHANNELS": channels}, num_warps=warps, num_stages=1)


def _label(arguments: dict[str, Any]) -> str:
    return "cell=lstm" if arguments["LSTM"] else "cell=gru"


_SOLVE_BLOCKS = (
    _block(128, 16, 8),
    _block(64, 16, 4),
    _block(64, 16, 8),
    _block(256, 8, 8),
    _block(64, 32, 8),
)
_GRADIENT_BLOCKS = (_block(32, 16, 4), _block(64, 16, 8), _block(32, 32, 8), _block(64, 32, 16))
SOLVE = Kernel("cell_solve", _solve, _SOLVE_BLOCKS, shape=_label, choose=_interpretable(_SOLVE_BLOCKS[0]))
GRADIENTS = Kernel(
    "cell_gradients", _gradients, _GRADIENT_BLOCKS, shape=_label, choose=_interpretable(_GRADIENT_BLOCKS[0])
)
WALK = Kernel(
    "cell_walk",
    _walk,
    (_block(8, 32, 1), _block(16, 32, 1), _block(4, 32, 1), _block(8, 64, 2)),
    shape=_label,
)


def _inputs(inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """x1 to x3 as the kernels take them, and how far their batch entries and tokens are apart."""
    named = {f"x{number}": rows(value) for number, value in enumerate(inputs, 1)}
    return named | token_strides(**named)


def _weights(weights: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"a{number}": value.contiguous() for number, value in enumerate(weights, 1)}


def _forward(
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    initial: tuple[Tensor | None, Tensor | None],
    tolerance: float,
    max_iterations: int,
    *,
    lstm: bool,
    wide: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """h, c and the last h, c. With ``wide``, h in float32 and c as well; else h as the inputs and no c."""
    x = inputs[0]
    batch, length, width = x.shape
    hs = torch.empty(x.shape, dtype=torch.float32 if wide else x.dtype, device=x.device)
    cs = floats(x, *x.shape) if wide and lstm else None
    final_h = floats(x, batch, width)
    final_c = floats(x, batch, width) if lstm else None
    arguments = {
        **_inputs(inputs), **_weights(weights),
        "initial_c": contiguous(initial[0]), "initial_h": contiguous(initial[1]),
        "cs": cs, "hs": hs, "final_c": final_c, "final_h": final_h,
        "length": length, "width": width, "LSTM": lstm,
    }  # fmt: skip
    if length < FEW or batch * width >= FILLED:
        WALK.launch(grid_of(batch, width), **arguments)
    else:
        SOLVE.launch(grid_of(batch, width), **arguments, tolerance=tolerance, most=max_iterations)
    return hs, cs, final_h, final_c


def _backward(
    dh: Tensor,
    dfinal: tuple[Tensor | None, Tensor | None],
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    initial: tuple[Tensor | None, Tensor | None],
    tolerance: float,
    max_iterations: int,
    *,
    lstm: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Gradients of the inputs, of the weights, and of the states c and h before."""
    hs, cs, _, _ = _forward(inputs, weights, initial, tolerance, max_iterations, lstm=lstm, wide=True)
    x, dh = inputs[0], rows(dh)
    batch, length, width = x.shape
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in inputs]
    das = [floats(x, batch, width) for _ in weights]
    dinitial_c = floats(x, batch, width) if lstm else floats(x, 0)
    dinitial_h = floats(x, batch, width)
    GRADIENTS.launch(
        grid_of(batch, width),
        dh=dh, dfinal_c=contiguous(dfinal[0]), dfinal_h=contiguous(dfinal[1]),
        **_inputs(inputs), **_weights(weights),
        initial_c=contiguous(initial[0]), initial_h=contiguous(initial[1]), cs=cs, hs=hs,
        **{f"dx{number}": value for number, value in enumerate(dxs, 1)},
        **{f"da{number}": value for number, value in enumerate(das, 1)},
        dinitial_c=dinitial_c, dinitial_h=dinitial_h,
        length=length, width=width, **token_strides(dh=dh), LSTM=lstm,
    )  # fmt: skip
    return dxs, [value.sum(0) for value in das], dinitial_c, dinitial_h


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.tolerance, ctx.max_iterations = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


# gru_scan


def _gru_scan(
    xz: Tensor,
    xr: Tensor,
    xh: Tensor,
    az: Tensor,
    ar: Tensor,
    ah: Tensor,
    initial_state: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    h, _, final, _ = _forward(
        (xz, xr, xh), (az, ar, ah), (None, initial_state), tolerance, max_iterations, lstm=False, wide=False
    )
    return h, final


def _gru_scan_backward(
    dh: Tensor,
    dfinal_state: Tensor | None,
    xz: Tensor,
    xr: Tensor,
    xh: Tensor,
    az: Tensor,
    ar: Tensor,
    ah: Tensor,
    initial_state: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, ...]:
    dxs, das, _, dinitial = _backward(
        dh, (None, dfinal_state), (xz, xr, xh), (az, ar, ah), (None, initial_state),
        tolerance, max_iterations, lstm=False,
    )  # fmt: skip
    return *dxs, *das, dinitial


def _gru_autograd(ctx: Any, dh: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    *cell, initial_state = ctx.saved_tensors
    dh = torch.zeros_like(cell[0]) if dh is None else dh
    *gradients, dstate = GRU_BACKWARD(
        dh, dfinal_state, *cell, initial_state, ctx.tolerance, ctx.max_iterations
    )
    weights = (like(gradient, weight) for gradient, weight in zip(gradients[3:], cell[3:], strict=True))
    return *gradients[:3], *weights, like(dstate, initial_state), None, None


_GRU_ARGUMENTS = (
    "Tensor xz, Tensor xr, Tensor xh, Tensor az, Tensor ar, Tensor ah, Tensor? initial_state, "
    "float tolerance, int max_iterations"
)
GRU_BACKWARD = Operator(
    "gru_scan_backward",
    f"(Tensor dh, Tensor? dfinal_state, {_GRU_ARGUMENTS}) -> ({', '.join(['Tensor'] * 7)})",
    _gru_scan_backward,
)
GRU = Operator("gru_scan", f"({_GRU_ARGUMENTS}) -> (Tensor, Tensor)", _gru_scan)
GRU.differentiate(_gru_autograd, _setup, partner=GRU_BACKWARD)


def gru_scan(
    xz: Tensor,
    xr: Tensor,
    xh: Tensor,
    az: Tensor,
    ar: Tensor,
    ah: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    tolerance: float = 1e-6,
    max_iterations: int = 16,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.gru_scan`. Newton's iterations in blocks of tokens where few channels leave a
    GPU idle, and for blocks that have not converged after ``max_iterations`` the sequential loop."""
    h, final_state = GRU(xz, xr, xh, az, ar, ah, initial_state, tolerance, max_iterations)
    return (h, final_state) if return_final_state else h


# lstm_scan


def _lstm_scan(
    xf: Tensor,
    xo: Tensor,
    xz: Tensor,
    af: Tensor,
    ao: Tensor,
    az: Tensor,
    initial_c: Tensor | None,
    initial_h: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    h, _, final_h, final_c = _forward(
        (xf, xo, xz), (af, ao, az), (initial_c, initial_h), tolerance, max_iterations, lstm=True, wide=False
    )
    assert final_c is not None
    return h, final_c, final_h


def _lstm_scan_backward(
    dh: Tensor,
    dfinal_c: Tensor | None,
    dfinal_h: Tensor | None,
    xf: Tensor,
    xo: Tensor,
    xz: Tensor,
    af: Tensor,
    ao: Tensor,
    az: Tensor,
    initial_c: Tensor | None,
    initial_h: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, ...]:
    dxs, das, dinitial_c, dinitial_h = _backward(
        dh, (dfinal_c, dfinal_h), (xf, xo, xz), (af, ao, az), (initial_c, initial_h),
        tolerance, max_iterations, lstm=True,
    )  # fmt: skip
    return *dxs, *das, dinitial_c, dinitial_h


def _lstm_autograd(
    ctx: Any, dh: Tensor | None, dfinal_c: Tensor | None, dfinal_h: Tensor | None
) -> tuple[Any, ...]:
    *cell, initial_c, initial_h = ctx.saved_tensors
    dh = torch.zeros_like(cell[0]) if dh is None else dh
    *gradients, dc, dstate = LSTM_BACKWARD(
        dh, dfinal_c, dfinal_h, *cell, initial_c, initial_h, ctx.tolerance, ctx.max_iterations
    )
    weights = (like(gradient, weight) for gradient, weight in zip(gradients[3:], cell[3:], strict=True))
    return *gradients[:3], *weights, like(dc, initial_c), like(dstate, initial_h), None, None


_LSTM_ARGUMENTS = (
    "Tensor xf, Tensor xo, Tensor xz, Tensor af, Tensor ao, Tensor az, Tensor? initial_c, "
    "Tensor? initial_h, float tolerance, int max_iterations"
)
LSTM_BACKWARD = Operator(
    "lstm_scan_backward",
    f"(Tensor dh, Tensor? dfinal_c, Tensor? dfinal_h, {_LSTM_ARGUMENTS}) -> ({', '.join(['Tensor'] * 8)})",
    _lstm_scan_backward,
)
LSTM = Operator("lstm_scan", f"({_LSTM_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _lstm_scan)
LSTM.differentiate(_lstm_autograd, _setup, partner=LSTM_BACKWARD)


def lstm_scan(
    xf: Tensor,
    xo: Tensor,
    xz: Tensor,
    af: Tensor,
    ao: Tensor,
    az: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_final_state: bool = False,
    tolerance: float = 1e-6,
    max_iterations: int = 16,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """See :func:`star_kernels.lstm_scan`, and :func:`gru_scan` for when it iterates."""
    initial_c, initial_h = initial_state or (None, None)
    h, final_c, final_h = LSTM(xf, xo, xz, af, ao, az, initial_c, initial_h, tolerance, max_iterations)
    return (h, (final_c, final_h)) if return_final_state else h


GRU.register(gru_scan)
LSTM.register(lstm_scan)
