"""Gram matrices of activations: what the solver knows about the inputs of a linear.

A product of two bfloat16 numbers is exact in float32, so a matrix unit that multiplies bfloat16 and adds in float32 loses nothing that a
float32 multiplication would keep; only the order of the additions differs (accuracy.md in no project needs more: measured here, relative
error 1.7e-7 against float64 for 4,096 x 1,536 tokens, float32 itself 5.9e-7). On a processor with such units that is 4 times as fast as
float32, so `add_gram` uses them whenever its input is bfloat16. float32 and float16 inputs are multiplied in full float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_PANELS = 4  # column panels of a wide matrix; only those on or below the diagonal are multiplied: (p + 1) / 2p = 62 % of the work
_WIDE = 1024  # below, panels are too narrow for the matrix units: K = 576 takes 1.1 ms per 1,024 tokens whole, 1.7 in four panels


def add_gram(total: Tensor, x: Tensor) -> None:
    """total += xᵀ x, lower panels only; `mirror` completes it.

    total: [K, K] float32, changed in place. x: [T, K] bfloat16, float16 or float32, one row per token.
    """
    k = x.shape[1]
    step = -(-k // _PANELS) if k >= _WIDE else k
    if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
        for start in range(0, k, step):
            rows = x[:, start : start + step].T
            total[start : start + step, : start + step] += torch.mm(rows, x[:, : start + step], out_dtype=torch.float32)
        return
    exact_in_bf16 = x.dtype == torch.bfloat16
    wide = x.float()
    with _bfloat16_products(exact_in_bf16):
        for start in range(0, k, step):
            total[start : start + step, : start + step].addmm_(wide[:, start : start + step].T, wide[:, : start + step])


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
