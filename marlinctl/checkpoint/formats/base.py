"""The checkpoint formats as names, shapes and config blocks: what is written for one linear, and how to read it back.

For a linear P with weight [N, K], group size g and G = K / g groups (G = 1 when one group spans the row):

    dense    P.weight         [N, K]          float    no quantization_config
    ct       P.weight_packed  [N, K/8 up]     int32    compressed-tensors `pack-quantized`: what vLLM, SGLang and transformers load
             P.weight_scale   [N, G]          float
             P.weight_shape   [2] = [N, K]    int64    transformers fails without it
    gptq     P.qweight        [K/8, N]        int32    GPTQ v1: GPTQModel and its relatives, vLLM, SGLang
             P.qzeros         [G, N/8]        int32    every nibble 7 (v1 stores zero - 1); GPTQModel loads garbage without it
             P.scales         [G, N]          fp16
             P.g_idx          [K]             int32    k // g; optimum reads uninitialised memory without it
    marlin   P.B              [K'/16, 2N']    int32    our own kernels; N', K' are N, K padded to multiples of 64
             P.s              [G', N']        fp16     in MARLIN order
             P.weight_shape   [2] = [N, K]    int64    the true sizes
    marlin_24  P.B_24         [K'/32, 2N']    int32    the same for 2:4: survivors only
             P.B_meta         [K'/32, 2N']    int16    where in their quads they were
             P.s, P.weight_shape                       as marlin, scales in Sparse-MARLIN order

In all but the last, the survivors of a 2:4 model lie in a file of their own (checkpoint/mask.py). A bias stays P.bias everywhere.
The layouts inside a word are functions in marlinctl/pack/tile.py. Everything here except the three functions that touch tensors works
from config.json and tensor names alone, without torch.

Three fields look like decoration and are not: without `quantization_status: compressed` transformers loads random numbers and says
nothing, without `qzeros` GPTQModel does, and v1 tensors under a v2 label (or the reverse) are off by one step everywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import blocks
from marlinctl.checkpoint.formats.targets import Entries, GroupOf, name_patterns, with_fused_names
from marlinctl.errors import BadInput, Problem
from marlinctl.system.files import brief
from marlinctl.system.patterns import Expressions

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.mask import Masks
    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.quantize.types import QuantizedLinear

WRITABLE = ("ct", "gptq", "marlin", "marlin_24", "dense")
NATIVE = ("marlin", "marlin_24")  # quant_method marlinctl
_AGAIN = "fetch or write the checkpoint again"
_BLOCK = "quantization_config"
FORMAT_VERSION = 1  # of native folders; a higher one was written by a newer marlinctl

# The tensors of one quantized linear; the first one marks a linear as quantized.
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "dense": ("weight",),
    "ct": ("weight_packed", "weight_scale", "weight_shape"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "marlin": ("B", "s", "weight_shape"),
    "marlin_24": ("B_24", "B_meta", "s", "weight_shape"),
}


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """What config.json and the tensor names say a checkpoint is."""

    name: str  # "dense", "ct", "gptq", "marlin" or "marlin_24"
    bits: int  # 4, or 16 for dense
    layers: Mapping[str, int] = field(default_factory=dict)  # quantized linears -> group size; -1 is one group for the whole row
    variant: str = ""  # gptq: "v1" or "v2"

    @property
    def group_size(self) -> int | None:
        """The group size of most layers; None for a dense model."""
        return sizes_by_count(self.layers)[0] if self.layers else None


def weight_files(fmt: str) -> str:
    """How the shards are called: native folders must not look like a model that plain transformers can load."""
    return "marlin" if fmt in NATIVE else "model"


@dataclass(frozen=True, slots=True)
class LinearParts:
    """One linear as it lies on disk, unpacked: scales keep the dtype they had, which QuantizedLinear need not be able to hold."""

    codes: Tensor  # [N, K] int8
    scales: Tensor  # [N, G] float16, bfloat16 or float32
    group_size: int  # K when one group spans the row
    keep: Tensor | None = None  # [N, K] bool, the survivors of a 2:4 linear; None: dense, or nobody says

    def weight(self) -> Tensor:
        """[N, K] float32: the weight that every runtime must compute with. Exact."""
        import torch

        n, k = self.codes.shape
        steps = self.scales.to(torch.float32).unsqueeze(-1)  # [N, G, 1]
        return (self.codes.to(torch.float32).reshape(n, -1, self.group_size) * steps).reshape(n, k)

    def quantized(self, layer: str) -> QuantizedLinear:
        """With fp16 scales, as every packed format but ct needs them; refused where that would change a value."""
        import torch

        from marlinctl.quantize.types import QuantizedLinear
        from marlinctl.sparsify.types import SparseQuantizedLinear

        scales = self.scales.to(torch.float16)
        wrong = scales.to(torch.float32) != self.scales.to(torch.float32)
        if bool(wrong.any()):
            row, group = (int(i) for i in wrong.nonzero()[0])
            raise BadInput(
                "E344",
                f"{layer}: its {str(self.scales.dtype).removeprefix('torch.')} scales have no exact float16 form "
                f"({int(wrong.sum())} of {wrong.numel()}; the first is {float(self.scales[row, group]):.9g})",
                where=f"{layer}, row {row}, group {group}",
                fix="pack to ct, which keeps the scales as they are, or quantize the original model again with marlinctl",
            )
        if self.keep is not None:
            return SparseQuantizedLinear(self.codes, scales, self.group_size, self.keep)
        return QuantizedLinear(self.codes, scales, self.group_size)


# ---- what a checkpoint is ------------------------------------------------------------------------------------------------------------


def detect(config: Mapping[str, Any], tensor_names: Iterable[str]) -> FormatInfo:
    """Tell the format from config.json and the tensor names. BadInput for anything marlinctl cannot read exactly."""
    names = list(tensor_names)
    block = quantization_block(config)
    if block is None:
        return _dense(names)
    method = block.get("quant_method", "compressed-tensors" if "config_groups" in block else None)
    try:
        if method == "compressed-tensors":
            return _detect_ct(block, names)
        if method in ("gptq", "gptq_marlin", "auto_gptq"):
            return _detect_gptq(block, names)
        if method == "marlinctl":
            return _detect_native(block, names)
    except ValueError as problem:
        raise _unreadable(str(problem), "restore quantization_config from the original") from None
    raise _unreadable(
        f"the model is quantized with {method!r}, which marlinctl does not read",
        "use compressed-tensors pack-quantized or GPTQ, 4-bit symmetric, or quantize the original 16-bit model",
    )


def quantization_block(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The one block of config.json that says how the weights are quantized; None for a dense model.

    BadInput E340 where it is not an object, or where a second one says something else: which of the two a client follows is its own choice.
    """
    found = {key: config[key] for key in ("quantization_config", "compression_config") if config.get(key)}
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in found and value.get("quantization_config"):
            found[f"{key}.quantization_config"] = value["quantization_config"]
    if not found:
        return None
    (key, block), *others = found.items()
    if any(other != block for _, other in others):
        raise _unreadable(f"{key} and {others[0][0]} say different things", "keep the one that belongs to the weights, remove the other")
    if not isinstance(block, Mapping):
        raise _unreadable(f"{key} is not an object", "write it again, or fetch config.json again")
    return block


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the model without a word about how its weights were quantized."""
    own = ("quantization_config", "compression_config")
    return {
        key: {k: v for k, v in value.items() if k != "quantization_config"} if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in own
    }


def sizes_by_count(layers: Mapping[str, int]) -> list[int]:
    """Group sizes, the most frequent first; among equals the smaller, so that the order of the layers does not matter."""
    counts = Counter(layers.values())
    return sorted(counts, key=lambda size: (-counts[size], size))


def layer_names(names: Iterable[str], fmt: str) -> list[str]:
    """The linears that this format's marking tensor names."""
    ending = "." + SUFFIXES[fmt][0]
    return [name.removesuffix(ending) for name in names if name.endswith(ending)]


def sixteen_bit_linears(shapes: Mapping[str, Sequence[int]], layers: Iterable[str]) -> list[str]:
    """Every linear that stays 16-bit, by module name: skipped layers, routers, and lm_head, which exists as a module even where it is tied.

    They must be named in the config: clients take every nn.Linear that is not ignored for a packed one. Told by shape and name, since it
    must work for models that are not in the table of architectures: a matrix called P.weight that is no embedding.
    """
    quantized = set(layers)
    names = [name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
    names = [name for name in names if name not in quantized and not re.search(r"embed|wte$|wpe$", name.rpartition(".")[2])]
    return sorted({*names, *({"lm_head"} - quantized)})


def _dense(names: Sequence[str]) -> FormatInfo:
    for fmt in ("ct", "gptq", *NATIVE):
        packed = layer_names(names, fmt)
        if packed:
            raise _unreadable(
                f"tensors such as {packed[0]}.{SUFFIXES[fmt][0]} are packed, but config.json has no quantization_config",
                "restore quantization_config in config.json (older GPTQ models keep it in quantize_config.json)",
            )
    return FormatInfo("dense", 16)


def _detect_ct(block: Mapping[str, Any], names: Sequence[str]) -> FormatInfo:
    if block.get("format") != "pack-quantized":
        raise _unreadable(f"compressed-tensors format {block.get('format')!r} is not pack-quantized", "only 4-bit pack-quantized is read")
    groups = block.get("config_groups")
    usable = isinstance(groups, Mapping) and all(isinstance(g, Mapping) and isinstance(g.get("targets"), list) for g in groups.values())
    if not isinstance(groups, Mapping) or not usable:
        raise _unreadable("config_groups is missing or has a group without targets", "restore quantization_config from the original")
    sparsity = blocks.strange(_object(block, "sparsity_config"), blocks.CT_SPARSITY, f"{_BLOCK}.sparsity_config")
    _refuse("E340", [*blocks.strange(block, blocks.CT_BLOCK, _BLOCK), *sparsity])
    group_of = GroupOf({name: [str(t) for t in group["targets"]] for name, group in groups.items()})
    ignore = block.get("ignore") or []
    if not isinstance(ignore, list):
        raise ValueError("ignore is not a list")
    Entries(str(entry) for entry in ignore)  # an expression that is none is refused here, once
    reasons = {name: _ct_reason(group) for name, group in groups.items()}
    fix = "only 4-bit symmetric integer weights are read"
    layers: dict[str, int] = {}
    problems: list[Problem] = []
    used = set()
    for layer in layer_names(names, "ct"):
        group = group_of(layer)
        if group is None:
            what = f"{layer} is packed but no config group names it"
            problems.append(Problem(what, "config.json: config_groups", "add it to a group's targets"))
            continue
        used.add(group)
        if reasons[group]:
            problems.append(Problem(f"{layer}: {reasons[group]}", f"config.json: config_groups.{group}", fix))
        layers[layer] = _ct_group_size(groups[group])
    problems += [
        Problem(f"{name}: {reason}", f"config.json: config_groups.{name}", fix)
        for name, reason in reasons.items()
        if reason and name not in used
    ]
    problems += [
        Problem(f"{name} is a zero point: asymmetric quantization", name, "quantize the original model symmetrically")
        for name in names
        if name.endswith(".weight_zero_point")
    ]
    _refuse("E341", problems or _strays("ct", layers, names))
    return FormatInfo("ct", 4, layers)


def _ct_reason(group: Mapping[str, Any]) -> str | None:
    """Why a config group is not 4-bit symmetric weight-only, or None."""
    weights = _object(group, "weights")
    if weights.get("num_bits") != 4 or str(weights.get("type", "int")).lower() != "int":
        return f"{weights.get('num_bits')}-bit {weights.get('type', 'int')}"
    if weights.get("symmetric", True) is not True:
        return "asymmetric"
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if isinstance(strategy, str):
        strategy = strategy.lower()
    if strategy is None and size is not None:  # compressed-tensors derives the strategy from the size, and no size means one scale for all
        strategy = "channel" if size == -1 else "group"
    if strategy == "group" and not (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return f"strategy group with group_size {size!r}"
    if strategy == "channel" and size not in (None, -1):
        return f"strategy channel with group_size {size!r}"
    if strategy not in ("group", "channel"):
        return f"strategy {strategy!r}"
    return blocks.reason(group, blocks.CT_GROUP) or blocks.reason(weights, blocks.CT_WEIGHTS)


def _ct_group_size(group: Mapping[str, Any]) -> int:
    weights = _object(group, "weights")
    size = weights.get("group_size")
    return int(size) if isinstance(size, int) and size > 0 and str(weights.get("strategy")).lower() != "channel" else -1


def _detect_gptq(block: Mapping[str, Any], names: Sequence[str]) -> FormatInfo:
    label = block.get("checkpoint_format", block.get("format", "gptq"))
    problems = []
    if label not in ("gptq", "gptq_v2") or block.get("is_marlin_format"):
        what = f"GPTQ checkpoint_format {label!r} is not read"
        problems.append(Problem(what, "config.json: checkpoint_format", "gptq and gptq_v2 are read"))
    if block.get("bits") != 4:
        problems.append(Problem(f"{block.get('bits')!r}-bit GPTQ is not read", "config.json: bits", "only 4 bits are read"))
    if block.get("sym", True) is not True:
        problems.append(Problem("asymmetric GPTQ is not read", "config.json: sym", "quantize the original model symmetrically"))
    _refuse("E342", problems)
    size, dynamic = _size(block.get("group_size", -1)), _object(block, "dynamic")
    _refuse("E340", [*blocks.strange(block, blocks.GPTQ_BLOCK, _BLOCK), *_strange_rules(dynamic)])
    present = set(names)
    rule_of = _DynamicRules(dynamic)
    layers: dict[str, int] = {}
    for layer in layer_names(names, "gptq"):
        rule = rule_of(layer)
        if rule is None:
            what = f"{layer} is packed, and a rule of `dynamic` says that it is not quantized"
            problems.append(Problem(what, "config.json: dynamic", "config.json belongs to another model; restore it"))
            continue
        if rule.get("bits", 4) != 4 or rule.get("sym", True) is not True:
            problems.append(Problem(f"{layer}: {rule} is not 4-bit symmetric", "config.json: dynamic", "only 4-bit symmetric is read"))
        if rule.get("desc_act", block.get("desc_act")) and f"{layer}.g_idx" not in present:
            what = f"{layer}: desc_act is true, and without {layer}.g_idx the order of its columns is unknown"
            problems.append(Problem(what, "config.json: desc_act", "fetch the checkpoint again, or quantize the original model"))
        layers[layer] = _size(rule.get("group_size", size))
    _refuse("E342", problems or _strays("gptq", layers, names))
    return FormatInfo("gptq", 4, layers, "v2" if label == "gptq_v2" else "v1")


class _DynamicRules:
    """GPTQModel's `dynamic`: the first rule whose expression matches a layer. One that begins with "-:" takes its linears out."""

    def __init__(self, dynamic: Mapping[str, Any]) -> None:
        self._rules: list[Mapping[str, Any] | None] = [None if pattern.startswith("-:") else rule for pattern, rule in dynamic.items()]
        self._expressions = Expressions(pattern.removeprefix("+:").removeprefix("-:") for pattern in dynamic)

    def __call__(self, layer: str) -> Mapping[str, Any] | None:
        """None for a rule that takes the layer out."""
        found = self._expressions.first(layer)
        return {} if found is None else self._rules[found]


def _strange_rules(dynamic: Mapping[str, Any]) -> list[Problem]:
    """What is not known in the rules of GPTQModel's `dynamic`. A rule that begins with "-:" takes its linears out, whatever it holds."""
    problems: list[Problem] = []
    for pattern, rule in dynamic.items():
        path = f"{_BLOCK}.dynamic.{pattern}"
        if pattern.startswith("-:"):
            continue
        if isinstance(rule, Mapping):
            problems += blocks.strange(rule, blocks.GPTQ_RULE, path)
        else:
            what = f"the rule is {brief(rule)}, not an object"
            problems.append(Problem(what, f"config.json: {path}", "restore it from the original"))
    return problems


def _strays(fmt: str, layers: Mapping[str, int], names: Iterable[str]) -> list[Problem]:
    """Tensors below a packed linear that its format has no place for, and those that a quantizer wrote for a linear that is not packed.

    Copied along as "untouched" they would be lost or misread: an order of columns, a scale of activations, another format beside this one.
    """
    if not layers:
        return []  # config.json is of another model altogether, which is said as such (folder.py)
    own = {*SUFFIXES[fmt], "bias"}
    fix = "the model was quantized in a way that marlinctl does not read; quantize the original model with marlinctl"
    problems = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if parent in layers:
            if leaf not in own:
                problems.append(Problem(f"{name} belongs to a packed linear, and {fmt} has no such tensor", name, fix))
        elif leaf in blocks.QUANTIZER_SUFFIXES:
            problems.append(Problem(f"{name} belongs to a quantized linear, and {parent} is not packed as {fmt}", name, fix))
        elif any(above in layers for above in _above(parent)):
            problems.append(Problem(f"{name} lies below a packed linear, and {fmt} has no such tensor", name, fix))
    return problems


def _above(name: str) -> Iterator[str]:
    """a.b.c -> a.b, a"""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _detect_native(block: Mapping[str, Any], names: Sequence[str]) -> FormatInfo:
    version = block.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _unreadable(f"format_version {version!r} is not a version", "write the folder again with `marlinctl pack --format marlin`")
    if version > FORMAT_VERSION:
        raise BadInput(
            "E343",
            f"this native checkpoint has format_version {version}; this marlinctl reads up to {FORMAT_VERSION}",
            where="config.json: quantization_config.format_version",
            fix="update marlinctl, or pack the model again to ct with the version that wrote it",
        )
    fmt = block.get("format")
    if fmt not in NATIVE or block.get("bits") != 4:
        what = f"native format {fmt!r} with {block.get('bits')!r} bits is not read"
        raise _unreadable(what, f"only {' and '.join(NATIVE)} with 4 bits are")
    other = next(iter(layer_names(names, "marlin_24" if fmt == "marlin" else "marlin")), None)
    if other is not None:
        raise _unreadable(
            f"config.json says {fmt}, but {other} is packed the other way", "config.json belongs to another model; restore it"
        )
    _refuse("E340", blocks.strange(block, blocks.NATIVE_BLOCK, _BLOCK))
    overrides, size = _object(block, "overrides"), block.get("group_size", -1)
    layers = {layer: _size(overrides.get(layer, size)) for layer in layer_names(names, fmt)}
    _refuse("E340", _strays(fmt, layers, names))
    return FormatInfo(fmt, 4, layers)


def _object(block: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """block[key], which must be an object; absent and null are an empty one."""
    value = block.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key} is not an object")
    return value or {}


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ValueError(f"group_size {value!r} is neither a positive number nor -1 (whole rows)")
    return value


def _unreadable(what: str, fix: str) -> BadInput:
    return BadInput("E340", what, where="config.json: quantization_config", fix=fix)


def _refuse(error_id: str, problems: Sequence[Problem]) -> None:
    if problems:
        raise BadInput.from_problems(error_id, problems)


# ---- the config block ----------------------------------------------------------------------------------------------------------------


def quantization_config(
    fmt: str,
    layers: Mapping[str, int],  # layer name -> group size, -1 for whole rows
    ignore: Sequence[str] = (),  # every nn.Linear that stays 16-bit: lm_head, skipped layers, routers
    provenance: Mapping[str, Any] | None = None,  # goes under the key "marlinctl", which clients ignore
) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    majority = sizes_by_count(layers)[0]
    differing = {name: size for name, size in layers.items() if size != majority}
    everything = [*layers, *ignore]
    block: dict[str, Any]
    if fmt == "ct":
        block = _ct_block(layers, everything, ignore)
    elif fmt == "gptq":
        block = {"quant_method": "gptq", "bits": 4, "group_size": majority, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
        block |= {"format": "gptq", "pack_dtype": "int32", "lm_head": "lm_head" in layers}
        dynamic = _dynamic_block(differing, [name for name in ignore if name != "lm_head"], everything)
        block |= {"dynamic": dynamic} if dynamic else {}
    elif fmt in NATIVE:
        block = {"quant_method": "marlinctl", "format": fmt, "format_version": FORMAT_VERSION, "bits": 4, "group_size": majority}
        block |= {"overrides": differing} if differing else {}
    else:
        raise ValueError(f"no config block for format {fmt!r}")
    return block | ({"marlinctl": dict(provenance)} if provenance else {})


def _ct_block(layers: Mapping[str, int], everything: Sequence[str], ignore: Sequence[str]) -> dict[str, Any]:
    """One config group for each group size.

    NOTE: with several sizes no group may say "Linear". compressed-tensors prefers a layer's own name to its class, but vLLM asks for the
    class before it asks for the shards of a fused linear, so qkv_proj (a QKVParallelLinear) would get the group that says "Linear".
    transformers' default mode follows the groups; its `dequantize=True` (5.23) takes the first group for every linear, and stops.
    """
    sizes = sizes_by_count(layers)
    groups = {}
    for i, size in enumerate(sizes):
        chosen = [name for name, s in layers.items() if s == size]
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "channel", "group_size": None} if size == -1 else {"strategy": "group", "group_size": size}
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(sizes) == 1 else name_patterns(chosen, everything),
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",  # without it transformers fills the layers with random numbers and says nothing
        "config_groups": groups,
        "ignore": name_patterns(ignore, everything),
    }


def _dynamic_block(differing: Mapping[str, int], skipped: Sequence[str], everything: Sequence[str]) -> dict[str, Any]:
    """GPTQModel's per-module rules. Servers match them after fusing q/k/v and gate/up, hence the fused names."""

    def rules(sign: str, names: Sequence[str], rule: dict[str, Any]) -> dict[str, Any]:
        patterns = name_patterns(with_fused_names(names), with_fused_names(everything))
        return {f"{sign}:{p[3:] if p.startswith('re:') else '^' + re.escape(p) + '$'}": rule for p in patterns}

    block: dict[str, Any] = {}
    for size in sorted(set(differing.values())):
        block |= rules("+", [name for name, s in differing.items() if s == size], {"group_size": size})
    return block | rules("-", skipped, {})


# ---- the tensors of one linear -------------------------------------------------------------------------------------------------------


def linear_shapes(fmt: str, n: int, k: int, group_size: int) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Suffix -> (allowed dtypes, shape) of what a linear [n, k] consists of on disk."""
    groups = 1 if group_size == -1 else -(-k // group_size)
    floats = ("F16", "BF16", "F32")
    if fmt == "dense":
        return {"weight": (floats, (n, k))}
    if fmt == "ct":
        return {"weight_packed": (("I32",), (n, -(-k // 8))), "weight_scale": (floats, (n, groups)), "weight_shape": (("I64", "I32"), (2,))}
    if fmt == "gptq":
        return {
            "qweight": (("I32",), (k // 8, n)),
            "qzeros": (("I32",), (groups, n // 8)),
            "scales": (floats, (groups, n)),
            "g_idx": (("I32", "I64"), (k,)),
        }
    padded_n, padded_k = -(-n // 64) * 64, -(-k // 64) * 64
    padded_groups = 1 if groups == 1 else -(-padded_k // group_size)
    common = {"s": (("F16",), (padded_groups, padded_n)), "weight_shape": (("I64",), (2,))}
    if fmt == "marlin":
        return {"B": (("I32",), (padded_k // 16, 2 * padded_n)), **common}
    return {"B_24": (("I32",), (padded_k // 32, 2 * padded_n)), "B_meta": (("I16",), (padded_k // 32, 2 * padded_n)), **common}


_DTYPE_BYTES = {"I64": 8, "F32": 4, "I32": 4}  # of what marlinctl writes; the others have two


def linear_bytes(fmt: str, n: int, k: int, group_size: int) -> int:
    """Bytes of the tensors that marlinctl writes for a linear [n, k]."""
    return sum(prod(shape) * _DTYPE_BYTES.get(dtypes[0], 2) for dtypes, shape in linear_shapes(fmt, n, k, group_size).values())


def misfits(shapes: Mapping[str, tuple[int, int]], targets: Sequence[str]) -> list[Problem]:
    """Linears (name -> (N, K)) that a target format cannot hold."""
    if "gptq" not in targets:
        return []
    return [
        Problem(f"{layer}: GPTQ needs N and K in multiples of 8, this linear is [{n}, {k}]", layer, "pack to ct or marlin")
        for layer, (n, k) in shapes.items()
        if n % 8 or k % 8
    ]


_RANKS = {"weight_shape": 1, "g_idx": 1}  # all others are matrices


def _check_ranks(checkpoint: Checkpoint, layer: str, suffixes: Iterable[str]) -> None:
    for suffix in suffixes:
        shape = checkpoint.tensors[f"{layer}.{suffix}"].shape
        if len(shape) != _RANKS.get(suffix, 2) or 0 in shape:
            raise ValueError(f"{suffix} has shape {list(shape)}")


def layer_shape(checkpoint: Checkpoint, info: FormatInfo, layer: str) -> tuple[int, int]:
    """(N, K) of a packed linear: from the header where it says so, else from weight_shape. Reads sixteen bytes, no torch."""
    name = f"{layer}.{'qweight' if info.name == 'gptq' else 'weight_shape'}"
    if name not in checkpoint.tensors:
        raise BadInput("E345", f"{name} is missing", where=str(checkpoint.folder), fix=_AGAIN)
    tensor = checkpoint.tensors[name]
    if info.name == "gptq" and len(tensor.shape) == 2:
        return tensor.shape[1], 8 * tensor.shape[0]
    if info.name == "gptq" or tensor.dtype not in ("I64", "I32") or tuple(tensor.shape) != (2,):
        raise BadInput("E346", f"{name} is {tensor.dtype} {list(tensor.shape)}", where=str(tensor.file), fix=_AGAIN)
    data = bytes(checkpoint.raw(name))
    width = len(data) // 2
    n, k = (int.from_bytes(data[i * width : (i + 1) * width], "little", signed=True) for i in range(2))
    return n, k


def linear_tensors(fmt: str, layer: str, q: QuantizedLinear | LinearParts) -> dict[str, Tensor]:
    """What is written for one layer, by full tensor name. ct takes the scales as they are, the others need them exact in fp16.

    marlin_24 needs a mask: `q` is a SparseQuantizedLinear, or parts with `keep`. The other formats have no place for one.
    """
    import torch

    from marlinctl.pack.interchange import pack_ct, pack_gptq
    from marlinctl.pack.marlin import pack_marlin
    from marlinctl.pack.sparse_marlin import pack_sparse_marlin
    from marlinctl.sparsify.types import SparseQuantizedLinear

    shape = torch.tensor(q.codes.shape, dtype=torch.int64)
    if fmt == "ct":
        parts = {"weight_packed": pack_ct(q.codes), "weight_scale": q.scales, "weight_shape": shape}
        return {f"{layer}.{suffix}": tensor.contiguous() for suffix, tensor in parts.items()}
    exact = LinearParts(q.codes, q.scales, q.group_size, getattr(q, "keep", None)).quantized(layer)
    if fmt == "gptq":
        parts = pack_gptq(exact)
    elif fmt == "marlin":
        packed = pack_marlin(exact)
        parts = {"B": packed.qweight, "s": packed.scales, "weight_shape": shape}
    elif fmt == "marlin_24":
        if not isinstance(exact, SparseQuantizedLinear):
            raise ValueError(f"{layer} has no mask, so it cannot be written as marlin_24")
        sparse = pack_sparse_marlin(exact)
        parts = {"B_24": sparse.qweight, "B_meta": sparse.meta, "s": sparse.scales, "weight_shape": shape}
    else:
        raise ValueError(f"format {fmt!r} has no packed tensors")
    return {f"{layer}.{suffix}": tensor.contiguous() for suffix, tensor in parts.items()}


def read_parts(checkpoint: Checkpoint, fmt: FormatInfo, layer: str, masks: Masks | None = None) -> LinearParts:
    """One layer from disk, unpacked, scales in their own dtype; with its mask, if metadata or `masks` has one. BadInput names the layer."""
    present = [suffix for suffix in SUFFIXES[fmt.name] if f"{layer}.{suffix}" in checkpoint.tensors]
    needed = [suffix for suffix in SUFFIXES[fmt.name] if suffix != "g_idx"]  # old GPTQ files lack it, which means plain order
    missing = [f"{layer}.{suffix}" for suffix in needed if suffix not in present]
    if missing:
        raise BadInput.from_problems("E345", [Problem(f"{name} is missing", str(checkpoint.folder), _AGAIN) for name in missing])
    try:
        _check_ranks(checkpoint, layer, present)
        tensors = {suffix: checkpoint.read(f"{layer}.{suffix}") for suffix in present}
        parts = _UNPACK[fmt.name](tensors, fmt.layers[layer], fmt.variant)
    except ValueError as problem:
        raise BadInput(
            "E346",
            f"{layer}: {problem}",
            where=str(checkpoint.tensors[f"{layer}.{SUFFIXES[fmt.name][0]}"].file),
            fix=_UNPACK_FIX.get(fmt.name, "the file is damaged or its config.json belongs to another model; fetch or write it again"),
        ) from problem
    if masks is None or layer not in masks:
        return parts
    return replace(parts, keep=masks.checked_keep(layer, parts.codes))


def read_linear(checkpoint: Checkpoint, fmt: FormatInfo, layer: str) -> QuantizedLinear:
    """One layer from disk with fp16 scales; refused where foreign scales are not exact in fp16."""
    return read_parts(checkpoint, fmt, layer).quantized(layer)


_UNPACK_FIX = {
    "gptq": "activation order at run time and zero points other than 8 are not read; quantize the original model again, "
    "symmetric and with static order (desc_act false)"
}


def _true_shape(tensor: Tensor) -> tuple[int, int]:
    if tensor.is_floating_point() or tuple(tensor.shape) != (2,):
        raise ValueError(f"weight_shape must hold two whole numbers, it is {tensor.dtype} {list(tensor.shape)}")
    n, k = (int(size) for size in tensor)
    if n < 1 or k < 1:
        raise ValueError(f"weight_shape says [{n}, {k}]")
    return n, k


def _group_size(configured: int, k: int, groups: int) -> int:
    """The true group size, after config and scales were found to agree."""
    size = k if configured == -1 else configured
    if k % size or k // size != groups:
        raise ValueError(f"config.json says group_size {configured} for K={k}, but there are {groups} groups of scales")
    return size


def _check_scales(scales: Tensor, rows: int) -> None:
    import torch

    if not scales.is_floating_point() or scales.ndim != 2 or scales.shape[0] != rows:
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}, expected float [{rows}, G]")
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("scales hold NaN or infinity")


def _unpack_ct(tensors: Mapping[str, Tensor], group_size: int, variant: str) -> LinearParts:
    from marlinctl.pack.interchange import unpack_ct

    n, k = _true_shape(tensors["weight_shape"])
    scales = tensors["weight_scale"]
    _check_scales(scales, n)
    return LinearParts(unpack_ct(tensors["weight_packed"], n, k), scales, _group_size(group_size, k, int(scales.shape[1])))


def _unpack_gptq(tensors: Mapping[str, Tensor], group_size: int, variant: str) -> LinearParts:
    import torch

    from marlinctl.pack.interchange import unpack_gptq

    qweight, qzeros, scales = (tensors[suffix] for suffix in ("qweight", "qzeros", "scales"))
    k, n = qweight.shape[0] * 8, qweight.shape[-1]
    _check_scales(scales.T, n)
    # The codes do not depend on the scales; foreign ones may be of a dtype that QuantizedLinear does not hold.
    q = unpack_gptq(qweight, qzeros, torch.ones_like(scales, dtype=torch.float16), tensors.get("g_idx"), v2=variant == "v2")
    return LinearParts(q.codes, scales.T.contiguous(), _group_size(group_size, k, int(scales.shape[0])))


def _native_sizes(fmt: str, tensors: Mapping[str, Tensor], group_size: int) -> tuple[int, int, int]:
    """(N, K, group size) of a native linear whose tensors have the shapes that these ask for."""
    n, k = _true_shape(tensors["weight_shape"])
    for suffix, (_, shape) in linear_shapes(fmt, n, k, group_size).items():
        if tuple(tensors[suffix].shape) != shape:
            raise ValueError(f"{suffix} has shape {tuple(tensors[suffix].shape)}, expected {shape} for [{n}, {k}]")
    return n, k, k if group_size == -1 else group_size


def _unpack_marlin(tensors: Mapping[str, Tensor], group_size: int, variant: str) -> LinearParts:
    from marlinctl.pack.marlin import unpack_marlin
    from marlinctl.pack.types import PackedLinear

    sizes = _native_sizes("marlin", tensors, group_size)
    q = unpack_marlin(PackedLinear(tensors["B"], tensors["s"], *sizes))
    return LinearParts(q.codes, q.scales, q.group_size)


def _unpack_marlin_24(tensors: Mapping[str, Tensor], group_size: int, variant: str) -> LinearParts:
    from marlinctl.pack.sparse_marlin import unpack_sparse_marlin
    from marlinctl.pack.types import PackedSparseLinear

    sizes = _native_sizes("marlin_24", tensors, group_size)
    q = unpack_sparse_marlin(PackedSparseLinear(tensors["B_24"], tensors["B_meta"], tensors["s"], *sizes))
    return LinearParts(q.codes, q.scales, q.group_size, q.keep)


_UNPACK = {"ct": _unpack_ct, "gptq": _unpack_gptq, "marlin": _unpack_marlin, "marlin_24": _unpack_marlin_24}
