"""csrc/round_activations.cu: the codes and scales of plain torch, bit for bit, and what the compiler makes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import jit, rounding
from marlinctl.kernels.activations import RoundedActivations, round_activations_for_tiles
from marlinctl.kernels.rounding import defines, launch, round_on_gpu, shape_of
from tests.kernels.built import CUBINS
from tests.kernels.machine_code import disassemble
from tests.kernels.software_driver import install, software_round
from tests.kernels.software_kernel import aligned, mistake

DTYPES = [torch.float16, torch.bfloat16]
GROUPS = [None, 128]
GUARD = 2**16  # bytes around an output: what a CTA too many writes is within them
# One warp and several, K that ends in the first and second run of a piece, in half a group, and beyond what registers hold
SHAPES = [(1, 8), (5, 24), (3, 40), (7, 200), (9, 136), (4, 1024), (13, 4096), (2, 18432), (3, 40000)]


def random_rows(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """[M, K] of very different magnitudes."""
    generator = torch.Generator().manual_seed(m * k)
    return (torch.randn(m, k, generator=generator) * torch.logspace(-3, 2, m)[:, None] * torch.logspace(-1, 1, k)).to(dtype)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Outputs are full of garbage before a launch, and so is what lies around them, which must stay so."""
    rooms: list[Tensor] = []

    def make(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        rooms.append(aligned(torch.full((size + 2 * GUARD,), 0x55, dtype=torch.uint8)))
        return rooms[-1][GUARD : GUARD + size].view(dtype).view(shape)

    monkeypatch.setattr(rounding, "torch", Torch(make))
    install(monkeypatch)
    return rooms


class Torch:
    """torch, with another `empty`."""

    def __init__(self, empty: Callable[..., Tensor]) -> None:
        self.empty = empty

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def same(found: RoundedActivations, wanted: RoundedActivations) -> bool:
    """The same bits, of NaN too."""
    return torch.equal(found.codes, wanted.codes) and torch.equal(found.scales.view(torch.int32), wanted.scales.view(torch.int32))


def check(x: Tensor, group: int | None, folder: Path, rooms: list[Tensor], sparse: bool = False) -> RoundedActivations:
    x = aligned(x)
    found = launch(software_round(x.dtype, x.shape[1], group, folder, sparse=sparse), x, group, overlap=False)
    wanted = round_activations_for_tiles(x, group, sparse)
    assert torch.equal(found.codes, wanted.codes), f"{list(x.shape)}: codes at {(found.codes != wanted.codes).nonzero()[:4].tolist()}"
    assert same(found, wanted), f"{list(x.shape)}: scales {found.scales} instead of {wanted.scales}"
    for room in rooms:
        assert bool((room[:GUARD] == 0x55).all()) and bool((room[-GUARD:] == 0x55).all()), "written outside of the output"
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_codes_and_scales_are_those_of_torch(
    m: int, k: int, dtype: torch.dtype, group: int | None, tmp_path: Path, poisoned: list[Tensor]
) -> None:
    """If this failed, a GPU would round to other codes than an evaluation, or leave some place of them, or a padded scale, unwritten."""
    check(random_rows(m, k, dtype), group, tmp_path, poisoned)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("m", "k"), [(5, 24), (3, 40), (7, 200), (9, 136), (13, 4096), (3, 40000)])
def test_codes_for_sparse_tiles(m: int, k: int, group: int | None, tmp_path: Path, poisoned: list[Tensor]) -> None:
    """If this failed, 2:4 weights would be multiplied with activations of other columns of K."""
    check(random_rows(m, k, DTYPES[m % 2]), group, tmp_path, poisoned, sparse=True)


@pytest.mark.parametrize("group", GROUPS)
def test_every_quotient_rounds_as_a_division(group: int | None, tmp_path: Path, poisoned: list[Tensor]) -> None:
    """If this failed, three fma would not be a division. Every maximum of 11 bits with every number of 11 bits beside it that is not a code
    0; bfloat16 has fewer bits, and another exponent changes no quotient."""
    numbers = torch.cat([torch.arange(1024, 2048) / 2**e for e in range(9)])  # down to a quarter of a step
    largest = torch.arange(1024, 2048)[:: 1 if group is None else 16, None]
    rest = numbers if group is None else numbers.view(-1, 72)  # a group of 128 has its maximum and 72 of them
    if group is None:
        x = torch.cat((largest, rest.expand(len(largest), -1)), 1)
        x = torch.nn.functional.pad(torch.where(x <= largest, x, 0), (0, -x.shape[1] % 8))
    else:
        x = torch.zeros(len(largest), len(rest), 128)
        x[:, :, 0] = largest
        x[:, :, 1:73] = torch.where(rest <= largest[:, None], rest, 0)
        x = x.flatten(1)
    check(x.to(torch.float16), group, tmp_path, poisoned)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_exponent(dtype: torch.dtype, group: int | None, tmp_path: Path, poisoned: list[Tensor]) -> None:
    """If this failed, very small or very large tokens would have codes of another division; from the largest numbers to denormal ones."""
    info = torch.finfo(dtype)
    exponents = torch.arange(-24 if dtype == torch.float16 else -133, 1 + int(torch.tensor(info.max).log2()))
    rows = torch.rand(len(exponents), 264, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    rows[:, ::7] = rows[:, ::7].sign() / 2
    x = (rows * torch.exp2(exponents.double() + 1)[:, None]).clamp(-info.max, info.max).to(dtype)
    x = torch.cat((x, torch.zeros(1, 264, dtype=dtype), torch.full((1, 264), info.max, dtype=dtype)))
    x[-1, 1::2] = info.max / 2
    found = check(x, group, tmp_path, poisoned)
    assert found.scales.isfinite().all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_gives_nan(dtype: torch.dtype, group: int | None, tmp_path: Path, poisoned: list[Tensor]) -> None:
    """If this failed, a model that overflows would answer with plausible numbers. In either run of a piece, of both signs."""
    x = random_rows(7, 2056, dtype)
    for row, (place, value) in enumerate([(0, torch.inf), (17, -torch.inf), (2055, torch.nan), (1000, -torch.nan), (130, torch.inf)]):
        x[row, place] = value
    x[4] = torch.inf
    found = check(x, group, tmp_path, poisoned)
    assert found.scales.isnan().any(0).tolist() == [True] * 5 + [False] * 3


def test_a_launch_says_what_it_may_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a chain of kernels would not overlap, or a grid would not cover all tokens."""
    driver = install(monkeypatch)
    x = aligned(random_rows(9, 264, torch.float16))
    for group, ctas in ((None, 9), (128, 1)):
        function = software_round(torch.float16, 264, group, tmp_path)
        for overlap in (False, True):
            launch(function, x, group, overlap)
            assert (driver.launches[-1].ctas, driver.launches[-1].overlap) == (ctas, overlap)


def test_a_token_stays_in_registers() -> None:
    """If this failed, tokens of usual models would be read twice, or most threads would find nothing to do."""
    for k in (8, 1024, 4096, 8192, 14336, 18432, 28672, 32768):
        threads, pieces = shape_of(k, None)
        assert threads % 32 == 0 and threads * pieces * 16 >= k and (threads - 32) * pieces * 16 < k
    assert shape_of(65536, None) == (512, 4)
    assert shape_of(16384, None) == (512, 2) and shape_of(16392, None) == (288, 4), "as few numbers for a thread as there are threads for"


def test_what_the_kernel_would_read_wrongly_is_refused() -> None:
    """If this failed, a wrong call would read other numbers, or stop with a misaligned address in the middle of a stream."""
    wide = torch.zeros(4, 136, dtype=torch.float16)
    wrong = [wide[:, :128], wide.float(), wide[:, :132].contiguous(), wide[0], wide[:0], wide.flatten()[1:129].view(2, 64)]
    for x in wrong:
        with pytest.raises(ValueError, match="activations must be"):
            round_on_gpu(x, None)
    with pytest.raises(ValueError, match="not for each 64"):
        round_on_gpu(wide, 64)
    with pytest.raises(ValueError, match="are more than"):
        round_on_gpu(torch.empty(2**26, 8192, dtype=torch.float16, device="meta"), None)


@pytest.mark.parametrize(
    ("group", "right", "wrong"),
    [
        (None, "piece / APART * (2 * APART) + piece % APART", "piece * 2"),
        (None, "? row[at + APART] : zeros", "? row[at] : zeros"),
        (None, "high = max(high, word & 0x7fff0000);", ""),
        (None, "__fmaf_rn(__fmaf_rn(-near, divisor, x), inverse, near)", "near"),
        (None, "permute(lower, upper, 0x5410)", "permute(upper, lower, 0x5410)"),
        (None, "    __syncthreads();\n    return largest", "    return largest"),
        (None, "lane < THREADS / 32 ?", "lane < 1 ?"),
        (None, "beyond % 4 > 0", "false"),
        (None, "load_span(first - SPAN)", "load_span(first)"),
        (128, "unit % groups * GROUP_PIECES + lane", "unit % groups * GROUP_PIECES"),
        (128, "if (piece < pieces) codes[static_cast", "codes[static_cast"),
        (128, "largest_of_lanes<GROUP_PIECES>", "largest_of_lanes<32>"),
        (128, "if (token >= m) continue;", ""),
    ],
)
def test_the_software_gpu_sees_mistakes(group: int | None, right: str, wrong: str, tmp_path: Path, poisoned: list[Tensor]) -> None:
    """If this failed, the tests above could not fail."""
    edit, hits = mistake(right, wrong)
    seen = False
    for m, k in ((5, 4160), (2, 40000)):
        x = random_rows(m, k, torch.float16)
        x[:, ::2] = x[:, 1::2] / 2  # close to ties
        x = aligned(x)
        found = launch(software_round(torch.float16, k, group, tmp_path / str(k), edit), x, group, overlap=False)
        outside = any(bool((part != 0x55).any()) for room in poisoned for part in (room[:GUARD], room[-GUARD:]))
        seen |= outside or not same(found, round_activations_for_tiles(x, group))
    assert sum(hits) == 2 and seen


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[] if a in ("sm_80", "sm_90a") else pytest.mark.slow) for a in jit.ARCHITECTURES]
)
def test_it_compiles_without_spills(architecture: str) -> None:
    """If this failed, rounding would run at the rate of local memory, or not at all on that GPU; or read x before it has been written."""
    kinds: list[tuple[torch.dtype, int, int | None, bool]]
    kinds = [(torch.float16, 8192, None, False), (torch.bfloat16, 18432, None, False), (torch.bfloat16, 1024, None, False)]
    kinds += [(torch.float16, 8192, 128, False), (torch.float16, 8192, None, True)]
    cubins = [jit.cubin("round_activations.cu", defines(*kind), architecture, CUBINS) for kind in kinds]
    for (dtype, k, group, sparse), code in zip(kinds, disassemble("round_activations", architecture, cubins), strict=True):
        threads, pieces = shape_of(k, group)
        case = (architecture, dtype, k, group, sparse)
        assert (code.stack, code.local) == (0, 0), case
        assert code.registers <= (64 if pieces == 4 or threads == 32 else 48), case
        spans = 1 if group else 2  # in the loop for the maximum, and in that for codes beyond what registers hold
        assert code.count(r"LDG\.E\.128.*") == 2 * pieces * spans, case
        assert code.count(r"LDG.*") == code.count(r"LDG\.E\.128"), f"{case}: loads that may be moved over a wait"
        assert code.count(r"STG\.E\.128") == pieces, case
        assert code.count(r"I2F.*|F2I.*") <= (2 * pieces if group else 0), f"{case}: conversions beside those of an integer division"


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: torch.dtype, group: int | None) -> None:
    """If this failed, the compiled kernel would not do what its source does; or a graph would replay another kernel than was captured."""
    for m, k in (*SHAPES, (300, 8192), (1, 65536)):
        x = random_rows(m, k, dtype)
        x[0, 0] = torch.inf
        wanted = round_activations_for_tiles(x, group)
        on_gpu = x.cuda()
        for_sparse, wanted_of_sparse = round_on_gpu(on_gpu, group, sparse=True), round_activations_for_tiles(x, group, sparse=True)
        assert same(RoundedActivations(for_sparse.codes.cpu(), for_sparse.scales.cpu()), wanted_of_sparse), (m, k, "2:4")
        for overlap in (False, True):
            found = round_on_gpu(on_gpu, group, overlap)
            assert same(RoundedActivations(found.codes.cpu(), found.scales.cpu()), wanted), (m, k, overlap)
        here = round_activations_for_tiles(on_gpu, group)
        assert same(RoundedActivations(here.codes.cpu(), here.scales.cpu()), wanted), f"{m} x {k}: plain torch on the GPU"
    on_gpu = random_rows(65, 4096, dtype).cuda()
    round_on_gpu(on_gpu, group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = round_on_gpu(on_gpu, group, overlap=True)
    on_gpu.copy_(on_gpu.flip(0))
    graph.replay()
    assert same(captured, round_on_gpu(on_gpu, group))
