"""The structure that an operator genome names is the structure of the materialised operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from star import Genome, ModelConfig, build_model, pools
from star.genome import Gene
from star.pools import LivClass
from star_kernels.layers import LivLayer

CONFIG = ModelConfig(width=32, head_dim=8)
LENGTH = 20
BELOW = (slice(LENGTH // 2, None), slice(None, LENGTH // 2))
"""Rows and columns of the off-diagonal block, which is full."""

DIAGONAL, LOW_RANK, TOEPLITZ, SEMI_SEPARABLE = 1, 2, 3, 4
SOFTMAX = 2


def build(entry: LivClass) -> LivLayer:
    """One layer with weights away from their first values, in float64."""
    layer = build_model(Genome([Gene(entry.id)]), CONFIG, seed=entry.id, dtype=torch.float64).layers[0]
    generator = torch.Generator().manual_seed(entry.id)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer


def inputs() -> Tensor:
    return torch.randn(
        2, LENGTH, CONFIG.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


def apply(matrix: Tensor, values: Tensor) -> Tensor:
    """T applied to values (B, L, M) or (B, L, Hkv, Dh), as `LivLayer.materialize` says; (B, L, ...) flat."""
    if values.dim() == 3:
        return torch.einsum("bmij,bjm->bim", matrix, values)
    values = values.repeat_interleave(matrix.shape[1] // values.shape[2], dim=2)
    return torch.einsum("bhij,bjhc->bihc", matrix, values).flatten(2)


def numerical_rank(matrix: Tensor) -> int:
    """Largest rank of a batch of matrices."""
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9).max())


def classes(**wanted: object) -> list[LivClass]:
    return [
        entry
        for entry in pools.all_classes()
        if all(
            getattr(entry.operator, name, getattr(entry, name, None)) == value
            for name, value in wanted.items()
        )
    ]


def each(**wanted: object) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", classes(**wanted), ids=lambda entry: entry.name)


@each()
def test_applied_to_the_values_it_is_the_operator(entry: LivClass) -> None:
    layer, x = build(entry), inputs()
    features = layer.featurize(x)
    matrix = layer.materialize(x)
    assert matrix.shape[0] == 2
    assert matrix.shape[2:] == (LENGTH, LENGTH)
    y = apply(matrix, features[layer.values])
    torch.testing.assert_close(y, layer.operate(features), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.output(y), layer(x), rtol=1e-10, atol=1e-10)


@each()
def test_with_given_features(entry: LivClass) -> None:
    layer, x = build(entry), inputs()
    lent = layer.featurize(inputs().flip(1))
    given = {name: lent[name] for name in entry.shareable}
    features = layer.featurize(x, given=given)
    y = apply(layer.materialize(x, given), features[layer.values])
    torch.testing.assert_close(y, layer.operate(features), rtol=1e-10, atol=1e-10)


@each()
def test_causal(entry: LivClass) -> None:
    assert build(entry).materialize(inputs()).triu(1).abs().max() == 0


@each()
def test_varies_with_the_input(entry: LivClass) -> None:
    layer = build(entry)
    assert not torch.allclose(layer.materialize(inputs()), layer.materialize(inputs() + 1))


@each(token_mixing=DIAGONAL)
def test_diagonal(entry: LivClass) -> None:
    matrix = build(entry).materialize(inputs())
    assert torch.equal(matrix, torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)))


@each(nonlinearity=SOFTMAX, differential=False)
def test_rows_of_a_softmax(entry: LivClass) -> None:
    matrix = build(entry).materialize(inputs())
    assert (matrix.tril() >= 0).all()
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix.sum(-1)))


@each(nonlinearity=SOFTMAX, differential=True)
def test_rows_of_a_difference_of_softmaxes(entry: LivClass) -> None:
    layer = build(entry)
    matrix = layer.materialize(inputs())
    expected = (1 - layer.lam)[:, None].expand(matrix.shape[:-1])
    torch.testing.assert_close(matrix.sum(-1), expected)


@each(token_mixing=LOW_RANK, differential=False)
def test_low_rank_before_the_softmax(entry: LivClass) -> None:
    """log T = q·k plus one number a row: of rank Dh + 1 at most, where no key is hidden."""
    block = build(entry).materialize(inputs())[..., BELOW[0], BELOW[1]].log()
    assert numerical_rank(block) <= CONFIG.head_dim + 1 < LENGTH // 2
    assert numerical_rank(block) > CONFIG.head_dim - 1


@each(token_mixing=LOW_RANK, differential=True)
def test_differential_low_rank_before_the_softmax(entry: LivClass) -> None:
    """With λ at 0 only the first half is left: its scores have the rank of half a head."""
    layer = build(entry)
    with torch.no_grad():
        layer.lam.zero_()
    block = layer.materialize(inputs())[..., BELOW[0], BELOW[1]].log()
    assert numerical_rank(block) <= CONFIG.head_dim // 2 + 1


@each(token_mixing=LOW_RANK)
def test_heads_of_a_group_have_common_keys(entry: LivClass) -> None:
    """Query heads that one key serves differ, and as many keys are made as heads over the repeat factor."""
    layer, repeat = build(entry), entry.layer_arguments["kv_repeat"]
    features = layer.featurize(inputs())
    assert features["key"].shape[2] * repeat == features["query"].shape[2] == CONFIG.heads
    matrix = layer.materialize(inputs())
    assert not torch.allclose(matrix[:, 0], matrix[:, 1])


@each(token_mixing=TOEPLITZ, differential=False)
def test_toeplitz_after_dividing_by_the_gates(entry: LivClass) -> None:
    layer, x = build(entry), inputs()
    features = layer.featurize(x)
    gates = features["C"].mT[..., :, None] * features["B"].mT[..., None, :]
    kernel = layer.materialize(x) / gates
    torch.testing.assert_close(kernel[..., 1:, 1:], kernel[..., :-1, :-1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(kernel[0], kernel[1], rtol=1e-8, atol=1e-8)  # the same for every input


@each(token_mixing=TOEPLITZ, differential=True)
def test_difference_of_scaled_toeplitz_matrices(entry: LivClass) -> None:
    """With λ at 0, and with the first half's gate at 0, what is left is scaled Toeplitz."""
    layer, x = build(entry), inputs()
    features = layer.featurize(x)
    (b_a, b_b), (c_a, c_b) = (features[name].mT.chunk(2, dim=1) for name in ("B", "C"))
    with torch.no_grad():
        whole = layer.materialize(x)
        layer.lam.zero_()
        first = layer.materialize(x)
    second = first - whole
    for part, gates in (
        (first, c_a[..., None] * b_a[..., None, :]),
        (second, c_b[..., None] * b_b[..., None, :]),
    ):
        kernel = part / gates
        torch.testing.assert_close(kernel[..., 1:, 1:], kernel[..., :-1, :-1], rtol=1e-7, atol=1e-7)


def test_short_kernels_are_banded_and_long_ones_are_not() -> None:
    by_name = {entry.name: entry for entry in pools.all_classes()}
    for name in ("GConv-1", "GConv-1-Diff"):
        assert build(by_name[name]).materialize(inputs()).tril(-CONFIG.short_conv_kernel).abs().max() == 0
    for name in ("GConv-2", "GConv-2-Diff"):
        assert (build(by_name[name]).materialize(inputs())[..., -1, 0] != 0).all()


@each(token_mixing=SEMI_SEPARABLE)
def test_semi_separable(entry: LivClass) -> None:
    """Every block below the diagonal has at most the rank of the state, twice that for a difference."""
    layer = build(entry)
    matrix = layer.materialize(inputs())
    states = entry.layer_arguments["state_size"] * (2 if entry.differential else 1)
    for row in range(1, LENGTH):
        assert numerical_rank(matrix[..., row:, :row]) <= states
    if states < LENGTH // 2:
        assert numerical_rank(matrix[..., BELOW[0], BELOW[1]]) == states


@each(token_mixing=SEMI_SEPARABLE, differential=False)
def test_low_rank_where_nothing_decays(entry: LivClass) -> None:
    """Entries are products of the decays between two tokens: without any, C_i·B_j Δ_j is left."""
    layer = build(entry)
    with torch.no_grad():
        layer.A_log.fill_(-50.0)
    matrix = layer.materialize(inputs())
    strict = matrix[..., 1:, :-1]
    lower = torch.ones(strict.shape[-2:], dtype=torch.bool).tril()
    features = layer.featurize(inputs())
    step = torch.nn.functional.softplus(features["delta"] + layer.dt_proj.bias)
    gate = torch.nn.functional.silu(features["gate"])
    linear = torch.einsum("bin,bjn->bij", features["C"], features["B"])[:, None]
    expected = gate.mT[..., None] * linear * step.mT[..., None, :]
    torch.testing.assert_close(strict[..., lower], expected[..., 1:, :-1][..., lower], rtol=1e-8, atol=1e-8)
