"""Random linears, made on the device that multiplies with them.

Zeros draw less power than random bits and let a GPU clock higher (13 % on an H200), so every word, scale and metadata nibble is random:
scales of both signs, and all six pairs of kept weights in a group of four. At the sizes that are timed the packer would take seconds, and
every int32 is a valid word of MARLIN, so the words are drawn as they lie in the tiles.
"""

from __future__ import annotations

import torch

from marlinctl.benchmarking.cases import Kind, Shape
from marlinctl.pack.types import PackedLinear, PackedSparseLinear

Packed = PackedLinear | PackedSparseLinear
PAIRS = tuple(
    first + 4 * second for second in range(4) for first in range(second)
)  # the metadata nibbles of a group of four's two kept weights
SCALE = 0.02


def random_packed(kind: Kind, shape: Shape, generator: torch.Generator) -> Packed:
    """A linear of whole tiles, on the generator's device."""
    device = generator.device
    size = shape.k if shape.group_size == -1 else shape.group_size
    rows = shape.k // (32 if kind == "sparse" else 16)
    words = torch.randint(-(2**31), 2**31, (rows, 2 * shape.n), dtype=torch.int32, device=device, generator=generator)
    scales = (torch.randn(shape.k // size, shape.n, device=device, generator=generator) * SCALE).to(torch.float16)
    if kind == "dense":
        return PackedLinear(words, scales, shape.n, shape.k, size)
    nibbles = torch.tensor(PAIRS, dtype=torch.int16, device=device)
    meta = torch.zeros(shape.k // 32, 2 * shape.n, dtype=torch.int16, device=device)
    for shift in (0, 4, 8, 12):
        choice = torch.randint(len(PAIRS), meta.shape, dtype=torch.int32, device=device, generator=generator)
        meta |= nibbles[choice] << shift
    return PackedSparseLinear(words, meta, scales, shape.n, shape.k, size)


def packed_bytes(kind: Kind, shape: Shape) -> int:
    """Words, metadata and scales."""
    groups = 1 if shape.group_size == -1 else shape.k // shape.group_size
    return shape.n * shape.k * (3 if kind == "sparse" else 4) // 8 + 2 * groups * shape.n


def columns(p: Packed, first: int, last: int) -> Packed:
    """Outputs first..last of a linear of whole tiles, multiples of 64: tiles do not know their neighbours."""
    words = slice(2 * first, 2 * last)
    qweight, scales = p.qweight[:, words].contiguous(), p.scales[:, first:last].contiguous()
    if isinstance(p, PackedSparseLinear):
        return PackedSparseLinear(qweight, p.meta[:, words].contiguous(), scales, last - first, p.in_features, p.group_size)
    return PackedLinear(qweight, scales, last - first, p.in_features, p.group_size)
