"""Root-mean-square normalisation and rotary embedding, as their equations read.

rms_norm:  y = x / sqrt(mean(x²) + eps) ⊙ weight               (arXiv 1910.07467)
rope:      (x1, x2) -> (x1 cos − x2 sin, x2 cos + x1 sin)      (RoFormer, arXiv 2104.09864)
           on the two halves of each head ("rotate-half")
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`star_kernels.rms_norm`."""
    if residual is not None:
        x = x + residual
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), x)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`star_kernels.rope`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    x1, x2 = x.to(wide).chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)
