"""Losses fused with the projection that makes their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.contracts import Contract, autocast_together, holds_values
from star_kernels.loss import reference

dispatch.register("linear_cross_entropy", "reference", reference.linear_cross_entropy)
if dispatch.load_compiled():
    from star_kernels.loss import compiled as compiled
dispatch.load_triton("loss")


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, backend: str | None = None
) -> Tensor:
    """Mean cross-entropy of x weightᵀ against targets, without ever holding the (N, V) logits.

    The logits exist a chunk of rows at a time, in float32, about as large as x and at least 4 MB or 128 rows;
    where gradients are needed they are computed in the same pass, so the backward pass only scales them.

    Args:
        x: (N, D), any strides whose last dimension is contiguous.
        weight: (V, D), any floating dtype.
        targets: (N,) int64 or int32, classes 0 to V - 1 or ``ignore_index``.
        ignore_index: rows with this target do not count.
        backend: None (the fastest that covers the call), "reference", "cpp", "cuda" or "triton".

    Returns:
        The mean over the rows that count, () in float32 (float64 for float64): a loss rounded to half
        precision would be of no use. Where no row counts it is NaN and its gradients are zero, as
        ``torch.nn.functional.cross_entropy`` has it.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above, or, on a
            CPU, a target that is no class.
    """
    (x,) = autocast_together(x)
    call = Contract("linear_cross_entropy")
    call.tensor("x", x, "N D")
    call.parameter("weight", weight, "V D")
    call.integers("targets", targets, "N", (torch.int64, torch.int32))
    call.count("ignore_index", ignore_index, at_least=-(2**31))
    if targets.device.type == "cpu" and holds_values(targets):
        _check_targets(targets, weight.shape[0], ignore_index)
    return dispatch.choose("linear_cross_entropy", backend, x)(x, weight, targets, ignore_index=ignore_index)


def _check_targets(targets: Tensor, classes: int, ignore_index: int) -> None:
    wrong = targets[((targets < 0) | (targets >= classes)) & (targets != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"linear_cross_entropy: targets holds {int(wrong[0])}; "
            f"it takes 0 to {classes - 1} or ignore_index = {ignore_index}"
        )
