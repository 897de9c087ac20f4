"""Scales of the form factor times channel scale (integer_scales.py): for weights before the solve, for codes after it, and trained.

    free scales of the groups of an output ─► candidates for the channel scale ─► for each the best factors ─► the best of all

Channel scales have so few significant bits that their products with all factors are exact in float16, and in bfloat16 too where that is
asked for. The largest free scale gets a factor of 8 to 16, so that a scale is a few per cent from a multiple, unless its group has
much smaller weights than others of its row; choosing between the two neighbours by their errors makes up for that
(docs/log/2026-12-01-integer-scales.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.quantize.grid import round_steps_
from marlinctl.quantize.integer_scales import HIGHEST_FACTOR, LOWEST_FACTOR, split
from marlinctl.quantize.scheme import INT4
from marlinctl.quantize.stacks import diagonal as diagonal_of

CHANNEL_BITS, CHANNEL_BITS_OF_BFLOAT16 = 7, 4  # of 11 and 8 significant bits; a factor takes four
LEAST_CHANNEL_SCALE = 2.0**-18  # a sixteenth of grid.SMALLEST_SCALE; from here on float16, whose last bit is 2^-24, has seven bits
_MOST_CHANNEL_SCALE = 3840.0  # times 16 it is 61440, which float16 and bfloat16 hold
_LARGEST_FACTORS = range(HIGHEST_FACTOR, HIGHEST_FACTOR // 2 - 1, -1)  # of the largest scale: others are these with a common divisor
_SWEEPS = 2  # of coordinate descent on factors
_ELEMENTS, _ELEMENTS_ON_GPU = 1 << 18, 1 << 24  # weights whose errors are found at once: in the cache of a core, enough for a GPU


def round_channel_scales(channel: Tensor, bfloat16_exact: bool) -> Tensor:
    """The nearest channel scales [...] float32 whose products with every factor are exact in float16, and in bfloat16 where asked for."""
    bits = CHANNEL_BITS_OF_BFLOAT16 if bfloat16_exact else CHANNEL_BITS
    mantissa, exponent = torch.frexp(channel)
    rounded = torch.ldexp((mantissa * (1 << bits)).round_(), exponent - bits)
    return rounded.abs().clamp_(LEAST_CHANNEL_SCALE, _MOST_CHANNEL_SCALE).copysign(channel)


def has_form(scales: Tensor) -> bool:
    """Whether scales [..., N, G] of several groups are factors times channel scales. One scale for each row is so whatever it is."""
    return scales.shape[-1] > 1 and split(scales.flatten(0, -2)) is not None


def rescaled(scales: Tensor, share: Tensor, bfloat16_exact: bool) -> Tensor:
    """Scales [..., N, G] float32 that have the form, times share [..., N, 1], with channel scales rounded: of the form again."""
    factors, channel = _split(scales)
    return factors * round_channel_scales(channel * share, bfloat16_exact)


def fit_to_weights(
    weight: Tensor, importance: Tensor | None, scales: Tensor, *, group_size: int, bfloat16_exact: bool
) -> Tensor:  # fmt: skip
    """Scales [R, G] float32 of the form, close to free ones, with little weighted rounding error Σ_j h_j (w_j - q_j)² in each row.

    weight: [R, K] float32. importance: [K] float32 >= 0, or None for plain squares. scales: [R, G] float32 (grid.search_scales): each
    keeps its sign. Or stacks [E, ...] of all tensors. Of symmetric int4 codes.
    """
    *stack, rows, k = weight.shape
    h = None if importance is None else importance.reshape(*stack, 1, k // group_size, group_size)
    chosen = torch.empty_like(scales)
    chunk = max(1, (_ELEMENTS_ON_GPU if weight.is_cuda else _ELEMENTS) * rows // weight.numel())
    for first in range(0, rows, chunk):
        part = (..., slice(first, min(first + chunk, rows)), slice(None))
        chosen[part] = _fit_rows(weight[part].reshape(*stack, -1, k // group_size, group_size), h, scales[part], bfloat16_exact)
    return chosen


def _fit_rows(w: Tensor, h: Tensor | None, free: Tensor, bfloat16_exact: bool) -> Tensor:
    """w: [..., R, G, size], h: [..., 1, G, size], free: [..., R, G]."""

    def error(s: Tensor) -> Tensor:
        t = w * s.reciprocal().unsqueeze(-1)
        delta = round_steps_(t.clone(), INT4).sub_(t).square_()
        return (delta.sum(-1) if h is None else (delta * h).sum(-1)) * s.square()

    largest = free.gather(-1, free.abs().argmax(-1, keepdim=True))  # [..., R, 1]
    best, least = free, torch.full_like(largest, torch.inf)
    for most in _LARGEST_FACTORS:
        channel = round_channel_scales(largest / most, bfloat16_exact)
        ratio = free / channel
        below = ratio.abs().floor_().clamp_(min=1)
        lower, upper = ((below + more).copysign(ratio).clamp_(LOWEST_FACTOR, HIGHEST_FACTOR) * channel for more in (0, 1))
        of_lower, of_upper = error(lower), error(upper)
        total = torch.minimum(of_lower, of_upper).sum(-1, keepdim=True)
        best = torch.where(total <= least, torch.where(of_upper < of_lower, upper, lower), best)
        least = torch.minimum(total, least)
    return best


def fit_to_codes(normal: Tensor, right: Tensor, solved: Tensor, scales: Tensor, bfloat16_exact: bool) -> Tensor:
    """Scales of the form with little s N sᵀ - 2 r sᵀ in each row, whose free minimum is `solved`: coordinate descent on the factors.

    normal: [R, G, G], right, solved and scales: [R, G], float32 all. scales have the form, and each keeps its sign. Returns [R, G]. Or
    stacks [E, ...] of all tensors.
    """
    standing, channel = _split(scales)  # [R, G], [R, 1]
    lowest, highest = torch.where(standing > 0, 1.0, LOWEST_FACTOR), torch.where(standing > 0, HIGHEST_FACTOR, -1.0)
    energy = ((standing.unsqueeze(-2) @ normal).squeeze(-2) * standing).sum(-1, keepdim=True)
    refitted = torch.where(energy > 0, (standing * right).sum(-1, keepdim=True) / energy, channel)  # for the factors that stand
    largest = solved.abs().amax(-1, keepdim=True)
    tried = torch.stack([refitted, *(largest / most for most in _LARGEST_FACTORS)])  # [C, R, 1]
    channel = round_channel_scales(tried.copysign(channel), bfloat16_exact)
    factors = torch.clamp((solved / channel).round_(), lowest, highest)
    factors[0] = standing
    aim, pivots = right / channel, diagonal_of(normal)
    product = torch.einsum("...gh,c...h->c...g", normal, factors)
    for _ in range(_SWEEPS):
        for g in range(normal.shape[-1]):
            step = torch.where(pivots[..., g] > 0, (aim[..., g] - product[..., g]) / pivots[..., g], 0.0)
            moved = torch.clamp((factors[..., g] + step).round_(), lowest[..., g], highest[..., g])
            product += normal[..., g, :] * (moved - factors[..., g]).unsqueeze(-1)
            factors[..., g] = moved
    found = factors * channel
    error = (found * (channel * product - 2.0 * right)).sum(-1)  # [C, R]
    return found.gather(0, error.argmin(0)[None, ..., None].expand(1, *solved.shape)).squeeze(0)


def _split(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [..., N, G] and channel scales [..., N, 1], float32, of scales [..., N, G]. ValueError where they lack the form."""
    found = split(scales.flatten(0, -2))
    if found is None:
        raise ValueError(f"scales {list(scales.shape)} are not small integers times one number for each row")
    return found[0].float().view_as(scales), found[1].float().view_as(scales[..., :1])
