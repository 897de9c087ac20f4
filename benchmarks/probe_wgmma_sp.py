"""Where wgmma.sp expects its metadata: as mma.sp does? Answered on a Hopper GPU.

    python benchmarks/probe_wgmma_sp.py

The PTX ISA draws the metadata of mma.sp.m16n8k32 and that of wgmma.mma_async.sp.m64nNk32 in different pictures, and Sparse-MARLIN stores
what the former wants. Here random survivors with random metadata are multiplied by both instructions, by four warps with the same
registers, with either sparsity selector, the lanes that the selector does not name holding other metadata; both results are compared
with the float64 product. Exits with 1 where either is wrong.
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
PAIRS = torch.tensor([(first, second) for second in range(4) for first in range(second)])


def main() -> int:
    from cuda.bindings import driver, nvrtc

    torch.manual_seed(0)
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

    flags = jit.flags_for(("TOKENS=8",), "sm_90a")
    code = jit._compile(nvrtc, "probe.cu", {**jit.texts_of(jit.SOURCES), "probe.cu": SOURCE}, flags)
    inputs = [fragment.cuda(), meta.to(torch.int32).cuda(), numbers.cuda()]
    outputs = [torch.full((2, 128, 4), torch.nan, device="cuda") for _ in range(2)]
    function = done(
        driver.cuKernelGetFunction(done(driver.cuLibraryGetKernel(done(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0)), b"both")))
    )
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*inputs, *outputs)]
    table = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(pointer) for pointer in pointers))
    done(driver.cuLaunchKernel(function, 1, 1, 1, 128, 1, 1, 0, torch.cuda.current_stream().cuda_stream, ctypes.addressof(table), 0))
    torch.cuda.synchronize()

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
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
