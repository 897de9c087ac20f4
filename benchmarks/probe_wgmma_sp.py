"""Where wgmma.sp expects its metadata: as mma.sp does? And of int8? Answered on a Hopper GPU.

    python benchmarks/probe_wgmma_sp.py

The PTX ISA draws the metadata of mma.sp.m16n8k32 and that of wgmma.mma_async.sp.m64nNk32 in different pictures, and Sparse-MARLIN stores
what the former wants. Here random survivors with random metadata are multiplied by both instructions, by four warps with the same
registers, with either sparsity selector, the lanes that the selector does not name holding other metadata; both results are compared
with the float64 product.

Of int8, m64nNk64, the map is found and not only tried. In a product of zeros one stored number is 1, of each lane, register and byte by
turns, or the metadata of one quad is another, of each lane and each four bits; and B says in binary which k they met. What comes out
must be what marlinctl/pack/tile.py (int8_meta_place) and csrc/sparse_marlin_a8_factored_sm90.cu assume. Then random numbers are multiplied.

Exits with 1 where anything is wrong.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from marlinctl.kernels import jit
from marlinctl.kernels.driver import done

SOURCE = """
#include "ptx_sm90.cuh"

template <int selector>
__device__ void probe(
    const unsigned (&a)[4], unsigned e, const unsigned (&b)[4], unsigned long long rows, float4* by_wgmma, float4* by_mma
) {
    float d[1][4] = {{0, 0, 0, 0}}, s[4] = {0, 0, 0, 0};
    wgmma_fence();
    wgmma_sparse_half<selector>(d, a, rows, e, false);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_arrived(d);
    mma_sparse_half<selector>(s, a, b, e);
    by_wgmma[threadIdx.x] = make_float4(d[0][0], d[0][1], d[0][2], d[0][3]);
    by_mma[threadIdx.x] = make_float4(s[0], s[1], s[2], s[3]);
}

extern "C" __global__ void both(const uint4* survivors, const unsigned* meta, const uint4* numbers, float4* by_wgmma, float4* by_mma) {
    __shared__ __align__(1024) uint4 rows[64];  // 8 tokens, 128 bytes each, of which 64 are used
    const unsigned lane = threadIdx.x % 32;
    if (threadIdx.x < 32) rows[threadIdx.x / 4 * 8 + (threadIdx.x % 4 ^ threadIdx.x / 4)] = numbers[threadIdx.x];
    fence_proxy_async();
    __syncthreads();
    const uint4 four = survivors[threadIdx.x];
    const unsigned a[4] = {four.x, four.y, four.z, four.w};
    unsigned b[4];
    for (int i = 0; i < 4; ++i) b[i] = reinterpret_cast<const unsigned*>(numbers)[lane / 4 * 16 + i * 4 + lane % 4];
    const unsigned long long at = describe_rows(shared_address(rows));
    probe<0>(a, meta[threadIdx.x], b, at, by_wgmma, by_mma);
    probe<1>(a, meta[threadIdx.x], b, at, by_wgmma + 128, by_mma + 128);
}
"""
INT8_SOURCE = """
#include "ptx_sm90.cuh"

extern "C" __global__ void product(const uint4* survivors, const unsigned* meta, const uint4* numbers, int4* sums) {
    __shared__ __align__(1024) uint4 rows[64];  // 8 tokens, 128 bytes each, of which 64 are used
    const unsigned thread = blockIdx.x * 128 + threadIdx.x;
    if (threadIdx.x < 32) rows[threadIdx.x / 4 * 8 + (threadIdx.x % 4 ^ threadIdx.x / 4)] = numbers[threadIdx.x];
    fence_proxy_async();
    __syncthreads();
    const uint4 four = survivors[thread];
    const unsigned a[4] = {four.x, four.y, four.z, four.w};
    int d[1][4] = {{0, 0, 0, 0}};
    wgmma_fence();
    wgmma_sparse_int8(d, a, describe_rows(shared_address(rows)), meta[thread], false);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_arrived(d);
    sums[thread] = make_int4(d[0][0], d[0][1], d[0][2], d[0][3]);
}
"""
FIRST_TWO, LAST_TWO = 0x4, 0xE  # of a quad: metadata
PAIRS = torch.tensor([(first, second) for second in range(4) for first in range(second)])


def main() -> int:
    torch.manual_seed(0)
    return int(not (half() & int8()))


def launched(source: str, defines: tuple[str, ...], name: str, ctas: int, tensors: list[torch.Tensor]) -> None:
    """The kernel of this source, with 128 threads in each of its CTAs."""
    from cuda.bindings import driver, nvrtc

    code = jit._compile(nvrtc, "probe.cu", {**jit.texts_of(jit.SOURCES), "probe.cu": source}, jit.flags_for(defines, "sm_90a"))
    library = done(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
    function = done(driver.cuKernelGetFunction(done(driver.cuLibraryGetKernel(library, name.encode()))))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    table = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
    done(driver.cuLaunchKernel(function, ctas, 1, 1, 128, 1, 1, 0, torch.cuda.current_stream().cuda_stream, ctypes.addressof(table), 0))
    torch.cuda.synchronize()


def half() -> bool:
    survivors = torch.randn(64, 16).half()  # of each selector's A the same
    places = PAIRS[torch.randint(6, (2, 64, 8))]  # [selector, row, quad, 2]
    numbers = torch.randn(8, 32).half()
    nibbles = places[..., 0] + 4 * places[..., 1]
    meta = torch.zeros(128, dtype=torch.int64)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        selector, half = divmod(lane % 4, 2)
        for upper in range(2):
            for quad in range(4):
                meta[thread] |= nibbles[selector, 16 * warp + lane // 4 + 8 * upper, 4 * half + quad] << (16 * upper + 4 * quad)
    lanes = torch.arange(128)
    row, column = 16 * (lanes // 32) + lanes % 32 // 4, 2 * (lanes % 4)
    fragment = torch.stack([survivors[row + r, column + k + i] for k in (0, 8) for r in (0, 8) for i in (0, 1)], 1)  # a0 .. a3

    inputs = [fragment.cuda(), meta.to(torch.int32).cuda(), numbers.cuda()]
    outputs = [torch.full((2, 128, 4), torch.nan, device="cuda") for _ in range(2)]
    launched(SOURCE, ("TOKENS=8",), "both", 1, [*inputs, *outputs])

    wrong = False
    for selector in range(2):
        dense = torch.zeros(64, 32, dtype=torch.float64)
        k = 4 * torch.arange(8)[:, None] + places[selector]  # [row, quad, 2]
        dense.scatter_(1, k.reshape(64, 16), survivors.double())
        exact = dense @ numbers.double().T  # [64, 8]
        expected = torch.stack([exact[row + r, column + i] for r in (0, 8) for i in (0, 1)], 1)
        for name, output in zip(("wgmma.sp", "mma.sp"), outputs, strict=True):
            error = (output[selector].cpu().double() - expected).abs()
            agrees = bool((error < 1e-4).all())  # 16 products of float16 numbers, added up in float32
            wrong |= not agrees
            print(f"{name:8} selector {selector}: {'agrees' if agrees else 'WRONG'}, largest error {float(error.max()):.1e}", flush=True)
            if not agrees:
                print(f"  threads that are wrong: {(~(error < 1e-4)).any(1).nonzero().flatten().tolist()}")
    return not wrong


def products(survivors: torch.Tensor, meta: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int8 [i, 128, 16], int64 [i, 128] and int8 [8, 64] -> int32 [i, 64, 8]: products with each of i."""
    sums = torch.full((len(survivors), 128, 4), -1, dtype=torch.int32, device="cuda")
    words = torch.where(meta < 2**31, meta, meta - 2**32).to(torch.int32)
    inputs = [tensor.contiguous().cuda() for tensor in (survivors, words, numbers)]
    launched(INT8_SOURCE, ("TOKENS=8", "EIGHT_BIT=1"), "product", len(survivors), [*inputs, sums])
    d = sums.cpu().view(-1, 4, 8, 4, 2, 2)  # [i, warp, lane // 4, lane % 4, row 8 below, column]
    return d.permute(0, 1, 4, 2, 3, 5).reshape(-1, 64, 8)


def said(sums: torch.Tensor) -> torch.Tensor:
    """[i, 64, 8] -> [i, warp, 2]: the only row of a warp's 16 that is not 0, and the k that it says (columns 0 .. 5), or -1."""
    rows = sums.view(-1, 4, 16, 8)
    there = rows[..., 7] == 1
    row = there.int().argmax(-1)
    found = rows.gather(2, row[..., None, None].expand(-1, -1, 1, 8))[:, :, 0]
    alone = (there.sum(-1) == 1) & (rows.abs().sum((2, 3)) == found.abs().sum(-1))
    k = (found[..., :6] << torch.arange(6)).sum(-1)
    return torch.where(alone[..., None], torch.stack([row, k], -1), -1)


def int8() -> bool:
    """Whether lanes, bytes and metadata of the int8 product are where the kernel for 2:4 weights and int8 activations assumes them."""
    lane, byte, nibble = torch.arange(32), torch.arange(16), torch.arange(8)
    binary = torch.cat([torch.arange(64) >> torch.arange(6)[:, None] & 1, torch.zeros(1, 64), torch.ones(1, 64)]).to(torch.int8)  # [8, 64]
    fine = True

    # Stored numbers: with metadata that name the first two of each quad, place p of a row is k = 4 (p // 2) + p % 2.
    survivors = torch.zeros(32, 16, 4, 32, 16, dtype=torch.int8)
    survivors[lane[:, None], byte, :, lane[:, None], byte] = 1
    found = said(products(survivors.view(512, 128, 16), torch.full((512, 128), FIRST_TWO * 0x11111111), binary)).view(32, 16, 4, 2)
    place = 4 * (lane[:, None] % 4) + byte % 4 + 16 * (byte // 8)
    expected = torch.stack([(lane[:, None] // 4 + 8 * (byte // 4 % 2)).expand(32, 16), 4 * (place // 2) + place % 2], -1)
    fine &= told("stored numbers", found, expected, ("lane", "byte"))

    # Metadata: all stored numbers are 1, and only the third of each quad of B is not 0. One quad's metadata names its last two.
    meta = torch.full((32, 8, 4, 32), FIRST_TWO * 0x11111111)
    meta[lane[:, None], nibble, :, lane[:, None]] += ((LAST_TWO - FIRST_TWO) << 4 * nibble)[:, None]
    third = binary * (torch.arange(64) % 4 == 2)
    found = said(products(torch.ones(256, 128, 16, dtype=torch.int8), meta.view(256, 128), third.to(torch.int8))).view(32, 8, 4, 2)
    quad = 8 * (lane[:, None] % 4 // 2) + nibble
    expected = torch.stack([(lane[:, None] // 4 + 8 * (lane[:, None] % 2)).expand(32, 8), 4 * quad + 2], -1)
    fine &= told("metadata", found, expected, ("lane", "nibble"))

    # Random ones.
    stored, numbers = torch.randint(-128, 128, (64, 32)), torch.randint(-128, 128, (8, 64))
    places = PAIRS[torch.randint(6, (64, 16))]  # [row, quad, 2]
    nibbles = places[..., 0] + 4 * places[..., 1]
    thread = torch.arange(128)
    row = 16 * (thread // 32) + thread % 32 // 4
    registers = [stored[row + 8 * (i % 2)][thread[:, None], 4 * (thread[:, None] % 4) + torch.arange(4) + 16 * (i // 2)] for i in range(4)]
    its_quads = nibbles[row + 8 * (thread % 2)][thread[:, None], 8 * (thread[:, None] % 4 // 2) + nibble]
    words = (its_quads << 4 * nibble).sum(-1)
    sums = products(torch.cat(registers, 1).to(torch.int8)[None], words[None], numbers.to(torch.int8))[0]
    dense = torch.zeros(64, 64, dtype=torch.int64).scatter_(1, (4 * torch.arange(16)[:, None] + places).view(64, 32), stored)
    agrees = torch.equal(sums.long(), dense @ numbers.T)
    print(f"int8     random numbers: {'agree' if agrees else 'WRONG'}", flush=True)
    return fine and agrees


def told(what: str, found: torch.Tensor, expected: torch.Tensor, axes: tuple[str, str]) -> bool:
    """found [lane, i, warp, 2] and expected [lane, i, 2]: row and k."""
    wrong = (found != expected[:, :, None]).any(-1).any(-1)
    print(f"int8     {what}: {'as assumed in all lanes' if not wrong.any() else f'OTHERWISE in {int(wrong.sum())} places'}", flush=True)
    for one, i in wrong.nonzero().tolist():
        print(f"  {axes[0]} {one:2} {axes[1]} {i:2}: row, k {found[one, i, 0].tolist()}, assumed {expected[one, i].tolist()}")
    return not bool(wrong.any())


if __name__ == "__main__":
    sys.exit(main())
