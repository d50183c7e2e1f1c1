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
from torch.autograd import forward_ad

NAMESPACE = "star_kernels"


def operator(name: str, overload: str = "default") -> Any:
    """The compiled operator itself, ``torch.ops.star_kernels.<name>.<overload>``."""
    return getattr(getattr(getattr(torch.ops, NAMESPACE), name), overload)


def register_fake(name: str, function: Callable[..., Any]) -> None:
    """Teaches tracing the shapes and dtypes of an operator's results; ``name`` may end in ".<overload>".

    Raises:
        ImportError: the shared object is older than these sources and has no such operator.
    """
    base, _, overload = name.partition(".")
    packet = getattr(getattr(torch.ops, NAMESPACE), base, None)
    if packet is None or (overload or "default") not in packet.overloads():
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
    refuse: bool = True,
) -> None:
    """Registers ``backward`` for an operator and, with ``refuse``, a refusal as its partner's derivative."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)
    _eager_functions[operator(name)] = eager_function(operator(name), backward, setup_context)
    if refuse:
        refuse_second_derivative(f"{name}_backward", public_name or name)


_eager_functions: dict[Any, type[torch.autograd.Function]] = {}


def eager_function(
    op: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    """The same derivative without the dispatcher's Python kernels: a third of their cost on small tensors."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            if torch.is_grad_enabled():  # second derivatives: the partner's own derivative, or its refusal
                return backward(ctx, *gradients)
            with torch._C._AutoDispatchBelowAutograd():
                return backward(ctx, *gradients)

    return Eager


def refuse_second_derivative(backward_name: str, public_name: str) -> None:
    """Differentiating a backward operator raises instead of returning something wrong."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"{public_name}: second derivatives are not implemented by the compiled operator; "
            "use backend='reference'"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{backward_name}", refuse)


def needs_gradient(arguments: Sequence[Any]) -> bool:
    """Whether autograd has anything to record for a call with these arguments, tensors among them."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def call(op: Any, *arguments: Any) -> Any:
    """Calls an operator by the shortest way: in eager mode past the dispatcher's Python kernels."""
    if torch.compiler.is_compiling():
        return op(*arguments)
    if needs_gradient(arguments):
        function = _eager_functions.get(op)
        if function is None or torch._C._are_functorch_transforms_active():
            return op(*arguments)
        return function.apply(*arguments)
    refuse_tangents(op, arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def refuse_tangents(op: Any, arguments: Sequence[Any]) -> None:
    """Raises where forward-mode derivatives would be left out without a word."""
    if forward_ad._current_level < 0:
        return
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise RuntimeError(f"{op}: no forward-mode derivatives; use backend='reference'")


def like(gradient: Tensor, tensor: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of the tensor it belongs to; None where there is no such tensor."""
    return None if tensor is None else gradient.to(tensor.dtype)
