"""Weights and settings of other implementations' modules, as our layers take them.

Most tensors are taken as they are: our layers have the names and row orders of their families. A reader says
which constructor arguments give a module's sizes and settings, refuses what the layer cannot do, and reorders
rows where a family's convention is not ours. Modules are known by their class name, so that transformers is
never imported from here unless it has been already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from star_kernels.layers.rotary import Rotary

if TYPE_CHECKING:
    from star_kernels.layers.base import LivLayer


@dataclass(frozen=True)
class Found:
    """What was read from a module.

    Args:
        arguments: of the layer's constructor; they are the layer's attributes as well.
        weights: the layer's state dict.
    """

    arguments: Mapping[str, Any]
    weights: Mapping[str, Tensor]


def read(layer: str, module: nn.Module) -> Found:
    """What a layer of this class takes from the module. Raises ValueError as `LivLayer.load_from`."""
    readers = SOURCES.get(layer, {})
    name = type(module).__name__
    if name not in readers or not type(module).__module__.startswith("transformers."):
        takes = " or ".join(f"transformers' {known}" for known in readers) or "no other class's weights"
        raise ValueError(f"{layer}: module is a {name} of {type(module).__module__}; it takes {takes}")
    return readers[name](module)


def load(layer: LivLayer, module: nn.Module) -> None:
    """Copies the module's weights into the layer. Raises ValueError as `LivLayer.load_from`."""
    owner = type(layer).__name__
    found = read(owner, module)
    for name, value in found.arguments.items():
        if getattr(layer, name) != value:
            raise ValueError(f"{owner}: {name} is {getattr(layer, name)!r}; the module's is {value!r}")
    own = layer.state_dict(keep_vars=True)
    if missing := sorted(set(own) ^ set(found.weights)):
        holder = "module" if missing[0] in own else "layer"
        raise ValueError(f"{owner}: the {holder} has no {missing[0]!r}, of {len(missing)} such differences")
    for name, tensor in own.items():
        if tensor.shape != found.weights[name].shape:
            got, takes = tuple(found.weights[name].shape), tuple(tensor.shape)
            raise ValueError(f"{owner}: the module's {name} has shape {got}; it takes {takes}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found.weights[name])


# --------------------------------------------------------------------------------------------------------
# One reader for every class of modules


def _short_conv(module: Any) -> Found:
    dim = module.in_proj.in_features
    arguments = {"dim": dim, "kernel_size": module.conv_kernel_size, "bias": bool(module.bias)}
    return Found(arguments, _weights(module))


def _mamba(module: Any) -> Found:
    _require_silu(module, module.activation)
    arguments = {
        "dim": module.hidden_size,
        "inner": module.intermediate_size,
        "state_size": module.ssm_state_size,
        "conv_kernel": module.conv_kernel_size,
        "conv_bias": bool(module.use_conv_bias),
        "bias": bool(module.use_bias),
        "dt_rank": module.time_step_rank,
    }
    return Found(arguments, _weights(module))


def _mamba2(module: Any) -> Found:
    _require_silu(module, module.activation)
    inner, apart = module.intermediate_size, module.intermediate_size // module.n_groups
    if getattr(module.norm, "group_size", inner) != apart:  # which norms before transformers 5.23 have not
        raise ValueError(
            f"Mamba2Mixer: its norm takes all {inner} channels together; Mamba2 takes mixers that norm each "
            f"of their {module.n_groups} groups apart"
        )
    low, high = module.time_step_limit
    arguments = {
        "dim": module.hidden_size,
        "inner": module.intermediate_size,
        "state_size": module.ssm_state_size,
        "head_dim": module.head_dim,
        "n_groups": module.n_groups,
        "conv_kernel": module.conv_kernel_size,
        "conv_bias": bool(module.use_conv_bias),
        "bias": bool(module.use_bias),
        "dt_limit": (float(low), float(high)),
        "norm_eps": module.layer_norm_epsilon,
    }
    return Found(arguments, _weights(module))


def _delta_net(module: Any) -> Found:
    _require_silu(module, module.activation)
    arguments = {
        "dim": module.hidden_size,
        "key_heads": module.num_k_heads,
        "value_heads": module.num_v_heads,
        "key_head_dim": module.head_k_dim,
        "value_head_dim": module.head_v_dim,
        "conv_kernel": module.conv_kernel_size,
        "norm_eps": module.layer_norm_epsilon,
    }
    return Found(arguments, _weights(module))


def _attention(module: Any) -> Found:
    config = module.config
    arguments = {
        "dim": module.q_proj.in_features,
        "heads": config.num_attention_heads,
        "kv_repeat": module.num_key_value_groups,
        "head_dim": module.head_dim,
        "bias": bool(config.attention_bias),
        "qk_norm": False,
        "short_conv": False,
        "rotary": _rotary(module),
    }
    if module.attention_dropout:
        raise ValueError(f"LlamaAttention: attention_dropout is {module.attention_dropout}; it takes 0")
    return Found(arguments, _weights(module))


def _diff_attention(module: Any) -> Found:
    """Heads h and h + H/2 of DiffLlama are the two halves of one of our heads, and so are its values."""
    config, weights = module.config, _weights(module)
    arguments = {
        "dim": module.q_proj.in_features,
        "heads": config.num_attention_heads // 2,
        "kv_repeat": module.num_key_value_groups,
        "head_dim": 2 * module.head_dim,
        "bias": bool(config.attention_bias),
        "bare": False,
        "lambda_init": module.lambda_init,
        "norm_eps": module.groupnorm.eps,
        "qk_norm": False,
        "short_conv": False,
        "rotary": _rotary(module),
    }
    for name in [name for name in weights if name.split(".")[0] in ("q_proj", "k_proj", "v_proj")]:
        halves = weights[name].unflatten(0, (2, -1, module.head_dim))
        weights[name] = halves.transpose(0, 1).flatten(0, 2)
    # Its norm has no weight: ours is one.
    weights["subln.weight"] = torch.ones_like(weights["lambda_q1"]).repeat(2)
    return Found(arguments, weights)


def _gated_unit(module: Any) -> Found:
    _require_silu(module, module.config.hidden_act)
    if module.gate_proj.bias is not None:
        raise ValueError(f"{type(module).__name__}: the projections have biases; SwiGLU takes none")
    return Found({"dim": module.hidden_size, "hidden": module.intermediate_size}, _weights(module))


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def _require_silu(module: nn.Module, activation: object) -> None:
    if activation not in ("silu", "swish"):
        raise ValueError(f"{type(module).__name__}: the activation is {activation!r}; the layer takes 'silu'")


def _rotary(module: Any) -> Rotary:
    """The rotary settings of the module's configuration."""
    settings = module.config.rope_parameters
    kind, theta = settings["rope_type"], float(settings["rope_theta"])
    if kind == "default":
        return Rotary(theta)
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"{type(module).__name__}: rope_type is {kind!r}, whose frequencies change with the length; "
            "it takes one whose frequencies do not"
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](module.config, device="cpu")
    return Rotary(theta, tuple(frequencies.tolist()), float(scale))


SOURCES: dict[str, dict[str, Callable[[Any], Found]]] = {
    "Attention": {"LlamaAttention": _attention},
    "DiffAttention": {"DiffLlamaAttention": _diff_attention},
    "GatedShortConv": {"Lfm2ShortConv": _short_conv},
    "SelectiveSSM": {"MambaMixer": _mamba},
    "Mamba2": {"Mamba2Mixer": _mamba2},
    "GatedDeltaNet": {"Qwen3NextGatedDeltaNet": _delta_net},
    "SwiGLU": {"LlamaMLP": _gated_unit},
}
"""For every layer, by class name, the classes of transformers whose weights it takes."""
