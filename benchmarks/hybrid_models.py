"""Random models of transformers, one for each layer class that star_kernels takes over, at two sizes:
one that computes in milliseconds, for tests, and one of width 768, for measurements."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 2}
DELTA_RULE = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
LATENT = {  # multi-head latent attention
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LATENT_EXPERTS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
INKLING = {
    **ATTENTION,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
LINEAR_FULL = {"layer_types": ["linear_attention", "full_attention"]}


SIZES_LARGE = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048}
LARGE = {
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "shared_intermediate_size": 1024,
    "mamba_n_heads": 24,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 256,
    "mamba_dt_rank": 48,
    "chunk_size": 256,
    "n_groups": 1,
    "linear_num_key_heads": 6,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_heads": 6,
    "linear_head_dim": 128,
    "kv_lora_rank": 256,
    "q_lora_rank": 384,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "swa_num_attention_heads": 12,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 64,
    "sliding_window_size": 512,
    "rel_extent": 512,
    "lru_width": 768,
    "attention_window_size": 512,
    "indexer_budget": 2048,
    "indexer_head_dim": 64,
    "index_head_dim": 64,
    "index_topk": 2048,
}
_THREE_TO_ONE = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_CONV_TO_ONE = ["conv", "conv", "full_attention", "conv"]
LARGE_OF: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": 4, "state_size": 16, "intermediate_size": 1536},
    "mamba2": {"num_hidden_layers": 4, "state_size": 128, "num_heads": 24},
    "falcon_mamba": {"num_hidden_layers": 4, "state_size": 16, "intermediate_size": 1536},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "mamba_d_state": 16},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [3]},
    "zamba": {"num_key_value_heads": 12, "mamba_d_state": 16},
    "zamba2": {"num_key_value_heads": 12, "mamba_ngroups": 1, "n_mamba_heads": 24},
    "falcon_h1": {"num_hidden_layers": 4, "mamba_d_ssm": 1536},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention"],
        "mamba_num_heads": 24,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
    },
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": _THREE_TO_ONE},
    "lfm2": {"num_hidden_layers": 4, "layer_types": _CONV_TO_ONE},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": _CONV_TO_ONE},
    "lfm3": {"num_hidden_layers": 4, "layer_types": _CONV_TO_ONE},
    "qwen3_next": {"num_hidden_layers": 4, "layer_types": _THREE_TO_ONE},
    "qwen3_5": {"num_hidden_layers": 4, "layer_types": _THREE_TO_ONE},
    "qwen3_5_moe": {"num_hidden_layers": 4, "layer_types": _THREE_TO_ONE},
    "qwen4_exp": {"num_hidden_layers": 4, "layer_types": _THREE_TO_ONE, "hc_lowrank": 64},
    "olmo_hybrid": {"num_hidden_layers": 4, "layer_types": _THREE_TO_ONE, "linear_num_key_heads": 12},
    "kimi_linear": {"num_hidden_layers": 4, "layer_types": _THREE_TO_ONE, "num_key_value_heads": 12},
    "bailing_hybrid": {
        "num_hidden_layers": 4,
        "layer_group_size": 4,
        "num_key_value_heads": 12,
        "head_dim": 64,
    },
    "glm5_next": {
        "num_hidden_layers": 4,
        "layer_types": _THREE_TO_ONE,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "num_key_value_heads": 12,
        "qk_rope_head_dim": 0,
    },
    "inkling": {"num_hidden_layers": 4},
    "inkling2": {"num_hidden_layers": 4, "unpadded_vocab_size": 8192},
    "recurrent_gemma": {"num_key_value_heads": 1, "num_hidden_layers": 4},
}


@dataclass(frozen=True)
class HybridModel:
    """A class of transformers and a tiny configuration of it.

    Args:
        module: folder of the model in transformers.
        name: what its classes' names begin with.
        config: arguments of the configuration.
        layer: the class that star_kernels takes over.
        classes: ends of the names of the configuration's and the model's class.
    """

    module: str
    name: str
    config: dict[str, Any]
    layer: str
    classes: tuple[str, str] = ("Config", "ForCausalLM")

    def large(self) -> dict[str, Any]:
        """What `build` changes for the size of measurements."""
        changes = {**SIZES_LARGE, **{key: LARGE[key] for key in self.config if key in LARGE}}
        return {**changes, **LARGE_OF.get(self.module, {})}

    def build(self, seed: int = 0, **changes: Any) -> torch.nn.Module:
        """The model in evaluation mode, with weights that let every part of a layer show in the logits."""
        models = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        configs = importlib.import_module(f"transformers.models.{self.module}.configuration_{self.module}")
        config = getattr(configs, self.name + self.classes[0])(**{**SIZES, **self.config, **changes})
        config._attn_implementation = "eager"
        torch.manual_seed(seed)
        model = getattr(models, self.name + self.classes[1])(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and parameter.std() < 0.1:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise, alpha=0.5 * parameter.shape[-1] ** -0.5)
        return model.eval()

    def __str__(self) -> str:
        return self.module


MODELS = [
    HybridModel("mamba", "Mamba", {"state_size": 8, "intermediate_size": 64}, "MambaMixer"),
    HybridModel(
        "mamba2",
        "Mamba2",
        {"state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
        "Mamba2Mixer",
    ),
    HybridModel("falcon_mamba", "FalconMamba", {"state_size": 8}, "FalconMambaMixer"),
    HybridModel(
        "jamba",
        "Jamba",
        {
            **ATTENTION,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        "JambaMambaMixer",
    ),
    HybridModel(
        "bamba",
        "Bamba",
        {**ATTENTION, **MAMBA_2, "attn_layer_indices": [1], "mamba_chunk_size": 8},
        "BambaMixer",
    ),
    HybridModel(
        "zamba",
        "Zamba",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_hidden_layers": 5,
            "layer_types": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
        },
        "ZambaMambaMixer",
    ),
    HybridModel(
        "zamba2",
        "Zamba2",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "mamba_d_state": 16,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": False,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "hybrid_layer_ids": [1],
        },
        "Zamba2MambaMixer",
    ),
    HybridModel(
        "falcon_h1",
        "FalconH1",
        {**ATTENTION, **MAMBA_2, "mamba_d_ssm": 64, "mamba_chunk_size": 8},
        "FalconH1Mixer",
    ),
    HybridModel(
        "nemotron_h",
        "NemotronH",
        {
            **ATTENTION,
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 8,
        },
        "NemotronHMamba2Mixer",
    ),
    HybridModel(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **MAMBA_2,
            "mamba_chunk_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
        "GraniteMoeHybridMambaLayer",
    ),
    HybridModel("lfm2", "Lfm2", {**ATTENTION, "layer_types": ["conv", "full_attention"]}, "Lfm2ShortConv"),
    HybridModel(
        "lfm2_moe",
        "Lfm2Moe",
        {**ATTENTION, **EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        "Lfm2MoeShortConv",
    ),
    HybridModel("lfm3", "Lfm3", {**ATTENTION, "layer_types": ["conv", "full_attention"]}, "Lfm3ShortConv"),
    HybridModel(
        "qwen3_next",
        "Qwen3Next",
        {**ATTENTION, **EXPERTS, **DELTA_RULE, **LINEAR_FULL, "shared_expert_intermediate_size": 16},
        "Qwen3NextGatedDeltaNet",
    ),
    HybridModel(
        "qwen3_5",
        "Qwen3_5",
        {**ATTENTION, **DELTA_RULE, **LINEAR_FULL},
        "Qwen3_5GatedDeltaNet",
        ("TextConfig", "ForCausalLM"),
    ),
    HybridModel(
        "qwen3_5_moe",
        "Qwen3_5Moe",
        {**ATTENTION, **EXPERTS, **DELTA_RULE, **LINEAR_FULL, "shared_expert_intermediate_size": 16},
        "Qwen3_5MoeGatedDeltaNet",
        ("TextConfig", "ForCausalLM"),
    ),
    HybridModel(
        "qwen4_exp",
        "Qwen4Exp",
        {
            **ATTENTION,
            **EXPERTS,
            **DELTA_RULE,
            **LINEAR_FULL,
            "shared_expert_intermediate_size": 16,
            "hc_lowrank": 8,
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        },
        "Qwen4ExpTextGatedDeltaNet",
        ("TextConfig", "ForCausalLM"),
    ),
    HybridModel(
        "olmo_hybrid",
        "OlmoHybrid",
        {**ATTENTION, **DELTA_RULE, **LINEAR_FULL, "linear_num_key_heads": 4},
        "OlmoHybridGatedDeltaNet",
    ),
    HybridModel(
        "kimi_linear",
        "KimiLinear",
        {**LATENT, **LATENT_EXPERTS, **LINEAR_FULL, "linear_num_heads": 4, "linear_head_dim": 8},
        "KimiLinearDeltaAttention",
    ),
    HybridModel(
        "bailing_hybrid",
        "BailingHybrid",
        {**LATENT, **LATENT_EXPERTS, "layer_group_size": 2, "head_dim": 8, "num_mtp_layers": 0},
        "BailingHybridDeltaAttention",
    ),
    HybridModel(
        "glm5_next",
        "Glm5Next",
        {
            **LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "qk_rope_head_dim": 0,
            **LINEAR_FULL,
            "mlp_layer_types": ["dense", "sparse"],
            "index_topk": 32,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_kpool": 4,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
        },
        "Glm5NextTextLinearAttention",
        ("TextConfig", "TextModel"),
    ),
    HybridModel("inkling", "Inkling", INKLING, "InklingShortConvolution", ("TextConfig", "ForCausalLM")),
    HybridModel(
        "inkling2",
        "Inkling2",
        {**INKLING, "unpadded_vocab_size": 61, "n_layers_per_attn_res_block": 2},
        "Inkling2ShortConvolution",
        ("TextConfig", "ForCausalLM"),
    ),
    HybridModel(
        "recurrent_gemma",
        "RecurrentGemma",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "lru_width": 32,
            "attention_window_size": 16,
            "num_hidden_layers": 3,
        },
        "RecurrentGemmaRglru",
    ),
]
