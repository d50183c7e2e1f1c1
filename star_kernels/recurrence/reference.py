"""Recurrences over the sequence, as their equations read.

linear scan             h_t = decay_t ⊙ h_{t-1} + x_t
selective scan          h_t = exp(dt_t A) ⊙ h_{t-1} + dt_t x_t B_t,  y_t = h_t·C_t + D ⊙ x_t  (2312.00752)
gated linear attention  S_t = exp(g_t) S_{t-1} + k_t v_tᵀ,  y_t = scale S_tᵀ q_t              (2312.06635)
gated delta rule        S_t = exp(g_t) S_{t-1} + β_t k_t (v_t − (exp(g_t) S_{t-1})ᵀ k_t)ᵀ     (2412.06464)
GRU, LSTM               nonlinear, with diagonal recurrent weights                            (2510.21450)

The first two and the last two run token by token. The matrix-valued states run chunk by chunk (see
:mod:`star_kernels.recurrence.chunks`). States are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from star_kernels.packing import over_sequences
from star_kernels.recurrence import chunks

SCAN_CHUNK = 64
"""Tokens whose (B, chunk, D, N) states the selective scan holds at a time; backward recomputes them."""


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which a recurrence on ``tensor`` accumulates and keeps its state."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def linear_scan(
    decay: Tensor,
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.linear_scan`."""

    def dense(decay: Tensor, x: Tensor, state: Tensor | None) -> tuple[Tensor, tuple[Tensor]]:
        states, final_state = _scan(decay, x, _state(state, x, (x.shape[0], x.shape[2])))
        return states, (final_state,)

    arguments = (decay.to(wide(x)), x.to(wide(x)))
    if cu_seqlens is None:
        y, (final_state,) = dense(*arguments, initial_state)
    else:
        y, (final_state,) = over_sequences(dense, cu_seqlens, arguments, [initial_state])
    y = y.to(x.dtype)
    return (y, final_state) if return_final_state else y


def _state(state: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_zeros(shape, dtype=wide(x)) if state is None else state.to(wide(x))


def _scan(decay: Tensor, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All h_t = decay_t ⊙ h_{t-1} + x_t along dimension 1, from h_0 = ``state``; and the last of them."""
    if x.shape[1] == 0:
        return x, state
    if torch.compiler.is_compiling():  # a loop over tokens would be unrolled into the graph
        x = torch.cat([torch.addcmul(x[:, :1], decay[:, :1], state[:, None]), x[:, 1:]], dim=1)
        states = _scan_by_pairs(decay, x)
        return states, states[:, -1]
    steps = []
    for decay_t, x_t in zip(decay.unbind(1), x.unbind(1), strict=True):
        state = torch.addcmul(x_t, decay_t, state)
        steps.append(state)
    return torch.stack(steps, dim=1), state


def _scan_by_pairs(decay: Tensor, x: Tensor) -> Tensor:
    """The scan of a zero state in O(L) work and O(log L) operations: two tokens at a time are one."""
    length = x.shape[1]
    if length == 1:
        return x
    even_decay, odd_decay = decay[:, : length - 1 : 2], decay[:, 1::2]
    pairs = torch.addcmul(x[:, 1::2], odd_decay, x[:, : length - 1 : 2])
    odd = _scan_by_pairs(even_decay * odd_decay, pairs)
    later = torch.addcmul(x[:, 2::2], decay[:, 2::2], odd[:, : (length - 1) // 2])
    even = torch.cat([x[:, :1], later], dim=1)
    states = torch.stack([even[:, : length // 2], odd], dim=2).flatten(1, 2)
    return states if length % 2 == 0 else torch.cat([states, even[:, -1:]], dim=1)


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
    """See :func:`star_kernels.selective_scan`."""
    dtype = wide(x)
    A = A.to(dtype)
    step = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    if B.dim() == 3:
        B, C = B[:, :, None], C[:, :, None]

    def dense(
        x: Tensor, step: Tensor, B: Tensor, C: Tensor, state: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor]]:
        state = _state(state, x, (x.shape[0], *A.shape))
        outputs = [x[:, :0]]
        for pieces in zip(*(tensor.split(SCAN_CHUNK, 1) for tensor in (x, step, B, C)), strict=True):
            if pieces[0].shape[1]:
                output, state = checkpoint(
                    _selective_chunk, *pieces, A, state, use_reentrant=False, preserve_rng_state=False
                )
                outputs.append(output)
        return torch.cat(outputs, dim=1), (state,)

    arguments = (x.to(dtype), step, B.to(dtype), C.to(dtype))
    if cu_seqlens is None:
        y, (final_state,) = dense(*arguments, initial_state)
    else:
        y, (final_state,) = over_sequences(dense, cu_seqlens, arguments, [initial_state])
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(x.dtype)
    return (y, final_state) if return_final_state else y


def _selective_chunk(
    x: Tensor, step: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y_t = h_t·C_t over a chunk. x, step (B, L, D); B, C (B, L, G, N); A (D, N); state (B, D, N)."""
    groups = B.shape[2]
    decay = torch.exp(step[..., None] * A)
    update = (step * x).unflatten(2, (groups, -1))[..., None] * B[..., None, :]
    states, state = _scan(decay, update.flatten(2, 3), state)
    y = (states.unflatten(2, (groups, -1)) * C[..., None, :]).sum(-1)
    return y.flatten(2, 3), state


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
    dtype = wide(v)
    q, k, log_decay = _heads_of_values(q, k, v, log_decay, scale)

    def dense(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor]]:
        state = _state(state, v, (v.shape[0], v.shape[2], k.shape[3], v.shape[3]))
        y, state = chunks.gated_linear_attention(q, k, v, log_decay, state)
        return y, (state,)

    arguments = (q, k, v.to(dtype), log_decay)
    if cu_seqlens is None:
        y, (final_state,) = dense(*arguments, initial_state)
    else:
        y, (final_state,) = over_sequences(dense, cu_seqlens, arguments, [initial_state])
    y = y.to(v.dtype)
    return (y, final_state) if return_final_state else y


def _heads_of_values(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """scale·q and k with as many heads as v (consecutive heads of v share one), and a decay that is there."""
    dtype, heads = wide(v), v.shape[2]
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if log_decay is None:
        log_decay = v.new_zeros(v.shape[:3], dtype=dtype)
    q, k = (tensor.to(dtype).repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (q, k))
    return scale * q, k, log_decay.to(dtype)


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
    dtype = wide(v)
    q, k, log_decay = _heads_of_values(q, k, v, log_decay, scale)

    def dense(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor]]:
        state = _state(state, v, (v.shape[0], v.shape[2], k.shape[3], v.shape[3]))
        y, state = chunks.gated_delta_rule(q, k, v, beta, log_decay, state)
        return y, (state,)

    arguments = (q, k, v.to(dtype), beta.to(dtype), log_decay)
    if cu_seqlens is None:
        y, (final_state,) = dense(*arguments, initial_state)
    else:
        y, (final_state,) = over_sequences(dense, cu_seqlens, arguments, [initial_state])
    y = y.to(v.dtype)
    return (y, final_state) if return_final_state else y


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
    """See :func:`star_kernels.gru_scan`. The sequential loop: exact, it has nothing to iterate."""
    dtype = wide(xz)
    h = _state(initial_state, xz, (xz.shape[0], xz.shape[2]))
    az, ar, ah = az.to(dtype), ar.to(dtype), ah.to(dtype)
    outputs = []
    for z_t, r_t, h_t in zip(*(tensor.to(dtype).unbind(1) for tensor in (xz, xr, xh)), strict=True):
        z = torch.sigmoid(z_t + az * h)
        r = torch.sigmoid(r_t + ar * h)
        h = torch.lerp(h, torch.tanh(h_t + ah * (r * h)), z)
        outputs.append(h)
    y = torch.stack(outputs, dim=1).to(xz.dtype) if outputs else xz * 1
    return (y, h) if return_final_state else y


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
    """See :func:`star_kernels.lstm_scan`. The sequential loop: exact, it has nothing to iterate."""
    dtype, shape = wide(xf), (xf.shape[0], xf.shape[2])
    c, h = (_state(state, xf, shape) for state in initial_state or (None, None))
    af, ao, az = af.to(dtype), ao.to(dtype), az.to(dtype)
    outputs = []
    for f_t, o_t, z_t in zip(*(tensor.to(dtype).unbind(1) for tensor in (xf, xo, xz)), strict=True):
        f = torch.sigmoid(f_t + af * h)
        o = torch.sigmoid(o_t + ao * h)
        c = torch.lerp(torch.tanh(z_t + az * h), c, f)
        h = o * torch.tanh(c)
        outputs.append(h)
    y = torch.stack(outputs, dim=1).to(xf.dtype) if outputs else xf * 1
    return (y, (c, h)) if return_final_state else y


# Steps: calls of length 1 whose final state goes back into the state that was given.


@torch.no_grad()
def linear_scan_step(decay: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """See :func:`star_kernels.linear_scan_step`."""
    y, after = linear_scan(decay[:, None], x[:, None], initial_state=state, return_final_state=True)
    state.copy_(after)
    return y[:, 0]


@torch.no_grad()
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
    y, after = selective_scan(
        x[:, None],
        dt[:, None],
        A,
        B[:, None],
        C[:, None],
        D,
        None if z is None else z[:, None],
        dt_bias,
        dt_softplus=dt_softplus,
        initial_state=state,
        return_final_state=True,
    )
    state.copy_(after)
    return y[:, 0]


@torch.no_grad()
def gated_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, *, scale: float | None = None
) -> Tensor:
    """See :func:`star_kernels.gated_linear_attention_step`."""
    decay = None if log_decay is None else log_decay[:, None]
    y, after = gated_linear_attention(
        q[:, None],
        k[:, None],
        v[:, None],
        decay,
        scale=scale,
        initial_state=state,
        return_final_state=True,
    )
    state.copy_(after)
    return y[:, 0]


@torch.no_grad()
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
    decay = None if log_decay is None else log_decay[:, None]
    y, after = gated_delta_rule(
        q[:, None],
        k[:, None],
        v[:, None],
        beta[:, None],
        decay,
        scale=scale,
        initial_state=state,
        return_final_state=True,
    )
    state.copy_(after)
    return y[:, 0]


@torch.no_grad()
def gru_scan_step(
    xz: Tensor, xr: Tensor, xh: Tensor, az: Tensor, ar: Tensor, ah: Tensor, state: Tensor
) -> Tensor:
    """See :func:`star_kernels.gru_scan_step`."""
    inputs = (xz[:, None], xr[:, None], xh[:, None])
    y, after = gru_scan(*inputs, az, ar, ah, initial_state=state, return_final_state=True)
    state.copy_(after)
    return y[:, 0]


@torch.no_grad()
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
    y, (after_c, after_h) = lstm_scan(
        xf[:, None],
        xo[:, None],
        xz[:, None],
        af,
        ao,
        az,
        initial_state=(state_c, state_h),
        return_final_state=True,
    )
    state_c.copy_(after_c)
    state_h.copy_(after_h)
    return y[:, 0]
