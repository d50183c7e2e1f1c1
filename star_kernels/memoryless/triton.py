"""The gated linear unit in Triton: one pass forward, one pass backward that computes the activation again."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.launch import Configuration, Kernel, Operator, cdiv, matrix


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """The activation of x and its derivative."""
    if ACTIVATION == "silu":
        gate = _sigmoid(x)
        return x * gate, gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "sigmoid":
        gate = _sigmoid(x)
        return gate, gate * (1.0 - gate)
    elif ACTIVATION == "relu":
        positive = (x > 0).to(tl.float32)
        return tl.where(x < 0.0, 0.0, x), positive  # NaN stays; on a GPU, tl.maximum would drop it
    elif ACTIVATION == "gelu":
        cumulative = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cumulative, cumulative + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # 0.5 (1 + tanh(u)) = sigmoid(2u)
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        gate = _sigmoid(inner)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * gate, gate + x * gate * (1.0 - gate) * slope


@triton.jit
def _forward(
    gate, up, y,
    row_count, width,
    gate_stride, up_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < row_count) & (column < width)
    g = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
    activated, _ = _activation(g, ACTIVATION)
    tl.store(y + row * width + column, activated * u, inside)


@triton.jit
def _backward(
    dy, gate, up, dgate, dup,
    row_count, width,
    dy_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < row_count) & (column < width)
    gradient = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, inside, other=0.0).to(tl.float32)
    activated, slope = _activation(g, ACTIVATION)
    tl.store(dgate + row * width + column, gradient * u * slope, inside)
    tl.store(dup + row * width + column, gradient * activated, inside)


_CONFIGURATIONS = (
    Configuration({"ROWS": 4, "COLUMNS": 512}, num_warps=8, num_stages=1),
    Configuration({"ROWS": 1, "COLUMNS": 1024}, num_warps=4, num_stages=1),
    Configuration({"ROWS": 8, "COLUMNS": 256}, num_warps=4, num_stages=1),
    Configuration({"ROWS": 1, "COLUMNS": 2048}, num_warps=8, num_stages=1),
)
FORWARD = Kernel("glu_forward", _forward, _CONFIGURATIONS)
BACKWARD = Kernel("glu_backward", _backward, _CONFIGURATIONS)


def _grid(row_count: int, width: int) -> Any:
    return lambda blocks: (cdiv(row_count, blocks["ROWS"]), cdiv(width, blocks["COLUMNS"]))


def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u = matrix(gate), matrix(up)
    row_count, width = g.shape
    FORWARD.launch(
        _grid(row_count, width),
        gate=g, up=u, y=y, row_count=row_count, width=width,
        gate_stride=g.stride(0), up_stride=u.stride(0), ACTIVATION=activation,
    )  # fmt: skip
    return y


def _glu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    d, g, u = matrix(dy), matrix(gate), matrix(up)
    row_count, width = g.shape
    BACKWARD.launch(
        _grid(row_count, width),
        dy=d, gate=g, up=u, dgate=dgate, dup=dup, row_count=row_count, width=width,
        dy_stride=d.stride(0), gate_stride=g.stride(0), up_stride=u.stride(0), ACTIVATION=activation,
    )  # fmt: skip
    return dgate, dup


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    return *BACKWARD_OPERATOR(dy, gate, up, ctx.activation), None


BACKWARD_OPERATOR = Operator(
    "glu_backward",
    "(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    _glu_backward,
)
OPERATOR = Operator("glu", "(Tensor gate, Tensor up, str activation) -> Tensor", _glu)
OPERATOR.differentiate(_autograd, _setup, partner=BACKWARD_OPERATOR)


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """See :func:`star_kernels.glu`."""
    y: Tensor = OPERATOR(gate, up, activation)
    return y


OPERATOR.register(glu)
