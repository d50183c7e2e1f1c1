"""The compiled norm and rotary embedding: fakes, derivatives, functions with the reference's signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.compiled import call, like, operator, register_autograd, register_fake


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = operator("rms_norm_backward")(dy, None, x, weight, ctx.eps)
    return dx, like(dweight, weight), None


def _rms_norm_residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _rms_norm_residual_autograd(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Any, ...]:
    total, weight = ctx.saved_tensors
    if dy is None:
        return dsum, dsum, None, None
    dx, dweight = operator("rms_norm_backward")(dy, dsum, total, weight, ctx.eps)
    return dx, dx, like(dweight, weight), None


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, cos, sin, ctx.inverse = inputs
    ctx.learns_angles = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(cos, sin, x if ctx.learns_angles else None)


def _rope_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    cos, sin, x = ctx.saved_tensors
    dx = operator("rope")(dy, cos, sin, not ctx.inverse)
    if not ctx.learns_angles:
        return dx, None, None, None
    wide = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(wide).chunk(2, dim=-1)
    dy1, dy2 = dy.to(wide).chunk(2, dim=-1)
    dcos = (dy1 * x1 + dy2 * x2).sum(dim=(0, 2))
    dsin = (dy2 * x1 - dy1 * x2).sum(dim=(0, 2))
    return dx, like(dcos, cos), like(-dsin if ctx.inverse else dsin, sin), None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.rms_norm`."""
    y: Tensor
    if residual is None:
        y = call(torch.ops.star_kernels.rms_norm.default, x, weight, eps)
        return y
    y, total = call(torch.ops.star_kernels.rms_norm_residual.default, x, residual, weight, eps)
    return y, total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`star_kernels.rope`."""
    y: Tensor = call(torch.ops.star_kernels.rope.default, x, cos, sin, False)
    return y


register_fake("rms_norm", lambda x, weight, eps: x.new_empty(x.shape))
register_fake(
    "rms_norm_residual", lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape))
)
register_fake(
    "rms_norm_backward",
    lambda dy, dsum, x, weight, eps: (
        x.new_empty(x.shape),
        x.new_empty(weight.shape, dtype=torch.float32),
    ),
)
register_fake("rope", lambda x, cos, sin, inverse: x.new_empty(x.shape))
register_autograd("rms_norm", _rms_norm_autograd, _rms_norm_setup)
register_autograd("rms_norm_residual", _rms_norm_residual_autograd, _rms_norm_residual_setup, refuse=False)
# Linear in x, so its derivative is the operator itself, turned back: second derivatives are right.
register_autograd("rope", _rope_autograd, _rope_setup, refuse=False)

dispatch.register_compiled("rms_norm", rms_norm, cuda=True)
dispatch.register_compiled("rope", rope)
