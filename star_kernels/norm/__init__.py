"""Root-mean-square normalisation and rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.contracts import Contract
from star_kernels.norm import reference

for _name in ("rms_norm", "rope"):
    dispatch.register(_name, "reference", getattr(reference, _name))
if dispatch.load_compiled():
    from star_kernels.norm import compiled as compiled
dispatch.load_triton("norm")


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation, x / sqrt(mean(x²) + eps) ⊙ weight (arXiv 1910.07467).

    Args:
        x: (..., D), any strides whose last dimension is contiguous.
        weight: (D,).
        eps: added to the mean square; at least 0.
        residual: (..., D), added to x first, in the same pass. Under autocast, where a residual stream in
            float32 meets half-precision layer outputs, both are taken in the wider dtype of the two.
        backend: None (the fastest that covers the call), "reference", "cpp", "cuda" or "triton".

    Returns:
        y (..., D) in x's dtype; with a residual (y, x + residual).

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    if residual is not None and _meets_autocast(x, residual):
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    call = Contract("rms_norm")
    call.tensor("x", x, "... D")
    call.parameter("weight", weight, "D")
    call.number("eps", eps)
    if eps < 0:
        raise ValueError(f"rms_norm: eps is {eps!r}; it takes a number of at least 0")
    if residual is not None:
        call.tensor_like("residual", residual, x)
    return dispatch.choose("rms_norm", backend, x)(x, weight, eps, residual=residual)


def _meets_autocast(x: Tensor, residual: Tensor) -> bool:
    both = isinstance(x, Tensor) and isinstance(residual, Tensor)
    return both and x.dtype != residual.dtype and torch.is_autocast_enabled(x.device.type)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Rotary position embedding on the two halves of each head ("rotate-half"; arXiv 2104.09864).

    (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin), where x1 is the first half of a head, x2 the second.

    Args:
        x: (B, L, H, Dh) with Dh even, any strides whose last dimension is contiguous.
        cos, sin: (L, Dh/2), any floating dtype; row t belongs to token t of this call.
        backend: as in :func:`rms_norm`.

    Returns:
        y (B, L, H, Dh) in x's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    call = Contract("rope")
    call.tensor("x", x, "B L H Dh")
    if x.shape[-1] % 2:
        raise ValueError(f"rope: x has Dh = {x.shape[-1]}; it takes an even one")
    call.bind("Dh/2", x.shape[-1] // 2, "x")
    call.parameter("cos", cos, "L Dh/2")
    call.parameter("sin", sin, "L Dh/2")
    return dispatch.choose("rope", backend, x)(x, cos, sin)
