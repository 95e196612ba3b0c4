"""Tiny models of every class that transformers registers, made by shrinking the sizes in its default config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

# What a setting is called, and how small it is made. Names of sizes differ; what they must divide does not.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "n_embed",
                     "embedding_size", "cross_attention_hidden_size", "emb_dim", "out_hidden_size", "projection_dim",
                     "width", "lru_width", "attention_hidden_size", "hidden_dim", "conv_dim_out"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim",
                     "feed_forward_size", "ffn_hidden_size", "d_inner", "dff", "prefix_intermediate_size",
                     "intermediate_size_mlp", "block_ff_dim", "mlp_dim", "dense_intermediate_size", "dim_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_dim"), 24),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size",
                     "moe_shared_expert_intermediate_size"), 40),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers", "num_encoder_layers", "depth", "num_blocks"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads", "n_heads",
                     "encoder_attention_heads", "attention_heads", "linear_num_value_heads", "num_attn_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "attention_head_dim", "linear_key_head_dim", "d_kv",
                     "linear_value_head_dim", "kv_channels", "global_head_dim", "index_head_dim", "dim_head",
                     "swa_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 300),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx",
                     "original_max_position_embeddings", "max_target_positions", "max_source_positions"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k", "moe_top_k", "num_experts_per_token", "moe_topk", "topk",
                     "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "first_k_dense_replace": 1,
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 4,
    "image_size": 32,
    "patch_size": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 64,
    "n_mamba_heads": 4,
    "mamba_d_state": 8,
    "mamba_headdim": 16,
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_dt_rank": 4,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "index_n_heads": 2,
    "index_topk": 8,
    "sliding_window": 16,
    "num_nextn_predict_layers": 0,
    "num_mem_blocks": 1,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# What few configs need beyond that, by model type.
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
THREE_AXES = {
    "glm4v_text", "glm46v_text", "glm4v_moe_text", "glm_ocr_text", "qwen2_vl_text", "qwen2_5_vl_text",
    "paddleocr_vl_text",
    "qwen2_5_omni_text", "ernie4_5_vl_moe_text",
}  # fmt: skip
WHOLE = {"glm4v_text"}
MORE: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False, "attention_head_size": 8,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "zamba2": {
        "attention_hidden_size": 64, "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba": {
        "attention_hidden_size": 64, "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ple_embed_dim": 32, "hc_lowrank": 8, "ngram_vocab_size_base": 100,
        "split_ngram_parts": 2,
    },
    "xlstm": {"num_heads": 2},
    "longcat_flash": {"expert_ffn_hidden_size": 24, "head_dim": 4, "zero_expert_num": 2},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "hunyuan_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "xdrope_section": [1, 1, 1, 1]}
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "step3p5": {"sliding_window": 16, "share_expert_dim": 24},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
        "moe_intermediate_size": [24, 16], "intermediate_size": 48},
}  # fmt: skip


def shrunken(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A config of this class with every known size made small, in its parts too."""
    return _shrunken(kind(), changes)


def _shrunken(config: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    own = dict(vars(config))
    names = dict(type(config).attribute_map or {})
    latent = "qk_rope_head_dim" in own
    settings = {}
    for name, value in SIZES.items():
        if (
            (name in own or name in names)
            and (own.get(name, 0) is not None or name == "head_dim")
            and not isinstance(own.get(name), list | dict | tuple)
        ):
            settings[name] = value
    if latent:
        # Of latent attention the size of a head is a sum of its parts, and every head has its own key.
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = 4
    rope = own.get("rope_parameters")
    if (isinstance(rope, dict) and "mrope_section" in rope) or config.model_type in THREE_AXES:
        partial = isinstance(rope, dict) and rope.get("partial_rotary_factor") and config.model_type not in WHOLE
        settings["rope_parameters"] = {**MROPE, "mrope_section": [1, 1, 0]} if partial else MROPE
    parts = {}
    for name, value in own.items():
        if isinstance(value, PreTrainedConfig):
            parts[name] = _shrunken(value, {})
    settings |= dict(MORE.get(config.model_type, {}).items()) | changes
    kept = {}
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(own.get(name), list):
            kept[name] = None
    return type(config)(**{**kept, **settings, **parts})


def network(model_class: Any, **changes: Any) -> nn.Module:
    """A random model of the class, float32, in evaluation mode, with weights that are not all zero."""
    torch.manual_seed(0)
    model = model_class(shrunken(model_class.config_class, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3 if parameter.shape[-1] < 100 else 0.1)
    return model
