"""How weights and activations are represented: one value from the recipe to solver, formats, kernels and report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sparsity = Literal["none", "2:4"]
Activations = Literal["16-bit", "int8", "fp8"]
Rounding = Literal["none", "int8", "int8-128"]  # of activations beside 4-bit codes: none, a scale for each token, or for each 128 of K
RunWith = Literal["16-bit", "int8", "int8-128", "fp8"]  # activations of a linear when a program runs a folder
ACTIVATION_GROUP = 128  # of K, that share a scale in int8-128
SIXTEEN_BIT = 16
E4M3_HIGHEST = 448  # the largest number of float8_e4m3fn


@dataclass(frozen=True, slots=True, order=True)
class Grid:
    """The values that a code may have, and the activations that it is multiplied with.

    A step is the scale of its group. Zero is code 0, or a code that each group has for itself. Activations other than 16-bit ones are
    rounded when the model runs, each token with a scale of its own; their linears have 8-bit codes with one scale per row.
    """

    bits: int = 4
    symmetric: bool = True
    activations: Activations = "16-bit"

    @property
    def floating(self) -> bool:
        """Codes are float8_e4m3fn numbers, and not integers."""
        return self.activations == "fp8"

    @property
    def rounds_activations(self) -> bool:
        return self.activations != "16-bit"

    @property
    def lowest(self) -> int:
        """The smallest value of a code, -8 of four bits."""
        return -E4M3_HIGHEST if self.floating else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest value of a code, 7 of four bits."""
        return E4M3_HIGHEST if self.floating else (1 << (self.bits - 1)) - 1

    @property
    def covers(self) -> float:
        """The largest number of steps that the highest code stands for: half a step beyond it. In FP8, whose largest numbers are 32 steps
        apart, the highest code itself, as in every other FP8 checkpoint."""
        return float(self.highest) if self.floating else self.highest + 0.5

    def __str__(self) -> str:
        if self.rounds_activations:
            return "FP8 (FP8 activations)" if self.floating else f"{self.bits}-bit ({self.activations} activations)"
        return f"{self.bits}-bit" if self.symmetric else f"asymmetric {self.bits}-bit"


INT4, INT8, UINT4 = Grid(), Grid(8), Grid(4, symmetric=False)
INT8_ACTIVATIONS, FP8 = Grid(8, activations="int8"), Grid(8, activations="fp8")


@dataclass(frozen=True, slots=True)
class Scheme:
    """Integer codes of `bits` bits, one scale for each group of weights along K, or weights as they are (16)."""

    bits: int = 4  # of a code; 16: not quantized
    group_size: int = 128  # weights along K that share a scale; -1 for the whole row
    sparsity: Sparsity = "none"  # 2:4: two of each four neighbours along K are zero
    activations: Activations = "16-bit"
    symmetric: bool = True
    activation_group: int = ACTIVATION_GROUP  # inputs of a token that share a scale where activations are rounded; -1: all

    @property
    def rounding(self) -> Rounding:
        """What products with these codes may do to activations. 8 bits are allowed by it, and used where they are faster."""
        if self.activations != "int8":
            return "none"
        return "int8" if self.activation_group == -1 else "int8-128"

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
