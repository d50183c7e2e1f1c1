"""The norm in front of every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from star_kernels.layers.base import require_positive
from star_kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight (see :func:`star_kernels.rms_norm`).

    Args:
        dim: width D of the input.
        eps: added to the mean square.
        device, dtype: of the weight.

    State dict: ``weight`` (D,), ones at first.
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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """norm(x), (..., D); with a residual (norm(x + residual), x + residual)."""
        return rms_norm(x, self.weight, self.eps, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
