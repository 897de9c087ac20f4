"""benchmarks/wgmma_rate_8bit.py without a GPU: what it decodes, built for the CPU, and its kernels through NVRTC.

It is run once on a rented GPU, where a wrong operand would only show as a difference without a place.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import wgmma_rate_8bit as benchmark
from marlinctl.benchmarking.machine_code import resources
from marlinctl.pack.marlin import pack_marlin
from marlinctl.quantize.types import QuantizedLinear
from tests.kernels.machine_code import disassemble

FORMS = benchmark.FORMS[1:]
VALUES = {"raw": (1 / 512, 8), "signed": (1 / 512, 0), "lookup": (1, 0), "int8": (16, 0)}  # an operand is factor * (code + offset)

# The instructions as the PTX ISA defines them (9.7.9.7 prmt without a mode, 9.7.20 vabsdiff4, 9.7.1.4 mad.lo, 9.7.8.6 lop3), and each form.
PROGRAM = """
#define __device__
#define __forceinline__ inline
static unsigned permute(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned control = selector >> 4 * i & 15;
        unsigned byte = both >> 8 * (control & 7) & 255;
        if (control & 8) byte = byte & 128 ? 255 : 0;
        out |= byte << 8 * i;
    }
    return out;
}
static unsigned absolute_differences(unsigned a, unsigned b) {
    unsigned out = 0;
    for (int i = 0; i < 32; i += 8) {
        const int difference = (int)(a >> i & 255) - (int)(b >> i & 255);
        out |= (unsigned)(difference < 0 ? -difference : difference) << i;
    }
    return out;
}
static unsigned multiply_add(unsigned a, unsigned b, unsigned c) { return a * b + c; }
static unsigned and_xor(unsigned a, unsigned b, unsigned c) { return (a & b) ^ c; }
#include "w4a8_decoding.cuh"
extern "C" void decode_all(int form, int count, const unsigned* w0, const unsigned* w1, unsigned (*a)[4]) {
    for (int i = 0; i < count; ++i) {
        if (form == 1) decode(a[i], w0[i], w1[i], Raw());
        if (form == 2) decode(a[i], w0[i], w1[i], Signed());
        if (form == 3) decode(a[i], w0[i], w1[i], Lookup{{TABLES}});
        if (form == 4) decode(a[i], w0[i], w1[i], Int8());
    }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("decoding")
    (folder / "decoding.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{benchmark.HERE}", "-o", "decoding.so", "decoding.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "decoding.so"))


def operand(library: ctypes.CDLL, form: str, words: Tensor) -> Tensor:
    """words [2, 128], a tile of two rows of qweight -> what A of m64nNk32 is: float32 [64, 32], outputs in their order.

    PTX ISA, fragments of 8-bit types: byte i of register r is row lane / 4 + 8 (r % 2), column 4 (lane % 4) + 16 (r / 2) + i.
    """
    registers = torch.zeros(32, 4, 4, dtype=torch.int32)  # [lane, word, register]
    first, second = words[0].contiguous(), words[1].contiguous()
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (first, second, registers)]
    library.decode_all(benchmark.FORMS.index(form), 128, *pointers)
    numbers = (
        registers.view(torch.int8 if form == "int8" else torch.float8_e4m3fn).float().view(32, 4, 4, 4)
    )  # [lane, word, register, byte]
    matrix = torch.full((64, 32), torch.nan)
    for lane in range(32):
        for register in range(4):
            row, column = lane // 4 + 8 * (register % 2), 4 * (lane % 4) + 16 * (register // 2)
            matrix[row::16, column : column + 4] = numbers[lane, :, register]
    return matrix


@pytest.mark.parametrize("form", FORMS)
def test_every_code_in_every_place_is_its_operand(library: ctypes.CDLL, form: str) -> None:
    """If this failed, weights would be wrong, or multiplied by the activation of another k."""
    places = torch.arange(64)[:, None] * 7 + torch.arange(32) * 5
    random = torch.randint(-8, 8, (64, 32), generator=torch.Generator().manual_seed(0))
    factor, offset = VALUES[form]
    for codes in (random, *((places + turn) % 16 - 8 for turn in range(16))):  # 5 and 7 are odd: in 16 turns a place has every code
        expected = factor * (codes[:, benchmark.order(form)] + offset).float()
        words = pack_marlin(QuantizedLinear(codes.to(torch.int8), torch.ones(64, 1, dtype=torch.float16), 32)).qweight[
            :2
        ]  # K is padded to 64
        assert torch.equal(operand(library, form, words), expected)


class SoftwareCard(benchmark.Card):
    """The check is computed by the library; a timed loop takes no time and answers what a card would."""

    multiprocessors = 132

    def __init__(self, library: ctypes.CDLL, spoil: str = "") -> None:
        self.library, self.spoil = library, spoil

    def launch(self, kernel: benchmark.Kernel, ctas: int, warpgroups: int, *given: Tensor | int) -> None:
        qweight, lying, out = given
        assert isinstance(qweight, Tensor) and isinstance(lying, Tensor) and isinstance(out, Tensor)
        assert kernel.check and qweight.shape == (8, 128 * ctas) and warpgroups == 1
        b = lying.view(torch.int8 if kernel.form == "int8" else torch.float8_e4m3fn).double()
        for cta in range(ctas):
            tile = qweight[:, 128 * cta : 128 * cta + 128]
            a = torch.cat([operand(self.library, kernel.form, tile[row : row + 2]) for row in range(0, 8, 2)], 1).double()
            out[64 * cta : 64 * cta + 64] = a @ (b.flip(1) if self.spoil == kernel.form else b).T

    def run(self, kernel: benchmark.Kernel, warpgroups: int, rounds: int, launches: int = 1) -> Any:
        event = SimpleNamespace(synchronize=lambda: None, elapsed_time=lambda other: 50.0, query=iter([False, False, False, True]).__next__)
        return event, event

    def clocks(self) -> float:
        return 8e7


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    monkeypatch.setattr(benchmark.torch, "zeros", partial(on_the_cpu, torch.zeros))


def on_the_cpu(make: Any, *shape: int, device: object = None, **rest: Any) -> Any:
    return make(*shape, **rest)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("form", FORMS)
def test_sums_that_are_exact_agree_with_float64(library: ctypes.CDLL, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, the check on the GPU would call a right tile wrong, or a wrong one right."""
    assert benchmark.check(SoftwareCard(library)) is True
    assert not benchmark.check(SoftwareCard(library, spoil=form))
    assert f"- {form}: WRONG" in capsys.readouterr().out


@pytest.mark.usefixtures("no_gpu")
def test_a_whole_run_prints_every_table(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, a mistake behind the measurements would lose them, on a machine that is paid by the minute."""
    energy = iter(range(0, 10**6, 7))
    meter = SimpleNamespace(joules=lambda: float(next(energy)), megahertz=lambda: 1755)
    monkeypatch.setattr(benchmark, "compile_all", lambda kernels: dict.fromkeys(kernels, b""))
    monkeypatch.setattr(benchmark, "resources", lambda code: SimpleNamespace(registers=168))
    monkeypatch.setattr(benchmark, "Card", lambda codes: SoftwareCard(library))
    monkeypatch.setattr(benchmark, "Meter", lambda: meter)
    monkeypatch.setattr(benchmark, "accuracy", lambda card: None)  # 64 tiles, twelve times: the same as the check
    monkeypatch.setattr(sys, "argv", ["wgmma_rate_8bit.py"])
    assert benchmark.main() == 0
    printed = capsys.readouterr().out
    assert all(f"## {title}" in printed for title in (*benchmark.LOOPS.values(), "Power", "Every shape of groups"))
    lines = printed.partition("## Power")[2].strip().splitlines()
    assert len(lines) == 2 + 3 * len(benchmark.POWER) and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "nan" not in printed


def test_largest_operands_are_finite() -> None:
    """If this failed, one NaN of e4m3, 0x7f, would fill every sum."""
    for form in ("raw", "int8"):
        numbers = benchmark.quantized(torch.tensor([[1e-3, -3.0, 7.0, -7.0]]), form).float()
        assert numbers.isfinite().all() and numbers.abs().max() == (127 if form == "int8" else 448)


@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form in ("signed", "int8") else pytest.mark.slow) for form in benchmark.FORMS]
)
def test_products_of_every_loop_are_under_way_together(form: str) -> None:
    """If this failed, a loop would be measured that spills, or in which ptxas waits after each wgmma: it only notes that in its log."""
    wanted = {(k.decoded, k.temporaries): k for k in benchmark.kernels() if k.form == form and k.tokens in (64, 128) and not k.check}
    codes = [benchmark.compiled(kernel) for kernel in wanted.values()]
    for kernel, code, found in zip(wanted.values(), codes, disassemble("rate", "sm_90a", codes), strict=True):
        assert resources(code).stack_bytes == found.stack == 0, kernel
        batches = 2 * kernel.words * kernel.parts if kernel.temporaries else 2
        assert found.count(r"WARPGROUP\.ARRIVE") == batches, kernel
        products = 4 * batches if kernel.temporaries else 2 * kernel.words
        assert found.count(rf"[HQI]GMMA\.64x{kernel.tokens // kernel.parts}x.*") == products, kernel


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")
def test_every_loop_has_a_kernel_for_all_tokens_that_does_not_spill(capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, a table would have a hole, and the power of that loop would not be measured."""
    there = {(k.form, k.decoded, k.temporaries > 0, k.tokens) for k in benchmark.compile_all(benchmark.kernels()) if not k.check}
    for form in ("raw", "signed", "int8"):
        assert {tokens for name, _, grouped, tokens in there if name == form and grouped} == set(benchmark.TOKENS), capsys.readouterr().out


def test_tables_are_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    """If this failed, what is pasted into the log would not show as a table."""
    benchmark.table(("", "N=8"), [["raw", "4.0"]])
    assert capsys.readouterr().out == "\n| | N=8 |\n|---|---|\n| raw | 4.0 |\n".replace("| | N", "|  | N")
