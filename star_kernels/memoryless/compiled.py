"""The compiled gated linear unit: fakes, derivatives, and a function with the reference's signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.compiled import call, operator, register_autograd, register_fake
from star_kernels.memoryless.reference import ACTIVATIONS

CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
"""The numbers of csrc/memoryless/kernels.h, in the order of its enumeration."""


def _glu_fake(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return gate.new_empty(gate.shape)


def _glu_backward_fake(dy: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _glu_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _glu_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    return *operator("glu_backward")(dy, gate, up, ctx.activation), None


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """See :func:`star_kernels.glu`."""
    y: Tensor = call(torch.ops.star_kernels.glu.default, gate, up, CODES[activation])
    return y


register_fake("glu", _glu_fake)
register_fake("glu_backward", _glu_backward_fake)
register_autograd("glu", _glu_autograd, _glu_setup)
dispatch.register("glu", "cpp", glu, device_type="cpu", dtypes=dispatch.KERNEL_DTYPES)
