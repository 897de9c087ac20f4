"""Powers of two that bring the columns of a weight closer to one another.

All columns of a group share one step in a row, so a few columns with large weights make it coarse for all. Where the input comes from a
norm, column k may be multiplied by 2^e_k and the norm's weight at k by 2^-e_k (oneshot/equalization.py): every product of an input and a
weight stays as it was, bit for bit, and the other columns have finer steps.

    e_k = -round(STRENGTH (log2 |W_k| - mean of log2 |W|))        |W_k|: norm of column k over all rows that read the input

This is cross-layer equalization (Nagel et al., arXiv 1906.04721) with powers of two, between a norm and the linears behind it. Scales
that follow the activations (AWQ, arXiv 2306.00978) are no better than none under GPTQ, which knows them already
(docs/log/2026-12-01-accuracy.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 0.5  # 0.25 to 1 are within 5 % of each other in the error of Qwen2.5-0.5B's q, k and v, which this halves
LEAST, MOST = -3, 8  # an input grows with a negative exponent, and must stay within float16


def column_exponents(squares: Tensor) -> Tensor:
    """[K] int32 of the sums of squares of the columns, [K] float32. Columns that are zero, or not finite, keep theirs."""
    usable = (squares > 0) & torch.isfinite(squares)
    if not bool(usable.any()):
        return torch.zeros_like(squares, dtype=torch.int32)
    norms = torch.where(usable, squares, 1.0).log2() / 2
    apart = torch.where(usable, norms - norms[usable].mean(), 0.0)
    return (-STRENGTH * apart).round().clamp(LEAST, MOST).to(torch.int32)
