"""Products of float32 matrices at the rate of a GPU's matrix units.

A float32 number is the sum of two numbers of 11 significant bits, up to 2^-22 of itself, and TF32 units multiply such numbers exactly. So

    a b = high(a) high(b) + high(a) low(b) + low(a) high(b)

is as exact as float32 to a bit or two, at three products of 330 TFLOP/s instead of one of 50 (H200; Markidis et al., arXiv 1803.04014).
On a CPU these are torch's own products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

_ROUND, _MASK = 1 << 12, -(1 << 13)  # of the 13 bits that TF32 does not have


Halves = tuple[Tensor, Tensor]  # high and low, whose sum a matrix is


def operand(a: Tensor) -> Tensor | Halves:
    """A matrix that several products are taken with, prepared once."""
    return split(a) if a.is_cuda else a


def mm(a: Tensor | Halves, b: Tensor, *, short: bool = False) -> Tensor:
    """a @ b for float32 matrices, or for stacks [E, ., .] of them. short: b holds integers of 11 bits at most, without a second half."""
    if not b.is_cuda:
        assert isinstance(a, Tensor), "halves are made on a GPU"
        return torch.matmul(a, b) if a.ndim > 2 else torch.mm(a, b)
    return split_mm(split(a) if isinstance(a, Tensor) else a, (b, None) if short else split(b))


def split(a: Tensor, out: Halves | None = None) -> Halves:
    """float32 -> (high, low), float32 both: high has 11 significant bits, and high + low is a."""
    high, low = (torch.empty_like(a), torch.empty_like(a)) if out is None else out
    bits = high.view(torch.int32)
    torch.add(a.view(torch.int32), _ROUND, out=bits)
    bits.bitwise_and_(_MASK)
    torch.sub(a, high, out=low)
    return high, low


def split_mm(a: Halves, b: tuple[Tensor, Tensor | None], base: Tensor | None = None) -> Tensor:
    """The product of split matrices on a GPU, added to a copy of `base` where there is one; or those of stacks of matrices."""
    (a_high, a_low), (b_high, b_low) = a, b
    stacked = a_high.ndim > 2
    with _tf32():
        if base is None:
            out = torch.matmul(a_low, b_high)  # the small terms first
        else:
            out = (torch.baddbmm if stacked else torch.addmm)(base, a_low, b_high)
        add = cast(Callable[[Tensor, Tensor], Tensor], out.baddbmm_ if stacked else out.addmm_)
        if b_low is not None:
            add(a_high, b_low)
        return add(a_high, b_high)


@contextmanager
def _tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
