"""What a GGUF file's metadata and tensor names mean in transformers' terms: config.json and a plan for every weight.

llama.cpp stores the same models under other names, and three things differently:

    rows of q and k     Llama and Granite: the two halves of each head are interleaved, row 2i of a head is row i of the first
                        half, row 2i+1 is row i of the second half (its rotary embedding turns neighbours)
    norms of Gemma      1 + w, where transformers keeps w and adds 1 itself
    rotary scaling      Llama 3.1's rule is not written down, only the frequency factors it gives; we look for the rule that
                        gives the same factors and refuse the file if there is none

A file is turned only if all of it is understood: an architecture, a key or a tensor that is not in the tables below is
refused, because an ignored hyperparameter means a model that computes something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from marlinctl.checkpoint.gguf.header import GgufHeader, GgufTensor
from marlinctl.errors import BadInput, Problem
from marlinctl.system.files import shown

_LLAMA_PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}

LLAMA3_RULE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of all its releases

# GGUF key behind "<architecture>." -> config.json key. What is not in here, nor in _READ_ELSEWHERE, is refused.
_KEYS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}  # fmt: skip
_READ_ELSEWHERE = {
    "attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor", "expert_count", "expert_used_count",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Family:
    """One llama.cpp architecture."""

    model_type: str
    class_name: str
    parts: Mapping[str, str]
    keys: Mapping[str, str] = field(default_factory=dict)  # more metadata -> config keys
    fixed: Mapping[str, Any] = field(default_factory=dict)  # config keys that the file does not state
    interleaved: bool = False  # rows of q and k
    norm_plus_one: bool = False


_GEMMA_PARTS = _LLAMA_PARTS | _SANDWICH | {"ffn_norm": "pre_feedforward_layernorm"}
_PHI_PARTS = {k: v for k, v in _LLAMA_PARTS.items() if k not in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("llama", "LlamaForCausalLM", _LLAMA_PARTS, interleaved=True, fixed={"hidden_act": "silu"}),
    "granite": _Family(
        "granite", "GraniteForCausalLM", _LLAMA_PARTS, interleaved=True, fixed={"hidden_act": "silu"},
        keys={"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
              "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"},
    ),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM", _LLAMA_PARTS, fixed={"hidden_act": "silu", "use_sliding_window": False}),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM", _LLAMA_PARTS | _HEAD_NORMS, fixed={"hidden_act": "silu", "use_sliding_window": False}),
    "gemma2": _Family(
        "gemma2", "Gemma2ForCausalLM", _GEMMA_PARTS, norm_plus_one=True, fixed={"hidden_activation": "gelu_pytorch_tanh"},
        keys={"attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
              "final_logit_softcapping": "final_logit_softcapping"},
    ),
    "gemma3": _Family(
        "gemma3_text", "Gemma3ForCausalLM", _GEMMA_PARTS | _HEAD_NORMS, norm_plus_one=True,
        fixed={"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0},
        keys={"attention.sliding_window": "sliding_window", "final_logit_softcapping": "final_logit_softcapping",
              "rope.freq_base_swa": "rope_local_base_freq"},
    ),
    "phi3": _Family(
        "phi3", "Phi3ForCausalLM", _PHI_PARTS | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        fixed={"hidden_act": "silu"}, keys={"attention.sliding_window": "sliding_window"},
    ),
    "olmo2": _Family(
        "olmo2", "Olmo2ForCausalLM",
        {k: v for k, v in _LLAMA_PARTS.items() if k not in ("attn_norm", "ffn_norm")} | _HEAD_NORMS | _SANDWICH,
        fixed={"hidden_act": "silu"},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One weight of the folder to be written, and what must happen to the stored numbers."""

    name: str
    source: GgufTensor
    heads: int | None = None  # set: put the interleaved rows of that many heads back into halves
    minus_one: bool = False


def plan_model(header: GgufHeader) -> tuple[dict[str, Any], list[PlannedTensor]]:
    """config.json, and every weight in the order in which the file holds it."""
    architecture = header.facts.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise BadInput(
            "E320",
            f"GGUF files of the architecture {shown(repr(architecture), 60)} are not supported",
            where=str(header.path),
            fix=f"use the model's safetensors folder; GGUF is read for {', '.join(FAMILIES)}",
        )
    facts = _Facts(header, str(architecture))
    config = _config(facts, family)
    return config, _plan(header, family, config)


class _Facts:
    """The metadata of one architecture; a key that is missing or has the wrong type is a BadInput."""

    def __init__(self, header: GgufHeader, prefix: str) -> None:
        self.header, self.prefix = header, prefix

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.facts.get(f"{self.prefix}.{key}", default)

    def number(self, key: str) -> Any:
        value = self.get(key)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # some writers state one number per layer
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise self.refuse(f"the key {self.prefix}.{key} is missing or is not one number")
        return value

    def keys(self) -> list[str]:
        return [key.removeprefix(self.prefix + ".") for key in self.header.facts if key.startswith(self.prefix + ".")]

    def refuse(self, what: str) -> BadInput:
        return BadInput("E320", what, where=str(self.header.path), fix="use the model's safetensors folder instead of the GGUF file")


def _config(facts: _Facts, family: _Family) -> dict[str, Any]:
    keys = _KEYS | dict(family.keys)
    unknown = [key for key in facts.keys() if key not in keys and key not in _READ_ELSEWHERE]  # noqa: SIM118  a method, no dict
    if unknown:
        raise facts.refuse(f"the file states {shown(', '.join(unknown))}, which marlinctl does not understand for {facts.prefix}")
    if facts.get("expert_count"):
        raise facts.refuse("the file holds a mixture of experts, which is not read from GGUF")
    embedding = facts.header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise facts.refuse("the tensor token_embd.weight is missing or not a matrix")
    config: dict[str, Any] = {"architectures": [family.class_name], "model_type": family.model_type, "dtype": "float16"}
    config |= family.fixed
    for key, name in keys.items():
        optional = key in ("rope.freq_base", "attention.head_count_kv") or (key in family.keys and name in family.fixed)
        if facts.get(key) is not None or not (optional or key.endswith("softcapping")):
            config[name] = _plain(facts.number(key))
    config.setdefault("rope_theta", 10000.0)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in facts.header.tensors
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = facts.header.facts.get(f"tokenizer.ggml.{key}_token_id")
        config[name] = token if isinstance(token, int) and token < embedding.shape[0] else None
    _head_dim(facts, family, config)
    _attention_scale(family, config)
    _rope_scaling(facts, family, config)
    if family.model_type == "phi3" and not config.get("sliding_window"):
        config["sliding_window"] = None
    if facts.prefix in ("llama", "granite"):
        config["attention_bias"] = "blk.0.attn_q.bias" in facts.header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in facts.header.tensors
    return config


def _plain(value: Any) -> Any:
    """A float32 of the file as the shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, int):
        return value
    import numpy as np

    return float(str(np.float32(value)))


def _head_dim(facts: _Facts, family: _Family, config: dict[str, Any]) -> None:
    plain = config["hidden_size"] // max(config["num_attention_heads"], 1)
    rotated = facts.get("rope.dimension_count")
    head_dim = facts.get("attention.key_length") or plain
    if facts.get("attention.value_length", head_dim) != head_dim:
        raise facts.refuse("keys and values have different head sizes")
    if family.model_type == "phi3":
        if rotated and rotated != head_dim:
            config["partial_rotary_factor"] = rotated / head_dim
    elif rotated not in (None, head_dim):
        raise facts.refuse(f"only {rotated} of the {head_dim} numbers of a head are rotated")
    if head_dim != plain or family.model_type in ("qwen3", "gemma2", "gemma3_text"):
        config["head_dim"] = head_dim


def _attention_scale(family: _Family, config: dict[str, Any]) -> None:
    """Gemma divides scores by the root of head_dim, except in the 27B models, where it is hidden_size / heads."""
    if family.norm_plus_one:
        is_27b = (family.model_type, config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3_text", 62))
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    if family.model_type == "gemma3_text":  # five local layers, then a global one
        layers = range(config["num_hidden_layers"])
        config["layer_types"] = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in layers]


def _rope_scaling(facts: _Facts, family: _Family, config: dict[str, Any]) -> None:
    kind = facts.get("rope.scaling.type", "none")
    if any(name.startswith("rope_factors_") for name in facts.header.tensors):
        raise facts.refuse("the model scales its rotary embedding by LongRoPE, which is not read from GGUF")
    if kind == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(facts.number("rope.scaling.factor"))}
    elif kind != "none":
        raise facts.refuse(f"the rotary scaling {shown(repr(kind), 40)} is not read from GGUF")
    if "rope_freqs.weight" in facts.header.tensors:
        if kind != "none" or family.model_type != "llama":
            raise facts.refuse("the file holds rotary frequency factors that marlinctl does not understand")
        config["rope_scaling"] = _llama3_scaling(facts, config)


def _llama3_scaling(facts: _Facts, config: dict[str, Any]) -> dict[str, Any]:
    """The rule of Llama 3.1 and 3.2 that gives the factors stored in the file."""
    import numpy as np

    tensor = facts.header.tensors["rope_freqs.weight"]
    if tensor.kind_name != "F32":
        raise facts.refuse("rope_freqs.weight is not F32")
    with facts.header.path.open("rb") as handle:
        handle.seek(tensor.offset)
        stored = np.frombuffer(handle.read(tensor.nbytes), dtype="<f4")
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for factor in (8.0, 16.0, 32.0):
        wanted = llama3_factors(config["rope_theta"], head_dim, factor)
        if len(wanted) == len(stored) and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(stored.tolist(), wanted, strict=True)):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3_RULE}
    raise facts.refuse("the rotary frequency factors of the file follow no known rule")


def llama3_factors(theta: float, head_dim: int, factor: float) -> list[float]:
    """By how much each rotary frequency is divided: short waves by 1, long ones by `factor`, those between by a blend."""
    low, high, context = LLAMA3_RULE["low_freq_factor"], LLAMA3_RULE["high_freq_factor"], LLAMA3_RULE["original_max_position_embeddings"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        turns = context / wavelength  # in the original context
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(factor)
        else:
            blend = (turns - low) / (high - low)
            factors.append(1 / ((1 - blend) / factor + blend))
    return factors


def _plan(header: GgufHeader, family: _Family, config: dict[str, Any]) -> list[PlannedTensor]:
    """Every tensor of the file gets a name; names and shapes are then compared with what the architecture must hold."""
    from marlinctl.models.families import architecture

    planned: list[PlannedTensor] = []
    problems: list[Problem] = []
    where = str(header.path)
    expected = dict(architecture(config).expected)
    for tensor in header.tensors.values():
        if tensor.name == "rope_freqs.weight":
            continue
        found = _translate(tensor, family, config)
        shape = expected.pop(found.name, None) if found else None
        if found is None or shape is None:
            what = f"the tensor {shown(tensor.name)!r} has no place in a {family.model_type} model"
            problems.append(Problem(what, where, "use the model's safetensors folder instead"))
        elif tensor.shape != shape:
            what = f"{shown(tensor.name)} has shape {list(tensor.shape)}, {found.name} must have {list(shape)}"
            problems.append(Problem(what, where, "the file is damaged, or its metadata belong to another model"))
        else:
            planned.append(found)
    for name in expected:
        problems.append(Problem(f"the file holds no tensor for {name}", where, "the file is incomplete; download it again"))
    if problems:
        raise BadInput.from_problems("E320", problems[:100])
    return planned


def _translate(tensor: GgufTensor, family: _Family, config: dict[str, Any]) -> PlannedTensor | None:
    minus_one = family.norm_plus_one and tensor.name.endswith("norm.weight")
    if tensor.name in _TOP:
        return PlannedTensor(_TOP[tensor.name], tensor, minus_one=minus_one)
    match = re.fullmatch(r"blk\.(\d{1,5})\.([a-z_]+)\.(weight|bias)", tensor.name)
    if match is None or match[2] not in family.parts:
        return None
    heads = None
    if family.interleaved and match[2] in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
    return PlannedTensor(f"model.layers.{int(match[1])}.{family.parts[match[2]]}.{match[3]}", tensor, heads, minus_one)
