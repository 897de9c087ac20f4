"""What a checkpoint is, from config.json and the headers of its shards: no torch, no weights, well under a second.

The one thing that headers do not say is the true K of a packed linear; it is read from `weight_shape`, sixteen bytes. Of the 2:4 pattern
they know what metadata or a mask file states; an undeclared pattern, and how many kept weights are zero, need the weights, which are
read on request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlinctl.checkpoint import manifest, runtimes, sparsity
from marlinctl.checkpoint.formats.base import FormatInfo
from marlinctl.checkpoint.mask import open_masks
from marlinctl.checkpoint.orders import folded
from marlinctl.errors import number_of
from marlinctl.models.config import sizes_of
from marlinctl.quantize.scheme import INT4, SIXTEEN_BIT
from marlinctl.system.log import printable

if TYPE_CHECKING:
    from marlinctl.checkpoint.mask import Masks
    from marlinctl.checkpoint.reader import Checkpoint

_ORIGINS = {sparsity.METADATA: "metadata", sparsity.MASK_FILE: "mask file", sparsity.ZEROS: "zeros of the weights alone"}
_NATIVE_WARNING = (
    "transformers and vLLM load native folders where marlinctl is installed, and refuse them elsewhere: transformers finds no model file; "
    "`marlinctl pack --format ct` writes one that both load without"
)


def inspect(folder: Path, *, weights: bool = False) -> dict[str, Any]:
    """The facts as one JSON-ready document. `weights`: read them all, for what only they show."""
    from marlinctl.checkpoint.folder import open_folder

    with open_folder(folder) as examined, open_masks(folder) as masks:
        checkpoint, info = examined.checkpoint, examined.info
        packed = runtimes.packed_of(checkpoint, info)
        loads = runtimes.loads(packed)
        bits = Counter(info.grid(layer).bits for layer in info.layers) or Counter([SIXTEEN_BIT])
        return {
            "folder": str(folder),
            **_model(checkpoint.config),
            "format": info.name,
            "variant": info.variant,
            "bits": bits.most_common(1)[0][0],
            "linears_by_bits": {str(size): count for size, count in bits.most_common()} if info.layers else {},
            "linears_by_activations": dict(Counter(info.activations(layer) for layer in info.layers).most_common()),
            "group_sizes": {str(size): count for size, count in Counter(info.layers.values()).most_common()},
            "scale_dtypes": _dtypes(checkpoint, info),
            **_parameters(checkpoint, info, packed.shapes),
            "integer_scales": _integer_scales(checkpoint, info) if weights else None,
            "pattern": _pattern(checkpoint, info, masks, weights),
            "folded": list(folded(folder)),
            "shards": len(checkpoint.files),
            "loads_in": list(loads.accepted),
            "refused_by": {program: list(reasons) for program, reasons in loads.refused.items()},
            "untested": dict(loads.untested),
            "warnings": [*examined.notes, *([_NATIVE_WARNING] if info.format.native else [])],
            "manifest": _manifest(folder),
        }


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    architectures = config.get("architectures")
    sizes = sizes_of(config)
    tied = config.get("tie_word_embeddings")  # the wrapper's own setting counts
    return {
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
        "model_type": config.get("model_type"),
        "blocks": sizes.get("num_hidden_layers"),
        "hidden_size": sizes.get("hidden_size"),
        "vocab_size": sizes.get("vocab_size"),
        "experts": sizes.get("num_experts") or sizes.get("num_local_experts"),
        "dtype": config.get("dtype") or config.get("torch_dtype") or sizes.get("dtype") or sizes.get("torch_dtype"),
        "tied_head": sizes.get("tie_word_embeddings") if tied is None else tied,
    }


def _parameters(checkpoint: Checkpoint, info: FormatInfo, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    other_parameters = 0
    owned, of_suffix = info.owned, {**info.format.tensors, **info.format.unpacked}
    for name, tensor in checkpoint.tensors.items():
        suffix = owned.get(name)
        kinds[of_suffix[suffix] if suffix else "not quantized"] += tensor.end - tensor.begin
        if suffix is None:
            other_parameters += prod(tensor.shape)
    quantized = sum(n * k for n, k in shapes.values())
    total = sum(kinds.values())
    dense = 2 * (quantized + other_parameters)
    return {
        "quantized_linears": len(shapes),
        "quantized_parameters": quantized,
        "other_parameters": other_parameters,
        "bits_per_quantized_weight": round(8 * (total - kinds["not quantized"]) / quantized, 3) if quantized else None,
        "bytes": {"total": total, **dict(kinds.most_common())},
        "dense_16bit_bytes": dense,
        "ratio_to_16bit": round(dense / total, 3) if total else None,
    }


def _dtypes(checkpoint: Checkpoint, info: FormatInfo) -> list[str]:
    names = (f"{layer}.{info.format.scales}" for layer in info.layers)
    return sorted({checkpoint.tensors[name].dtype for name in names if name in checkpoint.tensors})


def _integer_scales(checkpoint: Checkpoint, info: FormatInfo) -> int:
    """Linears of symmetric 4-bit codes in several groups whose scales are small integers times one number for each output."""
    from marlinctl.checkpoint.formats.registry import read_parts
    from marlinctl.quantize.integer_fit import has_form

    return sum(info.grid(layer) == INT4 and has_form(read_parts(checkpoint, info, layer).scales) for layer in info.layers)


def _pattern(checkpoint: Checkpoint, info: FormatInfo, masks: Masks | None, weights: bool) -> dict[str, Any]:
    """2:4 or not, in which linears, and who says so. `kind` is None where it is not stated and the weights were not read."""
    kept = sparsity.counted(checkpoint, info, masks) if weights else None
    found = kept.pattern if kept else sparsity.stated(checkpoint, info, masks)
    shapes = sparsity.shapes(checkpoint, info)
    total = sum(n * k for n, k in shapes.values())
    pruned = sum(n * k // 2 for n, k in (shapes[layer] for layer in found.linears))
    return {
        "kind": "2:4" if found.linears else "none" if weights else None,
        "origin": found.origin,
        "linears": len(found.linears),
        "of_linears": len(shapes),
        "density": round(1 - pruned / total, 4) if total and (found.linears or weights) else None,
        "zero_kept": kept.zero if kept and found.linears else None,
        "zero_kept_share": round(kept.zero / kept.kept, 6) if kept and kept.kept else None,
    }


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest says of itself; its digests are `verify`'s business."""
    if not (folder / manifest.NAME).is_file():
        return None
    document = manifest.read(folder)
    return {"files": len(document["files"]), "tool": document.get("tool")}


def table(facts: Mapping[str, Any]) -> str:
    """The facts for people."""
    sizes = ", ".join(
        f"{'whole rows' if size == '-1' else size} ({number_of(count, 'linear')})" for size, count in facts["group_sizes"].items()
    )
    kinds = ", ".join(f"{kind} {_megabytes(size)}" for kind, size in facts["bytes"].items() if kind != "total")
    name = f"{facts['architecture'] or 'unknown class'} ({facts['model_type']})"
    loads = runtimes.Loads(
        facts["loads_in"], {program: tuple(reasons) for program, reasons in facts["refused_by"].items()}, facts["untested"]
    )
    as_much = f", {facts['ratio_to_16bit']} times as much" if facts["ratio_to_16bit"] != 1 else ""
    rows: Sequence[tuple[str, str]] = (
        ("model", f"{name}, {_blocks(facts['blocks'])}, hidden size {facts['hidden_size']}"),
        ("format", f"{facts['format']}{' ' + facts['variant'] if facts['variant'] else ''}, {_bits(facts)} bits"),
        ("group size", sizes or "none: not quantized"),
        ("activations", _activations(facts["linears_by_activations"])),
        ("scales", _scales(facts)),
        ("quantized", f"{number_of(facts['quantized_linears'], 'linear')}, {facts['quantized_parameters']:,} weights"),
        ("bits per weight", str(facts["bits_per_quantized_weight"] or "")),
        ("pattern", _pattern_line(facts["pattern"])),
        ("folded", ", ".join(facts["folded"])),
        ("not quantized", f"{facts['other_parameters']:,} weights"),
        ("on disk", f"{_megabytes(facts['bytes']['total'])} in {number_of(facts['shards'], 'shard')}: {kinds}"),
        ("as 16-bit", f"{_megabytes(facts['dense_16bit_bytes'])}{as_much}"),
        *((title.lower(), said) for title, said in loads.rows()),
        ("manifest", f"{number_of(facts['manifest']['files'], 'file')}; check them with marlinctl verify" if facts["manifest"] else "none"),
    )
    lines = [(key, value) for key, value in rows if value]
    lines += [("note", warning) for warning in facts["warnings"]]
    return "\n".join(f"{key:<16}{printable(value, one_line=True)}" for key, value in lines)


def _blocks(count: object) -> str:
    return number_of(count, "block") if isinstance(count, int) else f"{count} blocks"


def _bits(facts: Mapping[str, Any]) -> str:
    """4, or 4 (12 linears) and 8 (2 linears)"""
    counts = facts["linears_by_bits"]
    return (
        str(facts["bits"]) if len(counts) < 2 else " and ".join(f"{bits} ({number_of(count, 'linear')})" for bits, count in counts.items())
    )


def _activations(counts: Mapping[str, int]) -> str:
    """Of the linears, where some are rounded when the model runs."""
    rounded = {kind for kind in counts if kind != "16-bit"}
    return ", ".join(f"{kind} ({number_of(count, 'linear')})" for kind, count in counts.items()) if rounded else ""


def _scales(facts: Mapping[str, Any]) -> str:
    """F16, integer in 12 of 14 linears"""
    count = facts["integer_scales"]
    return ", ".join(
        (*facts["scale_dtypes"], *([f"integer in {count} of {number_of(facts['quantized_linears'], 'linear')}"] if count else []))
    )


def _pattern_line(facts: Mapping[str, Any]) -> str:
    if facts["kind"] is None:
        return "none stated; --weights checks the weights"
    if facts["kind"] == "none":
        return "none: no linear has two zeros in each aligned four"
    parts = [f"2:4 in {facts['linears']} of {facts['of_linears']} linears", f"by the {_ORIGINS[facts['origin']]}"]
    parts.append(f"density of all linears {facts['density']}")
    if facts["zero_kept"] is not None:
        parts.append(f"{facts['zero_kept']:,} kept weights are zero ({100 * facts['zero_kept_share']:.2f} %)")
    return ", ".join(parts)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
