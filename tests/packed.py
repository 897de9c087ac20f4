"""Small quantized checkpoints for tests: round-to-nearest codes of a tiny model, published the way a real run publishes them.

Also the same codes written as strangers would write them, with numpy and safetensors alone, so that our reader is tested against
files that our writer had no part in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlinctl.checkpoint import mask, reader, writer
from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.kernels.linear import MarlinLinear, SparseMarlinLinear
from marlinctl.models.families import architecture
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.system.atomic import canonical

Model = TypeVar("Model", bound=torch.nn.Module)


def rtn(weight: Tensor, group_size: int) -> QuantizedLinear:
    """weight [N, K] rounded to the nearest code, one step per group; group_size -1 is the whole row."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    grouped = weight.float().reshape(n, k // size, size)
    scales = (grouped.abs().amax(-1) / 7.5).clamp_min(1e-4).to(torch.float16)
    codes = (grouped / scales.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).reshape(n, k)
    return QuantizedLinear(codes, scales, size)


def make_packed(
    source: Path,
    out: Path,
    fmt: str = "ct",
    *,
    group_size: int = 32,
    overrides: Mapping[str, int] | None = None,
    skip: Sequence[str] = (),
    verify: Callable[[Path], None] = lambda folder: None,
    edit_config: Callable[[dict[str, Any]], None] = lambda config: None,
    prune: Callable[[str, QuantizedLinear], QuantizedLinear] = lambda name, q: q,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, QuantizedLinear]:
    """Quantize every linear of `source` but those in `skip` and publish; returns the codes. `masks` go into the mask file."""
    checkpoint = reader.open_checkpoint(source)
    names = [name for name in architecture(checkpoint.config).linears if name not in skip]
    sizes = {name: (overrides or {}).get(name, group_size) for name in names}
    codes = {name: prune(name, rtn(checkpoint.read(f"{name}.weight"), size)) for name, size in sizes.items()}
    rest = [name for name in checkpoint.tensors if name.removesuffix(".weight") not in codes]
    ignore = registry.sixteen_bit_linears({name: checkpoint.tensors[name].shape for name in rest}, names)
    config = {
        **checkpoint.config,
        "quantization_config": registry.quantization_config(FORMATS[fmt], sizes, ignore, {"version": "test"}),
    }
    edit_config(config)
    with writer.StagedCheckpoint(out, overwrite=False, fmt=FORMATS[fmt]) as stage:
        stage.write_shard({k: v for name, q in codes.items() for k, v in registry.linear_tensors(FORMATS[fmt], name, q).items()})
        stage.copy_tensors(checkpoint, rest)
        stage.copy_companions(source)
        for name, keep in (masks or {}).items():
            stage.write_mask(name, keep)
        if fmt == "gptq":
            stage.write_file("quantize_config.json", canonical(config["quantization_config"]))
        stage.publish(
            config,
            manifest={"recipe": {"sha256": "0" * 64}, "source": {"kind": "hub", "name": "org/Tiny"}},
            verify=verify,
            report_files={"README.md": b"# card\n"},
        )
    return codes


def keep_of(name: str, n: int, k: int) -> Tensor:
    """Survivors [N, K] that depend on the name alone, and not on the weight: many of them are zero."""
    order = torch.rand(n, k // 4, 4, generator=torch.Generator().manual_seed(sum(name.encode()))).argsort(-1)
    return torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(-1, order[..., :2], True).reshape(n, k)


def pruned(name: str, q: QuantizedLinear) -> SparseQuantizedLinear:
    keep = keep_of(name, *q.codes.shape)
    return SparseQuantizedLinear(q.codes * keep, q.scales, q.group_size, keep)


def make_sparse_packed(
    source: Path, out: Path, fmt: str = "ct", *, stated: bool = True, **options: Any
) -> dict[str, SparseQuantizedLinear]:
    """make_packed of a 2:4 model, with its mask file where the format needs one. `stated=False`: as tools that know of none write it."""
    shapes = {
        name: (spec.out_features, spec.in_features) for name, spec in architecture(reader.open_checkpoint(source).config).linears.items()
    }
    named = {name: keep_of(name, *shape) for name, shape in shapes.items() if name not in options.get("skip", ())}
    masks = named if stated and fmt != "marlin_24" else None
    codes = make_packed(source, out, fmt, prune=pruned, masks=masks, **options)
    return {name: q for name, q in codes.items() if isinstance(q, SparseQuantizedLinear)}


def words(codes: np.ndarray) -> np.ndarray:
    """[R, C] codes -> [R, C/8] int32 of code + 8, lowest nibble first, by the definition."""
    u = (codes.astype(np.int64) + 8).reshape(codes.shape[0], -1, 8)
    return (u << (4 * np.arange(8))).sum(-1).astype(np.uint32).view(np.int32)


def foreign_ct(q: QuantizedLinear, scale_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    n, k = q.codes.shape
    return {
        "weight_packed": torch.from_numpy(words(q.codes.numpy())),
        "weight_scale": q.scales.to(scale_dtype),
        "weight_shape": torch.tensor([n, k]),
    }


def foreign_gptq(q: QuantizedLinear, *, v2: bool = False) -> dict[str, Tensor]:
    n, k = q.codes.shape
    zeros = np.zeros((q.scales.shape[1], n), dtype=np.int64) + (0 if v2 else -1)  # code 0 is nibble 8; v1 stores one less
    return {
        "qweight": torch.from_numpy(np.ascontiguousarray(words(q.codes.numpy()).T)),
        "qzeros": torch.from_numpy(words(zeros)),
        "scales": q.scales.T.contiguous(),
        "g_idx": torch.arange(k, dtype=torch.int32) // q.group_size,
    }


def make_foreign(
    source: Path, out: Path, block: Mapping[str, Any], linear: Callable[[QuantizedLinear], dict[str, Tensor]], *, group_size: int = 32
) -> dict[str, QuantizedLinear]:
    """A packed folder as another program writes it: one safetensors file, no manifest."""
    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    codes = {name: rtn(tensors.pop(f"{name}.weight"), group_size) for name in architecture(config).linears}
    packed = {f"{name}.{suffix}": tensor for name, q in codes.items() for suffix, tensor in linear(q).items()}
    save_file({**tensors, **packed}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": dict(block)}))
    return codes


def ct_block(**weights: Any) -> dict[str, Any]:
    """The smallest compressed-tensors block that clients load."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }


def gptq_block(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq"} | changes


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the shards of a folder as one, after a change; the index follows."""
    stem = "marlin" if (folder / "marlin.safetensors.index.json").exists() else "model"
    shards = sorted(path for path in folder.glob("*.safetensors") if path.name != mask.NAME)
    tensors = {name: tensor.clone() for shard in shards for name, tensor in load_file(shard).items()}
    change(tensors)
    for shard in shards:
        shard.unlink()
    name = f"{stem}-00001-of-00001.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata={"format": "pt"})
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))


def edit_masks(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the mask file after a change; one that is left empty goes away."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / mask.NAME).items()}
    change(tensors)
    (folder / mask.NAME).unlink()
    if tensors:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / mask.NAME)


def remake_manifest(folder: Path) -> None:
    """As if the damage had happened before publishing: digests agree with the damaged files."""
    from marlinctl.checkpoint import manifest

    (folder / manifest.NAME).unlink(missing_ok=True)
    (folder / manifest.NAME).write_bytes(canonical(manifest.build(folder, {})))


def by_reference(model: Model) -> Model:
    """The model, with packed linears that multiply by the reference: in float32, where torch's int4 operator has bfloat16."""
    for module in model.modules():
        if isinstance(module, MarlinLinear | SparseMarlinLinear):
            module.keeps_tiles = True
    return model


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
