"""`ct`: compressed-tensors, what vLLM, SGLang and transformers load. marlinctl's interchange form.

`pack-quantized`:

    P.weight_packed  [N, K/8 up]     int32    of 8-bit codes [N, K/4 up]
    P.weight_scale   [N, G]          float    of any float dtype, as they were solved or found
    P.weight_shape   [2] = [N, K]    int64    transformers fails without it
    P.weight_zero_point  [N/8 up, G] int32    of asymmetric codes; eight neighbours in N a word

`int-quantized` and `float-quantized`, of linears whose activations are rounded when the model runs (ct_groups.py):

    P.weight         [N, K]          int8     or float8_e4m3fn
    P.weight_scale   [N, 1]          float

Without `quantization_status: compressed` transformers loads random numbers and says nothing.
docs/formats/compressed-tensors.md has the bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import blocks, ct_groups
from marlinctl.checkpoint.formats.base import (
    BLOCK,
    CODES,
    EXPERTS,
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
from marlinctl.quantize.scheme import INT4, Grid

if TYPE_CHECKING:
    from torch import Tensor

_MIXTRAL = ("w1", "w2", "w3")
_E4M3_NAN = 0x7F  # all bits but the sign


def _detect(block: Mapping[str, Any], names: Sequence[str]) -> FormatInfo:
    whole = block.get("format")
    if whole not in ct_groups.FORMATS:
        *others, last = ct_groups.FORMATS
        raise unreadable(f"compressed-tensors format {whole!r} is not read", f"only {', '.join(others)} and {last} are read")
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
    ignored = Entries(str(entry) for entry in ignore)  # an expression that is none is refused here, once
    reasons = {name: ct_groups.reason(group, whole) for name, group in groups.items()}
    fix = (
        "only 4-bit and 8-bit integer weights are read, asymmetric ones of 4 bits, and int8 or FP8 weights with one scale per row and "
        "dynamic activations of the same kind"
    )
    layers: dict[str, int] = {}
    grids: dict[str, Grid] = {}
    problems: list[Problem] = []
    used, present = set(), set(names)
    for layer in FORMAT.layer_names(names):
        group = group_of(layer)
        if f"{layer}.{FORMAT.suffixes[0]}" not in present and (layer in ignored or not _unpacked(groups, group, reasons, whole)):
            continue  # scales beside a weight that no group explains
        if group is None:
            what = f"{layer} is packed but no config group names it"
            problems.append(Problem(what, "config.json: config_groups", "add it to a group's targets"))
            continue
        used.add(group)
        if reasons[group]:
            problems.append(Problem(f"{layer}: {reasons[group]}", f"config.json: config_groups.{group}", fix))
            layers[layer] = -1  # so that it is a packed linear, whatever else is wrong
            continue
        layers[layer], grid = ct_groups.configured(groups[group], whole)
        if grid != INT4:
            grids[layer] = grid
        if grid.rounds_activations and EXPERTS in layer:
            what = f"{layer}: experts with {grid.activations} activations"
            problems.append(Problem(what, f"config.json: config_groups.{group}", "start from the original model"))
    problems += [
        Problem(f"{name}: {reason}", f"config.json: config_groups.{name}", fix)
        for name, reason in reasons.items()
        if reason and name not in used
    ]
    for layer in layers:
        name = f"{layer}.weight_zero_point"
        if (name in present) == grids.get(layer, INT4).symmetric:
            what = f"{name} is {'there' if name in present else 'missing'}, and config.json says {grids.get(layer, INT4)}"
            problems.append(Problem(what, name, "config.json and weights do not belong together; fetch both again"))
    refuse("E340", problems or strays(FORMAT, layers, names, grids))
    return FormatInfo(FORMAT, layers, grids=grids)


def _unpacked(groups: Mapping[str, Any], group: str | None, reasons: Mapping[str, str | None], whole: str) -> bool:
    """Whether the codes of this group's linears are not packed."""
    return group is not None and not reasons[group] and ct_groups.configured(groups[group], whole)[1].rounds_activations


def _config_block(chosen: Chosen) -> dict[str, Any]:
    """One config group for each group size and grid.

    NOTE: with several of them no group may say "Linear". compressed-tensors prefers a layer's own name to its class, but vLLM asks for the
    class before it asks for the shards of a fused linear, so qkv_proj (a QKVParallelLinear) would get the group that says "Linear".
    transformers' default mode follows the groups; its `dequantize=True` (5.23) takes the first group for every linear, and stops.
    """
    kinds = kinds_by_count(chosen.kinds)
    whole = ct_groups.format_of(grid for _, grid in kinds)
    head = ["lm_head"] if chosen.packs_head else []  # SGLang (0.5.23) takes a head for packed only where a target has its name
    groups = {}
    for i, kind in enumerate(kinds):
        members = [name for name in chosen.layers if chosen.kind(name) == kind]
        targets = ["Linear", *head] if len(kinds) == 1 else name_patterns(members, chosen.everything, chosen.tower)
        groups[f"group_{i}"] = ct_groups.group_of(kind, targets, whole)
    return {
        "quant_method": "compressed-tensors",
        "format": whole,
        "quantization_status": "compressed",  # without it transformers fills the layers with random numbers and says nothing
        "config_groups": groups,
        "ignore": name_patterns(chosen.ignore, chosen.everything, chosen.tower),
    }


def _shapes(n: int, k: int, group_size: int, grid: Grid = INT4) -> Shapes:
    if grid.rounds_activations:
        return {"weight": (("F8_E4M3" if grid.floating else "I8",), (n, k)), "weight_scale": (FLOATS, (n, 1))}
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

    if parts.grid.rounds_activations:
        codes = parts.codes.view(torch.float8_e4m3fn) if parts.grid.floating else parts.codes
        return {"weight": codes, "weight_scale": parts.scales}
    shape, bits = torch.tensor(parts.codes.shape, dtype=torch.int64), parts.grid.bits
    zeros = {} if parts.zeros is None else {"weight_zero_point": pack_ct(parts.zeros.T.contiguous(), bits).T}
    return {"weight_packed": pack_ct(parts.codes, bits), "weight_scale": parts.scales, "weight_shape": shape, **zeros}


def _unpack(tensors: Mapping[str, Tensor], group_size: int, variant: str, grid: Grid) -> LinearParts:
    from marlinctl.pack.interchange import unpack_ct

    if grid.rounds_activations:
        return _of_rows(tensors["weight"], tensors["weight_scale"], grid)
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


def _of_rows(codes: Tensor, scales: Tensor, grid: Grid) -> LinearParts:
    """Codes [N, K] that are not packed, and one scale for each row."""
    import torch

    wanted = torch.float8_e4m3fn if grid.floating else torch.int8
    n, k = codes.shape
    if codes.dtype != wanted:
        raise ValueError(f"weight is {codes.dtype}, and config.json says {grid}")
    check_scales(scales, n)
    if scales.shape[1] != 1:
        raise ValueError(f"there are {scales.shape[1]} scales for each row, and config.json says one")
    codes = codes.view(torch.int8)
    if grid.floating and bool((codes.bitwise_and(_E4M3_NAN) == _E4M3_NAN).any()):
        raise ValueError("weight holds NaN")
    return LinearParts(codes, scales, k, grid=grid)


def _second_reading(tensors: Mapping[str, Tensor], n: int, k: int, group_size: int, grid: Grid) -> Tensor:
    """Code by code, as clients do."""
    import torch

    scales = tensors["weight_scale"].to(torch.float32)
    if grid.rounds_activations:
        weight = tensors["weight"]
        return scales * (_numbers(weight.view(torch.uint8)) if grid.floating else weight.to(torch.float32))
    codes = codes_of(tensors["weight_packed"], grid.bits)[:, :k] + grid.lowest
    size = k // scales.shape[1]
    if not grid.symmetric:
        zeros = codes_of(tensors["weight_zero_point"].T, grid.bits)[:, :n].T + grid.lowest
        codes = codes - zeros.repeat_interleave(size, dim=1)
    return codes.to(torch.float32) * scales.repeat_interleave(size, dim=1)


def _numbers(bits: Tensor) -> Tensor:
    """float8_e4m3fn from its bits, uint8 -> float32: sign, four bits of exponent, three of mantissa."""
    import torch

    number = bits.to(torch.int32)
    sign, exponent, mantissa = 1 - 2 * (number >> 7), (number >> 3) & 15, number & 7
    whole = torch.where(exponent == 0, mantissa, mantissa + 8)
    return torch.ldexp((sign * whole).to(torch.float32), exponent.clamp_min(1) - 10)


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
    head = dict.fromkeys((VLLM, SGLANG), "a quantized lm_head") if any(map(is_head, packed.sizes)) else {}
    rounding = next((grid for grid in packed.grids.values() if grid.rounds_activations), None)
    return head if rounding is None else {SGLANG: f"{rounding.activations} activations", **head}


FORMAT = Format(
    name="ct",
    label="compressed-tensors",
    title="{} weights, compressed-tensors `{}`",
    layout=ct_groups.format_of,
    tensors={"weight_packed": CODES, "weight_scale": SCALES, "weight_shape": INDICES, "weight_zero_point": INDICES},
    unpacked={"weight": CODES, "weight_scale": SCALES},
    shapes=_shapes,
    loaders=(VLLM, SGLANG, TRANSFORMERS_CT, MARLINCTL),
    kernels=(VLLM, SGLANG, MARLINCTL),
    methods=("compressed-tensors",),
    detect=_detect,
    config_block=_config_block,
    pack=_pack,
    unpack=_unpack,
    grids=ct_groups.GRIDS,
    optional=("weight_zero_point",),
    second_reading=_second_reading,
    tags=("compressed-tensors",),
    required=(("quantization_status", "compressed", "transformers would fill the linears with random numbers"),),
    checks_ignore=True,
    limits=_limits,
    untested=_untested,
    trains="scales",
)
