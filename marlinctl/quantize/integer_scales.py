"""Scales of groups that are small integers times one number for each output.

    scales[n, g] = factors[n, g] * channel_scales[n]      factors -15..16 without 0, channel scales float16, products exact in float16

A product with rounded activations may then multiply the weights code * factor, -128..120, which int8 holds, and add int32 sums over all of
K; it scales once for each output and token (two-level scales of QServe, arXiv 2405.04532, and of LiquidGEMM, arXiv 2509.01229). Any other
program computes with such scales as with others: nothing else in a folder says that they have this form.

A group has a sign of its own, as it has with other scales (grid.py). A byte of eight bits less its offset is made for either sign by one
multiplication, since (code + 8) * factor + 128 - 8 * factor lies within 0..255.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST_FACTOR, HIGHEST_FACTOR = -15, 16  # -8 times either is within int8; -8 * -16 would not be


def split(scales: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors [N, G] int8 and channel scales [N] float16 of scales [N, G] of any float type; None where an output has none.

    Of an output's channel scales the largest, with the sign of its largest scale. With M the factor of the largest scale s, a scale t has
    factor f exactly where f s = M t: both products have at most 16 significant bits and are exact in float32. On any device; waits for a
    GPU once.
    """
    s = scales.float()
    largest = s.gather(-1, s.abs().argmax(-1, keepdim=True))  # [N, 1]
    found = torch.zeros_like(largest)  # M of each output; 0: none yet
    for most in range(1, HIGHEST_FACTOR + 1):
        factors = (s * most / largest).round()
        fits = ((factors * largest == s * most) & (factors >= LOWEST_FACTOR) & (factors != 0)).all(-1, keepdim=True)
        channel = (largest / most).half().float()  # exact where the factors have no common divisor: else a smaller M has fitted
        fits &= channel * most == largest
        found = torch.where((found == 0) & fits, most, found)
    if not bool(found.all()):
        return None
    return (s * found / largest).round().to(torch.int8), (largest / found).squeeze(-1).half()
