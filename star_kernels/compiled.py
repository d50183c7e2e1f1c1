"""What the glue of every compiled operator shares: fakes, autograd, second derivatives, steps.

A compiled operator ``name`` lives in C++ (schema in csrc/ops.cpp) with a partner ``name_backward``; Python
adds how shapes follow (fake) and which partner is the derivative (autograd). The C++ dispatch costs about
3 microseconds; Python's share is paid only where a gradient is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "star_kernels"


def operator(name: str) -> Any:
    """The compiled operator itself, ``torch.ops.star_kernels.<name>.default``."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_fake(name: str, function: Callable[..., Any]) -> None:
    """Teaches tracing the shapes and dtypes of an operator's results.

    Raises:
        ImportError: the shared object is older than these sources and has no such operator.
    """
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        raise ImportError(
            f"star_kernels._C has no operator {name}: it is older than these sources; build it again "
            "(make build, or pip install .)"
        )

    @functools.wraps(function)
    def on_one_device(*arguments: Any) -> Any:
        # A fake also answers calls with a meta tensor among real ones, which no kernel would take.
        devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: tensors are on different devices")
        return function(*arguments)

    torch.library.register_fake(f"{NAMESPACE}::{name}", on_one_device)


def register_autograd(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    *,
    public_name: str | None = None,
) -> None:
    """Registers ``backward`` for an operator, and a clear refusal as the derivative of its partner."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
    refuse_second_derivative(f"{name}_backward", public_name or name)


def refuse_second_derivative(backward_name: str, public_name: str) -> None:
    """Differentiating a backward operator raises instead of returning something wrong."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"{public_name}: second derivatives are not implemented by the compiled operator; "
            "use backend='reference'"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{backward_name}", refuse)


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd has anything to record for a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def call(op: Any, *arguments: Any) -> Any:
    """Calls an operator; where no gradient is asked for, below autograd, which saves its Python frame."""
    if torch.compiler.is_compiling() or needs_gradient([a for a in arguments if isinstance(a, Tensor)]):
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def like(gradient: Tensor, tensor: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of the tensor it belongs to; None where there is no such tensor."""
    return None if tensor is None else gradient.to(tensor.dtype)
