"""The references of the norm and of rotary embedding against literal loops of their equations in float64."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import star_kernels as sk

torch.set_num_threads(1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def angles(length: int, half: int) -> Tensor:
    return torch.outer(torch.arange(length, dtype=torch.float64), 100.0 ** -(torch.arange(half) / half))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_is_its_equation(eps: float) -> None:
    x, weight = draw(3, 5), draw(5)
    expected = torch.empty_like(x)
    for row in range(3):
        mean_square = sum(value**2 for value in x[row].tolist()) / 5
        for column in range(5):
            expected[row, column] = x[row, column] / math.sqrt(mean_square + eps) * weight[column]
    torch.testing.assert_close(sk.rms_norm(x, weight, eps), expected)
    torch.testing.assert_close(sk.rms_norm(x, weight, eps), F.rms_norm(x, (5,), weight, eps))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_with_a_residual_returns_the_sum_as_well(dtype: torch.dtype) -> None:
    x, residual, weight = draw(2, 3, 5).to(dtype), draw(2, 3, 5).flip(0).to(dtype), draw(5).to(dtype)
    y, total = sk.rms_norm(x, weight, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, sk.rms_norm(total, weight))
    assert y.dtype == total.dtype == dtype


def test_rope_turns_each_pair_by_its_angle() -> None:
    x, angle = draw(2, 3, 2, 8), angles(3, 4)
    y = sk.rope(x, angle.cos(), angle.sin())
    for b, t, h, pair in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 2, 4))).tolist():
        turned = complex(x[b, t, h, pair], x[b, t, h, pair + 4]) * cmath.exp(1j * float(angle[t, pair]))
        assert cmath.isclose(turned, complex(y[b, t, h, pair], y[b, t, h, pair + 4]), abs_tol=1e-12)


def test_rope_agrees_with_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, angle = draw(2, 5, 3, 8), angles(5, 4)
    doubled = torch.cat([angle, angle], dim=-1)[None]
    expected, _ = llama.apply_rotary_pos_emb(x, x, doubled.cos(), doubled.sin(), unsqueeze_dim=2)
    torch.testing.assert_close(sk.rope(x, angle.cos(), angle.sin()), expected)


def test_derivatives_are_right() -> None:
    x, weight, residual = (t.requires_grad_() for t in (draw(2, 3, 4), draw(4), draw(2, 3, 4) + 1))
    assert torch.autograd.gradcheck(sk.rms_norm, (x, weight))
    assert torch.autograd.gradcheck(lambda *t: sk.rms_norm(*t[:2], residual=t[2]), (x, weight, residual))
    heads, cos, sin = (t.requires_grad_() for t in (draw(2, 3, 2, 4), draw(3, 2), draw(3, 2) + 1))
    assert torch.autograd.gradcheck(sk.rope, (heads, cos, sin))


def test_autocast_takes_the_wider_of_x_and_residual() -> None:
    x, residual, weight = draw(2, 4).bfloat16(), draw(2, 4).float(), draw(4).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, total = sk.rms_norm(x, weight, residual=residual)
    assert y.dtype == total.dtype == torch.float32
    with pytest.raises(TypeError, match=r"rms_norm: residual has dtype torch\.float32"):
        sk.rms_norm(x, weight, residual=residual)


def test_norm_family_refuses() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\); it takes \(D,\) with D = 4 from x"):
        sk.rms_norm(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"rms_norm: eps is -1.0; it takes a number of at least 0"):
        sk.rms_norm(x, torch.zeros(4), -1.0)
    with pytest.raises(ValueError, match=r"rms_norm: residual has shape \(3, 4\); it takes x's, \(2, 3, 4\)"):
        sk.rms_norm(x, torch.zeros(4), residual=x[0])
    with pytest.raises(ValueError, match="rope: x has Dh = 3; it takes an even one"):
        sk.rope(torch.zeros(2, 3, 4, 3), x, x)
    with pytest.raises(ValueError, match=r"rope: sin has shape \(2, 2\); it takes \(L, Dh/2\)"):
        sk.rope(torch.zeros(2, 3, 4, 4), torch.zeros(3, 2), torch.zeros(2, 2))
