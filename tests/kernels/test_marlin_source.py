"""The kernels of csrc themselves, run on the CPU: the sources that NVRTC compiles, built by a C++ compiler against a software GPU.

software_gpu/ptx.cuh and ptx_sm90.cuh take the place of the instructions; everything else, addresses, pipeline, stripes and reduction,
is the kernels' own.
What this cannot show: races between warps that the order of fibers hides, what the compiler for the GPU does, and speed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import jit
from marlinctl.kernels.configurations import DENSE, DENSE_SM90, LARGEST_CLUSTER, SPARSE, SPARSE_SM90, Configuration, Grid, group_shift
from marlinctl.kernels.reference import dequantize, dequantize_sparse
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from tests.kernels.built import shared_library
from tests.pack.naive import random_linear, random_sparse

SOFTWARE_GPU = Path(__file__).parent / "software_gpu"
GUARD = 64  # elements before and after the output that nobody may touch
EPSILON = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of rounding to the output

Launch = Callable[..., Tensor]


class Arguments(ctypes.Structure):
    """struct Arguments of software_gpu/launch.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("activations", "qweight", "meta", "scales", "bias", "out", "partials", "counters")),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "whole", "group_shift")),
    ]


def library_of(
    configuration: Configuration, dtype: torch.dtype, folder: Path, edit: Callable[[str], str] = lambda source: source, shift: int = 3
) -> ctypes.CDLL:
    """The kernel, built for the CPU; `edit` may break its sources first."""
    kernel = (f"SPARSE={int(configuration.sparse)}", f"WGMMA={int(configuration.wgmma)}")
    return compiled(configuration.kernel, (*configuration.defines(dtype, shift), *kernel), folder, edit)


def compiled(kernel: str, defines: Sequence[str], folder: Path, edit: Callable[[str], str] = lambda source: source) -> ctypes.CDLL:
    """kernel.cu and the software GPU in one library, with `edit` applied to the kernel and to what it includes."""
    files = {
        name: edit(text) if name == f"{kernel}.cu" or name.endswith(".cuh") else text for name, text in jit.texts_of(jit.SOURCES).items()
    }
    files |= {name: (SOFTWARE_GPU / name).read_text("utf-8") for name in ("ptx.cuh", "ptx_sm90.cuh")}
    return ctypes.CDLL(str(shared_library(SOFTWARE_GPU / "launch.cpp", files, defines, folder)))


def build(configuration: Configuration, dtype: torch.dtype, folder: Path, edit: Callable[[str], str] = lambda source: source) -> Launch:
    """The kernel as a function; one with wgmma is built for each group size that it is called with."""

    @functools.cache
    def library(shift: int) -> ctypes.CDLL:
        return library_of(configuration, dtype, folder.with_name(f"{folder.name}{shift}"), edit, shift)

    def launch(
        activations: Tensor,
        p: PackedLinear | PackedSparseLinear,
        bias: Tensor | None,
        order: list[int],
        *,
        whole: int = 0,
        cluster: int = 1,
        eager: bool = False,
        backwards: bool = False,
    ) -> Tensor:
        """One launch of len(order) CTAs with `whole` tiles each, run in that order. Outputs and partial sums are poisoned; counters must
        come back as zeros, and clusters must use neither.
        """
        (m, k), n, ctas = activations.shape, p.out_features, len(order)
        out = torch.full((m * n + 2 * GUARD,), torch.nan, dtype=dtype)
        size, tiles = configuration.partial_floats(ctas), configuration.output_tiles(m, n)
        partials = aligned(torch.full((size + GUARD,), torch.nan))
        counters = torch.zeros(tiles + GUARD, dtype=torch.int32)
        meta = p.meta if isinstance(p, PackedSparseLinear) else torch.empty(0, dtype=torch.int16)
        inputs = [aligned(tensor) for tensor in (activations, p.qweight, meta, p.scales)]
        pointers = [*(tensor.data_ptr() for tensor in inputs), None if bias is None else bias.data_ptr()]
        pointers += [out[GUARD:].data_ptr(), partials.data_ptr(), counters.data_ptr()]
        shift = group_shift(p.group_size, k)
        arguments = Arguments(*pointers, m, n, k, whole, shift)
        library(shift if configuration.wgmma else 0).launch(
            arguments, (ctypes.c_int * ctas)(*order), ctas, cluster, ctypes.c_bool(eager), ctypes.c_bool(backwards)
        )
        assert not counters.any(), "the next launch would find a used workspace"
        assert partials[0 if cluster > 1 else size :].isnan().all(), "written behind the workspace"
        assert out[:GUARD].isnan().all() and out[-GUARD:].isnan().all(), "written outside of the output"
        return out[GUARD:-GUARD].view(m, n)

    return launch


def aligned(tensor: Tensor) -> Tensor:
    """A copy at a multiple of 16 bytes, as CUDA's allocator has it."""
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    start = (-room.data_ptr() % 16) // tensor.element_size()
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def random_packed(
    configuration: Configuration, n: int, k: int, group_size: int, seed: int
) -> tuple[PackedLinear | PackedSparseLinear, Tensor]:
    """What this kernel multiplies with, and the weight [N, K] that it stands for."""
    if configuration.sparse:
        sparse = pack_sparse_marlin(random_sparse(n, k, group_size, seed))
        return sparse, dequantize_sparse(sparse)
    dense = pack_marlin(random_linear(n, k, group_size, seed))
    return dense, dequantize(dense)


# Each takes a second to build, and with wgmma one for each group size: of those the ones that differ in more than their sizes.
NAMED = {c.name.removeprefix("sparse-").removeprefix("wgmma-") + ("s" if c.sparse else ""): c for c in (*DENSE_SM90, *SPARSE_SM90)}
HOPPER = [
    *(NAMED[name] for name in ("m8n384k256x3", "m8n256k256x5", "m16n128k512x3", "m32n384k256x3", "m32n128k256x5")),
    *(NAMED[name] for name in ("m48n128k256x4w", "m64n512k128x4w", "m64n128k256x3w", "m96n128k128x4w")),
    *(NAMED[name] for name in ("m8n384k256x4s", "m8n256k256x6s", "m16n128k512x4s", "m32n128k256x5s", "m48n384k256x3ws")),
    *(NAMED[name] for name in ("m48n128k256x4ws", "m64n256k256x3ws", "m96n256k128x5ws")),
]
KERNELS = [
    *((c, torch.float16) for c in (*DENSE, *SPARSE, *HOPPER)),
    *(
        (c, torch.bfloat16)
        for c in (DENSE[0], DENSE[4], SPARSE[0], SPARSE[4], DENSE_SM90[0], DENSE_SM90[-1], SPARSE_SM90[0], SPARSE_SM90[-1])
    ),
]


@pytest.fixture(scope="module", params=KERNELS, ids=lambda p: f"{p[0].name}-{str(p[1])[6:]}")
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Configuration, torch.dtype, Launch]:
    configuration, dtype = request.param
    return configuration, dtype, build(configuration, dtype, tmp_path_factory.mktemp("build") / "csrc")


# M, N, K, group size, CTAs: tiles that are not full in any direction, K of odd numbers of 64, runs that begin and end inside of tiles and
# groups, tiles of many CTAs and CTAs of many tiles, CTAs without work.
CASES = [(1, 64, 64, -1, 2), (9, 80, 48, -1, 1), (17, 192, 576, -1, 5), (7, 64, 160, 32, 2), (13, 448, 320, 64, 6), (65, 136, 896, 128, 7)]
CLUSTER_CASES = [(3, 72, 2048, 128), (17, 192, 576, -1), (65, 136, 896, 128)]  # 2 to 8 CTAs, as the steps of k divide


def clustered(configuration: Configuration, m: int, n: int, k: int) -> Grid:
    """As large clusters as this product can have."""
    tiles = configuration.output_tiles(m, n)
    steps = configuration.units(m, n, k) // tiles
    cluster = max(parts for parts in range(1, LARGEST_CLUSTER + 1) if steps % parts == 0)
    return Grid(tiles * cluster, cluster=cluster)


def test_products(kernel: tuple[Configuration, torch.dtype, Launch]) -> None:
    """If this failed, the kernel would multiply wrongly: fragments, swizzle, scales, edges, or the way parts of a tile come together."""
    configuration, dtype, launch = kernel
    more_tiles_than_ctas = (5, 2 * configuration.columns + 72, 192, 64, 2)  # a whole one for each, and one that is cut
    for m, n, k, group_size, ctas in [*CASES, more_tiles_than_ctas]:
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


CLUSTERED = [  # each way in which warps share words and k, of both kinds
    *((NAMED[name], torch.float16) for name in ("m8n384k256x3", "m32n128k256x5", "m64n512k128x4w")),
    *((NAMED[name], torch.float16) for name in ("m8n256k256x6s", "m16n128k512x4s", "m96n256k128x5ws")),
    *((c, torch.bfloat16) for c in (DENSE_SM90[-1], SPARSE_SM90[-1])),
]


@pytest.mark.parametrize(("configuration", "dtype"), CLUSTERED, ids=[f"{c.name}-{str(dtype)[6:]}" for c, dtype in CLUSTERED])
def test_clusters(configuration: Configuration, dtype: torch.dtype, tmp_path: Path) -> None:
    """If this failed, a part that a cluster's CTA shows to the others would be lost, added in another order, or read too early or too late:
    what comes through distributed shared memory has the bits of what comes through L2.
    """
    launch, sizes = build(configuration, dtype, tmp_path / "csrc"), set()
    for m, n, k, group_size in CLUSTER_CASES:
        p, _ = random_packed(configuration, n, k, group_size, seed=m)
        activations, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        grid = clustered(configuration, m, n, k)
        ctas = list(range(grid.ctas))
        through_l2 = launch(activations, p, bias, ctas)
        lazy = launch(activations, p, bias, ctas, cluster=grid.cluster)
        eager = launch(activations, p, bias, ctas[::-1], cluster=grid.cluster, eager=True, backwards=True)
        case = f"{configuration.name}: M={m} N={n} K={k} group_size={group_size} {grid}"
        assert bool(through_l2.isfinite().all()), case
        assert torch.equal(through_l2, lazy), case
        assert torch.equal(through_l2, eager), f"{case}: the order of CTAs or copies changes the bits"
        sizes.add(grid.cluster)
    assert len(sizes) > 1


def test_identity_gives_the_weight(kernel: tuple[Configuration, torch.dtype, Launch]) -> None:
    """If this failed, some code, scale or column would not be decoded exactly; every one of -8..7 occurs, and scales of both signs."""
    configuration, dtype, launch = kernel
    for group_size in (-1, 32):
        p, weight = random_packed(configuration, 192, 64, group_size, seed=3)
        out = launch(torch.eye(64, dtype=dtype), p, None, [0, 1, 2])
        assert torch.equal(out, weight.T.to(dtype))


def test_padding_of_k_is_never_read(kernel: tuple[Configuration, torch.dtype, Launch]) -> None:
    """If this failed, what lies behind a row of activations would reach the sums: here that is the next row, full of infinities."""
    configuration, dtype, launch = kernel
    p, _ = random_packed(configuration, 64, 48, -1, seed=0)
    activations = torch.ones(2, 48, dtype=dtype)
    activations[1] = torch.inf
    assert launch(activations, p, None, [0])[0].isfinite().all()


SHARED = [  # by both kernels, in one text
    ("copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();", "waits for too few copies"),
    ("__syncthreads();  // everybody's copies have arrived, and everybody is done with the stage that is filled next", "", "no barrier"),
    ("stage == 0 ? STAGES - 1 : stage - 1", "stage", "fills the stage that is read"),
    ("copy_chunk ^ copy_row % 8 ^ i * ROWS % 8", "copy_chunk", "no swizzle"),
    ("(cta == first_cta ? 1 : 0)", "0", "parts in one place"),
    ("a[1] = Number::lower(word >> 8)", "a[1] = Number::lower(word >> 4)", "nibbles"),
]
DENSE_ALONE = [("self.first_word + self.k_warp * OWN + word", "self.first_word + word", "wrong words")]
SPARSE_ALONE = [
    ("mma_sparse<0>", "mma_sparse<1>", "selector"),
    ("its_half * 128", "0", "one half of the metadata for all words"),
    ("(tile + its_tile) * BLOCKS", "tile * BLOCKS", "one tile's metadata for two"),
    ("inside ? places + i * META_ROWS * meta_row : meta, true", "places + i * META_ROWS * meta_row, inside", "zeros as metadata"),
    ("self.k_warp * OWN + i, second", "i, second", "wrong words"),
    ("part % 2 * 2 + part / 2", "part", "tokens for outputs"),
    ("grouped ? sums[word][slab][i] : group_sums[word][slab][i]", "group_sums[word][slab][i]", "grouped as channel-wise"),
]
HOPPER_BOTH = [
    ("barrier_wait(ring.full(place.stage), place.parity);", "", "does not wait for a stage"),
    ("part * (TOKENS * 128), activations", "0, activations", "one place for all boxes"),
    ("at.token_tile * TOKENS, full", "0, full", "the first tokens for all"),
    ("wgmma_wait<1>();  // the batch before", "wgmma_wait<2>();  //", "decodes over what is multiplied"),
    ("words_at + (i + AHEAD)", "words_at + i", "a step's words twice"),
]
HOPPER_WEIGHTS = [
    ("a[1] = Number::times(a[1], upper);", "a[1] = Number::times(a[1], lower);", "the scale of another column"),
    ("wgmma_wait<0>();\n        held.release();", "held.release();", "ends a tile while it is multiplied"),
]
HOPPER_SPARSE = [
    ("multiply_async<0>(NUMBER()", "multiply_async<1>(NUMBER()", "selector"),
    ("i % META_TILES * 2 + word / 2", "word / 2", "one step's metadata for two"),
    ("K_WARPS > 1 ? neighbour(sums, part, slab, i) : sums[part][slab][i]", "sums[part][slab][i]", "tokens for outputs"),
]
MISTAKES = [
    *((DENSE[1], *m) for m in (*SHARED, *DENSE_ALONE)),
    *((SPARSE[1], *m) for m in SPARSE_ALONE),
    *((DENSE_SM90[1], *m) for m in HOPPER_BOTH),
    *((DENSE_SM90[-1], *m) for m in HOPPER_WEIGHTS),
    *((SPARSE_SM90[1], *m) for m in HOPPER_SPARSE),
]


def mistake(right: str, wrong: str) -> tuple[Callable[[str], str], list[int]]:
    """An edit of sources, and how often each had what it replaces."""
    hits: list[int] = []

    def edit(source: str) -> str:
        hits.append(source.count(right))
        return source.replace(right, wrong)

    return edit, hits


@pytest.mark.parametrize(("configuration", "right", "wrong"), [m[:3] for m in MISTAKES], ids=[f"{m[0].kernel}: {m[3]}" for m in MISTAKES])
def test_the_software_gpu_sees_mistakes(tmp_path: Path, configuration: Configuration, right: str, wrong: str) -> None:
    """If this failed, the tests above could not fail."""
    edit, hits = mistake(right, wrong)
    launch = build(configuration, torch.float16, tmp_path / "csrc", edit)
    p, weight = random_packed(configuration, 448, 1344, 64, seed=1)  # the last stage of K is not full
    activations = torch.randn(16, 1344, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    exact = activations.double() @ weight.double().T
    outputs = [launch(activations, p, None, [2, 0, 1]), launch(activations, p, None, [1, 0, 2], eager=True, backwards=True)]
    assert sum(hits) == 1
    assert any(not torch.allclose(out.double(), exact, rtol=1e-2, atol=1e-2) for out in outputs)


CLUSTER_MISTAKES = [
    ("    meet_in_cluster();\n", "", "reads parts that are not there"),
    ("    meet_in_cluster();  // a CTA's memory is there", "    //", "leaves while others read"),
    ("if constexpr (K_WARPS == 1) meet<THREADS>();", "", "writes over what is multiplied"),
    ("load_of_cta(cta, from", "load_of_cta(0, from", "one part for all"),
    ("piece % WARPS * 32 + self.lane", "self.thread", "a piece as if it were its reader's"),
    ("self.warp * ctas + cluster_rank()", "self.warp * ctas", "pieces of nobody"),
]


@pytest.mark.parametrize(("right", "wrong"), [m[:2] for m in CLUSTER_MISTAKES], ids=[m[2] for m in CLUSTER_MISTAKES])
def test_the_software_gpu_sees_mistakes_of_clusters(tmp_path: Path, right: str, wrong: str) -> None:
    """If this failed, test_clusters could not fail."""
    edit, hits = mistake(right, wrong)
    configuration = DENSE_SM90[0]
    launch = build(configuration, torch.float16, tmp_path / "csrc", edit)
    p, weight = random_packed(configuration, 448, 1344, 64, seed=1)
    activations = torch.randn(16, 1344, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    exact = activations.double() @ weight.double().T
    grid = clustered(configuration, 16, 448, 1344)
    ctas = list(range(grid.ctas))
    outputs = [
        launch(activations, p, None, ctas, cluster=grid.cluster),
        launch(activations, p, None, ctas[::-1], cluster=grid.cluster, eager=True, backwards=True),
    ]
    assert sum(hits) == 1
    assert any(not torch.allclose(out.double(), exact, rtol=1e-2, atol=1e-2) for out in outputs)
