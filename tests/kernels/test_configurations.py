"""What the host computes from a configuration; that the kernel agrees is tested where it is compiled and where it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from marlinctl.kernels.configurations import Configuration, Grid, group_shift

CONFIGURATION = Configuration(tokens=16, blocks=2, split=1, k_warps=4, k_step=256, stages=3, ctas=2)


def test_sizes_by_hand() -> None:
    """If this failed, a launch would have the wrong number of threads or too little shared memory or workspace."""
    assert (CONFIGURATION.threads, CONFIGURATION.columns) == (256, 128)
    # a stage: 256 x 128 / 2 of weights, 16 x 256 x 2 of activations, 8 x 128 x 2 of scales; 8 warps exchange 16 x 64 / 4 float32
    assert CONFIGURATION.shared_bytes == 3 * (16384 + 8192 + 2048) + 8 * 16 * 16 * 4 + 16
    assert CONFIGURATION.output_tiles(17, 129) == 4
    assert CONFIGURATION.units(17, 129, 257) == 8
    assert CONFIGURATION.partial_floats(3) == 3 * 2 * 16 * 128


def test_sparse_sizes_by_hand() -> None:
    """If this failed, a launch of the 2:4 kernel would have too little shared memory, or another kernel would be launched."""
    sparse = Configuration(tokens=8, blocks=4, split=2, k_warps=1, k_step=128, stages=3, ctas=1, sparse=True)
    assert (sparse.threads, sparse.columns, sparse.tile_k, sparse.kernel) == (256, 256, 32, "sparse_marlin_sm80")
    # a stage: 64 x 256 survivors of half a byte, 32 x 256 nibbles of metadata, 8 x 128 x 2 of activations, 4 x 256 x 2 of scales
    assert sparse.shared_bytes == 3 * (8192 + 4096 + 2048 + 2048) + 16


def test_sizes_of_int8_by_hand() -> None:
    """If this failed, a launch with int8 activations would have too little shared memory, or another kernel would be launched."""
    int8 = Configuration(tokens=32, blocks=4, split=2, k_warps=1, k_step=128, stages=4, ctas=1, int8=True)
    assert (int8.threads, int8.kernel, int8.name) == (256, "marlin_a8_sm80", "a8-m32n256k128x4")
    # a stage: 128 x 256 / 2 of weights, 32 x 128 of activations, 4 x 256 x 2 of scales, 32 x 4 of token scales
    assert int8.shared_bytes == 4 * (16384 + 4096 + 2048 + 128) + 16
    assert [int8.fits(a) for a in ("sm_80", "sm_86", "sm_89", "sm_90a")] == [True] * 4
    factored = replace(int8, factored=True)
    assert (factored.kernel, factored.name) == ("marlin_a8_factored_sm80", "a8-m32n256k128x4f")
    assert int8.defines(torch.float16, 1) != int8.defines(torch.float16, 2), "the group size is compiled in"
    assert int8.grid(32, 512, 1024, 132, "cluster").cluster == 1


HOPPER = Configuration(tokens=16, blocks=6, split=2, k_warps=1, k_step=256, stages=3, ctas=1, wgmma=True)


def test_sizes_for_hopper_by_hand() -> None:
    """If this failed, warps that copy would be missing, or the barriers of the ring would lie outside of shared memory."""
    assert (HOPPER.warps, HOPPER.threads, HOPPER.kernel) == (12, 512, "marlin_sm90")
    # as above, and 16 bytes of barriers for each stage
    assert HOPPER.shared_bytes == 3 * (49152 + 8192 + 6144) + 3 * 16 + 16
    assert [HOPPER.fits(a) for a in ("sm_80", "sm_90", "sm_90a")] == [False, False, True]


def test_what_hopper_is_compiled_for() -> None:
    """If this failed, the kernel would take groups of another size than the scales have, or spill for groups of 32."""
    assert {"GROUP_SHIFT=3", "SCALE_WEIGHTS=0"} <= set(HOPPER.defines(torch.float16, 3))
    assert {"GROUP_SHIFT=1", "SCALE_WEIGHTS=1"} <= set(HOPPER.defines(torch.float16, 1))
    assert CONFIGURATION.defines(torch.float16, 1) == CONFIGURATION.defines(torch.float16, -1), "mma.sync is told at run time"


def test_what_fits_where() -> None:
    """If this failed, a GPU would be given a kernel that it cannot start."""
    longer = Configuration(tokens=16, blocks=2, split=1, k_warps=4, k_step=512, stages=4, ctas=1)
    assert [CONFIGURATION.fits(a) for a in ("sm_80", "sm_86", "sm_89", "sm_90")] == [True, True, True, True]
    assert [longer.fits(a) for a in ("sm_80", "sm_86", "sm_89", "sm_90")] == [False, False, False, True]


@pytest.mark.parametrize(
    ("group_size", "k", "shift"), [(32, 64, 1), (64, 128, 2), (128, 256, 3), (128, 128, -1), (64, 64, -1), (896, 896, -1)]
)
def test_group_shift(group_size: int, k: int, shift: int) -> None:
    """If this failed, a group's scale would reach too many or too few weights; one group is channel-wise, whatever its size."""
    assert group_shift(group_size, k) == shift


@pytest.mark.parametrize("group_size", [16, 48, 256])
def test_other_groups_are_refused(group_size: int) -> None:
    """If this failed, the kernel would multiply by the wrong scales without a word."""
    with pytest.raises(ValueError, match=f"32, 64, 128 and channel-wise, got {group_size} with K=768"):
        group_shift(group_size, 768)


def test_how_ctas_share_tiles() -> None:
    """If this failed, tiles would be cut where none needs to be, or most of the GPU would wait for a few CTAs."""
    c = Configuration(tokens=64, blocks=4, split=2, k_warps=1, k_step=256, stages=3, ctas=1, wgmma=True)
    assert c.grid(64, 28672, 4096, 132) == Grid(132), "112 tiles, wherever 132 CTAs cut them"
    assert c.grid(64, 28672, 4096, 132, "even") == Grid(112), "a tile each"
    assert c.grid(64, 6144, 4096, 132, "even") == Grid(96), "24 tiles in four parts of four steps"
    assert c.grid(64, 4096, 14336, 132, "even") == Grid(128), "16 tiles in eight parts of seven steps"
    assert c.grid(64, 57344, 8192, 132, "even") == Grid(112), "224 tiles, two each"
    assert c.grid(64, 57344, 8192, 132, "mixed") == Grid(132, 1), "one each, and 92 that are cut"
    assert c.grid(64, 73728, 18432, 132, "mixed") == Grid(132, 2)
    assert c.grid(64, 28672, 4096, 132, "mixed") == Grid(132), "not even one each"
    assert c.grid(64, 67 * 256, 4096, 132, "even") == Grid(132), "67 tiles would leave half of the GPU without work"
    assert c.grid(64, 6144, 4096, 132, "cluster") == Grid(96, cluster=4), "24 clusters of four CTAs, of four steps each"
    assert c.grid(64, 4096, 14336, 132, "cluster") == Grid(128, cluster=8)
    assert c.grid(64, 2048, 4096, 132, "cluster") == Grid(128) == c.grid(64, 2048, 4096, 132), "16 parts are no cluster, and 8 too few CTAs"
    assert c.grid(64, 28672, 4096, 132, "cluster") == Grid(132), "a tile each: nothing to add up"
    assert c.grid(64, 57344, 8192, 132, "cluster") == Grid(132), "more tiles than CTAs"
    assert CONFIGURATION.grid(16, 2048, 4096, 132, "cluster") == Grid(132), "mma.sync knows no clusters"
    assert c.grid(64, 256, 512, 132, "even") == Grid(2) == c.grid(64, 256, 512, 132), "two steps in all"
