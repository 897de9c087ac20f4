"""marlinctl/doctor/computing.py: torch, NVRTC and the packers as they are here, then broken on purpose."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from marlinctl.doctor import computing
from marlinctl.kernels import jit
from marlinctl.pack import marlin, sparse_marlin
from marlinctl.system.driver import Driver, find_driver
from marlinctl.verify import kernels

H200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 * 2**30)
NEW = Driver(True, "999.1", (99, 0))
V100 = SimpleNamespace(name="Tesla V100", major=7, minor=0, total_memory=16 * 2**30)


def test_torch_multiplies_here() -> None:
    """If this failed, every machine would be told that its torch is broken."""
    (check,) = computing.cpu(torch.__version__)
    assert check.status == "ok" and torch.__version__ in check.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_product_that_is_off_by_one_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a torch built for another processor could be wrong in one type, and nobody would hear of it."""
    multiply = torch.Tensor.__matmul__

    def wrong(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = multiply(left, right)
        if product.dtype == dtype:
            product[-1, -1] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    (check,) = computing.cpu("2.13.0")
    assert check.status == "fail" and check.found.endswith(f"in {str(dtype).removeprefix('torch.')}")


def test_every_partial_sum_is_exact_in_bfloat16() -> None:
    """If this failed, a sound processor that sums in another order would be called wrong: 8 bits hold whole numbers up to 256."""
    left = max(abs((3 * i + 5 * j) % 7 - 3) for i in range(16) for j in range(16))
    right = max(abs((5 * i + 2 * j) % 9 - 4) for i in range(16) for j in range(16))
    assert computing.SIZE * left * right < 256


@pytest.mark.parametrize(
    ("facts", "right", "status"), [(H200, True, "ok"), (H200, False, "fail"), (V100, True, "warn")], ids=["sound", "wrong", "old"]
)
def test_a_gpu_that_torch_sees(facts: SimpleNamespace, right: bool, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a GPU that multiplies wrong would be taken by `--device auto`."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: facts)
    monkeypatch.setattr(computing, "_right", lambda device, _dtype: right and device == "cuda:0")
    check = computing.gpu(0)
    assert check.status == status and facts.name in check.found


def test_a_gpu_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a device without kernels for it, or one that is lost, would end the doctor."""

    def refuses(_index: int) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might ...")

    monkeypatch.setattr(torch.cuda, "get_device_properties", refuses)
    check = computing.gpu(1)
    assert check.status == "fail"
    assert check.found == "cuda:1: CUDA error: no kernel image is available for execution on the device"


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    """If this failed, the doctor would not know a sound GPU, or a compiler that works."""
    assert computing.gpu(0).status == "ok"
    assert computing.nvrtc(torch.cuda.get_device_capability(0), find_driver()).status == "ok"
    assert computing.kernels(torch.device("cuda", 0)).status == "ok"


@pytest.mark.filterwarnings("ignore:packed tensors on the CPU")
def test_the_kernels_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a GPU whose kernels are wrong, or do not start, would be called fit. The operators run on the CPU here."""
    device = torch.device("cpu")
    assert computing.kernels(device).status == "ok"
    multiply = kernels.multiply
    monkeypatch.setattr(kernels, "multiply", lambda *given: multiply(*given) * 1.01)
    wrong = computing.kernels(device)
    assert wrong.status == "fail" and "dense, off by" in wrong.found and "2:4, off by" in wrong.found
    monkeypatch.setattr(kernels, "multiply", lambda *given: torch.empty(2).view(3))
    broken = computing.kernels(device)
    assert broken.status == "fail" and "shape" in broken.found and "\n" not in broken.found


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
def test_the_compiler() -> None:
    """If this failed, an NVRTC that cannot compile for the device would show when the first kernel is wanted. It needs no GPU for this."""
    compiled = computing.nvrtc((9, 0), NEW)
    assert compiled.status == "ok" and "sm_90" in compiled.found
    for capability in ((10, 3), (12, 0), (12, 1)):
        first = computing.nvrtc(capability, NEW)
        assert first.status == "warn" and "never run by us" in first.found and "bench --check" in first.cure
    unknown = computing.nvrtc((7, 0), NEW)
    assert unknown.status == "warn" and "not made for sm_70" in unknown.found
    older = computing.nvrtc((9, 0), Driver(True, "570.86.15", (12, 8)))
    assert older.status == "warn" and "knows CUDA 12.8" in older.found and "580" in older.cure


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a machine without cuda-bindings would get a traceback, or one without a GPU a warning about a compiler."""
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    missing = computing.nvrtc((9, 0), NEW)
    assert missing.status == "warn" and "cuda-bindings cannot be imported" in missing.found
    assert computing.nvrtc(None, NEW).status == "ok"


def test_a_compiler_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, an NVRTC too old for the sources would be called sound."""
    monkeypatch.setattr(jit, "OPTIONS", ("--std=c++99",))
    refused = computing.nvrtc((9, 0), NEW)
    assert refused.status == "warn" and "\n" not in refused.found and "marlin_sm80.cu" in refused.found


@pytest.mark.parametrize("sparse", [False, True], ids=["marlin", "sparse-marlin"])
def test_packed_products(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, sound packers would be called broken, or two exchanged words of a tile would pass."""
    assert computing.packed(sparse=sparse).status == "ok"
    module, name = (sparse_marlin, "pack_sparse_marlin") if sparse else (marlin, "pack_marlin")
    pack = getattr(module, name)

    def exchanges(linear: object) -> object:
        tiles = pack(linear)
        tiles.qweight[0, [0, 1]] = tiles.qweight[0, [1, 0]]
        return tiles

    monkeypatch.setattr(module, name, exchanges)
    check = computing.packed(sparse=sparse)
    assert check.status == "fail" and "the product is off by" in check.found
