"""The products of the kernels' own sources, run on the CPU (software_kernel.py).

What this cannot show: races between warps that the order of fibers hides, what the compiler for the GPU does, and speed.
"""

from __future__ import annotations

import pytest
import torch

from marlinctl.kernels.configurations import DENSE, DENSE_SM90, SPARSE, SPARSE_SM90, Configuration, group_shift
from tests.kernels.representatives import TYPES, with_types
from tests.kernels.software_kernel import Launch, build, random_packed

EPSILON = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of rounding to the output

# M, N, K, group size, CTAs: tiles that are not full in any direction, K of odd numbers of 64, runs that begin and end inside of tiles and
# groups, tiles of many CTAs and CTAs of many tiles, CTAs without work. The kernels of the quick suite have one half or the other, two by
# two: types take turns too.
CASES = [(1, 64, 64, -1, 2), (9, 80, 48, -1, 1), (17, 192, 576, -1, 5), (7, 64, 160, 32, 2), (13, 448, 320, 64, 6), (65, 136, 896, 128, 7)]

Case = tuple[int, int, int, int, int]
Built = tuple[Configuration, torch.dtype, Launch, list[Case]]
QUICK = [(c, dtype, f"half{i // 2 % 2}") for i, (c, dtype) in enumerate(with_types(DENSE, SPARSE, DENSE_SM90, SPARSE_SM90, largest=False))]
SLOW = [(c, dtype, "all") for c in (*DENSE, *SPARSE, *DENSE_SM90, *SPARSE_SM90) for dtype in TYPES]


@pytest.fixture(
    scope="module",
    params=[*QUICK, *(pytest.param(p, marks=pytest.mark.slow) for p in SLOW)],
    ids=lambda p: f"{p[0].name}-{str(p[1])[6:]}-{p[2]}",
)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    configuration, dtype, which = request.param
    cases = {"half0": CASES[::2], "half1": CASES[1::2], "all": CASES}[which]
    return configuration, dtype, build(configuration, dtype, tmp_path_factory.mktemp("build") / "csrc"), cases


def test_products(kernel: Built) -> None:
    """If this failed, the kernel would multiply wrongly: fragments, swizzle, scales, edges, or the way parts of a tile come together."""
    configuration, dtype, launch, cases = kernel
    more_tiles_than_ctas = (5, 2 * configuration.columns + 72, 192, 64, 2)  # a whole one for each, and one that is cut
    whole_ones_in_turn = (2 * configuration.tokens + 1, configuration.columns + 8, 64, 64, 2)  # three for each
    for m, n, k, group_size, ctas in [*cases, more_tiles_than_ctas, whole_ones_in_turn]:
        generator = torch.Generator().manual_seed(m)
        p, weight = random_packed(configuration, n, k, group_size, seed=m)
        activations = torch.randn(m, k, generator=generator).to(dtype)
        bias = (torch.randn(n, generator=generator) / 16).to(dtype)
        weight = weight.double()
        exact = activations.double() @ weight.T + bias.double()
        # One rounding of the output, one of each weight where they are scaled, and float32 sums in any order: K roundings of at most
        # the sum of magnitudes.
        magnitudes = activations.double().abs() @ weight.abs().T
        bound = EPSILON[dtype] * exact.abs() + k * 2**-24 * (magnitudes + bias.double().abs()) + 2**-24
        if configuration.wgmma and "SCALE_WEIGHTS=1" in configuration.defines(dtype, group_shift(k if group_size == -1 else group_size, k)):
            bound += EPSILON[dtype] * magnitudes
        forwards, case = list(range(ctas)), f"{configuration.name}: M={m} N={n} K={k} group_size={group_size} CTAs={ctas}"
        for whole in sorted({0, configuration.output_tiles(m, n) // ctas}):
            lazy = launch(activations, p, bias, forwards, whole=whole)
            assert bool(((lazy.double() - exact).abs() <= bound).all()), f"{case} whole={whole}"
            eager = launch(activations, p, bias, forwards[::-1], whole=whole, eager=True, backwards=True)
            assert torch.equal(lazy, eager), f"{case} whole={whole}: the order of CTAs or copies changes the bits"


def test_identity_gives_the_weight(kernel: Built) -> None:
    """If this failed, some code, scale or column would not be decoded exactly; every one of -8..7 occurs, and scales of both signs."""
    configuration, dtype, launch, _ = kernel
    for group_size in (-1, 32):
        p, weight = random_packed(configuration, 192, 64, group_size, seed=3)
        out = launch(torch.eye(64, dtype=dtype), p, None, [0, 1, 2])
        assert torch.equal(out, weight.T.to(dtype))


def test_padding_of_k_is_never_read(kernel: Built) -> None:
    """If this failed, what lies behind a row of activations would reach the sums: here that is the next row, full of infinities."""
    configuration, dtype, launch, _ = kernel
    p, _ = random_packed(configuration, 64, 48, -1, seed=0)
    activations = torch.ones(2, 48, dtype=dtype)
    activations[1] = torch.inf
    assert launch(activations, p, None, [0])[0].isfinite().all()
