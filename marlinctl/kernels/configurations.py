"""The shapes in which the kernels are compiled: how much a CTA takes on, and how its warps share it.

csrc/marlin_sm80.cu (dense) and csrc/sparse_marlin_sm80.cu (2:4) are one source each, and so are their twins for Hopper, .._sm90.cu; a
configuration is the set of constants that it is compiled with. What the constants mean is drawn there and in csrc/tile.cuh; in
short, a CTA computes an output tile of `tokens` (M) x 64 `blocks` (N), in stages of `k_step` (K):

    warps = blocks x split x k_warps      split: warps that share the 64 columns of a block
                                          k_warps: warps that share the k of a stage

On Hopper four more warps copy, and the group size is compiled in. csrc/marlin_a8_sm80.cu and its twin multiply activations that are rounded
to int8, and csrc/marlin_a8_factored_sm80.cu and its twin do so with weights whose scales are integers times one scale for each output;
csrc/sparse_marlin_a8_factored_sm90.cu with such weights that are 2:4. In them, too, the group size is compiled in.

Everything that the host must know beside that, threads, shared memory, workspace, follows from them and is computed here;
the kernel checks the shared memory when it is compiled. Which configuration is used for which M, N, K is measured: dispatch.py.

A Grid says how the CTAs of a launch share the output tiles (csrc/stripes.cuh draws it), in one of four ways:

    striped   every CTA the same number of steps, wherever that cuts the tiles: nobody idles
    even      every CTA the same part of a tile, or as many whole tiles: fewer parts to put together, on fewer CTAs
    mixed     as many whole tiles for each CTA as there are for all, and stripes of the rest
    cluster   with wgmma: every CTA the same part of a tile, the CTAs of a tile a thread block cluster (csrc/cluster_sm90.cuh)

Where CTAs are paired, two neighbours are a cluster and share what they would have alone: the first three ways, with pairs for CTAs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from marlinctl.quantize.scheme import ACTIVATION_GROUP

Sharing = Literal["striped", "even", "mixed", "cluster"]
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)
SHARED_BYTES = {  # of a CTA, at most: CUDA C++ Programming Guide, compute capabilities
    "sm_80": 163 * 1024,
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_121"), 99 * 1024),
    **dict.fromkeys(("sm_90", "sm_90a", "sm_100", "sm_103", "sm_110"), 227 * 1024),
}
NUMBERS = {torch.float16: "Half", torch.bfloat16: "BFloat"}  # the structs of csrc/dequantize.cuh
GROUP_SIZES = (32, 64, 128)  # and channel-wise
LARGEST_CLUSTER = 8  # CTAs: what every GPU with clusters starts
LEAST_BUSY = 0.7  # of the CTAs that there is room for: 96 of 132 were faster than 132 that share unevenly (6144 x 4096, H200)


@dataclass(frozen=True, slots=True)
class Grid:
    ctas: int
    whole: int = 0  # output tiles that each of them computes alone; the others are striped
    cluster: int = 1  # CTAs of a thread block cluster: those of one output tile, or a pair


@dataclass(frozen=True, slots=True)
class Configuration:
    tokens: int  # M of an output tile: 8, 16, 32 or 64, with wgmma also 48, 96 and 128, of int8 up to 256
    blocks: int  # N of an output tile, in blocks of 64
    split: int
    k_warps: int
    k_step: int  # K of a stage
    stages: int  # of which all but one are on their way from memory
    ctas: int  # per multiprocessor, what the compiler allots registers for
    sparse: bool = False  # 2:4
    wgmma: bool = False  # for Hopper alone
    batch: int = 1  # with wgmma: steps of k that a warp decodes before it multiplies, while those before them are multiplied
    scale_weights: bool = False  # with wgmma: scales multiply weights, in 16 bits, instead of sums of groups
    int8: bool = False  # activations are
    parts: int = 1  # of int8 with wgmma: products that share a decoded word, each of tokens / parts
    ordered: bool = False  # of int8 with wgmma: warpgroups take turns
    temporaries: int = 1  # of int8 with wgmma: products of 128 K under way together
    paired: bool = False  # with wgmma: two CTAs of a cluster have the same activations, and each copies half of them to both
    factored: bool = False  # of int8: groups have integer factors, which multiply codes, and sums are over all of K (factored.py)

    @property
    def name(self) -> str:
        kernel = f"{'sparse-' if self.sparse else ''}{'a8-' if self.int8 else ''}{'wgmma-' if self.wgmma else ''}"
        marks = {
            f"p{self.parts}": self.parts > 1,
            "o": self.ordered,
            f"t{self.temporaries}": self.temporaries > 1,
            "w": self.scale_weights,
            "f": self.factored,
            "c": self.paired,
        }
        form = "".join(mark for mark, there in marks.items() if there)
        return f"{kernel}m{self.tokens}n{64 * self.blocks}k{self.k_step}x{self.stages}{form}"

    @property
    def kernel(self) -> str:
        """The name of the function, and with .cu of its source."""
        form = f"{'a8_' if self.int8 else ''}{'factored_' if self.factored else ''}{'sm90' if self.wgmma else 'sm80'}"
        return f"{'sparse_' if self.sparse else ''}marlin_{form}"

    @property
    def for_one_group_size(self) -> bool:
        """Whether the group size is compiled in."""
        return self.wgmma or self.int8

    @property
    def tile_k(self) -> int:
        """K of a row of words, and of one product of the tensor core."""
        return 32 if self.sparse else 16

    @property
    def columns(self) -> int:
        return 64 * self.blocks

    @property
    def pair(self) -> int:
        """CTAs that work side by side."""
        return 2 if self.paired else 1

    @property
    def threads(self) -> int:
        """Of a CTA, with those that copy."""
        return 32 * (self.warps + (4 if self.wgmma else 0))

    @property
    def warps(self) -> int:
        """Those that multiply."""
        return self.blocks * self.split * self.k_warps

    @property
    def stage_bytes(self) -> int:
        bits = 2 + 1 if self.sparse else 4  # of a weight: two codes for four weights, and metadata of half their size
        weights = self.k_step * self.columns * bits // 8
        scales = 2 * (self.k_step // 32) * self.columns
        if self.int8:
            size = weights + self.tokens * self.k_step + scales + 4 * self.tokens * self.k_step // ACTIVATION_GROUP  # these of tokens
            return -(-size // 1024) * 1024 if self.wgmma else size
        return weights + 2 * self.tokens * self.k_step + scales

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA: the stages, the sums that warps exchange, barriers, and a word for the count of CTAs."""
        exchange = self.warps * (self.tokens // 8) * 512 if self.k_warps > 1 else 0
        barriers = 16 * self.stages if self.wgmma else 0
        return self.stages * self.stage_bytes + exchange + barriers + 16

    def defines(self, dtype: torch.dtype, group_shift: int = 3, token_groups: bool = False) -> tuple[str, ...]:
        """What the compiler is told, for activations of `dtype` (float16 or bfloat16), of int8 the type that they had and the output has.

        group_shift: of group_shift(), which matters to wgmma and int8 alone.
        token_groups: of int8, whether a token has a scale for each 128 of K, and not one for all.
        """
        sizes = {
            "TOKENS": self.tokens,
            "BLOCKS": self.blocks,
            "SPLIT": self.split,
            "K_WARPS": self.k_warps,
            "K_STEP": self.k_step,
            "STAGES": self.stages,
            "CTAS": self.ctas,
            "SHARED_BYTES": self.shared_bytes,
        }
        if self.int8:
            sizes["EIGHT_BIT"] = 1
            if self.wgmma:
                sizes |= {"TOKEN_PARTS": self.parts, "ORDERED": int(self.ordered), "TEMPORARIES": self.temporaries}
            sizes |= {"TOKEN_GROUPS": int(token_groups), "WHOLE_SUMS": int(self.factored), "GROUP_SHIFT": group_shift}
            if self.wgmma:
                sizes |= {"SCALE_WEIGHTS": 0, "STEPS": self.batch}
        elif self.wgmma:
            # Sums of many small groups are dearer to scale than weights, and leave too few registers: groups of 32 and of 64.
            scale_weights = self.scale_weights or (group_shift == 1 and self.tokens >= 16) or (group_shift == 2 and self.tokens >= 32)
            sizes |= {"GROUP_SHIFT": group_shift, "SCALE_WEIGHTS": int(scale_weights), "STEPS": self.batch}
        if self.paired:
            sizes["PAIRED"] = 1
        return (f"NUMBER={NUMBERS[dtype]}", *(f"{name}={value}" for name, value in sizes.items()))

    def fits(self, architecture: str) -> bool:
        return self.shared_bytes <= SHARED_BYTES[architecture] and (architecture == "sm_90a" or not self.wgmma)

    @property
    def sharings(self) -> tuple[Sharing, ...]:
        """The ways in which CTAs may share its tiles."""
        return SHARINGS if self.wgmma and not self.paired else tuple(sharing for sharing in SHARINGS if sharing != "cluster")

    def output_tiles(self, m: int, n: int) -> int:
        """Counters that the workspace must have, an int32 each, all zero."""
        return -(-m // self.tokens) * -(-n // (self.columns * self.pair)) * self.pair

    def units(self, m: int, n: int, k: int) -> int:
        """Steps of the whole product, the most CTAs that find work."""
        return self.output_tiles(m, n) * -(-k // self.k_step)

    def grid(self, m: int, n: int, k: int, most: int, sharing: Sharing = "striped") -> Grid:
        """The CTAs of a product, at most `most`. Striped where another way has nothing to offer, or would leave too many without work."""
        tiles, units, most = self.output_tiles(m, n) // self.pair, self.units(m, n, k) // self.pair, most // self.pair
        grid = self._grid(tiles, units, most, sharing)
        return replace(grid, ctas=grid.ctas * self.pair, cluster=self.pair) if self.paired else grid

    def _grid(self, tiles: int, units: int, most: int, sharing: Sharing) -> Grid:
        """Of `tiles` with `units` steps in all, or pairs of them, and at most so many CTAs, or pairs."""
        if sharing == "mixed" and tiles >= most:
            return Grid(most, tiles // most)
        grid = Grid(0)
        if sharing == "cluster" and "cluster" in self.sharings:
            parts = _parts(units // tiles, min(most // tiles, LARGEST_CLUSTER))
            if parts > 1:
                grid = Grid(tiles * parts, cluster=parts)
        elif sharing == "even" and tiles <= most:
            grid = Grid(tiles * _parts(units // tiles, most // tiles))
        elif sharing == "even":
            grid = Grid(tiles // next(rounds for rounds in range(-(-tiles // most), tiles + 1) if tiles % rounds == 0))
        return grid if grid.ctas >= LEAST_BUSY * most else Grid(min(most, units))

    def partial_floats(self, ctas: int) -> int:
        """float32 that the workspace must have for a grid of `ctas`: two output tiles each, uninitialised."""
        return 2 * ctas * self.tokens * self.columns


def _parts(steps: int, most: int) -> int:
    """The most equal parts of a tile's steps, up to `most`; 0 where `most` is."""
    return max((parts for parts in range(1, min(steps, most) + 1) if steps % parts == 0), default=0)


# A stage is to bring 8 KB of weights or more, and 32 KB or more are to be under way on each multiprocessor. Eight warps, or two
# CTAs of four, keep the four schedulers busy. For small M, K is shared among warps: a tile of 128 columns leaves less to add up
# among CTAs than one of 256. The first five fit every architecture. The others have longer stages for sm_90, where copying, closing
# groups and barriers cost each weight less. The sizes are reasoned; which of them is fastest where was measured on an H200
# (dispatch.json, docs/log/2026-11-21-dense-kernel.md).
DENSE = (
    Configuration(tokens=8, blocks=2, split=1, k_warps=4, k_step=256, stages=4, ctas=2),
    Configuration(tokens=16, blocks=2, split=1, k_warps=4, k_step=256, stages=3, ctas=2),
    Configuration(tokens=16, blocks=4, split=1, k_warps=1, k_step=128, stages=4, ctas=2),
    Configuration(tokens=32, blocks=4, split=2, k_warps=1, k_step=64, stages=7, ctas=1),
    Configuration(tokens=64, blocks=4, split=2, k_warps=1, k_step=64, stages=4, ctas=1),
    Configuration(tokens=8, blocks=2, split=1, k_warps=4, k_step=512, stages=5, ctas=1),
    Configuration(tokens=16, blocks=2, split=1, k_warps=4, k_step=512, stages=4, ctas=1),
    Configuration(tokens=32, blocks=4, split=1, k_warps=2, k_step=256, stages=4, ctas=1),
    Configuration(tokens=64, blocks=4, split=2, k_warps=1, k_step=128, stages=6, ctas=1),
)


# The same of 2:4, with 4 KB or more of codes and 2 KB of metadata in a stage that had 8 KB of dense weights. One ldmatrix brings
# metadata for 64 of k, or where warps share the words of a block for 128: from 32 tokens on a stage is that long.
SPARSE = (
    Configuration(tokens=8, blocks=2, split=1, k_warps=4, k_step=256, stages=5, ctas=2, sparse=True),
    Configuration(tokens=16, blocks=2, split=1, k_warps=4, k_step=256, stages=4, ctas=2, sparse=True),
    Configuration(tokens=16, blocks=4, split=1, k_warps=1, k_step=128, stages=5, ctas=2, sparse=True),
    Configuration(tokens=32, blocks=4, split=2, k_warps=1, k_step=128, stages=4, ctas=1, sparse=True),
    Configuration(tokens=64, blocks=4, split=2, k_warps=1, k_step=128, stages=3, ctas=1, sparse=True),
    Configuration(tokens=8, blocks=2, split=1, k_warps=4, k_step=512, stages=6, ctas=1, sparse=True),
    Configuration(tokens=16, blocks=2, split=1, k_warps=4, k_step=512, stages=4, ctas=1, sparse=True),
    Configuration(tokens=32, blocks=4, split=1, k_warps=2, k_step=256, stages=4, ctas=1, sparse=True),
    Configuration(tokens=64, blocks=4, split=2, k_warps=1, k_step=256, stages=3, ctas=1, sparse=True),
)


# With wgmma a warpgroup is four warps, and two to four of them multiply. Of each M the first are for large matrices: 384 or 512 columns,
# and all of K in every warp; the next, with 256 columns and K shared between two warpgroups, for smaller ones; the third, with 128
# columns, for those of which so many CTAs share a tile that adding up is what takes time. From 48 tokens on scales multiply weights.
# Chosen on an H200 (docs/log/2026-11-21-hopper-kernel.md, 2026-11-22-power-and-tensor-maps.md).
DENSE_SM90 = (
    Configuration(tokens=8, blocks=6, split=2, k_warps=1, k_step=256, stages=3, ctas=1, wgmma=True),
    Configuration(tokens=8, blocks=4, split=1, k_warps=2, k_step=256, stages=5, ctas=1, wgmma=True),
    Configuration(tokens=8, blocks=2, split=2, k_warps=2, k_step=512, stages=4, ctas=1, wgmma=True),
    Configuration(tokens=16, blocks=6, split=2, k_warps=1, k_step=256, stages=3, ctas=1, wgmma=True),
    Configuration(tokens=16, blocks=4, split=1, k_warps=2, k_step=256, stages=4, ctas=1, wgmma=True, batch=2),
    Configuration(tokens=16, blocks=2, split=2, k_warps=2, k_step=512, stages=3, ctas=1, wgmma=True),
    Configuration(tokens=32, blocks=6, split=2, k_warps=1, k_step=256, stages=3, ctas=1, wgmma=True, batch=2),
    Configuration(tokens=32, blocks=8, split=2, k_warps=1, k_step=128, stages=4, ctas=1, wgmma=True, batch=2),
    Configuration(tokens=32, blocks=4, split=1, k_warps=2, k_step=256, stages=4, ctas=1, wgmma=True),
    Configuration(tokens=32, blocks=2, split=2, k_warps=2, k_step=256, stages=5, ctas=1, wgmma=True),
    Configuration(tokens=48, blocks=6, split=2, k_warps=1, k_step=128, stages=5, ctas=1, wgmma=True, batch=2, scale_weights=True),
    Configuration(tokens=48, blocks=4, split=2, k_warps=1, k_step=256, stages=3, ctas=1, wgmma=True, batch=4, scale_weights=True),
    Configuration(tokens=48, blocks=2, split=2, k_warps=2, k_step=256, stages=4, ctas=1, wgmma=True, batch=4, scale_weights=True),
    Configuration(tokens=64, blocks=6, split=2, k_warps=1, k_step=128, stages=5, ctas=1, wgmma=True, batch=2, scale_weights=True),
    Configuration(tokens=64, blocks=8, split=1, k_warps=1, k_step=128, stages=4, ctas=1, wgmma=True, scale_weights=True),
    Configuration(tokens=64, blocks=4, split=2, k_warps=1, k_step=256, stages=3, ctas=1, wgmma=True, scale_weights=True),
    Configuration(tokens=64, blocks=2, split=2, k_warps=2, k_step=256, stages=3, ctas=1, wgmma=True, batch=4, scale_weights=True),
    Configuration(tokens=96, blocks=6, split=2, k_warps=1, k_step=128, stages=4, ctas=1, wgmma=True, scale_weights=True),
    Configuration(tokens=96, blocks=4, split=2, k_warps=1, k_step=128, stages=5, ctas=1, wgmma=True, batch=2, scale_weights=True),
    Configuration(tokens=96, blocks=2, split=2, k_warps=2, k_step=128, stages=4, ctas=1, wgmma=True, batch=2, scale_weights=True),
    Configuration(tokens=128, blocks=4, split=2, k_warps=1, k_step=128, stages=4, ctas=1, wgmma=True, batch=2, scale_weights=True),
)


# Of 8-bit activations with mma.sync. A thread has up to 128 sums: of a group in int32 and of the tile in float32, or of factored weights in
# int32 alone. To read its activations a warp with two words of a block takes half of the time for which an sm_80's tensor core multiplies
# them, a warp with one all of it. Of each number of tokens the first is for sm_80, whose shared memory holds more stages; the next fits
# sm_86 and sm_89 too. NOTE: reasoned, not measured on these GPUs.
A8_SM80 = (
    Configuration(tokens=32, blocks=4, split=2, k_warps=1, k_step=128, stages=4, ctas=1, int8=True),
    Configuration(tokens=64, blocks=4, split=2, k_warps=1, k_step=128, stages=6, ctas=1, int8=True),
    Configuration(tokens=64, blocks=4, split=2, k_warps=1, k_step=128, stages=3, ctas=1, int8=True),
)
A8_FACTORED_SM80 = (
    Configuration(tokens=32, blocks=4, split=2, k_warps=1, k_step=128, stages=4, ctas=1, int8=True, factored=True),
    Configuration(tokens=64, blocks=4, split=2, k_warps=1, k_step=128, stages=6, ctas=1, int8=True, factored=True),
    Configuration(tokens=64, blocks=4, split=2, k_warps=1, k_step=128, stages=3, ctas=1, int8=True, factored=True),
    Configuration(tokens=128, blocks=4, split=2, k_warps=1, k_step=128, stages=4, ctas=1, int8=True, factored=True),
)


def _rounded(tokens: int, blocks: int, split: int, k_warps: int, k_step: int, stages: int, **more: Any) -> Configuration:
    return Configuration(tokens, blocks, split, k_warps, k_step, stages, ctas=1, wgmma=True, int8=True, **more)


# The same on Hopper: up to 128 sums a thread beside those of the group. Chosen on an H200 (docs/log/2026-12-01-eight-bit-kernel.md).
A8_SM90 = (
    _rounded(32, 8, 1, 1, 128, 4, batch=2),
    _rounded(32, 4, 1, 2, 256, 4, batch=2),
    _rounded(32, 2, 2, 2, 256, 5, batch=2),
    _rounded(48, 6, 2, 1, 128, 5, batch=2),
    _rounded(48, 4, 2, 1, 128, 6, batch=2, temporaries=2),
    _rounded(64, 6, 2, 1, 128, 5),
    _rounded(64, 4, 2, 1, 128, 6, batch=2, temporaries=2),
    _rounded(64, 2, 2, 2, 256, 5, batch=2),
    _rounded(96, 4, 2, 1, 128, 5, batch=2, parts=2, temporaries=2),
    _rounded(96, 2, 2, 2, 256, 4, batch=2),
    _rounded(128, 4, 2, 1, 128, 5, batch=2, parts=2, temporaries=2, ordered=True),
    _rounded(256, 2, 4, 1, 128, 4, batch=2, parts=2, ordered=True),
)

# Of factored weights, whose sums need no scaling: chosen on an H200 (docs/log/2026-12-01-factored-weights.md).
A8_FACTORED_SM90 = (
    _rounded(32, 8, 1, 1, 128, 5, batch=2, factored=True),
    _rounded(64, 6, 2, 1, 128, 5, batch=2, factored=True, paired=True),
    _rounded(64, 4, 2, 1, 128, 6, batch=2, factored=True),
    _rounded(64, 2, 2, 2, 256, 5, batch=2, factored=True),
    _rounded(96, 4, 2, 1, 128, 6, batch=2, factored=True),
    _rounded(96, 4, 2, 1, 128, 6, batch=2, factored=True, paired=True),
    _rounded(96, 2, 2, 2, 256, 4, batch=2, factored=True),
    _rounded(128, 4, 2, 1, 128, 4, batch=2, factored=True, paired=True),
    _rounded(128, 4, 2, 1, 128, 5, batch=2, factored=True),
    _rounded(128, 2, 4, 1, 128, 6, batch=2, factored=True),
    _rounded(128, 2, 4, 1, 128, 8, batch=2, factored=True, paired=True),
    _rounded(128, 2, 2, 2, 256, 3, batch=2, factored=True),
    _rounded(256, 2, 4, 1, 128, 4, batch=2, factored=True),
    _rounded(256, 2, 4, 1, 128, 5, batch=2, factored=True, paired=True),
)

# Of 2:4 weights. A product takes 64 of K, two rows of words, so a stage of 128 has two steps. Reasoned, and measured on an H200
# (docs/log/2026-12-01-copies-and-order.md).
SPARSE_A8_FACTORED_SM90 = (
    _rounded(32, 6, 2, 1, 256, 4, batch=2, factored=True, sparse=True),
    _rounded(64, 6, 2, 1, 128, 7, factored=True, sparse=True),
    _rounded(64, 6, 2, 1, 256, 3, batch=2, factored=True, sparse=True),
    _rounded(64, 4, 2, 1, 256, 5, batch=2, factored=True, sparse=True),
    _rounded(64, 2, 2, 2, 256, 5, factored=True, sparse=True),
    _rounded(96, 4, 2, 1, 256, 4, batch=2, factored=True, sparse=True),
    _rounded(96, 4, 2, 1, 256, 4, batch=2, factored=True, sparse=True, paired=True),
    _rounded(96, 2, 2, 2, 256, 4, factored=True, sparse=True),
    _rounded(128, 4, 2, 1, 128, 7, factored=True, sparse=True),
    _rounded(128, 4, 2, 1, 128, 7, factored=True, sparse=True, paired=True),
    _rounded(128, 4, 2, 1, 256, 3, batch=2, factored=True, sparse=True),
    _rounded(128, 4, 2, 1, 256, 3, batch=2, factored=True, sparse=True, paired=True),
)

SPARSE_SM90 = (
    Configuration(tokens=8, blocks=6, split=2, k_warps=1, k_step=256, stages=4, ctas=1, sparse=True, wgmma=True),
    Configuration(tokens=8, blocks=4, split=1, k_warps=2, k_step=256, stages=6, ctas=1, sparse=True, wgmma=True),
    Configuration(tokens=16, blocks=6, split=2, k_warps=1, k_step=256, stages=4, ctas=1, sparse=True, wgmma=True, batch=2),
    Configuration(tokens=16, blocks=4, split=1, k_warps=2, k_step=256, stages=5, ctas=1, sparse=True, wgmma=True),
    Configuration(tokens=16, blocks=2, split=2, k_warps=2, k_step=512, stages=4, ctas=1, sparse=True, wgmma=True, batch=2),
    Configuration(tokens=32, blocks=6, split=2, k_warps=1, k_step=256, stages=3, ctas=1, sparse=True, wgmma=True),
    Configuration(tokens=32, blocks=4, split=1, k_warps=2, k_step=256, stages=4, ctas=1, sparse=True, wgmma=True),
    Configuration(tokens=32, blocks=2, split=2, k_warps=2, k_step=256, stages=5, ctas=1, sparse=True, wgmma=True),
    Configuration(
        tokens=48, blocks=6, split=2, k_warps=1, k_step=256, stages=3, ctas=1, sparse=True, wgmma=True, batch=2, scale_weights=True
    ),
    Configuration(
        tokens=48, blocks=4, split=2, k_warps=1, k_step=256, stages=4, ctas=1, sparse=True, wgmma=True, batch=2, scale_weights=True
    ),
    Configuration(
        tokens=48, blocks=2, split=2, k_warps=2, k_step=256, stages=4, ctas=1, sparse=True, wgmma=True, batch=2, scale_weights=True
    ),
    Configuration(
        tokens=64, blocks=6, split=2, k_warps=1, k_step=128, stages=4, ctas=1, sparse=True, wgmma=True, batch=2, scale_weights=True
    ),
    Configuration(
        tokens=64, blocks=4, split=2, k_warps=1, k_step=256, stages=3, ctas=1, sparse=True, wgmma=True, batch=2, scale_weights=True
    ),
    Configuration(
        tokens=64, blocks=2, split=2, k_warps=2, k_step=256, stages=3, ctas=1, sparse=True, wgmma=True, batch=2, scale_weights=True
    ),
    Configuration(tokens=96, blocks=6, split=2, k_warps=1, k_step=128, stages=4, ctas=1, sparse=True, wgmma=True, scale_weights=True),
    Configuration(
        tokens=96, blocks=4, split=2, k_warps=1, k_step=128, stages=5, ctas=1, sparse=True, wgmma=True, batch=2, scale_weights=True
    ),
    Configuration(
        tokens=128, blocks=4, split=2, k_warps=1, k_step=128, stages=4, ctas=1, sparse=True, wgmma=True, batch=2, scale_weights=True
    ),
)


def group_shift(group_size: int, in_features: int) -> int:
    """The last argument of the kernels: log2 of the 16 k in a group, or -1 where one scale serves a whole column."""
    if group_size == in_features:
        return -1
    if group_size not in GROUP_SIZES:
        raise ValueError(f"the kernel has group sizes 32, 64, 128 and channel-wise, got {group_size} with K={in_features}")
    return (group_size // 16).bit_length() - 1
