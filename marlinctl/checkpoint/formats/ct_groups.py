"""Config groups of compressed-tensors: what one says of its linears, and what marlinctl writes.

    format of the group   codes                                      activations
    pack-quantized        4 or 8 bits, packed into int32 words       16-bit
    int-quantized         int8 [N, K], one scale for each row        int8, a scale for each token, found when the model runs
    float-quantized       float8_e4m3fn [N, K], the same             float8_e4m3fn, the same

A group without a format has that of the whole block, which is `mixed-precision` where groups have several.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from marlinctl.checkpoint.formats import blocks
from marlinctl.checkpoint.formats.base import Kind, object_at
from marlinctl.quantize.scheme import FP8, INT4, INT8, INT8_ACTIVATIONS, UINT4, Activations, Grid

GRIDS = (INT4, INT8, UINT4, INT8_ACTIVATIONS, FP8)
PACKED, MIXED = "pack-quantized", "mixed-precision"
_FORMAT_OF: Mapping[Activations, str] = {"16-bit": PACKED, "int8": "int-quantized", "fp8": "float-quantized"}
_ACTIVATIONS_OF = {name: activations for activations, name in _FORMAT_OF.items()}
FORMATS = (*_ACTIVATIONS_OF, MIXED)


def format_of(grids: Iterable[Grid]) -> str:
    """Of a folder with such codes."""
    used = {_FORMAT_OF[grid.activations] for grid in grids}
    return MIXED if len(used) > 1 else next(iter(used), PACKED)


def group_of(kind: Kind, targets: list[str], whole: str) -> dict[str, Any]:
    """The group of linears with these codes and groups of weights. whole: the format of the block; where it is pack-quantized, groups do
    not repeat it."""
    size, grid = kind
    number = "float" if grid.floating else "int"
    weights: dict[str, Any] = {"num_bits": grid.bits, "type": number, "symmetric": grid.symmetric, "dynamic": False}
    weights |= {"strategy": "channel", "group_size": None} if size == -1 else {"strategy": "group", "group_size": size}
    activations = {"num_bits": 8, "type": number, "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations if grid.rounds_activations else None,
        "output_activations": None,
        **({} if whole == PACKED else {"format": _FORMAT_OF[grid.activations]}),
    }


def reason(group: Mapping[str, Any], whole: str) -> str | None:
    """Why a config group is not a scheme that is read, or None."""
    name = _format_in(group, whole)
    if name not in _ACTIVATIONS_OF:
        return f"format {name!r} of a group"
    activations = _ACTIVATIONS_OF[name]
    weights = object_at(group, "weights")
    bits, kind = weights.get("num_bits"), str(weights.get("type", "int")).lower()
    symmetric = weights.get("symmetric", True)
    if type(bits) is not int or bits not in (INT4.bits, INT8.bits) or kind != ("float" if activations == "fp8" else "int"):
        return f"{weights.get('num_bits')}-bit {weights.get('type', 'int')}"
    if type(symmetric) is not bool or Grid(bits, symmetric, activations) not in GRIDS:
        return f"{'' if symmetric is True else 'asymmetric '}{bits}-bit{'' if activations == '16-bit' else f' {name}'}"
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if isinstance(strategy, str):
        strategy = strategy.lower()
    if strategy is None and size is not None:  # compressed-tensors derives the strategy from the size, and no size means one scale for all
        strategy = "channel" if size == -1 else "group"
    if strategy == "group" and not (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return f"strategy group with group_size {size!r}"
    if strategy == "channel" and size not in (None, -1):
        return f"strategy channel with group_size {size!r}"
    if strategy not in ("group", "channel") or (strategy == "group" and activations != "16-bit"):
        return f"strategy {strategy!r}"
    if activations == "16-bit":
        return blocks.reason(group, blocks.CT_GROUP) or blocks.reason(weights, blocks.CT_WEIGHTS)
    inputs = object_at(group, "input_activations")
    if not inputs:
        return f"{name} weights with 16-bit activations"
    return (
        blocks.reason({key: value for key, value in group.items() if key != "input_activations"}, blocks.CT_GROUP)
        or blocks.reason(weights, blocks.CT_WEIGHTS)
        or blocks.missing(inputs, blocks.CT_DYNAMIC)
        or blocks.reason(inputs, blocks.CT_DYNAMIC)
        or (None if str(inputs["type"]).lower() == kind else f"{kind} weights and {inputs['type']} activations")
    )


def _format_in(group: Mapping[str, Any], whole: str) -> str:
    """That of a group, or of the whole folder. As text: a config from elsewhere may have anything there."""
    return str(group.get("format") or whole)


def configured(group: Mapping[str, Any], whole: str) -> Kind:
    """Group size and grid of a group that is read."""
    weights = object_at(group, "weights")
    size = weights.get("group_size")
    grid = Grid(weights["num_bits"], weights.get("symmetric", True), _ACTIVATIONS_OF[_format_in(group, whole)])
    return (int(size) if isinstance(size, int) and size > 0 and str(weights.get("strategy")).lower() != "channel" else -1), grid
