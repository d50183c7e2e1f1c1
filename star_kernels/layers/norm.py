"""The norm in front of every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from star_kernels.cache import LayerCache
from star_kernels.layers.base import require_cache, require_positive
from star_kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight (see :func:`star_kernels.rms_norm`).

    Args:
        dim: width D of the input.
        eps: added to the mean square.
        device, dtype: of the weight.

    State dict: ``weight`` (D,), ones at first. Cache: nothing.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_positive("RMSNorm", dim=dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, cache: LayerCache | None = None, *, residual: Tensor | None = None) -> Any:
        """norm(x), (..., D); with a residual (norm(x + residual), x + residual).

        The cache counts tokens, like that of other layers, and holds nothing.
        """
        if cache is None:
            return rms_norm(x, self.weight, self.eps, residual=residual)
        require_cache("RMSNorm", cache, x)
        y = rms_norm(x, self.weight, self.eps, residual=residual)
        cache.position += x.shape[1]
        return y

    def allocate_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LayerCache:
        """An empty cache, without tensors; the arguments are those of all layers."""
        require_positive("RMSNorm", batch=batch, max_length=max_length)
        return LayerCache({}, max_length)

    def materialize(self, x: Tensor) -> Tensor:
        """T (B, 1, L, L), diagonal with 1 / sqrt(mean(x_i²) + eps): norm(x) is weight ⊙ (T x)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(wide.square().mean(-1) + self.eps)
        return torch.diag_embed(inverse.to(x.dtype))[:, None]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
