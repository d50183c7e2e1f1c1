"""The short convolutions in Triton, plain and gated: one read of each input, one write of each result.

Notation, for one sequence with state rows at t = -(K-1) .. -1 before its first token:

    u = b ⊙ x (gated) or x,   s_t = Σ_k weight_k ⊙ u_{t-K+1+k} + bias,   y = c ⊙ s (gated) or activation(s)

A program computes a tile of tokens by channels; tap k is the same tile of u loaded again, shifted by some
rows, which the L1 cache still holds, so that device memory sees one read. Channels lie along the lanes and
warps, 256 for each warp, and a thread's tokens in its registers: shifts, taps and sums over tokens need no
exchange between threads. Taps are taken in x's dtype, as the definition takes them, so that they lie in the
threads as x does.

Backward, with g = ∂loss/∂s = dy ⊙ c or dy ⊙ activation'(s) computed again:

    ∂u_t = Σ_k weight_k ⊙ g_{t+K-1-k} (tokens of the same sequence),   ∂weight_k = Σ_t g_t ⊙ u_{t-K+1+k}

A program walks over a span of tokens and holds its part of ∂weight and ∂bias in registers; the parts, one
row a span, are summed at the end. States are a small launch of their own, through the same functions:
their gradients are ∂u at t < 0.

Packed sequences need no chunks of their own: a table with each token's sequence, made once a call, tells a
tile where a token's past begins and its future ends.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.compiled import like
from star_kernels.convolution import triton_long as triton_long
from star_kernels.launch import INTERPRETED, Configuration, Kernel, Operator, cdiv, rising, rows

MOST_UNROLLED = 4
"""With more taps than this the loops over taps stay loops: compiled code would grow without bound."""


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _source_row(
    x, b, state, token, begin, end, sequence, channel, width,
    x_stride, b_stride, TAPS: tl.constexpr, GATED: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """u at ``token``, counted from where x and b point; the state where it lies before ``begin``."""
    inside = (token >= begin) & (token < end) & (channel < width)
    value = tl.load(x + token * x_stride + channel, inside, other=0.0).to(tl.float32)
    if GATED:
        value *= tl.load(b + token * b_stride + channel, inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)  # u as a state would hold it
    if HAS_STATE:
        row = token - begin + (TAPS - 1)
        before = (row >= 0) & (token < begin) & (channel < width)
        place = (sequence * (TAPS - 1) + row) * width + channel
        value += tl.load(state + place, before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _sum_of_taps(
    x, b, weight, bias, state, token, begin, end, sequence, channel, width,
    x_stride, b_stride,
    TAPS: tl.constexpr, UNROLLED: tl.constexpr, GATED: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """s at ``token``."""
    total = tl.zeros((TIME, CHANNELS), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, channel < width, other=0.0).to(tl.float32)
    if UNROLLED:
        for k in tl.static_range(TAPS):
            u = _source_row(
                x, b, state, token + (k - TAPS + 1), begin, end, sequence, channel, width,
                x_stride, b_stride, TAPS, GATED, HAS_STATE,
            )  # fmt: skip
            total += u * tl.load(weight + k * width + channel, channel < width, other=0.0).to(tl.float32)
    else:
        for k in range(TAPS):
            u = _source_row(
                x, b, state, token + (k - TAPS + 1), begin, end, sequence, channel, width,
                x_stride, b_stride, TAPS, GATED, HAS_STATE,
            )  # fmt: skip
            total += u * tl.load(weight + k * width + channel, channel < width, other=0.0).to(tl.float32)
    return total


@triton.jit
def _gradient_of_sum(
    dy, c, x, b, weight, bias, state, token, begin, end, sequence, channel, width,
    dy_stride, c_stride, x_stride, b_stride,
    TAPS: tl.constexpr, UNROLLED: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """g at ``token``; 0 where the token is none of its sequence's."""
    inside = (token >= begin) & (token < end) & (channel < width)
    gradient = tl.load(dy + token * dy_stride + channel, inside, other=0.0).to(tl.float32)
    if GATED:
        gradient *= tl.load(c + token * c_stride + channel, inside, other=0.0).to(tl.float32)
    if SILU:
        s = _sum_of_taps(
            x, b, weight, bias, state, token, begin, end, sequence, channel, width, x_stride, b_stride,
            TAPS, UNROLLED, GATED, HAS_STATE, HAS_BIAS, TIME, CHANNELS,
        )  # fmt: skip
        gate = _sigmoid(s)
        gradient *= gate * (1.0 + s * (1.0 - gate))
    return gradient


@triton.jit
def _gradient_of_source(
    dy, c, x, b, weight, bias, state, dfinal, token, begin, end, sequence, channel, width,
    dy_stride, c_stride, x_stride, b_stride,
    TAPS: tl.constexpr, UNROLLED: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DFINAL: tl.constexpr,
    TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """∂u at ``token``, which may lie in the state."""
    total = tl.zeros((TIME, CHANNELS), tl.float32)
    if UNROLLED:
        for k in tl.static_range(TAPS):
            g = _gradient_of_sum(
                dy, c, x, b, weight, bias, state, token + (TAPS - 1 - k), begin, end, sequence, channel,
                width, dy_stride, c_stride, x_stride, b_stride,
                TAPS, UNROLLED, GATED, SILU, HAS_STATE, HAS_BIAS, TIME, CHANNELS,
            )  # fmt: skip
            total += g * tl.load(weight + k * width + channel, channel < width, other=0.0).to(tl.float32)
    else:
        for k in range(TAPS):
            g = _gradient_of_sum(
                dy, c, x, b, weight, bias, state, token + (TAPS - 1 - k), begin, end, sequence, channel,
                width, dy_stride, c_stride, x_stride, b_stride,
                TAPS, UNROLLED, GATED, SILU, HAS_STATE, HAS_BIAS, TIME, CHANNELS,
            )  # fmt: skip
            total += g * tl.load(weight + k * width + channel, channel < width, other=0.0).to(tl.float32)
    if HAS_DFINAL:
        row = token - end + (TAPS - 1)
        last = (row >= 0) & (token < end) & (channel < width)
        place = (sequence * (TAPS - 1) + row) * width + channel
        total += tl.load(dfinal + place, last, other=0.0).to(tl.float32)
    return total


@triton.jit
def _limits(cu_seqlens, owner, first, token, length, batch, PACKED: tl.constexpr):
    """First and last place of the sequence of each token, counted from ``first``, and its number."""
    if PACKED:
        sequence = tl.load(owner + first + token, first + token < length, other=0).to(tl.int64)
        begin = (tl.load(cu_seqlens + sequence) - first).to(tl.int32)
        end = (tl.load(cu_seqlens + sequence + 1) - first).to(tl.int32)
    else:
        sequence = batch
        begin = (-first).to(tl.int32)
        end = (length - first).to(tl.int32)
    return begin, end, sequence


@triton.jit
def _forward(
    x, b, c, weight, bias, state, cu_seqlens, owner, y,
    length, width,
    x_batch, x_stride, b_batch, b_stride, c_batch, c_stride,
    TAPS: tl.constexpr, UNROLLED: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
    TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(length, TIME)
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * TIME
    token = tl.arange(0, TIME)[:, None]
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    begin, end, sequence = _limits(cu_seqlens, owner, first, token, length, batch, PACKED)
    x += batch * x_batch + first * x_stride
    if GATED:
        b += batch * b_batch + first * b_stride
        c += batch * c_batch + first * c_stride
    result = _sum_of_taps(
        x, b, weight, bias, state, token, begin, end, sequence, channel, width, x_stride, b_stride,
        TAPS, UNROLLED, GATED, HAS_STATE, HAS_BIAS, TIME, CHANNELS,
    )  # fmt: skip
    inside = (first + token < length) & (channel < width)
    if GATED:
        result *= tl.load(c + token * c_stride + channel, inside, other=0.0).to(tl.float32)
    if SILU:
        result *= _sigmoid(result)
    tl.store(y + (batch * length + first) * width + token * width + channel, result, inside)


@triton.jit
def _backward(
    dy, x, b, c, weight, bias, state, dfinal, cu_seqlens, owner, dx, db, dc, parts,
    length, width,
    dy_batch, dy_stride, x_batch, x_stride, b_batch, b_stride, c_batch, c_stride,
    TAPS: tl.constexpr, UNROLLED: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr,
    SPAN: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """SPAN tokens of CHANNELS channels, TIME tokens at once. ``parts`` is (programs, K + 1, D)."""
    spans = tl.cdiv(length, SPAN)
    batch = (tl.program_id(0) // spans).to(tl.int64)
    first = (tl.program_id(0) % spans).to(tl.int64) * SPAN
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    dy += batch * dy_batch + first * dy_stride
    x += batch * x_batch + first * x_stride
    place = (batch * length + first) * width
    if GATED:
        b += batch * b_batch + first * b_stride
        c += batch * c_batch + first * c_stride
    tap = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)  # row k: ∂weight_k; row K: ∂bias
    for start in range(0, SPAN, TIME):
        token = start + tl.arange(0, TIME)[:, None]
        begin, end, sequence = _limits(cu_seqlens, owner, first, token, length, batch, PACKED)
        inside = (first + token < length) & (token < SPAN) & (channel < width)
        du = _gradient_of_source(
            dy, c, x, b, weight, bias, state, dfinal, token, begin, end, sequence, channel, width,
            dy_stride, c_stride, x_stride, b_stride,
            TAPS, UNROLLED, GATED, SILU, HAS_STATE, HAS_BIAS, HAS_DFINAL, TIME, CHANNELS,
        )  # fmt: skip
        g = _gradient_of_sum(
            dy, c, x, b, weight, bias, state, token, begin, end, sequence, channel, width,
            dy_stride, c_stride, x_stride, b_stride,
            TAPS, UNROLLED, GATED, SILU, HAS_STATE, HAS_BIAS, TIME, CHANNELS,
        )  # fmt: skip
        s = tl.zeros((TIME, CHANNELS), tl.float32)
        if HAS_BIAS:
            s += tl.load(bias + channel, channel < width, other=0.0).to(tl.float32)
        if UNROLLED:
            for k in tl.static_range(TAPS):
                u = _source_row(
                    x, b, state, token + (k - TAPS + 1), begin, end, sequence, channel, width,
                    x_stride, b_stride, TAPS, GATED, HAS_STATE,
                )  # fmt: skip
                s += u * tl.load(weight + k * width + channel, channel < width, other=0.0).to(tl.float32)
                sums += tl.where(tap == k, tl.sum(g * u, 0)[None, :], 0.0)
        else:
            for k in range(TAPS):
                u = _source_row(
                    x, b, state, token + (k - TAPS + 1), begin, end, sequence, channel, width,
                    x_stride, b_stride, TAPS, GATED, HAS_STATE,
                )  # fmt: skip
                s += u * tl.load(weight + k * width + channel, channel < width, other=0.0).to(tl.float32)
                sums += tl.where(tap == k, tl.sum(g * u, 0)[None, :], 0.0)
        sums += tl.where(tap == TAPS, tl.sum(g, 0)[None, :], 0.0)
        target = place + token * width + channel
        if GATED:
            upstream = tl.load(dy + token * dy_stride + channel, inside, other=0.0).to(tl.float32)
            value = tl.load(x + token * x_stride + channel, inside, other=0.0).to(tl.float32)
            gate = tl.load(b + token * b_stride + channel, inside, other=0.0).to(tl.float32)
            tl.store(dc + target, upstream * s, inside)
            tl.store(db + target, du * value, inside)
            tl.store(dx + target, du * gate, inside)
        else:
            tl.store(dx + target, du, inside)
    part = parts + tl.program_id(0).to(tl.int64) * (TAPS + 1) * width + tap * width + channel
    tl.store(part, sums, (tap <= TAPS) & (channel < width))


@triton.jit
def _states(
    dy, x, b, c, weight, bias, state, dfinal, cu_seqlens, result,
    length, width,
    dy_batch, dy_stride, x_batch, x_stride, b_batch, b_stride, c_batch, c_stride,
    BACKWARD: tl.constexpr, TAPS: tl.constexpr, UNROLLED: tl.constexpr, GATED: tl.constexpr,
    SILU: tl.constexpr, HAS_STATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The state behind a sequence's last token, u at its last K-1 places, or the gradient of the one before
    its first, ∂u at t < 0. TIME covers the K-1 rows; a program takes one sequence's channels."""
    sequence = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    row = tl.arange(0, TIME)[:, None]
    if PACKED:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
        batch = sequence * 0
    else:
        start = sequence * 0
        end = (start + length).to(tl.int32)
        batch = sequence
    origin = start
    if not BACKWARD:
        origin += end  # places near the sequence's end, counted from there
    x += batch * x_batch + origin * x_stride
    if GATED:
        b += batch * b_batch + origin * b_stride
    if BACKWARD:
        dy += batch * dy_batch + origin * dy_stride
        if GATED:
            c += batch * c_batch + origin * c_stride
        value = _gradient_of_source(
            dy, c, x, b, weight, bias, state, dfinal, row - (TAPS - 1), end * 0, end, sequence, channel,
            width, dy_stride, c_stride, x_stride, b_stride,
            TAPS, UNROLLED, GATED, SILU, HAS_STATE, HAS_BIAS, HAS_DFINAL, TIME, CHANNELS,
        )  # fmt: skip
    else:
        value = _source_row(
            x, b, state, row - (TAPS - 1), -end, end * 0, sequence, channel, width,
            x_stride, b_stride, TAPS, GATED, HAS_STATE,
        )  # fmt: skip
    place = (sequence * (TAPS - 1) + row) * width + channel
    tl.store(result + place, value, (row < TAPS - 1) & (channel < width))


def _choose(arguments: dict[str, Any]) -> Configuration:
    """The first candidate where a thread's registers hold all its loads at once, else small tiles.

    The interpreter, which pays by the program, gets tiles of its own.
    """
    backward = "SPAN" in arguments
    if INTERPRETED:
        return Configuration({"TIME": 16, "CHANNELS": 64})
    loads = arguments["TAPS"] * (2 if arguments["GATED"] else 1)
    is_plain = not (arguments["HAS_STATE"] or arguments["PACKED"] or (backward and arguments["SILU"]))
    is_aligned = arguments["width"] % 16 == 0  # else every element has a load of its own
    if is_plain and is_aligned and arguments["x"].dtype != torch.float32 and loads <= 6:
        if backward:  # two tokens of four taps spill, with Triton 3.9
            return BACKWARD.candidates[0 if arguments["TAPS"] <= 3 else 1]
        return FORWARD.candidates[0]
    tokens = 8 if not backward else 4 if is_aligned else 2
    return Configuration({"TIME": tokens, "CHANNELS": 256}, num_warps=8, num_stages=1)


def _form(arguments: dict[str, Any]) -> str:
    """What a tuned table tells apart."""
    gated = "gated" if arguments["GATED"] else "silu" if arguments["SILU"] else "plain"
    return f"{gated},taps={arguments['TAPS']}"


FORWARD = Kernel(
    "short_conv_forward",
    _forward,
    (
        Configuration({"TIME": 8, "CHANNELS": 512}, num_warps=2, num_stages=1),
        Configuration({"TIME": 8, "CHANNELS": 256}, num_warps=1, num_stages=1),
        Configuration({"TIME": 4, "CHANNELS": 256}, num_warps=1, num_stages=1),
        Configuration({"TIME": 4, "CHANNELS": 512}, num_warps=2, num_stages=1),
        Configuration({"TIME": 4, "CHANNELS": 1024}, num_warps=4, num_stages=1),
        Configuration({"TIME": 16, "CHANNELS": 256}, num_warps=1, num_stages=1),
        Configuration({"TIME": 16, "CHANNELS": 256}, num_warps=2, num_stages=1),
    ),
    shape=_form,
    choose=_choose,
)
BACKWARD = Kernel(
    "short_conv_backward",
    _backward,
    (
        Configuration({"TIME": 2, "CHANNELS": 512}, num_warps=2, num_stages=1),
        Configuration({"TIME": 1, "CHANNELS": 512}, num_warps=2, num_stages=1),
        Configuration({"TIME": 1, "CHANNELS": 1024}, num_warps=4, num_stages=1),
        Configuration({"TIME": 2, "CHANNELS": 256}, num_warps=1, num_stages=1),
        Configuration({"TIME": 4, "CHANNELS": 256}, num_warps=2, num_stages=1),
        Configuration({"TIME": 4, "CHANNELS": 256}, num_warps=4, num_stages=1),
        Configuration({"TIME": 8, "CHANNELS": 256}, num_warps=4, num_stages=1),
    ),
    shape=_form,
    choose=_choose,
)
STATES = Kernel(
    "short_conv_states",
    _states,
    (
        Configuration({"CHANNELS": 128}, num_warps=4, num_stages=1),
        Configuration({"CHANNELS": 256}, num_warps=4, num_stages=1),
    ),
)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _owner(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """Each packed token's sequence, (L,) int32; of tokens behind all, the last one."""
    if cu_seqlens is None:
        return None
    place = torch.arange(length, device=cu_seqlens.device, dtype=torch.int32)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True, out_int32=True)
    return owner.clamp(max=max(cu_seqlens.shape[0] - 2, 0))


def _span(tokens: int, width: int) -> int:
    """Tokens a program of the backward pass walks over: 64, fewer where there would be too few programs."""
    span = 64
    while span > 32 and cdiv(tokens, span) * cdiv(width, 512) < 1024:
        span //= 2
    return span


def _strides(**tensors: Tensor | None) -> dict[str, int]:
    found = {}
    for name, tensor in tensors.items():
        found[f"{name}_batch"], found[f"{name}_stride"] = (0, 0) if tensor is None else tensor.stride()[:2]
    return found


def _constants(weight: Tensor, gated: bool, silu: bool) -> dict[str, Any]:
    taps = weight.shape[1]
    return {"TAPS": taps, "UNROLLED": taps <= MOST_UNROLLED, "GATED": gated, "SILU": silu}


def _convolve(
    b: Tensor | None, c: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, return_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, width = x.shape
    cu_seqlens = None if cu_seqlens is None else rising(cu_seqlens, length)
    taps, sequences = weight.shape[1], batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, b, c = rows(x), None if b is None else rows(b), None if c is None else rows(c)
    state = None if initial_state is None else initial_state.contiguous()
    shared = {
        "x": x, "b": b, "c": c, "weight": weight.mT.to(x.dtype).contiguous(),
        "bias": None if bias is None else bias.to(x.dtype).contiguous(), "state": state,
        "cu_seqlens": cu_seqlens,
        "length": length, "width": width, **_strides(x=x, b=b, c=c),
        **_constants(weight, b is not None, silu), "HAS_STATE": state is not None,
        "HAS_BIAS": bias is not None, "PACKED": cu_seqlens is not None,
    }  # fmt: skip
    FORWARD.launch(
        lambda blocks: (batch * cdiv(length, blocks["TIME"]), cdiv(width, blocks["CHANNELS"])),
        **shared, owner=_owner(cu_seqlens, length), y=y,
    )  # fmt: skip
    if not return_final_state:
        return y, x.new_empty(0)
    final_state = x.new_empty(sequences, taps - 1, width)
    STATES.launch(
        lambda blocks: (sequences if taps > 1 else 0, cdiv(width, blocks["CHANNELS"])),
        **shared, dy=None, dfinal=None, result=final_state, dy_batch=0, dy_stride=0,
        BACKWARD=False, HAS_DFINAL=False, TIME=_power_of_two(taps - 1),
    )  # fmt: skip
    return y, final_state


def _convolve_backward(
    dy: Tensor, dfinal: Tensor | None, b: Tensor | None, c: Tensor | None, x: Tensor, weight: Tensor,
    bias: Tensor | None, silu: bool, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of b, c, x, weight, bias and the state; those of absent tensors are empty."""
    batch, length, width = x.shape
    cu_seqlens = None if cu_seqlens is None else rising(cu_seqlens, length)
    taps, sequences = weight.shape[1], batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    db, dc = (x.new_empty(0) if b is None else torch.empty_like(dx) for _ in range(2))
    span = _span(batch * length, width)
    parts = torch.empty((batch * cdiv(length, span), taps + 1, width), dtype=torch.float32, device=x.device)
    dy, x, b, c = rows(dy), rows(x), None if b is None else rows(b), None if c is None else rows(c)
    state = None if initial_state is None else initial_state.contiguous()
    shared = {
        "dy": dy, "x": x, "b": b, "c": c, "weight": weight.mT.to(x.dtype).contiguous(),
        "bias": None if bias is None else bias.to(x.dtype).contiguous(), "state": state,
        "dfinal": None if dfinal is None else dfinal.contiguous(), "cu_seqlens": cu_seqlens,
        "length": length, "width": width, **_strides(dy=dy, x=x, b=b, c=c),
        **_constants(weight, b is not None, silu), "HAS_STATE": state is not None,
        "HAS_BIAS": bias is not None, "HAS_DFINAL": dfinal is not None, "PACKED": cu_seqlens is not None,
    }  # fmt: skip
    BACKWARD.launch(
        lambda blocks: (parts.shape[0], cdiv(width, blocks["CHANNELS"])),
        **shared, owner=_owner(cu_seqlens, length), dx=dx, db=db, dc=dc, parts=parts,
        ROWS=_power_of_two(taps + 1), SPAN=span,
    )  # fmt: skip
    dstate = x.new_empty(0)
    if state is not None:
        dstate = x.new_empty(sequences, taps - 1, width)
        STATES.launch(
            lambda blocks: (sequences if taps > 1 else 0, cdiv(width, blocks["CHANNELS"])),
            **shared, result=dstate, BACKWARD=True, TIME=_power_of_two(taps - 1),
        )  # fmt: skip
    sums = parts.sum(0)
    return db, dc, dx, sums[:taps].mT.contiguous(), sums[taps].clone(), dstate


def _short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, return_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _convolve(None, None, x, weight, bias, silu, initial_state, cu_seqlens, return_final_state)


def _short_conv_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _convolve_backward(dy, dfinal, None, None, x, weight, bias, silu, initial_state, cu_seqlens)[2:]


def _gated_short_conv(
    b: Tensor, c: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, return_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _convolve(b, c, x, weight, bias, False, initial_state, cu_seqlens, return_final_state)


def _gated_short_conv_backward(
    dy: Tensor, dfinal: Tensor | None, b: Tensor, c: Tensor, x: Tensor, weight: Tensor,
    bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _convolve_backward(dy, dfinal, b, c, x, weight, bias, False, initial_state, cu_seqlens)


def _short_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.silu, initial_state, cu_seqlens, ctx.returns_state = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _short_autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dfinal = dfinal if ctx.returns_state else None
    dx, dweight, dbias, dstate = SHORT_BACKWARD(
        dy, dfinal, x, weight, bias, ctx.silu, initial_state, cu_seqlens
    )
    return dx, like(dweight, weight), like(dbias, bias), None, like(dstate, initial_state), None, None


def _gated_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.returns_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gated_autograd(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    b, c, x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dfinal = dfinal if ctx.returns_state else None
    db, dc, dx, dweight, dbias, dstate = GATED_BACKWARD(
        dy, dfinal, b, c, x, weight, bias, initial_state, cu_seqlens
    )
    return db, dc, dx, like(dweight, weight), like(dbias, bias), like(dstate, initial_state), None, None


SHORT_BACKWARD = Operator(
    "short_conv_backward",
    "(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)",
    _short_conv_backward,
    public_name="short_conv",
)
SHORT = Operator(
    "short_conv",
    "(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? cu_seqlens, "
    "bool return_final_state) -> (Tensor, Tensor)",
    _short_conv,
)
SHORT.differentiate(_short_autograd, _short_setup, partner=SHORT_BACKWARD)
GATED_BACKWARD = Operator(
    "gated_short_conv_backward",
    "(Tensor dy, Tensor? dfinal, Tensor b, Tensor c, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_short_conv_backward,
    public_name="gated_short_conv",
)
GATED = Operator(
    "gated_short_conv",
    "(Tensor b, Tensor c, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool return_final_state) -> (Tensor, Tensor)",
    _gated_short_conv,
)
GATED.differentiate(_gated_autograd, _gated_setup, partner=GATED_BACKWARD)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.short_conv`."""
    y: Tensor
    y, final_state = SHORT(
        x, weight, bias, activation == "silu", initial_state, cu_seqlens, return_final_state
    )
    return (y, final_state) if return_final_state else y


def gated_short_conv(
    b: Tensor,
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.gated_short_conv`."""
    y: Tensor
    y, final_state = GATED(b, c, x, weight, bias, initial_state, cu_seqlens, return_final_state)
    return (y, final_state) if return_final_state else y


SHORT.register(short_conv)
GATED.register(gated_short_conv)
