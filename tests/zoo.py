"""A tiny random model of every supported architecture, as transformers itself builds and saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
_MOE = {"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2}

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
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "granitemoehybrid": {"num_local_experts": 0, "layer_types": ["attention", "attention"], "shared_intermediate_size": 96},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"head_dim": 16},
    "olmo": {},
    "phi": {},
    "qwen3_5_text": {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {},
}


def build(model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of this type with a tokenizer; weights are large enough that every layer matters to the logits. Further
    keywords change its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**_COMMON, **(ZOO | DERIVED).get(model_type, {}), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
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
