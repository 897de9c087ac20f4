"""Packing one nibble at a time, straight from the maps: the slow twin that the fast packers are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import SparseQuantizedLinear


def or_together(codes: Tensor, place: Callable, rows: int, columns: int, *, padded_n: int, padded_k: int, fill: int) -> Tensor:
    """int32 [rows, columns] with nibble code + 8 of every weight ORed in; `fill` is the nibble of places beyond N or K."""
    n_true, k_true = codes.shape
    nibbles = [[code + 8 for code in row] for row in codes.tolist()]
    words = [[0] * columns for _ in range(rows)]
    for n in range(padded_n):
        for k in range(padded_k):
            row, column, nibble = place(k, n)
            value = nibbles[n][k] if n < n_true and k < k_true else fill
            words[row][column] |= value << (4 * nibble)
    unsigned = torch.tensor(words, dtype=torch.int64)
    return torch.where(unsigned >= 1 << 31, unsigned - (1 << 32), unsigned).to(torch.int32)


def random_linear(n: int, k: int, group_size: int, seed: int = 0) -> QuantizedLinear:
    """Every code from -8 to 7, scales of both signs, subnormal ones among them. group_size -1 is a whole row."""
    generator = torch.Generator().manual_seed(seed)
    group_size = k if group_size == -1 else group_size
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scales = (torch.randn(n, k // group_size, generator=generator) * 0.01).to(torch.float16)
    scales[0, 0] = 6e-8  # the smallest float16
    return QuantizedLinear(codes, scales, group_size)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality that also tells -0.0 from 0.0; it fails on strides that view(dtype) refuses, which nothing we hand out may have."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def random_keep(n: int, k: int, seed: int = 0) -> Tensor:
    """Two of each four, all six choices equally often."""
    order = torch.rand(n, k // 4, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(-1, order[..., :2], True).reshape(n, k)


def random_sparse(n: int, k: int, group_size: int, seed: int = 0) -> SparseQuantizedLinear:
    """random_linear with half of it pruned; survivors hold every code, 0 and -8 among them."""
    q = random_linear(n, k, group_size, seed)
    return sparse(q, random_keep(n, k, seed))


def sparse(q: QuantizedLinear, keep: Tensor) -> SparseQuantizedLinear:
    """What is left of q where keep says so."""
    return SparseQuantizedLinear(q.codes * keep, q.scales, q.group_size, keep)
