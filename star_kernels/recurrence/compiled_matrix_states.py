"""The compiled recurrences with matrix-valued states: fakes, derivatives, and the reference's signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.compiled import call, like, operator, register_autograd, register_fake
from star_kernels.recurrence.compiled import floats, fresh, optional_state, sequence_count

# Looked up once: a step counts in microseconds.
_ATTENTION_STEP = operator("gated_linear_attention_step")
_DELTA_STEP = operator("gated_delta_rule_step")


def _scale(q: Tensor, scale: float | None) -> float:
    return q.size(-1) ** -0.5 if scale is None else scale


def _state_shape(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    return sequence_count(v, cu_seqlens), v.shape[2], k.shape[3], v.shape[3]


def _decay_gradient(log_decay: Tensor | None, v: Tensor) -> Tensor:
    return floats(v, 0) if log_decay is None else floats(v, *log_decay.shape)


# gated_linear_attention


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Any, scale: float, state: Any, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return fresh(v), floats(v, *_state_shape(k, v, cu_seqlens))


def _attention_backward_fake(
    dy: Tensor,
    dfinal_state: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    state = optional_state(initial_state, v, *_state_shape(k, v, cu_seqlens))
    return fresh(q), fresh(k), fresh(v), _decay_gradient(log_decay, v), state


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _attention_autograd(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    dq, dk, dv, ddecay, dstate = operator("gated_linear_attention_backward")(
        dy, dfinal_state, q, k, v, log_decay, ctx.scale, initial_state, cu_seqlens
    )
    return dq, dk, dv, like(ddecay, log_decay), None, like(dstate, initial_state), None


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.gated_linear_attention`."""
    op = operator("gated_linear_attention")
    y, final_state = call(op, q, k, v, log_decay, _scale(q, scale), initial_state, cu_seqlens)
    return (y, final_state) if return_final_state else y


def gated_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, scale: float | None = None
) -> Tensor:
    """See :func:`star_kernels.gated_linear_attention_step`."""
    y: Tensor = _ATTENTION_STEP(q, k, v, log_decay, state, _scale(q, scale))
    return y


# gated_delta_rule


def _delta_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Any,
    log_decay: Any,
    scale: float,
    state: Any,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return fresh(v), floats(v, *_state_shape(k, v, cu_seqlens))


def _delta_backward_fake(
    dy: Tensor,
    dfinal_state: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    state = optional_state(initial_state, v, *_state_shape(k, v, cu_seqlens))
    return fresh(q), fresh(k), fresh(v), fresh(beta), _decay_gradient(log_decay, v), state


def _delta_autograd(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    q, k, v, beta, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    dq, dk, dv, dbeta, ddecay, dstate = operator("gated_delta_rule_backward")(
        dy, dfinal_state, q, k, v, beta, log_decay, ctx.scale, initial_state, cu_seqlens
    )
    return dq, dk, dv, dbeta, like(ddecay, log_decay), None, like(dstate, initial_state), None


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.gated_delta_rule`."""
    op = operator("gated_delta_rule")
    y, final_state = call(op, q, k, v, beta, log_decay, _scale(q, scale), initial_state, cu_seqlens)
    return (y, final_state) if return_final_state else y


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """See :func:`star_kernels.gated_delta_rule_step`."""
    y: Tensor = _DELTA_STEP(q, k, v, beta, log_decay, state, _scale(q, scale))
    return y


register_fake("gated_linear_attention", _attention_fake)
register_fake("gated_linear_attention_backward", _attention_backward_fake)
register_fake("gated_linear_attention_step", lambda q, k, v, *others: v.new_empty(v.shape))
register_autograd("gated_linear_attention", _attention_autograd, _attention_setup)
register_fake("gated_delta_rule", _delta_fake)
register_fake("gated_delta_rule_backward", _delta_backward_fake)
register_fake("gated_delta_rule_step", lambda q, k, v, *others: v.new_empty(v.shape))
register_autograd("gated_delta_rule", _delta_autograd, _attention_setup)

for _name, _function, _cuda in (
    ("gated_linear_attention", gated_linear_attention, False),
    ("gated_linear_attention_step", gated_linear_attention_step, True),
    ("gated_delta_rule", gated_delta_rule, False),
    ("gated_delta_rule_step", gated_delta_rule_step, True),
):
    dispatch.register_compiled(_name, _function, cuda=_cuda)
