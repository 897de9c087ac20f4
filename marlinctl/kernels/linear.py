"""Linears whose weight stays packed: nn.Modules over the operators.

    MarlinLinear         B [K'/16, 2N'] int32                            s [G', N'] float16   weight_shape [2]   bias [N] or none
    SparseMarlinLinear   B_24 [K'/32, 2N'] int32, B_meta the same int16  s                    weight_shape       bias

The tensors are buffers under the names that native folders have (docs/formats/marlin.md, marlin_24.md), so a state_dict holds what
lies on disk. Scales stay float16 whatever the model is converted to: `.to(torch.bfloat16)` changes a bias and nothing else.

Calls overlap with the kernel before them (`overlap` of the operators). Where that kernel changes these very tensors, as pack's `remask`
does, set `overlap` of the module to False.

Without a GPU the reference multiplies: it decodes the weight in every call, 4 bytes for each weight of one linear while it runs, and keeps
nothing. Slow, and the model takes no more memory than it does packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from marlinctl.kernels.ops import marlin_gemm, sparse_marlin_gemm
from marlinctl.pack.types import PackedLinear, PackedSparseLinear


class _Packed(nn.Module):
    """What both have in common. For inference: no gradient passes through."""

    s: Tensor
    bias: nn.Parameter | None

    def __init__(self, p: PackedLinear | PackedSparseLinear, bias: Tensor | None) -> None:
        super().__init__()
        if bias is not None and bias.shape != (p.out_features,):
            raise ValueError(f"bias must be [{p.out_features}], got {list(bias.shape)}")
        self.in_features, self.out_features, self.group_size = p.in_features, p.out_features, p.group_size
        self.register_buffer("s", p.scales)
        shape = torch.tensor([p.out_features, p.in_features], dtype=torch.int64, device="cpu")
        self.register_buffer("weight_shape", shape.to(p.scales.device))
        self.overlap = True
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
        return f"{sizes}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> _Packed:
        scales = self.s
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.s.dtype != scales.dtype:
            self.s = scales.to(self.s.device)
        return self


class MarlinLinear(_Packed):
    """x [.., K] float16 or bfloat16 -> [.., N]: a linear in MARLIN tiles. Tensors on the meta device make a module to be filled later."""

    B: Tensor

    def __init__(self, p: PackedLinear, bias: Tensor | None = None) -> None:
        super().__init__(p, bias)
        self.register_buffer("B", p.qweight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = marlin_gemm(x, self.B, self.s, self.out_features, self.group_size, self.bias, self.overlap)
        return out

    def packed(self) -> PackedLinear:
        """The tensors as the packer's type."""
        return PackedLinear(self.B, self.s, self.out_features, self.in_features, self.group_size)


class SparseMarlinLinear(_Packed):
    """x [.., K] float16 or bfloat16 -> [.., N]: a 2:4 linear in Sparse-MARLIN tiles."""

    B_24: Tensor
    B_meta: Tensor

    def __init__(self, p: PackedSparseLinear, bias: Tensor | None = None) -> None:
        super().__init__(p, bias)
        self.register_buffer("B_24", p.qweight)
        self.register_buffer("B_meta", p.meta)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = sparse_marlin_gemm(x, self.B_24, self.B_meta, self.s, self.out_features, self.group_size, self.bias, self.overlap)
        return out

    def packed(self) -> PackedSparseLinear:
        """The tensors as the packer's type."""
        return PackedSparseLinear(self.B_24, self.B_meta, self.s, self.out_features, self.in_features, self.group_size)


def packed_module(p: PackedLinear | PackedSparseLinear, bias: Tensor | None = None) -> MarlinLinear | SparseMarlinLinear:
    return SparseMarlinLinear(p, bias) if isinstance(p, PackedSparseLinear) else MarlinLinear(p, bias)


class SharedLinear(nn.Module):
    """Linears that are given the same activations, multiplied as one when the first of them is called. Its LinearParts take its place."""

    def __init__(self, linear: MarlinLinear | SparseMarlinLinear, parts: int) -> None:
        super().__init__()
        self.linear, self.parts = linear, parts
        self.latest: tuple[Tensor, Tensor, tuple[int, ...]] | None = None  # activations, their product, and the parts that have not asked

    def product(self, x: Tensor, part: int) -> Tensor:
        """Of all parts. Kept until each of them has asked once; a part that asks again, or with other activations, gets a new one."""
        latest = self.latest
        if latest is not None and latest[0] is x and part in latest[2]:
            product, waiting = latest[1], latest[2]
        else:
            product, waiting = self.linear(x), tuple(range(self.parts))
        waiting = tuple(other for other in waiting if other != part)
        self.latest = (x, product, waiting) if waiting else None
        return product


class LinearPart(nn.Module):
    """x [.., K] -> [.., N]: outputs `first` .. `first` + N of a SharedLinear, not contiguous."""

    def __init__(self, shared: SharedLinear, part: int, first: int, out_features: int) -> None:
        super().__init__()
        self.shared, self.part, self.first = shared, part, first
        self.in_features, self.out_features = shared.linear.in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.product(x, self.part)[..., self.first : self.first + self.out_features]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, first={self.first}"
