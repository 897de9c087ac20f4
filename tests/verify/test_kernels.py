"""Reading tiles through a kernel: what rounds passes, one wrong weight does not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marlinctl.cli import main
from marlinctl.errors import CheckFailed
from marlinctl.kernels import driver as cuda_driver
from marlinctl.kernels.reference import dequantize, dequantize_sparse, gemm
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.mask import two_largest
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.system.console import Console
from marlinctl.verify import kernels
from marlinctl.verify.kernels import ALLOWED, CudaKernel, compared, multiply
from marlinctl.verify.run import verify
from tests.packed import make_packed
from tests.runs import TEXT
from tests.tiny import make_tiny

Packed = PackedLinear | PackedSparseLinear


def in_software(activations: Tensor, p: Packed) -> Tensor:
    """A kernel on this CPU: the reference, rounded to the type of the activations."""
    return gemm(activations, p).to(activations.dtype)


KERNEL = CudaKernel("a kernel in software", torch.device("cpu"), in_software)


def linear(n: int, k: int, group_size: int, *, sparse: bool, scale: float = 0.02) -> tuple[Packed, Tensor]:
    generator = torch.Generator().manual_seed(n * k)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    scales = (torch.randn(n, k // group_size, generator=generator) * scale).to(torch.float16)
    if not sparse:
        q = QuantizedLinear(codes, scales, group_size)
        return pack_marlin(q), (codes.float() * scales.float().repeat_interleave(group_size, 1))
    keep = two_largest(torch.rand(k, n, generator=generator)).T.contiguous()
    weight = codes * keep
    return (
        pack_sparse_marlin(SparseQuantizedLinear(weight, scales, group_size, keep)),
        weight.float() * scales.float().repeat_interleave(group_size, 1),
    )


@pytest.mark.parametrize("scale", [1e-6, 0.02, 30.0])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
def test_rounding_passes(sparse: bool, scale: float) -> None:
    """If this failed, a sound model would not be published: tiny and huge weights, more outputs than a chunk has."""
    packed, weight = linear(1100, 256, 64, sparse=sparse, scale=scale)
    reading = compared(KERNEL, packed, weight)
    assert reading.error <= ALLOWED / 2
    assert reading.allowed == ALLOWED
    assert reading.blocks == 18  # 1152 outputs with padding


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
def test_weights_rounded_before_the_product_pass(sparse: bool) -> None:
    """If this failed, the operator could not dequantize first, as it does for many rows."""

    def rounded(activations: Tensor, p: Packed) -> Tensor:
        weight = dequantize_sparse(p) if isinstance(p, PackedSparseLinear) else dequantize(p)
        return (activations.float() @ weight.to(torch.float16).float().T).to(torch.float16)

    packed, weight = linear(320, 4096, 128, sparse=sparse)
    assert compared(replace(KERNEL, multiply=rounded), packed, weight).error <= ALLOWED / 2


@pytest.mark.parametrize("k", [128, 4096])
def test_one_wrong_weight_fails(k: int) -> None:
    """If this failed, damage in one place would drown in the rest. The sign of one code of 128 x K is wrong."""
    packed, weight = linear(128, k, 128, sparse=False)
    assert isinstance(packed, PackedLinear)
    words = packed.qweight.clone()
    words[3, 17] ^= 1 << 7
    assert compared(KERNEL, replace(packed, qweight=words), weight).error > ALLOWED


def test_outputs_that_are_not_written_fail() -> None:
    """If this failed, NaN would compare as nothing wrong."""
    packed, weight = linear(64, 64, 32, sparse=False)
    hole = replace(KERNEL, multiply=lambda a, p: in_software(a, p).index_fill(1, torch.tensor([63]), torch.nan))
    assert compared(hole, packed, weight).error == float("inf")


def test_a_row_of_zeros_must_stay_zero() -> None:
    """If this failed, an output whose weights are all zero could be anything."""
    packed, weight = linear(64, 64, 32, sparse=False)
    assert isinstance(packed, PackedLinear)
    nothing = pack_marlin(QuantizedLinear(torch.zeros(64, 64, dtype=torch.int8), torch.ones(64, 2).half(), 32))
    assert compared(KERNEL, nothing, torch.zeros(64, 64)).error == 0
    assert compared(KERNEL, packed, torch.zeros_like(weight)).error == float("inf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny(tmp_path / "model")
    make_packed(tmp_path / "model", tmp_path / "packed", "marlin", group_size=32)
    return tmp_path / "packed"


def test_verify_reads_every_output_where_there_is_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a machine with a GPU would still look at a sample, or not say which it was."""
    monkeypatch.setattr(kernels, "cuda_kernel", lambda console: KERNEL)
    checked = verify(folder, source=None, load=False, console=Console.quiet()).kernels
    assert checked is not None
    assert checked.by == "a kernel in software"
    assert checked.blocks == checked.of_blocks > 0


def test_verify_fails_where_the_kernel_gives_another_product(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a model that computes nonsense on this GPU would be published."""
    wrong = replace(KERNEL, multiply=lambda a, p: in_software(a, p).flip(1))
    monkeypatch.setattr(kernels, "cuda_kernel", lambda console: wrong)
    with pytest.raises(CheckFailed) as caught:
        verify(folder, source=None, load=False, console=Console.quiet())
    assert caught.value.error_id == "E113"


def test_compress_publishes_nothing_that_the_kernel_multiplies_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """If this failed, the model would be out before anybody knows: no format of it may appear."""
    make_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "mine.yaml").write_text("quantize: {group_size: 32}\ncalibration: {minimum_tokens: 256, samples: 8, sequence_length: 64}\n")
    monkeypatch.setattr(kernels, "cuda_kernel", lambda console: replace(KERNEL, multiply=lambda a, p: in_software(a, p) * 1.01))
    command = ["compress", str(tmp_path / "model"), str(tmp_path / "out"), "--recipe", str(tmp_path / "mine.yaml"), "--also", "marlin"]
    code = main([*command, "--calibration", str(tmp_path / "text.txt"), "--dtype", "float32", "--no-eval"])
    assert code == 1
    assert "explain E113" in capfd.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-marlin").exists()


def test_a_gpu_without_memory_leaves_linears_to_the_emulator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, somebody else's job on the GPU would end hours of work at its last step."""
    left = [2]

    def runs_out(activations: Tensor, p: Packed) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return in_software(activations, p)

    monkeypatch.setattr(kernels, "cuda_kernel", lambda console: replace(KERNEL, multiply=runs_out))
    checked = verify(folder, source=None, load=False, console=Console.quiet()).kernels
    assert checked is not None
    assert checked.by == f"a kernel in software ({checked.linears - 2} linears by the emulator)"


def test_a_gpu_whose_kernel_does_not_run_is_told_and_the_emulator_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this failed, hours of work would end because a compiler is missing, or the weaker check would pass for the stronger."""
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(cuda_driver, "_module", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels.cuda_kernel(Console()) is None
    told = capsys.readouterr().err
    assert "does not run on some GPU, so the emulator reads the tiles" in told and "cuda-bindings" in told


def test_the_operator_is_the_one_that_models_call() -> None:
    """If this failed, the check would pass for something that no model runs."""
    for sparse in (False, True):
        packed, weight = linear(128, 128, 32, sparse=sparse)
        activations = torch.randn(3, 128).half()
        assert torch.allclose(multiply(activations, packed).float(), activations.float() @ weight.T, atol=0.02)
