"""What flows out of the solver: integer codes with their scales, and the Hessian that went in.

Axes: N out_features, K in_features, G groups along K (G = K / group_size).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from marlinctl.quantize.scheme import INT4, Grid

CODE_MIN, CODE_MAX = INT4.lowest, INT4.highest  # int4, two's complement; on disk a nibble holds code + 8


def values_of(codes: Tensor, grid: Grid) -> Tensor:
    """The values float32 that int8 codes of any shape stand for: integers, or the float8_e4m3fn numbers with these bits."""
    return (codes.view(torch.float8_e4m3fn) if grid.floating else codes).to(torch.float32)


def codes_of_values(values: Tensor, grid: Grid) -> Tensor:
    """int8 codes of values of the grid, of any float type: the inverse of `values_of`."""
    return values.to(torch.float8_e4m3fn).view(torch.int8) if grid.floating else values.to(torch.int8)


def dequantized(codes: Tensor, scales: Tensor, group_size: int, zeros: Tensor | None = None, grid: Grid = INT4) -> Tensor:
    """The weight [N, K] float32 of int8 codes [N, K] and scales [N, G] of any float type. Exact for scales of at most 16 bits.

    zeros: [N, G] int8, of asymmetric codes. grid: what the codes are of.
    """
    steps = values_of(codes, grid).reshape(len(codes), -1, group_size)
    if zeros is not None:
        steps = steps - zeros.to(torch.float32).unsqueeze(-1)
    return (steps * scales.to(torch.float32).unsqueeze(-1)).reshape(codes.shape)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """weight[n, k] = (codes[n, k] - zeros[n, k // group_size]) * scales[n, k // group_size]. Codes are data and are never rounded again."""

    codes: Tensor  # [N, K] int8, of the grid; the bits of float8_e4m3fn numbers where it is of those
    scales: Tensor  # [N, G] float16 (bfloat16 only when read from a foreign checkpoint), finite
    group_size: int  # divides K; a whole row is group_size == K, never -1
    grid: Grid = field(default=INT4, kw_only=True)
    zeros: Tensor | None = field(default=None, kw_only=True)  # [N, G] int8, codes of the grid; None where it is symmetric

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.ndim != 2:
            raise ValueError(f"codes must be int8 [N, K], got {self.codes.dtype} {tuple(self.codes.shape)}")
        n, k = self.codes.shape
        if self.group_size < 1 or k % self.group_size:
            raise ValueError(f"group_size {self.group_size} does not divide K={k}")
        if self.scales.dtype not in (torch.float16, torch.bfloat16) or tuple(self.scales.shape) != (n, k // self.group_size):
            raise ValueError(
                f"scales must be float16 or bfloat16 [{n}, {k // self.group_size}], got {self.scales.dtype} {tuple(self.scales.shape)}"
            )
        if (self.zeros is None) != self.grid.symmetric:
            raise ValueError(f"{self.grid} codes have {'no ' * self.grid.symmetric}zeros")
        if self.zeros is not None:
            if self.zeros.dtype != torch.int8 or self.zeros.shape != self.scales.shape:
                raise ValueError(f"zeros must be int8 {list(self.scales.shape)}, got {self.zeros.dtype} {list(self.zeros.shape)}")
            least, most = (int(value) for value in torch.aminmax(self.zeros))
            if least < self.grid.lowest or most > self.grid.highest:
                raise ValueError(f"zeros lie in {least}..{most}, outside {self.grid.lowest}..{self.grid.highest}")
        if self.grid.floating:
            if not bool(torch.isfinite(self.scales).all() & torch.isfinite(values_of(self.codes, self.grid)).all()):
                raise ValueError("scales or FP8 codes hold NaN or infinity")
            return
        low, high = torch.aminmax(self.codes)
        if bool(torch.isfinite(self.scales).all() & (low >= self.grid.lowest) & (high <= self.grid.highest)):  # one wait for a GPU
            return
        if not bool(torch.isfinite(self.scales).all()):
            raise ValueError("scales hold NaN or infinity")
        if int(low) < self.grid.lowest or int(high) > self.grid.highest:
            raise ValueError(f"codes lie in {int(low)}..{int(high)}, outside {self.grid.lowest}..{self.grid.highest}")

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that these codes stand for. Exact in float32: a code of at most 8 bits times 11-bit significand."""
        return dequantized(self.codes, self.scales, self.group_size, self.zeros, self.grid).to(dtype)


@dataclass(frozen=True, slots=True)
class Hessian:
    """Mean of x xᵀ over calibration tokens (no factor 2; it cancels in every use).

    With drift correction, also the difference between the unquantized model's activations (x', and r' of the residual stream that the
    output is added to) and the compressed one's. Tokens may be weighted there (oneshot/reference_stream.py, token_scale): every mean is
    then of the weighted tokens.
    """

    matrix: Tensor  # [K, K] float32, symmetric
    tokens: int
    drift: Tensor | None = None  # [K, K] float32: mean of x (x' - x)ᵀ
    residual: Tensor | None = None  # [K, N] float32: mean of x (r' - r)ᵀ, for a linear whose output goes to the residual stream
    inputs: Tensor | None = None  # [T, K], some of the x, where they were asked for; a token that does not count is zeros

    def __post_init__(self) -> None:
        k = self.matrix.shape[0]
        if self.matrix.dtype != torch.float32 or tuple(self.matrix.shape) != (k, k):
            raise ValueError(f"the Hessian must be float32 [K, K], got {self.matrix.dtype} {tuple(self.matrix.shape)}")
