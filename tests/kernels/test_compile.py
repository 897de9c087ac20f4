"""What NVRTC makes of the kernels, read from the machine code: no GPU is needed to see a spill or a missing instruction."""

from __future__ import annotations

import functools
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from marlinctl.kernels import jit
from marlinctl.kernels.configurations import DENSE, DENSE_SM90, SHARED_BYTES, SPARSE, SPARSE_SM90, Configuration
from tests.kernels.built import CUBINS
from tests.kernels.machine_code import MachineCode, disassemble
from tests.kernels.representatives import with_types

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA's compiler comes for Linux alone here")

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")  # as functions.architecture_of names them; those of Blackwell are below
RESERVED_BYTES = 1024  # of shared memory, by the system, in every CTA since sm_80
WORD_BYTES = 16  # what a lane fetches, copies and loads at once


Case = tuple[Configuration, torch.dtype, str, int]  # the last is group_shift()
CASES: list[Case] = [
    (c, dtype, a, 3) for c in (*DENSE, *SPARSE) for dtype in (torch.float16, torch.bfloat16) for a in ARCHITECTURES if c.fits(a)
]
# With wgmma the group size is compiled in: 128, and for the type that takes more registers one of the others, by turns.
HOPPER: list[Case] = [
    (c, dtype, "sm_90a", shift)
    for i, c in enumerate((*DENSE_SM90, *SPARSE_SM90))
    for dtype, shift in ((torch.float16, 3), (torch.bfloat16, 3), (torch.bfloat16, (1, 2, -1)[i % 3]))
]
# On Blackwell nothing of ours has run. NVRTC 13.0 spills some registers of the largest 2:4 tiles there. They stay: 32 rows at a time would
# decode every weight twice, and what these bytes cost has not been measured.
SPILLS = {
    **{("sparse-m64n256k128x3", dtype, a): 32 for dtype in (torch.float16, torch.bfloat16) for a in ("sm_120", "sm_121")},
    **{("sparse-m64n256k128x3", torch.bfloat16, a): 40 for a in ("sm_100", "sm_103", "sm_110")},
    **{("sparse-m64n256k256x3", torch.float16, a): 24 for a in ("sm_100", "sm_103", "sm_110")},
    **{("sparse-m64n256k256x3", torch.bfloat16, a): 56 for a in ("sm_100", "sm_103", "sm_110")},
}
BLACKWELL: list[Case] = [
    (c, dtype, a, 3) for a in jit.BLACKWELL for c in (*DENSE, *SPARSE) for dtype in (torch.float16, torch.bfloat16) if c.fits(a)
]


KERNELS = with_types(DENSE, SPARSE, DENSE_SM90, SPARSE_SM90, largest=True)
QUICK = [(c, dtype, "sm_90a" if c.wgmma else "sm_80", 3) for c, dtype in KERNELS]
# The smallest dense kernel and the 2:4 kernel with the most registers, by turns: what differs is the compiler's back end.
OTHERS = [(DENSE[0], torch.float16), (SPARSE[4], torch.bfloat16)]
QUICK += [(*OTHERS[i % 2], architecture, 3) for i, architecture in enumerate(("sm_89", "sm_90a", "sm_100", "sm_120"))]


def is_quick(case: Case) -> bool:
    """All 400 take minutes."""
    return case in QUICK


def parametrized(cases: list[Case]) -> pytest.MarkDecorator:
    """Those that are not quick are `slow`."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                (c, dtype, a, shift),
                id=f"{c.name}-{str(dtype).removeprefix('torch.')}-{a}-groups{16 << shift if shift > 0 else 'K'}",
                marks=[] if is_quick((c, dtype, a, shift)) else pytest.mark.slow,
            )
            for c, dtype, a, shift in cases
        ],
    )


EVERY = [[case for case in cases if is_quick(case) == quick] for cases in (CASES, HOPPER, BLACKWELL) for quick in (True, False)]
BATCH = 12  # kernels that are disassembled at once


def machine_code_of(case: Case) -> MachineCode:
    """Of one case, made together with that of its neighbours."""
    those = next(cases for cases in EVERY if case in cases)
    same = [other for other in those if (other[0].kernel, other[2]) == (case[0].kernel, case[2])]
    first = same.index(case) // BATCH * BATCH
    made = _batch(tuple(same[first : first + BATCH]))[case]
    if isinstance(made, BaseException):
        raise made
    return made


@functools.cache
def _batch(cases: tuple[Case, ...]) -> dict[Case, MachineCode | BaseException]:
    """The error, of those that are not compiled. Two at a time: the compiler leaves the interpreter alone while it works."""

    def build(case: Case) -> bytes:
        configuration, dtype, architecture, shift = case
        return jit.cubin(f"{configuration.kernel}.cu", configuration.defines(dtype, shift), architecture, CUBINS)

    with ThreadPoolExecutor(2) as pool:
        cubins = {case: pool.submit(build, case) for case in cases}
    good = [case for case in cases if not cubins[case].exception()]
    codes = disassemble(cases[0][0].kernel, cases[0][2], [cubins[case].result() for case in good])
    return {case: error for case in cases if (error := cubins[case].exception())} | dict(zip(good, codes, strict=True))


@parametrized(CASES)
def test_machine_code(case: Case) -> None:
    """If this failed, the kernel would be slow (spills, plain loads, conversions) or not start at all (registers)."""
    check_machine_code(case)


@parametrized(BLACKWELL)
def test_machine_code_for_blackwell(case: Case) -> None:
    """If this failed, the first user of an RTX 50 or a B200 would find a kernel that does not compile or start."""
    check_machine_code(case)
    assert_one_atomic(machine_code_of(case))


def check_machine_code(case: Case) -> None:
    configuration, dtype, architecture, _ = case
    code = machine_code_of(case)

    spilled = SPILLS.get((configuration.name, dtype, architecture), 0)
    assert code.stack <= spilled and code.local == 0, "a spill, or an array that is indexed at run time"
    assert (code.count(r"(LDL|STL)\b.*") == 0) or spilled
    assert code.shared <= RESERVED_BYTES, "shared memory beside the stages, which `shared_bytes` does not count"
    assert code.registers * configuration.threads * configuration.ctas <= 65536

    kind = r"\.BF16" if dtype == torch.bfloat16 else ""
    product = rf"HMMA\.SP\.16832\.F32{kind}" if configuration.sparse else rf"HMMA\.16816\.F32{kind}"
    tiles = configuration.k_step // configuration.tile_k // configuration.k_warps  # k tiles of a warp in a stage
    words = 4 // configuration.split
    slabs = configuration.tokens // 8
    assert code.count(product) == tiles * words * slabs, "each of a stage's products, once"
    assert code.count(r"HMMA.*") == code.count(product), "a product in the other type, or with a dense weight"

    # Weights and metadata of the first stages and of the loop; activations of the loop, as the first ones come through registers.
    weights = configuration.k_step * configuration.columns * (3 if configuration.sparse else 4) // 8
    activations = 2 * configuration.tokens * configuration.k_step
    copies = (configuration.stages * weights + activations) // WORD_BYTES // configuration.threads
    assert code.count(r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128(\.ZFILL)?") >= copies, "cp.async of 16 bytes, past L1"
    if configuration.sparse:  # 8 tokens x 32 k, and the metadata of eight words
        assert code.count(r"LDSM\.16\.M88\.4") == tiles * slabs + tiles * words // 8
        assert code.selectors["0x0"] == code.selectors["0x1"] == code.count(product) // 2, "the even words, and the odd ones"
        assert code.count(r"MOVM.*") == 0, "outputs lie as they are written"
    else:
        assert code.count(r"LDSM\.16\.M88\.4") == tiles * slabs // 2
        assert code.count(r"MOVM\.16\.MT88") >= words // configuration.k_warps * 2 * slabs
    assert code.count(r"LOP3\.LUT") >= 4 * tiles * words, "four and-or for each word"
    assert code.count(r"I2F.*|I2HP.*") <= 32, "numbers come out of lop3; what is left are the integer divisions of addresses"


SPILLED = {("wgmma-m64n384k128x5w", torch.bfloat16): 40}  # bytes of a thread's stack, at the end of a tile


@parametrized(HOPPER)
def test_machine_code_for_hopper(case: Case) -> None:
    """If this failed, the kernel would be slow (spills, serialized products, copies by threads) or hang (registers that are not there)."""
    configuration, dtype, _, shift = case
    code = machine_code_of(case)

    spilled = SPILLED.get((configuration.name, dtype), 0)
    assert code.stack <= spilled and code.local == 0, "a spill, or an array that is indexed at run time"
    assert spilled or code.count(r"(LDL|STL)\b.*") == 0
    assert code.shared <= RESERVED_BYTES, "shared memory beside the stages, which `shared_bytes` does not count"
    assert code.registers * configuration.threads * configuration.ctas <= 65536
    assert code.count(r"USETMAXREG\..*") == 2, "copying warps give registers, the others take them"

    kind = r"\.BF16" if dtype == torch.bfloat16 else ""
    product = rf"HGMMA(\.SP)?\.64x{configuration.tokens}x{configuration.tile_k}\.F32{kind}"
    tiles = configuration.k_step // configuration.tile_k // configuration.k_warps  # k tiles of a warp in a stage
    words = 4 // configuration.split
    assert code.count(product) == tiles * words, "each of a stage's products, once"
    assert code.count(r"HG?MMA.*") == code.count(product), "a product of another kind"
    sums_of_groups = shift >= 0 and "SCALE_WEIGHTS=0" in configuration.defines(dtype, shift)
    batch = min(configuration.batch, (16 << shift) // configuration.tile_k) if sums_of_groups else configuration.batch
    assert code.count(r"WARPGROUP\.ARRIVE") == tiles // batch, "ptxas has serialized the products, or split a batch"

    if not sums_of_groups:  # one for each batch, and one behind the last stage of a tile
        assert code.count(r"WARPGROUP\.DEPBAR\.LE") == tiles // batch + 1, "ptxas waits for products at the end of every stage"

    assert code.count(r"UTMALDG\.3D") == 1, "weights, one box of a tensor map for each stage"
    assert code.count(r"UBLKCP\..*") == configuration.sparse + (shift >= 0), "metadata and scales, by the copy engine"
    assert code.count(r"UTMALDG\.2D") > 0, "activations, boxes of a tensor map"
    assert code.count(r"LDGSTS.*") == 0, "a copy by threads"
    assert code.count(r"ACQBULK") > 0, "the wait for the grid before"
    assert code.count(r"PREEXIT") > 0, "and the next grid is let in"
    if configuration.sparse:
        assert code.selectors["0x0"] == code.selectors["0x1"] == code.count(product) // 2, "the even words, and the odd ones"
    assert code.count(r"LOP3\.LUT") >= 4 * tiles * words, "four and-or for each word"
    assert code.count(r"I2F.*|I2HP.*") <= 32, "numbers come out of lop3; what is left are the integer divisions of addresses"


@parametrized(CASES)
def test_the_sum_has_no_atomics(case: Case) -> None:
    """If this failed, the order of additions, and with it the last bits, could change from run to run."""
    assert_one_atomic(machine_code_of(case))


@parametrized(HOPPER)
def test_the_sum_on_hopper_has_no_atomics(case: Case) -> None:
    """As above."""
    assert_one_atomic(machine_code_of(case))


def assert_one_atomic(code: MachineCode) -> None:
    assert code.count(r"RED\b.*") == 0
    assert code.count(r"ATOM(G|S)?\b.*") == code.count(r"ATOMG?\.E\.ADD\.S32\.STRONG\.GPU") == 1, "one integer counter"


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *jit.BLACKWELL])
def test_every_architecture_has_a_kernel_for_every_m(architecture: str) -> None:
    """If this failed, sm_86 and sm_89, with 99 KB of shared memory, could not start what small or large M asks for."""
    assert {c.tokens for c in DENSE if c.shared_bytes <= 99 * 1024} == {8, 16, 32, 64}
    assert {c.tokens for c in DENSE if c.fits(architecture)} == {8, 16, 32, 64}


@pytest.mark.parametrize("configuration", [*DENSE, *SPARSE, *DENSE_SM90, *SPARSE_SM90], ids=lambda c: c.name)
def test_the_promised_ctas_fit(configuration: Configuration) -> None:
    """If this failed, registers would be saved for CTAs that shared memory does not let in, on any architecture."""
    assert (configuration.shared_bytes + RESERVED_BYTES) * configuration.ctas <= SHARED_BYTES["sm_90"] + RESERVED_BYTES


def test_names_are_unique() -> None:
    """If this failed, two configurations would share a row of every table."""
    names = [configuration.name for configuration in (*DENSE, *SPARSE, *DENSE_SM90, *SPARSE_SM90)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("configuration", [DENSE[0], SPARSE[0], DENSE_SM90[0], SPARSE_SM90[0]], ids=lambda c: c.kernel)
def test_host_and_kernel_agree_on_shared_memory(tmp_path: Path, configuration: Configuration) -> None:
    """If this failed, a change of the stages on one side alone would write past the end of shared memory."""
    wrong = [re.sub(r"SHARED_BYTES=\d+", "SHARED_BYTES=4096", define) for define in configuration.defines(torch.float16)]
    with pytest.raises(jit.CompilationFailed, match="the host allots other shared memory than the kernel uses"):
        jit.cubin(f"{configuration.kernel}.cu", wrong, "sm_90a" if configuration.wgmma else "sm_80", tmp_path)


def test_a_spill_would_be_seen() -> None:
    """If this failed, the checks above could not fail: 8 CTAs of 256 threads leave 32 registers, far too few."""
    tight = [re.sub(r"CTAS=\d+", "CTAS=8", define) for define in DENSE[0].defines(torch.float16)]
    (code,) = disassemble("marlin_sm80", "sm_80", [jit.cubin("marlin_sm80.cu", tight, "sm_80", CUBINS)])
    assert code.stack > 0
    assert code.count(r"(LDL|STL)\b.*") > 0


def test_serialized_products_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this failed, the check above could not fail: sums that are read before the wait for them make ptxas wait after every product."""
    broken = tmp_path / "csrc"
    shutil.copytree(jit.SOURCES, broken)
    source = broken / "products_sm90.cuh"
    wait = "wgmma_wait<0>();\n                arrived(group_sums);"
    assert wait in source.read_text("utf-8")
    source.write_text(source.read_text("utf-8").replace(wait, "arrived(group_sums);"), "utf-8")
    monkeypatch.setattr(jit, "SOURCES", broken)
    configuration = DENSE_SM90[0]
    (code,) = disassemble("marlin_sm90", "sm_90a", [jit.cubin("marlin_sm90.cu", configuration.defines(torch.float16), "sm_90a", CUBINS)])
    assert code.count(r"WARPGROUP\.ARRIVE") == code.count(r"HGMMA\..*")
