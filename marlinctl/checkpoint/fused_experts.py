"""Experts that a checkpoint holds as one three-dimensional tensor for each projection of a block: a view that gives each a name of its own.

    before    model.layers.0.mlp.experts.gate_up_proj [E, 2 I, H] ─► bytes
    after     model.layers.0.mlp.experts.3.gate_proj.weight [I, H] ─► some of these bytes      and so on, nothing is copied

So whatever reads, solves and writes the linears of experts does it for such a checkpoint too, and what is written has a tensor for each
linear. The way back is `joined`: transformers' own loading puts experts together for families whose checkpoints have them one by one; for
the others it is done here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from marlinctl.checkpoint.lazy import LazyTensor
from marlinctl.checkpoint.safetensors_header import Cut, TensorInfo
from marlinctl.checkpoint.sixteen_bit import Made
from marlinctl.errors import BadInput
from marlinctl.models.architectures import Architecture, Block, Experts
from marlinctl.models.lookup import architecture_of
from marlinctl.models.places import Place, expert_places
from marlinctl.system.atomic import DTYPE_BYTES
from marlinctl.system.files import shown

if TYPE_CHECKING:
    from torch import Tensor

    from marlinctl.checkpoint.reader import Checkpoint, MadeTensor

_ONE_BY_ONE = re.compile(r"\.experts\.\d+\.")


def with_single_experts(checkpoint: Checkpoint, known: Architecture) -> Checkpoint:
    """The checkpoint with a name for each expert; itself where it has them, or has none. Files stay those of `checkpoint`."""
    tensors, parts, made = dict(checkpoint.tensors), dict(checkpoint.parts), dict(checkpoint.made)
    for block in known.blocks:
        for experts in block.experts:
            _split(tensors, parts, made, block, experts)
        for name, module_name in block.renamed.items():  # who stores all experts in one tensor also calls the router as the module does
            if name not in tensors and module_name in tensors:
                parts[name] = tensors.pop(module_name)
                tensors[name] = replace(parts[name], name=name)
                if module_name in made:
                    made[name] = made.pop(module_name)
    return checkpoint if tensors.keys() == checkpoint.tensors.keys() else replace(checkpoint, tensors=tensors, parts=parts, made=made)


def _split(
    tensors: dict[str, TensorInfo],
    parts: dict[str, TensorInfo],
    made: dict[str, MadeTensor],
    block: Block,
    experts: Experts,
) -> None:
    """Replace the tensors of all experts by tensors of each. BadInput E302 for one of another shape."""
    places = [expert_places(block, experts, e) for e in range(experts.count)]
    for i, parameter in enumerate(experts.parameters):
        of_module = f"{block.prefix}.{experts.module}.{parameter}"
        stored = next((name for name in (*_whole(block, experts)[i : i + 1], of_module) if name in tensors), None)
        if stored is None:
            continue
        info = tensors.pop(stored)
        computed = made.pop(stored, None)
        for e, of_expert in enumerate(places):
            for name, place in of_expert.items():
                if place.parameter == of_module:
                    spec = block.linears[f"{block.prefix}.{name}"]
                    shape = (spec.out_features, spec.in_features)
                    part = _part(info, f"{spec.name}.weight", shape, e, place, experts.count)
                    tensors[part.name], parts[part.name] = part, info
                    if isinstance(computed, Made):
                        one = computed.of_expert(e, part.name, shape, place)
                        tensors[part.name], made[part.name] = one.info, one
                        parts[part.name] = replace(computed.parts["codes"], name=stored)  # as it lies in the file


def _whole(block: Block, experts: Experts) -> list[str]:
    return [f"{block.prefix}.{name}" for name in experts.whole]


def _part(info: TensorInfo, name: str, shape: tuple[int, int], e: int, place: Place, count: int) -> TensorInfo:
    """One linear of expert `e` in the tensor of all."""
    rows = place.index[-1] if len(place.index) > 1 else slice(None)
    assert isinstance(rows, slice)
    first, step = rows.start or 0, rows.step or 1
    width = shape[1]
    height = info.nbytes // (count * width * DTYPE_BYTES[info.dtype])  # of an expert's matrix, with all linears that lie in it
    matrix = (width, height) if place.transposed else (height, width)
    if info.shape != (count, *matrix) or first + step * (shape[0] - 1) >= height:
        what = f"{shown(info.name)} has shape {list(info.shape)}, which does not hold {count} experts of {list(shape)}"
        fix = "config.json and the weights do not belong together; download both again"
        raise BadInput("E302", what, where=str(info.file), fix=fix)
    row = width * DTYPE_BYTES[info.dtype]
    begin = info.begin + e * height * row
    if place.transposed or step > 1:
        return TensorInfo(name, info.dtype, shape, info.file, begin, begin + height * row, Cut(matrix, place.transposed, first, step))
    begin += first * row
    return TensorInfo(name, info.dtype, shape, info.file, begin, begin + shape[0] * row)


def joined(checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """The tensors of a model as transformers' own loading takes them: with one for all experts, of families whose checkpoints have that."""
    if not any(_ONE_BY_ONE.search(name) for name in tensors):
        return tensors
    try:
        known = architecture_of(checkpoint.config, tensors.keys())
    except BadInput:  # transformers may know the layout; it loads all tensors or none
        return tensors
    found = dict(tensors)
    for block in known.blocks:
        for experts in block.experts:
            for whole, parameter in zip(_whole(block, experts), experts.parameters, strict=False):
                of_module = f"{block.prefix}.{experts.module}.{parameter}"
                places = {
                    f"{block.prefix}.{name}.weight": place
                    for e in range(experts.count)
                    for name, place in expert_places(block, experts, e).items()
                    if place.parameter == of_module
                }
                if found.keys() >= places.keys():
                    pieces = {name: (place, found.pop(name)) for name, place in places.items()}
                    found[whole] = LazyTensor(partial(_assembled, list(pieces.values())))
    return found


def _assembled(pieces: Sequence[tuple[Place, LazyTensor]]) -> Tensor:
    """A parameter from all of its parts, which come in the order of experts."""
    import torch

    place, first = pieces[0][0], pieces[0][1][...]
    count = 1 + max(int(str(place.index[0])) for place, _ in pieces)
    height = first.shape[0] * len(pieces) // count
    shape = (first.shape[1], height) if place.transposed else (height, first.shape[1])
    whole = torch.empty(count, *shape, dtype=first.dtype)
    for place, piece in pieces:
        place.of(whole).copy_(piece[...])
    return whole
