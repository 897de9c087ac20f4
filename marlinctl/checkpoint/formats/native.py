"""What marlin.py and marlin_24.py share: folders of marlinctl's own kernels, with quant_method `marlinctl`.

A linear is words [K' / step, 2N'] of each kind, scales P.s [G', N'] and P.weight_shape = [N, K]. `make_format` makes a `Format` of its
words and of the functions between codes and tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import blocks, rounding
from marlinctl.checkpoint.formats.base import (
    BLOCK,
    INDICES,
    MARLINCTL,
    NATIVE_FILES,
    SCALES,
    VLLM_MARLINCTL,
    Chosen,
    Format,
    FormatInfo,
    LinearParts,
    Packed,
    Shapes,
    group_size_of,
    object_at,
    refuse,
    strays,
    true_shape,
    unreadable,
)
from marlinctl.errors import BadInput
from marlinctl.quantize.scheme import INT4

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.pack.types import PackedLinear, PackedSparseLinear
    from marlinctl.quantize.types import QuantizedLinear

    Tiles = PackedLinear | PackedSparseLinear

METHOD = "marlinctl"
FORMAT_VERSION = 2  # a higher one was written by a newer marlinctl
ROUNDING_VERSION = 2  # from which on a block says that activations may be rounded. A folder without that stays at 1, for older readers
MARKS = {"marlin": "B", "marlin_24": "B_24"}  # what marks a linear as packed
NOTE = "Plain transformers finds no model file in this folder, on purpose: it would fill the packed layers with random numbers.\n"


@dataclass(frozen=True, slots=True)
class Words:
    """One matrix of words of a linear."""

    field: str  # of the tiles' class (pack/types.py)
    kind: str  # what its bytes are
    dtype: str
    step: int  # inputs in a row of it


def _detect(block: Mapping[str, Any], names: Sequence[str], fmt: Format) -> FormatInfo | None:
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
    if not isinstance(said, str) or said not in MARKS or block.get("bits") != INT4.bits:
        what = f"native format {said!r} with {block.get('bits')!r} bits is not read"
        raise unreadable(what, f"only {' and '.join(MARKS)} with {INT4.bits} bits are")
    if said != fmt.name:
        return None
    ending = next(f".{mark}" for name, mark in MARKS.items() if name != fmt.name)
    stray = next((name.removesuffix(ending) for name in names if name.endswith(ending)), None)
    if stray is not None:
        raise unreadable(
            f"config.json says {said}, but {stray} is packed the other way", "config.json belongs to another model; restore it"
        )
    may_round = fmt.rounds and version >= ROUNDING_VERSION
    refuse("E340", blocks.strange(block, blocks.NATIVE_ROUNDED_BLOCK if may_round else blocks.NATIVE_BLOCK, BLOCK))
    overrides, size = object_at(block, "overrides"), block.get("group_size", -1)
    layers = {layer: group_size_of(overrides.get(layer, size)) for layer in fmt.layer_names(names)}
    refuse("E340", strays(fmt, layers, names))
    return FormatInfo(fmt, layers, rounding=rounding.read(block, layers))


def _config_block(chosen: Chosen, fmt: Format) -> dict[str, Any]:
    (size, _), differing = chosen.majority, chosen.differing  # one grid
    said = rounding.entries(chosen.rounding, chosen.layers) if fmt.rounds else {}
    version = ROUNDING_VERSION if said else 1
    block = {"quant_method": METHOD, "format": fmt.name, "format_version": version, "bits": INT4.bits, "group_size": size}
    return block | said | ({"overrides": {name: size for name, (size, _) in differing.items()}} if differing else {})


def _limits(packed: Packed, program: str) -> list[str]:
    """Programs that fuse experts have no place for tiles of each."""
    experts = packed.experts if program == VLLM_MARLINCTL else []
    return [f"{experts[0]}: experts are not served from native folders"] if experts else []


def _shapes(n: int, k: int, group_size: int, words: Mapping[str, Words]) -> Shapes:
    """N' and K' are multiples of 64."""
    groups = 1 if group_size == -1 else -(-k // group_size)
    padded_n, padded_k = -(-n // 64) * 64, -(-k // 64) * 64
    padded_groups = 1 if groups == 1 else -(-padded_k // group_size)
    matrices = {suffix: ((one.dtype,), (padded_k // one.step, 2 * padded_n)) for suffix, one in words.items()}
    return {**matrices, "s": (("F16",), (padded_groups, padded_n)), "weight_shape": (("I64",), (2,))}


def _true_sizes(fmt: Format, tensors: Mapping[str, Tensor], group_size: int) -> tuple[int, int, int]:
    """(N, K, group size) of a linear whose tensors have the shapes that these ask for."""
    n, k = true_shape(tensors["weight_shape"])
    for suffix, (_, shape) in fmt.shapes(n, k, group_size).items():
        if tuple(tensors[suffix].shape) != shape:
            raise ValueError(f"{suffix} has shape {tuple(tensors[suffix].shape)}, expected {shape} for [{n}, {k}]")
    return n, k, k if group_size == -1 else group_size


def make_format(
    name: str,
    *,
    label: str,
    title: str,
    words: Mapping[str, Words],  # suffix -> what it is; the first marks a linear as packed
    tiles: Callable[..., Tiles],  # of the words by their fields, scales, out_features, in_features and group_size
    pack: Callable[[str, QuantizedLinear], Tiles],  # the layer is named in errors
    unpack: Callable[[Any], QuantizedLinear],
    second_reading: Callable[[Any], Tensor],  # the weight [N, K] fp32 of tiles, by another way than `unpack`
    needs_mask: bool = False,
    rounds: bool = False,
) -> Format:
    def tiles_of(tensors: Mapping[str, Tensor], n: int, k: int, group_size: int) -> Tiles:
        fields = {one.field: tensors[suffix] for suffix, one in words.items()}
        return tiles(**fields, scales=tensors["s"], out_features=n, in_features=k, group_size=k if group_size == -1 else group_size)

    def packed(layer: str, parts: LinearParts) -> dict[str, Tensor]:
        import torch

        made = pack(layer, parts.quantized(layer))
        tensors = {suffix: getattr(made, one.field) for suffix, one in words.items()}
        return {**tensors, "s": made.scales, "weight_shape": torch.tensor(parts.codes.shape, dtype=torch.int64)}

    fmt = Format(
        name=name,
        label=label,
        title=title,
        tensors={**{suffix: one.kind for suffix, one in words.items()}, "s": SCALES, "weight_shape": INDICES},
        shapes=lambda n, k, group_size, grid=INT4: _shapes(n, k, group_size, words),
        loaders=(VLLM_MARLINCTL, MARLINCTL),
        kernels=(VLLM_MARLINCTL, MARLINCTL),
        limits=_limits,
        methods=(METHOD,),
        detect=lambda block, names: _detect(block, names, fmt),
        config_block=lambda chosen: _config_block(chosen, fmt),
        pack=packed,
        unpack=lambda tensors, group_size, variant, grid: LinearParts.of(unpack(tiles_of(tensors, *_true_sizes(fmt, tensors, group_size)))),
        second_reading=lambda tensors, n, k, group_size, grid: second_reading(tiles_of(tensors, n, k, group_size)),
        tiles=tiles_of,
        tags=("marlin",),
        note=NOTE,
        files=NATIVE_FILES,
        needs_mask=needs_mask,
        rounds=rounds,
    )
    return fmt
