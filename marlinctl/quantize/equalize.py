"""Powers of two that bring the columns of a weight closer to one another.

All columns of a group share one step in a row, so a few columns with large weights make it coarse for all. Where the input comes from a
norm, column k may be multiplied by 2^e_k and the norm's weight at k by 2^-e_k (oneshot/equalization.py): every product of an input and a
weight stays as it was, bit for bit, and the other columns have finer steps.

    e_k = -round(STRENGTH (log2 |W_k| - mean of log2 |W|))        |W_k|: norm of column k over all rows that read the input

Whether that pays is estimated. With steps that follow the largest weight of a group, and errors that are alike in all of its columns, the
output's error would be

    Σ over rows and groups of max_k(|W_rk| 2^e_k)² · Σ_k h_k 4^-e_k        h_k = E[x_k²]

A solve makes up for most of what columns with large inputs lose. With the root of h_k in its place the estimate follows what solves
measure: -52, -46, -6, -5 and +29 % where they gave -54, -47, -8, -7 and +37 %; with h_k itself -28, -33, +19, +9 and +109. It rises where
large columns are many, as in the first block of SmolLM2: they lose what the others do not gain.

This is cross-layer equalization (Nagel et al., arXiv 1906.04721) with powers of two, between a norm and the linears behind it. Scales
that follow the activations (AWQ, arXiv 2306.00978) are no better than none under GPTQ, which knows them already
(docs/log/2026-12-01-accuracy.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 0.5  # 0.25 to 1 are within 5 % of each other in the error of Qwen2.5-0.5B's q, k and v, which this halves
WORTH = 0.99  # share of the estimated error that may be left
LEAST, MOST = -3, 8  # an input grows with a negative exponent, and must stay within float16


def column_exponents(squares: Tensor) -> Tensor:
    """[K] int32 of the sums of squares of the columns, [K] float32. Columns that are zero, or not finite, keep theirs."""
    usable = (squares > 0) & torch.isfinite(squares)
    if not bool(usable.any()):
        return torch.zeros_like(squares, dtype=torch.int32)
    norms = torch.where(usable, squares, 1.0).log2() / 2
    apart = torch.where(usable, norms - norms[usable].mean(), 0.0)
    return (-STRENGTH * apart).round().clamp(LEAST, MOST).to(torch.int32)


def estimated_error(weight: Tensor, energies: Tensor, exponents: Tensor, group_size: int) -> float:
    """To be compared with that of other exponents. weight: [N, K]; energies: [K], mean squares h of the input as the original has it;
    exponents: [K] int32; group_size divides K, or is -1 for the whole row."""
    size = len(energies) if group_size == -1 else group_size
    factors = exponents.to(weight.device).float().exp2()
    steps = (weight.float().abs() * factors).reshape(len(weight), -1, size).amax(-1).square().sum(0, dtype=torch.float64)
    losses = (energies.to(weight.device).double().sqrt() / factors.double().square()).reshape(-1, size).sum(-1)
    return float((steps * losses).sum())
