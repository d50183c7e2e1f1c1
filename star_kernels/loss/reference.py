"""Linear projection and cross-entropy in one, as its equation reads, a chunk of rows at a time.

loss = mean over the kept rows n of  logsumexp_v(s_nv) − s_{n, target_n},   s = x weightᵀ

With p = softmax(s) and 1 the one-hot target, ∂loss/∂s = (p − 1) / kept, so a chunk's part of both gradients,
∂x = ∂s weight and ∂weight = ∂sᵀ x, follows as soon as its logits are there: they are taken in the forward
pass, while the chunk's logits exist, and (N, V) never does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels.contracts import without_autocast


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """See :func:`star_kernels.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(x, weight, targets, ignore_index)


def rows_per_chunk(rows: int, width: int, vocabulary: int) -> int:
    """So many rows that a chunk's logits are about as large as x, at least 4 MB or 128 rows of them."""
    as_large_as_x = -(-rows * width // max(vocabulary, 1))
    return max(128, 2**20 // max(vocabulary, 1), min(as_large_as_x, 1024))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        with without_autocast(x):
            needs_x, needs_weight = ctx.needs_input_grad[:2]
            loss, grad_x, grad_weight = _loss_and_gradients(
                x, weight, targets, ignore_index, needs_x, needs_weight
            )
        ctx.save_for_backward(x, weight, grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else _Gradient.apply(grad_loss, grad_x, x, weight),
            None if grad_weight is None else _Gradient.apply(grad_loss, grad_weight, x, weight),
            None,
            None,
        )


class _Gradient(torch.autograd.Function):
    """A gradient that was taken beforehand, scaled; it depends on x and weight in a way nobody recorded."""

    @staticmethod
    def forward(ctx: Any, grad_loss: Tensor, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return (grad_loss * gradient).to(gradient.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("linear_cross_entropy: second derivatives are not implemented")


def _loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    wide = torch.promote_types(x.dtype, torch.float32)
    wide_weight = weight.to(wide)
    kept = targets != ignore_index
    count = kept.sum()
    share = 1.0 / count.clamp(min=1).to(wide)
    total = torch.zeros((), dtype=wide, device=x.device)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_weight = torch.zeros_like(wide_weight) if needs_weight else None
    rows = rows_per_chunk(x.shape[0], x.shape[1], weight.shape[0])
    for start in range(0, x.shape[0], rows):
        chunk = slice(start, start + rows)
        wide_x, kept_rows = x[chunk].to(wide), kept[chunk, None]
        logits = wide_x @ wide_weight.T
        classes = torch.where(kept[chunk], targets[chunk], 0)[:, None].long()
        normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
        total = total + ((normaliser - logits.gather(1, classes)) * kept_rows).sum()
        if not (needs_x or needs_weight):
            continue
        grad = torch.exp(logits - normaliser)
        grad = grad.scatter_add(1, classes, grad.new_full(classes.shape, -1.0)) * (kept_rows * share)
        if grad_x is not None:
            grad_x[chunk] = (grad @ wide_weight).to(x.dtype)
        if grad_weight is not None:
            grad_weight += grad.T @ wide_x
    return total / count, grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)
