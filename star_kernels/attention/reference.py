"""Softmax attention, as its equations read.

attention:       y_i = Σ_j softmax_j(cap(scale · q_i·k_j)) v_j,  j over the keys that query i sees
differential:    y_i = Σ_j (softmax_j(scale · q1_i·k1_j) − λ softmax_j(scale · q2_i·k2_j)) v_j
                                                                (Diff Transformer, arXiv 2410.05258)
decode:          attention of one query over the first ``lengths`` entries of a cache

Queries are aligned with keys at the end: query i stands at position i + Lk − Lq. cap(s) is
softcap · tanh(s / softcap) where a softcap is given. A query that sees no key gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.contracts import without_autocast


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
    visible = visible_keys(q, k, causal, window, cu_seqlens)
    with without_autocast(q):
        return _mix(_weights(q, k, visible, scale, softcap), v).to(q.dtype)


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
    """See :func:`star_kernels.diff_attention`."""
    visible = visible_keys(q1, k1, causal, window)
    with without_autocast(q1):
        first = _weights(q1, k1, visible, scale)
        second = _weights(q2, k2, visible, scale)
        return _mix(first - lam.to(first.dtype).reshape(-1, 1, 1) * second, v).to(q1.dtype)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """See :func:`star_kernels.attention_decode`."""
    with without_autocast(q):
        weights = _decode_weights(q, k_cache, lengths, scale, window)
        return _mix(weights, v_cache)[:, 0].to(q.dtype)


def attention_decode_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v: with p the weights, dp = dy·v and ds = p (dp − Σ p dp) scale,
    dq = Σ_j ds_j k_j, dk_j = ds_j q, dv_j = p_j dy, the last two summed over the heads that share them."""
    heads, width = q.shape[1:]
    shared = heads // k.shape[2]
    p = _decode_weights(q, k, lengths, scale, window)[:, :, 0]
    dy, wide_q = dy.to(p.dtype), q.to(p.dtype)
    wide_k, wide_v = (_for_heads(cache.to(p.dtype), heads) for cache in (k, v))
    dp = torch.einsum("bhd,bjhd->bhj", dy, wide_v)
    ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * (width**-0.5 if scale is None else scale)
    dq = torch.einsum("bhj,bjhd->bhd", ds, wide_k)
    dk = torch.einsum("bhj,bhd->bjhd", ds, wide_q).unflatten(2, (-1, shared)).sum(dim=3)
    dv = torch.einsum("bhj,bhd->bjhd", p, dy).unflatten(2, (-1, shared)).sum(dim=3)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _decode_weights(
    q: Tensor, k_cache: Tensor, lengths: Tensor, scale: float | None, window: int | None
) -> Tensor:
    key = torch.arange(k_cache.shape[1], device=q.device)
    ends = lengths[:, None]
    visible = key < ends
    if window is not None:
        visible = visible & (key >= ends - window)
    return _weights(q[:, None], k_cache, visible[:, None, None, :], scale)


def visible_keys(
    q: Tensor, k: Tensor, causal: bool, window: int | None, cu_seqlens: Tensor | None = None
) -> Tensor | None:
    """Which keys each query sees, (Lq, Lk) bool; None where all see all."""
    if not causal and window is None and cu_seqlens is None:
        return None
    key = torch.arange(k.shape[1], device=q.device)
    query = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible & (key <= query)
    if window is not None:
        visible = visible & (key > query - window) & (key < query + window)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens, key, right=True)
        visible = visible & (sequence[:, None] == sequence)
    return visible


def _weights(
    q: Tensor, k: Tensor, visible: Tensor | None, scale: float | None, softcap: float | None = None
) -> Tensor:
    """The attention weights, (B, H, Lq, Lk), in float32 (float64 for float64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), _for_heads(k.to(wide), q.shape[2]))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is None:
        return torch.softmax(scores, dim=-1)
    # A row without keys would be softmax of -inf alone, NaN: it gets finite scores, and zeros after.
    sees_any = visible.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~visible & sees_any, float("-inf")), dim=-1)
    return weights.masked_fill(~sees_any, 0.0)


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhd->bihd", weights, _for_heads(v.to(weights.dtype), weights.shape[1]))


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Grouped-query: each key/value head serves heads / Hkv neighbouring query heads."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)
