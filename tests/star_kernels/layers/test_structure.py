"""Layers as matrices, their names in a state dict, and any lengths, batches and chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from star_kernels import layers
from star_kernels.layers import LivLayer
from tests.star_kernels.layers.test_layers import CASES, DIM, Case, close, each_layer, tokens

LENGTH = 8


def moved(case: Case) -> LivLayer:
    """The layer with weights away from their first values."""
    layer = case.make()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def applied(matrix: Tensor, values: Tensor) -> Tensor:
    """T applied to values (B, L, M) or (B, L, H, D), as `LivLayer.materialize` says; (B, L, ...) flat."""
    if values.dim() == 3:
        return torch.einsum("bmij,bjm->bim", matrix, values)
    values = values.repeat_interleave(matrix.shape[1] // values.shape[2], dim=2)
    return torch.einsum("bhij,bjhc->bihc", matrix, values).flatten(2)


# -------------------------------------------------------------------------------- materialize


@each_layer
def test_the_matrix_gives_what_the_operator_gives(case: Case) -> None:
    layer, x = moved(case), tokens(LENGTH)
    features = layer.featurize(x)
    matrix = layer.materialize(x)
    values = features[layer.values]
    if isinstance(layer, layers.GRUScan | layers.LSTMScan):
        values = layer.candidates(x)
    y = applied(matrix, values)
    if isinstance(layer, layers.GatedShortConv) and layer.bias:
        bias = layer.conv.bias
        assert bias is not None
        y = y + features["C"] * bias  # affine: T is the linear part
    assert close(y, layer.operate(features))
    assert close(layer.output(layer.finish(y, features)), layer(x))
    assert not matrix.triu(1).any()


@pytest.mark.parametrize(
    ("name", "rank"),
    [("gated_linear_attention", 4), ("mamba2", 4), ("gated_delta_net", 6), ("gru_scan", 1), ("lstm_scan", 1)],
)
def test_semi_separable(name: str, rank: int) -> None:
    """Every block below the diagonal has at most the rank of the state's keys, and some block has it."""
    x = tokens(16)
    matrix = moved(CASES[name]).materialize(x)
    ranks = [torch.linalg.matrix_rank(matrix[..., row:, :row], rtol=1e-9).max() for row in range(1, 16)]
    assert max(ranks) == rank


def test_the_delta_rule_rewrites() -> None:
    """The matrix of the delta rule by its definition: what each value leaves in the state, token by token."""
    layer, x = moved(CASES["gated_delta_net"]), tokens(LENGTH)
    f = layer.featurize(x)
    query, key = (f[name].repeat_interleave(2, dim=2) for name in ("query", "key"))
    expected = torch.zeros(2, 4, LENGTH, LENGTH, dtype=torch.float64)
    for source in range(LENGTH):
        state = torch.zeros(2, 4, 6, dtype=torch.float64)  # of a value 1 at ``source``, zeros elsewhere
        for t in range(source, LENGTH):
            state = state * f["decay"][:, t, :, None].exp()
            value = float(t == source)
            error = value - (state * key[:, t]).sum(-1, keepdim=True)
            state = state + f["beta"][:, t, :, None] * error * key[:, t]
            expected[:, :, t, source] = (state * query[:, t]).sum(-1) * 6**-0.5
    assert close(layer.materialize(x), expected)


def test_the_cells_matrices_depend_on_the_states() -> None:
    """They are no linear operators: scaling the candidates' inputs changes the matrix."""
    for name in ("gru_scan", "lstm_scan"):
        layer, x = moved(CASES[name]), tokens(LENGTH)
        lent = layer.featurize(x)
        changed = {**lent, "candidate": 2 * lent["candidate"]}
        assert not close(layer.materialize(x, changed), layer.materialize(x, lent), 1e-6)


def test_a_norm_as_a_matrix() -> None:
    norm, x = layers.RMSNorm(DIM, dtype=torch.float64), tokens(LENGTH)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    assert close(norm.weight * (norm.materialize(x)[:, 0] @ x), norm(x))
    cache = norm.allocate_cache(2, LENGTH, torch.bfloat16, "cpu")
    assert torch.equal(torch.cat([norm(part, cache) for part in x.split(3, dim=1)], dim=1), norm(x))
    assert (cache.position, cache.nbytes) == (LENGTH, 0)
    with pytest.raises(ValueError, match="room for 8 tokens and holds 8"):
        norm(x, cache)
    with pytest.raises(TypeError, match="RMSNorm: cache is Tensor"):
        norm(x, x)


# -------------------------------------------------------------------------------- names


NAMES = {
    "attention": "q_proj.weight k_proj.weight v_proj.weight o_proj.weight",
    "attention_convolved": "q_proj.weight k_proj.weight v_proj.weight o_proj.weight "
    "q_conv1d.weight k_conv1d.weight v_conv1d.weight",
    "diff_attention": "q_proj.weight k_proj.weight v_proj.weight o_proj.weight "
    "lambda_q1 lambda_k1 lambda_q2 lambda_k2 subln.weight",
    "diff_attention_bare_grouped_convolved": "q_proj.weight k_proj.weight v_proj.weight o_proj.weight "
    "q_conv1d.weight k_conv1d.weight v_conv1d.weight lam",
    "selective_ssm": "in_proj.weight conv1d.weight conv1d.bias x_proj.weight dt_proj.weight dt_proj.bias "
    "A_log D out_proj.weight",
    "gated_short_conv": "in_proj.weight conv.weight out_proj.weight",
    "gated_long_conv": "in_proj.weight filter_fn.first.weight filter_fn.first.bias filter_fn.second.weight "
    "filter_fn.second.bias filter_fn.last.weight filter_fn.log_decay D out_proj.weight",
    "swiglu": "gate_proj.weight up_proj.weight down_proj.weight",
    "gated_linear_attention": "q_proj.weight k_proj.weight v_proj.weight g_proj.weight gk_proj.0.weight "
    "gk_proj.1.weight gk_proj.1.bias g_norm_swish_gate.weight o_proj.weight",
    "mamba2_grouped": "in_proj.weight conv1d.weight dt_bias A_log D norm.weight out_proj.weight",
    "gated_delta_net": "in_proj_qkvz.weight in_proj_ba.weight conv1d.weight dt_bias A_log norm.weight "
    "out_proj.weight",
    "gru_scan": "in_proj.weight conv1d.weight conv1d.bias A B b norm.weight out_proj.weight",
    "lstm_scan": "in_proj.weight conv1d.weight conv1d.bias A B b norm.weight out_proj.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_family(name: str) -> None:
    layer = CASES[name].make()
    assert sorted(layer.state_dict()) == sorted(NAMES[name].split())
    assert sorted(name for name, _ in layer.named_parameters()) == sorted(NAMES[name].split())


# -------------------------------------------------------------------------------- shapes


@given(
    name=st.sampled_from(sorted(CASES)),
    batch=st.integers(1, 4),
    pieces=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    cache_dtype=st.sampled_from([None, torch.bfloat16]),
)
@settings(max_examples=120)
def test_any_chunks_of_any_batch(
    name: str, batch: int, pieces: list[int], cache_dtype: torch.dtype | None
) -> None:
    layer = CASES[name].make(dtype=torch.float32)
    length = sum(pieces)
    x = torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(length))
    cache = layer.allocate_cache(batch, max(1, length), cache_dtype)
    y = torch.cat([layer(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
    expected = layer(x)
    assert y.shape == expected.shape == x.shape
    assert cache.position == length
    assert close(y, expected, 1e-5 if cache_dtype is None else 3e-2)


@given(
    key_heads=st.integers(1, 3),
    each=st.integers(1, 3),
    key_width=st.integers(1, 5),
    value_width=st.integers(1, 5),
    kernel=st.integers(1, 5),
)
@settings(max_examples=25)
def test_any_sizes_of_the_delta_rule(
    key_heads: int, each: int, key_width: int, value_width: int, kernel: int
) -> None:
    sizes: dict[str, Any] = {"key_head_dim": key_width, "value_head_dim": value_width, "conv_kernel": kernel}
    torch.manual_seed(0)
    layer = layers.GatedDeltaNet(7, key_heads, each * key_heads, **sizes, dtype=torch.float64)
    x = torch.randn(1, 6, 7, dtype=torch.float64)
    cache = layer.allocate_cache(1, 6)
    y = torch.cat([layer(token, cache) for token in x.split(1, dim=1)], dim=1)
    assert close(y, layer(x))


@pytest.mark.parametrize(
    "name", ["gated_linear_attention", "mamba2_grouped", "gated_delta_net", "gru_scan", "lstm_scan"]
)
def test_compiles_in_one_graph(name: str) -> None:
    """With torch.compile, gradients included. (The layers of genomes: tests/star/test_model.py.)"""
    torch._dynamo.reset()
    layer = CASES[name].make(dtype=torch.float32)
    x = tokens(LENGTH, torch.float32)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert close(y, layer(x), 1e-6)
    assert all(parameter.grad is not None for parameter in layer.parameters())


# -------------------------------------------------------------------------------- initial values


def test_memories_of_the_cells() -> None:
    """Without inputs, a channel keeps 1 - 1/τ of its state, τ from 2 to 512 tokens."""
    for layer, sign in ((layers.GRUScan(64), -1), (layers.LSTMScan(64), 1)):
        kept = torch.sigmoid(sign * layer.b[0])
        assert torch.allclose(1 / (1 - kept[[0, -1]]), torch.tensor([2.0, 512.0]), rtol=1e-3)
        assert not layer.b[1:].any()
        assert layer.A.abs().max() < 0.5


def test_decays_of_linear_attention() -> None:
    layer = layers.GatedLinearAttention(64, 4)
    decay = layer.featurize(torch.randn(4, 16, 64))["decay"].exp()
    assert 0.9 < decay.mean() < 0.99
    assert layers.Mamba2(64).A_log.exp().min() >= 1
    assert layers.GatedDeltaNet(64, 2).A_log.exp().max() <= 16
