"""Products of float32 matrices at the rate of a GPU's matrix units.

A float32 number is the sum of two numbers of 11 significant bits, up to 2^-22 of itself, and TF32 units multiply such numbers exactly. So

    a b = high(a) high(b) + high(a) low(b) + low(a) high(b)

is as exact as float32 to a bit or two, at three products of 330 TFLOP/s instead of one of 50 (H200; Markidis et al., arXiv 1803.04014).
On a CPU these are torch's own products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ROUND, _MASK = 1 << 12, -(1 << 13)  # of the 13 bits that TF32 does not have


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for float32 matrices, or for stacks [E, ., .] of them."""
    if not a.is_cuda:
        return torch.matmul(a, b) if a.ndim > 2 else torch.mm(a, b)
    return split_mm(split(a), split(b))


def split(a: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (high, low), float32 both: high has 11 significant bits, and high + low is a."""
    high = (a.view(torch.int32) + _ROUND).bitwise_and_(_MASK).view(torch.float32)
    return high, a - high


def split_mm(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], base: Tensor | None = None) -> Tensor:
    """The product of split matrices on a GPU, added to a copy of `base` where there is one; or those of stacks of matrices."""
    if a[0].ndim > 2:
        with _tf32():
            out = torch.bmm(a[1], b[0]) if base is None else torch.baddbmm(base, a[1], b[0])
            out.baddbmm_(a[0], b[1])
            return out.baddbmm_(a[0], b[0])
    with _tf32():
        out = torch.mm(a[1], b[0]) if base is None else torch.addmm(base, a[1], b[0])  # the small terms first
        out.addmm_(a[0], b[1])
        return out.addmm_(a[0], b[0])


@contextmanager
def _tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
