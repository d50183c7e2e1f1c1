"""Every layer: parallel form against decoding, sharing, caches, dtypes, errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels import layers
from star_kernels.layers import LivLayer
from star_kernels.layers.projection import GroupProjection

DIM = 32
MAX_LENGTH = 8


@dataclass(frozen=True)
class Case:
    """One layer, what its cache holds (name -> shape after the batch), and which groups can be given."""

    layer: Any
    cache: Mapping[str, tuple[int, ...]]
    shareable: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)

    def make(self, **others: Any) -> LivLayer:
        torch.manual_seed(0)
        return self.layer(DIM, **{"dtype": torch.float64, **self.arguments, **others})


KEY_VALUE = {"key": (MAX_LENGTH, 4, 8), "value": (MAX_LENGTH, 4, 8)}
GROUPED = {"key": (MAX_LENGTH, 1, 8), "value": (MAX_LENGTH, 1, 8)}
HISTORY = (MAX_LENGTH, DIM)
CASES = {
    "attention": Case(layers.Attention, KEY_VALUE, ("key", "value"), {"heads": 4}),
    "attention_grouped": Case(layers.Attention, GROUPED, ("key", "value"), {"heads": 4, "kv_repeat": 4}),
    "attention_convolved": Case(
        layers.Attention,
        KEY_VALUE | {"tail": (2, 3 * DIM)},
        ("key", "value"),
        {"heads": 4, "short_conv": True},
    ),
    "attention_with_everything": Case(
        layers.Attention,
        {"key": (MAX_LENGTH, 2, 6), "value": (MAX_LENGTH, 2, 6), "tail": (2, 48)},
        ("key", "value"),
        {
            "heads": 4,
            "kv_repeat": 2,
            "head_dim": 6,
            "bias": True,
            "qk_norm": True,
            "short_conv": True,
            "rotary": layers.Rotary(frequencies=(1.0, 0.3, 0.02), scale=1.1),
        },
    ),
    "diff_attention": Case(layers.DiffAttention, KEY_VALUE, ("key", "value"), {"heads": 4}),
    "diff_attention_bare_grouped_convolved": Case(
        layers.DiffAttention,
        GROUPED | {"tail": (3, 48)},
        ("key", "value"),
        {"heads": 4, "kv_repeat": 4, "bare": True, "short_conv": True, "kernel_size": 4},
    ),
    "selective_ssm_expanded": Case(
        layers.SelectiveSSM,
        {"tail": (3, 48), "state": (48, 4)},
        ("B", "C"),
        {"state_size": 4, "inner": 48, "conv_bias": False, "bias": True, "dt_rank": 3},
    ),
    "selective_ssm": Case(layers.SelectiveSSM, {"tail": (3, DIM), "state": (DIM, 16)}, ("B", "C")),
    "diff_selective_ssm": Case(
        layers.DiffSelectiveSSM,
        {"tail": (1, DIM), "state_a": (DIM, 2), "state_b": (DIM, 2)},
        ("B", "C"),
        {"state_size": 2, "conv_kernel": 2},
    ),
    "gated_short_conv": Case(layers.GatedShortConv, {"tail": (2, DIM)}, ("B", "C", "value")),
    "one_tap": Case(layers.GatedShortConv, {"tail": (0, DIM)}, ("B", "C", "value"), {"kernel_size": 1}),
    "diff_gated_short_conv": Case(
        layers.DiffGatedShortConv, {"tail_a": (2, DIM), "tail_b": (2, DIM)}, ("B", "C", "value")
    ),
    "gated_long_conv": Case(layers.GatedLongConv, {"history": HISTORY}, ("B", "C", "value")),
    "diff_gated_long_conv": Case(
        layers.DiffGatedLongConv, {"history_a": HISTORY, "history_b": HISTORY}, ("B", "C", "value")
    ),
    "gated_short_conv_biased": Case(
        layers.GatedShortConv, {"tail": (2, DIM)}, ("B", "C", "value"), {"bias": True}
    ),
    "swiglu": Case(layers.SwiGLU, {}, ("gate", "up")),
    "gated_linear_attention": Case(
        layers.GatedLinearAttention, {"state": (4, 4, 8)}, (), {"heads": 4, "gate_rank": 3}
    ),
    "mamba2": Case(
        layers.Mamba2,
        {"tail": (3, 64 + 2 * 4), "state": (8, 4, 8)},
        (),
        {"state_size": 4, "head_dim": 8, "bias": True},
    ),
    "mamba2_grouped": Case(
        layers.Mamba2,
        {"tail": (2, 48 + 2 * 3 * 5), "state": (6, 5, 8)},
        (),
        {"state_size": 5, "inner": 48, "head_dim": 8, "n_groups": 3, "conv_kernel": 3, "conv_bias": False}
        | {"dt_limit": (0.01, 0.05)},
    ),
    "gated_delta_net": Case(
        layers.GatedDeltaNet,
        {"tail": (3, 2 * 2 * 6 + 4 * 5), "state": (4, 6, 5)},
        (),
        {"key_heads": 2, "value_heads": 4, "key_head_dim": 6, "value_head_dim": 5},
    ),
    "gru_scan": Case(layers.GRUScan, {"tail": (3, DIM), "state": (DIM,)}, ()),
    "gru_scan_blocks": Case(
        layers.GRUScan, {"tail": (1, 48), "state": (48,)}, (), {"inner": 48, "blocks": 4, "conv_kernel": 2}
    ),
    "lstm_scan": Case(
        layers.LSTMScan, {"tail": (3, DIM), "cell": (DIM,), "state": (DIM,)}, (), {"blocks": 2}
    ),
}
STATES = ("state", "state_a", "state_b", "cell")

each_layer = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def tokens(length: int = MAX_LENGTH, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, DIM, dtype=dtype, generator=torch.Generator().manual_seed(length))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((actual - expected).norm() <= tolerance * (1 + expected.norm()))


# -------------------------------------------------------------------------------- forward and cache


@each_layer
@pytest.mark.parametrize("pieces", [[1] * 8, [8], [5, 3], [3, 1, 1, 3], [1, 7]], ids=str)
def test_cached_calls_equal_the_parallel_form(case: Case, pieces: list[int]) -> None:
    layer, x = case.make(), tokens()
    cache = layer.allocate_cache(2, MAX_LENGTH)
    y = torch.cat([layer(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
    assert y.shape == x.shape
    assert cache.position == MAX_LENGTH
    assert close(y, layer(x))


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cached_calls_in_the_kernels_dtypes(case: Case, dtype: torch.dtype) -> None:
    layer, x = case.make(dtype=dtype), tokens(dtype=dtype)
    cache = layer.allocate_cache(2, MAX_LENGTH)
    y = torch.cat([layer(piece, cache) for piece in x.split([4, 1, 1, 2], dim=1)], dim=1)
    expected = copy.deepcopy(layer).double()(x.double())
    assert y.dtype == dtype
    assert close(y.double(), expected, 1e-5 if dtype == torch.float32 else 5e-2)
    assert close(layer(x).double(), expected, 1e-5 if dtype == torch.float32 else 5e-2)


@each_layer
def test_half_precision_cache_under_float32_weights(case: Case) -> None:
    layer, x = case.make(dtype=torch.float32), tokens(dtype=torch.float32)
    cache = layer.allocate_cache(2, MAX_LENGTH, torch.bfloat16)
    y = torch.cat([layer(piece, cache) for piece in x.split([4, 1, 1, 2], dim=1)], dim=1)
    assert y.dtype == torch.float32
    assert close(y, layer(x), 2e-2)


@each_layer
def test_cache_holds_what_is_documented(case: Case) -> None:
    cache = case.make(dtype=torch.float32).allocate_cache(3, MAX_LENGTH, torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in cache.tensors.items()} == {
        name: (3, *shape) for name, shape in case.cache.items()
    }
    for name, tensor in cache.tensors.items():
        assert tensor.dtype == (torch.float32 if name in STATES else torch.bfloat16)
        assert not tensor.any()


@each_layer
def test_decoding_keeps_its_tensors(case: Case) -> None:
    layer, x = case.make(), tokens()
    cache = layer.allocate_cache(2, MAX_LENGTH)
    layer(x[:, :2], cache)
    layer(x[:, 2:3], cache)
    before = {name: tensor.data_ptr() for name, tensor in (cache.tensors | cache.derived).items()}
    for t in range(3, MAX_LENGTH):
        layer(x[:, t : t + 1], cache)
    assert before == {name: tensor.data_ptr() for name, tensor in (cache.tensors | cache.derived).items()}


@each_layer
def test_reset_forgets(case: Case) -> None:
    layer, x = case.make(), tokens()
    cache = layer.allocate_cache(2, MAX_LENGTH)
    first = layer(x[:, :3], cache)
    layer(x[:, 3:], cache)
    cache.reset()
    assert torch.equal(layer(x[:, :3], cache), first)


@each_layer
def test_cache_without_room(case: Case) -> None:
    layer, x = case.make(), tokens()
    cache = layer.allocate_cache(2, 4)
    layer(x[:, :3], cache)
    with pytest.raises(ValueError, match=r"room for 4 tokens and holds 3; it takes at most 1 more, got 2"):
        layer(x[:, :2], cache)
    assert cache.position == 3


@each_layer
def test_causal(case: Case) -> None:
    layer, x = case.make(), tokens()
    changed = x.clone()
    changed[:, 5:] += 1
    y, z = layer(x), layer(changed)
    assert close(y[:, :5], z[:, :5])
    assert not close(y[:, 5:], z[:, 5:], 1e-3)


@each_layer
@pytest.mark.parametrize("shape", [(2, 0, DIM), (0, 3, DIM), (1, 1, DIM)], ids=str)
def test_small_inputs(case: Case, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.float64)
    assert case.make()(x).shape == shape
    assert case.make(dtype=torch.float32)(x.float()).shape == shape


# -------------------------------------------------------------------------------- training


@each_layer
def test_every_parameter_has_a_gradient(case: Case) -> None:
    layer = case.make()
    layer(tokens()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@each_layer
def test_autocast(case: Case) -> None:
    layer, x = case.make(dtype=torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert close(y.float(), layer(x), 5e-2)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@each_layer
def test_no_gradients_with_a_cache(case: Case) -> None:
    layer, x = case.make(), tokens().requires_grad_()
    assert not layer(x, layer.allocate_cache(2, MAX_LENGTH)).requires_grad


@each_layer
def test_state_dict_and_copies(case: Case) -> None:
    layer, x = case.make(), tokens()
    other = case.layer(DIM, dtype=torch.float64, **case.arguments)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@each_layer
def test_meta_device(case: Case) -> None:
    layer = case.make(device="meta")
    assert layer(tokens().to("meta")).shape == (2, MAX_LENGTH, DIM)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert all(tensor.is_meta for tensor in layer.allocate_cache(2, MAX_LENGTH).tensors.values())


# -------------------------------------------------------------------------------- sharing


@each_layer
def test_shared_featurizer_is_the_very_module(case: Case) -> None:
    owner = case.make()
    user = case.make(featurizer=owner)
    assert user.featurizer is owner is owner.featurizer
    own, whole = user.state_dict(), owner.state_dict()
    assert set(own) < set(whole)
    user.load_state_dict({name: whole[name] for name in own})
    assert torch.equal(user(tokens()), owner(tokens()))
    cache, other = user.allocate_cache(2, MAX_LENGTH), owner.allocate_cache(2, MAX_LENGTH)
    for piece in tokens().split([5, 1, 2], dim=1):
        assert torch.equal(user(piece, cache), owner(piece, other))


def test_a_featurizer_of_another_class() -> None:
    with pytest.raises(ValueError, match="featurizer is a SwiGLU; it takes None or another GatedShortConv"):
        layers.GatedShortConv(DIM, featurizer=layers.SwiGLU(DIM))


@each_layer
def test_given_features_are_used_as_they_are(case: Case) -> None:
    """For every choice of groups, a layer without their weights computes what one with all of them does."""
    whole, x, other = case.make(), tokens(), tokens(MAX_LENGTH + 1)[:, 1:]
    lent = whole.featurize(other)
    for choice in range(1, 1 << len(case.shareable)):
        names = tuple(name for bit, name in enumerate(case.shareable) if choice >> bit & 1)
        given = {name: lent[name] for name in names}
        expected, features = whole(x, None, given, return_features=True)
        assert all(features[name] is given[name] for name in names)
        part = case.make(groups=tuple(name for name in whole.groups if name not in names))
        copy_rows(whole, part)
        assert close(part(x, None, given), expected)
        cache = part.allocate_cache(2, MAX_LENGTH, shared=names)
        pieces = [
            part(x[:, t : t + 2], cache, {name: tensor[:, t : t + 2] for name, tensor in given.items()})
            for t in range(0, MAX_LENGTH, 2)
        ]
        assert close(torch.cat(pieces, dim=1), expected)


def copy_rows(whole: LivLayer, part: LivLayer) -> None:
    """Gives ``part``, which makes fewer groups, the weights of ``whole``."""
    state = {name: tensor for name, tensor in whole.state_dict().items() if name in part.state_dict()}
    for path, target in part.named_children():
        if isinstance(target, GroupProjection):
            source = getattr(whole, path)
            rows = torch.cat([torch.arange(source.out_features)[source.rows([n])] for n in target.widths])
            for name, tensor in source.named_parameters():
                state[f"{path}.{name}"] = tensor[rows]
    part.load_state_dict(state)


@each_layer
def test_groups_that_nobody_makes(case: Case) -> None:
    with pytest.raises(ValueError, match="given has 'sugar'; it takes groups out of"):
        case.make()(tokens(), None, {"sugar": tokens()})
    for own in case.make().own_groups:
        with pytest.raises(ValueError, match=f"given has '{own}'; it takes groups out of"):
            case.make()(tokens(), None, {own: tokens()})
    if not case.shareable:
        return
    name = case.shareable[0]
    made = tuple(group for group in case.make().groups if group != name)
    with pytest.raises(ValueError, match=f"'{name}' must be given by another layer"):
        case.make(groups=made)(tokens())
    with pytest.raises(ValueError, match="groups has 'sugar'; it takes names out of"):
        case.make(groups=("sugar",))


def test_a_position_tensor_of_shared_groups_is_the_sources() -> None:
    case = CASES["attention_convolved"]
    layer = case.make()
    source = layer.allocate_cache(2, MAX_LENGTH)
    cache = layer.allocate_cache(2, MAX_LENGTH, source=source, shared=("key",))
    assert cache.tensors["key"] is source.tensors["key"]
    assert cache.tensors["value"] is not source.tensors["value"]
    assert cache.tensors["tail"].shape == (2, 2, 2 * DIM)
    assert cache.aliased == {"key"}


def test_a_history_is_shared_where_gate_and_value_are() -> None:
    layer = CASES["diff_gated_long_conv"].make()
    source = layer.allocate_cache(2, MAX_LENGTH)
    both = layer.allocate_cache(2, MAX_LENGTH, source=source, shared=("B", "value"))
    assert both.tensors["history_b"] is source.tensors["history_b"]
    one = layer.allocate_cache(2, MAX_LENGTH, source=source, shared=("B", "C"))
    assert not one.aliased


# -------------------------------------------------------------------------------- mistakes


@each_layer
def test_wrong_input(case: Case) -> None:
    layer = case.make()
    for shape in [(2, DIM), (2, 3, DIM + 1), (1, 2, 3, DIM)]:
        with pytest.raises(ValueError, match=r"x has shape .*; it takes \(B, L, D\) with D = 32"):
            layer(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="batch is 0; it takes an integer of at least 1"):
        layer.allocate_cache(0, 4)
    with pytest.raises(ValueError, match="max_length is True; it takes"):
        layer.allocate_cache(1, True)
    with pytest.raises(TypeError, match="cache is dict; it takes None or allocate_cache's"):
        layer(tokens(), {})
    if case.cache:
        with pytest.raises(ValueError, match=r"x has a batch of 2; the cache's .* takes 3"):
            layer(tokens(), layer.allocate_cache(3, MAX_LENGTH))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.Attention(0, 1), "Attention: dim is 0; it takes an integer"),
        (lambda: layers.Attention(32, 5), "Attention: heads is 5; it takes a divisor of dim = 32"),
        (lambda: layers.Attention(12, 4), "multiple of 2 channels"),
        (lambda: layers.DiffAttention(24, 4), "multiple of 4 channels"),
        (lambda: layers.Attention(32, 4, 3), "kv_repeat is 3; it takes a divisor of heads = 4"),
        (lambda: layers.Attention(32, 4, kernel_size=0), "kernel_size is 0"),
        (lambda: layers.SelectiveSSM(32, state_size=0), "SelectiveSSM: state_size is 0"),
        (lambda: layers.DiffSelectiveSSM(32, conv_kernel=-1), "DiffSelectiveSSM: conv_kernel is -1"),
        (lambda: layers.GatedShortConv(32, kernel_size=0), "GatedShortConv: kernel_size is 0"),
        (lambda: layers.GatedLongConv(3.5), "GatedLongConv: dim is 3.5"),  # type: ignore[arg-type]
        (lambda: layers.SwiGLU(32, hidden=0), "SwiGLU: hidden is 0"),
        (lambda: layers.RMSNorm(0), "RMSNorm: dim is 0"),
        (lambda: layers.Attention(32, 4, head_dim=7), "Attention: head_dim is 7; it takes a multiple of 2"),
        (lambda: layers.Attention(32, 4, rotary=layers.Rotary(frequencies=(1.0,))), "8 channels take 4"),
        (lambda: layers.SelectiveSSM(32, inner=0), "SelectiveSSM: inner is 0"),
        (lambda: layers.GatedLinearAttention(32, 3), "heads is 3; it takes a divisor of key_dim = 16"),
        (lambda: layers.GatedLinearAttention(32, 4, gate_normalizer=0), "gate_normalizer is 0"),
        (lambda: layers.Mamba2(32, head_dim=7), "head_dim is 7; it takes a divisor of inner = 64"),
        (lambda: layers.Mamba2(32, head_dim=8, n_groups=3), "n_groups is 3; it takes a divisor of heads = 8"),
        (lambda: layers.GatedDeltaNet(32, 3), "key_heads is 3; it takes a divisor of dim = 32"),
        (lambda: layers.GatedDeltaNet(32, 2, 3), "key_heads is 2; it takes a divisor of value_heads = 3"),
        (lambda: layers.GRUScan(32, blocks=5), "GRUScan: blocks is 5; it takes a divisor of inner = 32"),
        (lambda: layers.LSTMScan(32, conv_kernel=0), "LSTMScan: conv_kernel is 0"),
    ],
)
def test_wrong_sizes(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -------------------------------------------------------------------------------- initial values


def test_outputs_are_scaled_to_the_depth() -> None:
    shallow = layers.SwiGLU(256, 512).down_proj.weight
    deep = layers.SwiGLU(256, 512, residual_layers=16).down_proj.weight
    assert math.isclose(shallow.std().item(), 512**-0.5 / 4, rel_tol=0.02)
    assert math.isclose(deep.std().item(), 512**-0.5 / 16, rel_tol=0.02)


def test_mambas_initial_values() -> None:
    layer = layers.SelectiveSSM(512, 4)
    steps = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert 0.9e-3 < steps.min() < 1.5e-3
    assert 0.07 < steps.max() < 0.101
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 5.0).expand(512, 4))


def test_long_kernels_have_unit_norm_and_spread_decays() -> None:
    torch.manual_seed(0)
    kernel = layers.GatedLongConv(256).filter_fn(8192)
    assert kernel.shape == (256, 8192)
    assert 0.5 < kernel.norm(dim=1).median() < 2
    energy = kernel.square().cumsum(1)
    half = (energy < energy[:, -1:] / 2).sum(1).float()
    assert half[:32].median() < 8
    assert half[-32:].median() > 128


def test_long_kernels_do_not_depend_on_the_length_asked_for() -> None:
    kernel = layers.GatedLongConv(8, dtype=torch.float64).filter_fn
    assert torch.allclose(kernel(100)[:, :7], kernel(7), rtol=1e-12, atol=1e-12)


def test_rms_norm() -> None:
    norm, x = layers.RMSNorm(8, 1e-5), torch.randn(2, 3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(norm(x), expected, atol=1e-6)
    y, total = norm(x, residual=x)
    assert torch.equal(total, 2 * x)
    assert torch.allclose(y, norm(2 * x), atol=1e-6)
