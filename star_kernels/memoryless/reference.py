"""Gated memoryless units, as their equation reads: y = activation(gate) ⊙ up (arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """See :func:`star_kernels.glu`."""
    return ACTIVATIONS[activation](gate) * up
