"""The arrays that are alive at the fullest moment of pruning, from shapes alone (as quantize/memory.py)."""

from __future__ import annotations

from marlinctl.quantize.memory import Arrays

ROWS_TOGETHER = 8192  # of one least-squares problem, which holds six matrices [K, rows] (sparsegpt.py)


def prune(rows: int, k: int) -> Arrays:
    """sparsegpt.prune, masked_ls.py: what is finished, with its mask; seven matrices and a mask of the rows at hand; H and two like it."""
    stack, part = 4 * rows * k, 4 * min(rows, ROWS_TOGETHER) * k
    return [(3, stack), (1, stack // 4), (7, part), (1, part // 4), (3, 4 * k * k)]


def pruned(rows: int, k: int) -> Arrays:
    """What a solve of pruned rows holds beside its own: the values, what refinement aims at, and the mask twice."""
    stack = 4 * rows * k
    return [(2, stack), (2, stack // 4)]
