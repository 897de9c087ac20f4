"""What may stand in the quantization_config of a checkpoint: every key by name, and the values that are read exactly.

A key that a reader does not know looks like decoration and may change every product: an online Hadamard transform, a quantized cache,
columns in another order, an adapter. None of them shows in a tensor's name or shape. So the tables below name what is known; a key or a
value that is in none of them is refused with its name.

    exact     it decides what the codes mean, and marlinctl reads it so       num_bits, group_size, desc_act
    note      it says how the codes were found, or which tool wrote them      damp_percent, observer, version
    empty     it would change the model, and must say that it does not        transform_config, kv_cache_scheme, adapter

Names and values are those of compressed-tensors 0.20, GPTQModel 1 to 7, AutoGPTQ, optimum and AutoRound. What they add later is refused
until somebody has looked at what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from marlinctl.errors import Problem
from marlinctl.system.files import brief, shown


@dataclass(frozen=True, slots=True)
class _Key:
    """What a value must be. `why` is said where it is not: what the key would do."""

    fits: Callable[[object], bool]
    why: str = ""


def _anything(_: object) -> bool:
    return True


def _nothing(value: object) -> bool:
    """null, or an object or a list without entries."""
    return value is None or value in ({}, [])


def _null(value: object) -> bool:
    return value is None


def _off(value: object) -> bool:
    return value is None or value is False


def _flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _one_of(*allowed: str) -> Callable[[object], bool]:
    """One of these words in any case, or null. Programs that read it lower it first."""
    return lambda value: value is None or (isinstance(value, str) and value.lower() in allowed)


NOTE = _Key(_anything)
_SIXTEEN_BITS = _Key(lambda value: value is None or (type(value) is int and value >= 16), "its activations are quantized too")
_PER_LAYER = _Key(_nothing, "linears are named that are quantized otherwise")

CT_BLOCK: Mapping[str, _Key] = {
    "quant_method": NOTE,  # what brought us here
    "format": NOTE,  # ct_groups.py
    "config_groups": NOTE,  # CT_GROUP
    "ignore": NOTE,  # targets.py
    "quantization_status": _Key(_one_of("compressed", "frozen"), "its weights are not final"),
    "sparsity_config": NOTE,  # CT_SPARSITY
    "transform_config": _Key(
        lambda value: _nothing(value) or value == {"config_groups": {}}, "weights or activations are transformed when the model runs"
    ),
    "kv_cache_scheme": _Key(_null, "keys and values are quantized when the model runs"),
    "moe_sparsity_config": _Key(_nothing, "blocks have other numbers of experts than config.json says"),
    "global_compression_ratio": NOTE,
    "version": NOTE,
    "run_compressed": NOTE,
    "dequantize": NOTE,
    "use_optimized_inference": NOTE,
    "marlinctl": NOTE,  # our own provenance
}  # fmt: skip
CT_SPARSITY: Mapping[str, _Key] = {
    "format": _Key(_one_of("dense"), "save the model without sparse compression"),
    "targets": NOTE, "ignore": NOTE, "global_sparsity": NOTE, "sparsity_structure": NOTE, "registry_requires_subclass": NOTE,
}  # fmt: skip
CT_GROUP: Mapping[str, _Key] = {
    "targets": NOTE,
    "weights": NOTE,  # CT_WEIGHTS
    "input_activations": _Key(_null, "its activations are quantized too"),
    "output_activations": _Key(_null, "its outputs are quantized too"),
    "format": NOTE,  # ct_groups.py
}
CT_WEIGHTS: Mapping[str, _Key] = {
    "num_bits": NOTE, "type": NOTE, "symmetric": NOTE, "strategy": NOTE, "group_size": NOTE,  # registry.py reads these together
    "block_structure": _Key(_null, "scales of blocks are not read"),
    "dynamic": _Key(_off, "scales are found when the model runs"),
    "actorder": _Key(
        lambda value: value is False or _one_of("weight", "static")(value),
        "activation order at run time; quantize again with static order",
    ),
    "scale_dtype": _Key(
        lambda value: value is None or str(value).removeprefix("torch.") in ("float16", "bfloat16", "float32"), "such scales are not read"
    ),
    "zp_dtype": _Key(_text, "a symmetric weight has no zero point"),
    "observer": _Key(_text),
    "observer_kwargs": _Key(lambda value: value is None or isinstance(value, Mapping)),
}  # fmt: skip
CT_DYNAMIC: Mapping[str, _Key] = {  # activations that are rounded when the model runs
    "num_bits": _Key(lambda value: type(value) is int and value == 8, "only 8-bit activations are read"),
    "type": _Key(lambda value: isinstance(value, str) and value.lower() in ("int", "float"), "integers and FP8 are read"),
    "strategy": _Key(lambda value: isinstance(value, str) and value.lower() == "token", "only a scale for each token is read"),
    "dynamic": _Key(lambda value: value is True, "only scales that are found when the model runs are read"),
    "symmetric": _Key(lambda value: value is None or value is True, "only symmetric activations are read"),
    "group_size": _Key(_null, "only a scale for each token is read"),
    "block_structure": _Key(_null, "scales of blocks are not read"),
    "actorder": _Key(_null, "activations have no such order"),
    "scale_dtype": _Key(_null, "scales of activations are not rounded"),
    "zp_dtype": _Key(_text, "symmetric activations have no zero point"),
    "observer": _Key(_text),
    "observer_kwargs": _Key(lambda value: value is None or isinstance(value, Mapping)),
}  # fmt: skip

_GPTQ_NOTES = (
    # GPTQModel and AutoGPTQ: how the codes were found, and where
    "quant_method", "method", "meta", "quantizer", "uri", "version", "v2", "v2_alpha", "lm_head", "backend", "damp_percent",
    "damp_auto_increment", "static_groups", "true_sequential", "act_group_aware", "mse", "gptaq", "foem", "hessian", "failsafe", "fallback",
    "gc_mode", "pack_impl", "vram_strategy", "offload_to_disk", "offload_to_disk_path", "wait_for_submodule_finalizers",
    "auto_forward_data_parallel", "parallel_packing", "model_name_or_path", "model_file_base_name", "dynamic",
    # optimum and transformers
    "tokenizer", "dataset", "batch_size", "pad_token_id", "model_seqlen", "max_input_length", "block_name_to_quantize",
    "module_name_preceding_first_block", "modules_in_block_to_quantize", "cache_block_outputs", "use_cuda_fp16", "use_exllama",
    "disable_exllama", "exllama_config",
    # AutoRound
    "autoround_version", "provider", "iters", "lr", "minmax_lr", "nsamples", "seqlen", "amp", "low_gpu_mem_usage", "scale_dtype",
    "enable_quanted_input", "enable_minmax_tuning", "enable_norm_bias_tuning", "gradient_accumulate_steps", "to_quant_block_names",
    "quant_block_list", "supported_types", "act_group_size", "act_sym", "act_data_type", "act_dynamic",
    "marlinctl",
)  # fmt: skip
_PACK_DTYPE = _Key(_one_of("int32", "torch.int32"), "codes are read from 32-bit words")
_ADAPTER = _Key(_nothing, "an adapter is added to the linears when the model runs")
_GPTQ_LABEL = _Key(_one_of("gptq", "gptq_v2"), "gptq and gptq_v2 are read")
GPTQ_BLOCK: Mapping[str, _Key] = {
    **dict.fromkeys(_GPTQ_NOTES, NOTE),
    "bits": NOTE, "sym": NOTE, "group_size": NOTE,  # registry.py
    "desc_act": _Key(_flag, "true or false"),
    "checkpoint_format": _GPTQ_LABEL,
    "format": _GPTQ_LABEL,
    "is_marlin_format": _Key(_off, "the tiles of old MARLIN files are not read"),
    "pack_dtype": _PACK_DTYPE,
    "adapter": _ADAPTER,
    "data_type": _Key(_one_of("int"), "only integers are read"),
    "act_bits": _SIXTEEN_BITS,
    "extra_config": _PER_LAYER,
    "regex_config": _PER_LAYER,
}  # fmt: skip
GPTQ_RULE: Mapping[str, _Key] = {
    "bits": NOTE, "sym": NOTE, "group_size": NOTE,  # registry.py
    "desc_act": _Key(_flag, "true or false"),
    "pack_dtype": _PACK_DTYPE,
    "adapter": _ADAPTER,
    **dict.fromkeys(("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "act_group_aware", "mse", "hessian"), NOTE),
}  # fmt: skip
NATIVE_BLOCK: Mapping[str, _Key] = dict.fromkeys(
    ("quant_method", "format", "format_version", "bits", "group_size", "overrides", "marlinctl"), NOTE
)
NATIVE_ROUNDED_BLOCK: Mapping[str, _Key] = {  # rounding.py
    **NATIVE_BLOCK,
    **dict.fromkeys(("activations", "activation_group", "sixteen_bit_activations"), NOTE),
}

# What a tensor of a linear is called that some quantizer wrote, in any format. One whose linear is not packed belongs to something else.
QUANTIZER_SUFFIXES = frozenset(
    (
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale", "weight_scale_inv"),
        *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
        *("qweight", "qzeros", "scales", "g_idx", "B_24", "B_meta"),
    )
)


def strange(block: Mapping[str, object], known: Mapping[str, _Key], path: str) -> list[Problem]:
    """One problem for each key of `block` that is in no table, or whose value is not one that is read. `path`: where the block stands."""
    fix = "quantize the original model with marlinctl; a key that only notes how the codes were made can be removed from config.json"
    problems = []
    for key, value in block.items():
        where = f"config.json: {path}.{shown(str(key), 60)}"
        if key not in known:
            what = f"{shown(str(key), 60)} is not a known key, and it may change what the model computes; it is {brief(value)}"
            problems.append(Problem(what, where, fix))
        elif not known[key].fits(value):
            problems.append(Problem(f"{key} is {brief(value)}: {known[key].why or 'not a value that is read'}", where, fix))
    return problems


def reason(block: Mapping[str, object], known: Mapping[str, _Key]) -> str | None:
    """The first of `strange` as half a sentence, for a problem that is told of a linear; None where all is known."""
    for key, value in block.items():
        if key not in known:
            return f"its scheme has the unknown key {shown(str(key), 60)} ({brief(value)})"
        if not known[key].fits(value):
            return f"{key} {brief(value)}: {known[key].why or 'not a value that is read'}"
    return None


def missing(block: Mapping[str, object], known: Mapping[str, _Key]) -> str | None:
    """The first key that has no value and needs one, as half a sentence."""
    return next((f"{key} is not said" for key, entry in known.items() if key not in block and not entry.fits(None)), None)
