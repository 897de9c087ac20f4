"""csrc/unpack.cu: what a plain weight out of tiles is compared with, and what the compiler makes of it."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import pytest
import torch

from marlinctl.kernels import jit
from marlinctl.kernels.configurations import DENSE, SPARSE, group_shift
from marlinctl.kernels.launch import unpack, unpack_defines, unpack_shared_bytes
from marlinctl.pack.types import PackedLinear, PackedSparseLinear
from tests.kernels.built import CUBINS
from tests.kernels.machine_code import MachineCode, disassemble
from tests.kernels.software_driver import SoftwareDriver, install, software_unpack
from tests.kernels.software_kernel import aligned, compiled, random_packed
from tests.kernels.test_compile import ARCHITECTURES, RESERVED_BYTES

KINDS = [(sparse, dtype) for sparse in (False, True) for dtype in (torch.float16, torch.bfloat16)]
IDS = [f"{'sparse' if sparse else 'dense'}-{str(dtype)[6:]}" for sparse, dtype in KINDS]
# N, K, group size: the last CTA full and not, N and K below and at whole tiles, every order of scales, K of one CTA and of several
SHAPES = [(64, 64, -1), (80, 48, -1), (200, 320, 64), (136, 896, 128), (64, 288, 32), (192, 256, -1)]


def tensors_of(p: PackedLinear | PackedSparseLinear) -> tuple[torch.Tensor, ...]:
    weights = (p.qweight, p.meta) if isinstance(p, PackedSparseLinear) else (p.qweight,)
    return tuple(aligned(tensor) for tensor in weights)


@pytest.mark.parametrize(("sparse", "dtype"), KINDS, ids=IDS)
def test_the_weight_comes_back(sparse: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, large M would be multiplied with another weight than small M."""
    install(monkeypatch)
    function = software_unpack(sparse, dtype, tmp_path)
    for n, k, group_size in SHAPES:
        p, weight = random_packed(SPARSE[0] if sparse else DENSE[0], n, k, group_size, seed=n)
        out = unpack(function, tensors_of(p), aligned(p.scales), dtype, n, k, group_shift(p.group_size, k))
        assert torch.equal(out, weight.to(dtype)), (n, k, group_size)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_columns_beyond_k_are_zero(sparse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, a K that is no multiple of 8 would be multiplied with what lies behind the rows."""
    install(monkeypatch)
    function = software_unpack(sparse, torch.float16, tmp_path)
    p, weight = random_packed(SPARSE[0] if sparse else DENSE[0], 72, 100, -1, seed=1)
    out = unpack(function, tensors_of(p), aligned(p.scales), torch.float16, 72, 104, group_shift(100, 100))
    assert torch.equal(out[:, :100], weight.to(torch.float16))
    assert not out[:, 100:].any()


@pytest.mark.parametrize(
    ("sparse", "right", "wrong"),
    [
        (False, "grouped ? n % 8 * 8 + n / 8", "grouped ? n"),
        (False, "lane / 4 + upper * 8", "lane / 4 + (1 - upper) * 8"),
        (False, "warp * TILE * 2", "0"),
        (False, "    __syncthreads();\n#pragma unroll\n    for (unsigned chunk", "    for (unsigned chunk"),
        (True, "places >> 2 & 3", "places & 3"),
        (True, "later * 2 + row % 8 / 4", "row % 8 / 4"),
        (True, "n % 4 * 2 + n % 8 / 4 : n", "n % 8 : n"),
    ],
)
def test_the_software_gpu_sees_mistakes(sparse: bool, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the tests above could not fail."""
    hits = []

    def edit(source: str) -> str:
        hits.append(source.count(right))
        return source.replace(right, wrong)

    driver: SoftwareDriver = install(monkeypatch)
    function = software_unpack(sparse, torch.float16, tmp_path)
    function.handle.library = compiled("unpack", (*unpack_defines(sparse, torch.float16), "UNPACK=1"), tmp_path / "broken", edit)
    assert sum(hits) == 1
    p, weight = random_packed(SPARSE[0] if sparse else DENSE[0], 192, 512, 64, seed=2)
    out = unpack(function, tensors_of(p), aligned(p.scales), torch.float16, 192, 512, 2)
    assert len(driver.launches) == 1
    assert not torch.equal(out, weight.half())


@functools.cache
def machine_code(architecture: str) -> dict[tuple[bool, torch.dtype], MachineCode]:
    """Of every kind: the disassembler is started once."""
    codes = [jit.cubin("unpack.cu", unpack_defines(*kind), architecture, CUBINS) for kind in KINDS]
    return dict(zip(KINDS, disassemble("unpack", architecture, codes), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=[] if a in ("sm_80", "sm_90a") else pytest.mark.slow) for a in (*ARCHITECTURES, "sm_100", "sm_120")],
)
@pytest.mark.parametrize(("sparse", "dtype"), KINDS, ids=IDS)
def test_machine_code(sparse: bool, dtype: torch.dtype, architecture: str) -> None:
    """If this failed, dequantizing would be bound by something else than memory: spills, or reads and writes of fewer bytes."""
    code = machine_code(architecture)[sparse, dtype]
    assert (code.stack, code.local) == (0, 0)
    assert code.count(r"(LDL|STL)\b.*") == 0
    assert code.shared <= RESERVED_BYTES, "all shared memory is asked for by the host"
    assert code.registers <= 64, "four CTAs and more on each multiprocessor hide the latency of memory"
    assert code.count(r"LDG\.E\.128(\.CONSTANT)?") == 1, "the four words of a lane"
    assert code.count(r"STG\.E\.128") == code.count(r"STG.*") > 0
    assert code.count(r"LOP3\.LUT") >= 16
    in_shared = {name for name in code.instructions if name.startswith(("STS", "LDS"))}
    assert in_shared == {"STS.64" if sparse else "STS", "LDS.128"}, "pairs in, or quads, and 16 bytes out"


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
def test_host_and_kernel_agree_on_shared_memory(tmp_path: Path) -> None:
    """If this failed, a change on one side alone would write past the end of shared memory."""
    defines = [define.replace(str(unpack_shared_bytes(False)), "4096") for define in unpack_defines(False, torch.float16)]
    with pytest.raises(jit.CompilationFailed, match="the host allots other shared memory than the kernel uses"):
        jit.cubin("unpack.cu", defines, "sm_80", tmp_path)


def test_more_shared_memory_than_every_cta_has_is_not_asked_for() -> None:
    """If this failed, some architecture could hold fewer CTAs than hide the latency of memory."""
    assert unpack_shared_bytes(True) * 2 < 99 * 1024
    assert ctypes.sizeof(ctypes.c_void_p) == 8, "the buffer of arguments holds addresses of 8 bytes"
