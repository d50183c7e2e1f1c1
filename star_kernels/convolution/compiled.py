"""The compiled convolutions: fakes, derivatives, and functions with the reference's signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.compiled import call, like, operator, register_autograd, register_fake

_SHORT_CONV_STEP = operator("short_conv_step")
_GATED_SHORT_CONV_STEP = operator("gated_short_conv_step")
_LONG_CONV_STEP = operator("long_conv_step")
_GATED_LONG_CONV_STEP = operator("gated_long_conv_step")


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _short_conv_fake(
    x: Tensor, weight: Tensor, bias: Any, silu: bool, initial_state: Any, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    state = x.new_empty(_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2])
    return torch.empty_like(x, memory_format=torch.contiguous_format), state


def _short_conv_backward_fake(
    dy: Tensor,
    dfinal_state: Any,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    width, taps = weight.shape
    states = 0 if initial_state is None else _sequences(x, cu_seqlens)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(width, taps, dtype=torch.float32),
        x.new_empty(width, dtype=torch.float32),
        x.new_empty(states, taps - 1, width),
    )


def _short_conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, silu, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.silu = silu
    ctx.set_materialize_grads(False)


def _short_conv_autograd(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dstate = operator("short_conv_backward")(
        dy, dfinal_state, x, weight, bias, ctx.silu, initial_state, cu_seqlens
    )
    return dx, like(dweight, weight), like(dbias, bias), None, like(dstate, initial_state), None


def _gated_short_conv_fake(
    b: Tensor, c: Tensor, x: Tensor, weight: Tensor, bias: Any, initial_state: Any, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _short_conv_fake(x, weight, bias, False, initial_state, cu_seqlens)


def _gated_short_conv_backward_fake(
    dy: Tensor,
    dfinal_state: Any,
    b: Tensor,
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    dx, *others = _short_conv_backward_fake(
        dy, dfinal_state, x, weight, bias, False, initial_state, cu_seqlens
    )
    return torch.empty_like(dx), torch.empty_like(dx), dx, *others


def _gated_short_conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gated_short_conv_autograd(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    b, c, x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    db, dc, dx, dweight, dbias, dstate = operator("gated_short_conv_backward")(
        dy, dfinal_state, b, c, x, weight, bias, initial_state, cu_seqlens
    )
    return db, dc, dx, like(dweight, weight), like(dbias, bias), like(dstate, initial_state), None


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
    y, final_state = call(
        operator("short_conv"), x, weight, bias, activation == "silu", initial_state, cu_seqlens
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
    y, final_state = call(operator("gated_short_conv"), b, c, x, weight, bias, initial_state, cu_seqlens)
    return (y, final_state) if return_final_state else y


def _long_conv_fake(x: Tensor, kernel: Tensor, skip: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _long_conv_backward_fake(dy: Tensor, x: Tensor, kernel: Tensor, skip: Any) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(kernel.shape, dtype=torch.float32),
        x.new_empty(x.shape[2], dtype=torch.float32),
    )


def _long_conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _long_conv_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, kernel, skip = ctx.saved_tensors
    dx, dkernel, dskip = operator("long_conv_backward")(dy, x, kernel, skip)
    return dx, like(dkernel, kernel), like(dskip, skip)


def _gated_long_conv_fake(b: Tensor, c: Tensor, x: Tensor, kernel: Tensor, skip: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gated_long_conv_backward_fake(
    dy: Tensor, b: Tensor, c: Tensor, x: Tensor, kernel: Tensor, skip: Any
) -> tuple[Tensor, ...]:
    dx, *others = _long_conv_backward_fake(dy, x, kernel, skip)
    return torch.empty_like(dx), torch.empty_like(dx), dx, *others


def _gated_long_conv_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    b, c, x, kernel, skip = ctx.saved_tensors
    db, dc, dx, dkernel, dskip = operator("gated_long_conv_backward")(dy, b, c, x, kernel, skip)
    return db, dc, dx, like(dkernel, kernel), like(dskip, skip)


def long_conv(x: Tensor, kernel: Tensor, skip: Tensor | None = None) -> Tensor:
    """See :func:`star_kernels.long_conv`."""
    y: Tensor = call(operator("long_conv"), x, kernel, skip)
    return y


def gated_long_conv(b: Tensor, c: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None = None) -> Tensor:
    """See :func:`star_kernels.gated_long_conv`."""
    y: Tensor = call(operator("gated_long_conv"), b, c, x, kernel, skip)
    return y


def long_conv_step(
    x: Tensor, history: Tensor, kernel: Tensor, skip: Tensor | None = None, *, position: int | Tensor
) -> Tensor:
    """See :func:`star_kernels.long_conv_step`."""
    step = _LONG_CONV_STEP_AT if isinstance(position, Tensor) else _LONG_CONV_STEP
    y: Tensor = step(x, history, kernel, skip, position)
    return y


def gated_long_conv_step(
    b: Tensor,
    c: Tensor,
    x: Tensor,
    history: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    position: int | Tensor,
) -> Tensor:
    """See :func:`star_kernels.gated_long_conv_step`."""
    step = _GATED_LONG_CONV_STEP_AT if isinstance(position, Tensor) else _GATED_LONG_CONV_STEP
    y: Tensor = step(b, c, x, history, kernel, skip, position)
    return y


def short_conv_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """See :func:`star_kernels.short_conv_step`."""
    if activation not in (None, "silu"):
        raise TypeError(activation)  # the contract, which is asked then, says it in words
    y: Tensor = _SHORT_CONV_STEP(x, state, weight, bias, activation == "silu")
    return y


def gated_short_conv_step(
    b: Tensor, c: Tensor, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """See :func:`star_kernels.gated_short_conv_step`."""
    y: Tensor = _GATED_SHORT_CONV_STEP(b, c, x, state, weight, bias)
    return y


register_fake("short_conv_step", lambda x, state, weight, bias, silu: x.new_empty(x.shape))
register_fake("gated_short_conv_step", lambda b, c, x, state, weight, bias: x.new_empty(x.shape))
register_fake("long_conv_step", lambda x, history, kernel, skip, position: x.new_empty(x.shape))
register_fake("gated_long_conv_step", lambda b, c, x, history, kernel, skip, position: x.new_empty(x.shape))
register_fake("long_conv_step.tensor", lambda x, history, kernel, skip, position: x.new_empty(x.shape))
register_fake(
    "gated_long_conv_step.tensor", lambda b, c, x, history, kernel, skip, position: x.new_empty(x.shape)
)
# The steps at positions that are in tensors.
_LONG_CONV_STEP_AT = operator("long_conv_step", "tensor")
_GATED_LONG_CONV_STEP_AT = operator("gated_long_conv_step", "tensor")
register_fake("long_conv", _long_conv_fake)
register_fake("long_conv_backward", _long_conv_backward_fake)
register_autograd("long_conv", _long_conv_autograd, _long_conv_setup)
register_fake("gated_long_conv", _gated_long_conv_fake)
register_fake("gated_long_conv_backward", _gated_long_conv_backward_fake)
register_autograd("gated_long_conv", _gated_long_conv_autograd, _long_conv_setup)
register_fake("short_conv", _short_conv_fake)
register_fake("short_conv_backward", _short_conv_backward_fake)
register_autograd("short_conv", _short_conv_autograd, _short_conv_setup)
register_fake("gated_short_conv", _gated_short_conv_fake)
register_fake("gated_short_conv_backward", _gated_short_conv_backward_fake)
register_autograd("gated_short_conv", _gated_short_conv_autograd, _gated_short_conv_setup)

_ON_CUDA = (
    short_conv,
    gated_short_conv,
    short_conv_step,
    gated_short_conv_step,
    long_conv_step,
    gated_long_conv_step,
)
for _function in (
    short_conv,
    gated_short_conv,
    short_conv_step,
    gated_short_conv_step,
    long_conv,
    gated_long_conv,
    long_conv_step,
    gated_long_conv_step,
):
    dispatch.register_compiled(_function.__name__, _function, cuda=_function in _ON_CUDA)
