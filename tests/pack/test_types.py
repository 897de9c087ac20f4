"""PackedLinear and PackedSparseLinear take only what the layout allows, and float16 means the same numbers."""

from __future__ import annotations

import pytest
import torch

from marlinctl.pack.types import PackedLinear, PackedSparseLinear, as_float16, padded


def parts(n: int = 80, k: int = 192, groups: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(padded(k) // 16, 2 * padded(n), dtype=torch.int32), torch.zeros(groups, padded(n), dtype=torch.float16)


@pytest.mark.parametrize(("size", "expected"), [(1, 64), (63, 64), (64, 64), (65, 128), (200, 256), (4096, 4096)])
def test_padded(size: int, expected: int) -> None:
    """If this failed, shapes on disk would not be whole tiles."""
    assert padded(size) == expected


@pytest.mark.parametrize(
    ("n", "k", "group_size", "groups", "padded_groups"),
    [(80, 192, 64, 3, 3), (80, 160, 32, 5, 6), (80, 200, 200, 1, 1), (80, 48, 24, 2, 3)],
)
def test_groups_of_the_true_and_of_the_padded_k(n: int, k: int, group_size: int, groups: int, padded_groups: int) -> None:
    """If this failed, a kernel would read scales beyond the last row, or a reader would expect rows that are not there."""
    p = PackedLinear(*parts(n, k, padded_groups), n, k, group_size)
    assert (p.groups, p.padded_groups, p.channel_wise) == (groups, padded_groups, group_size == k)


def test_wrong_shapes_are_refused_with_the_right_ones() -> None:
    """If this failed, tiles of another linear would be read as this one's."""
    words, scales = parts()
    with pytest.raises(ValueError, match=r"qweight of N=80, K=192 must be int32 \[12, 256\], got torch.int32 \[256, 12\]"):
        PackedLinear(words.T, scales, 80, 192, 64)
    with pytest.raises(ValueError, match=r"must be int32 \[12, 256\], got torch.int64"):
        PackedLinear(words.long(), scales, 80, 192, 64)
    with pytest.raises(ValueError, match=r"scales of N=80, K=192, group_size=32 must be float16 \[6, 128\], got torch.float16 \[3, 128\]"):
        PackedLinear(words, scales, 80, 192, 32)
    with pytest.raises(ValueError, match=r"must be float16 \[3, 128\], got torch.bfloat16"):
        PackedLinear(words, scales.bfloat16(), 80, 192, 64)
    with pytest.raises(ValueError, match="group_size 128 does not divide K=192"):
        PackedLinear(words, scales, 80, 192, 128)
    with pytest.raises(ValueError, match="group_size -1 does not divide"):
        PackedLinear(words, scales, 80, 192, -1)
    with pytest.raises(ValueError, match="N=0"):
        PackedLinear(words, scales, 0, 192, 64)


def test_wrong_sparse_shapes_are_refused_with_the_right_ones() -> None:
    """If this failed, survivors and metadata of two linears, or dense tiles, would be read as one 2:4 linear."""
    words, scales = torch.zeros(6, 256, dtype=torch.int32), torch.zeros(3, 128, dtype=torch.float16)
    meta = words.to(torch.int16)
    p = PackedSparseLinear(words, meta, scales, 80, 192, 64)
    assert (p.groups, p.padded_groups, p.channel_wise) == (3, 3, False)
    with pytest.raises(ValueError, match=r"qweight of N=80, K=192 must be int32 \[6, 256\], got torch.int32 \[12, 256\]"):
        PackedSparseLinear(torch.zeros(12, 256, dtype=torch.int32), meta, scales, 80, 192, 64)
    with pytest.raises(ValueError, match=r"meta of N=80, K=192 must be int16 \[6, 256\], got torch.int32 \[6, 256\]"):
        PackedSparseLinear(words, words, scales, 80, 192, 64)
    with pytest.raises(ValueError, match=r"scales of N=80, K=192, group_size=32 must be float16 \[6, 128\]"):
        PackedSparseLinear(words, meta, scales, 80, 192, 32)
    with pytest.raises(ValueError, match="K=190 is not a multiple of 4"):
        PackedSparseLinear(words, meta, scales[:1], 80, 190, 190)


def test_bfloat16_scales_that_float16_holds_pass() -> None:
    """If this failed, foreign checkpoints with harmless bfloat16 scales would be refused, or rounded."""
    scales = torch.tensor([[0.0078125, -1.5, 0.0, 65280.0, 2.0**-24]], dtype=torch.bfloat16)
    half = as_float16(scales)
    assert half.dtype == torch.float16
    assert half.tolist() == scales.tolist()


@pytest.mark.parametrize("value", [1e-6, 70000.0, 2.0**-25, -1e38])
def test_bfloat16_scales_that_would_change_are_refused(value: float) -> None:
    """If this failed, converting a foreign checkpoint would silently round its scales, flush them to 0 or make them infinite."""
    scales = torch.ones(2, 3, dtype=torch.bfloat16)
    scales[1, 2] = value
    with pytest.raises(ValueError, match=r"1 of 6 scales \[2, 3\] are not exact in float16, the first at \[1, 2\]: .* in torch.bfloat16"):
        as_float16(scales)
