"""Drawing initial weights, in place. Tensors on the meta device have no values to draw."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def normal_(tensor: Tensor, std: float) -> Tensor:
    """From N(0, std²)."""
    return tensor if tensor.is_meta else tensor.normal_(0.0, std)


@torch.no_grad()
def uniform_(tensor: Tensor, low: float, high: float) -> Tensor:
    """From low to high, all equally likely."""
    return tensor if tensor.is_meta else tensor.uniform_(low, high)
