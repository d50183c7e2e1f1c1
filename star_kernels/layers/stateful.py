"""Operators on a cache: a prompt and a chunk carry the state on, a single token updates it in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from star_kernels import convolution, recurrence
from star_kernels.cache import LayerCache


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cache: LayerCache | None = None,
    name: str = "tail",
) -> Tensor:
    """:func:`star_kernels.short_conv` after the inputs in ``cache.tensors[name]``."""
    if cache is None:
        return cast(Tensor, convolution.short_conv(x, weight, bias, activation=activation))
    state = cache.tensors[name]
    if x.shape[1] == 1 and state.dtype == x.dtype:
        y = convolution.short_conv_step(x[:, 0], state, weight, bias, activation=activation)
        return y.unsqueeze(1)
    y, final = convolution.short_conv(
        x, weight, bias, activation=activation, initial_state=state, return_final_state=True
    )
    state.copy_(final)
    return y


def gated_short_conv(
    b: Tensor,
    c: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cache: LayerCache | None = None,
    name: str = "tail",
) -> Tensor:
    """:func:`star_kernels.gated_short_conv` after the products in ``cache.tensors[name]``."""
    if cache is None:
        return cast(Tensor, convolution.gated_short_conv(b, c, x, weight, bias))
    state = cache.tensors[name]
    if x.shape[1] == 1 and state.dtype == x.dtype:
        y = convolution.gated_short_conv_step(b[:, 0], c[:, 0], x[:, 0], state, weight, bias)
        return y.unsqueeze(1)
    y, final = convolution.gated_short_conv(
        b, c, x, weight, bias, initial_state=state, return_final_state=True
    )
    state.copy_(final)
    return y


def gated_long_conv(
    b: Tensor,
    c: Tensor,
    x: Tensor,
    kernel: Tensor,
    skip: Tensor,
    *,
    cache: LayerCache | None = None,
    name: str = "history",
) -> Tensor:
    """:func:`star_kernels.gated_long_conv` after the products b ⊙ x in ``cache.tensors[name]``."""
    if cache is None:
        return convolution.gated_long_conv(b, c, x, kernel, skip)
    history = cache.tensors[name]
    if x.shape[1] == 1 and (cache.lengths is not None or history.dtype == x.dtype):
        position = cache.position if cache.lengths is None else cache.lengths
        # An aliased history gets the very products that its owner wrote.
        held = history.to(x.dtype)
        y = convolution.gated_long_conv_step(b[:, 0], c[:, 0], x[:, 0], held, kernel, skip, position=position)
        if held is not history:
            cache.write(name, b * x)
        return y.unsqueeze(1)
    products = cache.extend(name, b * x)
    return c * convolution.long_conv(products, kernel, skip)[:, cache.position :]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor,
    *,
    cache: LayerCache | None = None,
    name: str = "state",
) -> Tensor:
    """:func:`star_kernels.selective_scan` with softplus steps, from the state in ``cache.tensors[name]``."""
    if cache is None:
        return cast(Tensor, recurrence.selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus=True))
    state = cache.tensors[name]
    if _is_step(x, state):
        z = None if z is None else z[:, 0]
        y = recurrence.selective_scan_step(
            x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D, z, dt_bias, dt_softplus=True
        )
        return y.unsqueeze(1)
    y, final = recurrence.selective_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus=True, initial_state=state, return_final_state=True
    )
    state.copy_(final)
    return y


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    cache: LayerCache | None = None,
    name: str = "state",
) -> Tensor:
    """:func:`star_kernels.gated_linear_attention` from the state in ``cache.tensors[name]``."""
    if cache is None:
        return cast(Tensor, recurrence.gated_linear_attention(q, k, v, log_decay, scale=scale))
    state = cache.tensors[name]
    if _is_step(v, state):
        return recurrence.gated_linear_attention_step(
            q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], state, scale=scale
        ).unsqueeze(1)
    y, final = recurrence.gated_linear_attention(
        q, k, v, log_decay, scale=scale, initial_state=state, return_final_state=True
    )
    state.copy_(final)
    return y


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    cache: LayerCache | None = None,
    name: str = "state",
) -> Tensor:
    """:func:`star_kernels.gated_delta_rule` from the state in ``cache.tensors[name]``."""
    if cache is None:
        return cast(Tensor, recurrence.gated_delta_rule(q, k, v, beta, log_decay))
    state = cache.tensors[name]
    if _is_step(v, state):
        return recurrence.gated_delta_rule_step(
            q[:, 0], k[:, 0], v[:, 0], beta[:, 0], log_decay[:, 0], state
        ).unsqueeze(1)
    y, final = recurrence.gated_delta_rule(
        q, k, v, beta, log_decay, initial_state=state, return_final_state=True
    )
    state.copy_(final)
    return y


def gru_scan(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    cache: LayerCache | None = None,
    name: str = "state",
) -> Tensor:
    """:func:`star_kernels.gru_scan` of (xz, xr, xh) and (az, ar, ah) from ``cache.tensors[name]``."""
    if cache is None:
        return cast(Tensor, recurrence.gru_scan(*inputs, *weights))
    state = cache.tensors[name]
    if _is_step(inputs[0], state):
        (xz, xr, xh), (az, ar, ah) = (x[:, 0] for x in inputs), weights
        return recurrence.gru_scan_step(xz, xr, xh, az, ar, ah, state).unsqueeze(1)
    y, final = recurrence.gru_scan(*inputs, *weights, initial_state=state, return_final_state=True)
    state.copy_(final)
    return y


def lstm_scan(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    cache: LayerCache | None = None,
    names: tuple[str, str] = ("cell", "state"),
) -> Tensor:
    """:func:`star_kernels.lstm_scan` of (xf, xo, xz) and (af, ao, az) from the tensors ``names``, c and h."""
    if cache is None:
        return cast(Tensor, recurrence.lstm_scan(*inputs, *weights))
    cell, hidden = (cache.tensors[name] for name in names)
    if _is_step(inputs[0], hidden):
        (xf, xo, xz), (af, ao, az) = (x[:, 0] for x in inputs), weights
        return recurrence.lstm_scan_step(xf, xo, xz, af, ao, az, cell, hidden).unsqueeze(1)
    y, final = recurrence.lstm_scan(*inputs, *weights, initial_state=(cell, hidden), return_final_state=True)
    cell.copy_(final[0])
    hidden.copy_(final[1])
    return y


def _is_step(x: Tensor, state: Tensor) -> bool:
    """One token, on a state of the dtype that the in-place steps keep it in."""
    takes = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.shape[1] == 1 and state.dtype == takes
