"""Linears whose codes stay and whose scales are trained.

    weight[n, k] = codes[n, k] * scales[n, g] * factors[n, g]         g = k // group_size; only the factors are trained, from 1

Training a factor instead of the scale itself makes every scale move by a share of its own size, so one learning rate serves scales
of 0.001 and norms of 1 alike. A pruned weight is code 0 and stays 0 whatever its scale does: no mask is needed here.

Scales that are small integers times one number for each output (quantize/integer_scales.py) stay so: each output has one factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from marlinctl.checkpoint.formats.base import LinearParts
from marlinctl.distillation.distributed import local, whole
from marlinctl.distillation.parameters import assemble, by_parameter, parent_of
from marlinctl.errors import UsageError
from marlinctl.models.places import Place
from marlinctl.quantize.grid import round_scales
from marlinctl.quantize.integer_fit import has_form, rescaled


class CodesTimesScales(nn.Module):
    """What torch calls a parametrization: makes the weight out of the factors, whenever it is asked for."""

    codes: Tensor  # [..., N, K] int8
    scales: Tensor  # [..., N, G] float32

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.integer = has_form(scales)

    def forward(self, factors: Tensor) -> Tensor:
        steps = (self.scales * factors).unsqueeze(-1)  # [..., N, G, 1]
        return (self.codes.unflatten(-1, (steps.shape[-2], -1)) * steps).flatten(-2)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return torch.ones_like(self.scales[..., :1] if self.integer else self.scales)


def freeze_codes(model: nn.Module, places: Mapping[str, Place], parts: Mapping[str, LinearParts]) -> None:
    """Replace the weights of packed linears by codes times scales. places: tensor name -> place; parts: linear -> codes and scales."""
    packed = by_parameter({f"{layer}.weight": places[f"{layer}.weight"] for layer in parts})
    for parameter, tensors in packed.items():
        _refuse_transposed(parameter, places[tensors[0]])
        _refuse_mixed(parameter, tensors, parts)
        module, name = parent_of(model, parameter)
        weight = getattr(module, name)
        pieces = [(places[tensor], parts[tensor.removesuffix(".weight")]) for tensor in tensors]
        codes = assemble(((place, part.steps()) for place, part in pieces), weight.shape, torch.int8)
        groups = pieces[0][1].scales.shape[-1]
        scales = assemble(((place, part.scales) for place, part in pieces), torch.Size((*weight.shape[:-1], groups)), torch.float32)
        made = CodesTimesScales(codes.to(weight.device), scales.to(weight.device))
        parametrize.register_parametrization(module, name, made, unsafe=True)  # unsafe: factors have another shape than the weight


def trained_scales(model: nn.Module, place: Place) -> Tensor:
    """[N, G] float32: scales times factors of one linear, as they are now."""
    made, factors = _parts_of(model, place.parameter)
    return place.of(made.scales * whole(factors.detach()))


def settle(model: nn.Module, parameters: Mapping[str, bool]) -> None:
    """Make every scale one that the checkpoint can hold: round scales times factors, and put the factors back to 1.

    parameters: parameter -> whether its scales must be exact in bfloat16 too.
    """
    with torch.no_grad():
        for parameter, bfloat16_exact in parameters.items():
            made, factors = _parts_of(model, parameter)
            if made.integer:
                made.scales.copy_(rescaled(made.scales, whole(factors), bfloat16_exact))
            else:
                made.scales.copy_(round_scales(made.scales * whole(factors), bfloat16_exact))
            local(factors).fill_(1.0)


def exact_in_bfloat16(scales: Tensor) -> bool:
    return bool(torch.equal(scales.to(torch.bfloat16).to(torch.float32), scales.to(torch.float32)))


def _parts_of(model: nn.Module, parameter: str) -> tuple[CodesTimesScales, nn.Parameter]:
    module, name = parent_of(model, parameter)
    held: Any = module.parametrizations[name]  # type: ignore[index]  # set by register_parametrization
    return held[0], held.original


def _refuse_transposed(parameter: str, place: Place) -> None:
    if place.transposed:
        raise UsageError(
            "E288",
            f"transformers holds the experts in {parameter} transposed, and scales are trained row by row",
            where="--mode scales",
            fix="--mode full or blockwise, before the model is quantized",
        )


def _refuse_mixed(parameter: str, tensors: list[str], parts: Mapping[str, LinearParts]) -> None:
    sizes = {tensor: parts[tensor.removesuffix(".weight")].group_size for tensor in tensors}
    if len(set(sizes.values())) > 1:
        raise UsageError(
            "E288",
            f"the experts in {parameter} have different group sizes: {sorted(set(sizes.values()))}",
            where="--mode scales",
            fix="quantize all experts of a block with one group size",
        )
