"""The fused loss's reference against literal loops of its equation, and against PyTorch's cross_entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import star_kernels as sk
from star_kernels import dispatch
from star_kernels.loss import reference

torch.set_num_threads(1)


def tensors(rows: int = 9, width: int = 4, classes: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(classes, width, dtype=torch.float64, generator=generator)
    targets = torch.randint(classes, (rows,), generator=generator)
    targets[1::4] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


def composed(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.T, targets.long())


def test_loss_is_its_equation() -> None:
    x, weight, targets = tensors()
    losses = []
    for row, target in enumerate(targets.tolist()):
        if target != -100:
            logits = [(x[row] @ weight[v]).item() for v in range(6)]
            losses.append(math.log(sum(map(math.exp, logits))) - logits[target])
    assert math.isclose(sk.linear_cross_entropy(x, weight, targets).item(), sum(losses) / len(losses))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rows", [1, 5, 9])
def test_chunks_make_no_difference(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "rows_per_chunk", lambda *sizes: 2)
    x, weight, targets = tensors(rows)
    actual = sk.linear_cross_entropy(x, weight, targets.to(dtype))
    expected = composed(x, weight, targets)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * actual, (x, weight)), torch.autograd.grad(3 * expected, (x, weight))
    )


@pytest.mark.parametrize("backend", dispatch.available("linear_cross_entropy", torch.zeros(1)))
def test_loss_scaling_saves_gradients_of_float16(backend: str) -> None:
    """Gradients of 1e-6 are all but lost in float16 where the loss's scale comes later."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator).half().requires_grad_()
    weight = 3e-4 * torch.randn(5, 8, generator=generator)
    targets = torch.randint(5, (300,), generator=generator)
    (got,) = torch.autograd.grad(65536 * sk.linear_cross_entropy(x, weight, targets, backend=backend), x)
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(65536 * composed(wide, weight.double(), targets), wide)
    assert got.dtype == torch.float16
    assert (got.double() - wanted).norm() < 2e-3 * wanted.norm()


def test_evaluation_takes_no_gradients() -> None:
    x, weight, targets = tensors()
    shares = []

    def spy(logits: Tensor, of: Tensor, ignore_index: int, share: Tensor | None) -> tuple[Tensor, Tensor]:
        shares.append(share)
        return reference.rows_loss(logits, of, ignore_index, share)

    with torch.no_grad():
        quiet = reference.fused_loss(x, weight, targets, -100, spy)
    loud = reference.fused_loss(x, weight, targets, -100, spy)
    assert [share is None for share in shares] == [True, False]
    assert torch.equal(quiet, loud)


def test_derivatives_are_right_and_first_only() -> None:
    x, weight, targets = tensors()
    assert torch.autograd.gradcheck(lambda *t: sk.linear_cross_entropy(*t, targets), (x, weight))
    (grad,) = torch.autograd.grad(sk.linear_cross_entropy(x, weight, targets), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.square().sum().backward()


@pytest.mark.parametrize("rows", [0, 3])
def test_without_rows_the_loss_is_nan_and_gradients_are_zero(rows: int) -> None:
    x, weight, _ = tensors(rows)
    loss = sk.linear_cross_entropy(x, weight, torch.full((rows,), 7), ignore_index=7)
    loss.backward()
    assert loss.isnan()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_half_precision_gives_a_float32_loss() -> None:
    x, weight, targets = tensors()
    loss = sk.linear_cross_entropy(x.detach().bfloat16(), weight.detach().float(), targets)
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        cast = sk.linear_cross_entropy(x.detach().float(), weight.detach().float(), targets)
    assert torch.equal(loss, cast)


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(2**20, 64, 256), (4096, 768, 128_000), (10, 8, 0)]
)
def test_a_chunk_is_small(rows: int, width: int, vocabulary: int) -> None:
    chunk = reference.rows_per_chunk(rows, width, vocabulary)
    assert chunk >= 128
    assert chunk * vocabulary <= max(2**20, 128 * vocabulary, rows * width + vocabulary)


def test_loss_refuses() -> None:
    x, weight, targets = tensors()
    with pytest.raises(ValueError, match="targets holds 6; it takes 0 to 5 or ignore_index = -100"):
        sk.linear_cross_entropy(x, weight, targets.masked_fill(targets == -100, 6))
    with pytest.raises(TypeError, match=r"targets has dtype torch\.float64; it takes int64 or int32"):
        sk.linear_cross_entropy(x, weight, targets.double())
    with pytest.raises(ValueError, match=r"weight has shape \(6, 3\); it takes \(V, D\) with D = 4 from x"):
        sk.linear_cross_entropy(x, weight[:, :3], targets)
    with pytest.raises(TypeError, match="ignore_index is None"):
        sk.linear_cross_entropy(x, weight, targets, ignore_index=None)


class LargestResult(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("backend", dispatch.available("linear_cross_entropy", torch.zeros(1)))
def test_all_logits_are_never_there_at_once(backend: str) -> None:
    # Triton's interpreter takes seconds for what the others do in no time.
    rows, width, classes = (256, 16, 1024) if backend == "triton" else (1024, 64, 4096)
    x = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(classes, width, requires_grad=True)
    targets = torch.randint(classes, (rows,))
    with LargestResult() as largest:
        sk.linear_cross_entropy(x, weight, targets, backend=backend).backward()
    assert largest.elements <= rows * classes // 4
