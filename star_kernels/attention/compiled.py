"""The compiled attentions: fakes, derivatives, and functions with the reference's signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.attention import reference
from star_kernels.compiled import call, like, operator, refuse_tangents, register_autograd, register_fake


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1]) ** -0.5 if scale is None else float(scale)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _attention_backward_fake(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, *ctx.settings, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)


def _attention_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    gradients = operator("attention_backward")(dy, *tensors, *ctx.settings, cu_seqlens)
    return *gradients, *(None for _ in ctx.settings), None


def _diff_attention_fake(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor, *settings: Any
) -> Tensor:
    return _attention_fake(q1, k1, v)


def _diff_attention_backward_fake(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *tensors, _lam = inputs[:6]
    dlam = tensors[0].new_empty(tensors[0].shape[2], dtype=torch.float32)
    return *(tensor.new_empty(tensor.shape) for tensor in tensors), dlam


def _diff_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _diff_attention_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    *tensors, lam = ctx.saved_tensors
    *gradients, dlam = operator("diff_attention_backward")(dy, *tensors, lam, *ctx.settings)
    dlam = dlam if lam.dim() else dlam.sum()
    return *gradients, like(dlam, lam), *(None for _ in ctx.settings)


class _AttentionDecode(torch.autograd.Function):
    """Decoding with gradients: one query's derivative is the definition's, of differentiable operations.

    Not registered with the operator, whose calls without gradients would pay for it in microseconds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, lengths)
        ctx.settings = scale, window
        y: Tensor = torch.ops.star_kernels.attention_decode.default(q, k, v, lengths, scale, window)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        gradients = reference.attention_decode_backward(dy, *ctx.saved_tensors, *ctx.settings)
        return *gradients, None, None, None


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
    y: Tensor = call(
        torch.ops.star_kernels.attention.default,
        q,
        k,
        v,
        causal,
        window or 0,
        _scale(q, scale),
        float(softcap or 0.0),
        cu_seqlens,
    )
    return y


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
    y: Tensor = call(
        torch.ops.star_kernels.diff_attention.default,
        q1,
        k1,
        q2,
        k2,
        v,
        lam,
        causal,
        window or 0,
        _scale(q1, scale),
    )
    return y


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
    needs_gradient = q.requires_grad or k_cache.requires_grad or v_cache.requires_grad
    if needs_gradient and torch.is_grad_enabled():
        y: Tensor = _AttentionDecode.apply(q, k_cache, v_cache, lengths, scale, window)
        return y
    refuse_tangents("attention_decode", (q, k_cache, v_cache))
    y = torch.ops.star_kernels.attention_decode.default(q, k_cache, v_cache, lengths, scale, window)
    return y


register_fake("attention", _attention_fake)
register_fake("attention_backward", _attention_backward_fake)
register_autograd("attention", _attention_autograd, _attention_setup)
register_fake("diff_attention", _diff_attention_fake)
register_fake("diff_attention_backward", _diff_attention_backward_fake)
register_autograd("diff_attention", _diff_attention_autograd, _diff_attention_setup)

register_fake(
    "attention_decode",
    lambda q, k_cache, v_cache, lengths, scale, window: q.new_empty(*q.shape[:2], v_cache.shape[3]),
)

for _name, _function in (
    ("attention", attention),
    ("diff_attention", diff_attention),
    ("attention_decode", attention_decode),
):
    dispatch.register_compiled(_name, _function, cuda=_name == "attention_decode")
