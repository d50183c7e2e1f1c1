"""Recurrences over the sequence: scans, linear attention, delta rules, diagonal GRU and LSTM."""

from __future__ import annotations

from torch import Tensor

from star_kernels import dispatch
from star_kernels.contracts import Contract, autocast_together
from star_kernels.recurrence import reference
from star_kernels.recurrence.steps import gated_delta_rule_step as gated_delta_rule_step
from star_kernels.recurrence.steps import gated_linear_attention_step as gated_linear_attention_step
from star_kernels.recurrence.steps import gru_scan_step as gru_scan_step
from star_kernels.recurrence.steps import linear_scan_step as linear_scan_step
from star_kernels.recurrence.steps import lstm_scan_step as lstm_scan_step
from star_kernels.recurrence.steps import selective_scan_step as selective_scan_step

dispatch.load_triton("recurrence")

for _name in (
    "linear_scan",
    "selective_scan",
    "gated_linear_attention",
    "gated_delta_rule",
    "gru_scan",
    "lstm_scan",
):
    dispatch.register(_name, "reference", getattr(reference, _name))


def linear_scan(
    decay: Tensor,
    x: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Input-varying diagonal linear recurrence, h_t = decay_t ⊙ h_{t-1} + x_t (RG-LRU, arXiv 2402.19427).

    Args:
        decay, x: (B, L, D), any strides whose last dimension is contiguous.
        initial_state: (B, D), the state before the first token; zeros if None.
        return_final_state: also return the last state, (B, D) in float32 (float64 for float64 inputs).
        cu_seqlens: (S+1,) int32 offsets of S sequences packed into a batch of 1; states are (S, D).
        backend: None (the fastest that covers the call), "reference", "cpp", "cuda" or "triton".

    Returns:
        h (B, L, D) in x's dtype, or (h, final_state).

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    decay, x = autocast_together(decay, x)
    call = Contract("linear_scan")
    call.tensor("decay", decay, "B L D")
    call.tensor("x", x, "B L D")
    call.sequences(cu_seqlens)
    call.state("initial_state", initial_state, "S D")
    call.flag("return_final_state", return_final_state)
    return dispatch.choose("linear_scan", backend, x)(
        decay,
        x,
        initial_state=initial_state,
        return_final_state=return_final_state,
        cu_seqlens=cu_seqlens,
    )


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective state space: h_t = exp(dt_t A) ⊙ h_{t-1} + dt_t x_t B_t, y_t = h_t·C_t + D ⊙ x_t,
    then y ⊙ silu(z) (arXiv 2312.00752).

    Args:
        x, dt: (B, L, D), the values and the step sizes, any strides whose last dimension is contiguous.
        A: (D, N), the continuous-time decays (negative where the state forgets).
        B, C: (B, L, N), or (B, L, G, N) where each of G equal groups of channels has its own.
        D: (D,), the weight of the input in the output; none if None.
        z: (B, L, D), the output gate; none if None.
        dt_bias: (D,), added to dt.
        dt_softplus: the step size is softplus(dt + dt_bias) instead of dt + dt_bias.
        initial_state: (B, D, N), the state before the first token; zeros if None.
        return_final_state: also return the last state, (B, D, N) in float32 (float64 for float64 inputs).
        cu_seqlens: (S+1,) int32 offsets of S sequences packed into a batch of 1; states are (S, D, N).
        backend: None (the fastest that covers the call), "reference", "cpp", "cuda" or "triton".

    Returns:
        y (B, L, D) in x's dtype, or (y, final_state).

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    x, dt, B, C, z = autocast_together(x, dt, B, C, z)
    call = Contract("selective_scan")
    call.tensor("x", x, "B L D")
    call.tensor("dt", dt, "B L D")
    call.parameter("A", A, "D N")
    grouped = isinstance(B, Tensor) and B.dim() == 4
    call.tensor("B", B, "B L G N" if grouped else "B L N")
    call.tensor("C", C, "B L G N" if grouped else "B L N")
    if grouped:
        call.multiple("D", "G")
    call.optional_parameter("D", D, "D")
    call.optional_tensor("z", z, "B L D")
    call.optional_parameter("dt_bias", dt_bias, "D")
    call.flag("dt_softplus", dt_softplus)
    call.sequences(cu_seqlens)
    call.state("initial_state", initial_state, "S D N")
    call.flag("return_final_state", return_final_state)
    return dispatch.choose("selective_scan", backend, x)(
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


def _check_matrix_state(
    call: Contract,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
) -> None:
    """The contract that gated linear attention and the gated delta rule have in common."""
    call.tensor("q", q, "B L Hk Dk")
    call.tensor("k", k, "B L Hk Dk")
    call.tensor("v", v, "B L H Dv")
    call.multiple("H", "Hk")
    call.at_least("Dk", 1)
    if log_decay is not None:
        of_keys = isinstance(log_decay, Tensor) and log_decay.dim() == 4
        call.parameter("log_decay", log_decay, "B L H Dk" if of_keys else "B L H")
    call.optional_number("scale", scale)
    call.sequences(cu_seqlens)
    call.state("initial_state", initial_state, "S H Dk Dv")
    call.flag("return_final_state", return_final_state)


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention with decay: S_t = exp(g_t) S_{t-1} + k_t v_tᵀ, y_t = scale · S_tᵀ q_t.

    One decay a head is Mamba-2 (arXiv 2405.21060) and RetNet (arXiv 2307.08621), one a key dimension is
    GLA (arXiv 2312.06635), none is linear attention (arXiv 2006.16236).

    Args:
        q, k: (B, L, Hk, Dk), any strides whose last dimension is contiguous. Hk divides H: H / Hk
            consecutive heads of v share one head of q and k.
        v: (B, L, H, Dv).
        log_decay: g, (B, L, H) or (B, L, H, Dk), of any floating dtype; no decay if None.
        scale: Dk^-0.5 if None.
        initial_state: (B, H, Dk, Dv), the state before the first token; zeros if None.
        return_final_state: also return the last state, float32 (float64 for float64 inputs).
        cu_seqlens: (S+1,) int32 offsets of S sequences packed into a batch of 1; states are (S, H, Dk, Dv).
        backend: None (the fastest that covers the call), "reference", "cpp", "cuda" or "triton".

    Returns:
        y (B, L, H, Dv) in v's dtype, or (y, final_state).

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    q, k, v = autocast_together(q, k, v)
    call = Contract("gated_linear_attention")
    _check_matrix_state(call, q, k, v, log_decay, scale, initial_state, return_final_state, cu_seqlens)
    return dispatch.choose("gated_linear_attention", backend, v)(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        return_final_state=return_final_state,
        cu_seqlens=cu_seqlens,
    )


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Delta rule with decay: S_t = exp(g_t) S_{t-1} + β_t k_t (v_t − (exp(g_t) S_{t-1})ᵀ k_t)ᵀ and
    y_t = scale · S_tᵀ q_t.

    One decay a head is Gated DeltaNet (arXiv 2412.06464), one a key dimension is Kimi Delta Attention
    (arXiv 2510.26692), none is DeltaNet (arXiv 2406.06484). Keys are taken as they are: normalise them
    to length 1 where the model asks for it.

    Args:
        q, k, v, log_decay, scale: as in :func:`gated_linear_attention`.
        beta: (B, L, H), the rate at which a key's value is rewritten.
        initial_state, return_final_state, cu_seqlens, backend: as in :func:`gated_linear_attention`.

    Returns:
        y (B, L, H, Dv) in v's dtype, or (y, final_state).

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    q, k, v, beta = autocast_together(q, k, v, beta)
    call = Contract("gated_delta_rule")
    _check_matrix_state(call, q, k, v, log_decay, scale, initial_state, return_final_state, cu_seqlens)
    call.tensor("beta", beta, "B L H")
    return dispatch.choose("gated_delta_rule", backend, v)(
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """GRU with diagonal recurrent weights (ParaRNN, arXiv 2510.21450).

    z = σ(xz + az ⊙ h), r = σ(xr + ar ⊙ h), ĥ = tanh(xh + ah ⊙ r ⊙ h), h' = (1 − z) ⊙ h + z ⊙ ĥ.

    Args:
        xz, xr, xh: (B, L, D), the inputs of the update gate, the reset gate and the candidate.
        az, ar, ah: (D,), their recurrent weights.
        initial_state: (B, D), the state before the first token; zeros if None.
        return_final_state: also return the last state, (B, D) in float32 (float64 for float64 inputs).
        tolerance: where a backend iterates over the whole sequence, the largest change of a state at
            which it stops. Every backend equals the sequential loop.
        max_iterations: where a backend iterates, after how many it turns to the sequential loop.
        backend: None (the fastest that covers the call), "reference", "cpp", "cuda" or "triton".

    Returns:
        h (B, L, D) in xz's dtype, or (h, final_state).

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    xz, xr, xh = autocast_together(xz, xr, xh)
    call = Contract("gru_scan")
    _check_cell(call, {"xz": xz, "xr": xr, "xh": xh}, {"az": az, "ar": ar, "ah": ah})
    call.state("initial_state", initial_state, "B D")
    _check_iteration(call, return_final_state, tolerance, max_iterations)
    return dispatch.choose("gru_scan", backend, xz)(
        xz,
        xr,
        xh,
        az,
        ar,
        ah,
        initial_state=initial_state,
        return_final_state=return_final_state,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


def _check_cell(call: Contract, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name, value in inputs.items():
        call.tensor(name, value, "B L D")
    for name, value in weights.items():
        call.parameter(name, value, "D")


def _check_iteration(call: Contract, return_final_state: bool, tolerance: float, max_iterations: int) -> None:
    call.flag("return_final_state", return_final_state)
    call.number("tolerance", tolerance, above=0)
    call.count("max_iterations", max_iterations)


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """LSTM with diagonal recurrent weights and coupled gates (ParaRNN, arXiv 2510.21450).

    f = σ(xf + af ⊙ h), o = σ(xo + ao ⊙ h), z = tanh(xz + az ⊙ h), c' = f ⊙ c + (1 − f) ⊙ z,
    h' = o ⊙ tanh(c').

    Args:
        xf, xo, xz: (B, L, D), the inputs of the forget gate, the output gate and the candidate.
        af, ao, az: (D,), their recurrent weights.
        initial_state: (c, h), each (B, D), the states before the first token; zeros if None.
        return_final_state: also return the last (c, h), in float32 (float64 for float64 inputs).
        tolerance, max_iterations, backend: as in :func:`gru_scan`.

    Returns:
        h (B, L, D) in xf's dtype, or (h, (c, h)).

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    xf, xo, xz = autocast_together(xf, xo, xz)
    call = Contract("lstm_scan")
    _check_cell(call, {"xf": xf, "xo": xo, "xz": xz}, {"af": af, "ao": ao, "az": az})
    if initial_state is not None:
        if not isinstance(initial_state, tuple | list) or len(initial_state) != 2:
            raise TypeError(
                f"lstm_scan: initial_state is {type(initial_state).__name__}; it takes None or a pair (c, h)"
            )
        call.state("initial_state[0]", initial_state[0], "B D")
        call.state("initial_state[1]", initial_state[1], "B D")
    _check_iteration(call, return_final_state, tolerance, max_iterations)
    return dispatch.choose("lstm_scan", backend, xf)(
        xf,
        xo,
        xz,
        af,
        ao,
        az,
        initial_state=initial_state,
        return_final_state=return_final_state,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
