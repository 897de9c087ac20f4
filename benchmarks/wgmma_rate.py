"""How many clocks a multiprocessor takes for a wgmma with A in registers, alone and with the decoding of its word before it. Needs Hopper.

    python benchmarks/wgmma_rate.py [--rounds 2000]

Every multiprocessor runs one CTA of `warpgroups` that do nothing else: no memory, no ends of tiles. `words` products share a wgmma.fence
and are under way while the next are prepared; "decoding" makes each of them from a word first, codes times scales, as marlin_sm90.cu
does from 48 tokens on. docs/log/2026-11-21-sharing-tiles.md has what an H200 says.
"""

from __future__ import annotations

import argparse
import ctypes
import sys

import torch

from marlinctl.kernels import jit
from marlinctl.kernels.driver import done

SOURCE = """
#include "ptx_sm90.cuh"
#include "dequantize.cuh"

extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS, 1) rate(unsigned* clocks, unsigned* never, int rounds) {
    extern __shared__ __align__(1024) unsigned rows[];  // TOKENS rows of 128 bytes: finite numbers
    for (unsigned i = threadIdx.x; i < TOKENS * 32; i += blockDim.x) rows[i] = 0x3c003c00u ^ (i * 2654435761u & 0x03ff03ff);
    __syncthreads();
    fence_proxy_async();
    float d[WORDS][TOKENS / 8][4] = {};
    unsigned a[2][WORDS][4], words[WORDS];
    for (int w = 0; w < WORDS; ++w) {
        words[w] = (threadIdx.x * 97 + w * 31) * 2654435761u;
        for (int half = 0; half < 2; ++half) dequantize<Half>(a[half][w], words[w]);
    }
    const Half::Scale scale = Half::scale(0x2c00 + threadIdx.x % 7);
    const unsigned long long b = describe_rows(shared_address(rows));
    const long long start = clock64();
    for (int round = 0; round < rounds; round += 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (DECODING) {
#pragma unroll
                for (int w = 0; w < WORDS; ++w) {
                    words[w] = words[w] * 1664525u + 1013904223u;
                    dequantize<Half>(a[half][w], words[w]);
                    scale_fragment<Half>(a[half][w], scale, scale);
                }
            }
            wgmma_fence();
#pragma unroll
            for (int w = 0; w < WORDS; ++w) {
                if (SPARSE) wgmma_sparse_half<0>(d[w], a[half][w], b + 2 * (w % 2), 0x44444444u, true);
                else wgmma_half(d[w], a[half][w], b + 2 * (w % 4), true);
            }
            wgmma_commit();
            wgmma_wait<1>();
        }
    }
    wgmma_wait<0>();
    const long long end = clock64();
    float sum = 0;
    for (int w = 0; w < WORDS; ++w)
        for (int slab = 0; slab < TOKENS / 8; ++slab)
            for (int i = 0; i < 4; ++i) sum += d[w][slab][i];
    if (sum == 1.2345f) *never = 1;  // or nothing would be computed
    if (threadIdx.x == 0) clocks[blockIdx.x] = static_cast<unsigned>(end - start);
}
"""
SHARED_BYTES = 128 * 128  # 128 rows
SHAPES = ((1, 4), (2, 4), (2, 2), (3, 2), (4, 1))  # warpgroups, words: as many sums as registers hold are tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2000, help="batches of products of each warpgroup; even")
    rounds = parser.parse_args().rounds
    print(f"{torch.cuda.get_device_name()}, clocks of a multiprocessor for each wgmma; by the data sheet N / 2")
    for sparse, decoding in ((0, 0), (1, 0), (0, 1)):
        for tokens in (8, 16, 32, 64, 96, 128):
            found = {}
            for warpgroups, words in SHAPES:
                if tokens * words <= 256:  # 128 sums in a thread, and room for the rest
                    found[f"{warpgroups} x {words}"] = measure(tokens, warpgroups, words, sparse, decoding, rounds)
            what = f"{'2:4' if sparse else 'dense'}{', decoding' if decoding else ''}, N={tokens}"
            print(f"{what:22}", "  ".join(f"{name}: {clocks:.1f}" for name, clocks in found.items()), flush=True)
    return 0


def measure(tokens: int, warpgroups: int, words: int, sparse: int, decoding: int, rounds: int) -> float:
    """Clocks of a multiprocessor for one product, the mean over multiprocessors of the second launch."""
    from cuda.bindings import driver

    ctas = torch.cuda.get_device_properties(0).multi_processor_count
    clocks, never = torch.zeros(ctas, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")  # and a context
    code = compiled(tokens, warpgroups, words, sparse, decoding)
    function = done(
        driver.cuKernelGetFunction(done(driver.cuLibraryGetKernel(done(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0)), b"rate")))
    )
    given = [ctypes.c_void_p(clocks.data_ptr()), ctypes.c_void_p(never.data_ptr()), ctypes.c_int(rounds)]
    table = (ctypes.c_void_p * len(given))(*(ctypes.addressof(one) for one in given))
    for _ in range(2):
        stream = torch.cuda.current_stream().cuda_stream
        done(driver.cuLaunchKernel(function, ctas, 1, 1, 128 * warpgroups, 1, 1, SHARED_BYTES, stream, ctypes.addressof(table), 0))
        torch.cuda.synchronize()
    return float(clocks.double().mean()) / (rounds * warpgroups * words)


def compiled(tokens: int, warpgroups: int, words: int, sparse: int, decoding: int) -> bytes:
    """Machine code for sm_90a. It needs no GPU."""
    from cuda.bindings import nvrtc

    sizes = {"NUMBER": "Half", "TOKENS": tokens, "WARPGROUPS": warpgroups, "WORDS": words, "SPARSE": sparse, "DECODING": decoding}
    flags = jit.flags_for([f"{name}={value}" for name, value in sizes.items()], "sm_90a")
    return jit._compile(nvrtc, "rate.cu", {**jit.texts_of(jit.SOURCES), "rate.cu": SOURCE}, flags)


if __name__ == "__main__":
    sys.exit(main())
