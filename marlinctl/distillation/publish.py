"""The result as a checkpoint: of the student's own form, checked from disk, and there as a whole or not at all.

what was trained      rounded to the dtype that the student's checkpoint has; scales to float16
everything else       copied as bytes: codes, embedding, head, tokenizer, config
the mask              travels on, or is written for the first time where it was found from zeros, or was renewed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlinctl.checkpoint import manifest as manifests
from marlinctl.checkpoint.formats.registry import detect
from marlinctl.checkpoint.mask import open_masks
from marlinctl.checkpoint.reader import Checkpoint, open_checkpoint, torch_dtype
from marlinctl.checkpoint.writer import StagedCheckpoint
from marlinctl.distillation.open import TrainingInputs
from marlinctl.errors import CheckFailed, NumericalProblem, Problem
from marlinctl.models.switches import without
from marlinctl.planning.memory import SHARD_BYTES
from marlinctl.sparsify.types import check_mask
from marlinctl.system.console import Console
from marlinctl.system.digests import sha256_of_tensors


def build(
    opened: TrainingInputs,
    values: Iterable[tuple[str, Tensor]],
    staged: StagedCheckpoint,
    *,
    recipe_yaml: str,
    manifest: Mapping[str, Any],
    report_files: Callable[[Path], Mapping[str, bytes]],  # of the finished folder
    console: Console,
) -> None:
    """Write and check; moving into place is the job's. `values`: every tensor that changes, by name, already rounded."""
    checkpoint = opened.student.checkpoint
    digests = _write_changed(opened, values, staged)
    staged.copy_tensors(checkpoint, [name for name in checkpoint.tensors if name not in digests])
    for layer in opened.pattern.shapes:
        staged.write_mask(layer, opened.pattern.mask(layer))
    staged.copy_companions(checkpoint.folder)
    staged.write_file("recipe.yaml", recipe_yaml.encode())
    staged.finish(
        without(checkpoint.config),
        manifest={**manifest, **_tuned(opened, digests), "tensors": digests, "finished": True},
        verify=lambda folder: check_written(folder, opened, digests, console),
        report_files={},
    )
    for name, data in report_files(staged.path).items():
        staged.write_file(name, data)


def _tuned(opened: TrainingInputs, trained: Iterable[str]) -> dict[str, list[str]]:
    """Norms of a quantized student that are not the original's, by this training or an earlier step: `verify --source` allows for them."""
    info, folder = opened.student.info, opened.student.checkpoint.folder
    if not info.layers:
        return {}
    earlier = manifests.tuned_of(manifests.read(folder)) if (folder / manifests.NAME).is_file() else frozenset()
    return {manifests.TUNED: sorted({*earlier, *(name for name in trained if name not in info.owned)})}


def _write_changed(opened: TrainingInputs, values: Iterable[tuple[str, Tensor]], staged: StagedCheckpoint) -> dict[str, str]:
    """Shards of what was trained; returns SHA-256 by tensor name."""
    digests: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    size = 0
    for name, value in values:
        scales = name.endswith(".weight_scale")
        dtype = torch.float16 if scales else torch_dtype(opened.student.checkpoint.tensors[name])
        tensor = value.to("cpu", dtype).contiguous()
        if not bool(torch.isfinite(tensor).all()):
            raise NumericalProblem(
                "E604",
                f"{name} holds values that {str(dtype).removeprefix('torch.')} cannot hold after training",
                where=name,
                fix="a lower --learning-rate; the job's folder is kept",
            )
        digests[name] = sha256_of_tensors(tensor)
        pending[name] = tensor
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            staged.write_shard(pending)
            pending, size = {}, 0
    if pending:
        staged.write_shard(pending)
    return digests


def check_written(folder: Path, opened: TrainingInputs, digests: Mapping[str, str], console: Console) -> None:
    """CheckFailed unless every trained tensor reads back, every mask is 2:4 and obeyed, and codes are the student's, bit for bit."""
    problems: list[Problem] = []
    again = "check the disk, then `marlinctl resume OUT`"
    with open_checkpoint(folder) as written, open_masks(folder) as masks:
        with console.progress("check from disk", len(digests) + len(opened.pattern.shapes)) as progress:
            for name, digest in digests.items():
                if name not in written.tensors or sha256_of_tensors(written.read(name)) != digest:
                    problems.append(Problem(f"{name} on disk differs from what was trained", str(folder), again))
                progress.advance()
            for layer, (n, k) in opened.pattern.shapes.items():
                mask = masks.keep(layer, n, k) if masks is not None else opened.pattern.mask(layer)
                problems += _pattern_problems(layer, mask, opened, written)
                progress.advance()
        packed = detect(written.config, written.tensors).layers
        for layer in packed:
            for name in (f"{layer}.{suffix}" for suffix in ("weight_packed", "weight_shape", "weight_zero_point")):
                if name in opened.student.checkpoint.tensors and written.raw(name) != opened.student.checkpoint.raw(name):
                    problems.append(Problem(f"{name} is not the student's", str(folder), again))
    if problems:
        raise CheckFailed.from_problems("E103", problems)


def _pattern_problems(layer: str, mask: Tensor, opened: TrainingInputs, written: Checkpoint) -> list[Problem]:
    check_mask(mask)
    if not torch.equal(mask, opened.pattern.mask(layer)):
        return [Problem(f"the mask of {layer} is not the one that was trained with", layer, "please report it: a defect of marlinctl")]
    if f"{layer}.weight" not in written.tensors:
        return []  # packed: its codes are compared with the student's
    alive = int(((written.read(f"{layer}.weight") != 0) & ~mask).sum())
    what = f"{layer} is not 2:4 any more: {alive} pruned weights are not zero"
    return [Problem(what, layer, "please report it: a defect of marlinctl")] if alive else []
