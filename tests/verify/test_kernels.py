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
from marlinctl.kernels import dispatch, emulate_int8, functions
from marlinctl.kernels import driver as cuda_driver
from marlinctl.kernels.reference import dequantize, dequantize_sparse, gemm, gemm_rounded
from marlinctl.pack.marlin import pack_marlin
from marlinctl.pack.sparse_marlin import pack_sparse_marlin
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from marlinctl.quantize.activations import group_of
from marlinctl.quantize.scheme import Rounding
from marlinctl.quantize.types import QuantizedLinear
from marlinctl.sparsify.mask import two_largest
from marlinctl.sparsify.types import SparseQuantizedLinear
from marlinctl.system.console import Console
from marlinctl.verify import kernels
from marlinctl.verify.kernels import ALLOWED, CudaKernel, by_kernel, compared, in_float64, multiply, worst
from marlinctl.verify.run import verify
from tests.packed import edit_json, make_packed, remake_manifest
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
    monkeypatch.setattr(kernels, "cuda_kernel", lambda console, rounds: KERNEL)
    checked = verify(folder, source=None, load=False, console=Console.quiet()).kernels
    assert checked is not None
    assert checked.by == "a kernel in software"
    assert checked.blocks == checked.of_blocks > 0


def test_verify_fails_where_the_kernel_gives_another_product(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a model that computes nonsense on this GPU would be published."""
    wrong = replace(KERNEL, multiply=lambda a, p: in_software(a, p).flip(1))
    monkeypatch.setattr(kernels, "cuda_kernel", lambda console, rounds: wrong)
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
    monkeypatch.setattr(kernels, "cuda_kernel", lambda console, rounds: replace(KERNEL, multiply=lambda a, p: in_software(a, p) * 1.01))
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

    monkeypatch.setattr(kernels, "cuda_kernel", lambda console, rounds: replace(KERNEL, multiply=runs_out))
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


# int8 activations


def rounded_in_software(activations: Tensor, p: Packed, rounding: Rounding) -> Tensor:
    return gemm_rounded(activations, p, group_of(rounding)).to(activations.dtype)


ROUNDING_KERNEL = replace(KERNEL, multiply_rounded=rounded_in_software, rows_rounded=lambda n, k, rounding, factored: 33)
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def rounding_folder(folder: Path) -> Path:
    """All linears but one may have their activations rounded."""
    said = {"format_version": 2, "activations": "int8", "activation_group": 128, "sixteen_bit_activations": [LAYER]}
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(said))
    remake_manifest(folder)
    return folder


@pytest.mark.parametrize("rounding", ["int8", "int8-128"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_products_of_rounded_activations_pass(rounding: Rounding, group_size: int) -> None:
    """If this failed, a sound folder for int8 activations would not be published, with a GPU or without."""
    k = 320 if group_size in (32, 64) else 384
    packed, weight = linear(200, k, k if group_size == -1 else group_size, sparse=False)
    reading = compared(ROUNDING_KERNEL, packed, weight, rounding)
    assert reading.error <= reading.allowed / 2
    error, allowed = worst(packed, weight, [0, 3], rounding)
    assert 0 < error <= allowed / 2


@pytest.mark.parametrize("group_size", [32, 128])
def test_factored_weights_are_read_as_their_own_kernel_reads_them(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the kernel that a model with integer group scales runs would not be looked at, with a GPU or without."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (200, 384), dtype=torch.int8, generator=generator)
    factors = torch.randint(1, 17, (200, 384 // group_size), generator=generator)
    scales = (factors * 2.0 ** torch.randint(-9, -5, (200, 1), generator=generator)).half()
    packed = pack_marlin(QuantizedLinear(codes, scales, group_size))
    weight = codes.float() * scales.float().repeat_interleave(group_size, 1)
    kernel = replace(ROUNDING_KERNEL, rows_rounded=lambda n, k, rounding, factored: 3 if factored else None)
    reading = by_kernel(kernel, packed, weight, "int8")
    assert reading is not None and reading.error <= reading.allowed / 2
    assert by_kernel(kernel, packed, weight, "int8-128") is None, "which sums of groups alone multiply"
    real, calls = emulate_int8.gemm_factored, list[int]()
    monkeypatch.setattr(emulate_int8, "gemm_factored", lambda *tensors: calls.append(1) or real(*tensors))
    for rounding in ("int8", "int8-128"):
        error, allowed = worst(packed, weight, [0, 3], rounding)
        assert error <= allowed / 2 and calls == [1]
    words = packed.qweight.clone()
    words[3, 17] ^= 1 << 7
    error, allowed = worst(replace(packed, qweight=words), weight, [0, 1], "int8")
    assert error > allowed


@pytest.mark.parametrize("rounding", ["int8", "int8-128"])
def test_one_wrong_weight_fails_with_rounded_activations(rounding: Rounding) -> None:
    """If this failed, the kernel for 8-bit activations could read another weight than the one for 16."""
    packed, weight = linear(128, 1024, 128, sparse=False)
    assert isinstance(packed, PackedLinear)
    words = packed.qweight.clone()
    words[3, 17] ^= 1 << 7
    wrong = replace(packed, qweight=words)
    assert compared(ROUNDING_KERNEL, wrong, weight, rounding).error > ALLOWED
    error, allowed = worst(wrong, weight, [0, 1], rounding)
    assert error > allowed


def test_verify_multiplies_rounded_activations_where_the_folder_allows_them(
    rounding_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this failed, a folder for int8 activations would be published without a check of its products."""
    checked = verify(rounding_folder, source=None, load=False, console=Console.quiet()).kernels
    assert checked is not None and (checked.rounded, checked.rounded_by) == (checked.linears - 1, "emulator")
    monkeypatch.setattr(kernels, "cuda_kernel", lambda console, rounds: ROUNDING_KERNEL)
    assert main(["verify", str(rounding_folder), "--no-load"]) == 0
    assert "int8 activations in 13 linears by the a kernel in software" in " ".join(capsys.readouterr().out.split())
    for kernel in (
        KERNEL,
        replace(ROUNDING_KERNEL, rows_rounded=lambda n, k, rounding, factored: None),
    ):  # 8 bits are not faster there, whatever M
        monkeypatch.setattr(kernels, "cuda_kernel", lambda console, rounds, kernel=kernel: kernel)
        checked = verify(rounding_folder, source=None, load=False, console=Console.quiet()).kernels
        assert checked is not None and (checked.by, checked.rounded_by) == ("a kernel in software", "emulator")


def test_verify_fails_where_rounded_activations_give_another_product(rounding_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a kernel that takes the scale of another group would only be seen in what the model says."""
    wrong = replace(ROUNDING_KERNEL, multiply_rounded=lambda a, p, rounding: rounded_in_software(a, p, "int8"))
    monkeypatch.setattr(kernels, "cuda_kernel", lambda console, rounds: wrong)
    with pytest.raises(CheckFailed, match="give another product with int8-128 activations") as caught:
        verify(rounding_folder, source=None, load=False, console=Console.quiet())
    assert caught.value.error_id == "E113" and all(LAYER not in problem.what for problem in caught.value.problems)


def test_what_is_multiplied_is_what_the_rounding_says() -> None:
    """If this failed, verify would compare a kernel with activations that are rounded in another way."""
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).half()
    for rounding, size in (("int8", 200), ("int8-128", 128)):
        steps = [part.double().abs().amax(1, keepdim=True) / 127 for part in x.split(size, 1)]
        exact = torch.cat([(part.double() / step).round() * step for part, step in zip(x.split(size, 1), steps, strict=True)], 1)
        assert torch.allclose(in_float64(x, rounding), exact, rtol=1e-6, atol=0)  # type: ignore[arg-type]
    assert torch.equal(in_float64(x, "none"), x.double())


def test_the_operator_is_called_with_the_rounding() -> None:
    """If this failed, the check of 8-bit products would be a second one of 16-bit products."""
    packed, weight = linear(128, 256, 32, sparse=False)
    x = torch.randn(3, 256).half()
    found = multiply(x, packed, rounding="int8").double()
    near, far = ((found - inputs @ weight.double().T).norm() for inputs in (in_float64(x, "int8"), x.double()))
    assert near < far / 3


def test_a_gpu_on_which_only_rounded_products_fail_keeps_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If this failed, a kernel for 8 bits that does not compile would end hours of work, or take the check of 16-bit products with it."""
    tried: list[str] = []

    def compared(kernel: CudaKernel, packed: Packed, weight: Tensor, rounding: str = "none") -> None:
        tried.append(rounding)
        if rounding != "none":
            raise RuntimeError("NVRTC refused the source")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(functions, "checked_architecture", lambda device: "sm_90a")
    monkeypatch.setattr(functions, "architecture_of", lambda device: "sm_90a")
    monkeypatch.setattr(kernels, "compared", compared)
    kernel = kernels.cuda_kernel(Console(), rounds=True)
    assert tried == ["none", "int8"] and kernel is not None and kernel.multiply_rounded is None
    assert kernel.rows_rounded(28672, 4096, "int8", True) == dispatch.fewest_rounded("sm_90a", 28672, 4096, "int8", True)
    assert "the CUDA kernel for int8 activations does not run on some GPU" in capsys.readouterr().err
    packed, weight = linear(64, 64, 32, sparse=False)
    assert kernels.by_kernel(kernel, packed, weight, "int8") is None, "the emulator is asked"
    tried.clear()
    whole = kernels.cuda_kernel(Console.quiet())
    assert tried == ["none"] and whole is not None and whole.multiply_rounded is not None
