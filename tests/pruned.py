"""Small 2:4 checkpoints for tests: a tiny model pruned by magnitude, dense or packed, with its mask file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlinctl.checkpoint.formats import registry
from marlinctl.checkpoint.formats.registry import FORMATS
from marlinctl.checkpoint.mask import NAME, SUFFIX, pack_bits
from marlinctl.checkpoint.reader import open_checkpoint
from marlinctl.checkpoint.writer import StagedCheckpoint
from marlinctl.models.lookup import any_architecture
from marlinctl.quantize.types import QuantizedLinear
from tests.packed import rtn


def keep_largest(weight: Tensor) -> Tensor:
    """[N, K] bool: the two of each four with the largest magnitude."""
    quads = weight.float().abs().reshape(weight.shape[0], -1, 4)
    return torch.zeros_like(quads, dtype=torch.bool).scatter_(-1, quads.topk(2, dim=-1).indices, True).reshape(weight.shape)


def prune(source: Path, out: Path, *, mask: bool = True) -> dict[str, Tensor]:
    """A dense 2:4 copy of `source`; returns the masks by linear."""
    shutil.copytree(source, out)
    with open_checkpoint(source) as checkpoint:
        names = list(any_architecture(checkpoint.config).linears)
    keeps: dict[str, Tensor] = {}
    for shard in out.glob("model*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in names if f"{name}.weight" in tensors]:
            weight = tensors[f"{name}.weight"]
            keeps[name] = keep_largest(weight)
            tensors[f"{name}.weight"] = weight * keeps[name]
        save_file(tensors, shard, metadata={"format": "pt"})
    if mask:
        write_masks(out, keeps)
    return keeps


def write_masks(folder: Path, keeps: dict[str, Tensor]) -> None:
    save_file({name + SUFFIX: pack_bits(keep) for name, keep in keeps.items()}, folder / NAME)


def prune_and_quantize(source: Path, out: Path, *, group_size: int = 32, mask: bool = True) -> dict[str, QuantizedLinear]:
    """A ct copy of `source`: rounded to nearest, 2:4 with a mask file unless that is not wanted."""
    checkpoint = open_checkpoint(source)
    names = list(any_architecture(checkpoint.config).linears)
    weights = {name: checkpoint.read(f"{name}.weight") for name in names}
    keeps = {name: keep_largest(weight) for name, weight in weights.items()} if mask else {}
    codes = {name: rtn(weight * keeps[name] if mask else weight, group_size) for name, weight in weights.items()}
    sizes = dict.fromkeys(names, group_size)
    rest = [name for name in checkpoint.tensors if name.removesuffix(".weight") not in codes]
    ignore = registry.sixteen_bit_linears({name: checkpoint.tensors[name].shape for name in rest}, names)
    config = {**checkpoint.config, "quantization_config": registry.quantization_config(FORMATS["ct"], sizes, ignore)}
    with StagedCheckpoint(out, overwrite=False, fmt=FORMATS["ct"]) as staged:
        staged.write_shard({k: v for name, q in codes.items() for k, v in registry.linear_tensors(FORMATS["ct"], name, q).items()})
        staged.copy_tensors(checkpoint, rest)
        for name, keep in keeps.items():
            staged.write_mask(name, keep)
        staged.copy_companions(source)
        staged.publish(config, manifest={}, verify=lambda folder: None, report_files={})
    return codes


def edit_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace one tensor of a folder with a single shard."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def read_all(folder: Path) -> dict[str, Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}
