"""SparseQuantizedLinear: the mask is part of the data, and a mask that is not 2:4 does not get in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.types import SparseQuantizedLinear, check_mask


def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keep = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    codes = torch.tensor([[7, 0, 0, -8, 0, 1, 0, 0], [0, 0, 0, 0, 2, 3, 0, 0]], dtype=torch.int8)
    return codes, torch.ones(2, 1, dtype=torch.float16), keep


def test_a_survivor_may_have_code_zero() -> None:
    """If this failed, a kept weight that rounds to 0 would be lost, and a packer would have to guess who survived."""
    codes, scales, keep = parts()
    sparse = SparseQuantizedLinear(codes, scales, 8, keep)
    assert sparse.keep is keep
    assert isinstance(sparse, QuantizedLinear)  # whatever takes dense codes takes these
    assert torch.equal(sparse.dequantize(), codes.float())


def test_it_is_frozen() -> None:
    """If this failed, a mask could be swapped after it was checked."""
    sparse = SparseQuantizedLinear(*parts()[:2], 8, parts()[2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparse.keep = parts()[2]  # type: ignore[misc]


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_a_quad_must_keep_two(count: int) -> None:
    """If this failed, a packer would drop the third survivor of a quad, or read a position that is not there."""
    codes, scales, keep = parts()
    keep[1, 4:] = torch.arange(4) < count
    message = rf"1 of 4 groups of four do not keep exactly 2: the first, row 1, columns 4..7, keeps {count}"
    with pytest.raises(ValueError, match=message):
        SparseQuantizedLinear(codes, scales, 8, keep)


def test_two_of_four_means_aligned_fours() -> None:
    """If this failed, a mask with two kept weights in some four neighbours, but not in the hardware's four, would pass."""
    with pytest.raises(ValueError, match=r"2 of 2 groups of four .* row 0, columns 0..3, keeps 3"):
        check_mask(torch.tensor([[1, 1, 1, 0, 0, 1, 0, 0]], dtype=torch.bool))


def test_pruned_weights_have_code_zero() -> None:
    """If this failed, the dense form of a sparse model would hold weights that its sparse form does not."""
    codes, scales, keep = parts()
    codes[1, 7] = 3
    with pytest.raises(ValueError, match=r"codes\[1, 7\] = 3 although the mask says it was pruned"):
        SparseQuantizedLinear(codes, scales, 8, keep)


def test_wrong_masks_and_wrong_codes_are_refused() -> None:
    """If this failed, a mask of another linear, or codes that QuantizedLinear refuses, would get in by way of the sparse type."""
    codes, scales, keep = parts()
    with pytest.raises(ValueError, match=r"the mask is \[4, 8\] but codes are \[2, 8\]"):
        SparseQuantizedLinear(codes, scales, 8, keep.repeat(2, 1))
    with pytest.raises(ValueError, match=r"a mask must be bool \[N, K\] .*, got torch.int8 \[2, 8\]"):
        SparseQuantizedLinear(codes, scales, 8, keep.to(torch.int8))
    with pytest.raises(ValueError, match=r"K a multiple of 4, got torch.bool \[2, 6\]"):
        SparseQuantizedLinear(codes, scales, 8, keep[:, :6])
    with pytest.raises(ValueError, match=r"codes lie in 0\.\.9"):
        SparseQuantizedLinear(torch.full((2, 8), 9, dtype=torch.int8) * keep, scales, 8, keep)
