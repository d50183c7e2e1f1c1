"""The forms of softmax attention that rest on PyTorch's own fused kernel, backend "torch".

``torch.nn.functional.scaled_dot_product_attention`` takes (B, H, L, D) with any strides, so the heads are
moved by views alone. It covers every call without a softcap: causal squares by its own flag, windows, packed
sequences and unequal lengths by a mask of (Lq, Lk). Calls with a softcap, in float64 or with an empty
dimension take the reference's equation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels.attention import reference
from star_kernels.compiled import needs_gradient


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """See :func:`star_kernels.attention`."""
    if softcap is not None or 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return reference.attention(
            q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, cu_seqlens=cu_seqlens
        )
    q, k, v = _first_derivatives("attention", q, k, v)
    return _attention(q, k, v, causal, window, scale, cu_seqlens)


def diff_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """See :func:`star_kernels.diff_attention`. Two attentions and a subtraction in float32."""
    if 0 in q1.shape or 0 in k1.shape or 0 in v.shape:
        return reference.diff_attention(q1, k1, q2, k2, v, lam, causal=causal, window=window, scale=scale)
    q1, k1, q2, k2, v = _first_derivatives("diff_attention", q1, k1, q2, k2, v)
    wide = torch.promote_types(q1.dtype, torch.float32)
    first = _attention(q1, k1, v, causal, window, scale).to(wide)
    second = _attention(q2, k2, v, causal, window, scale).to(wide)
    return (first - lam.to(wide).reshape(-1, 1) * second).to(q1.dtype)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    blind = max(0, queries - keys) if causal else 0  # leading queries that stand before the first key
    if blind:
        y = _attention(q[:, blind:], k, v, causal, window, scale)
        return F.pad(y, (0, 0, 0, 0, blind, 0))
    if window is not None and window >= max(queries, keys):
        window = None
    plain = window is None and cu_seqlens is None
    square = bool(causal and plain and queries == keys)  # under compilation the comparison is symbolic
    if scale is not None and scale <= 0.0:
        # PyTorch's causal kernel scales its mask of -inf as well; the sign can stand in the queries.
        q, scale = (-q, -scale) if scale < 0.0 else (torch.zeros_like(q), 1.0)
    mask = None
    if not plain or (causal and not square and queries > 1):
        mask = reference.visible_keys(q, k, causal, window, cu_seqlens)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=square,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


def _first_derivatives(operator: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return _FirstDerivatives.apply(operator, *tensors) if needs_gradient(tensors) else tensors


class _FirstDerivatives(torch.autograd.Function):
    """Hands tensors on; differentiating their gradients says in our words what PyTorch's kernel cannot do."""

    @staticmethod
    def forward(ctx: Any, operator: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.operator = operator
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *_NoSecondDerivatives.apply(ctx.operator, *gradients)


class _NoSecondDerivatives(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: str, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.operator = operator
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.operator}: second derivatives are not implemented by PyTorch's fused kernel; "
            "use backend='reference'"
        )
