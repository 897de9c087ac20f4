// Dense INT4 x 16-bit GEMM for Hopper:  out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N])
//
//   activations  [M, K]        float16 or bfloat16
//   qweight      [K'/16, 2N']  int32, MARLIN tiles            N', K' are N, K rounded up to 64 (docs/formats/marlin.md)
//   scales       [G', N']      float16, in MARLIN order       groups of 32, 64 or 128 in K, or one for all of K
//   out          [M, N]        as activations
//
// THE TRANSPOSED PRODUCT, as in marlin_sm80.cu, with wgmma: D = A . B, 64 rows of A in the registers of four warps, 16 each, and B in
// shared memory. A MARLIN word is the A fragment of its lane, so a warp takes 64 columns of the weight and wgmma number j of a
// warpgroup multiplies word j of every lane. Which columns the 64 rows of D are is a matter of writing them only:
//
//   a warpgroup, one step of 16 in k          m 0 .. TOKENS-1
//
//                 k 0..15                     ┌─────────────┐
//              ┌──────────┐             k 0   │             │    B: activations [m, k] as they lie, rows of 128 bytes,
//     warp 0   │  word j  │ 16           .    │      B      │       swizzled; one descriptor for all
//              ├──────────┤             k 15  └─────────────┘
//     warp 1   │  word j  │  x                ┌─────────────┐
//              ├──────────┤       row t/4     │             │    D: float32, as that of mma.m16n8 for each 8 tokens
//     warp 2   │  word j  │       (+ 8) of    │      D      │
//              ├──────────┤       a warp's    │             │
//     warp 3   │  word j  │       16          │             │
//              └──────────┘                   └─────────────┘
//
// While the tensor core works on a batch of steps, the warp decodes the words of the next batch into the other half of its A
// registers. Every batch begins with a synchronization of the four warps (wgmma.fence): where that costs time, a batch is more than one step.
//
// THE SCALES.  SCALE_WEIGHTS = 0: sums of a group are scaled in float32 (tile.cuh). The group is known to the compiler, so the loop
// below is straight: GROUP_SHIFT = log2(group_size / 16), -1 for channel-wise. SCALE_WEIGHTS = 1: codes are scaled before they are
// multiplied, code * scale rounded once to 16 bits, which is the definition of the decoded weight. With many tokens the sums of a group
// are expensive: they take as many registers as the sums, an fma each, and the tensor core is idle until they are added.
//
// Out of bounds: activations and words become zeros; rows of scales beyond the last one are copies of it, and their columns keep the
// previous content of the stage. That is safe: any word decodes to finite codes, and columns out of bounds are not written.
//
// LIMITS.  N and K multiples of 8 (rows of 16 bytes), everything aligned to 16 bytes; 2^31 units.
//
// MEASURED.  NVIDIA H200, 2026-12-01, microseconds in a CUDA graph, with overlap, groups of 128, float16, one call:
//
//   M                32       64       96      128      256
//   73728 x 18432    197      300      373      474      939
//   torch.matmul     616      643      641      654     1004
//
// Limited by the GPU's 700 W power cap from 64 tokens on (docs/log/2026-11-22-power-and-tensor-maps.md, 2026-12-01-copies-and-order.md).
#include "write_marlin.cuh"
#include "gemm_sm90.cuh"
#include "products_sm90.cuh"

__device__ __forceinline__ void multiply_async(Half, float (&d)[SLABS][4], const unsigned (&a)[4], unsigned long long b, bool keep) {
    wgmma_half(d, a, b, keep);
}
__device__ __forceinline__ void multiply_async(BFloat, float (&d)[SLABS][4], const unsigned (&a)[4], unsigned long long b, bool keep) {
    wgmma_bfloat(d, a, b, keep);
}

struct DenseWeights {
    static constexpr int TILE_K = 16, META_BYTES = 0;
    // With one, the compiler decodes a word right behind its load, and the latency of shared memory shows where decoding is longest: M=64
    // 374 us with one, 364 with two; up to 32 tokens, and with 2:4, one is as fast or faster.
    static constexpr int AHEAD = SCALE_WEIGHTS ? 2 : 1;

    static __device__ __forceinline__ unsigned metadata_at(const unsigned&, int, unsigned, const ThreadRole&) { return 0; }
    static __device__ __forceinline__ void load_metadata(unsigned (&)[2][4], const unsigned&, int) {}

    static __device__ __forceinline__ void multiply(
        Sums& sums, const unsigned (&fragments)[WORDS][4], unsigned long long b, const unsigned (&)[2][4], int, bool keep
    ) {
#pragma unroll
        for (int word = 0; word < WORDS; ++word) multiply_async(NUMBER(), sums[word], fragments[word], b, keep);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + COPY_THREADS, CTAS) marlin_sm90(
    const __grid_constant__ TensorMap activations,  // [M, K] 16-bit, in boxes of TOKENS x 64
    const __grid_constant__ TensorMap qweight,      // [K'/16, N'/64] of 512 bytes (32 lanes, four words), in boxes of K_STEP/16 x BLOCKS
    const char* __restrict__ scales,       // [G', N'] float16
    const unsigned short* __restrict__ bias,  // [N] as activations, or null
    unsigned* __restrict__ out,            // [M, N/2] pairs
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS], of a tile's CTAs; null in clusters, as counters
    int* __restrict__ counters,            // [tiles of n][tiles of m], zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int whole,                             // tiles that each CTA computes alone (stripes.cuh)
    int                                    // group_shift, which is GROUP_SHIFT here
) {
    const Output output{scales, bias, out, m, n, GROUPED};
    gemm_sm90<SixteenBitProducts<DenseWeights>>(activations, qweight, nullptr, nullptr, scales, output, partials, counters, m, n, k, whole);
}
