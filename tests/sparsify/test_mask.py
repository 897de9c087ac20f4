"""Finding an exact 2:4 zero pattern in a weight."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlinctl.sparsify.mask import two_of_four
from marlinctl.sparsify.types import check_mask

FOURS = {  # nonzero pattern -> kept weights, worked out by hand
    "0000": "1100",
    "1000": "1100",
    "0100": "1100",
    "0010": "1010",
    "0001": "1001",
    "1100": "1100",
    "1010": "1010",
    "1001": "1001",
    "0110": "0110",
    "0101": "0101",
    "0011": "0011",
}


def row(bits: str) -> torch.Tensor:
    return torch.tensor([[int(bit) for bit in bits]])


@pytest.mark.parametrize(("nonzero", "kept"), FOURS.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_every_group_of_four(nonzero: str, kept: str, dtype: torch.dtype) -> None:
    """If this failed, kept weights would be pruned, or the same weight could give different masks."""
    keep = two_of_four(-3 * row(nonzero).to(dtype))
    assert keep is not None
    assert torch.equal(keep, row(kept).bool())


@pytest.mark.parametrize("nonzero", [bits for bits in map("".join, product("01", repeat=4)) if bits.count("1") > 2])
def test_more_than_two_is_not_the_pattern(nonzero: str) -> None:
    """If this failed, a dense weight would be taken for 2:4 and lose kept weights."""
    assert two_of_four(row("1100" + nonzero + "0011")) is None


def test_one_dense_quad_in_a_large_weight_decides() -> None:
    """If this failed, a single layer pruned by mistake at one place would be treated as 2:4 altogether."""
    weight = torch.ones(64, 256)
    weight[:, 0::4] = weight[:, 3::4] = 0
    keep = two_of_four(weight)
    assert keep is not None and torch.equal(keep, weight != 0)
    weight[63, 255] = 1e-30
    assert two_of_four(weight) is None


def test_quads_are_aligned() -> None:
    """If this failed, a pattern shifted by one column, which no tensor core can run, would count as 2:4."""
    assert two_of_four(row("11100100")) is None
    assert two_of_four(row("110011")) is None  # K = 6 has no quads


def test_negative_zero_is_a_zero_and_nan_is_not() -> None:
    """If this failed, -0.0 left behind by pruning would hide the pattern, or NaN would be pruned away unseen."""
    keep = two_of_four(torch.tensor([[-0.0, 0.0, float("nan"), -0.0]]))
    assert keep is not None
    assert keep.tolist() == [[True, False, True, False]]


def test_a_weight_is_a_matrix() -> None:
    """If this failed, fused expert tensors [E, N, K] would be read along the wrong axis."""
    with pytest.raises(ValueError, match=r"a weight is \[N, K\], got \[2, 4, 4\]"):
        two_of_four(torch.zeros(2, 4, 4))


@given(st.integers(1, 9), st.integers(1, 20), st.floats(0, 1), st.integers(0, 999))
def test_the_mask_is_2_4_and_covers_every_nonzero(n: int, quads: int, density: float, seed: int) -> None:
    """If this failed, a mask would not be accepted by check_mask, or would prune something that is there."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(n, quads, 4, generator=generator).argsort(-1) < 2
    weight = (allowed & (torch.rand(n, quads, 4, generator=generator) < density)).reshape(n, -1).float()
    keep = two_of_four(weight)
    assert keep is not None
    check_mask(keep)
    assert not bool((weight != 0)[~keep].any())
    again = two_of_four(weight * keep)
    assert again is not None and torch.equal(keep, again), "a mask finds itself again"
