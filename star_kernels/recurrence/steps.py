"""One token of each recurrence, with its state updated in place: what decoding calls.

Steps are for inference: they record nothing for autograd. States are float32 (float64 for float64 inputs),
with any strides whose last dimension is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.contracts import Contract
from star_kernels.recurrence import reference

for _name in (
    "linear_scan_step",
    "selective_scan_step",
    "gated_linear_attention_step",
    "gated_delta_rule_step",
    "gru_scan_step",
    "lstm_scan_step",
):
    dispatch.register(_name, "reference", getattr(reference, _name))
if dispatch.load_compiled():
    from star_kernels.recurrence import compiled as compiled
    from star_kernels.recurrence import compiled_cells as compiled_cells
    from star_kernels.recurrence import compiled_matrix_states as compiled_matrix_states


def _own_state(call: Contract, name: str, value: Tensor, shape: str) -> None:
    """A state that the call overwrites: it must have the very dtype in which the recurrence keeps it."""
    call.parameter(name, value, shape)
    takes = torch.float64 if call.dtype == torch.float64 else torch.float32
    if value.dtype != takes:
        raise TypeError(f"{call.function}: {name} has dtype {value.dtype}; it takes {takes}")
    call.written(name, value)


@dispatch.compiled_step
def linear_scan_step(decay: Tensor, x: Tensor, state: Tensor, *, backend: str | None = None) -> Tensor:
    """One token of :func:`star_kernels.linear_scan`; decay, x (B, D), state (B, D) updated in place.

    Returns:
        h (B, D) in x's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """

    def check() -> None:
        call = Contract("linear_scan_step")
        call.tensor("decay", decay, "B D")
        call.tensor("x", x, "B D")
        _own_state(call, "state", state, "B D")

    return dispatch.step("linear_scan_step", backend, check, decay, x, state)


@dispatch.compiled_step
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
    backend: str | None = None,
) -> Tensor:
    """One token of :func:`star_kernels.selective_scan`.

    Args:
        x, dt, z: (B, D).
        A, D, dt_bias, dt_softplus, backend: as in :func:`star_kernels.selective_scan`.
        B, C: (B, N), or (B, G, N) where each of G equal groups of channels has its own.
        state: (B, D, N), updated in place.

    Returns:
        y (B, D) in x's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """

    def check() -> None:
        call = Contract("selective_scan_step")
        call.tensor("x", x, "B D")
        call.tensor("dt", dt, "B D")
        call.parameter("A", A, "D N")
        grouped = isinstance(B, Tensor) and B.dim() == 3
        call.tensor("B", B, "B G N" if grouped else "B N")
        call.tensor("C", C, "B G N" if grouped else "B N")
        if grouped:
            call.multiple("D", "G")
        _own_state(call, "state", state, "B D N")
        call.optional_parameter("D", D, "D")
        call.optional_tensor("z", z, "B D")
        call.optional_parameter("dt_bias", dt_bias, "D")
        call.flag("dt_softplus", dt_softplus)

    arguments = (x, dt, A, B, C, state, D, z, dt_bias)
    return dispatch.step("selective_scan_step", backend, check, *arguments, dt_softplus=dt_softplus)


def _check_matrix_state(
    call: Contract,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float | None,
) -> None:
    call.tensor("q", q, "B Hk Dk")
    call.tensor("k", k, "B Hk Dk")
    call.tensor("v", v, "B H Dv")
    call.multiple("H", "Hk")
    call.at_least("Dk", 1)
    if log_decay is not None:
        of_keys = isinstance(log_decay, Tensor) and log_decay.dim() == 3
        call.parameter("log_decay", log_decay, "B H Dk" if of_keys else "B H")
    _own_state(call, "state", state, "B H Dk Dv")
    call.optional_number("scale", scale)


@dispatch.compiled_step
def gated_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of :func:`star_kernels.gated_linear_attention`.

    Args:
        q, k: (B, Hk, Dk).
        v: (B, H, Dv).
        log_decay: (B, H), (B, H, Dk) or None.
        state: (B, H, Dk, Dv), updated in place.
        scale, backend: as in :func:`star_kernels.gated_linear_attention`.

    Returns:
        y (B, H, Dv) in v's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """

    def check() -> None:
        _check_matrix_state(Contract("gated_linear_attention_step"), q, k, v, log_decay, state, scale)

    arguments = (q, k, v, log_decay, state)
    return dispatch.step("gated_linear_attention_step", backend, check, *arguments, scale=scale)


@dispatch.compiled_step
def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of :func:`star_kernels.gated_delta_rule`.

    Args:
        q, k, v, log_decay, state, scale, backend: as in :func:`gated_linear_attention_step`.
        beta: (B, H).

    Returns:
        y (B, H, Dv) in v's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """

    def check() -> None:
        call = Contract("gated_delta_rule_step")
        _check_matrix_state(call, q, k, v, log_decay, state, scale)
        call.tensor("beta", beta, "B H")

    arguments = (q, k, v, beta, log_decay, state)
    return dispatch.step("gated_delta_rule_step", backend, check, *arguments, scale=scale)


@dispatch.compiled_step
def gru_scan_step(
    xz: Tensor,
    xr: Tensor,
    xh: Tensor,
    az: Tensor,
    ar: Tensor,
    ah: Tensor,
    state: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """One token of :func:`star_kernels.gru_scan`; x* (B, D), a* (D,), state (B, D) updated in place.

    Returns:
        h (B, D) in xz's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """

    def check() -> None:
        call = Contract("gru_scan_step")
        _check_cell(call, {"xz": xz, "xr": xr, "xh": xh}, {"az": az, "ar": ar, "ah": ah})
        _own_state(call, "state", state, "B D")

    return dispatch.step("gru_scan_step", backend, check, xz, xr, xh, az, ar, ah, state)


def _check_cell(call: Contract, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for name, value in inputs.items():
        call.tensor(name, value, "B D")
    for name, value in weights.items():
        call.parameter(name, value, "D")


@dispatch.compiled_step
def lstm_scan_step(
    xf: Tensor,
    xo: Tensor,
    xz: Tensor,
    af: Tensor,
    ao: Tensor,
    az: Tensor,
    state_c: Tensor,
    state_h: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """One token of :func:`star_kernels.lstm_scan`; x* (B, D), a* (D,), states (B, D) updated in place.

    Returns:
        h (B, D) in xf's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """

    def check() -> None:
        call = Contract("lstm_scan_step")
        _check_cell(call, {"xf": xf, "xo": xo, "xz": xz}, {"af": af, "ao": ao, "az": az})
        _own_state(call, "state_c", state_c, "B D")
        _own_state(call, "state_h", state_h, "B D")

    return dispatch.step("lstm_scan_step", backend, check, xf, xo, xz, af, ao, az, state_c, state_h)
