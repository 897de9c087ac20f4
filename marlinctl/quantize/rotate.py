"""A rotation of a row of channels, by which large weights of a few channels are spread over all.

    R = diag(signs) S        S = C_m ⊗ H_p        K = m p, p the largest power of two in K

H_p is Sylvester's Hadamard matrix over the root of p, C_m[j, k] = (cos 2πjk/m + sin 2πjk/m) / √m, the discrete Hartley transform. Both
are symmetric and orthogonal, and no entry of S is larger than √2 / √K, so a row with one large value becomes one with values of about
the same size. The signs are random: without them a row of equal values would become one large one.

Rotating what a network's residual stream holds, and the weights that write and read it, leaves its function as it is where nothing but
normalization by the root of the mean square lies between: QuaRot (Ashkboos et al., arXiv 2404.00456), SliceGPT's invariance (arXiv
2401.15024). models/rotation.py knows which tensors those are.
"""

from __future__ import annotations

from functools import cache
from math import pi

import torch
from torch import Tensor

_LARGEST = 64  # of one factor of a Hadamard matrix: H_4096 is applied as H_64 and H_64, for a 32nd of the work


def random_signs(width: int, seed: int) -> Tensor:
    """[width] int8 of 1 and -1, the same on every machine."""
    drawn = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(seed))
    return (2 * drawn - 1).to(torch.int8)


def rotated(x: Tensor, signs: Tensor) -> Tensor:
    """x R, whose rows are as long as those of x. x: [..., K] float32 or float64; signs: [K] int8. ValueError for other widths."""
    if x.shape[-1] != len(signs):
        raise ValueError(f"rows of {x.shape[-1]} channels, and {len(signs)} signs")
    factors = [factor.to(x.device, x.dtype) for factor in _factors(len(signs))]
    y = (x * signs.to(x.device, x.dtype)).reshape(-1, *map(len, factors))
    for factor in factors:  # each takes the first of its axes away and puts it behind the others, so the order is the old one in the end
        y = torch.tensordot(y, factor, dims=([1], [0]))
    return y.reshape(x.shape)


@cache
def _factors(width: int) -> tuple[Tensor, ...]:
    """Float64 matrices whose Kronecker product is S."""
    power = width & -width
    found = [_hartley(width // power)] if width > power else []
    while power > 1:
        size = min(power, _LARGEST)
        found.append(_hadamard(size))
        power //= size
    return tuple(found) or (torch.ones(1, 1, dtype=torch.float64),)


def _hadamard(size: int) -> Tensor:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    whole = torch.ones(1, 1, dtype=torch.float64)
    while len(whole) < size:
        whole = torch.kron(whole, two)
    return whole.div(size**0.5)


def _hartley(size: int) -> Tensor:
    angles = 2 * pi / size * (torch.arange(size)[:, None] * torch.arange(size) % size).double()
    return (angles.cos() + angles.sin()).div(size**0.5)
