"""Root-mean-square normalisation and rotary embedding in Triton: bound by memory, so every tensor moves once.

rms_norm: a program holds whole rows in registers, so the mean square, the scaling and the sum with the
residual share one read. Backward, with n = x / rms and v = dy ⊙ weight,

    dx = (v − n · mean(v ⊙ n)) / rms,    dweight = Σ_rows dy ⊙ n

computes rms again; a program walks over a span of rows and keeps its part of dweight in registers, and the
parts, one row a program, are summed at the end: no atomics, the same bits every time. Rows too wide for
registers are walked over in pieces, twice; the second walk finds them in the L2 cache.

rope: a program turns a few tokens' heads; cosines and sines are read once a token. Its derivative is the
rotation back.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.compiled import like
from star_kernels.launch import Configuration, Kernel, Operator, cdiv, matrix, rows

WIDEST = 8192
"""The widest rows that are held in registers."""

PROGRAMS = 528
"""Programs of the norm's backward pass, each with one partial sum: four for each of an H100's processors."""


@triton.jit
def _forward_row(
    x, residual, weight, y, total, inside_row,
    width, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows that fit into registers; the pointers are those of the rows' first elements."""
    column = tl.arange(0, COLUMNS)[None, :]
    inside = inside_row & (column < width)
    value = tl.load(x + column, inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + column, inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty).to(tl.float32)  # the sum as it is stored
        tl.store(total + column, value, inside)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    factor = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
    tl.store(y + column, value * scale * factor, inside)


@triton.jit
def _forward_pieces(
    x, residual, weight, y, total, inside_row,
    width, eps,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows that don't: once for the mean square, once for the result."""
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = inside_row & (column < width)
        value = tl.load(x + column, inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            value += tl.load(residual + column, inside, other=0.0).to(tl.float32)
            value = value.to(total.dtype.element_ty).to(tl.float32)
            tl.store(total + column, value, inside)
        square += value * value
    scale = tl.rsqrt(tl.sum(square, 1) / width + eps)[:, None]
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = inside_row & (column < width)
        value = tl.load(x + column, inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            value += tl.load(residual + column, inside, other=0.0).to(tl.float32)
            value = value.to(total.dtype.element_ty).to(tl.float32)
        factor = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
        tl.store(y + column, value * scale * factor, inside)


@triton.jit
def _forward(
    x, residual, weight, y, total,
    row_count, width, eps,
    x_stride, residual_stride,
    HAS_RESIDUAL: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    x += row * x_stride
    y += row * width
    if HAS_RESIDUAL:
        residual += row * residual_stride
        total += row * width
    if WHOLE:
        _forward_row(x, residual, weight, y, total, row < row_count, width, eps, HAS_RESIDUAL, ROWS, COLUMNS)
    else:
        _forward_pieces(
            x, residual, weight, y, total, row < row_count, width, eps, HAS_RESIDUAL, ROWS, COLUMNS
        )


@triton.jit
def _backward(
    dy, dtotal, x, weight, dx, parts,
    row_count, width, eps, span,
    dy_stride, dtotal_stride, x_stride,
    HAS_DTOTAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A span of whole rows: dx, and the span's part of dweight."""
    column = tl.arange(0, COLUMNS)[None, :]
    factor = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0).to(tl.int64) * span
    for start in range(0, span, ROWS):
        local = start + tl.arange(0, ROWS)[:, None]
        row = first + local
        inside = (local < span) & (row < row_count) & (column < width)
        value = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
        normed = value * scale
        dweight += tl.where(inside, gradient * normed, 0.0)  # rows of zeros are no numbers where eps is 0
        weighted = gradient * factor
        along = tl.sum(weighted * normed, 1)[:, None] / width
        result = (weighted - normed * along) * scale
        if HAS_DTOTAL:
            result += tl.load(dtotal + row * dtotal_stride + column, inside, other=0.0).to(tl.float32)
        tl.store(dx + row * width + column, result, inside)
    part = tl.sum(dweight, 0)[None, :]
    tl.store(parts + tl.program_id(0).to(tl.int64) * width + column, part, column < width)


@triton.jit
def _backward_pieces(
    dy, dtotal, x, weight, dx, parts,
    row_count, width, eps, span,
    dy_stride, dtotal_stride, x_stride,
    HAS_DTOTAL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same for rows wider than registers; ``parts``, zeros at first, holds the sums meanwhile."""
    program = tl.program_id(0).to(tl.int64)
    parts += program * width
    for row in range(program * span, tl.minimum((program + 1) * span, row_count)):
        square = tl.zeros((COLUMNS,), tl.float32)
        product = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < width
            value = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
            gradient = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)
            factor = tl.load(weight + column, inside, other=0.0).to(tl.float32)
            square += value * value
            product += value * gradient * factor
        scale = tl.rsqrt(tl.sum(square, 0) / width + eps)
        along = tl.sum(product, 0) * scale / width
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < width
            normed = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32) * scale
            gradient = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)
            factor = tl.load(weight + column, inside, other=0.0).to(tl.float32)
            result = (gradient * factor - normed * along) * scale
            if HAS_DTOTAL:
                result += tl.load(dtotal + row * dtotal_stride + column, inside, other=0.0).to(tl.float32)
            tl.store(dx + row * width + column, result, inside)
            sums = tl.load(parts + column, inside, other=0.0)
            tl.store(parts + column, sums + gradient * normed, inside)


@triton.jit
def _rope_kernel(
    x, cos, sin, y,
    length, heads, half,
    batch_stride, token_stride, head_stride, cos_stride, sin_stride,
    INVERSE: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(length, TOKENS)
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * TOKENS
    token = tl.arange(0, TOKENS)[:, None, None]
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)[None, :, None]).to(tl.int64)
    lane = tl.arange(0, HALF)[None, None, :]
    known = (first + token < length) & (lane < half)
    inside = known & (head < heads)
    cosine = tl.load(cos + first * cos_stride + token * cos_stride + lane, known, other=0.0).to(tl.float32)
    sine = tl.load(sin + first * sin_stride + token * sin_stride + lane, known, other=0.0).to(tl.float32)
    if INVERSE:
        sine = -sine
    x += batch * batch_stride + first * token_stride + token * token_stride + head * head_stride + lane
    y += ((batch * length + first + token) * heads + head) * (2 * half) + lane
    low = tl.load(x, inside, other=0.0).to(tl.float32)
    high = tl.load(x + half, inside, other=0.0).to(tl.float32)
    tl.store(y, low * cosine - high * sine, inside)
    tl.store(y + half, high * cosine + low * sine, inside)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _rows_in_registers(elements: int, warp: int) -> Any:
    """As many rows a program as make so many elements, and a warp for each ``warp`` elements."""

    def choose(arguments: dict[str, Any]) -> Configuration:
        columns = arguments["COLUMNS"]
        together = max(1, elements // columns)
        warps = min(16, max(4, _power_of_two(together * columns // warp)))
        return Configuration({"ROWS": together}, num_warps=warps, num_stages=1)

    return choose


def _width(arguments: dict[str, Any]) -> str:
    return f"width={arguments['COLUMNS']}"


def _whole_heads(arguments: dict[str, Any]) -> Configuration:
    heads = min(_power_of_two(arguments["heads"]), max(1, 2048 // arguments["HALF"]))
    tokens = max(1, 2048 // (heads * arguments["HALF"]))
    return Configuration({"TOKENS": tokens, "HEADS": heads}, num_warps=4, num_stages=1)


_ROWS = tuple(
    Configuration({"ROWS": together}, num_warps=warps, num_stages=1)
    for together, warps in ((2, 8), (1, 4), (1, 8), (4, 8), (4, 16), (8, 16))
)
FORWARD = Kernel("rms_norm_forward", _forward, _ROWS, shape=_width, choose=_rows_in_registers(4096, 512))
BACKWARD = Kernel("rms_norm_backward", _backward, _ROWS, shape=_width, choose=_rows_in_registers(2048, 256))
BACKWARD_PIECES = Kernel(
    "rms_norm_backward_pieces",
    _backward_pieces,
    (
        Configuration({"COLUMNS": 4096}, num_warps=8, num_stages=1),
        Configuration({"COLUMNS": 8192}, num_warps=16, num_stages=1),
        Configuration({"COLUMNS": 2048}, num_warps=4, num_stages=1),
    ),
)
ROPE = Kernel(
    "rope",
    _rope_kernel,
    (
        Configuration({"TOKENS": 2, "HEADS": 32}, num_warps=4, num_stages=1),
        Configuration({"TOKENS": 1, "HEADS": 32}, num_warps=4, num_stages=1),
        Configuration({"TOKENS": 4, "HEADS": 32}, num_warps=8, num_stages=1),
        Configuration({"TOKENS": 8, "HEADS": 8}, num_warps=4, num_stages=1),
        Configuration({"TOKENS": 16, "HEADS": 4}, num_warps=4, num_stages=1),
    ),
    shape=lambda arguments: f"half={arguments['HALF']}",
    choose=_whole_heads,
)


def _columns(width: int) -> int:
    return min(_power_of_two(width), WIDEST)


def _normalise(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    flat, other = matrix(x), None if residual is None else matrix(residual)
    row_count, width = flat.shape
    FORWARD.launch(
        lambda blocks: (cdiv(row_count, blocks["ROWS"]) if width else 0,),
        x=flat, residual=other, weight=weight.contiguous(), y=y, total=None if residual is None else total,
        row_count=row_count, width=width, eps=float(eps),
        x_stride=flat.stride(0), residual_stride=0 if other is None else other.stride(0),
        HAS_RESIDUAL=residual is not None, WHOLE=width <= WIDEST, COLUMNS=_columns(width),
    )  # fmt: skip
    return y, total


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normalise(x, None, weight, eps)[0]


def _rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _normalise(x, residual, weight, eps)


def _rms_norm_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, gradient, other = matrix(x), matrix(dy), None if dtotal is None else matrix(dtotal)
    row_count, width = flat.shape
    span = max(1, cdiv(row_count, PROGRAMS))
    programs = cdiv(row_count, span) if width else 0
    parts = torch.zeros((programs, width), dtype=torch.float32, device=x.device)
    arguments = {
        "dy": gradient, "dtotal": other, "x": flat, "weight": weight.contiguous(), "dx": dx, "parts": parts,
        "row_count": row_count, "width": width, "eps": float(eps), "span": span,
        "dy_stride": gradient.stride(0), "dtotal_stride": 0 if other is None else other.stride(0),
        "x_stride": flat.stride(0), "HAS_DTOTAL": other is not None,
    }  # fmt: skip
    if width <= WIDEST:
        BACKWARD.launch(lambda blocks: (programs,), **arguments, COLUMNS=_columns(width))
    else:
        BACKWARD_PIECES.launch(lambda blocks: (programs,), **arguments)
    return dx, parts.sum(0)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, cos, sin = rows(x), rows(cos), rows(sin)
    batch, length, heads, width = x.shape
    half = width // 2
    ROPE.launch(
        lambda blocks: (batch * cdiv(length, blocks["TOKENS"]) if half else 0, cdiv(heads, blocks["HEADS"])),
        x=x, cos=cos, sin=sin, y=y, length=length, heads=heads, half=half,
        batch_stride=x.stride(0), token_stride=x.stride(1), head_stride=x.stride(2),
        cos_stride=cos.stride(0), sin_stride=sin.stride(0),
        INVERSE=inverse, HALF=_power_of_two(half),
    )  # fmt: skip
    return y


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = RMS_NORM_BACKWARD(dy, None, x, weight, ctx.eps)
    return dx, like(dweight, weight), None


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _residual_autograd(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Any, ...]:
    total, weight = ctx.saved_tensors
    if dy is None:
        return dtotal, dtotal, None, None
    dx, dweight = RMS_NORM_BACKWARD(dy, dtotal, total, weight, ctx.eps)
    return dx, dx, like(dweight, weight), None


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, cos, sin, ctx.inverse = inputs
    ctx.learns_angles = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(cos, sin, x if ctx.learns_angles else None)


def _rope_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """Learned angles are rare: their gradients are PyTorch's sums."""
    cos, sin, x = ctx.saved_tensors
    dx = ROPE_BACKWARD(dy, cos, sin, not ctx.inverse)
    if not ctx.learns_angles:
        return dx, None, None, None
    x1, x2 = x.float().chunk(2, dim=-1)
    dy1, dy2 = dy.float().chunk(2, dim=-1)
    dcos = (dy1 * x1 + dy2 * x2).sum(dim=(0, 2))
    dsin = (dy2 * x1 - dy1 * x2).sum(dim=(0, 2))
    return dx, like(dcos, cos), like(-dsin if ctx.inverse else dsin, sin), None


RMS_NORM_BACKWARD = Operator(
    "rms_norm_backward",
    "(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm_backward,
    public_name="rms_norm",
)
RMS_NORM = Operator("rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm)
RMS_NORM.differentiate(_rms_norm_autograd, _rms_norm_setup, partner=RMS_NORM_BACKWARD)
RMS_NORM_RESIDUAL = Operator(
    "rms_norm_residual",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm_residual,
    public_name="rms_norm",
)
RMS_NORM_RESIDUAL.differentiate(_residual_autograd, _residual_setup, partner=RMS_NORM_BACKWARD)
_ROPE_SCHEMA = "(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor"
ROPE_BACKWARD = Operator("rope_backward", _ROPE_SCHEMA, _rope, public_name="rope")
ROPE_OPERATOR = Operator("rope", _ROPE_SCHEMA, _rope)
ROPE_OPERATOR.differentiate(_rope_autograd, _rope_setup, partner=ROPE_BACKWARD)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.rms_norm`."""
    y: Tensor
    if residual is None:
        y = RMS_NORM(x, weight, eps)
        return y
    y, total = RMS_NORM_RESIDUAL(x, residual, weight, eps)
    return y, total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`star_kernels.rope`."""
    y: Tensor = ROPE_OPERATOR(x, cos, sin, False)
    return y


RMS_NORM.register(rms_norm)
ROPE_OPERATOR.register(rope)
