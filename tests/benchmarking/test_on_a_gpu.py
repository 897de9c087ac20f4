"""What needs a CUDA device: the clock, the checks with real kernels, a small run, and the table that it tunes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from marlinctl.benchmarking import accuracy, tuning
from marlinctl.benchmarking import run as bench
from marlinctl.benchmarking.accuracy import Implementation
from marlinctl.benchmarking.building import offered
from marlinctl.benchmarking.cases import KINDS, Kind, Shape, shapes_set
from marlinctl.benchmarking.gpu import Gpu, open_gpu
from marlinctl.benchmarking.implementations import OVERLAP, Dequantized, Operator, RoundedOperator, configured, overlaps
from marlinctl.benchmarking.run import Asked, run
from marlinctl.benchmarking.timing import Candidate, take_turns
from marlinctl.errors import CheckFailed, EnvironmentProblem
from marlinctl.kernels import dispatch, jit, ops
from marlinctl.quantize.scheme import Rounding
from marlinctl.system.console import Console
from marlinctl.verify import kernels as kernel_check
from tests.benchmarking.software import Pretended

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture
def gpu() -> Gpu:
    return open_gpu("cuda")


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once for all tests here, or before; and the table of the package in each."""
    folder = tmp_path_factory.getbasetemp() / "one-cache"
    if not folder.exists() and jit.default_folder().exists():
        shutil.copytree(jit.default_folder(), folder / "kernels")
    monkeypatch.setenv("MARLINCTL_CACHE", str(folder))
    (folder / "kernels" / "dispatch.json").unlink(missing_ok=True)
    forget()


def forget() -> None:
    dispatch.tables.cache_clear()
    dispatch.choose.cache_clear()
    ops._route.cache_clear()


def test_the_device_tells_what_it_is(gpu: Gpu) -> None:
    """If this failed, a figure would not say where it comes from."""
    assert gpu.name and gpu.architecture in jit.ARCHITECTURES and gpu.l2_bytes > 2**20
    ceilings = gpu.ceilings(torch.float16)
    assert 1e11 < ceilings.read < 2e13, "between an old card and what does not exist"
    assert 1e13 < ceilings.matmul < 1e16


def test_a_device_that_is_not_there_is_told(gpu: Gpu) -> None:
    for name in ("cuda:99", "cpu", "gpu"):
        with pytest.raises(EnvironmentProblem) as caught:
            open_gpu(name)
        assert caught.value.error_id == "E420"


def test_weights_that_fit_the_cache_are_read_from_memory(gpu: Gpu) -> None:
    """If this failed, rotation would not rotate, and a small linear would seem to be read faster than memory is."""
    bytes_each = gpu.l2_bytes // 4
    copies = [torch.randn(bytes_each // 4, device=gpu.device) for _ in range(21)]
    candidates = {
        "rotated": Candidate(lambda i: copies[i % 21].sum(), 21),
        "always the same": Candidate(lambda i: copies[0].sum(), 1),
    }
    taken = take_turns(gpu, candidates)
    assert taken["rotated"].median > 1.05 * taken["always the same"].median
    assert bytes_each / taken["rotated"].median * 1e6 < 1.1 * gpu.ceilings(torch.float16).read


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_operators_and_every_configuration_are_right(gpu: Gpu, kind: Kind, dtype: torch.dtype) -> None:
    """If this failed, what passes on the software GPU would not hold on a real one."""
    with gpu.current():
        loaded, kernels = configured(gpu.device, gpu.architecture, [kind], dtype, Console.quiet())
        everything: list[Implementation] = [Operator(kind, dtype), Dequantized(kind, dtype), *loaded]
        found, problems = accuracy.check(everything, [], gpu.device, thorough=True)
    assert [problem.what for problem in problems] == []
    assert {kernel.name for kernel in kernels} == {c.name for c in offered(gpu.architecture, kind)}
    assert all(kernel.local_bytes == 0 for kernel in kernels)
    assert found.checks == len(everything) * (len(accuracy.ODD_SHAPES) * len(accuracy.ODD_TOKENS) * 2 + 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["int8", "int8-128"])
def test_the_operator_with_rounded_activations_is_right(gpu: Gpu, rounding: Rounding, dtype: torch.dtype) -> None:
    """If this failed, a folder for int8 activations would be served with other products than were measured."""
    shape = Shape(28672, 4096, 128)
    one = RoundedOperator(dtype, rounding, frozenset({(shape.n, shape.k)}), gpu.architecture, overlaps(gpu.architecture))
    tokens = [m for m in (16, 32, 256) if one.is_worth_timing(m, shape.n, shape.k)]
    assert bool(tokens) == (gpu.architecture == "sm_90a")
    with gpu.current():
        _, problems = accuracy.check([one], [(shape, tokens)], gpu.device, thorough=True)
    assert [problem.what for problem in problems] == []


def test_a_wrong_product_ends_the_run(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a kernel that is wrong on this GPU would have a speed-up."""
    monkeypatch.setattr(bench, "Operator", lambda kind, dtype, overlap: Pretended(kind, dtype, wrong=lambda product: product * 1.01))
    asked = Asked((shapes_set(["512x512"], 128),), (1,), torch.float16, 128, ("dense",), with_peers=False)
    with pytest.raises(CheckFailed):
        run(asked, gpu, Console.quiet())


def test_a_run_and_the_table_that_it_tunes(gpu: Gpu, tmp_path: Path) -> None:
    """If this failed, bench would not run where it is meant to, or the operators would not choose what it measured."""
    asked = Asked((shapes_set(["1024x2048", "4096x4096"], 128),), (1, 16, 512), torch.float16, 128, KINDS, every=True, with_peers=False)
    document = run(asked, gpu, Console.quiet())
    assert len(document.cases) == 6 and document.drift is not None
    for case in document.cases:
        assert all(timed.p20 <= timed.us <= timed.p80 for timed in case.candidates)
        assert all(timed.of_read < 1.3 and timed.of_matmul < 2.6 for timed in case.candidates), "faster than the hardware"
    before = dispatch.choose(gpu.architecture, False, 16, 4096, 4096)
    tuning.write_own_table(tuning.merged(tuning.read_own_table(), document))
    case = next(one for one in document.cases if (one.n, one.m) == (4096, 16))
    fastest = min((t for t in case.candidates if t.family == "dense" and "/" in t.name), key=lambda t: t.us)
    choice = dispatch.choose(gpu.architecture, False, 16, 4096, 4096)
    assert choice is not None
    if choice.name != fastest.name.removesuffix(OVERLAP):  # what the operator used in this run is known by the operator's time alone
        own = case.named("int4" + OVERLAP)
        assert before is not None and choice.name == before.name and own is not None and own.us <= fastest.us
    forget()
    again = run(Asked((shapes_set(["4096x4096"], 128),), (16,), torch.float16, 128, KINDS, with_peers=False), gpu, Console.quiet())
    chosen = again.cases[0].named("int4, overlap" if overlaps(gpu.architecture) else "int4")
    assert chosen is not None and chosen.us < 1.25 * fastest.us, "the operator adds little to its kernel"


def test_tiles_are_read_by_the_kernel(gpu: Gpu) -> None:
    """If this failed, `verify` would fall back to the emulator on a machine that could do better."""
    kernel = kernel_check.cuda_kernel(Console(), rounds=True)
    assert kernel is not None and gpu.name in kernel.name
    for kind in KINDS:
        for n, k, size in ((1100, 256, 64), (80, 4096, 128), (64, 160, 32)):
            packed = accuracy.through_the_packer(kind, n, k, size, seed=n, device=torch.device("cpu"))
            reading = kernel_check.compared(kernel, packed, accuracy.decoded(packed))
            assert reading.error <= reading.allowed / 2
            if kind == "dense" and kernel.rows_rounded(n, k, "int8-128", False) is not None:
                reading = kernel_check.compared(kernel, packed, accuracy.decoded(packed), "int8-128")
                assert reading.error <= reading.allowed / 2
