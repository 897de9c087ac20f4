"""A tiny random model of every supported architecture, as transformers itself builds and saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models.shrink import tiny_config
from tests.tiny import VOCAB_SIZE, write_tokenizer

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "pad_token_id": VOCAB_SIZE - 1,  # beyond the rows that a calibration text uses, as in Qwen
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {  # as DeepSeek spells it: the first block is dense
    "moe_intermediate_size": 32, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
_INDEXER: dict[str, Any] = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
_DELTA: dict[str, Any] = {  # gated delta net, in the first block
    "head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

_GEMMA4: dict[str, Any] = {  # as E2B and E4B: embeddings for each block, and the last blocks read keys and values of earlier ones
    "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB_SIZE, "global_head_dim": 32,
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

# model_type -> what its config needs besides; options that change names or shapes are switched on where a family has them
ZOO: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 16, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 16, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16},
    "phi3": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_MOE, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "olmoe": {**_MOE, "intermediate_size": 32},
    "exaone4": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "gemma": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "ministral3": {"head_dim": 16},
    "olmo3": {"sliding_window": 16},
    "seed_oss": {"head_dim": 16, "attention_out_bias": True},
    "smollm3": {"mlp_bias": True},
}

# the same for types that are not in the table
DERIVED: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 16, "head_dim": 16},
    "falcon": {"new_decoder_architecture": False},
    "gemma4_text": {
        "head_dim": 16,
        "sliding_window": 16,
        **_GEMMA4,
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "granitemoehybrid": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 96,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
    },
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"head_dim": 16},
    "olmo": {},
    "phi": {},
    "qwen3_5_text": {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {},
    # blocks that are no two branches
    "biogpt": {},
    "bloom": {},
    "ctrl": {"n_embd": 64, "dff": 96, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "falcon_h1": {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    "falcon_mamba": {"time_step_rank": 32, "state_size": 16},
    "gpt_neox_japanese": {},
    "mamba": {"time_step_rank": 32, "state_size": 16},
    "minicpm3": {**_MLA, "kv_lora_rank": 32},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 128},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "youtu": {**_MLA, "pad_token_id": 0},  # transformers loads zeros in place of its embedding
    # mixtures of experts
    "afmoe": {**_MOE, "head_dim": 16, "num_dense_layers": 1, "num_shared_experts": 1},
    "aria_text": {"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1, "head_dim": 16},
    "axk1": {**_MLA, **_ROUTED},
    "axk2": {**_MLA, **_ROUTED},
    "beam": {},
    "cohere2_moe": {**_MOE, "head_dim": 16},
    "deepseek_v2": {**_MLA, **_ROUTED, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_MLA, **_ROUTED},
    "deepseek_v32": {**_MLA, **_ROUTED, **_INDEXER},
    "dots1": {**_ROUTED, "head_dim": 16},
    "ernie4_5_moe": {
        "moe_intermediate_size": 32,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone_moe": {**_MOE, "head_dim": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_shared_experts": 1},
    "flint": {},
    "flex_olmo": {**_MOE, "intermediate_size": 32},
    "glm4_moe": {**_ROUTED, "head_dim": 16},
    "glm4_moe_lite": {**_MLA, **_ROUTED},
    "glm_moe_dsa": {**_MLA, **_ROUTED, **_INDEXER},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 6, "num_experts_per_tok": 2, "shared_intermediate_size": 96},
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2, "head_dim": 16},
    "jamba": {"num_experts": 6, "num_experts_per_tok": 2, "mamba_dt_rank": 32, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {**_MOE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "llama4_text": {"num_local_experts": 6, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2, "head_dim": 16},
    "minimax": {"num_local_experts": 6, "head_dim": 16, "block_size": 8},
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16},
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 96},
    "qwen3_5_moe_text": {**_MOE, **_DELTA, "shared_expert_intermediate_size": 32},
    "qwen3_next": {**_MOE, **_DELTA, "shared_expert_intermediate_size": 32},
    "solar_open": {**_ROUTED, "head_dim": 16},
}


_TEXT = {
    key: value for key, value in _COMMON.items() if not key.endswith("_token_id")
} | {"head_dim": 16, "max_position_embeddings": 512}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2,
}  # fmt: skip
_QWEN = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
_MROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}}

# Language models with a part for images -> their configs
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **_TEXT}, "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 5,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, **_MROPE}, **_QWEN,
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_TEXT}, "vision_config": {"model_type": "pixtral", "head_dim": 16, **_VISION},
        "image_token_index": 5, "spatial_merge_size": 1,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_VISION}, "image_token_index": 5,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, **_MROPE}, "vision_config": {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [0]}, **_QWEN,
    },
    "idefics3": {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _VISION, "image_token_id": 5, "scale_factor": 1},
    "paligemma": {
        "text_config": {"model_type": "gemma", **_TEXT}, "vision_config": {"projection_dim": 64, **_VISION}, "image_token_index": 5,
    },
    "internvl": {"text_config": {"model_type": "qwen2", **_TEXT}, "vision_config": _VISION, "image_token_id": 5},
    "aya_vision": {"text_config": {"model_type": "cohere2", **_TEXT}, "vision_config": _VISION, "image_token_index": 5},
    "gemma4": {
        "text_config": {"model_type": "gemma4_text", **_TEXT, **_GEMMA4},
        "vision_config": {"num_key_value_heads": 2, "head_dim": 16, **_VISION}, "audio_config": None, "image_token_id": 5,
    },
    "qwen3_5": {
        "text_config": {
            **_TEXT, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16}, **_QWEN,
    },
    "qwen3_vl_moe": {
        "text_config": {**_TEXT, **_MROPE, **_MOE, "decoder_sparse_step": 1}, **_QWEN,
        "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "llama4": {
        "text_config": {
            "model_type": "llama4_text", **_TEXT, "intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 1,
        },
        "vision_config": {
            **_VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5,
        },
    },
    "lfm2_vl": {"text_config": {"model_type": "lfm2", **_TEXT}, "vision_config": _VISION, "image_token_id": 5},
    "glm4v": {
        "text_config": {**_TEXT, **_MROPE}, "vision_config": {**_QWEN_VISION, "image_size": 28, "patch_size": 14}, "image_token_id": 5,
    },
}  # fmt: skip


def config_of(model_type: str, **changes: Any) -> Any:
    """The tiny config of a type, of the entry above or of its defaults (models/shrink.py)."""
    from transformers import AutoConfig

    entries = WRAPPERS | {name: {**_COMMON, **settings} for name, settings in (ZOO | DERIVED).items()}
    if model_type not in entries:
        return tiny_config(model_type, **changes)
    return AutoConfig.for_model(model_type, **{**entries[model_type], **changes})


def build(model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of this type with a tokenizer; weights are large enough that every layer matters to the logits. Further
    keywords change its config.
    """
    from transformers import AutoModelForImageTextToText

    from marlinctl.models.transformers_config import client_class

    config = config_of(model_type, **changes)
    made_of = client_class(config)
    if type(config) not in made_of._model_mapping:  # neither is it a language model, nor does it name one
        made_of = AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = made_of.from_config(config).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.6 if "router" in name or name.endswith("gate.weight") else 0.12)
            elif "norm" in name:
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
            else:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
