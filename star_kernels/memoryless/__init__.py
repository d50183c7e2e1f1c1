"""Gated memoryless units: elementwise products of a gate and a value."""

from __future__ import annotations

from torch import Tensor

from star_kernels import dispatch
from star_kernels.contracts import Contract, autocast_together
from star_kernels.memoryless import reference

dispatch.register("glu", "reference", reference.glu)
if dispatch.load_compiled():
    from star_kernels.memoryless import compiled as compiled
dispatch.load_triton("memoryless")


def glu(gate: Tensor, up: Tensor, activation: str = "silu", *, backend: str | None = None) -> Tensor:
    """Gated linear unit, activation(gate) ⊙ up, in one pass (arXiv 2002.05202).

    Args:
        gate, up: (..., D), any strides whose last dimension is contiguous.
        activation: "silu" (SwiGLU), "gelu" (exact) or "gelu_tanh" (GEGLU), "relu" (ReGLU), "sigmoid" (GLU).
        backend: None (the fastest that covers the call), "reference", "cpp", "cuda" or "triton".

    Returns:
        y (..., D) in gate's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    gate, up = autocast_together(gate, up)
    call = Contract("glu")
    call.tensor("gate", gate, "... D")
    call.tensor_like("up", up, gate)
    call.choice("activation", activation, tuple(reference.ACTIVATIONS))
    return dispatch.choose("glu", backend, gate)(gate, up, activation)
