"""The fused loss with its compiled pass over a chunk's logits: loss and gradient in place, in one visit.

The matrix products are PyTorch's own, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.compiled import register_fake
from star_kernels.loss.reference import fused_loss


def rows_loss(
    logits: Tensor, targets: Tensor, ignore_index: int, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :func:`star_kernels.loss.reference.rows_loss`; the logits become their gradient."""
    loss: Tensor = torch.ops.star_kernels.cross_entropy_rows_.default(logits, targets, ignore_index, share)
    return loss, logits


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """See :func:`star_kernels.linear_cross_entropy`."""
    loss: Tensor = fused_loss(x, weight, targets, ignore_index, rows_loss)
    return loss


register_fake("cross_entropy_rows_", lambda logits, targets, ignore_index, share: logits.new_empty(()))
dispatch.register(
    "linear_cross_entropy", "cpp", linear_cross_entropy, device_type="cpu", dtypes=dispatch.KERNEL_DTYPES
)
