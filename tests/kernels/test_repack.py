"""csrc/repack.cu: the same words as pack/marlin.py makes, and what the compiler makes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marlinctl.kernels import jit, repack
from marlinctl.kernels.functions import Function
from marlinctl.pack.interchange import pack_ct, pack_gptq
from marlinctl.pack.marlin import pack_marlin
from tests.kernels.built import CUBINS
from tests.kernels.machine_code import disassemble
from tests.kernels.software_driver import install, software_repack
from tests.kernels.software_kernel import mistake
from tests.kernels.test_compile import ARCHITECTURES, RESERVED_BYTES
from tests.pack.naive import random_linear

# N, K: one CTA, half of one, a whole and a half in K, several in N
SHAPES = [(64, 128), (64, 64), (192, 192), (128, 448)]


def words_of(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    """By format, [K/8, N], and the tiles' words."""
    linear = random_linear(n, k, 64, seed=n + k)
    return {"gptq": pack_gptq(linear)["qweight"], "ct": pack_ct(linear.codes).T}, pack_marlin(linear).qweight


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Function:
    install(monkeypatch)
    monkeypatch.setattr(repack, "_mine", repack._Mine())
    return software_repack(tmp_path)


@pytest.mark.parametrize("fmt", ["gptq", "ct"])
def test_the_tiles_are_those_of_the_packer(fmt: str, function: Function) -> None:
    """If this failed, vLLM would multiply by other weights than the checkpoint's."""
    for n, k in SHAPES:
        words, wanted = words_of(n, k)
        assert torch.equal(repack._on_gpu(words[fmt], function), wanted), (n, k)


def test_a_part_of_a_larger_matrix(function: Function) -> None:
    """If this failed, strides would be taken for sizes."""
    words, wanted = words_of(128, 192)
    wide = torch.zeros(24, 200, dtype=torch.int32)
    wide[:, 36:164] = words["gptq"]
    assert torch.equal(repack._on_gpu(wide[:, 36:164], function), wanted)


def test_on_a_cpu_it_is_the_packers_own() -> None:
    """If this failed, a server on a CPU would ask for a GPU's kernel; and words of another shape would be read past their end."""
    words, wanted = words_of(64, 64)
    assert torch.equal(repack.repack(words["ct"]), wanted)
    with pytest.raises(ValueError, match="multiples of 64"):
        repack.repack(torch.zeros(8, 72, dtype=torch.int32))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("8 * (lane % 4)", "8 * (lane % 2)"),
        ("<< 4 * (half + 2 * later)", "<< 4 * (2 * half + later)"),
        ("(pair & 0xf0) << 12", "(pair & 0xf0)"),
        ("first_row / 2 + warp", "first_row + warp"),
        ("    __syncthreads();\n    const unsigned lane", "    const unsigned lane"),
    ],
)
def test_the_software_gpu_sees_mistakes(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the tests above could not fail."""
    install(monkeypatch)
    monkeypatch.setattr(repack, "_mine", repack._Mine())
    edit, hits = mistake(right, wrong)
    broken = software_repack(tmp_path, edit)
    assert sum(hits) == 1
    words, wanted = words_of(64, 192)
    assert not torch.equal(repack._on_gpu(words["gptq"], broken), wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=() if a in ("sm_80", "sm_90a") else pytest.mark.slow) for a in (*ARCHITECTURES, "sm_100", "sm_120")],
)
def test_it_compiles_without_spills(architecture: str) -> None:
    """If this failed, repacking would run at the rate of local memory, or not at all on that GPU."""
    (code,) = disassemble("repack", architecture, [jit.cubin("repack.cu", repack.DEFINES, architecture, CUBINS)])
    assert (code.stack, code.local) == (0, 0)
    assert code.shared <= RESERVED_BYTES, "all shared memory is asked for by the host"
    assert code.registers <= 64
    assert code.count(r"STG\.E\.128") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["gptq", "ct"])
def test_on_a_gpu(fmt: str) -> None:
    """If this failed, the compiled kernel would not do what its source does."""
    for n, k in (*SHAPES, (4096, 11008)):
        words, wanted = words_of(n, k)
        assert torch.equal(repack.repack(words[fmt].cuda()).cpu(), wanted), (n, k)
