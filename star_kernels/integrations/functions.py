"""star_kernels' operators behind the names, arguments and layouts that transformers' layers call.

transformers keeps, beside each model, plain PyTorch forms of the functions that the packages causal_conv1d,
mamba_ssm and fla accelerate. Every function here takes the arguments of one of those forms and computes the
same, or answers ``NotImplemented`` for a call that it does not cover, which goes to the form it replaces:
packed sequences (``seq_idx``, ``cu_seqlens``), other activations than SiLU, devices and dtypes for which
only an operator's plain definition exists, tensors on several devices.

Their layouts: channels before time, (B, D, L), in convolutions and in Mamba's scan; states of Mamba-2 are
(B, H, P, N), where star_kernels has keys before values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import star_kernels
from star_kernels.integrations.covering import answers, constant, covers, form, recorded

__all__ = ["ADAPTERS", "SCANS", "adapted"]

_ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}

# Options of causal_conv1d, mamba_ssm and fla that change what a call computes and that the functions below do
# not name. Any other option is a flag of the model, passed down on its way, which no form of these reads.
_CHANGING = frozenset(
    {
        "A_log",
        "allow_neg_eigval",
        "beta_activation",
        "cache_seqlens",
        "conv_state_indices",
        "cu_seq_lens_q",
        "cu_seqlens",
        "dt_bias",
        "final_states_out",
        "head_first",
        "initial_states",
        "lower_bound",
        "return_final_states",
        "safe_gate",
        "scale",
        "seq_idx",
        "state_batch_indices",
        "state_v_first",
        "transpose_state_layout",
        "use_beta_sigmoid_in_kernel",
        "use_gate_in_kernel",
        "z",
    }
)


def adapted(original: Callable[..., Any], adapter: Callable[..., Any]) -> Callable[..., Any]:
    """``adapter`` in the place of ``original``, to which go the calls that the adapter does not cover."""

    @functools.wraps(original)
    def function(*arguments: Any, **options: Any) -> Any:
        # An exported program must run where star_kernels is not installed.
        if not torch.compiler.is_exporting():
            result = adapter(*arguments, **options)
            if result is not NotImplemented:
                return result
        return original(*arguments, **options)

    return function


def _changed(options: dict[str, Any]) -> bool:
    """Whether an option is set that changes the result."""
    if _CHANGING.isdisjoint(options):
        return False
    return any(
        name in _CHANGING and not (options[name] is None or options[name] is False) for name in options
    )


def _alike(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the widest of their dtypes, in which the operators take all of them."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) == 1:
        return tensors
    dtype = functools.reduce(torch.promote_types, dtypes)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


# ---------------------------------------------------------------------------------------------------------
# Short convolutions


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **options: Any,
) -> Any:
    """Causal depthwise convolution of (B, D, L) with taps (D, K), the last of which is for the present."""
    if activation not in _ACTIVATIONS or _changed(options):
        return NotImplemented
    if not covers("short_conv", hidden_states, weight, bias):
        return NotImplemented
    y = star_kernels.short_conv(
        hidden_states.transpose(1, 2), weight, bias, activation=_ACTIVATIONS[activation]
    )
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **options: Any,
) -> Any:
    """One token (B, D, 1) of :func:`causal_conv1d_fn`; ``conv_state`` (B, D, S >= K - 1) is updated."""
    if activation not in _ACTIVATIONS or _changed(options) or hidden_states.dim() != 3:
        return NotImplemented
    past = weight.shape[1] - 1
    if hidden_states.shape[2] != 1 or past < 1 or conv_state.shape[2] < past:
        return NotImplemented
    if conv_state.dtype != hidden_states.dtype or recorded(hidden_states, weight, bias):
        return NotImplemented
    act = _ACTIVATIONS[activation]
    tensors = (hidden_states, conv_state, weight, bias)
    one_by_one = covers("short_conv_step", *tensors)
    if not one_by_one and not covers("short_conv", *tensors):
        return NotImplemented
    older = conv_state.shape[2] - past
    if older == 1:
        conv_state.select(2, 0).copy_(conv_state.select(2, 1))
    elif older:
        conv_state[:, :, :older] = conv_state[:, :, 1 : older + 1].clone()
    state = conv_state.narrow(2, older, past).transpose(1, 2)
    if one_by_one:
        # Channels come first in this state, last in ours: compiled steps take it as it lies, others a copy.
        compiled = answers("short_conv_step", hidden_states) in ("cpp", "cuda")
        inputs = state if compiled else state.contiguous()
        y = star_kernels.short_conv_step(hidden_states.select(2, 0), inputs, weight, bias, activation=act)
        if inputs is not state:
            state.copy_(inputs)
    else:
        result, inputs = star_kernels.short_conv(
            hidden_states.transpose(1, 2),
            weight,
            bias,
            activation=act,
            initial_state=state.contiguous(),
            return_final_state=True,
        )
        y = result[:, 0]
        state.copy_(inputs)
    return y.unsqueeze(-1)


# ---------------------------------------------------------------------------------------------------------
# Mamba


def mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **options: Any,
) -> Any:
    """Mamba's scan over (B, D, L), with B and C (B, N, L); the last state is (B, D, N).

    ``use_mambapy`` and ``use_associative_scan`` choose among transformers' forms of the same result.
    """
    if _changed(options) or not covers("selective_scan", hidden_states, dt, A, B, C, D, z, delta_bias):
        return NotImplemented
    x, dt, B, C, z = _alike(hidden_states, dt, B, C, z)
    y, state = star_kernels.selective_scan(
        x.transpose(1, 2),
        dt.transpose(1, 2),
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        dt_softplus=delta_softplus,
        return_final_state=True,
    )
    y = y.transpose(1, 2)
    return (y, state) if return_last_state else y


def mamba_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **options: Any,
) -> Any:
    """One token of :func:`mamba_selective_scan`: x, dt, z (B, D), B, C (B, N); ``state`` is updated."""
    tensors = (state, hidden_states, dt, A, B, C, D, dt_bias, z)
    if _changed(options) or state.dtype != torch.float32 or recorded(*tensors):
        return NotImplemented
    x, dt, B, C, z = _alike(hidden_states, dt, B, C, z)
    if covers("selective_scan_step", x, *tensors) and state.stride(-1) == 1:
        y = star_kernels.selective_scan_step(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus=dt_softplus)
    elif covers("selective_scan", x, *tensors):
        x, dt, B, C = (tensor.unsqueeze(1) for tensor in (x, dt, B, C))
        z = None if z is None else z.unsqueeze(1)
        y, final = star_kernels.selective_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            dt_softplus=dt_softplus,
            initial_state=state,
            return_final_state=True,
        )
        state.copy_(final)
        y = y[:, 0]
    else:
        return NotImplemented
    return y.to(hidden_states.dtype)


def no_shortcut(*arguments: Any, **options: Any) -> None:
    """None, upon which a layer calls its convolution and its scan one after the other."""


# ---------------------------------------------------------------------------------------------------------
# Mamba-2


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    **options: Any,
) -> Any:
    """Mamba-2's scan: linear attention with queries C, keys B, values dt ⊙ x and decays exp(dt A).

    x (B, L, H, P), dt (B, L, H), A (H,), B and C (B, L, G, N) with G a divisor of H, D (H,); states are
    (B, H, P, N).
    """
    tensors = (dt, A, B, C, D, dt_bias, initial_states)
    if _changed(options) or not covers("gated_linear_attention", hidden_states, *tensors):
        return NotImplemented
    if D is not None and D.dim() != 1:
        return NotImplemented
    dt = _step_sizes(dt, dt_bias, dt_softplus, dt_limit)
    v = (hidden_states * dt.unsqueeze(-1)).to(hidden_states.dtype)
    C, B, v = _alike(C, B, v)
    y, state = star_kernels.gated_linear_attention(
        C,
        B,
        v,
        dt * A.float(),
        scale=1.0,
        initial_state=None if initial_states is None else initial_states.transpose(-1, -2),
        return_final_state=True,
    )
    if D is not None:
        y = torch.addcmul(y, hidden_states.to(y.dtype), D.to(y.dtype).unsqueeze(-1))
    # Turned over, not copied: a cache made like it keeps our layout, and decoding works on it in place.
    return (y, state.transpose(-1, -2)) if return_final_states else y


def _step_sizes(
    dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float] = (-math.inf, math.inf)
) -> Tensor:
    dt = dt.float()
    if bias is not None:
        dt = dt + bias.float()
    if softplus:
        dt = functional.softplus(dt)
    low, high = limit
    if high < math.inf or low > (0.0 if softplus else -math.inf):
        dt = dt.clamp(low, high)
    return dt


def mamba2_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **options: Any,
) -> Any:
    """One token of :func:`mamba2_chunk_scan`: x (B, H, P), B, C (B, G, N), ``state`` (B, H, P, N), updated.

    dt (B, H, P), A (H, P, N), D and dt_bias (H, P) repeat one number a head, as views without memory of
    their own; where they do not, the call is not covered.
    """
    tensors = (state, hidden_states, dt, A, B, C, D, dt_bias, z)
    if _changed(options) or state.dtype != torch.float32 or recorded(*tensors):
        return NotImplemented
    if not covers("gated_linear_attention", hidden_states, *tensors):
        return NotImplemented
    if hidden_states.dim() != 3 or B.dim() != 3 or A.dim() != 3 or A.stride()[1:] != (0, 0):
        return NotImplemented
    of_heads = (dt, D, dt_bias)
    if any(tensor is not None and tensor.stride(-1) != 0 for tensor in of_heads):
        return NotImplemented
    dt = _step_sizes(dt.select(-1, 0), None if dt_bias is None else dt_bias.select(-1, 0), dt_softplus)
    v = (hidden_states * dt.unsqueeze(-1)).to(hidden_states.dtype)
    C, B, v = _alike(C, B, v)
    log_decay = dt * A.select(-1, 0).select(-1, 0).float()
    ours = state.transpose(-1, -2)
    if covers("gated_linear_attention_step", v):
        in_place = ours if ours.stride(-1) == 1 else ours.contiguous()
        y = star_kernels.gated_linear_attention_step(C, B, v, log_decay, in_place, scale=1.0)
        if in_place is not ours:
            ours.copy_(in_place)
    else:
        C, B, v, log_decay = (tensor.unsqueeze(1) for tensor in (C, B, v, log_decay))
        y, final = star_kernels.gated_linear_attention(
            C, B, v, log_decay, scale=1.0, initial_state=ours, return_final_state=True
        )
        ours.copy_(final)
        y = y[:, 0]
    if D is not None:
        y = torch.addcmul(y, hidden_states.to(y.dtype), D.to(y.dtype))
    if z is not None:
        y = y * functional.silu(z)
    return y.to(hidden_states.dtype)


# ---------------------------------------------------------------------------------------------------------
# Gated delta rules: one decay a head (Gated DeltaNet) or one a key dimension (Kimi Delta Attention)


def chunk_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **options: Any,
) -> Any:
    """Delta rule with decay: q, k (B, L, Hk, Dk), v (B, L, H, Dv), beta (B, L, H), g (B, L, H[, Dk]).

    Returns:
        y in q's dtype, and the last state or None.
    """
    return recurrent_delta_rule(
        query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, **options
    )


def recurrent_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **options: Any,
) -> Any:
    """The same as :func:`chunk_delta_rule`: how long a chunk is, our operators decide."""
    tensors = (query, key, g, beta, initial_state)
    if _changed(options) or not covers("gated_delta_rule", value, *tensors):
        return NotImplemented
    dtype = query.dtype
    if use_qk_l2norm_in_kernel:
        query, key = _unit_length(query), _unit_length(key)
    query, key, value, beta = _alike(query, key, value, beta)
    one_token = value.shape[1] == 1 and not recorded(value, *tensors)
    if one_token and covers("gated_delta_rule_step", value):
        if initial_state is None:
            batch, _, heads, width = value.shape
            state = value.new_zeros(batch, heads, key.shape[-1], width, dtype=torch.float32)
        else:  # the step overwrites its state, and this one is the caller's
            state = initial_state.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        q, k, v, b, decay = (tensor.select(1, 0) for tensor in (query, key, value, beta, g))
        y = star_kernels.gated_delta_rule_step(q, k, v, b, decay, state).unsqueeze(1)
    else:
        y, state = star_kernels.gated_delta_rule(
            query, key, value, beta, g, initial_state=initial_state, return_final_state=True
        )
    return y.to(dtype), state if output_final_state else None


def _unit_length(x: Tensor) -> Tensor:
    """x / sqrt(Σ x² + 1e-6) over the last dimension, as a root-mean-square norm."""
    width = x.shape[-1]
    rms_norm: Any = form("rms_norm", x) or star_kernels.rms_norm
    y: Tensor = rms_norm(x, constant(width**-0.5, width, x.device), 1e-6 / width)
    return y


# ---------------------------------------------------------------------------------------------------------
# RG-LRU


def rg_lru_scan(
    layer: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> Any:
    """RecurrentGemma's scan over (B, L, D), which forgets where ``reset`` (B, L, 1) is set; states (B, D).

    One token is left to the layer, which has no loop there.
    """
    tensors = (recurrent_gate, reset, recurrent_states)
    if hidden_states.shape[1] < 2 or acc_dtype != torch.float32:
        return NotImplemented
    if not covers("linear_scan", hidden_states, *tensors):
        return NotImplemented
    decay, x = _alike(recurrent_gate * ~reset, hidden_states)
    y, state = star_kernels.linear_scan(decay, x, initial_state=recurrent_states, return_final_state=True)
    return y.to(hidden_states.dtype), state


ADAPTERS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_inner_fn": no_shortcut,
    "mamba_selective_scan": mamba_selective_scan,
    "mamba_selective_state_update": mamba_selective_state_update,
    "mamba2_split_conv1d_scan_combined": no_shortcut,
    "mamba2_chunk_scan": mamba2_chunk_scan,
    "mamba2_selective_state_update": mamba2_selective_state_update,
    "torch_chunk_gated_delta_rule": chunk_delta_rule,
    "torch_recurrent_gated_delta_rule": recurrent_delta_rule,
    "chunk_kimi_delta_attention": chunk_delta_rule,
    "recurrent_kimi_delta_attention": recurrent_delta_rule,
}
"""What stands in for each function of transformers' modeling modules."""

SCANS: dict[str, Callable[..., Any]] = {"RecurrentGemmaRglru._rnn_scan": rg_lru_scan}
"""What stands in for methods of layers that look up no function, by class and name."""
