"""Operators whose kernels Python launches: eager calls directly, compiled ones as torch custom operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from star_kernels import dispatch
from star_kernels.compiled import eager_function, needs_gradient, refuse_tangents
from star_kernels.launch.support import INTERPRETED

NAMESPACE = "star_kernels_triton"


class Operator:
    """One step of a call that torch sees as a whole: allocates its results and launches its kernels.

    In eager mode a call goes straight to ``function`` (a torch custom operator would add 65 microseconds);
    under torch.compile it is the custom operator ``star_kernels_triton::<name>``. ``function`` is its own
    fake: on fake tensors :meth:`Kernel.launch` launches nothing.

    Args:
        name: of the operator; the public function's, or that with "_backward".
        schema: torch's, such as "(Tensor x, Tensor? bias) -> (Tensor, Tensor)".
        function: computes it. Results are new tensors, never views of arguments; an absent result is an
            empty tensor.
        public_name: what errors call it; ``name`` if None.
    """

    def __init__(
        self, name: str, schema: str, function: Callable[..., Any], *, public_name: str | None = None
    ) -> None:
        self.name = name
        self.function = function
        self.public_name = public_name or name
        self.definition = torch.library.custom_op(
            f"{NAMESPACE}::{name}", function, mutates_args=(), schema=schema
        )
        self.definition.register_fake(function)
        self._eager: type[torch.autograd.Function] | None = None

    def differentiate(
        self, backward: Callable[..., Any], setup_context: Callable[..., None], *, partner: Operator
    ) -> None:
        """Registers the derivative.

        Args:
            backward: (ctx, *gradients of the results) -> a gradient or None for each argument. Calls
                ``partner``, whose own derivative is refused: second derivatives raise.
            setup_context: (ctx, arguments, results): saves what backward needs.
            partner: the operator that computes the gradients.
        """
        self.definition.register_autograd(backward, setup_context=setup_context)
        self._eager = eager_function(self.function, backward, setup_context)
        partner._refuse_derivative(self.public_name)

    def _refuse_derivative(self, public_name: str) -> None:
        def refuse(ctx: Any, *gradients: Any) -> None:
            raise RuntimeError(
                f"{public_name}: second derivatives are not implemented by the Triton kernels; "
                "use backend='reference'"
            )

        def save_nothing(ctx: Any, arguments: Any, results: Any) -> None:
            pass

        self.definition.register_autograd(refuse)
        self._eager = eager_function(self.function, refuse, save_nothing)

    def register(self, public: Callable[..., Any]) -> None:
        """Makes ``public``, with the reference's signature, the operator's form on backend "triton"."""
        dispatch.register(
            self.public_name,
            "triton",
            public,
            device_type="cpu" if INTERPRETED else "cuda",
            dtypes=dispatch.KERNEL_DTYPES,
            by_name_only=INTERPRETED,
        )

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.definition(*arguments)
        if self._eager is not None and needs_gradient(arguments):
            return self._eager.apply(*arguments)
        refuse_tangents(self.definition, arguments)
        return self.function(*arguments)
