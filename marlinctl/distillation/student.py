"""The student as the loop trains it: transformers' model, which of its parameters are trained, and their masks.

Weights are held in float32, whatever the checkpoint stores: a step of 1e-4 on a bfloat16 weight would mostly round to nothing. Where they
are sharded, they are gathered in the dtype of products: half of the bytes, and no copy of every weight for the backward pass.
The model stays in eval mode, so nothing in it is random.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from marlinctl.checkpoint.formats.registry import read_parts
from marlinctl.checkpoint.reader import torch_dtype
from marlinctl.checkpoint.transformers_model import load_dense
from marlinctl.distillation.agreement import require_same_weights
from marlinctl.distillation.distributed import Processes, local, whole
from marlinctl.distillation.masks import Masks, load_masks
from marlinctl.distillation.open import TrainingInputs
from marlinctl.distillation.parameters import by_parameter, trained_places
from marlinctl.distillation.scales import exact_in_bfloat16, freeze_codes, settle, trained_scales
from marlinctl.models.architectures import Architecture
from marlinctl.models.places import Place
from marlinctl.recipes.schema import Distill


@dataclass(frozen=True, slots=True)
class Student:
    model: nn.Module
    trained: Mapping[str, nn.Parameter]  # by their names in the model
    masks: Masks
    places: Mapping[str, Place]  # the tensors of the checkpoint that change -> where they lie
    scaled: Mapping[str, bool]  # parameters made of codes and scales -> whether their scales stay exact in bfloat16

    @torch.no_grad()
    def settle(self, opened: TrainingInputs) -> None:
        """Round everything trained to what the checkpoint can hold, so that what is measured is what is published."""
        settle(self.model, self.scaled)
        for parameter, tensors in by_parameter(self.places).items():
            if parameter not in self.scaled:
                held = local(self.trained[parameter])
                held.copy_(held.to(torch_dtype(opened.student.checkpoint.tensors[tensors[0]])))
        self.masks.prune()

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that changes, by its name in the checkpoint, in float32. All processes must ask together."""
        for parameter, tensors in by_parameter(self.places).items():
            if parameter in self.scaled:
                for tensor in tensors:
                    yield f"{tensor}_scale", trained_scales(self.model, self.places[tensor])
            else:
                full = whole(self.trained[parameter].detach())
                for tensor in tensors:
                    yield tensor, self.places[tensor].of(full)


def load_student(opened: TrainingInputs, asked: Distill, processes: Processes, dtype: torch.dtype) -> Student:
    """Read the student and prepare it for training in this process. dtype: of products."""
    known = opened.student.architecture
    model = load_dense(opened.student.source.folder, dtype=torch.float32, device="cpu" if processes.sharded else processes.device)
    model.requires_grad_(False)
    places = trained_places(known)
    scaled: dict[str, bool] = {}
    if asked.mode == "scales":
        places, scaled = _freeze_codes(model, places, opened)
    else:
        for parameter in by_parameter(places):
            model.get_parameter(parameter).requires_grad_(True)
    require_same_weights("student", model, processes)
    blocks = [model.get_submodule(block.path) for block in known.blocks]
    if asked.checkpointing:
        for block in blocks:  # keeps a block's input alone and runs it again in the backward pass
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    # A factor beside a scale is 1 and a little, which bfloat16 would round away.
    processes.shard(model, blocks, None if asked.mode == "scales" or dtype == torch.float32 else dtype)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    masks = Masks([], None, processes) if asked.mode == "scales" else load_masks(model, places, opened.pattern, asked, processes)
    return Student(model, trained, masks, places, scaled)


def _freeze_codes(model: nn.Module, places: Mapping[str, Place], opened: TrainingInputs) -> tuple[dict[str, Place], dict[str, bool]]:
    """Train the factors of packed linears and the norms; no 16-bit linear, no bias."""
    student = opened.student
    parts = {layer: read_parts(student.checkpoint, student.info, layer) for layer in student.info.layers if f"{layer}.weight" in places}
    norms = {name: place for name, place in places.items() if _is_norm(name, student.architecture)}
    packed = {f"{layer}.weight": places[f"{layer}.weight"] for layer in parts}
    freeze_codes(model, packed, parts)
    for place in norms.values():
        model.get_parameter(place.parameter).requires_grad_(True)
    scaled = {
        parameter: all(exact_in_bfloat16(parts[tensor.removesuffix(".weight")].scales) for tensor in tensors)
        for parameter, tensors in by_parameter(packed).items()
    }
    for parameter in scaled:
        path, _, name = parameter.rpartition(".")
        model.get_parameter(f"{path}.parametrizations.{name}.original").requires_grad_(True)
    return {**norms, **packed}, scaled


def _is_norm(tensor: str, known: Architecture) -> bool:
    linears = known.linears
    return tensor.removesuffix(".weight") not in linears and not tensor.endswith(".bias")
