"""On a GPU: the head widths that models have, in every configuration that tables and tuning may choose; and
what Triton's interpreter computes otherwise than a GPU.

The rows of the operator tests are small, and get what ships for small heads: no tensor descriptors among it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import star_kernels
from star_kernels.launch import kernels
from tests.star_kernels.cases import Maker, offsets
from tests.star_kernels.cases.attention import differential, full
from tests.star_kernels.test_operators import error, run, widen

pytestmark = pytest.mark.gpu

WIDTHS = (64, 128)
MOST_CANDIDATES = 8
CALLS = {
    "attention": lambda width: full(2, 300, 300, 4, 2, width, width),
    "diff_attention": lambda width: differential(2, 300, 300, 4, 2, width, width),
}


def arguments_of(make: Any, **others: Any) -> dict[str, Any]:
    drawn = make(Maker())
    return {name: tensor.cuda().bfloat16().requires_grad_() for name, tensor in drawn.items()} | others


def assert_agrees(operator: str, arguments: dict[str, Any]) -> None:
    """As the operator tests: 1e-2, or twice what the definition itself loses in bfloat16."""
    wanted = run(operator, widen(arguments), "reference")
    lost = run(operator, arguments, "reference")
    for name, tensor in run(operator, arguments, "triton").items():
        allowed = max(1e-2, min(2 * error(lost[name], wanted[name]), 5e-2))
        assert error(tensor, wanted[name]) < allowed, name


@pytest.mark.parametrize("number", range(MOST_CANDIDATES))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("operator", CALLS)
def test_every_configuration_of_wide_heads(
    operator: str, width: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import OutOfResources

    mine = [kernel for name, kernel in kernels().items() if name.startswith(operator)]
    assert len(mine) == 3
    assert all(len(kernel.candidates) <= MOST_CANDIDATES for kernel in mine)
    for kernel in mine:
        candidate = kernel.candidates[number % len(kernel.candidates)]
        monkeypatch.setattr(kernel, "configuration", lambda *_, candidate=candidate: candidate)
    try:
        assert_agrees(operator, arguments_of(CALLS[operator](width)))
    except OutOfResources as refusal:
        pytest.skip(f"this GPU refuses a configuration: {refusal}")


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"causal": False}], ids=["causal", "window", "all"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("operator", CALLS)
def test_what_ships_for_wide_heads(operator: str, width: int, options: dict[str, Any]) -> None:
    assert_agrees(operator, arguments_of(CALLS[operator](width), **options))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("operator", ["gated_linear_attention", "gated_delta_rule"])
def test_what_ships_for_wide_matrix_states(operator: str, width: int, packed: bool) -> None:
    draw = Maker()
    shape = (1, 300, 4)
    drawn = {
        "q": draw.normal(*shape, width),
        "k": draw.unit(*shape, width),
        "v": draw.normal(*shape, width),
        "log_decay": draw.uniform(*shape, low=-0.1, high=-0.001),
    }
    if operator == "gated_delta_rule":
        drawn["beta"] = draw.uniform(*shape)
    others = {"cu_seqlens": offsets(0, 111, 300).cuda()} if packed else {}
    assert_agrees(operator, arguments_of(lambda _: drawn, **others))


def test_a_row_that_is_no_number_has_no_finite_loss_gradient() -> None:
    """A GPU's minimum of NaN and 0 is 0, and the interpreter's NaN: nobody would see a row overflow."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, generator=generator)
    x[1, 5] = torch.inf
    x = x.cuda().requires_grad_()
    weight = torch.randn(50, 32, generator=generator).cuda()
    target = torch.tensor([4, 7, 49]).cuda()
    loss = star_kernels.linear_cross_entropy(x, weight, target, backend="triton")
    (gradient,) = torch.autograd.grad(loss, x)
    assert not loss.isfinite()
    assert not gradient[1].isfinite().any()
    assert gradient[[0, 2]].isfinite().all()


def test_a_gate_that_is_no_number_stays_none() -> None:
    gate = torch.tensor([[torch.nan, -1.0, 2.0]]).cuda()
    y = star_kernels.glu(gate, torch.ones_like(gate), activation="relu", backend="triton").cpu()
    torch.testing.assert_close(y, torch.tensor([[torch.nan, 0.0, 2.0]]), equal_nan=True)


def test_heads_that_lie_further_apart_than_32_bits_count() -> None:
    """rope of the view that a (B, H, L, Dh) tensor gives; 4.5 GB."""
    length, heads, width = 550_000, 32, 128
    if torch.cuda.mem_get_info()[0] < 12 * length * heads * width:
        pytest.skip("needs 28 GB of free GPU memory")
    x = torch.empty(1, heads, length, width, dtype=torch.bfloat16, device="cuda").normal_().transpose(1, 2)
    angle = torch.rand(length, width // 2, device="cuda")
    y = star_kernels.rope(x, angle.cos(), angle.sin(), backend="triton")
    last = x[:, -3:, -1:].contiguous()
    wanted = star_kernels.rope(last, angle[-3:].cos(), angle[-3:].sin(), backend="reference")
    torch.testing.assert_close(y[:, -3:, -1:], wanted, rtol=2e-2, atol=2e-2)
