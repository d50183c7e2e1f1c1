"""Linear projection and cross-entropy in one, as its equation reads, a chunk of rows at a time.

loss = mean over the kept rows n of  logsumexp_v(s_nv) − s_{n, target_n},   s = x weightᵀ

With p = softmax(s) and 1 the one-hot target, ∂loss/∂s = (p − 1) / kept, so a chunk's part of both gradients,
∂x = ∂s weight and ∂weight = ∂sᵀ x, follows as soon as its logits are there: they are taken in the forward
pass, while the chunk's logits exist, and (N, V) never does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from star_kernels.contracts import without_autocast

RowsLoss = Callable[[Tensor, Tensor, int, Tensor | None], tuple[Tensor, Tensor]]
"""(logits, targets, ignore_index, share) -> the sum of the rows' losses and, where share = 1 / kept is given,
the gradient of the logits; the logits are free to be overwritten."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """See :func:`star_kernels.linear_cross_entropy`."""
    return fused_loss(x, weight, targets, ignore_index, rows_loss)


def fused_loss(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, rows_loss: RowsLoss) -> Tensor:
    """The loss over all chunks, and, only where autograd records, its gradients."""
    if not torch.is_grad_enabled():  # a Function is told what requires a gradient, whatever the mode
        x, weight = x.detach(), weight.detach()
    loss: Tensor = LinearCrossEntropy.apply(x, weight, targets, ignore_index, rows_loss)
    return loss


def rows_loss(
    logits: Tensor, targets: Tensor, ignore_index: int, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss of a chunk of rows and its gradient, as the equations above say."""
    kept = (targets != ignore_index)[:, None]
    classes = torch.where(kept, targets[:, None], 0)
    normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = ((normaliser - logits.gather(1, classes)) * kept).sum()
    if share is None:
        return loss, logits
    grad = torch.exp(logits - normaliser)
    return loss, grad.scatter_add(1, classes, grad.new_full(classes.shape, -1.0)) * (kept * share)


def rows_per_chunk(rows: int, width: int, vocabulary: int) -> int:
    """So many rows that a chunk's logits are about as large as x, at least 4 MB or 128 rows of them."""
    as_large_as_x = -(-rows * width // max(vocabulary, 1))
    return max(128, 2**20 // max(vocabulary, 1), min(as_large_as_x, 1024))


def _by_rows(matrix: Tensor) -> Tensor:
    """Matrix products round by the layout of their operands: a transposed one would give other bits."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a gradient waits for the loss's own: float16 would lose what loss scaling is there to save."""
    return torch.float32 if dtype == torch.float16 else dtype


class LinearCrossEntropy(torch.autograd.Function):
    """The loss over all chunks; ``rows_loss`` is how a chunk's is taken."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, rows_loss: RowsLoss
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_weight, targets = _by_rows(weight).to(wide), targets.long()
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        count = (targets != ignore_index).sum()
        share = 1.0 / count.clamp(min=1).to(wide) if needs_x or needs_weight else None
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x, dtype=kept_dtype(x.dtype)) if needs_x else None
        grad_weight = torch.zeros_like(wide_weight) if needs_weight else None
        rows = rows_per_chunk(x.shape[0], x.shape[1], weight.shape[0])
        with without_autocast(x):
            for start in range(0, x.shape[0], rows):
                chunk = slice(start, start + rows)
                wide_x = _by_rows(x[chunk]).to(wide)
                loss, grad = rows_loss(wide_x @ wide_weight.T, targets[chunk], ignore_index, share)
                total = total + loss
                if grad_x is not None:
                    grad_x[chunk] = (grad @ wide_weight).to(grad_x.dtype)
                if grad_weight is not None:
                    grad_weight.addmm_(grad.T, wide_x)
        if grad_weight is not None:
            grad_weight = grad_weight.to(kept_dtype(weight.dtype))
        ctx.save_for_backward(x, weight, grad_x, grad_weight)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else _Gradient.apply(grad_loss, grad_x, x.dtype, x, weight),
            None if grad_weight is None else _Gradient.apply(grad_loss, grad_weight, weight.dtype, x, weight),
            None,
            None,
            None,
        )


class _Gradient(torch.autograd.Function):
    """A gradient that was taken beforehand, scaled; it depends on x and weight in a way nobody recorded."""

    @staticmethod
    def forward(
        ctx: Any, grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype, x: Tensor, weight: Tensor
    ) -> Tensor:
        return (grad_loss * gradient).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("linear_cross_entropy: second derivatives are not implemented")
