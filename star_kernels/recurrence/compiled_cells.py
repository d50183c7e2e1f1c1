"""The compiled GRU and LSTM with diagonal weights: fakes, derivatives, and the reference's signatures.

tolerance and max_iterations have nothing to do here: the CPU runs the sequential loop, which is exact, and a
GPU does so too, or Newton's iterations with limits of their own (csrc/recurrence/cuda_cells.cu).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.compiled import call, like, operator, register_autograd, register_fake
from star_kernels.recurrence.compiled import floats, fresh, optional_state

# Looked up once: a step counts in microseconds.
_GRU_STEP = operator("gru_scan_step")
_LSTM_STEP = operator("lstm_scan_step")


def _state(x: Tensor) -> Tensor:
    return floats(x, x.shape[0], x.shape[2])


def _input_gradients(xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    width = xs[0].shape[2]
    return *(fresh(x) for x in xs), *(floats(x, width) for x in xs)


def _state_gradient(state: Tensor | None, x: Tensor) -> Tensor:
    return optional_state(state, x, x.shape[0], x.shape[2])


# gru_scan


def _gru_fake(xz: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return fresh(xz), _state(xz)


def _gru_backward_fake(
    dh: Tensor,
    dfinal_state: Any,
    xz: Tensor,
    xr: Tensor,
    xh: Tensor,
    az: Any,
    ar: Any,
    ah: Any,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    return *_input_gradients((xz, xr, xh)), _state_gradient(initial_state, xz)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gru_autograd(ctx: Any, dh: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    *cell, initial_state = ctx.saved_tensors
    dh = torch.zeros_like(cell[0]) if dh is None else dh
    *gradients, dstate = operator("gru_scan_backward")(dh, dfinal_state, *cell, initial_state)
    weights = (like(gradient, weight) for gradient, weight in zip(gradients[3:], cell[3:], strict=True))
    return *gradients[:3], *weights, like(dstate, initial_state)


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
    """See :func:`star_kernels.gru_scan`."""
    h, final_state = call(operator("gru_scan"), xz, xr, xh, az, ar, ah, initial_state)
    return (h, final_state) if return_final_state else h


def gru_scan_step(
    xz: Tensor, xr: Tensor, xh: Tensor, az: Tensor, ar: Tensor, ah: Tensor, state: Tensor
) -> Tensor:
    """See :func:`star_kernels.gru_scan_step`."""
    h: Tensor = _GRU_STEP(xz, xr, xh, az, ar, ah, state)
    return h


# lstm_scan


def _lstm_fake(xf: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fresh(xf), _state(xf), _state(xf)


def _lstm_backward_fake(
    dh: Tensor,
    dfinal_c: Any,
    dfinal_h: Any,
    xf: Tensor,
    xo: Tensor,
    xz: Tensor,
    af: Any,
    ao: Any,
    az: Any,
    initial_c: Tensor | None,
    initial_h: Tensor | None,
) -> tuple[Tensor, ...]:
    states = _state_gradient(initial_c, xf), _state_gradient(initial_h, xf)
    return *_input_gradients((xf, xo, xz)), *states


def _lstm_autograd(
    ctx: Any, dh: Tensor | None, dfinal_c: Tensor | None, dfinal_h: Tensor | None
) -> tuple[Any, ...]:
    *cell, initial_c, initial_h = ctx.saved_tensors
    dh = torch.zeros_like(cell[0]) if dh is None else dh
    *gradients, dc, dstate = operator("lstm_scan_backward")(
        dh, dfinal_c, dfinal_h, *cell, initial_c, initial_h
    )
    weights = (like(gradient, weight) for gradient, weight in zip(gradients[3:], cell[3:], strict=True))
    return *gradients[:3], *weights, like(dc, initial_c), like(dstate, initial_h)


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
    """See :func:`star_kernels.lstm_scan`."""
    initial_c, initial_h = initial_state or (None, None)
    h, final_c, final_h = call(operator("lstm_scan"), xf, xo, xz, af, ao, az, initial_c, initial_h)
    return (h, (final_c, final_h)) if return_final_state else h


def lstm_scan_step(
    xf: Tensor,
    xo: Tensor,
    xz: Tensor,
    af: Tensor,
    ao: Tensor,
    az: Tensor,
    state_c: Tensor,
    state_h: Tensor,
) -> Tensor:
    """See :func:`star_kernels.lstm_scan_step`."""
    h: Tensor = _LSTM_STEP(xf, xo, xz, af, ao, az, state_c, state_h)
    return h


register_fake("gru_scan", _gru_fake)
register_fake("gru_scan_backward", _gru_backward_fake)
register_fake("gru_scan_step", lambda xz, *others: xz.new_empty(xz.shape))
register_autograd("gru_scan", _gru_autograd, _setup)
register_fake("lstm_scan", _lstm_fake)
register_fake("lstm_scan_backward", _lstm_backward_fake)
register_fake("lstm_scan_step", lambda xf, *others: xf.new_empty(xf.shape))
register_autograd("lstm_scan", _lstm_autograd, _setup)

for _name, _function, _cuda in (
    ("gru_scan", gru_scan, True),
    ("gru_scan_step", gru_scan_step, True),
    ("lstm_scan", lstm_scan, True),
    ("lstm_scan_step", lstm_scan_step, True),
):
    dispatch.register_compiled(_name, _function, cuda=_cuda)
