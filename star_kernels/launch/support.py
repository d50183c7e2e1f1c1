"""Small things that the launching code of several families needs."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from star_kernels.launch import interpreter

INTERPRETED: bool = knobs.runtime.interpret
"""Whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1 before the import)."""

if INTERPRETED:
    interpreter.repair()

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operand_type(dtype: torch.dtype) -> Any:
    """In which type a matrix product inside a kernel takes operands that come from tensors of ``dtype``.

    The interpreter computes wrongly with bfloat16 once it is loaded, so there it is always float32.
    """
    return tl.float32 if INTERPRETED else _OPERANDS[dtype]


def cdiv(size: int, block: int) -> int:
    """How many blocks of ``block`` cover ``size``."""
    return (size + block - 1) // block


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, as the kernels need it; else a copy."""
    if tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def rising(cu_seqlens: Tensor, length: int) -> Tensor:
    """The offsets as kernels read them: contiguous, none less than the one before, within 0 and ``length``.

    Offsets on a GPU are not checked, as that would wait for it. Whatever they hold, kernels that are given
    these read and write nothing outside their tensors.
    """
    return cu_seqlens.clamp(0, length).cummax(0).values


def chunks_of(cu_seqlens: Tensor, total: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Where every chunk of packed sequences lies, computed on the device without waiting for it.

    Args:
        cu_seqlens: (S+1,) int32 offsets, as `rising` gives them.
        total: the packed length.
        chunk: tokens a chunk; a sequence's last chunk may be shorter, an empty sequence has none.

    Returns:
        (sequence, first), each (N,) int32 with N = ceil(total / chunk) + S, an upper bound: which sequence
        a chunk belongs to, or -1 behind the last chunk, and its first token's place in the packed batch.
    """
    sequences = cu_seqlens.shape[0] - 1
    count = cdiv(total, chunk) + sequences
    starts = cu_seqlens.long()
    ends = ((starts[1:] - starts[:-1] + chunk - 1) // chunk).cumsum(0)
    index = torch.arange(count, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp(max=sequences - 1)
    before = torch.where(sequence > 0, ends[sequence - 1], 0)
    first = starts[sequence] + (index - before) * chunk
    sequence = torch.where(index < ends[-1], sequence, -1)
    return sequence.int(), first.int()


def matrix(tensor: Tensor) -> Tensor:
    """(..., D) as (N, D) with a contiguous last dimension; a copy only where no view can say it."""
    return (
        rows(tensor).reshape(-1, tensor.shape[-1])
        if tensor.numel()
        else tensor.new_empty(0, tensor.shape[-1])
    )
