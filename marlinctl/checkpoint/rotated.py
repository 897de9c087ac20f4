"""A checkpoint whose residual stream and value heads are rotated (--rotate): a view, in which each tensor is computed when it is read.

    before    model.layers.0.self_attn.q_proj.weight W, input_layernorm.weight g ─► bytes
    after     W diag(g) R, and 1                                                  ─► computed in float64, rounded once to the stored dtype

So whatever reads, solves and writes the tensors of a checkpoint does it for a rotated one too. The rotation is data: its signs lie in the
folder that is published (ORDER_FILE), and whoever compares weights with the original's rotates those by them.

    rotation.stream_signs  [hidden]    int8, 1 or -1      R of the residual stream (quantize/rotate.py)
    rotation.value_signs   [head_dim]  int8, 1 or -1      of every value head
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from marlinctl.checkpoint.model_files import ORDER_FILE
from marlinctl.checkpoint.orders import ROTATION
from marlinctl.checkpoint.reader import Checkpoint, MadeTensor
from marlinctl.checkpoint.safetensors_header import read_header
from marlinctl.checkpoint.tied_head import with_own_head
from marlinctl.errors import BadInput, NumericalProblem, Problem
from marlinctl.models.architectures import Architecture
from marlinctl.models.config import sizes_of
from marlinctl.models.rotation import Stream, stream_of
from marlinctl.system.files import exists

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STREAM_SIGNS, VALUE_SIGNS = f"{ROTATION}stream_signs", f"{ROTATION}value_signs"
_SEEDS = (1, 2)  # of the stream's signs and of the values'
_VALUES = 1 << 24  # computed at a time: 128 MiB in float64


@dataclass(frozen=True, slots=True)
class Rotation:
    stream: Tensor  # signs [hidden] int8
    values: Tensor  # [head_dim] int8

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored."""
        return {STREAM_SIGNS: self.stream, VALUE_SIGNS: self.values}


def drawn(stream: Stream) -> Rotation:
    """The rotation of a model of these widths: always the same."""
    from marlinctl.quantize.rotate import random_signs

    return Rotation(random_signs(stream.hidden, _SEEDS[0]), random_signs(stream.head_dim, _SEEDS[1]))


def read_rotation(folder: Path) -> Rotation | None:
    """Of a folder's weights; None where they are not rotated. BadInput E301 for a damaged file."""
    if not exists(folder, ORDER_FILE):
        return None
    infos, problems = read_header(folder, ORDER_FILE)
    found = {name: infos[name] for name in (STREAM_SIGNS, VALUE_SIGNS) if name in infos}
    if problems or not found:
        return None  # read_orders names what is wrong
    fix = "fetch or write the checkpoint again; the model itself does not need this file"
    where = str(folder / ORDER_FILE)
    if len(found) != 2 or any(info.dtype != "I8" or len(info.shape) != 1 for info in found.values()):
        raise BadInput.from_problems("E301", [Problem("the rotation is not two rows of signs", where, fix)])
    with Checkpoint(folder, {}, found, (folder / ORDER_FILE,)) as checkpoint:
        rotation = Rotation(*(checkpoint.read(name) for name in (STREAM_SIGNS, VALUE_SIGNS)))
    if any(bool((signs.abs() != 1).any()) for signs in rotation.tensors().values()):
        raise BadInput("E301", "the rotation's signs are not all 1 or -1", where=where, fix=fix)
    return rotation


def rotated_as(folder: Path, original: Checkpoint, known: Architecture) -> Checkpoint:
    """The model that `folder` was made from, as the folder has it: rotated, where the folder is and the original is not. known: of the
    original, whose head may be tied.

    BadInput E371 for an original that is rotated in another way, or that cannot be rotated.
    """
    import torch

    ours, theirs = read_rotation(folder), read_rotation(original.folder)
    fix = "name the model that the folder was made from"
    if theirs is not None and (ours is None or not all(map(torch.equal, ours.tensors().values(), theirs.tensors().values()))):
        raise BadInput("E371", f"the weights of {original.folder} are rotated in another way", where=str(folder), fix=fix)
    if ours is None or theirs is not None:
        return original
    own, checkpoint = (known, original) if known.tied is None else (known.untied(), with_own_head(original, known))
    stream = stream_of(own, sizes_of(checkpoint.config))
    if stream is None:
        raise BadInput("E371", f"the weights are rotated, and those of {original.folder} cannot be", where=str(folder), fix=fix)
    return rotated_checkpoint(checkpoint, stream, ours)


def rotated_checkpoint(checkpoint: Checkpoint, stream: Stream, rotation: Rotation, device: torch.device | None = None) -> Checkpoint:
    """`checkpoint` with this rotation. Files stay those of `checkpoint`, and are closed with it. device: that computes; None: the CPU."""
    if (len(rotation.stream), len(rotation.values)) != (stream.hidden, stream.head_dim):
        raise BadInput(
            "E371",
            f"the rotation is of {len(rotation.stream)} channels and heads of {len(rotation.values)}, "
            f"the model has {stream.hidden} and {stream.head_dim}",
            where=str(checkpoint.folder),
            fix="name the model that the folder was made from",
        )
    changed = {*stream.read, *stream.written, *stream.norms, *stream.values_made, *stream.values_taken, stream.entered}
    made = {name: _Rotated(name, stream, rotation, device, checkpoint.made) for name in changed}
    return replace(checkpoint, made={**checkpoint.made, **made}, stored=checkpoint.stored or checkpoint.tensors)


@dataclass(frozen=True, slots=True)
class _Rotated:
    """One tensor of the rotated model."""

    name: str
    stream: Stream
    rotation: Rotation
    device: torch.device | None
    before: Mapping[str, MadeTensor]  # what of the checkpoint was computed already

    def __call__(self, checkpoint: Checkpoint) -> Tensor:
        import torch

        from marlinctl.quantize.rotate import rotated

        original, name, head_dim = replace(checkpoint, made=self.before), self.name, self.stream.head_dim
        if name in self.stream.norms:
            return torch.ones_like(original.read(name))
        gain = self._double(original.read(self.stream.read[name])) if name in self.stream.read else None
        whole = original.read(name)
        rows = whole.unsqueeze(-1) if whole.ndim == 1 else whole  # a bias is one column
        found = torch.empty_like(rows)
        if name in self.stream.written:
            for part in _parts(0, rows.shape[1], len(rows), head_dim):
                found[:, part] = self._written(self._double(rows[:, part])).to(found.device, found.dtype)
            return self._held(found).reshape(whole.shape)
        first = self.stream.values_made.get(name, len(rows))
        for part in (*_parts(0, first, rows.shape[1], head_dim), *_parts(first, len(rows), rows.shape[1], head_dim)):
            x = self._double(rows[part])
            x = x if gain is None else x * gain
            x = x if whole.ndim == 1 else rotated(x, self.rotation.stream)
            if part.start >= first:
                heads = x.unflatten(0, (-1, head_dim)).transpose(1, 2)
                x = rotated(heads, self.rotation.values).transpose(1, 2).flatten(0, 1)
            found[part] = x.to(found.device, found.dtype)
        return self._held(found).reshape(whole.shape)

    def rows(self, checkpoint: Checkpoint, ids: Tensor) -> Tensor:
        from marlinctl.quantize.rotate import rotated

        if self.name != self.stream.entered:
            return self(replace(checkpoint, device=None))[ids]
        found = replace(checkpoint, made=self.before, device=None).rows(self.name, ids)
        for part in _parts(0, len(found), found.shape[1], 1):  # a text of many languages asks for most of a vocabulary
            found[part] = rotated(self._double(found[part]), self.rotation.stream).to(found.device, found.dtype)
        return found

    def _written(self, x: Tensor) -> Tensor:
        """Columns of a weight whose output is added to the stream."""
        from marlinctl.quantize.rotate import rotated

        if self.name in self.stream.values_taken:
            x = rotated(x.unflatten(-1, (-1, self.stream.head_dim)), self.rotation.values).flatten(-2)
        return rotated(x.T, self.rotation.stream).T

    def _held(self, found: Tensor) -> Tensor:
        """NumericalProblem E604 where float16 does not hold a value: weights times a norm's may be 100 times as large as the weights."""
        import torch

        if found.dtype == torch.float16 and not bool(torch.isfinite(found).all()):
            what = f"{self.name}, rotated and times the weight of the norm before it, does not fit into float16"
            raise NumericalProblem("E604", what, where=self.name, fix="--rotate never, or a bfloat16 copy of the model")
        return found

    def _double(self, x: Tensor) -> Tensor:
        return x.to(self.device).double()


def _parts(begin: int, end: int, width: int, head_dim: int) -> Iterator[slice]:
    """Of rows of this width, whole heads at a time."""
    step = max(1, _VALUES // (width * head_dim)) * head_dim
    for first in range(begin, end, step):
        yield slice(first, min(first + step, end))
