"""The arrays that are alive at the fullest moment of each step of this room, from shapes alone.

planning/memory.py adds them up. They are beside the code that allocates, in a module of their own because `plan` reads them without torch.
R rows share an input of K columns, and arrays are float32 unless said otherwise. What a step is given is counted with it.
"""

from __future__ import annotations

FLOAT64_ABOVE = 3e5  # bound on the condition number K / damping + 1 above which float32 pivots lose digits (solver.factor)

Arrays = list[tuple[int, int]]  # how many, and the bytes of each


def gram(k: int, tokens: int, *, drift: bool) -> Arrays:
    """hessian.add_gram, and add_cross where there is drift: the sum, and chunks of activations widened to float32."""
    return [(1, 4 * k * k), (4 if drift else 1, 4 * tokens * k)]


def mirror(k: int) -> Arrays:
    """hessian.mirror: the sum and its two triangles."""
    return [(3, 4 * k * k)]


def corrected_target(rows: int, k: int) -> Arrays:
    """drift.corrected_target: right-hand sides and solutions in both precisions, H, H in float64 and its factor."""
    stack, square = 4 * rows * k, 4 * k * k
    return [(4, stack), (2, 2 * stack), (1, square), (2, 2 * square)]


def split(rows: int, k: int) -> Arrays:
    """products.mm on a GPU: both operands in two parts each."""
    return [(2, 4 * k * k), (2, 4 * rows * k)]


def factor(rows: int, k: int, damping: float) -> Arrays:
    """solver.factor as gptq.solve calls it: weights and stack, H and its reordered copy, the matrix to be factored and its factor."""
    square = 4 * k * k
    return [(2, 4 * rows * k), (2, square), (2, 2 * square if k / damping > FLOAT64_ABOVE else square)]


def solve(rows: int, k: int) -> Arrays:
    """gptq.solve at its end: weights, stack, w, codes, errors, two temporaries, and the codes as int8; H, its copy and its factor."""
    stack = 4 * rows * k
    return [(7, stack), (1, stack // 4), (3, 4 * k * k)]


def descend(rows: int, k: int) -> Arrays:
    """refine.descend in gptq.solve: one more sweep beside the first."""
    return [(9, 4 * rows * k), (4, 4 * k * k)]


def refit_scales(rows: int, k: int, groups: int) -> Arrays:
    """refine.refit_scales in gptq.solve: the normal equations of the scales, damped, factored and multiplied."""
    return [(7, 4 * rows * k), (4, 4 * k * k), (4, 4 * rows * groups**2)]
