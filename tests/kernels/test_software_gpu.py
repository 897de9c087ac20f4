"""The software GPU's 8-bit products, its byte permutes, named barriers and boxes of bytes, against the PTX ISA in plain Python.

What 16-bit kernels use of it is tested by their products (test_marlin_source.py).
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.kernels.built import SOFTWARE_GPU, kernel_library
from tests.kernels.software_kernel import Arguments, aligned

TOKENS = 24
PROGRAM = """
#include "ptx_sm90.cuh"
const unsigned gpu::CTA_THREADS = 128;

extern "C" __attribute__((visibility("default"))) unsigned permute_of(unsigned a, unsigned b, unsigned selector) {
    return permute(a, b, selector);
}

// Four int8 of row `row`, from column `column` on, of a matrix whose rows have `pitch` bytes.
unsigned four(const char* matrix, unsigned pitch, unsigned row, unsigned column) {
    return *reinterpret_cast<const unsigned*>(matrix + row * pitch + column);
}
void load_a(unsigned (&a)[4], const char* matrix, unsigned pitch, unsigned first_row, unsigned k) {
    const unsigned row = first_row + threadIdx.x % 32 / 4, column = k + threadIdx.x % 4 * 4;
    a[0] = four(matrix, pitch, row, column);
    a[1] = four(matrix, pitch, row + 8, column);
    a[2] = four(matrix, pitch, row, column + 16);
    a[3] = four(matrix, pitch, row + 8, column + 16);
}
void store(int* out, unsigned columns, unsigned first_row, unsigned slab, const int (&d)[4]) {
    for (int i = 0; i < 4; ++i)
        out[(first_row + threadIdx.x % 32 / 4 + i / 2 * 8) * columns + slab * 8 + threadIdx.x % 4 * 2 + i % 2] += d[i];
}

// out [16, 8] += a [16, 32] times b [8, 32] transposed
void one_mma(const char* a, const char* b, int* out) {
    if (threadIdx.x >= 32) return;
    unsigned fragment[4];
    load_a(fragment, a, 32, 0, 0);
    int d[4] = {1, 2, 3, 4};
    mma_int8(d, fragment, four(b, 32, threadIdx.x / 4, threadIdx.x % 4 * 4), four(b, 32, threadIdx.x / 4, threadIdx.x % 4 * 4 + 16));
    store(out, 8, 0, 0, d);
}

// out [64, TOKENS] += a [64, 256] times b [m, k] transposed, whose rows from 3 on and columns from 128 on are the second box
void one_tile(const char* a, const char* b, int* out, unsigned m, unsigned k, bool early) {
    const unsigned at = 1024, barrier = 0;
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_arrive_expecting(barrier, 2 * TOKENS * 128);
        const TensorMap map{b, k, m, 1};
        for (int box = 0; box < 2; ++box) copy_box(at + box * TOKENS * 128, map, box * 128, 3, barrier);
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    int d[TOKENS / 8][4];
    unsigned fragments[2][4];
    for (int step = 0; step < 8; ++step) {
        auto& fragment = fragments[step % 2];
        if (step >= 2 && !early) wgmma_wait<1>();
        load_a(fragment, a, 256, threadIdx.x / 32 * 16, step * 32);
        wgmma_int8(d, fragment, describe_rows(at + step / 4 * TOKENS * 128 + step % 4 * 32), step > 0);
        wgmma_commit();
    }
    wgmma_wait<0>();
    wgmma_arrived(d);
    for (int slab = 0; slab < TOKENS / 8; ++slab) store(out, TOKENS, threadIdx.x / 32 * 16, slab, d[slab]);
}

// Two warps fill what the other two read, several times: each waits for the other.
void hand_over(int* out, bool too_early) {
    unsigned* const number = reinterpret_cast<unsigned*>(shared);
    const bool producer = threadIdx.x < 64;
    for (int round = 0; round < 5; ++round) {
        if (producer) {
            if (round) named_barrier_sync<128>(3);
            number[threadIdx.x] = round;
            named_barrier_arrive<128>(2);
        } else {
            const unsigned before = number[threadIdx.x - 64];
            named_barrier_sync<128>(2);
            out[threadIdx.x - 64] += (too_early ? before : number[threadIdx.x - 64]) == static_cast<unsigned>(round);
            if (round < 4) named_barrier_arrive<128>(3);
        }
    }
}

void gpu::run_thread(const Arguments& g) {
    const char* const b = static_cast<const char*>(g.qweight);
    int* const out = static_cast<int*>(g.out);
    if (g.whole == 0) one_mma(g.activations, b, out);
    if (g.whole == 1 || g.whole == 2) one_tile(g.activations, b, out, g.m, g.k, g.whole == 2);
    if (g.whole >= 3) hand_over(out, g.whole == 4);
}
"""
MMA, TILE, TILE_TOO_EARLY, HAND_OVER, HAND_OVER_TOO_EARLY = range(5)
ORDERS = [(False, False), (True, True)]  # everything as late as may be, and as early with the last thread first


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("software-gpu")
    (folder / "main.cpp").write_text(PROGRAM)
    files = {name: (SOFTWARE_GPU / name).read_text("utf-8") for name in ("ptx.cuh", "ptx_sm90.cuh")}
    defines = [f"TOKENS={TOKENS}", "BLOCKS=1", "K_STEP=128", "SPARSE=0"]
    return ctypes.CDLL(str(kernel_library(files, defines, folder / "build", folder / "main.cpp")))


def run(library: ctypes.CDLL, what: int, a: Tensor, b: Tensor, out: Tensor, order: tuple[bool, bool]) -> Tensor:
    a, b, out = aligned(a), aligned(b), out.clone()
    given = Arguments(activations=a.data_ptr(), qweight=b.data_ptr(), out=out.data_ptr(), m=b.shape[0], k=b.shape[1], whole=what)
    library.launch(given, (ctypes.c_int * 1)(0), 1, 1, *(ctypes.c_bool(flag) for flag in order))
    return out


def int8(*shape: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def test_permute_takes_bytes_and_signs(library: ctypes.CDLL) -> None:
    """If this failed, decoded weights would be right here and wrong on a GPU. PTX ISA 9.7.9.7: bit 3 of a nibble spreads the sign."""
    library.permute_of.restype = ctypes.c_uint
    a, b = 0x83726150, 0x07F6E5D4
    both = [0x50, 0x61, 0x72, 0x83, 0xD4, 0xE5, 0xF6, 0x07]
    chosen = [*both, *(0xFF if byte & 0x80 else 0 for byte in both)]
    for selector in [0x6420, 0x7531, 0x0040, 0x5410, 0xFEDC, 0xBA98, 0x3B0C, *(0x1111 * i for i in range(16))]:
        wanted = sum(chosen[selector >> 4 * i & 15] << 8 * i for i in range(4))
        assert library.permute_of(a, b, selector | 0xABCD0000) == wanted, hex(selector)


@pytest.mark.parametrize("order", ORDERS)
def test_mma_of_int8(library: ctypes.CDLL, order: tuple[bool, bool]) -> None:
    """If this failed, kernels for sm_80 would be tested against another instruction than the hardware's."""
    a, b = int8(16, 32, seed=1), int8(8, 32, seed=2)
    out = run(library, MMA, a, b, torch.zeros(16, 8, dtype=torch.int32), order)
    start = torch.tensor([[1, 2] * 4] * 8 + [[3, 4] * 4] * 8)
    assert torch.equal(out.long(), a.long() @ b.long().T + start)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("m", "k"), [(40, 256), (12, 192), (27, 144)])
def test_wgmma_of_int8_with_boxes_of_bytes(library: ctypes.CDLL, m: int, k: int, order: tuple[bool, bool]) -> None:
    """If this failed, the 8-bit kernel would be tested against another swizzle, another fragment, or activations beyond the matrix."""
    a, b = int8(64, 256, seed=m), int8(m, k, seed=k)
    seen = torch.zeros(TOKENS, 256, dtype=torch.int64)  # tokens from 3 on, zeros beyond M and K
    seen[: m - 3, :k] = b[3 : 3 + TOKENS].long()
    out = run(library, TILE, a, b, torch.full((64, TOKENS), 5, dtype=torch.int32), order)
    assert torch.equal(out.long(), a.long() @ seen.T + 5)


def test_registers_under_way_are_seen(library: ctypes.CDLL) -> None:
    """If this failed, a kernel that decodes over the operand of a running product would pass."""
    a, b = int8(64, 256, seed=3), int8(40, 256, seed=4)
    out = run(library, TILE_TOO_EARLY, a, b, torch.zeros(64, TOKENS, dtype=torch.int32), ORDERS[0])
    assert bool((out >= 2**29).all())


@pytest.mark.parametrize("order", ORDERS)
def test_named_barriers_hand_over(library: ctypes.CDLL, order: tuple[bool, bool]) -> None:
    """If this failed, warps that arrive would wait, or those that wait would not."""
    nothing = int8(1, 1, seed=0)
    for _ in range(2):  # a launch leaves nothing behind
        out = run(library, HAND_OVER, nothing, nothing, torch.zeros(64, dtype=torch.int32), order)
        assert bool((out == 5).all())


def test_a_missing_wait_is_seen(library: ctypes.CDLL) -> None:
    """If this failed, the test above could not fail: some read before others have written."""
    nothing = int8(1, 1, seed=0)
    outs = [run(library, HAND_OVER_TOO_EARLY, nothing, nothing, torch.zeros(64, dtype=torch.int32), order) for order in ORDERS]
    assert any(bool((out < 5).any()) for out in outs)
