"""What NVRTC makes of the kernels for int8 activations, csrc/marlin_a8*.cu, read from the machine code (as test_compile.py)."""

from __future__ import annotations

import functools
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from marlinctl.kernels import jit
from marlinctl.kernels.configurations import (
    A8_FACTORED_SM80,
    A8_FACTORED_SM90,
    A8_SM80,
    A8_SM90,
    SPARSE_A8_FACTORED_SM90,
    Configuration,
)
from tests.kernels.built import CUBINS
from tests.kernels.machine_code import MachineCode, disassemble

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")

Case = tuple[Configuration, torch.dtype, int, bool]  # with group_shift() of the weights, and whether tokens have groups
# Every second one: the others differ from their neighbour in sizes alone.
QUICK: list[Case] = [
    (c, (torch.float16, torch.bfloat16)[i // 2 % 2], 3, i // 2 % 2 == 0) for i, c in enumerate(A8_SM90) if i % 2 == 0 or c.ordered
]
SLOW: list[Case] = [
    (c, torch.float16, shift, groups)
    for c in A8_SM90
    for shift in (-1, 1, 2, 3)
    for groups in (False, True)
    if (c, torch.float16, shift, groups) not in QUICK
]
# Bytes of a thread's stack: what the end of a tile spills. With half as many tokens it would not, and be slower.
SPILLED = {
    "a8-wgmma-m32n512k128x4": 8,
    "a8-wgmma-m32n256k256x4": 24,
    "a8-wgmma-m64n384k128x5": 32,
    "a8-wgmma-m96n128k256x4": 128,
    "a8-wgmma-m128n256k128x5p2ot2": 48,
    "a8-wgmma-m256n128k128x4p2o": 56,
}
FACTORED_SPILLED = {"a8-wgmma-m128n128k256x3f": 120}  # channel-wise


@functools.cache
def codes(cases: tuple[Case, ...], architecture: str = "sm_90a") -> dict[Case, MachineCode]:
    def build(case: Case) -> bytes:
        configuration, dtype, shift, groups = case
        return jit.cubin(f"{configuration.kernel}.cu", configuration.defines(dtype, shift, groups), architecture, CUBINS)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, disassemble(cases[0][0].kernel, architecture, list(pool.map(build, cases))), strict=True))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in (*QUICK, *SLOW)],
    ids=lambda case: f"{case[0].name}-{str(case[1])[6:]}-{case[2]}-{'groups' if case[3] else 'tokens'}",
)
def test_machine_code(case: Case) -> None:
    """If this failed, the kernel would be slow (spills in the loop, serialized products) or hang (registers that are not there)."""
    configuration, _, shift, groups = case
    code = codes(tuple(QUICK if case in QUICK else SLOW))[case]
    assert code.stack <= SPILLED.get(configuration.name, 0) and code.local == 0
    assert code.registers * configuration.threads * configuration.ctas <= 65536
    assert code.count(r"USETMAXREG\..*") == 2, "copying warps give registers, the others take them"
    k_of_sum = min(128, 16 << shift if shift >= 0 else 128)
    words, steps = 4 // configuration.split, configuration.k_step // configuration.k_warps
    products = steps // 32 * words * configuration.parts
    assert code.count(rf"IGMMA\.64x{configuration.tokens // configuration.parts}x32\.S8\.S8.*") == products, (
        "each of a stage's products, once"
    )
    batches = steps // k_of_sum * words * configuration.parts // configuration.temporaries
    assert code.count(r"WARPGROUP\.ARRIVE") == batches, "ptxas has serialized the products, or split a batch"
    sums = steps // k_of_sum * words * configuration.tokens // 2
    conversions = code.count(r"I2FP\.F32\.S32")
    assert sums <= conversions <= sums + 32, "one for each sum of a group; the rest are integer divisions of addresses"
    assert code.count(r"UTMALDG\.3D") == 1, "weights, one box of a tensor map for each stage"
    copies = (shift >= 0) + groups * (configuration.k_step // 128)
    assert code.count(r"UBLKCP\..*") == copies, "scales and scales of tokens, by the copy engine"
    assert code.count(r"UTMALDG\.2D") > 0, "activations, boxes of a tensor map"
    assert code.count(r"ACQBULK") > 0 and code.count(r"PREEXIT") > 0, "the wait for the grid before, and the next grid is let in"
    assert code.count(r"ATOM(G|S)?\b.*") == 1 and not any(re.match(r"RED\b", name) for name in code.instructions), "one integer counter"


FACTORED_QUICK: list[Case] = [(c, torch.float16, 3, False) for c in A8_FACTORED_SM90 if c.paired]
FACTORED_SLOW: list[Case] = [
    (c, dtype, shift, False)
    for c in A8_FACTORED_SM90
    for dtype, shift in ((torch.float16, 3), (torch.bfloat16, 2), (torch.float16, 1), (torch.float16, -1))
    if (c, dtype, shift, False) not in FACTORED_QUICK
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in FACTORED_QUICK else pytest.mark.slow) for case in (*FACTORED_QUICK, *FACTORED_SLOW)],
    ids=lambda case: f"{case[0].name}-{str(case[1])[6:]}-{case[2]}",
)
def test_machine_code_of_factored_weights(case: Case) -> None:
    """If this failed, products would be serialized, or a pair of CTAs would wait for memory (MEMBAR) in each step."""
    configuration = case[0]
    code = codes(tuple(FACTORED_QUICK if case in FACTORED_QUICK else FACTORED_SLOW))[case]
    assert code.stack <= FACTORED_SPILLED.get(configuration.name, 16) and code.local == 0
    assert code.registers * configuration.threads * configuration.ctas <= 65536
    assert code.count(r"USETMAXREG\..*") == 2, "copying warps give registers, the others take them"
    words, steps = 4 // configuration.split, configuration.k_step // configuration.k_warps // 32
    products = rf"IGMMA\.64x{configuration.tokens // configuration.parts}x32\.S8\.S8.*"
    assert code.count(products) == steps * words * configuration.parts, "each of a stage's products, once"
    assert code.count(r"WARPGROUP\.ARRIVE") == steps // configuration.batch, "ptxas has serialized the products, or split a batch"
    assert (code.count(r"UTMALDG\.2D\.MULTICAST") > 0) == configuration.paired
    assert code.count(r"MEMBAR\.ALL\.GPU") <= 4, "at the ends of the kernel and of a tile, not where a stage is released"


# With mma.sync.
AMPERE_QUICK: list[tuple[Case, str]] = [
    ((A8_SM80[1], torch.float16, 3, False), "sm_80"),
    ((A8_SM80[2], torch.bfloat16, 1, True), "sm_86"),
    ((A8_FACTORED_SM80[3], torch.float16, 3, False), "sm_80"),
    ((A8_FACTORED_SM80[2], torch.bfloat16, -1, False), "sm_89"),
]
AMPERE_SLOW: list[tuple[Case, str]] = [
    ((c, dtype, shift, groups), architecture)
    for architecture, given in {
        "sm_80": ((torch.float16, -1), (torch.bfloat16, 1), (torch.float16, 2), (torch.bfloat16, 3)),
        "sm_86": ((torch.bfloat16, -1), (torch.float16, 1), (torch.bfloat16, 2), (torch.float16, 3)),
        "sm_89": ((torch.float16, 3), (torch.bfloat16, 3)),
        "sm_90a": ((torch.float16, 3),),
    }.items()
    for c in (*A8_SM80, *A8_FACTORED_SM80)
    if c.fits(architecture)
    for dtype, shift in given
    for groups in ((False,) if c.factored else (False, True))
    if ((c, dtype, shift, groups), architecture) not in AMPERE_QUICK
]


@pytest.mark.parametrize(
    ("case", "architecture"),
    [pytest.param(*both, marks=[] if both in AMPERE_QUICK else pytest.mark.slow) for both in (*AMPERE_QUICK, *AMPERE_SLOW)],
    ids=lambda given: given if isinstance(given, str) else f"{given[0].name}-{str(given[1])[6:]}-{given[2]}{'-groups' if given[3] else ''}",
)
def test_machine_code_for_ampere(case: Case, architecture: str) -> None:
    """If this failed, the kernel would be slow (spills, conversions in the loop, copies through registers) or not start at all."""
    configuration, _, shift, groups = case
    code = codes((case,), architecture)[case]
    assert code.stack == 0 and code.local == 0 and code.count(r"(LDL|STL)\b.*") == 0
    assert code.registers * configuration.threads * configuration.ctas <= 65536
    words, slabs, steps = 4 // configuration.split, configuration.tokens // 8, configuration.k_step // configuration.k_warps // 32
    assert code.count(r"IMMA\.16832\.S8\.S8") == code.count(r"IMMA.*") == steps * words * slabs, "each of a stage's products, once"
    assert code.count(r"LDSM\.16\.M88\.4") == steps * slabs // 2, "16 tokens x 32 k at once"
    sums = words * slabs * 4
    conversions = code.count(r"I2F.*")
    assert conversions <= 48 + configuration.factored * sums, "sums of groups become floats by subtractions; the rest are integer divisions"
    if not configuration.factored:
        closes = configuration.k_step // configuration.k_warps // min(128, 16 << shift if shift >= 0 else 128)
        assert code.count(r"FADD.*") >= closes * sums and code.count(r"FFMA.*") >= closes * sums
    weights, activations = configuration.k_step * configuration.columns // 2, configuration.tokens * configuration.k_step
    copies = (configuration.stages * weights + activations) // 16 // configuration.threads
    assert code.count(r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128(\.ZFILL)?") >= copies + groups, "cp.async of 16 bytes, past L1"
    assert code.count(r"ATOM(G|S)?\b.*") == 1 and code.count(r"RED\b.*") == 0, "one integer counter"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89"])
def test_ampere_has_a_kernel_that_fits(architecture: str) -> None:
    """If this failed, sm_86 and sm_89, with 99 KB of shared memory, could not multiply in 8 bits."""
    for configurations in (A8_SM80, A8_FACTORED_SM80):
        assert {32, 64} <= {c.tokens for c in configurations if c.fits(architecture)}


@pytest.mark.parametrize("configuration", [A8_SM80[0], A8_FACTORED_SM80[0]], ids=lambda c: c.kernel)
def test_host_and_kernel_agree_on_shared_memory(tmp_path: Path, configuration: Configuration) -> None:
    """If this failed, a change of the stages on one side alone would write past the end of shared memory."""
    wrong = [re.sub(r"SHARED_BYTES=\d+", "SHARED_BYTES=4096", define) for define in configuration.defines(torch.float16)]
    with pytest.raises(jit.CompilationFailed, match="the host allots other shared memory than the kernel uses"):
        jit.cubin(f"{configuration.kernel}.cu", wrong, "sm_80", tmp_path)


SPARSE_QUICK: list[Case] = [
    (c, (torch.float16, torch.bfloat16)[i % 2], 3, False) for i, c in enumerate(SPARSE_A8_FACTORED_SM90) if i % 3 == 1
]
SPARSE_SLOW: list[Case] = [
    (c, dtype, shift, False)
    for c in SPARSE_A8_FACTORED_SM90
    for dtype, shift in ((torch.float16, 3), (torch.bfloat16, 2), (torch.float16, 1), (torch.float16, -1))
    if (c, dtype, shift, False) not in SPARSE_QUICK
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in SPARSE_QUICK else pytest.mark.slow) for case in (*SPARSE_QUICK, *SPARSE_SLOW)],
    ids=lambda case: f"{case[0].name}-{str(case[1])[6:]}-{case[2]}",
)
def test_machine_code_of_sparse_factored_weights(case: Case) -> None:
    """If this failed, products would be of all of K, zeros included, or serialized, or their operands would come from local memory."""
    configuration, _, shift, _ = case
    code = codes(tuple(SPARSE_QUICK if case in SPARSE_QUICK else SPARSE_SLOW))[case]
    assert code.stack == 0 and code.local == 0
    assert code.registers * configuration.threads * configuration.ctas <= 65536
    assert code.count(r"USETMAXREG\..*") == 2, "copying warps give registers, the others take them"
    words, steps = 4 // configuration.split, configuration.k_step // configuration.k_warps // 64
    assert code.count(rf"IGMMA\.SP\.64x{configuration.tokens}x64\.S8\.S8.*") == steps * words, "each of a stage's products, once"
    assert code.count(r"WARPGROUP\.ARRIVE") == steps // configuration.batch, "ptxas has serialized the products, or split a batch"
    assert code.count(r"LDS\.64.*") >= steps * (words // 2), "metadata, two registers at a time"
    assert code.count(r"UBLKCP\..*") == 1 + (shift >= 0) and code.count(r"UTMALDG\.3D.*") == 1, "metadata and factors, and a box of weights"
    assert (code.count(r"UTMALDG\.2D\.MULTICAST") > 0) == configuration.paired
    assert code.count(r"MEMBAR\.ALL\.GPU") <= 4, "at the ends of the kernel and of a tile, not where a stage is released"
