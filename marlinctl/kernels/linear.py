"""Linears whose weight stays packed: nn.Modules over the operators.

    MarlinLinear         B [K'/16, 2N'] int32                            s [G', N'] float16   weight_shape [2]   bias [N] or none
    SparseMarlinLinear   B_24 [K'/32, 2N'] int32, B_meta the same int16  s                    weight_shape       bias

The tensors are buffers under the names that native folders have (docs/formats/marlin.md, marlin_24.md), so a state_dict holds what
lies on disk. Scales stay float16 whatever the model is converted to: `.to(torch.bfloat16)` changes a bias and nothing else.

Calls overlap with the kernel before them (`overlap` of the operators). Where that kernel changes these very tensors, as pack's `remask`
does, set `overlap` of the module to False.

On a CPU the first call turns the tiles into the layout of torch's int4 operator (cpu.py) and drops them; for a dense linear that takes as
many bytes. state_dict, packed, copies, pickles and moves to another device make the same tiles again, bit for bit; the layout itself is
never stored, because it belongs to this processor. A module keeps its tiles and multiplies by the reference, which is right and slow,
where `overlap` is False, because they are going to be changed, and where `keeps_tiles` is True: they come from the disk for each call.

`rounding` of a module allows 8-bit activations (ops.py). It is not stored: who loads a folder reads it from config.json. Where it is
"int8" and scales are of the form of factored.py, the module keeps them in that form as well, 16 bits for each group, on a GPU from the
first call or `split_scales` on. A 2:4 module then keeps its metadata once more, a bit for each weight, where the GPU has a use for them
(int8_metadata.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from marlinctl.kernels.cpu import cpu_gemm, for_cpu, words_again
from marlinctl.kernels.factored import factored_scales
from marlinctl.kernels.int8_metadata import int8_operands
from marlinctl.kernels.ops import marlin_gemm, sparse_marlin_gemm
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.scheme import Rounding

_CHANGING = threading.Lock()  # of threads that call a module for the first time at once, one prepares it


class _Packed(nn.Module):
    """What both have in common. For inference: no gradient passes through."""

    WORDS: ClassVar[str]  # the buffer that a CPU can do without
    rounding: Rounding  # of activations
    s: Tensor
    bias: nn.Parameter | None
    factored: Tensor | None
    cpu_weight: Tensor | None  # as cpu.for_cpu makes them
    cpu_scales: Tensor | None

    def __init__(self, p: PackedLinear | PackedSparseLinear, bias: Tensor | None, rounding: Rounding) -> None:
        super().__init__()
        if bias is not None and bias.shape != (p.out_features,):
            raise ValueError(f"bias must be [{p.out_features}], got {list(bias.shape)}")
        self.in_features, self.out_features, self.group_size = p.in_features, p.out_features, p.group_size
        self.register_buffer("s", p.scales)
        self.rounding, self._knows_factors = rounding, False
        shape = torch.tensor([p.out_features, p.in_features], dtype=torch.int64, device="cpu")
        self.register_buffer("weight_shape", shape.to(p.scales.device))
        self.factored = self.cpu_weight = self.cpu_scales = None  # no buffers: accelerate moves those that are not there yet, and fails
        self.overlap, self.keeps_tiles = True, False
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.overlap and not self.keeps_tiles:
            if self.cpu_weight is None:
                self.prepare()
            out: Tensor = cpu_gemm(x, self.cpu_weight, self.cpu_scales, self.out_features, self.bias, self.rounding)
            return out
        if self.cpu_weight is not None:
            if x.device.type != "cpu":
                raise ValueError(f"activations are on {x.device} and the linear is on the CPU: move one of them with .to()")
            self._bring_tiles_back()
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        """By the operator, from tiles."""
        raise NotImplementedError

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="a packed linear is prepared for the CPU: with fullgraph=True call the model once before it is compiled"
    )
    def prepare(self) -> None:
        """On a CPU what the first call does: tiles to the layout of torch's operator. ValueError where they are elsewhere."""
        with _CHANGING:
            if self.cpu_weight is None:
                weight, self.cpu_scales = for_cpu(self._as_packed())
                self.cpu_weight = weight  # after the scales: a thread that sees it does not wait
                setattr(self, self.WORDS, None)

    def _bring_tiles_back(self) -> None:
        with _CHANGING:
            if self.cpu_weight is not None:
                setattr(self, self.WORDS, self._words())
                self.cpu_weight = self.cpu_scales = None

    def _words(self) -> Tensor:
        """Of the tiles, from torch's layout."""
        assert self.cpu_weight is not None
        return words_again(self.cpu_weight, getattr(self, "B_meta", None))

    def _as_packed(self) -> PackedLinear | PackedSparseLinear:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.cpu_weight is not None:
            destination[f"{prefix}{self.WORDS}"] = self._words()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._bring_tiles_back()
        super()._load_from_state_dict(*arguments)
        self._keep("factored", None)
        self._knows_factors = False

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        """A buffer that is not stored, and no buffer where it is None."""
        for held in (self._buffers, self.__dict__):
            held.pop(name, None)
        if tensor is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, tensor, persistent=False)

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="scales are looked at once: with fullgraph=True call the module, or its split_scales, before it is compiled"
    )
    def split_scales(self) -> None:
        """What the first call on a GPU does: finds whether the kernel for factored weights can multiply with these scales."""
        if self.rounding == "int8":
            self._split(self._as_packed())
            self._knows_factors = True

    def _split(self, p: Any) -> None:
        raise NotImplementedError

    def _split_once(self, x: Tensor) -> bool:
        """Whether the operator may be given factored weights: without overlap scales may be changed, as said above."""
        if self.rounding != "int8" or not self.overlap or not x.is_cuda:
            return False
        if not self._knows_factors:
            self.split_scales()
        return True

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: another process may have another processor."""
        state = self.__dict__.copy()
        if self.cpu_weight is not None:
            state |= {"_buffers": {**self._buffers, self.WORDS: self._words()}, "cpu_weight": None, "cpu_scales": None}
        return state

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"
        rounds = "" if self.rounding == "none" else f", rounding={self.rounding}"
        return f"{sizes}, bias={self.bias is not None}{rounds}"

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> _Packed:
        if self.cpu_weight is not None and fn(self.weight_shape).device.type != "cpu":
            self._bring_tiles_back()
        scales = self.s
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.s.dtype != scales.dtype:
            self.s = scales.to(self.s.device)
        return self


class MarlinLinear(_Packed):
    """x [.., K] float16 or bfloat16, on a CPU float32 too -> [.., N]: a linear in MARLIN tiles.

    Tensors on the meta device make a module to be filled later.
    """

    WORDS = "B"
    B: Tensor

    def __init__(self, p: PackedLinear, bias: Tensor | None = None, rounding: Rounding = "none") -> None:
        super().__init__(p, bias, rounding)
        self.register_buffer("B", p.qweight)

    def _multiply(self, x: Tensor) -> Tensor:
        if self.rounding == "none":
            plain: Tensor = marlin_gemm(x, self.B, self.s, self.out_features, self.group_size, self.bias, self.overlap)
            return plain
        more = (self.overlap, self.rounding, self.factored if self._split_once(x) else None)
        out: Tensor = marlin_gemm(x, self.B, self.s, self.out_features, self.group_size, self.bias, *more)
        return out

    def _split(self, p: PackedLinear) -> None:
        self._keep("factored", factored_scales(p))

    def packed(self) -> PackedLinear:
        """The tensors as the packer's type: the module's own, but on a CPU only until it is called again."""
        self._bring_tiles_back()
        return self._as_packed()

    def _as_packed(self) -> PackedLinear:
        return PackedLinear(self.B, self.s, self.out_features, self.in_features, self.group_size)


class SparseMarlinLinear(_Packed):
    """x [.., K] float16 or bfloat16, on a CPU float32 too -> [.., N]: a 2:4 linear in Sparse-MARLIN tiles."""

    WORDS = "B_24"
    B_24: Tensor
    B_meta: Tensor
    int8_meta: Tensor | None

    def __init__(self, p: PackedSparseLinear, bias: Tensor | None = None, rounding: Rounding = "none") -> None:
        super().__init__(p, bias, rounding)
        self.register_buffer("B_24", p.qweight)
        self.register_buffer("B_meta", p.meta)
        self.int8_meta = None

    def _multiply(self, x: Tensor) -> Tensor:
        operands = (self.B_24, self.B_meta, self.s, self.out_features, self.group_size, self.bias, self.overlap)
        if self.rounding == "none":
            plain: Tensor = sparse_marlin_gemm(x, *operands)
            return plain
        more = (self.factored, self.int8_meta) if self._split_once(x) else (None, None)
        out: Tensor = sparse_marlin_gemm(x, *operands, self.rounding, *more)
        return out

    def _split(self, p: PackedSparseLinear) -> None:
        factored, int8_meta = int8_operands(p) or (None, None)
        self._keep("factored", factored)
        self._keep("int8_meta", int8_meta)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._keep("int8_meta", None)

    def packed(self) -> PackedSparseLinear:
        """The tensors as the packer's type: the module's own, but on a CPU only until it is called again."""
        self._bring_tiles_back()
        return self._as_packed()

    def _as_packed(self) -> PackedSparseLinear:
        return PackedSparseLinear(self.B_24, self.B_meta, self.s, self.out_features, self.in_features, self.group_size)


def packed_module(
    p: PackedLinear | PackedSparseLinear, bias: Tensor | None = None, rounding: Rounding = "none"
) -> MarlinLinear | SparseMarlinLinear:
    return SparseMarlinLinear(p, bias, rounding) if isinstance(p, PackedSparseLinear) else MarlinLinear(p, bias, rounding)


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
