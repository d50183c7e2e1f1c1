"""What the Triton scans of one state a channel share, (TIME, CHANNELS) tiles above all.

A tile that is loaded with the compiler told of few neighbouring channels (``tl.max_contiguous``) has all its
tokens of a channel in one lane's registers. A loop over them then exchanges nothing between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_tile(pointer, stride, channel, inside, tokens, TIME: tl.constexpr):
    row = tl.arange(0, TIME)[:, None]
    known = (row < tokens) & inside[None, :]
    return tl.load(pointer + (row * stride + channel[None, :]), known, other=0.0).to(tl.float32)


@triton.jit
def row_picker(TIME: tl.constexpr):
    """What picks row t of a tile: ``tl.sum(tl.where(row == t, tile, nothing), 0)``.

    In a tile whose columns lie in one lane each, that is a sum of one number and many -0.0, which change
    nothing, so that the compiler leaves just the register of it.
    """
    row = tl.arange(0, TIME)[:, None]
    return row, tl.zeros((TIME, 1), tl.float32) * -1.0  # a plain -0.0 would become 0.0


def floats(tensor: Tensor, *shape: int) -> Tensor:
    """A float32 tensor on the device of ``tensor``."""
    return torch.empty(shape, dtype=torch.float32, device=tensor.device)


def token_strides(**tensors: Tensor | None) -> dict[str, int]:
    """x=x gives x_b and x_l: how far batch entries and tokens are apart."""
    named = {}
    for name, tensor in tensors.items():
        named[f"{name}_b"], named[f"{name}_l"] = (0, 0) if tensor is None else tensor.stride()[:2]
    return named


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
