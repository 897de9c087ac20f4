"""What marlin.py and marlin_24.py share: folders of marlinctl's own kernels, with quant_method `marlinctl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import blocks
from marlinctl.checkpoint.formats.base import (
    BLOCK,
    Chosen,
    Format,
    FormatInfo,
    Shapes,
    group_size_of,
    object_at,
    refuse,
    strays,
    true_shape,
    unreadable,
)
from marlinctl.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "marlinctl"
FORMAT_VERSION = 1  # a higher one was written by a newer marlinctl
MARKS = {"marlin": "B", "marlin_24": "B_24"}  # what marks a linear as packed
NOTE = "Plain transformers finds no model file in this folder, on purpose: it would fill the packed layers with random numbers.\n"


def detect(block: Mapping[str, Any], names: Sequence[str], fmt: Format) -> FormatInfo | None:
    """None where the block is of the other one."""
    version = block.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise unreadable(f"format_version {version!r} is not a version", "write the folder again with `marlinctl pack --format marlin`")
    if version > FORMAT_VERSION:
        raise BadInput(
            "E340",
            f"this native checkpoint has format_version {version}; this marlinctl reads up to {FORMAT_VERSION}",
            where="config.json: quantization_config.format_version",
            fix="update marlinctl, or pack the model again to ct with the version that wrote it",
        )
    said = block.get("format")
    if not isinstance(said, str) or said not in MARKS or block.get("bits") != fmt.bits:
        what = f"native format {said!r} with {block.get('bits')!r} bits is not read"
        raise unreadable(what, f"only {' and '.join(MARKS)} with {fmt.bits} bits are")
    if said != fmt.name:
        return None
    ending = next(f".{mark}" for name, mark in MARKS.items() if name != fmt.name)
    stray = next((name.removesuffix(ending) for name in names if name.endswith(ending)), None)
    if stray is not None:
        raise unreadable(
            f"config.json says {said}, but {stray} is packed the other way", "config.json belongs to another model; restore it"
        )
    refuse("E340", blocks.strange(block, blocks.NATIVE_BLOCK, BLOCK))
    overrides, size = object_at(block, "overrides"), block.get("group_size", -1)
    layers = {layer: group_size_of(overrides.get(layer, size)) for layer in fmt.layer_names(names)}
    refuse("E340", strays(fmt, layers, names))
    return FormatInfo(fmt, layers)


def config_block(chosen: Chosen, fmt: Format) -> dict[str, Any]:
    block = {"quant_method": METHOD, "format": fmt.name, "format_version": FORMAT_VERSION, "bits": fmt.bits, "group_size": chosen.majority}
    return block | ({"overrides": chosen.differing} if chosen.differing else {})


def padded_shapes(n: int, k: int, group_size: int) -> tuple[int, int, Shapes]:
    """N and K as the tiles have them, multiples of 64, and the tensors that both formats have."""
    groups = 1 if group_size == -1 else -(-k // group_size)
    padded_n, padded_k = -(-n // 64) * 64, -(-k // 64) * 64
    padded_groups = 1 if groups == 1 else -(-padded_k // group_size)
    return padded_n, padded_k, {"s": (("F16",), (padded_groups, padded_n)), "weight_shape": (("I64",), (2,))}


def true_sizes(fmt: Format, tensors: Mapping[str, Tensor], group_size: int) -> tuple[int, int, int]:
    """(N, K, group size) of a linear whose tensors have the shapes that these ask for."""
    n, k = true_shape(tensors["weight_shape"])
    for suffix, (_, shape) in fmt.shapes(n, k, group_size).items():
        if tuple(tensors[suffix].shape) != shape:
            raise ValueError(f"{suffix} has shape {tuple(tensors[suffix].shape)}, expected {shape} for [{n}, {k}]")
    return n, k, k if group_size == -1 else group_size
