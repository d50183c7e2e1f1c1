"""The Triton attentions in every configuration that tuning may choose, tensor descriptors among them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import star_kernels
from star_kernels import dispatch
from star_kernels.launch import kernels
from tests.star_kernels.cases import Maker
from tests.star_kernels.cases.attention import differential, full
from tests.star_kernels.test_operators import error, run, widen

if "triton" not in dispatch.available("attention", torch.zeros(1)):
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

CALLS = {
    "attention": full(1, 150, 150, 1, 1, 16, 16),
    "diff_attention": differential(1, 150, 150, 1, 1, 16, 32),
}


def arguments_of(operator: str, **others: Any) -> dict[str, Any]:
    drawn = CALLS[operator](Maker())
    leaves = {name: tensor.float().requires_grad_() for name, tensor in drawn.items()}
    return {**leaves, **others}


def assert_agrees(operator: str, arguments: dict[str, Any]) -> None:
    wanted = run(operator, widen(arguments), "reference")
    for name, tensor in run(operator, arguments, "triton").items():
        assert error(tensor, wanted[name]) < 1e-5, name


@pytest.mark.parametrize("operator", CALLS)
def test_every_configuration_agrees_with_the_definition(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = [kernel for name, kernel in kernels().items() if name.startswith(operator)]
    assert len(mine) == 3
    for number in range(max(len(kernel.candidates) for kernel in mine)):
        for kernel in mine:
            candidate = kernel.candidates[number % len(kernel.candidates)]
            monkeypatch.setattr(kernel, "configuration", lambda *_, candidate=candidate: candidate)
        assert_agrees(operator, arguments_of(operator))


@pytest.mark.parametrize("operator", CALLS)
def test_the_scale_may_be_negative_or_zero(operator: str) -> None:
    assert_agrees(operator, arguments_of(operator, scale=-0.3))
    got = run(operator, arguments_of(operator, scale=0.0), "triton")
    wanted = run(operator, widen(arguments_of(operator, scale=0.0)), "reference")
    for name in wanted:
        assert torch.allclose(got[name].double(), wanted[name], atol=1e-5), name


def test_descriptors_take_only_what_the_copy_unit_can_read() -> None:
    blocks = importlib.import_module("star_kernels.attention.triton_blocks")
    whole = torch.zeros(2, 5, 3, 24)
    assert blocks.described(whole, whole[..., :16])
    assert not blocks.described(whole[..., 1:17])  # begins between two 16-byte boundaries
    assert not blocks.described(torch.zeros(2, 5, 3, 5))  # so do its rows
    assert not blocks.described(whole[:, :0])


def test_wide_heads_are_answered_elsewhere() -> None:
    q = torch.randn(1, 3, 1, 130)  # 520 bytes a row
    got = star_kernels.attention(q, q, q, backend="triton")
    torch.testing.assert_close(got, star_kernels.attention(q, q, q, backend="reference"))
