"""The compiled scans: fakes, derivatives, and functions with the reference's signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.compiled import call, like, operator, register_autograd, register_fake
from star_kernels.recurrence import reference

# Looked up once: a step counts in microseconds.
_LINEAR_STEP = operator("linear_scan_step")
_SELECTIVE_STEP = operator("selective_scan_step")

MOST_CUDA_STATES = 64
MOST_CUDA_ELEMENTS = 2**31 - 1
"""Of the CUDA form of the selective scan: what its threads hold, and the offsets that they count in."""


def sequence_count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """S: the sequences that have a state."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def fresh(tensor: Tensor) -> Tensor:
    """A contiguous tensor with the shape and dtype of ``tensor``."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def floats(tensor: Tensor, *shape: int) -> Tensor:
    """A float32 tensor on the device of ``tensor``."""
    return tensor.new_empty(shape, dtype=torch.float32)


def optional_state(wanted: Tensor | None, tensor: Tensor, *shape: int) -> Tensor:
    """A state's gradient, with no rows where there is no such state."""
    return floats(tensor, 0 if wanted is None else shape[0], *shape[1:])


# linear_scan


def _linear_scan_fake(
    decay: Tensor, x: Tensor, initial_state: Any, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return fresh(x), floats(x, sequence_count(x, cu_seqlens), x.shape[2])


def _linear_scan_backward_fake(
    dh: Tensor,
    dfinal_state: Any,
    decay: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    state = optional_state(initial_state, h, sequence_count(h, cu_seqlens), h.shape[2])
    return fresh(h), fresh(h), state


def _linear_scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    decay, _, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(decay, output[0], initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _linear_scan_autograd(ctx: Any, dh: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    decay, h, initial_state, cu_seqlens = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh
    ddecay, dx, dstate = operator("linear_scan_backward")(
        dh, dfinal_state, decay, h, initial_state, cu_seqlens
    )
    return ddecay, dx, like(dstate, initial_state), None


def linear_scan(
    decay: Tensor,
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.linear_scan`."""
    y, final_state = call(operator("linear_scan"), decay, x, initial_state, cu_seqlens)
    return (y, final_state) if return_final_state else y


def linear_scan_step(decay: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """See :func:`star_kernels.linear_scan_step`."""
    h: Tensor = _LINEAR_STEP(decay, x, state)
    return h


# selective_scan


def _selective_scan_fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    bias: Any,
    softplus: bool,
    state: Any,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return fresh(x), floats(x, sequence_count(x, cu_seqlens), *A.shape)


def _selective_scan_backward_fake(
    dy: Tensor,
    dfinal_state: Any,
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
    width = x.shape[2]
    return (
        fresh(x),
        fresh(x),
        floats(x, *A.shape),
        fresh(B),
        fresh(C),
        floats(x, width),
        x.new_empty(x.shape[0] if z is not None else 0, *x.shape[1:]),
        floats(x, width),
        optional_state(initial_state, x, sequence_count(x, cu_seqlens), *A.shape),
    )


def _selective_scan_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.dt_softplus, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _selective_scan_autograd(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = operator("selective_scan_backward")(
        dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, initial_state, cu_seqlens
    )
    dz = dz if z is not None else None
    parameters = like(dA, A), dB, dC, like(dD, D), dz, like(dbias, dt_bias)
    return dx, ddt, *parameters, None, like(dstate, initial_state), None


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
    """See :func:`star_kernels.selective_scan`. What is too large for the CUDA kernel goes to Triton's, which
    itself gives more states than it can hold to the definition."""
    if x.is_cuda and (A.shape[1] > MOST_CUDA_STATES or x.numel() > MOST_CUDA_ELEMENTS):
        larger = dispatch.form("selective_scan", "triton") or reference.selective_scan
        result: Tensor | tuple[Tensor, Tensor] = larger(
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
    y, final_state = call(
        operator("selective_scan"),
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        initial_state,
        cu_seqlens,
    )
    return (y, final_state) if return_final_state else y


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
) -> Tensor:
    """See :func:`star_kernels.selective_scan_step`."""
    y: Tensor = _SELECTIVE_STEP(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus)
    return y


register_fake("linear_scan", _linear_scan_fake)
register_fake("linear_scan_backward", _linear_scan_backward_fake)
register_fake("linear_scan_step", lambda decay, x, state: x.new_empty(x.shape))
register_autograd("linear_scan", _linear_scan_autograd, _linear_scan_setup)
register_fake("selective_scan", _selective_scan_fake)
register_fake("selective_scan_backward", _selective_scan_backward_fake)
register_fake("selective_scan_step", lambda x, *others: x.new_empty(x.shape))
register_autograd("selective_scan", _selective_scan_autograd, _selective_scan_setup)

for _name, _function, _cuda in (
    ("linear_scan", linear_scan, False),
    ("linear_scan_step", linear_scan_step, True),
    ("selective_scan", selective_scan, True),
    ("selective_scan_step", selective_scan_step, True),
):
    dispatch.register_compiled(_name, _function, cuda=_cuda)
