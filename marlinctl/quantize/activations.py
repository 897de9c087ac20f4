"""Activations of 8 bits, rounded when the model runs: each token of an input has a scale of its own, or one for each 128 of K.

    x [.., K] ─► scale s [.., 1] = max |x| / 127 (int8) or / 448 (float8_e4m3fn) ─► codes q = round(x / s) ─► y = (q Wᵀ) s + bias

This is what vLLM's kernels compute (scaled_int8_quant, scaled_fp8_quant with a scale per token); compressed-tensors divides int8 by 127.5.
Codes are exact in every float type that models run in, so a product in bfloat16 has the error of its weights and of its sum alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from marlinctl.quantize.scheme import ACTIVATION_GROUP, E4M3_HIGHEST, INT8

Rounded = Literal["int8", "fp8"]  # to these codes, with one scale for each token
RoundedAs = Literal["int8", "int8-128", "fp8"]  # int8-128: with one for each 128 of K
INT8_STEPS = 127.0  # from zero to a token's largest magnitude
_TINY = 2.0**-100  # the scale of a token of zeros
_SMALLEST_FP8_SCALE = 1.0 / (E4M3_HIGHEST * 512.0)  # below which vLLM's scales do not fall


def group_of(activations: str) -> int | None:
    """Of K, that share a scale; None for all. ValueError for what is not a way to round."""
    if activations not in get_args(RoundedAs):
        raise ValueError(f"activations are rounded as {', '.join(get_args(RoundedAs))}, not as {activations}")
    return ACTIVATION_GROUP if activations == "int8-128" else None


def _codes_of(activations: RoundedAs) -> Rounded:
    return "fp8" if activations == "fp8" else "int8"


def rounded(x: Tensor, activations: Rounded, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes [.., K] and scales [.., 1] of x [.., K], both float32: x is about their product.

    group: so many of K share a scale instead of all, and scales are [.., ceil(K / group)]; the last group may be short.

    Codes of int8 are -127..127. Where the largest magnitude is infinite or NaN, so are scale or codes: no product with them is finite.
    """
    if group is not None:
        k = x.shape[-1]
        codes, scales = rounded(pad(x, (0, -k % group)).reshape(*x.shape[:-1], -(-k // group), group), activations)
        return codes.flatten(-2)[..., :k], scales.squeeze(-1)
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    if activations == "int8":
        scales = largest / torch.full_like(largest, INT8_STEPS)  # by a number, torch multiplies with 1 / 127 on a GPU
        return (x / scales.clamp_min(_TINY)).round_().clamp_(INT8.lowest, INT8.highest), scales
    scales = (largest / E4M3_HIGHEST).clamp_min(_SMALLEST_FP8_SCALE)
    return (x / scales).clamp_(-E4M3_HIGHEST, E4M3_HIGHEST).to(torch.float8_e4m3fn).float(), scales


def nearest(x: Tensor, activations: RoundedAs) -> Tensor:
    """[.., K] float32: what the codes of x [.., K] stand for."""
    group = group_of(activations)
    codes, scales = rounded(x, _codes_of(activations), group)
    return codes * (scales if group is None else scales.repeat_interleave(group, -1)[..., : x.shape[-1]])


def operand(x: Tensor, activations: RoundedAs, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What the rounded x [.., K] is to a product in `dtype`: y [.., K] of that dtype, and a factor [.., 1] float32 of what comes out.

    With one scale a token y is exact: codes times a power of two, so that it is about as large as x. With several it is rounded to `dtype`,
    and the factor is None.
    """
    if group_of(activations) is not None:
        return nearest(x, activations).to(dtype), None
    codes, scales = rounded(x, _codes_of(activations))
    power = torch.exp2(torch.floor(torch.log2(scales.clamp_min(_TINY))))
    return (codes * power).to(dtype), scales / power


class RoundingLinear(nn.Linear):
    """A linear whose input is rounded. It shares its parameters with the one that it is made of."""

    def __init__(self, linear: nn.Linear, activations: RoundedAs) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta", dtype=linear.weight.dtype)
        self.weight, self.bias = linear.weight, linear.bias
        self.activations: RoundedAs = activations

    def forward(self, input: Tensor) -> Tensor:
        codes, factor = operand(input, self.activations, input.dtype)
        product = nn.functional.linear(codes, self.weight).float()
        if factor is not None:
            product = product * factor
        elif input.dtype != torch.float32:  # no 16-bit number is a code times one of several scales, but the sum of two is, to 2^-17
            rest = (nearest(input, self.activations) - codes.float()).to(input.dtype)
            product = product + nn.functional.linear(rest, self.weight).float()
        return (product if self.bias is None else product + self.bias.float()).to(input.dtype)


def round_activations(model: nn.Module, modules: Mapping[str, RoundedAs]) -> None:
    """Put a RoundingLinear in the place of each of these linears, by path. ValueError where a path leads to another module."""
    for path, activations in modules.items():
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{path} is not a linear")
        model.set_submodule(path, RoundingLinear(linear, activations))
