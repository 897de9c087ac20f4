"""How weights and activations are represented: one value from the recipe to solver, formats, kernels and report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sparsity = Literal["none", "2:4"]
Activations = Literal["16-bit"]
SIXTEEN_BIT = 16


@dataclass(frozen=True, slots=True, order=True)
class Grid:
    """The values that a code may have: a step is the scale of its group. Zero is code 0, or a code that each group has for itself."""

    bits: int = 4
    symmetric: bool = True

    @property
    def lowest(self) -> int:
        """The smallest code, -8 of four bits."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code, 7 of four bits."""
        return (1 << (self.bits - 1)) - 1

    def __str__(self) -> str:
        return f"{self.bits}-bit" if self.symmetric else f"asymmetric {self.bits}-bit"


INT4, INT8, UINT4 = Grid(), Grid(8), Grid(4, symmetric=False)


@dataclass(frozen=True, slots=True)
class Scheme:
    """Integer codes of `bits` bits, one scale for each group of weights along K, or weights as they are (16)."""

    bits: int = 4  # of a code; 16: not quantized
    group_size: int = 128  # weights along K that share a scale; -1 for the whole row
    sparsity: Sparsity = "none"  # 2:4: two of each four neighbours along K are zero
    activations: Activations = "16-bit"
    symmetric: bool = True

    @property
    def quantizes(self) -> bool:
        return self.bits < SIXTEEN_BIT

    @property
    def prunes(self) -> bool:
        return self.sparsity != "none"

    @property
    def grid(self) -> Grid:
        """INT4 where nothing is quantized: it is not used then."""
        return Grid(self.bits, self.symmetric) if self.quantizes else INT4
