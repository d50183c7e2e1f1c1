"""Causal depthwise convolutions, as their equations read.

short:  y_t = Σ_k weight_k ⊙ x_{t-K+1+k} + bias            (explicit kernel of K taps)
long:   y_t = Σ_{s<=t} kernel_{t-s} ⊙ x_s + skip ⊙ x_t     (kernel as long as the sequence)
gated:  c ⊙ conv(b ⊙ x)                                    (LFM2, arXiv 2511.23404; Hyena, arXiv 2302.10866)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels.packing import over_sequences


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.short_conv`."""

    def dense(x: Tensor, state: Tensor | None) -> tuple[Tensor, tuple[Tensor]]:
        y, final_state = _short_conv_dense(x, weight, bias, state)
        return (F.silu(y) if activation == "silu" else y), (final_state,)

    if cu_seqlens is None:
        y, (final_state,) = dense(x, initial_state)
    else:
        y, (final_state,) = over_sequences(dense, cu_seqlens, [x], [initial_state])
    return (y, final_state) if return_final_state else y


def _short_conv_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    length, taps = x.shape[1], weight.shape[1]
    past = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if state is None else state.to(x.dtype)
    padded = torch.cat([past, x], dim=1)
    weight = weight.to(x.dtype)
    y = sum(padded[:, k : k + length] * weight[:, k] for k in range(taps))
    assert isinstance(y, Tensor)
    if bias is not None:
        y = y + bias.to(x.dtype)
    return y, padded[:, length:]


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
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.gated_short_conv`."""
    y, final_state = short_conv(
        b * x, weight, bias, initial_state=initial_state, return_final_state=True, cu_seqlens=cu_seqlens
    )
    return (c * y, final_state) if return_final_state else c * y


def long_conv(x: Tensor, kernel: Tensor, skip: Tensor | None = None) -> Tensor:
    """See :func:`star_kernels.long_conv`. By FFT over twice the length, in float32 or float64."""
    length = x.shape[1]
    if x.numel() == 0 or kernel.shape[1] == 0:
        y = x * 0
    else:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        size = 2 * length
        spectrum = torch.fft.rfft(kernel[:, :length].to(wide), n=size)
        y = torch.fft.irfft(torch.fft.rfft(x.to(wide).mT, n=size) * spectrum, n=size)
        y = y[..., :length].mT.to(x.dtype)
    return y if skip is None else y + skip.to(x.dtype) * x


def gated_long_conv(b: Tensor, c: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None = None) -> Tensor:
    """See :func:`star_kernels.gated_long_conv`."""
    return c * long_conv(b * x, kernel, skip)


def short_conv_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """See :func:`star_kernels.short_conv_step`."""
    y, after = short_conv(
        x[:, None], weight, bias, activation=activation, initial_state=state, return_final_state=True
    )
    state.copy_(after)
    return y[:, 0]


def gated_short_conv_step(
    b: Tensor, c: Tensor, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """See :func:`star_kernels.gated_short_conv_step`."""
    return c * short_conv_step(b * x, state, weight, bias)


def long_conv_step(
    x: Tensor, history: Tensor, kernel: Tensor, skip: Tensor | None = None, *, position: int | Tensor
) -> Tensor:
    """See :func:`star_kernels.long_conv_step`."""
    if isinstance(position, Tensor):
        return _long_conv_step_at(x, history, kernel, skip, position)
    history[:, position] = x
    taps = min(position + 1, kernel.shape[1])
    recent = history[:, position + 1 - taps : position + 1].to(kernel.dtype)
    y = (recent * kernel[:, :taps].flip(1).mT).sum(1).to(x.dtype)
    return y if skip is None else y + skip.to(x.dtype) * x


def _long_conv_step_at(
    x: Tensor, history: Tensor, kernel: Tensor, skip: Tensor | None, position: Tensor
) -> Tensor:
    """The same at places that only the device knows: the kernel is read backwards from each, 0 elsewhere."""
    batch, capacity = history.shape[:2]
    places = position.to(torch.int64).expand(batch)
    history[torch.arange(batch, device=x.device), places] = x
    lags = places[:, None] - torch.arange(capacity, device=x.device)
    known = (lags >= 0) & (lags < kernel.shape[1])
    taps = F.pad(kernel, (0, 1)).T[torch.where(known, lags, kernel.shape[1])]
    y = torch.where(known[..., None], taps * history.to(kernel.dtype), 0).sum(1).to(x.dtype)
    return y if skip is None else y + skip.to(x.dtype) * x


def gated_long_conv_step(
    b: Tensor,
    c: Tensor,
    x: Tensor,
    history: Tensor,
    kernel: Tensor,
    skip: Tensor | None = None,
    *,
    position: int | Tensor,
) -> Tensor:
    """See :func:`star_kernels.gated_long_conv_step`."""
    return c * long_conv_step(b * x, history, kernel, skip, position=position)
