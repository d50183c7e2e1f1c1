"""Causal depthwise convolutions: short and long kernels, plain and gated."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.contracts import Contract, autocast_together, holds_values
from star_kernels.convolution import reference

for _name in ("short_conv", "gated_short_conv", "long_conv", "gated_long_conv"):
    dispatch.register(f"{_name}_step", "reference", getattr(reference, f"{_name}_step"))
    dispatch.register(_name, "reference", getattr(reference, _name))
if dispatch.load_compiled():
    from star_kernels.convolution import compiled as compiled
dispatch.load_triton("convolution")


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution with a few taps: y_t = activation(Σ_k weight_k ⊙ x_{t-K+1+k} + bias).

    Args:
        x: (B, L, D), any strides whose last dimension is contiguous.
        weight: (D, K); tap K-1 multiplies the current token.
        bias: (D,).
        activation: None or "silu".
        initial_state: (B, K-1, D), the inputs before the first token, oldest first; zeros if None.
        return_final_state: also return the last K-1 inputs, (B, K-1, D).
        cu_seqlens: (S+1,) int32 offsets of S sequences packed into a batch of 1; states are (S, K-1, D).
        backend: None (the fastest that covers the call), "reference", "cpp", "cuda" or "triton".

    Returns:
        y (B, L, D) in x's dtype, or (y, final_state).

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    (x,) = autocast_together(x)
    call = Contract("short_conv")
    call.tensor("x", x, "B L D")
    _check_taps(call, weight, bias, initial_state, cu_seqlens)
    call.choice("activation", activation, (None, "silu"))
    call.flag("return_final_state", return_final_state)
    return dispatch.choose("short_conv", backend, x)(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial_state,
        return_final_state=return_final_state,
        cu_seqlens=cu_seqlens,
    )


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LFM2's gated short convolution, c ⊙ short_conv(b ⊙ x), in one pass (arXiv 2511.23404).

    Args:
        b, c, x: (B, L, D), the input gate, the output gate and the values.
        weight, bias, cu_seqlens, backend: as in :func:`short_conv`.
        initial_state: (B, K-1, D), the last products b ⊙ x before the first token, oldest first.
        return_final_state: also return the last K-1 products b ⊙ x.

    Returns:
        y (B, L, D) in x's dtype, or (y, final_state).

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    b, c, x = autocast_together(b, c, x)
    call = Contract("gated_short_conv")
    call.tensor("b", b, "B L D")
    call.tensor("c", c, "B L D")
    call.tensor("x", x, "B L D")
    _check_taps(call, weight, bias, initial_state, cu_seqlens)
    call.flag("return_final_state", return_final_state)
    return dispatch.choose("gated_short_conv", backend, x)(
        b,
        c,
        x,
        weight,
        bias,
        initial_state=initial_state,
        return_final_state=return_final_state,
        cu_seqlens=cu_seqlens,
    )


def _check_taps(
    call: Contract,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    call.parameter("weight", weight, "D K")
    call.at_least("K", 1)
    call.optional_parameter("bias", bias, "D")
    call.sequences(cu_seqlens)
    call.state("initial_state", initial_state, "S K-1 D")


def long_conv(x: Tensor, kernel: Tensor, skip: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Causal depthwise convolution with a kernel as long as the sequence (Hyena, arXiv 2302.10866).

    The C++ form transforms channels in pairs: rounding errors are relative to the louder one of a pair, and
    NaN in one is NaN in the other.

    Args:
        x: (B, L, D).
        kernel: (D, Lk); entry 0 multiplies the current token. Entries from L on have no effect.
        skip: (D,); adds skip ⊙ x.
        backend: as in :func:`short_conv`.

    Returns:
        y (B, L, D) in x's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    (x,) = autocast_together(x)
    call = Contract("long_conv")
    call.tensor("x", x, "B L D")
    call.parameter("kernel", kernel, "D Lk")
    call.optional_parameter("skip", skip, "D")
    return dispatch.choose("long_conv", backend, x)(x, kernel, skip)


def gated_long_conv(
    b: Tensor,
    c: Tensor,
    x: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Hyena's operator, c ⊙ long_conv(b ⊙ x) with skip ⊙ b ⊙ x inside the gate (arXiv 2302.10866).

    Args:
        b, c, x: (B, L, D), the input gate, the output gate and the values.
        kernel, skip, backend: as in :func:`long_conv`.

    Returns:
        y (B, L, D) in x's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    b, c, x = autocast_together(b, c, x)
    call = Contract("gated_long_conv")
    call.tensor("b", b, "B L D")
    call.tensor("c", c, "B L D")
    call.tensor("x", x, "B L D")
    call.parameter("kernel", kernel, "D Lk")
    call.optional_parameter("skip", skip, "D")
    return dispatch.choose("gated_long_conv", backend, x)(b, c, x, kernel, skip)


@dispatch.compiled_step
def short_conv_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token of :func:`short_conv`; ``state`` is updated in place. No gradients.

    Args:
        x: (B, D).
        state: (B, K-1, D) in x's dtype, the last inputs, oldest first; changed in place. Of any strides.
        weight, bias, activation, backend: as in :func:`short_conv`.

    Returns:
        y (B, D) in x's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """

    def check() -> None:
        call = Contract("short_conv_step")
        call.tensor("x", x, "B D")
        _check_step(call, state, weight, bias)
        call.choice("activation", activation, (None, "silu"))

    return dispatch.step("short_conv_step", backend, check, x, state, weight, bias, activation=activation)


@dispatch.compiled_step
def gated_short_conv_step(
    b: Tensor,
    c: Tensor,
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One token of :func:`gated_short_conv`; ``state`` is updated in place. No gradients.

    Args:
        b, c, x: (B, D).
        state: (B, K-1, D) in x's dtype, the last products b ⊙ x, oldest first; changed in place.
        weight, bias, backend: as in :func:`short_conv`.

    Returns:
        y (B, D) in x's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """

    def check() -> None:
        call = Contract("gated_short_conv_step")
        call.tensor("x", x, "B D")
        call.tensor("b", b, "B D")
        call.tensor("c", c, "B D")
        _check_step(call, state, weight, bias)

    return dispatch.step("gated_short_conv_step", backend, check, b, c, x, state, weight, bias)


def _check_step(call: Contract, state: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    call.parameter("weight", weight, "D K")
    call.at_least("K", 1)
    call.optional_parameter("bias", bias, "D")
    call.tensor("state", state, "B K-1 D")
    call.written("state", state)


@dispatch.compiled_step
def long_conv_step(
    x: Tensor,
    history: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    position: int | Tensor,
    backend: str | None = None,
) -> Tensor:
    """One token of :func:`long_conv`; its input is written into ``history`` in place. No gradients.

    Args:
        x: (B, D).
        history: (B, Lmax, D) in x's dtype; rows 0 to position-1 hold the inputs so far, row ``position`` is
            written.
        kernel, skip, backend: as in :func:`long_conv`.
        position: index of this token, 0 <= position < Lmax: an int, or an int32 or int64 tensor on x's device
            with one value, () or (1,), or one for each sequence, (B,). A GPU reads a tensor's value when the
            step runs, so a captured CUDA graph follows it, and the host does not see it: a value outside
            0 to Lmax - 1 gives y = NaN there and writes nothing.

    Returns:
        y (B, D) in x's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above, or, on a CPU,
            a position outside history.
    """

    def check() -> None:
        call = Contract("long_conv_step")
        call.tensor("x", x, "B D")
        _check_history(call, history, kernel, skip, position)

    return dispatch.step("long_conv_step", backend, check, x, history, kernel, skip, position=position)


@dispatch.compiled_step
def gated_long_conv_step(
    b: Tensor,
    c: Tensor,
    x: Tensor,
    history: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    position: int | Tensor,
    backend: str | None = None,
) -> Tensor:
    """One token of :func:`gated_long_conv`; b ⊙ x is written into ``history`` in place. No gradients.

    Args:
        b, c, x: (B, D).
        history: (B, Lmax, D) in x's dtype; rows 0 to position-1 hold the products b ⊙ x so far.
        kernel, skip, position, backend: as in :func:`long_conv_step`.

    Returns:
        y (B, D) in x's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """

    def check() -> None:
        call = Contract("gated_long_conv_step")
        call.tensor("x", x, "B D")
        call.tensor("b", b, "B D")
        call.tensor("c", c, "B D")
        _check_history(call, history, kernel, skip, position)

    return dispatch.step(
        "gated_long_conv_step", backend, check, b, c, x, history, kernel, skip, position=position
    )


def _check_history(
    call: Contract, history: Tensor, kernel: Tensor, skip: Tensor | None, position: int | Tensor
) -> None:
    call.tensor("history", history, "B Lmax D")
    call.written("history", history)
    call.parameter("kernel", kernel, "D Lk")
    call.optional_parameter("skip", skip, "D")
    if isinstance(position, Tensor):
        shape = "B" if position.dim() == 1 and position.shape[0] != 1 else "1" if position.dim() else ""
        call.integers("position", position, shape, (torch.int32, torch.int64))
        if position.device.type != "cpu" or not holds_values(position):
            return
        values = position.reshape(-1).tolist()
    else:
        call.count("position", position, at_least=0)
        values = [position]
    for value in values:
        if not 0 <= value < call.dims["Lmax"]:
            raise ValueError(
                f"{call.function}: position is {value}; history holds positions 0 to {call.dims['Lmax'] - 1}"
            )
