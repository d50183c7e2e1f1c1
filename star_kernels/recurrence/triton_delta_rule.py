"""The gated delta rule in Triton: chunks in parallel on the tensor cores, states passed between them.

Within a chunk, the rows that the rule writes, u_t = β_t (v_t − (decayed S_{t-1})ᵀ k_t), depend on each other.
Written out from the state S before the chunk they solve a unit triangular system (the WY form of arXiv
2406.06484, with decays 2412.06464 and 2510.26692):

    (I + M) U = βV − βK° S,   M_ts = β_t (decay over s+1..t of k_s)·k_t for s < t

with K° decayed from the chunk's start. T = (I + M)⁻¹ needs no state, so that all chunks make it at once
(`_systems`), W = T βK° and U° = T βV with it (`_solutions`); the pass between chunks is two products,
U = U° − W S and S⁺ = decay S + K'ᵀ U (`_states`). The rest is linear attention with U for V.

Backward keeps A and T where they are all that a chunk's tokens decide, and makes the states again. With dS⁺
the gradient of the state after a chunk and the scale in dY (`_dstates`):

    dU = Aᵀ dY + K' dS⁺,   dS = decay dS⁺ + Q'ᵀ dY − Wᵀ dU

Then no more order (`_gradients`, `_key_gradients`): with X = Tᵀ dU, the gradient of the right hand side,

    d(βV) = X,   d(βK°) = −X Sᵀ,   dM = −tril(X Uᵀ, −1)

which have the form of what linear attention has for its queries: K asks a second time, as a query of its own
past, with −X for dY. So do the gradients of the log-decays: of the pairs s < t of a chunk, g_r counts in
those with s < r <= t, running sums of q ⊙ dq and of −k ⊙ dk; see `triton_linear_attention`.

The kernels up to the states are in :mod:`star_kernels.recurrence.triton_delta_systems`, those of backward in
:mod:`star_kernels.recurrence.triton_delta_gradients`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.compiled import like
from star_kernels.launch import Operator, cdiv, rows
from star_kernels.recurrence.triton_delta_gradients import combine, pass_back
from star_kernels.recurrence.triton_delta_systems import Call
from star_kernels.recurrence.triton_linear_attention import OUTPUTS
from star_kernels.recurrence.triton_matrix_states import (
    WIDEST_KEY,
    key_block,
    strides,
    sum_group,
)


def _delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    call = Call(q, k, v, beta, log_decay, initial_state, cu_seqlens)
    OUTPUTS.launch(
        lambda blocks: (call.chunks.total * cdiv(call.values, blocks["VALUES"]), call.heads),
        q=call.q, k=call.k, v=call.written, log_decay=call.log_decay, pairs=call.pairs,
        queries=call.queries, states=call.states, y=y,
        **call.chunks.of_chunks, heads=call.heads, group=call.group, keys=call.keys, values=call.values,
        scale=scale, **strides(q=call.q, k=call.k, v=call.written, g=call.log_decay),
        DECAY=call.decay, C=call.chunks.size, OPERAND=call.operand, KEYS=key_block(call.k),
    )  # fmt: skip
    if call.decay == "key":
        return y, call.final, y.new_empty(0), y.new_empty(0)
    return y, call.final, call.pairs, call.inverse


def _delta_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    pairs: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy = rows(dy)
    call = Call(q, k, v, beta, log_decay, initial_state, cu_seqlens, (pairs, inverse))
    dstates, dwritten, dinitial = pass_back(call, dy, dfinal_state, scale)
    dq, dk, dv, dbeta, dg = combine(call, dy, dwritten, dstates, scale)
    if initial_state is None:
        dinitial = v.new_empty(0)
    return (
        sum_group(dq, q.shape[2], q.dtype), sum_group(dk, k.shape[2], k.dtype),
        dv, dbeta.to(beta.dtype), dg, dinitial,
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, *nothing: Any) -> tuple[Any, ...]:
    q, k, v, beta, log_decay, initial_state, cu_seqlens, pairs, inverse = ctx.saved_tensors
    dy = torch.zeros_like(v) if dy is None else dy
    dq, dk, dv, dbeta, ddecay, dstate = BACKWARD_OPERATOR(
        dy, dfinal_state, q, k, v, beta, log_decay, ctx.scale, initial_state, cu_seqlens, pairs, inverse
    )
    return dq, dk, dv, dbeta, like(ddecay, log_decay), None, like(dstate, initial_state), None


BACKWARD_OPERATOR = Operator(
    "gated_delta_rule_backward",
    "(Tensor dy, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, "
    "float scale, Tensor? initial_state, Tensor? cu_seqlens, Tensor pairs, Tensor inverse) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _delta_backward,
)
OPERATOR = Operator(
    "gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)",
    _delta,
)
OPERATOR.differentiate(_autograd, _setup, partner=BACKWARD_OPERATOR)


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
    """See :func:`star_kernels.gated_delta_rule`. More than 256 key dimensions go to the reference."""
    if k.shape[-1] > WIDEST_KEY:
        form: Any = dispatch.form("gated_delta_rule", "reference")
        result: Tensor | tuple[Tensor, Tensor] = form(
            q,
            k,
            v,
            beta,
            log_decay,
            scale=scale,
            initial_state=initial_state,
            return_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
        )
        return result
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, final_state, _, _ = OPERATOR(q, k, v, beta, log_decay, scale, initial_state, cu_seqlens)
    return (y, final_state) if return_final_state else y


OPERATOR.register(gated_delta_rule)
