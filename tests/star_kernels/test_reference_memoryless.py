"""The gated linear unit's reference against literal loops of its equation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import star_kernels as sk

torch.set_num_threads(1)

BY_HAND: dict[str, Callable[[float], float]] = {
    "silu": lambda z: z / (1 + math.exp(-z)),
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: max(z, 0.0),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
}


@pytest.mark.parametrize("activation", BY_HAND)
def test_glu_is_its_equation(activation: str) -> None:
    gate, up = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    values = [
        BY_HAND[activation](g) * u
        for g, u in zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True)
    ]
    expected = torch.tensor(values, dtype=torch.float64).reshape(3, 5)
    torch.testing.assert_close(sk.glu(gate, up, activation), expected)


def test_silu_is_the_default() -> None:
    gate, up = torch.randn(2, 4, 7)
    assert torch.equal(sk.glu(gate, up), sk.glu(gate, up, "silu"))


@pytest.mark.parametrize("activation", [name for name in BY_HAND if name != "relu"])
def test_derivatives_are_right(activation: str) -> None:
    gate, up = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: sk.glu(g, u, activation), (gate, up))


def test_glu_refuses() -> None:
    gate = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"glu: up has shape \(3, 2\); it takes gate's, \(2, 3\)"):
        sk.glu(gate, gate.T)
    with pytest.raises(TypeError, match=r"glu: up has dtype .*float16; it takes gate's, .*float32"):
        sk.glu(gate, gate.half())
    with pytest.raises(ValueError, match="glu: activation is 'swish'; it takes 'silu' or"):
        sk.glu(gate, gate, "swish")
    with pytest.raises(TypeError, match="glu: gate is NoneType; it takes a tensor"):
        sk.glu(None, gate)
