"""Gram matrices against float64."""

from __future__ import annotations

import pytest
import torch

from marlinctl.quantize.hessian import add_gram, mirror


@pytest.mark.parametrize("k", [48, 256, 576, 1001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_is_exact_to_float32(k: int, dtype: torch.dtype) -> None:
    """If bfloat16 units rounded their sums, or a panel were left out, every layer would be solved for other inputs."""
    generator = torch.Generator().manual_seed(k)
    total = torch.zeros(k, k)
    parts = [torch.randn(700, k, generator=generator).to(dtype) for _ in range(3)]
    for x in parts:
        add_gram(total, x)
    expected = torch.stack([x.double().T @ x.double() for x in parts]).sum(0)
    gram = mirror(total)
    assert torch.equal(gram, gram.T)
    assert (gram.double() - expected).norm() / expected.norm() < 3e-6  # 2,100 float32 additions; bfloat16 sums would give 3e-3


def test_products_of_float32_are_not_rounded_to_bfloat16() -> None:
    """If the bfloat16 units stayed on for float32 inputs, a --dtype float32 run would silently be a bfloat16 one."""
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    add_gram(torch.zeros(64, 64), x.bfloat16())
    total = torch.zeros(64, 64)
    add_gram(total, x)
    expected = x.double().T @ x.double()
    assert (mirror(total).double() - expected).norm() / expected.norm() < 1e-6
