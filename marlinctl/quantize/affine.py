"""Scales and zero points of asymmetric codes: weight = (code - zero) * scale, one zero for each group of inputs and each output.

A group whose weights lie to one side of zero leaves half of a symmetric grid empty. The zero is a code itself, so that a weight of 0 is
exact and padding costs nothing. With steps = code - zero all of the symmetric solver holds; only the range of the steps differs from group
to group, lowest - zero to highest - zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.quantize.grid import round_scales
from marlinctl.quantize.scheme import Grid


def search_ranges(
    weight: Tensor,
    importance: Tensor | None,
    *,
    group_size: int,
    bfloat16_exact: bool,
    ratios: tuple[float, ...],
    margin: float,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """For each group of each row the scale and the zero with the least weighted rounding error Σ_j h_j (w_j - q_j)².

    The range from the smallest to the largest weight, 0 included, stands unless a share of it promises an error smaller by more than
    `margin`, a share of the standing one's.

    weight: [R, K] float32. importance: [K] float32 >= 0, or None for plain squares. ratios: the shares. Returns scales and zeros, [R, G]
    float32 each; scales are rounded by `round_scales`, zeros are whole numbers within the grid.
    """
    rows, k = weight.shape
    groups = k // group_size
    grouped = weight.reshape(rows, groups, group_size)
    low, high = grouped.amin(-1).clamp_max(0.0), grouped.amax(-1).clamp_min(0.0)  # [R, G]
    h = None if importance is None else importance.reshape(groups, group_size)
    best_scale, best_zero = _range(low, high, 1.0, bfloat16_exact, grid)
    chunk = max(1, 2**18 // k)  # rows whose temporaries stay in the cache

    def error(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        t, z = w / scale.unsqueeze(-1), zero.unsqueeze(-1)
        delta = torch.minimum(torch.maximum(t.round(), grid.lowest - z), grid.highest - z).sub_(t).square_()
        return (delta.sum(-1) if h is None else (delta * h).sum(-1)) * scale.square()

    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        least = error(grouped[part], best_scale[part], best_zero[part]) * (1.0 - margin)
        for ratio in ratios:
            scale, zero = _range(low[part], high[part], ratio, bfloat16_exact, grid)
            found = error(grouped[part], scale, zero)
            better = found < least
            least = torch.where(better, found, least)
            best_scale[part] = torch.where(better, scale, best_scale[part])
            best_zero[part] = torch.where(better, zero, best_zero[part])
    return best_scale, best_zero


def _range(low: Tensor, high: Tensor, ratio: float, bfloat16_exact: bool, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale that spreads a share of the range over all codes, and the code that is nearest to 0 then."""
    scale = round_scales((high - low) * (ratio / (grid.highest - grid.lowest)), bfloat16_exact)
    zero = (grid.lowest - low * ratio / scale).round().clamp(grid.lowest, grid.highest)
    return scale, zero
