"""Improving a 2:4 mask and the kept weights by least squares.

Both lower f(V) = tr((W - V) H (W - V)ᵀ), the layer error itself, over all V that are zero where the mask says so. SparseGPT
compensates a pruned weight with later columns only, and never changes a group of four again.

    improve_mask          each group of four in turn takes its best pair and the best values, all others fixed (exact, 6 pairs)
    masked_least_squares  all kept weights at once for a fixed mask, by conjugate gradients preconditioned with diag(H)

Everything is [K, R] as in the solver. Rows are independent problems.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from marlinctl.quantize.products import mm, operand
from marlinctl.quantize.solver import COLUMN_BLOCK
from marlinctl.quantize.stacks import diagonal
from marlinctl.sparsify.types import QUAD

PAIRS = tuple(combinations(range(QUAD), 2))  # 01 02 03 12 13 23
_PRODUCTS = tuple((i, j) for i in range(QUAD) for j in range(i, QUAD))  # 00 01 02 03 11 12 13 22 23 33
MARGIN = 1e-5  # a pair must gain this share more than the current one: smaller differences are below float32 accuracy


def masked_least_squares(weight: Tensor, values: Tensor, mask: Tensor, matrix: Tensor, iterations: int) -> Tensor:
    """argmin over V on the mask of (W - V) H (W - V)ᵀ, from `values`, row by row.

    weight, values: [K, R] float32; mask: [K, R] bool; matrix: [K, K] float32, positive definite (damped). Or stacks [E, ...] of all.
    Returns [K, R], zero off the mask. One product of 2 K² R operations an iteration. A row whose residual is zero stays as it is.
    """
    inverse = diagonal(matrix).reciprocal().unsqueeze(-1)  # [K, 1]
    v = values * mask
    h_matrix = operand(matrix)
    r = mm(h_matrix, weight - v).mul_(mask)
    z = r * inverse
    direction = z.clone()
    rz = (r * z).sum(-2, keepdim=True)  # [1, R]
    for _ in range(iterations):
        h = mm(h_matrix, direction).mul_(mask)
        curvature = (direction * h).sum(-2, keepdim=True)
        step = torch.where(curvature > 0, rz / curvature, 0.0)
        v.addcmul_(direction, step)
        r.addcmul_(h, step, value=-1.0)
        torch.mul(r, inverse, out=z)
        previous, rz = rz, (r * z).sum(-2, keepdim=True)
        direction.mul_(torch.where(previous > 0, rz / previous, 0.0)).add_(z)
    return v


def improve_mask(weight: Tensor, values: Tensor, mask: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """One sweep over the groups of four. Returns (values, mask), [K, R] each, with f(values) not above what it was.

    With P = H (W - V), changing four values from v to u changes f by -2 Pᵀ(u - v) + (u - v)ᵀ H_qq (u - v). For a kept
    pair S the best u is H_SS⁻¹ b_S with b = P + H_qq v, and gains b_Sᵀ H_SS⁻¹ b_S. H is the same for all rows, so these are six fixed
    quadratic forms of b for each group. Ties go to the current pair, then to the lower columns.
    """
    k, rows = weight.shape
    gain_of, values_of = _pair_tables(matrix)
    v = values * mask
    pair = pair_of(mask)  # [K/4, R]
    error = weight - v
    left, right = (torch.tensor([p[i] for p in _PRODUCTS], device=weight.device) for i in (0, 1))
    for start in range(0, k, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, k)
        pull = torch.mm(matrix[start:stop], error)  # P of this block, kept up to date below
        for at in range(start, stop, QUAD):
            here, four = slice(at, at + QUAD), at // QUAD
            b = torch.addmm(pull[at - start : at - start + QUAD], matrix[here, here], v[here])
            gains = torch.mm(gain_of[four], b.index_select(0, left).mul_(b.index_select(0, right)))  # [6, R]
            standing = pair[four : four + 1]
            gains.scatter_(0, standing, gains.gather(0, standing).mul_(1.0 + MARGIN).add_(torch.finfo(torch.float32).tiny))
            chosen = gains.max(0, keepdim=True).indices  # the first of equals, as torch promises
            pair[four] = chosen[0]
            candidates = torch.mm(values_of[four], b).reshape(len(PAIRS), QUAD, rows)
            u = candidates.gather(0, chosen.unsqueeze(1).expand(1, QUAD, rows))[0]
            change = u - v[here]
            v[here] = u
            error[here] -= change
            if at + QUAD < stop:
                pull[at + QUAD - start :].addmm_(matrix[at + QUAD : stop, here], change, alpha=-1.0)
    return v, mask_of(pair)


def mask_of(pair: Tensor) -> Tensor:
    """[..., K/4, R] int64, which of PAIRS -> [..., K, R] bool."""
    kept = torch.tensor([[i in p for i in range(QUAD)] for p in PAIRS], device=pair.device)  # [6, 4]
    return kept[pair].mT.flatten(-3, -2)  # [K/4, R, 4] -> [K, R]


def pair_of(mask: Tensor) -> Tensor:
    """[..., K, R] bool, two of each four -> [..., K/4, R] int64: which of PAIRS."""
    table = torch.zeros(2**QUAD, dtype=torch.int64, device=mask.device)
    for index, (i, j) in enumerate(PAIRS):
        table[2**i + 2**j] = index
    bits = mask.reshape(*mask.shape[:-2], -1, QUAD, mask.shape[-1]).to(torch.int64)
    places = torch.tensor([2**i for i in range(QUAD)], device=mask.device).reshape(QUAD, 1)
    return table[(bits * places).sum(-2)]


def pair_inverses(matrix: Tensor) -> Tensor:
    """[..., K, K] float32 -> [..., K/4, 6, 3] float64: of H restricted to each pair (i, j) of each four the inverse, at ii, ij and jj."""
    quads = matrix.shape[-1] // QUAD
    fours = matrix.reshape(*matrix.shape[:-2], quads, QUAD, quads, QUAD)
    blocks = fours.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).double()  # [K/4, 4, 4]
    i, j = torch.tensor(PAIRS, device=matrix.device).T
    a, b, c = blocks[..., i, i], blocks[..., j, j], blocks[..., i, j]  # [K/4, 6]
    return torch.stack((b, -c, a), -1) / (a * b - c * c).unsqueeze(-1)


def _pair_tables(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """For each quad: the gain of each pair as a form in products of b, [K/4, 6, 10], and its values as a map of b, [K/4, 6 * 4, 4]."""
    inverses = pair_inverses(matrix)
    quads = len(inverses)
    gain = torch.zeros(quads, len(PAIRS), len(_PRODUCTS), dtype=torch.float64, device=matrix.device)
    value = torch.zeros(quads, len(PAIRS), QUAD, QUAD, dtype=torch.float64, device=matrix.device)
    for p, (i, j) in enumerate(PAIRS):
        ii, ij, jj = inverses[:, p].unbind(-1)
        gain[:, p, _PRODUCTS.index((i, i))] = ii
        gain[:, p, _PRODUCTS.index((i, j))] = 2.0 * ij
        gain[:, p, _PRODUCTS.index((j, j))] = jj
        value[:, p, i, i], value[:, p, i, j] = ii, ij
        value[:, p, j, i], value[:, p, j, j] = ij, jj
    return gain.float(), value.reshape(quads, -1, QUAD).float()
