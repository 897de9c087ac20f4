"""The symmetric grid: code x scale, codes -8..7, -128..127 or float8_e4m3fn, one scale for each group of inputs and each output.

The grid is lopsided (one level more on the negative side), so the sign of the scale is worth a bit: a negative scale puts the largest
weight on the lowest level. MARLIN multiplies by the scale and does not care about its sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.quantize.scheme import INT4, Grid

SMALLEST_SCALE = 2.0**-14  # the smallest normal float16: below it a float16 scale loses digits


def round_scales(scales: Tensor, bfloat16_exact: bool) -> Tensor:
    """The nearest scales that the checkpoint can hold, as float32: float16 and, where asked for, exact in bfloat16 as well.

    A runtime that computes in bfloat16 converts float16 scales to bfloat16. With scales that both formats hold exactly it computes
    with the weights that were solved for, at the price of 3 of 11 significant bits, which the solve takes into account.
    Zero and tiny scales become SMALLEST_SCALE, so that no group is without a grid.
    """
    rounded = scales.to(torch.bfloat16).float() if bfloat16_exact else scales
    limit = 65280.0 if bfloat16_exact else 65504.0  # the largest float16 (that bfloat16 holds)
    rounded = rounded.clamp(-limit, limit)
    tiny = rounded.abs() < SMALLEST_SCALE
    rounded = torch.where(tiny, torch.copysign(torch.full_like(rounded, SMALLEST_SCALE), rounded), rounded)
    return rounded.to(torch.float16).float()


def round_steps_(steps: Tensor, grid: Grid) -> Tensor:
    """The values of the grid that are nearest to `steps` [...] float32, in place."""
    if grid.floating:
        return steps.copy_(steps.clamp_(grid.lowest, grid.highest).to(torch.float8_e4m3fn))
    return steps.round_().clamp_(grid.lowest, grid.highest)


def search_scales(
    weight: Tensor,
    importance: Tensor | None,
    *,
    group_size: int,
    both_signs: bool,
    bfloat16_exact: bool,
    ratios: tuple[float, ...],
    margin: float = 0.0,
    grid: Grid = INT4,
) -> Tensor:
    """For each group of each row the scale with the least weighted rounding error Σ_j h_j (w_j - q_j)².

    The scale that just covers the largest weight, with the lowest code for it where both signs are allowed, stands unless another one
    promises an error smaller by more than `margin`, a share of the standing one's.

    weight: [R, K] float32. importance: [K] float32 >= 0 (the diagonal of the Hessian), or None for plain squares.
    ratios: the other candidates, as fractions of the scale that just covers the largest weight w: of four bits w / -8, which puts it on
    level -8, and w / 7.5 for the other sign; |w| / 7.5 alone where scales must be positive, |w| / 448 in FP8. Returns scales [R, G]
    float32, already rounded by `round_scales`.
    """
    rows, k = weight.shape
    groups = k // group_size
    grouped = weight.reshape(rows, groups, group_size)
    signed = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)  # [R, G] the weight of largest magnitude
    starts = [signed / grid.lowest, signed / grid.covers] if both_signs else [signed.abs() / grid.covers]
    h = None if importance is None else importance.reshape(groups, group_size)
    best = round_scales(starts[0], bfloat16_exact)
    chunk = max(1, 2**18 // k)  # rows whose temporaries stay in the cache

    def error(w: Tensor, s: Tensor) -> Tensor:
        t = w * s.reciprocal().unsqueeze(-1)
        delta = round_steps_(t.clone(), grid).sub_(t).square_()
        return (delta.sum(-1) if h is None else (delta * h).sum(-1)) * s.square()

    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        least = error(grouped[part], best[part]) * (1.0 - margin)
        for start in starts:
            for ratio in ratios:
                s = round_scales(start[part] * ratio, bfloat16_exact)
                found = error(grouped[part], s)
                better = found < least
                least = torch.where(better, found, least)
                best[part] = torch.where(better, s, best[part])
    return best
