"""SparseGPT's sweep: the column sweep of GPTQ that decides the mask on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from marlinctl.quantize.scheme import INT4, Grid
from marlinctl.quantize.solver import sweep
from marlinctl.sparsify.mask import best_two
from marlinctl.sparsify.types import QUAD


def sparsegpt_sweep(
    w: Tensor, pivots: Tensor, feedback: Tensor, scales: Tensor | None, group_of: Tensor, *, grid: Grid = INT4
) -> tuple[Tensor, Tensor]:
    """One pass in natural order (Frantar and Alistarh, arXiv 2301.00774): of each four columns the two with the largest |w'_k pivot_k|
    stay, where w' makes up for everything that was pruned or rounded before the four.

    w: [K, R] float32. pivots: [K] float32. feedback: [K, K] float32, of quantize.solver.factor. scales: [G, R] float32, or None for no
    rounding; group_of: [K] int64. Returns what the sweep returns first, [K, R] float32, and mask, [K, R] bool.
    """
    mask = torch.zeros(w.shape, dtype=torch.bool, device=w.device)
    weighs = pivots.unsqueeze(1)

    def choose(k: int, targets: Tensor) -> None:
        if k % QUAD:
            return
        quad = targets[:QUAD].clone()
        for i in range(QUAD - 1):  # what the later ones become if the earlier ones stay: the solver adds that only as it goes
            quad[i + 1 :].addr_(feedback[k + i, k + i + 1 : k + QUAD], w[k + i] - quad[i])
        mask[k : k + QUAD] = best_two((quad * weighs[k : k + QUAD]).abs())

    values, _ = sweep(w, w, feedback, scales, group_of, mask, choose, grid)
    return values, mask
