"""`ct`: compressed-tensors `pack-quantized`, what vLLM, SGLang and transformers load. marlinctl's interchange form.

    P.weight_packed  [N, K/8 up]     int32    of 8-bit codes [N, K/4 up]
    P.weight_scale   [N, G]          float    of any float dtype, as they were solved or found
    P.weight_shape   [2] = [N, K]    int64    transformers fails without it
    P.weight_zero_point  [N/8 up, G] int32    of asymmetric codes; eight neighbours in N a word

Without `quantization_status: compressed` transformers loads random numbers and says nothing.
docs/formats/compressed-tensors.md has the bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import blocks
from marlinctl.checkpoint.formats.base import (
    BLOCK,
    CODES,
    FLOATS,
    INDICES,
    MARLINCTL,
    SCALES,
    SGLANG,
    TRANSFORMERS_CT,
    VLLM,
    Chosen,
    Format,
    FormatInfo,
    LinearParts,
    Packed,
    Shapes,
    check_scales,
    codes_of,
    is_head,
    kind_text,
    kinds_by_count,
    object_at,
    refuse,
    strays,
    true_group_size,
    true_shape,
    unreadable,
)  # fmt: skip
from marlinctl.checkpoint.formats.targets import Entries, GroupOf, name_patterns
from marlinctl.errors import Problem
from marlinctl.models.config import language_model_type
from marlinctl.quantize.scheme import INT4, INT8, UINT4, Grid

if TYPE_CHECKING:
    from torch import Tensor

_MIXTRAL = ("w1", "w2", "w3")


def _detect(block: Mapping[str, Any], names: Sequence[str]) -> FormatInfo:
    if block.get("format") != "pack-quantized":
        raise unreadable(f"compressed-tensors format {block.get('format')!r} is not pack-quantized", "only pack-quantized is read")
    groups = block.get("config_groups")
    usable = isinstance(groups, Mapping) and all(isinstance(g, Mapping) and isinstance(g.get("targets"), list) for g in groups.values())
    if not isinstance(groups, Mapping) or not usable:
        raise unreadable("config_groups is missing or has a group without targets", "restore quantization_config from the original")
    sparsity = blocks.strange(object_at(block, "sparsity_config"), blocks.CT_SPARSITY, f"{BLOCK}.sparsity_config")
    refuse("E340", [*blocks.strange(block, blocks.CT_BLOCK, BLOCK), *sparsity])
    group_of = GroupOf({name: [str(t) for t in group["targets"]] for name, group in groups.items()})
    ignore = block.get("ignore") or []
    if not isinstance(ignore, list):
        raise ValueError("ignore is not a list")
    Entries(str(entry) for entry in ignore)  # an expression that is none is refused here, once
    reasons = {name: _reason(group) for name, group in groups.items()}
    fix = "only 4-bit and 8-bit integer weights are read, asymmetric ones of 4 bits"
    layers: dict[str, int] = {}
    grids: dict[str, Grid] = {}
    problems: list[Problem] = []
    used = set()
    for layer in FORMAT.layer_names(names):
        group = group_of(layer)
        if group is None:
            what = f"{layer} is packed but no config group names it"
            problems.append(Problem(what, "config.json: config_groups", "add it to a group's targets"))
            continue
        used.add(group)
        if reasons[group]:
            problems.append(Problem(f"{layer}: {reasons[group]}", f"config.json: config_groups.{group}", fix))
        layers[layer] = _configured_size(groups[group])
        if not reasons[group] and (grid := _configured_grid(groups[group])) != INT4:
            grids[layer] = grid
    problems += [
        Problem(f"{name}: {reason}", f"config.json: config_groups.{name}", fix)
        for name, reason in reasons.items()
        if reason and name not in used
    ]
    present = set(names)
    for layer in layers:
        name = f"{layer}.weight_zero_point"
        if (name in present) == grids.get(layer, INT4).symmetric:
            what = f"{name} is {'there' if name in present else 'missing'}, and config.json says {grids.get(layer, INT4)}"
            problems.append(Problem(what, name, "config.json and weights do not belong together; fetch both again"))
    refuse("E340", problems or strays(FORMAT, layers, names))
    return FormatInfo(FORMAT, layers, grids=grids)


def _reason(group: Mapping[str, Any]) -> str | None:
    """Why a config group is not a weight-only scheme that is read, or None."""
    weights = object_at(group, "weights")
    bits = weights.get("num_bits")
    symmetric = weights.get("symmetric", True)
    if type(bits) is not int or bits not in (INT4.bits, INT8.bits) or str(weights.get("type", "int")).lower() != "int":
        return f"{weights.get('num_bits')}-bit {weights.get('type', 'int')}"
    if type(symmetric) is not bool or Grid(bits, symmetric) not in FORMAT.grids:
        return f"asymmetric {bits}-bit"
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


def _configured_size(group: Mapping[str, Any]) -> int:
    weights = object_at(group, "weights")
    size = weights.get("group_size")
    return int(size) if isinstance(size, int) and size > 0 and str(weights.get("strategy")).lower() != "channel" else -1


def _configured_grid(group: Mapping[str, Any]) -> Grid:
    weights = object_at(group, "weights")
    return Grid(weights["num_bits"], weights.get("symmetric", True))


def _config_block(chosen: Chosen) -> dict[str, Any]:
    """One config group for each group size and grid.

    NOTE: with several of them no group may say "Linear". compressed-tensors prefers a layer's own name to its class, but vLLM asks for the
    class before it asks for the shards of a fused linear, so qkv_proj (a QKVParallelLinear) would get the group that says "Linear".
    transformers' default mode follows the groups; its `dequantize=True` (5.23) takes the first group for every linear, and stops.
    """
    kinds = kinds_by_count(chosen.kinds)
    head = ["lm_head"] if chosen.packs_head else []  # SGLang (0.5.23) takes a head for packed only where a target has its name
    groups = {}
    for i, (size, grid) in enumerate(kinds):
        members = [name for name in chosen.layers if chosen.kind(name) == (size, grid)]
        weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False}
        weights |= {"strategy": "channel", "group_size": None} if size == -1 else {"strategy": "group", "group_size": size}
        groups[f"group_{i}"] = {
            "targets": ["Linear", *head] if len(kinds) == 1 else name_patterns(members, chosen.everything, chosen.tower),
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",  # without it transformers fills the layers with random numbers and says nothing
        "config_groups": groups,
        "ignore": name_patterns(chosen.ignore, chosen.everything, chosen.tower),
    }


def _shapes(n: int, k: int, group_size: int, grid: Grid = INT4) -> Shapes:
    groups, words = 1 if group_size == -1 else -(-k // group_size), -(-k * grid.bits // 32)
    zeros = {} if grid.symmetric else {"weight_zero_point": (("I32",), (-(-n * grid.bits // 32), groups))}
    return {
        "weight_packed": (("I32",), (n, words)),
        "weight_scale": (FLOATS, (n, groups)),
        "weight_shape": (("I64", "I32"), (2,)),
        **zeros,
    }


def _pack(layer: str, parts: LinearParts) -> dict[str, Tensor]:
    """The scales stay as they are."""
    import torch

    from marlinctl.pack.interchange import pack_ct

    shape, bits = torch.tensor(parts.codes.shape, dtype=torch.int64), parts.grid.bits
    zeros = {} if parts.zeros is None else {"weight_zero_point": pack_ct(parts.zeros.T.contiguous(), bits).T}
    return {"weight_packed": pack_ct(parts.codes, bits), "weight_scale": parts.scales, "weight_shape": shape, **zeros}


def _unpack(tensors: Mapping[str, Tensor], group_size: int, variant: str, grid: Grid) -> LinearParts:
    from marlinctl.pack.interchange import unpack_ct

    n, k = true_shape(tensors["weight_shape"])
    scales = tensors["weight_scale"]
    check_scales(scales, n)
    codes = unpack_ct(tensors["weight_packed"], n, k, grid.bits)
    zeros = None
    if not grid.symmetric:
        if "weight_zero_point" not in tensors:
            raise ValueError("it has no weight_zero_point, and config.json says that it is asymmetric")
        zeros = unpack_ct(tensors["weight_zero_point"].T.contiguous(), int(scales.shape[1]), n, grid.bits).T.contiguous()
    return LinearParts(codes, scales, true_group_size(group_size, k, int(scales.shape[1])), grid=grid, zeros=zeros)


def _second_reading(tensors: Mapping[str, Tensor], n: int, k: int, group_size: int, grid: Grid) -> Tensor:
    """Code by code, as clients do."""
    import torch

    scales = tensors["weight_scale"].to(torch.float32)
    codes = codes_of(tensors["weight_packed"], grid.bits)[:, :k] + grid.lowest
    size = k // scales.shape[1]
    if not grid.symmetric:
        zeros = codes_of(tensors["weight_zero_point"].T, grid.bits)[:, :n].T + grid.lowest
        codes = codes - zeros.repeat_interleave(size, dim=1)
    return codes.to(torch.float32) * scales.repeat_interleave(size, dim=1)


# transformers (5.23) asks packed linears of these types for their weights when it loads them, and stops.
_ASKED_FOR_WEIGHTS = frozenset(("falcon", "falcon_mamba", "gpt_bigcode", "mamba", "modernbert-decoder", "xlstm"))


def _limits(packed: Packed, program: str) -> list[str]:
    """What a program's own look-up of the scheme of fused experts does not find."""
    if program == TRANSFORMERS_CT:
        return _limits_of_transformers(packed)
    asymmetric = [name for name in packed.experts if not packed.grid(name).symmetric]
    if asymmetric:
        return [f"{asymmetric[0]}: {program} has no zero points for experts"]
    if not packed.experts:
        return []
    first, kinds = packed.experts[0], sorted({*packed.kinds.values()})
    if program == SGLANG and len(kinds) > 1:
        text = ", ".join(kind_text(kind) for kind in kinds)
        return [f"{first}: SGLang finds the scheme of experts only where a model has one for all linears, and this has {text}"]
    if program == VLLM and first.rpartition(".")[2] in _MIXTRAL and (len(kinds) > 1 or packed.sixteen_bit_experts):
        return [f"{first}: vLLM finds the scheme of experts of this name only where a model has one for all linears, experts included"]
    return []


def _limits_of_transformers(packed: Packed) -> list[str]:
    """transformers fuses the experts of a block. It takes one scheme for all experts of a model, that of the first config group which names
    some; a single scale per row fits whatever scheme has groups, but not the reverse."""
    kinds = packed.kinds
    kind_of_model = language_model_type(packed.config)
    if kind_of_model in _ASKED_FOR_WEIGHTS and packed.sizes:
        return [f"{next(iter(packed.sizes))}: transformers' code for {kind_of_model} asks for the weight of a packed linear, and stops"]
    if asymmetric := next((name for name, (_, grid) in kinds.items() if not grid.symmetric), None):
        one = ", and one scheme for all linears then" if len({*kinds.values()}) > 1 else ""
        return [f"{asymmetric}: transformers (compressed-tensors 0.20) takes zero points with dequantize=True alone{one}"]
    used = {kinds[name] for name in packed.experts}
    grouped = {kinds[name] for name in packed.experts if packed.sizes[name] not in (-1, packed.shapes[name][1])}
    scheme = next((kind for kind in kinds_by_count(kinds) if kind in used), None)
    if grouped - {scheme} or len({grid for _, grid in used}) > 1:
        text = ", ".join(kind_text(kind) for kind in sorted(used))
        return [f"{packed.experts[0]}: experts have {text}, and transformers takes one for all experts of a model"]
    if packed.sixteen_bit_experts and packed.sizes:
        return [f"{packed.sixteen_bit_experts[0]}: it stays 16-bit, and transformers looks for packed experts alone"]
    return []


def _untested(packed: Packed) -> Mapping[str, str]:
    return dict.fromkeys((VLLM, SGLANG), "a quantized lm_head") if any(map(is_head, packed.sizes)) else {}


FORMAT = Format(
    name="ct",
    label="compressed-tensors",
    title="{} weights, compressed-tensors `pack-quantized`",
    tensors={"weight_packed": CODES, "weight_scale": SCALES, "weight_shape": INDICES, "weight_zero_point": INDICES},
    shapes=_shapes,
    loaders=(VLLM, SGLANG, TRANSFORMERS_CT, MARLINCTL),
    kernels=(VLLM, SGLANG, MARLINCTL),
    methods=("compressed-tensors",),
    detect=_detect,
    config_block=_config_block,
    pack=_pack,
    unpack=_unpack,
    grids=(INT4, INT8, UINT4),
    optional=("weight_zero_point",),
    second_reading=_second_reading,
    tags=("compressed-tensors",),
    required=(("quantization_status", "compressed", "transformers would fill the linears with random numbers"),),
    checks_ignore=True,
    limits=_limits,
    untested=_untested,
    trains="scales",
)
