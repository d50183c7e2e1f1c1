"""Layers with the weights of transformers' modules compute the same: at once, in chunks, by token."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from star_kernels import layers
from star_kernels.integrations import functions, patching
from star_kernels.layers import LivLayer

transformers = pytest.importorskip("transformers")

DIM, LENGTH = 32, 11
TOLERANCE = 1e-5
FAMILIES = ("lfm2", "mamba", "mamba2", "qwen3_next")


def modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@pytest.fixture(scope="module", autouse=True)
def _torch_forms() -> Iterator[None]:
    """transformers' own PyTorch forms, also where fla or mamba_ssm are installed."""
    patch = patching.Patch()
    for family in FAMILIES:
        for name in functions.ADAPTERS:
            if hasattr(modeling(family), name):
                patch.replace(modeling(family), name, inspect.unwrap(getattr(modeling(family), name)))
    yield
    patch.undo()


@dataclass(frozen=True)
class Source:
    """A class of modules and the layer that takes its weights."""

    layer: type[LivLayer]
    family: str
    name: str
    config: Callable[..., Any]
    settings: dict[str, Any]

    def make(self, **others: Any) -> tuple[Any, Any]:
        """The module, with weights away from their first values, and its configuration."""
        config = self.config(
            hidden_size=DIM, num_hidden_layers=1, attn_implementation="eager", **{**self.settings, **others}
        )
        torch.manual_seed(0)
        module = getattr(modeling(self.family), self.name)(config, 0).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return module, config


MAMBA2 = {"state_size": 6, "num_heads": 8, "head_dim": 8, "chunk_size": 4}
QWEN = {"linear_key_head_dim": 6, "linear_value_head_dim": 10, "layer_types": ["linear_attention"]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2}
SOURCES = {
    "lfm2": Source(
        layers.GatedShortConv, "lfm2", "Lfm2ShortConv", transformers.Lfm2Config, {"layer_types": ["conv"]}
    ),
    "lfm2_bias": Source(
        layers.GatedShortConv,
        "lfm2",
        "Lfm2ShortConv",
        transformers.Lfm2Config,
        {"layer_types": ["conv"], "conv_bias": True, "conv_L_cache": 4},
    ),
    "mamba": Source(layers.SelectiveSSM, "mamba", "MambaMixer", transformers.MambaConfig, {"state_size": 5}),
    "mamba_bias": Source(
        layers.SelectiveSSM,
        "mamba",
        "MambaMixer",
        transformers.MambaConfig,
        {"use_bias": True, "use_conv_bias": False, "expand": 3, "time_step_rank": 4, "conv_kernel": 3},
    ),
    "mamba2": Source(
        layers.Mamba2, "mamba2", "Mamba2Mixer", transformers.Mamba2Config, {**MAMBA2, "n_groups": 1}
    ),
    "mamba2_groups": Source(
        layers.Mamba2,
        "mamba2",
        "Mamba2Mixer",
        transformers.Mamba2Config,
        {**MAMBA2, "n_groups": 4, "use_bias": True, "use_conv_bias": False},
    ),
    "qwen3_next": Source(
        layers.GatedDeltaNet,
        "qwen3_next",
        "Qwen3NextGatedDeltaNet",
        transformers.Qwen3NextConfig,
        {**QWEN, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    ),
    "qwen3_next_one_head": Source(
        layers.GatedDeltaNet,
        "qwen3_next",
        "Qwen3NextGatedDeltaNet",
        transformers.Qwen3NextConfig,
        {**QWEN, "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_conv_kernel_dim": 3},
    ),
    "llama": Source(layers.Attention, "llama", "LlamaAttention", transformers.LlamaConfig, LLAMA),
    "llama_bias": Source(
        layers.Attention,
        "llama",
        "LlamaAttention",
        transformers.LlamaConfig,
        {**LLAMA, "head_dim": 12, "attention_bias": True, "rope_parameters": LLAMA3},
    ),
    "llama_yarn": Source(
        layers.Attention,
        "llama",
        "LlamaAttention",
        transformers.LlamaConfig,
        {**LLAMA, "max_position_embeddings": 256, "rope_parameters": YARN},
    ),
    "diffllama": Source(
        layers.DiffAttention,
        "diffllama",
        "DiffLlamaAttention",
        transformers.DiffLlamaConfig,
        {"num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "diffllama_bias": Source(
        layers.DiffAttention,
        "diffllama",
        "DiffLlamaAttention",
        transformers.DiffLlamaConfig,
        {"num_attention_heads": 4, "head_dim": 12, "attention_bias": True},
    ),
}
each_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


def inputs() -> Tensor:
    return torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def theirs(source: Source, module: Any, config: Any, x: Tensor, past: Any = None, start: int = 0) -> Tensor:
    """The module's output for tokens of x that follow ``start`` others."""
    if "Attention" not in source.name:
        cache = "past_key_values" if source.family == "lfm2" else "cache_params"
        return module(x, **{cache: past})
    family = modeling(source.family)
    rotary = next(kind for name, kind in vars(family).items() if name.endswith("RotaryEmbedding"))(config)
    end = start + x.shape[1]
    positions = torch.arange(start, end)[None]
    mask = torch.full((end, end), float("-inf")).triu(1)[None, None, start:]
    return module(x, position_embeddings=rotary(x, positions), attention_mask=mask, past_key_values=past)[0]


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


@each_source
def test_the_same_output(source: Source) -> None:
    module, config = source.make()
    layer, x = source.layer.from_module(module), inputs()
    expected = theirs(source, module, config, x)
    assert expected.norm() > 0.1
    assert distance(layer(x), expected) < TOLERANCE


@each_source
@pytest.mark.parametrize("pieces", [[6, 1, 1, 1, 1, 1], [1] * LENGTH, [5, 4, 1, 1]], ids=str)
def test_the_same_with_caches(source: Source, pieces: list[int]) -> None:
    """Prefill, chunks and single tokens: as the module does it with its cache, and as it does all at once.

    transformers' Mamba starts every chunk but single tokens from an empty state, so that only its first one
    is right, and the second chunk is compared with the other form alone.
    """
    module, config = source.make()
    layer, x = source.layer.from_module(module), inputs()
    cache = layer.allocate_cache(2, LENGTH)
    past = transformers.DynamicCache(config=config)
    at_once = theirs(source, module, config, x)
    for piece in x.split(pieces, dim=1):
        start = cache.position
        y = layer(piece, cache)
        assert distance(y, at_once[:, start : cache.position]) < TOLERANCE
        if pieces[1] == 1:
            expected = theirs(source, module, config, piece, past, start)
            assert distance(y, expected) < 10 * TOLERANCE


@each_source
def test_loading_into_another_layer_of_the_same_sizes(source: Source) -> None:
    module, _ = source.make()
    layer = source.layer.from_module(module)
    other = source.layer.from_module(source.make()[0]).double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other.load_from(module) is other
    x = inputs()
    assert distance(other(x.double()), layer(x).double()) < TOLERANCE
    # A copy: the module's weights are its own.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert other(x.double()).norm() > 0.1


@pytest.mark.parametrize("name", ["lfm2_bias", "mamba", "mamba2_groups", "qwen3_next", "llama_bias"])
def test_state_dicts_are_interchangeable(name: str) -> None:
    """Where the family's convention is ours in full, no loader is needed at all."""
    module, _ = SOURCES[name].make()
    layer = SOURCES[name].layer.from_module(module)
    ours, others = layer.state_dict(), module.state_dict()
    assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in others.items()}
    assert all(torch.equal(ours[key], others[key]) for key in ours)


def test_a_norm_over_all_groups_is_another_layer() -> None:
    """Mixers before transformers 5.23 norm all channels together, whatever their groups."""
    module, _ = SOURCES["mamba2_groups"].make()
    del module.norm.group_size
    with pytest.raises(ValueError, match="channels together; Mamba2 takes mixers that norm"):
        layers.Mamba2.from_module(module)
    of_one_group, _ = SOURCES["mamba2"].make()
    del of_one_group.norm.group_size
    assert layers.Mamba2.from_module(of_one_group).n_groups == 1


def test_a_gated_unit_of_llama() -> None:
    config = transformers.LlamaConfig(hidden_size=DIM, intermediate_size=48)
    module = modeling("llama").LlamaMLP(config)
    layer = layers.SwiGLU.from_module(module)
    assert distance(layer(inputs()), module(inputs())) < TOLERANCE
    biased = modeling("llama").LlamaMLP(transformers.LlamaConfig(hidden_size=DIM, mlp_bias=True))
    with pytest.raises(ValueError, match="LlamaMLP: the projections have biases; SwiGLU takes none"):
        layers.SwiGLU.from_module(biased)


def test_dtype_device_and_further_arguments() -> None:
    module, _ = SOURCES["mamba"].make()
    layer = layers.SelectiveSSM.from_module(module.bfloat16(), residual_layers=4)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert layer.output.residual_layers == 4
    wide = layers.SelectiveSSM.from_module(module, dtype=torch.float32)
    assert wide.out_proj.weight.dtype == torch.float32
    assert torch.equal(wide.out_proj.weight, module.out_proj.weight.float())


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("layer", [layers.Attention, layers.Mamba2, layers.GRUScan, layers.GatedLongConv])
def test_another_class(layer: type[LivLayer]) -> None:
    with pytest.raises(ValueError, match=rf"{layer.__name__}: module is a Linear of torch\.nn.*; it takes"):
        layer.from_module(nn.Linear(3, 3))


def test_a_class_of_the_same_name_that_is_not_transformers() -> None:
    class LlamaAttention(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"is a LlamaAttention of tests.*; it takes transformers' LlamaAtt"):
        layers.Attention.from_module(LlamaAttention())


@pytest.mark.parametrize(
    ("name", "others", "message"),
    [
        ("mamba", {"hidden_act": "gelu"}, "MambaMixer: the activation is 'gelu'; the layer takes 'silu'"),
        ("mamba2", {"hidden_act": "relu"}, "Mamba2Mixer: the activation is 'relu'"),
        ("qwen3_next", {"hidden_act": "relu"}, "Qwen3NextGatedDeltaNet: the activation is 'relu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1; it takes 0"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_options_that_a_layer_does_not_have(name: str, others: dict[str, Any], message: str) -> None:
    module, _ = SOURCES[name].make(**others)
    with pytest.raises(ValueError, match=message):
        SOURCES[name].layer.from_module(module)


def test_a_layer_of_other_sizes_or_settings() -> None:
    module, _ = SOURCES["llama"].make()
    with pytest.raises(ValueError, match="Attention: heads is 2; the module's is 4"):
        layers.Attention(DIM, 2, 2).load_from(module)
    with pytest.raises(ValueError, match=r"Attention: rotary is Rotary\(theta=7.0.*; the module's is"):
        layers.Attention(DIM, 4, 2, rope_theta=7.0).load_from(module)
    owner = layers.Attention(DIM, 4, 2)
    with pytest.raises(ValueError, match=r"Attention: the layer has no 'k_proj.weight', of 3 such"):
        layers.Attention(DIM, 4, 2, featurizer=owner).load_from(module)
    module.q_proj = nn.Linear(DIM, 2 * DIM, bias=False)
    with pytest.raises(
        ValueError, match=r"the module's q_proj.weight has shape \(64, 32\); it takes \(32, 32\)"
    ):
        layers.Attention(DIM, 4, 2).load_from(module)
