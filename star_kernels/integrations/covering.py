"""Which calls of other people's models star_kernels' operators take, decided once for each kind of tensor.

A decoded token makes some fifty calls of a few microseconds each, so the decision is kept by operator, device
and dtype instead of being made in each of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import star_kernels
from star_kernels import dispatch
from star_kernels.contracts import under_fake_tensors

__all__ = ["answers", "constant", "covers", "form", "recorded"]

_answers: dict[tuple[str, torch.device, torch.dtype], str] = {}
_forms: dict[tuple[str, torch.device, torch.dtype], Callable[..., Any] | None] = {}


def answers(operator: str, tensor: Tensor) -> str:
    """The backend that ``backend=None`` takes for a call of the operator on this tensor."""
    if torch.compiler.is_compiling():  # a table kept between calls is nothing to trace
        return dispatch.fastest(operator, tensor)[0]
    key = (operator, tensor.device, tensor.dtype)
    backend = _answers.get(key)
    if backend is None:
        backend = _answers[key] = dispatch.fastest(operator, tensor)[0]
    return backend


def covers(operator: str, first: Tensor, *others: Tensor | None) -> bool:
    """Whether a fast form of the operator takes these tensors, all on one device."""
    device = first.device
    for other in others:
        if other is not None and other.device != device:
            return False
    return answers(operator, first) != "reference"


def form(operator: str, tensor: Tensor) -> Callable[..., Any] | None:
    """The function that answers a call of the operator on this tensor, None where it is the definition.

    It takes what the public function takes but for ``backend``, and, in eager mode, leaves the contract to
    its caller.
    """
    if torch.compiler.is_compiling() or dispatch.in_use() is not None:
        public: Callable[..., Any] = getattr(star_kernels, operator)
        return public if covers(operator, tensor) else None
    key = (operator, tensor.device, tensor.dtype)
    try:
        return _forms[key]
    except KeyError:
        found = dispatch.choose(operator, None, tensor) if covers(operator, tensor) else None
        _forms[key] = found
        return found


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors, which steps in place can't take part in."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def constant(value: float, width: int, device: torch.device) -> Tensor:
    """A float32 vector of one number, kept, since decoding asks for few of them and often."""
    # What a capture allocates belongs to its graph, and holds nothing before the graph runs.
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if captured or torch.compiler.is_compiling() or under_fake_tensors():
        return torch.full((width,), value, dtype=torch.float32, device=device)
    return _kept(value, width, device)


@functools.lru_cache(maxsize=256)
def _kept(value: float, width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd may save it later
        return torch.full((width,), value, dtype=torch.float32, device=device)
