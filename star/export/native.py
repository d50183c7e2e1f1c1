"""Genomes that are a Llama or an LFM2 in disguise, as that class of transformers: its config.json, its names.

A backbone of mixers and GMemless in turn is a stack of decoder layers. Where all mixers are plain softmax
attention it is a Llama; with gated short convolutions among them it is an LFM2.

LFM2 norms the queries and keys of every head, which our attention does not. Its norms all add one `norm_eps`
to the mean square, so its residual stream is written `_STREAM` times as large: the norms of the stream do
not notice when `norm_eps` grows with the square, but beside such an epsilon a query's own mean square is
nothing, and with a weight of √norm_eps the norm of a query is the query, to float32's precision. `_STREAM`
is a power of two, which changes no digit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from star_kernels.layers import Attention, GatedShortConv, SwiGLU
from star_kernels.layers.attention import PROJECTIONS as ATTENTION_PROJECTIONS
from star_kernels.layers.memoryless import PROJECTIONS as UNIT_PROJECTIONS

if TYPE_CHECKING:
    from star.model import StarModel

__all__ = ["Native", "as_native"]

_STREAM = 2.0**26
_PROJECTIONS = {**ATTENTION_PROJECTIONS, **UNIT_PROJECTIONS}
_POSITIONS = 131_072  # no limit of the model's; what other programs plan for

_REMARK = (
    "LFM2 norms queries and keys, and this model does not. So its residual stream is written 2^26 times as "
    "large, with a `norm_eps` to match: those norms then change nothing, and the logits are the model's. Run "
    "it in float32 or bfloat16 (float16 can not hold the stream). To train further, take the export without "
    "`--native`."
)


@dataclass(frozen=True)
class Native:
    """A model under the names of a class: config.json, tensors, and what a user must know."""

    architecture: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    remark: str = ""


def as_native(model: StarModel) -> Native:
    """The model as `LlamaForCausalLM` or `Lfm2ForCausalLM`, with the same logits.

    Weights that LIVs share are written for each of them.

    Raises:
        ValueError: it is neither; the message names the first LIV that is in the way.
    """
    blocks = _blocks(model)
    if all(isinstance(mixer, Attention) for mixer, _ in blocks):
        return _llama(model)
    return _lfm2(model)


def _blocks(model: StarModel) -> list[tuple[Attention | GatedShortConv, SwiGLU]]:
    """Mixer and gated unit of every decoder layer."""
    for plan, layer in zip(model.plans, model.layers, strict=True):
        where = f"--native: LIV {plan.index + 1} ({plan.entry.name})"
        if plan.source is not None:
            raise ValueError(
                f"{where} reuses {', '.join(plan.shared)} of LIV {plan.source + 1}; layers of a Llama "
                "or an LFM2 share no features"
            )
        if plan.index % 2:
            if type(layer) is not SwiGLU:
                raise ValueError(f"{where} is in a gated unit's place; a Llama or an LFM2 has GMemless there")
        elif not (type(layer) is GatedShortConv or (type(layer) is Attention and not layer.short_conv)):
            raise ValueError(
                f"{where} is in a mixer's place; a Llama has SA-1, SA-3 or SA-4 there, an LFM2 also GConv-1"
            )
    if len(model.layers) % 2:
        raise ValueError(
            f"--native: the genome has {len(model.layers)} LIVs; a Llama or an LFM2 ends with GMemless"
        )
    if not any(isinstance(layer, Attention) for layer in model.layers):
        raise ValueError(
            "--native: no LIV is attention; transformers' LFM2 computes without one, but can not generate"
        )
    layers: list[Any] = list(model.layers)
    return list(zip(layers[0::2], layers[1::2], strict=True))


def _common(model: StarModel, architecture: str, kv_heads: int) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": [architecture],
        "vocab_size": model.embedding.weight.shape[0],
        "hidden_size": config.width,
        "intermediate_size": config.swiglu_width,
        "num_hidden_layers": len(model.layers) // 2,
        "num_attention_heads": config.heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": _POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # what transformers 4 reads
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
    }


def _llama(model: StarModel) -> Native:
    blocks = _blocks(model)
    kv_heads = max(mixer.kv_heads for mixer, _ in blocks if isinstance(mixer, Attention))
    tensors = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    for index, (mixer, unit) in enumerate(blocks):
        assert isinstance(mixer, Attention)
        layer = f"model.layers.{index}"
        tensors[f"{layer}.input_layernorm.weight"] = _norm(model, 2 * index)
        tensors[f"{layer}.post_attention_layernorm.weight"] = _norm(model, 2 * index + 1)
        for name, weight in _projections(mixer, kv_heads).items():
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = weight
        tensors[f"{layer}.self_attn.o_proj.weight"] = mixer.output.weight
        tensors[f"{layer}.mlp.gate_proj.weight"] = _group(unit, "gate")
        tensors[f"{layer}.mlp.up_proj.weight"] = _group(unit, "up")
        tensors[f"{layer}.mlp.down_proj.weight"] = unit.output.weight
    config = {
        "model_type": "llama",
        **_common(model, "LlamaForCausalLM", kv_heads),
        "head_dim": model.config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.config.norm_eps,
        "attention_bias": False,
        "mlp_bias": False,
    }
    return Native("LlamaForCausalLM", config, _own(tensors))


def _lfm2(model: StarModel) -> Native:
    blocks = _blocks(model)
    kv_heads = max(mixer.kv_heads for mixer, _ in blocks if isinstance(mixer, Attention))
    eps = model.config.norm_eps * _STREAM**2
    tensors = {
        "model.embed_tokens.weight": _STREAM * model.embedding.weight,
        "model.embedding_norm.weight": model.norm.weight / _STREAM,
    }
    for index, (mixer, unit) in enumerate(blocks):
        layer = f"model.layers.{index}"
        tensors[f"{layer}.operator_norm.weight"] = _norm(model, 2 * index)
        tensors[f"{layer}.ffn_norm.weight"] = _norm(model, 2 * index + 1)
        if isinstance(mixer, Attention):
            for name, weight in _projections(mixer, kv_heads).items():
                tensors[f"{layer}.self_attn.{name}_proj.weight"] = weight
            for name in ("q", "k"):
                identity = torch.full((mixer.head_dim,), math.sqrt(eps), dtype=mixer.output.weight.dtype)
                tensors[f"{layer}.self_attn.{name}_layernorm.weight"] = identity
            tensors[f"{layer}.self_attn.out_proj.weight"] = _STREAM * mixer.output.weight
        else:
            inputs = [_group(mixer, name) for name in ("B", "C", "value")]
            tensors[f"{layer}.conv.in_proj.weight"] = torch.cat(inputs)
            tensors[f"{layer}.conv.conv.weight"] = mixer.featurizer.conv.weight
            tensors[f"{layer}.conv.out_proj.weight"] = _STREAM * mixer.output.weight
        tensors[f"{layer}.feed_forward.w1.weight"] = _group(unit, "gate")
        tensors[f"{layer}.feed_forward.w3.weight"] = _group(unit, "up")
        tensors[f"{layer}.feed_forward.w2.weight"] = _STREAM * unit.output.weight
    config = {
        "model_type": "lfm2",
        **_common(model, "Lfm2ForCausalLM", kv_heads),
        "norm_eps": eps,
        "conv_bias": False,
        "conv_L_cache": model.config.short_conv_kernel,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["full_attention" if isinstance(mixer, Attention) else "conv" for mixer, _ in blocks],
    }
    return Native("Lfm2ForCausalLM", config, _own(tensors), _REMARK)


def _norm(model: StarModel, index: int) -> Tensor:
    weight = model.norms[index].weight
    assert isinstance(weight, Tensor)
    return weight


def _group(layer: Any, name: str) -> Tensor:
    """The rows of a layer's weights that make one feature group."""
    owner = layer.featurizer
    weight: Tensor
    if isinstance(owner, GatedShortConv):
        assert owner.in_proj is not None
        weight = owner.in_proj.weight[owner.in_proj.rows([name])]
    else:
        weight = getattr(owner, _PROJECTIONS[name]).weight
    return weight


def _projections(mixer: Attention, kv_heads: int) -> dict[str, Tensor]:
    """Weights of queries, keys and values; heads of keys and values repeated until there are `kv_heads`."""
    made = {"q": _group(mixer, "query")}
    for short, name in (("k", "key"), ("v", "value")):
        heads = _group(mixer, name).unflatten(0, (mixer.kv_heads, mixer.head_dim))
        made[short] = heads.repeat_interleave(kv_heads // mixer.kv_heads, dim=0).flatten(0, 1)
    return made


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own: those that LIVs share are stored for each."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
