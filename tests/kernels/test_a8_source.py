"""Products of csrc/marlin_a8_sm90.cu, marlin_a8_sm80.cu and their twins for factored weights, dense and 2:4, int8 activations, run on the
CPU (software_kernel.py), against float64 of the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from marlinctl.kernels.configurations import (
    A8_FACTORED_SM80,
    A8_FACTORED_SM90,
    A8_SM80,
    A8_SM90,
    SPARSE_A8_FACTORED_SM90,
    Configuration,
)
from marlinctl.kernels.reference import dequantize, dequantize_sparse, gemm_rounded
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.scheme import ACTIVATION_GROUP
from tests.kernels.software_kernel import Launch, build, mistake, random_packed
from tests.kernels.test_marlin_source import CASES, EPSILON
from tests.pack.naive import random_linear, random_sparse

BY_NAME = {c.name.removeprefix("a8-wgmma-"): c for c in A8_SM90}
# Those that differ in more than sizes: four words of a warp, three warpgroups, two temporaries, warps that share k, turns, parts.
SHOWN = ("m32n512k128x4", "m32n128k256x5", "m64n384k128x5", "m96n256k128x5p2t2", "m128n256k128x5p2ot2", "m256n128k128x4p2o")
FACTORED = {c.name.removeprefix("a8-wgmma-"): c for c in A8_FACTORED_SM90}
# Four words of a warp; pairs with three warpgroups, and with 256 tokens of one product; warps that share k.
SHOWN_FACTORED = ("m32n512k128x5f", "m64n384k128x5fc", "m128n128k256x3f", "m256n128k128x5fc")
SPARSE = {c.name.removeprefix("sparse-a8-wgmma-"): c for c in SPARSE_A8_FACTORED_SM90}
# Three warpgroups; steps two at a time; warps that share k; pairs.
SHOWN_SPARSE = ("m64n384k128x7f", "m96n256k256x4f", "m64n128k256x5f", "m128n256k128x7fc")


def type_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name.startswith("m64") else torch.float16


# Scales of tokens, one for each group of so many of K or one for all, by turns: each is a build. Factored weights have one for all.
KERNELS = [
    pytest.param((BY_NAME[name], type_of(name), group), marks=[] if (group is None) == (i % 2 == 0) else [pytest.mark.slow])
    for i, name in enumerate(SHOWN)
    for group in (None, ACTIVATION_GROUP)
]
KERNELS += [pytest.param((FACTORED[name], type_of(name), None)) for name in SHOWN_FACTORED]
# With mma.sync: those differ in tokens and stages alone. What else the sources allow, all words of a block in a warp, warps that share k
# and 256 of k in a stage, has one that no table names.
SHARED_K = Configuration(tokens=16, blocks=2, split=1, k_warps=2, k_step=256, stages=2, ctas=1, int8=True)
AMPERE: list[tuple[Configuration, torch.dtype, int | None]] = [
    (SHARED_K, torch.float16, ACTIVATION_GROUP),
    (A8_SM80[0], torch.float16, None),
    (A8_SM80[2], torch.bfloat16, ACTIVATION_GROUP),
    (A8_FACTORED_SM80[2], torch.bfloat16, None),
    (A8_FACTORED_SM80[3], torch.float16, None),
]
KERNELS += [pytest.param(case) for case in AMPERE]
KERNELS += [
    pytest.param((c, dtype, group), marks=pytest.mark.slow)
    for c in (*A8_SM80, *A8_FACTORED_SM80, SHARED_K, replace(SHARED_K, factored=True))
    for dtype, group in ((torch.float16, None), (torch.float16, ACTIVATION_GROUP))
    if (c, dtype, group) not in AMPERE and not (c.factored and group)
]
KERNELS += [pytest.param((SPARSE[name], type_of(name), None)) for name in SHOWN_SPARSE]
Kernel = tuple[Configuration, torch.dtype, int | None, Launch]


@pytest.fixture(scope="module", params=KERNELS, ids=lambda p: f"{p[0].name}-{str(p[1])[6:]}-{'groups' if p[2] else 'tokens'}")
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    configuration, dtype, group = request.param
    return configuration, dtype, group, build(configuration, dtype, tmp_path_factory.mktemp("build") / "csrc")


def test_products(kernel: Kernel) -> None:
    """If this failed, the kernel would multiply wrongly: decoding, the order of activations, scales, edges, or how parts come together."""
    configuration, dtype, group, launch = kernel
    cases = CASES if group is None else [*CASES[:2], (7, 64, 160, -1, 2), *CASES[5:]]
    whole_ones_in_turn = (
        2 * configuration.tokens + 1,
        (2 * configuration.pair - 1) * configuration.columns + 8,
        64,
        64,
        2,
    )  # three for each
    for m, n, k, group_size, ctas in [*cases, (5, 2 * configuration.columns + 72, 192, -1, 2), whole_ones_in_turn]:
        generator = torch.Generator().manual_seed(m)
        p, weight = random_packed(configuration, n, k, group_size, seed=m)
        activations = torch.randn(m, k, generator=generator).to(dtype)
        bias = (torch.randn(n, generator=generator) / 16).to(dtype)
        exact = gemm_rounded(activations, p, group, bias).double()
        magnitudes = activations.double().abs() @ weight.double().abs().T + bias.double().abs()
        bound = EPSILON[dtype] * exact.abs() + k * 2**-24 * magnitudes + 2**-24  # one rounding of the output, and float32 sums of groups
        forwards, case = (
            list(range(ctas * configuration.pair)),
            f"{configuration.name}: M={m} N={n} K={k} group_size={group_size} CTAs={ctas}",
        )
        for whole in sorted({0, configuration.output_tiles(m, n) // len(forwards)}):
            lazy = launch(activations, p, bias, forwards, whole=whole, activation_group=group)
            assert bool(((lazy.double() - exact).abs() <= bound).all()), f"{case} whole={whole}"
            eager = launch(activations, p, bias, forwards[::-1], whole=whole, eager=True, backwards=True, activation_group=group)
            assert torch.equal(lazy, eager), f"{case} whole={whole}: the order of CTAs or copies changes the bits"


def test_what_is_exact_stays_exact(kernel: Kernel) -> None:
    """If this failed, some code, factor, activation or sum would be off by less than the bound above shows: here all scales are integers
    times a power of two, so that float32 holds every sum, of one CTA or of several, and the output is float64's, rounded once."""
    configuration, dtype, group, launch = kernel
    m = 5 if configuration.wgmma else configuration.tokens + 3
    for k, group_size in ((408, -1), (416, 32), (448, 64), (384, 128)) if group is None else ((408, -1), (384, 128)):
        generator = torch.Generator().manual_seed(k)
        linear = random_linear(136, k, group_size, seed=k)
        factors = torch.randint(-15, 15, linear.scales.shape, generator=generator)
        factors[factors >= 0] += 1
        scales = (factors * 2.0**-9).half()
        p: PackedLinear | PackedSparseLinear
        if configuration.sparse:
            p = pack_sparse_marlin(replace(random_sparse(136, k, group_size, seed=k), scales=scales))
        else:
            p = pack_marlin(replace(linear, scales=scales))
        weight = dequantize_sparse(p) if isinstance(p, PackedSparseLinear) else dequantize(p)
        x = torch.randint(-127, 128, (m, k), generator=generator)
        x[:, ::ACTIVATION_GROUP] = 127  # so that the scale is a power of two
        activations = (x * 2.0**-5).to(dtype)
        exact = activations.double() @ weight.double().T
        for ctas in (1, 3):
            out = launch(activations, p, None, list(range(ctas * configuration.pair)), activation_group=group)
            assert torch.equal(out, exact.to(dtype)), f"{configuration.name}: group_size={group_size} CTAs={ctas}"


def test_a_cluster_gives_the_same_bits(kernel: Kernel) -> None:
    """If this failed, sums that CTAs exchange through shared memory would meet in another order, or at wrong places."""
    configuration, dtype, group, launch = kernel
    if configuration.paired or not configuration.wgmma:
        pytest.skip("CTAs of a pair have different tiles, and mma.sync knows no clusters")
    p, _ = random_packed(configuration, configuration.columns, 2 * configuration.k_step, 64, seed=5)
    activations = torch.randn(11, 2 * configuration.k_step, generator=torch.Generator().manual_seed(5)).to(dtype)
    apart = launch(activations, p, None, [0, 1], activation_group=group)
    assert torch.equal(launch(activations, p, None, [0, 1], cluster=2, activation_group=group), apart)


def test_a_token_of_zeros_and_one_that_is_no_number(kernel: Kernel) -> None:
    """If this failed, padding tokens would be NaN, or an overflow before this linear would disappear in it."""
    configuration, dtype, group, launch = kernel
    p, _ = random_packed(configuration, 64, 128, 128, seed=0)
    activations = torch.ones(3, 128, dtype=dtype)
    activations[0], activations[1, 7] = 0, torch.inf
    out = launch(activations, p, None, list(range(configuration.pair)), activation_group=group)
    assert not out[0].any() and out[1].isnan().all() and out[2].isfinite().all()


MISTAKES = [
    ("two.x, e[2 * pair + 1] = two.y", "two.y, e[2 * pair + 1] = two.x", 32, "metadata of the other word"),
    ("(2 * step + pair) * (BLOCKS * META_BYTES)", "pair * (BLOCKS * META_BYTES)", 32, "one step's metadata for all"),
    ("(first_tile + role.first_word / 2) * BLOCKS", "first_tile * BLOCKS", 32, "one half of the metadata for all words"),
    ("rows, e[step % (2 * STEPS)]", "rows, e[0]", 32, "metadata of another step"),
    ("(nibbles & 0xffff0000) * of[row][1]", "(nibbles & 0xffff0000) * of[row][0]", 32, "the factor of another group"),
    ("- 0x08080000 * of[row][1]", "- 0x08080000 * of[row][0]", 32, "another group's offset"),
    ("step % ROW_STEPS * (2 * TILE_K)", "step % ROW_STEPS * TILE_K", 64, "activations of other k"),
    ("load_words(second_pairs, row + COLUMNS * 2)", "load_words(second_pairs, row)", 32, "the factors of one group twice"),
    ("for (int j = 0; j < 4; ++j) whole[j] *= token_scale;", "for (int j = 0; j < 3; ++j) whole[j] *= token_scale;", 64, "no token scale"),
]


@pytest.mark.parametrize(("right", "wrong", "group_size"), [m[:3] for m in MISTAKES], ids=[m[3] for m in MISTAKES])
def test_the_software_gpu_sees_mistakes_of_the_sparse_kernel(right: str, wrong: str, group_size: int, tmp_path: Path) -> None:
    """If this failed, the tests above could not fail."""
    configuration, (edit, hits) = SPARSE["m64n256k256x5f"], mistake(right, wrong)
    p, _ = random_packed(configuration, 136, 576, group_size, seed=1)
    activations = torch.randn(9, 576, generator=torch.Generator().manual_seed(1)).half()
    out = build(configuration, torch.float16, tmp_path / "csrc", edit)(activations, p, None, [0])
    assert sum(hits) == 1
    assert not torch.allclose(out.double(), gemm_rounded(activations, p, None).double(), rtol=1e-2, atol=1e-2)
