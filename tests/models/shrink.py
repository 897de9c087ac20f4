"""A tiny config of any type of transformers: its defaults, with every size replaced by a small one of the same meaning.

    defaults ─► one layer of each kind ─► sizes by the names of their keys ─► the same for configs inside ─► config

All widths are equal, in towers for images too, so what must agree between two configs does. What a config works out from other values
(None by default) is left to it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.tiny import VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HIDDEN, HEADS = 64, 4
FIRST_SPECIAL = VOCAB_SIZE - 18  # tokens of images and their like, which no text holds
_MOST_LAYERS = 4
_LAYERS = (
    r"num_hidden_layers|num_layers|n_layers?|depth|num_blocks|(encoder|decoder)_layers|num_(encoder|decoder)_layers|.*_num_hidden_layers"
)

# Names of keys -> what stands there instead. The first pattern that fits counts.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?|unpadded_vocab_size|ngram_vocab_size_base", VOCAB_SIZE),
    (r"hidden_size_per_layer_input|laurel_rank|altup_rank", 32),
    (r"moe_(shared_expert_)?(intermediate|hidden)_size|shared_experts?_intermediate_size|expert_ffn_hidden_size|share_expert_dim", 32),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|mlp_dim|d_inner|feed_forward_size", 128),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"(.*_)?head_dim|(.*_)?headdim|attention_head_size|d_head|d_kv|dim_head|mamba_d_head|kv_channels|(.*_)?state_size|mamba_d_state", 16),
    (r".*_lora_rank|time_step_rank|mamba_dt_rank|adapter_rank|gated_norm_rank|hc_lowrank|(.*_)?router_hidden_size", 32),
    (r"(.*_)?hidden_size|d_model|n_embd|lru_width|(.*_)?(embed|embedding|emb|projection|output)_dim|projector_(in|out)put_dim", HIDDEN),
    (r"(.*_)?embedding_size|ple_embed_dim|projection_hidden_dim|adapter_(in|out)_dim|adapter_input_size|conv_output_size", HIDDEN),
    (r"(n|num)_mamba_heads|mamba_(n|num)_heads", 2 * HIDDEN // 16),
    (r"linear_num_key_heads|index_n_heads", 2),
    (r"(.*_)?(n|num)_heads?|(.*_)?num_(attention|value)_heads|(.*_)?attention_heads", HEADS),
    (r"((num|n)_(local_|routed_)?|moe_num_)experts", 6),
    (r"(num_)?experts?_per_tok|moe_(k|top_?k)|top_k_experts|num_selected_experts|zero_expert_num", 2),
    (r"n_group|topk_group|(.*_)?n_?groups|first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r"sliding_window(_size)?|attention_window_size|attention_chunk_size|(.*_)?chunk_size|local_attention|window_size|block_size", 16),
    (r"index_topk|index_block_size|index_kpool", 8),
    (r"index_topk_blocks", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|context_length", 512),
    (r"image_size|crop_size", 56),
    (r"patch_size", 14),
    (r"num_position_embeddings|num_patches", 16),
    (r"mm_tokens_per_image|image_seq_length", 4),
    (r"mamba_d_ssm", HIDDEN),
    (_LAYERS, 2),
)  # fmt: skip
_KEY_VALUE_HEADS = r"num_(key_value|kv)_heads|kv_n_heads|num_query_groups|(.*_)?num_key_value_heads"
_LAYER_NUMBERS = r"deepstack_visual_indexes|fullatt_block_indexes|global_attn_indexes|intermediate_layers_indices"
_SPECIAL = r".*token_(id|index)|.*_(start|end|newline)_id|image_patch_id|visual_indicator_token_ids"


# What no rule finds.
_HINTS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "mamba2": {"num_heads": 8},
    "paddleocr_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}},
    "reformer": {"is_decoder": True},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, "mamba_dt_rank": 32},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
}  # fmt: skip
_SWA = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32, "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "head_dim": 24,
}  # fmt: skip
_HINTS |= {"dots3_note_text": _SWA, "dots3_note": {"text_config": _SWA}}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """changes: settings besides."""
    from transformers import AutoConfig

    settings = _merged(_settings(AutoConfig.for_model(model_type), {}), _HINTS.get(model_type, {}))
    return AutoConfig.for_model(model_type, **_merged(settings, changes))


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(settings[key], value) for key, value in changes.items() if isinstance(value, Mapping) and key in settings}
    return {**settings, **changes, **both}


def _settings(config: PreTrainedConfig, special: dict[int, int]) -> dict[str, Any]:
    """special: tokens of the whole model -> those of the tiny one."""
    from transformers import PreTrainedConfig

    found: dict[str, Any] = {}
    kinds = _one_of_each(config)
    for field in dataclasses.fields(config):
        value = vars(config).get(field.name, field.default)  # not getattr: it raises where layers differ
        if isinstance(value, PreTrainedConfig):
            found[field.name] = {"model_type": value.model_type, **_settings(value, special)}
        elif field.name in kinds:
            found[field.name] = kinds[field.name]
        elif field.name == "rope_parameters" and "mrope_section" in (config.ignore_keys_at_rope_validation or ()):
            found[field.name] = {**value, "mrope_section": _sections(value)}
        elif field.default is not None and field.default is not dataclasses.MISSING:
            small = _beside(config, field.name, value, special)
            if small is not value:
                found[field.name] = small
    return found


def _beside(config: PreTrainedConfig, key: str, value: Any, special: dict[int, int]) -> Any:
    """As `_small`; what is equal by its meaning stays so."""
    values = vars(config)
    if re.fullmatch(_KEY_VALUE_HEADS, key):
        return HEADS if value == values.get("num_attention_heads") else min(value, HEADS // 2)
    if key == "head_dim" and value == values.get("qk_rope_head_dim"):
        return _small("qk_rope_head_dim", value, special)
    return _small(key, value, special)


def _small(key: str, value: Any, special: dict[int, int]) -> Any:
    if isinstance(value, list | tuple) and re.fullmatch(_LAYER_NUMBERS, key):
        return [0]
    if re.fullmatch(_SPECIAL, key):
        many = value if isinstance(value, list | tuple) else [value]
        ids = [special.setdefault(one, FIRST_SPECIAL + len(special)) if type(one) is int and one >= FIRST_SPECIAL else one for one in many]
        return ids if isinstance(value, list | tuple) else ids[0]
    if type(value) is not int:
        return value
    return next((min(size, value) for pattern, size in _SIZES if re.fullmatch(pattern, key)), value)


def _sections(rope: Mapping[str, Any]) -> list[int]:
    """Of the rotated half of a head: time takes what height and width leave."""
    half = int(16 * rope.get("partial_rotary_factor", 1.0)) // 2
    return [half - 2 * (half // 4), half // 4, half // 4]


def _one_of_each(config: PreTrainedConfig) -> dict[str, Any]:
    """The lists that have a value for each layer, cut to one layer of each kind, and how many layers those are."""
    count: int = getattr(config, "num_hidden_layers", 0)
    names = [field.name for field in dataclasses.fields(config)]
    values = vars(config)
    lists = {key: list(values[key]) for key in names if isinstance(values.get(key), list | tuple) and len(values[key]) == count}
    if not lists:
        return {}
    rows = [tuple(str(values[i]) for values in lists.values() if isinstance(values[i], str)) for i in range(count)]
    chosen = sorted({row: i for i, row in reversed(list(enumerate(rows)))}.values())[:_MOST_LAYERS]
    chosen = sorted(chosen + [i for i in range(count) if i not in chosen][: max(0, 2 - len(chosen))])
    if values.get("num_kv_shared_layers"):  # the last ones read keys and values of the first ones
        chosen = [*chosen, *chosen]
    found: dict[str, Any] = {key: [_small(key, values[i], {}) for i in chosen] for key, values in lists.items()}
    counted = [key for key in names if re.fullmatch(_LAYERS, key)][:1]
    if values.get("num_kv_shared_layers"):
        found["num_kv_shared_layers"] = len(chosen) // 2
    return found | dict.fromkeys(counted, len(chosen))
