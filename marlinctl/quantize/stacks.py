"""Indexing of one matrix [K, R], or of a stack of them [E, K, R] with an index for each.

The solver's functions take either. Products and sums do so by themselves; indexing does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [K, R], index [J] int64 -> [J, R]; or [E, K, R], [E, J] -> [E, J, R]."""
    if x.ndim == 2:
        return x[index]
    return x[_first(x), index]


def take_both(x: Tensor, index: Tensor) -> Tensor:
    """Rows and columns of x [K, K], index [K] -> [K, K]; or [E, K, K], [E, K] -> [E, K, K]."""
    if x.ndim == 2:
        return x[index[:, None], index]
    return x[_first(x).unsqueeze(-1), index.unsqueeze(-1), index.unsqueeze(-2)]


def diagonal(x: Tensor) -> Tensor:
    """The diagonals of [..., K, K] as a view [..., K]."""
    return x.diagonal(dim1=-2, dim2=-1)


def choose(x: Tensor, which: Sequence[int]) -> Tensor:
    """x[which] along the first dimension; x itself where that is all of it."""
    return x if len(which) == len(x) else x[torch.tensor(which, device=x.device)]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[E, ...] of E tensors; a view where there is one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def apart(good: Sequence[bool], together: Callable[[Sequence[int]], Sequence[T]], alone: Callable[[int], T]) -> list[T]:
    """The results for problems 0, 1, ...: of the good ones from one call, of each other one from a call of its own."""
    chosen = [e for e, fits in enumerate(good) if fits]
    found = dict(zip(chosen, together(chosen) if chosen else (), strict=True))
    return [found[e] if e in found else alone(e) for e in range(len(good))]


def _first(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device).unsqueeze(-1)
