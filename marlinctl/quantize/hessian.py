"""Gram matrices of activations: what the solver knows about the inputs of a linear.

A product of two bfloat16 numbers is exact in float32, so a matrix unit that multiplies bfloat16 and adds in float32 loses nothing that a
float32 multiplication would keep; only the order of the additions differs (relative error against float64 for 4,096 x 1,536 values: 1.7e-7,
float32 units 5.9e-7). On a processor with such units that is 4 times as fast as float32, so `add_gram` uses them whenever its input is
bfloat16. float32 and float16 inputs are multiplied in full float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Columns are multiplied in panels, those on and below the diagonal only: (p + 1) / 2p of the work. Narrower panels save more work but
# feed the matrix units worse. Two cores with AMX, 65,536 tokens: K = 576 in 1, 2, 4 panels takes 0.10, 0.06, 0.08 s, K = 1,536 in 1, 4, 6
# panels 0.34, 0.26, 0.25 s.
_PANEL = 320
# On a GPU wide panels, whose borders are aligned to 16 bytes, as the fast kernels of cuBLAS ask. An H200, 8,192 tokens of bfloat16:
# K = 4,096 in panels of 320, 1,024, 2,048, 4,096 columns takes 0.91, 0.36, 0.35, 0.48 ms, K = 14,336 in panels of 320, 2,048, 7,168,
# 14,336 columns 4.4, 3.1, 3.7, 4.9 ms.
_CUDA_PANEL = 2048


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += xᵀ x, lower panels only; `mirror` completes it.

    total: [K, K] float32, changed in place. x: [T, K] bfloat16, float16 or float32, one row per token.
    """
    k = x.shape[1]
    if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
        for start in range(0, k, step := _CUDA_PANEL):
            _add_product(total[start : start + step, : start + step], x[:, start : start + step].T, x[:, : start + step])
        return
    step = -(-k // max(1, round(k / _PANEL)))
    exact_in_bf16 = x.dtype == torch.bfloat16
    wide = x.float()
    with _bfloat16_products(exact_in_bf16):
        for start in range(0, k, step):
            total[start : start + step, : start + step].addmm_(wide[:, start : start + step].T, wide[:, : start + step])


def add_cross(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += xᵀ y. total: [K, N] float32, changed in place. x: [T, K], y: [T, N], of one dtype; or x bfloat16 and y float32."""
    if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
        # A float32 y is the sum of two bfloat16 numbers up to 2^-17 of itself: 8,192 tokens, K = 14,336, N = 4,096 take 3.0 instead of
        # 19.7 ms.
        high = y.to(x.dtype)
        _add_product(total, x.T, high)
        if y.dtype != x.dtype:
            _add_product(total, x.T, (y - high).to(x.dtype))
        return
    with _bfloat16_products(x.dtype == torch.bfloat16):
        total.addmm_(x.float().T, y.float())


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b on a GPU. total: float32; a, b: 16-bit, whose product is added up in float32."""
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def mirror(total: Tensor) -> Tensor:
    """The whole symmetric matrix from the lower panels that `add_gram` filled. Changes `total` and returns it."""
    lower = torch.tril(total)
    total.copy_(lower).add_(torch.tril(lower, -1).T)
    return total


@contextmanager
def _bfloat16_products(on: bool) -> Iterator[None]:
    """Let oneDNN feed its bfloat16 units from float32 operands. Only for operands that are bfloat16 numbers already."""
    if not on:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
