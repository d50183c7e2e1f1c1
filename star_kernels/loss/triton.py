"""The fused loss on a GPU: PyTorch's matrix products on pieces of the logits, Triton's passes over them.

With s = x weightᵀ, z_n = logsumexp_v(s_nv) and p = exp(s − z):

    loss = mean over kept n of z_n − s_{n, target_n},    G = p − onehot(target),
    ∂x = share · G weight,    ∂weight = share · Gᵀ x,    share = 1 / kept

The logits exist a piece at a time, some rows by some classes, in float32. Two sweeps over the pieces:

1. ``_fold``: every row's running maximum and sum of exponentials, and its target's logit. After it the loss
   is known, and without gradients all is done.
2. The logits again, then ``_differentiate`` writes G where the products ∂x += G weight and ∂weight += Gᵀ x
   read it. Classes are the outer loop, so a piece of ∂weight is summed over all rows in float32 and then
   written, once, in weight's dtype.

Cutting the rows alone, as Liger does (arXiv 2410.10989), needs no second sweep, three matrix products
instead of four, but adds to all of ∂weight once a chunk of rows: at V = 128256, D = 2048 and 32 chunks that
is 32 times 0.5 GB read and written, or twice as much for a sum in float32, which would be the largest tensor
of the call. Here ∂weight is written once, and beside it there are one float32 copy of ∂x and one piece of
logits. Where one piece holds all of them, its logits stay for the second sweep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from star_kernels.contracts import without_autocast
from star_kernels.launch import INTERPRETED, Configuration, Kernel, Operator, cdiv, rows
from star_kernels.loss.reference import kept_dtype

ROWS_AT_ONCE = 64 if INTERPRETED else 8192
"""Rows of a piece, at most: enough to fill a GPU whatever the classes; few where tests should see several."""

PIECE = 2**12 if INTERPRETED else 2**25
"""Logits of a piece, 128 MiB in float32, unless 256 classes are more."""

SCALES = {torch.float16: 1024.0}
"""What G is multiplied by while it is in half precision, where its least values would vanish."""


@triton.jit
def _fold(
    logits, targets, maximum, total, chosen,
    columns, first_class, ignore_index,
    FIRST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row of a piece: folded into the row's maximum and sum of exponentials; picks the target's logit."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    if FIRST:
        peak = tl.full((COLUMNS,), -float("inf"), tl.float32)
        mass = tl.zeros((COLUMNS,), tl.float32)
    else:  # what was so far enters as one of the lanes
        first = tl.arange(0, COLUMNS) == 0
        peak = tl.where(first, tl.load(maximum + row), -float("inf"))
        mass = tl.where(first, tl.load(total + row), 0.0)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(logits + column, column < columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, value)
        base = tl.where(higher == -float("inf"), 0.0, higher)  # lanes that have seen nothing
        mass = mass * tl.exp(peak - base) + tl.exp(value - base)
        peak = higher
    top = tl.max(peak, 0)
    tl.store(maximum + row, top)
    tl.store(total + row, tl.sum(mass * tl.exp(peak - top), 0))
    target = tl.load(targets + row).to(tl.int64)
    local = target - first_class
    here = (target != ignore_index) & (local >= 0) & (local < columns)
    if FIRST:
        tl.store(chosen + row, tl.load(logits + local, here, other=0.0))
    else:
        tl.store(chosen + row, tl.load(logits + local, here, other=0.0), here)


@triton.jit
def _differentiate(
    logits, targets, normaliser, gradient,
    row_count, columns, first_class, ignore_index, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """G of a piece, times ``scale``; 0 in rows that don't count."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    known = row < row_count
    inside = known & (column < columns)
    value = tl.load(logits + row * columns + column, inside, other=0.0).to(tl.float32)
    base = tl.load(normaliser + row, known, other=0.0)
    target = tl.load(targets + row, known, other=0).to(tl.int64)
    weight = tl.where(target != ignore_index, scale, 0.0)
    # The logits are those that the normaliser came from, so only rounding can lift one above it.
    above = value - base
    probability = tl.exp(tl.where(above > 0.0, 0.0, above))  # NaN stays; on a GPU, tl.minimum would drop it
    onehot = (target - first_class == column).to(tl.float32)
    tl.store(gradient + row * columns + column, (probability - onehot) * weight, inside)


@triton.jit
def _scale_kernel(x, factor, y, size, BLOCK: tl.constexpr):
    """y = factor · x, the factor a float32 scalar on the device: loss scaling can exceed float16."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, place < size, other=0.0).to(tl.float32)
    tl.store(y + place, value * tl.load(factor), place < size)


FOLD = Kernel(
    "linear_cross_entropy_fold",
    _fold,
    (
        Configuration({"COLUMNS": 2048}, num_warps=4, num_stages=1),
        Configuration({"COLUMNS": 1024}, num_warps=4, num_stages=1),
        Configuration({"COLUMNS": 4096}, num_warps=8, num_stages=1),
        Configuration({"COLUMNS": 4096}, num_warps=4, num_stages=1),
    ),
)
DIFFERENTIATE = Kernel(
    "linear_cross_entropy_differentiate",
    _differentiate,
    (
        Configuration({"ROWS": 1, "COLUMNS": 2048}, num_warps=4, num_stages=1),
        Configuration({"ROWS": 1, "COLUMNS": 1024}, num_warps=4, num_stages=1),
        Configuration({"ROWS": 4, "COLUMNS": 1024}, num_warps=8, num_stages=1),
        Configuration({"ROWS": 2, "COLUMNS": 2048}, num_warps=8, num_stages=1),
    ),
)


SCALE_KERNEL = Kernel(
    "linear_cross_entropy_scale",
    _scale_kernel,
    (
        Configuration({"BLOCK": 4096}, num_warps=4, num_stages=1),
        Configuration({"BLOCK": 2048}, num_warps=4, num_stages=1),
        Configuration({"BLOCK": 8192}, num_warps=8, num_stages=1),
    ),
)


@functools.cache
def _sums_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch multiplies matrices of halves into float32 here, as CUDA does since 2.8; ROCm and
    old libraries may not. Tried once, on a tile of zeros."""
    zeros = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        total = torch.mm(zeros, zeros, out_dtype=torch.float32)
        torch.addmm(total, zeros, zeros, out_dtype=torch.float32, out=total)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _takes_halves(a: Tensor) -> bool:
    return a.is_cuda and a.dtype != torch.float32 and _sums_halves(a.device, a.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32. Half-precision operands stay what they are, as the tensor cores take them."""
    if isinstance(a, FakeTensor):  # not every torch's fakes know a product of two dtypes
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    if _takes_halves(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; total is float32."""
    if isinstance(total, FakeTensor):
        return  # nothing is computed on fakes
    if _takes_halves(a):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _classes_at_once(row_count: int, classes: int) -> int:
    """Classes of a piece: a multiple of 256, or all."""
    fitting = PIECE // max(min(row_count, ROWS_AT_ONCE), 1)
    return classes if classes <= fitting else max(256, fitting // 256 * 256)


class _Pieces:
    """The logits of one call, piece by piece."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x, self.weight = rows(x), rows(weight)
        self.row_count, self.classes = x.shape[0], weight.shape[0]
        step = _classes_at_once(self.row_count, self.classes)
        self.columns = [slice(at, min(at + step, self.classes)) for at in range(0, self.classes, step or 1)]
        starts = range(0, self.row_count, ROWS_AT_ONCE)
        self.rows = [slice(at, min(at + ROWS_AT_ONCE, self.row_count)) for at in starts]
        self._kept: Tensor | None = None

    def weight_of(self, columns: slice) -> Tensor:
        """Some classes' weights, in x's dtype."""
        return self.weight[columns].to(self.x.dtype)

    def logits(self, taken: slice, weight: Tensor) -> Tensor:
        """Logits of some rows; kept for the second sweep where they are the only ones."""
        if self._kept is not None:
            return self._kept
        logits = _product(self.x[taken], weight.T)
        if len(self.rows) == len(self.columns) == 1:
            self._kept = logits
        return logits


def _grid(row_count: int, columns: int | None = None) -> Callable[[Configuration], tuple[int, ...]]:
    """A program a row, or one for each tile."""
    if columns is None:
        return lambda blocks: (row_count,)
    return lambda blocks: (cdiv(row_count, blocks["ROWS"]), cdiv(columns, blocks["COLUMNS"]))


def _normalisers(pieces: _Pieces, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The first sweep: each row's z and its target's logit."""
    maximum, total, chosen = pieces.x.new_zeros((3, pieces.row_count), dtype=torch.float32).unbind()
    for columns in pieces.columns:
        weight = pieces.weight_of(columns)
        for taken in pieces.rows:
            logits = pieces.logits(taken, weight)
            row_count, width = logits.shape
            FOLD.launch(
                _grid(row_count),
                logits=logits, targets=targets[taken], maximum=maximum[taken], total=total[taken],
                chosen=chosen[taken], columns=width, first_class=columns.start, ignore_index=ignore_index,
                FIRST=columns.start == 0,
            )  # fmt: skip
    return maximum + total.log(), chosen


def _gradients(
    pieces: _Pieces, targets: Tensor, normaliser: Tensor, ignore_index: int, share: Tensor,
    needs_x: bool, needs_weight: bool, weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The second sweep: ∂x and ∂weight, each empty where nobody needs it."""
    x = pieces.x
    scale = SCALES.get(x.dtype, 1.0)
    operand = torch.float32 if INTERPRETED else x.dtype
    dx = x.new_zeros(x.shape if needs_x else 0, dtype=torch.float32)
    dweight = x.new_empty(pieces.weight.shape if needs_weight else 0, dtype=weight_dtype)
    for columns in pieces.columns:
        weight = pieces.weight_of(columns)
        part = weight.new_zeros(weight.shape if needs_weight else 0, dtype=torch.float32)
        for taken in pieces.rows:
            logits = pieces.logits(taken, weight)
            row_count, width = logits.shape
            gradient = logits.new_empty(logits.shape, dtype=operand)
            DIFFERENTIATE.launch(
                _grid(row_count, width),
                logits=logits, targets=targets[taken], normaliser=normaliser[taken], gradient=gradient,
                row_count=row_count, columns=width, first_class=columns.start, ignore_index=ignore_index,
                scale=scale,
            )  # fmt: skip
            del logits
            if needs_x:
                _add_product(dx[taken], gradient, weight)
            if needs_weight:
                _add_product(part, gradient.T, x[taken])
        if needs_weight:
            torch.mul(part, share / scale, out=part)
            dweight[columns] = part
    return dx.mul_(share / scale).to(kept_dtype(x.dtype)) if needs_x else x.new_empty(0), dweight


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    pieces, targets = _Pieces(x, weight), targets.contiguous()
    kept = targets != ignore_index
    count = kept.sum()
    with without_autocast(x):
        normaliser, chosen = _normalisers(pieces, targets, ignore_index)
        loss = torch.where(kept, normaliser - chosen, 0.0).sum() / count
        share = 1.0 / count.clamp(min=1).float()
        if not (needs_x or needs_weight):
            return loss, x.new_empty(0), x.new_empty(0, dtype=weight.dtype)
        dx, dweight = _gradients(
            pieces,
            targets,
            normaliser,
            ignore_index,
            share,
            needs_x,
            needs_weight,
            kept_dtype(weight.dtype),
        )
    return loss, dx, dweight


def _scale_into(result: Tensor, gradient: Tensor, dloss: Tensor) -> Tensor:
    size = gradient.numel()
    SCALE_KERNEL.launch(
        lambda blocks: (cdiv(size, blocks["BLOCK"]),),
        x=gradient, factor=dloss.float(), y=result, size=size,
    )  # fmt: skip
    return result


def _scale(dloss: Tensor, dx: Tensor, dweight: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x and weight are there so that a second derivative, which nobody has recorded, is asked of this."""
    return (
        _scale_into(torch.empty_like(dx), dx, dloss),
        _scale_into(torch.empty_like(dweight), dweight, dloss),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, targets, ctx.ignore_index, ctx.needs_x, ctx.needs_weight = inputs
    _, dx, dweight = output
    ctx.spent = False
    ctx.mark_non_differentiable(dx, dweight)
    ctx.save_for_backward(dx, dweight, x, weight, targets)


def _autograd(ctx: Any, dloss: Tensor, *others: Tensor) -> tuple[Any, ...]:
    """The gradients taken forward, scaled; in place where nothing traces or records the backward pass.

    A copy of ∂weight would be the call's peak of memory. The saved gradients are then spent: another backward
    pass through a retained graph takes them again.
    """
    dx, dweight, x, weight, targets = ctx.saved_tensors
    if ctx.spent:
        with torch.no_grad():
            _, dx, dweight = _linear_cross_entropy(
                x, weight, targets, ctx.ignore_index, ctx.needs_x, ctx.needs_weight
            )
    if type(dloss) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
        dx, dweight = SCALE(dloss, dx, dweight, x, weight)
    else:
        ctx.spent = True
        _scale_into(dx, dx, dloss)
        _scale_into(dweight, dweight, dloss)
    return (
        dx.to(x.dtype) if ctx.needs_x else None,
        dweight.to(weight.dtype) if ctx.needs_weight else None,
        *(None,) * 4,
    )


SCALE = Operator(
    "linear_cross_entropy_backward",
    "(Tensor dloss, Tensor dx, Tensor dweight, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    _scale,
    public_name="linear_cross_entropy",
)
OPERATOR = Operator(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool needs_x, bool needs_weight) "
    "-> (Tensor, Tensor, Tensor)",
    _linear_cross_entropy,
)
OPERATOR.differentiate(_autograd, _setup, partner=SCALE)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """See :func:`star_kernels.linear_cross_entropy`."""
    records = torch.is_grad_enabled()
    loss: Tensor
    loss, _, _ = OPERATOR(
        x, weight, targets, ignore_index, records and x.requires_grad, records and weight.requires_grad
    )
    return loss


OPERATOR.register(linear_cross_entropy)
