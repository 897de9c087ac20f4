"""The formats that marlinctl knows, and what is asked of all of them: which one a checkpoint is in, and one linear read and written.

A new format is a module beside this one and a line in FORMATS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint.formats import compressed_tensors, dense, gptq, marlin, marlin_24, rounding
from marlinctl.checkpoint.formats.base import (
    AGAIN,
    PROVENANCE,
    Chosen,
    Format,
    FormatInfo,
    LinearParts,
    grids_text,
    is_head,
    unreadable,
)  # fmt: skip
from marlinctl.errors import BadInput, Problem, number_of
from marlinctl.quantize.scheme import INT4, Grid, Rounding, Scheme
from marlinctl.system.atomic import DTYPE_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.mask import Masks
    from marlinctl.checkpoint.reader import Checkpoint
    from marlinctl.pack.types import PackedLinear, PackedSparseLinear
    from marlinctl.quantize.types import QuantizedLinear

DENSE, INTERCHANGE = dense.FORMAT, compressed_tensors.FORMAT  # what models come as; what a run solves into, before it packs
# In the order in which a run publishes and a page lists them.
FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (INTERCHANGE, gptq.FORMAT, marlin.FORMAT, marlin_24.FORMAT, DENSE)}


_WAYS = {
    "bitsandbytes": 'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('FOLDER').dequantize().save_pretrained('NEW')\"",
    "mxfp4": 'python -c "from transformers import AutoModelForCausalLM as M, Mxfp4Config as C; '
    "M.from_pretrained('FOLDER', quantization_config=C(dequantize=True), dtype='bfloat16').save_pretrained('NEW')\"",
}


def way_to_sixteen_bits(method: object) -> str | None:
    """How transformers makes a 16-bit model of one that was quantized so, where marlinctl does not read it."""
    program = _WAYS.get(method) if isinstance(method, str) else None
    return (
        None
        if program is None
        else f"start from a 16-bit copy of the model, or make one: {program}, and copy the tokenizer's files into NEW"
    )


def working_format(scheme: Scheme) -> Format:
    """What a run solves into, before it packs."""
    return INTERCHANGE if scheme.quantizes else DENSE


# ---- what a checkpoint is ------------------------------------------------------------------------------------------------------------


def detect(config: Mapping[str, Any], tensor_names: Iterable[str]) -> FormatInfo:
    """Tell the format from config.json and the tensor names. BadInput for anything marlinctl cannot read exactly."""
    names = list(tensor_names)
    block = quantization_block(config)
    if block is None:
        return _dense(names)
    method = block.get("quant_method", INTERCHANGE.methods[0] if "config_groups" in block else None)
    try:
        for fmt in FORMATS.values():
            if fmt.detect is not None and method in fmt.methods and (found := fmt.detect(block, names)) is not None:
                return found if fmt.rounds else replace(found, rounding=_noted_rounding(block, found))
    except ValueError as problem:
        raise unreadable(str(problem), "restore quantization_config from the original") from None
    raise unreadable(
        f"the model is quantized with {method!r}, which marlinctl does not read",
        way_to_sixteen_bits(method)
        or "use compressed-tensors pack-quantized or GPTQ, 4-bit or 8-bit symmetric, or quantize the original 16-bit model",
    )


def _noted_rounding(block: Mapping[str, Any], info: FormatInfo) -> dict[str, Rounding]:
    """For `pack`: what a format without such a key says below our own."""
    noted = block.get(PROVENANCE)
    return rounding.read(noted, (layer for layer in info.layers if info.grid(layer) == INT4)) if isinstance(noted, Mapping) else {}


def _dense(names: Sequence[str]) -> FormatInfo:
    for fmt in FORMATS.values():
        packed = fmt.layer_names(names) if fmt.quantized else []
        if packed:
            marks = {f"{packed[0]}.{suffix}" for suffix in (*fmt.tensors, *fmt.unpacked)}
            raise unreadable(
                f"tensors such as {next(name for name in names if name in marks)} are packed, but config.json has no quantization_config",
                "restore quantization_config in config.json (older GPTQ models keep it in quantize_config.json)",
            )
    return FormatInfo(DENSE)


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
        raise unreadable(f"{key} and {others[0][0]} say different things", "keep the one that belongs to the weights, remove the other")
    if not isinstance(block, Mapping):
        raise unreadable(f"{key} is not an object", "write it again, or fetch config.json again")
    return block


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the model without a word about how its weights were quantized."""
    own = ("quantization_config", "compression_config")
    return {
        key: {k: v for k, v in value.items() if k != "quantization_config"} if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in own
    }


def sixteen_bit_linears(shapes: Mapping[str, Sequence[int]], layers: Iterable[str]) -> list[str]:
    """Every linear that stays 16-bit, by module name: skipped layers, routers, and lm_head, which exists as a module even where it is tied.

    They must be named in the config: clients take every nn.Linear that is not ignored for a packed one. Told by shape and name, since it
    must work for models that are not in the table of architectures: a matrix called P.weight that is not an embedding
    (embed_out of GPT-NeoX is its output head).
    """
    quantized = set(layers)
    names = [name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
    names = [name for name in names if name not in quantized and not re.search(r"embed(?!.*proj|_out)|wte$|wpe$", name.rpartition(".")[2])]
    head = set() if any(map(is_head, quantized)) else {"lm_head"}
    return sorted({*names, *head})


# ---- what is written -----------------------------------------------------------------------------------------------------------------


def quantization_config(
    fmt: Format,
    layers: Mapping[str, int],  # layer name -> group size, -1 for whole rows
    ignore: Sequence[str] = (),  # every nn.Linear that stays 16-bit: lm_head, skipped layers, routers
    provenance: Mapping[str, Any] | None = None,  # goes under a key of its own, which clients ignore
    grids: Mapping[str, Grid] | None = None,  # of the layers whose codes are not INT4
    wraps: bool = False,  # the language model is part of a wrapper
    rounding_of: Mapping[str, Rounding] | None = None,  # the layers whose activations may be rounded; a note where the format has no key
) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    if fmt.config_block is None:
        raise ValueError(f"no config block for format {fmt.name!r}")
    chosen = Chosen(layers, ignore, grids or {}, wraps, rounding_of or {})
    noted = rounding.without(provenance or {}) | ({} if fmt.rounds else rounding.entries(chosen.rounding, layers))
    return fmt.config_block(chosen) | ({PROVENANCE: noted} if noted else {})


def linear_bytes(fmt: Format, n: int, k: int, group_size: int, grid: Grid = INT4) -> int:
    """Bytes of the tensors that marlinctl writes for a linear [n, k]."""
    return sum(prod(shape) * DTYPE_BYTES[dtypes[0]] for dtypes, shape in fmt.shapes(n, k, group_size, grid).values())


def misfits(shapes: Mapping[str, tuple[int, int]], targets: Sequence[Format], grids: Mapping[str, Grid]) -> list[Problem]:
    """Linears (name -> (N, K)) that a target format cannot hold. grids: of those whose codes are not INT4."""
    asks = [fmt.misfit for fmt in targets if fmt.misfit is not None]
    found = ((layer, ask(n, k)) for ask in asks for layer, (n, k) in shapes.items())
    problems = [Problem(f"{layer}: {why}", layer, "pack to ct or marlin") for layer, why in found if why is not None]
    for fmt in targets:
        holders = " or ".join(other.name for other in FORMATS.values() if other.quantized and {*grids.values()} <= {*other.grids})
        problems += [
            Problem(f"{layer} has {grid} codes, and {_place_for(grid, fmt)}", layer, f"pack to {holders}")
            for layer, grid in grids.items()
            if layer in shapes and fmt.quantized and grid not in fmt.grids
        ]
        first = next(iter(grids), None)
        if fmt.one_symmetry and len({grids.get(layer, INT4).symmetric for layer in shapes}) > 1:
            what = f"{fmt.name} holds symmetric or asymmetric codes, and this model has both, {first} first"
            problems.append(Problem(what, fmt.name, "pack to ct"))
    return problems


def _place_for(grid: Grid, fmt: Format) -> str:
    """Why a format does not hold such codes."""
    if grid.rounds_activations:
        return f"{fmt.name} holds weights for 16-bit activations alone"
    return f"{fmt.name} holds symmetric {grids_text(fmt.grids)} ones alone"


def losses(info: FormatInfo, fmt: Format) -> list[str]:
    """What a model in this format does otherwise than the one that it is made of, for the person who writes it."""
    rounded = [layer for layer in info.layers if info.activations(layer) != "16-bit"]
    if fmt.rounds or (fmt.quantized and not info.format.rounds) or not rounded:
        return []
    linears = number_of(len(rounded), "linear has", "linears have")
    return [f"{linears} 8-bit activations, and the {fmt.name} folder has 16-bit ones: it is more exact than the model it is made of"]


def linear_tensors(fmt: Format, layer: str, q: QuantizedLinear | LinearParts) -> dict[str, Tensor]:
    """What is written for one layer, by full tensor name.

    A format whose metadata is the mask needs one: `q` is a SparseQuantizedLinear, or parts with `keep`. The others have no place for it.
    """
    parts = q if isinstance(q, LinearParts) else LinearParts.of(q)
    return {f"{layer}.{suffix}": tensor.contiguous() for suffix, tensor in fmt.pack(layer, parts).items()}


# ---- what is read --------------------------------------------------------------------------------------------------------------------


_RANKS = {"weight_shape": 1, "g_idx": 1}  # all others are matrices


def _check_ranks(checkpoint: Checkpoint, layer: str, suffixes: Iterable[str]) -> None:
    for suffix in suffixes:
        shape = checkpoint.tensors[f"{layer}.{suffix}"].shape
        if len(shape) != _RANKS.get(suffix, 2) or 0 in shape:
            raise ValueError(f"{suffix} has shape {list(shape)}")


def layer_shape(checkpoint: Checkpoint, info: FormatInfo, layer: str) -> tuple[int, int]:
    """(N, K) of a packed linear: from the header where it says so, else from weight_shape. Reads sixteen bytes, no torch."""
    unpacked = info.grid(layer).rounds_activations
    name = info.marking(layer) if unpacked else f"{layer}.{info.format.shape_from}"
    if name not in checkpoint.tensors:
        raise BadInput("E302", f"{name} is missing", where=str(checkpoint.folder), fix=AGAIN)
    tensor = checkpoint.tensors[name]
    if unpacked:
        if len(tensor.shape) == 2:
            return tensor.shape[0], tensor.shape[1]
    elif info.format.header_shape is not None:
        if len(tensor.shape) == 2:
            return info.format.header_shape(tensor.shape, info.grid(layer))
    elif tensor.dtype in ("I64", "I32") and tuple(tensor.shape) == (2,):
        data = bytes(checkpoint.raw(name))
        width = len(data) // 2
        n, k = (int.from_bytes(data[i * width : (i + 1) * width], "little", signed=True) for i in range(2))
        return n, k
    raise BadInput("E346", f"{name} is {tensor.dtype} {list(tensor.shape)}", where=str(tensor.file), fix=AGAIN)


def read_parts(checkpoint: Checkpoint, info: FormatInfo, layer: str, masks: Masks | None = None) -> LinearParts:
    """One layer from disk, unpacked, scales in their own dtype; with its mask, if metadata or `masks` has one. BadInput names the layer."""
    suffixes = info.format.tensors_of(info.grid(layer))
    present = [suffix for suffix in suffixes if f"{layer}.{suffix}" in checkpoint.tensors]
    needed = [suffix for suffix in suffixes if suffix not in info.format.optional]
    missing = [f"{layer}.{suffix}" for suffix in needed if suffix not in present]
    if missing:
        raise BadInput.from_problems("E302", [Problem(f"{name} is missing", str(checkpoint.folder), AGAIN) for name in missing])
    try:
        _check_ranks(checkpoint, layer, present)
        tensors = {suffix: checkpoint.read(f"{layer}.{suffix}") for suffix in present}
        parts = info.format.unpack(tensors, info.layers[layer], info.variant, info.grid(layer))
    except ValueError as problem:
        raise BadInput(
            "E346",
            f"{layer}: {problem}",
            where=str(checkpoint.tensors[info.marking(layer)].file),
            fix=info.format.misread,
        ) from problem
    if masks is None or layer not in masks:
        return parts
    return replace(parts, keep=masks.checked_keep(layer, parts.codes))


def read_linear(checkpoint: Checkpoint, info: FormatInfo, layer: str) -> QuantizedLinear:
    """One layer from disk with fp16 scales; refused where foreign scales are not exact in fp16."""
    return read_parts(checkpoint, info, layer).quantized(layer)


def read_tensors(checkpoint: Checkpoint, info: FormatInfo, layer: str) -> dict[str, Tensor]:
    """The tensors of one linear as they lie in the file, by suffix."""
    suffixes = info.format.tensors_of(info.grid(layer))
    return {suffix: checkpoint.read(f"{layer}.{suffix}") for suffix in suffixes if f"{layer}.{suffix}" in checkpoint.tensors}


def tiles_of(checkpoint: Checkpoint, info: FormatInfo, layer: str) -> PackedLinear | PackedSparseLinear:
    """The tiles of a native linear, as kernels take them."""
    assert info.format.tiles is not None
    return info.format.tiles(read_tensors(checkpoint, info, layer), *layer_shape(checkpoint, info, layer), info.layers[layer])
