"""Cosines and sines of rotary position embedding, computed once and kept."""

from __future__ import annotations

import torch
from torch import Tensor

_SHORTEST = 64
_tables: dict[tuple[int, float, torch.device], tuple[Tensor, Tensor]] = {}


def rotary_tables(
    start: int, length: int, width: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin for tokens ``start`` to ``start + length - 1``, each (length, width / 2) float32.

    Token t turns the pair i of a head by the angle t · theta^(-2i / width) (RoFormer, arXiv 2104.09864).
    Tables are kept for every (width, theta, device) and double when they are too short.
    """
    end = start + length
    if not _may_keep(device):
        cos, sin = _compute(end, width, theta, device)
        return cos[start:end], sin[start:end]
    key = (width, theta, device)
    kept = _tables.get(key)
    if kept is None or kept[0].shape[0] < end:
        with torch.inference_mode(False):
            kept = _compute(max(_SHORTEST, 1 << (end - 1).bit_length()), width, theta, device)
        _tables[key] = kept
    return kept[0][start:end], kept[1][start:end]


def _may_keep(device: torch.device) -> bool:
    """Not tensors of a trace, nor without values: they would be handed to later calls."""
    if device.type == "meta" or torch.compiler.is_compiling():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


@torch.no_grad()
def _compute(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    # In float64: the angle of a late token has no digits left in float32.
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, theta**-exponents)
    return angles.cos().float(), angles.sin().float()
