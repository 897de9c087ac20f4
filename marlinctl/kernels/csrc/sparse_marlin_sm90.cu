// 2:4 INT4 x 16-bit GEMM for Hopper:  out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N])
//
//   activations  [M, K]        float16 or bfloat16
//   qweight      [K'/32, 2N']  int32, Sparse-MARLIN tiles     N', K' are N, K rounded up to 64 (docs/formats/marlin_24.md)
//   meta         [K'/32, 2N']  int16, which two of each four neighbours in k the codes of qweight are
//   scales       [G', N']      float16, in Sparse-MARLIN order    groups of 32, 64 or 128 in K, or one for all of K
//   out          [M, N]        as activations
//
// marlin_sm90.cu with wgmma.sp: roles, ring, scales and the half of A registers that is decoded while the tensor core reads the
// other are explained there. The differences are those that sparse_marlin_sm80.cu explains for mma.sp:
//
//   a warpgroup, one step of 32 in k          m 0 .. TOKENS-1
//
//                    k 0..31                  ┌─────────────┐
//              ┌───────────────────┐    k 0   │             │    B: activations [m, k] as they lie, rows of 128 bytes,
//     warp 0   │ word j, kept      │ 16  .    │      B      │       swizzled; half a row is a step
//              ├───────────────────┤     .    │             │
//     warp 1   │ word j,  metadata │    k 31  └─────────────┘    D: of a lane, with g = t/4, the outputs n = 8g + j and
//              ├───────────────────┤          ┌─────────────┐       8g + 4 + j of its warp's block: over all words eight
//     warp 2   │ word j            │          │             │       neighbours
//              ├───────────────────┤          │      D      │
//     warp 3   │ word j            │          │             │
//              └───────────────────┘          └─────────────┘
//
// METADATA of a warp's 16 rows lies in its lanes as for mma.sp.m16n8k32: of each four lanes two, which the selector names, the first
// for k 0..15, the second for k 16..31; low half of a register row t/4, high half row t/4 + 8. One ldmatrix brings that of two steps.
//
// Metadata of columns out of bounds is the previous content of the stage, at first uninitialised. The result of wgmma.sp is undefined for
// invalid metadata, but only in the rows of D that the metadata belongs to, and those are not written.
//
// LIMITS.  As marlin_sm90.cu.
//
// MEASURED.  NVIDIA H200, 2026-12-01, microseconds in a CUDA graph, with overlap, groups of 128, float16, one call:
//
//   M                64       96      128      256
//   73728 x 18432    206      254      332      652
//   torch.matmul     644      641      656     1055
//
// It is limited by the GPU's 700 W power cap: docs/log/2026-11-22-power-and-tensor-maps.md.
#include "write_sparse_marlin.cuh"
#include "gemm_sm90.cuh"
#include "products_sm90.cuh"

template <int selector>
__device__ __forceinline__ void multiply_async(
    Half, float (&d)[SLABS][4], const unsigned (&a)[4], unsigned long long b, unsigned e, bool keep
) {
    wgmma_sparse_half<selector>(d, a, b, e, keep);
}
template <int selector>
__device__ __forceinline__ void multiply_async(
    BFloat, float (&d)[SLABS][4], const unsigned (&a)[4], unsigned long long b, unsigned e, bool keep
) {
    wgmma_sparse_bfloat<selector>(d, a, b, e, keep);
}

struct SparseWeights {
    static constexpr int TILE_K = 32, META_BYTES = 256, AHEAD = 1;
    static constexpr int META_TILES = 2;  // of which one ldmatrix brings a warp's metadata

    static __device__ __forceinline__ unsigned metadata_at(
        const unsigned& shared_base, int stage_index, unsigned first_tile, const ThreadRole& role
    ) {
        using S = Stage<SparseWeights>;
        const unsigned matrix = role.lane / 8;  // that this lane names for ldmatrix: a half of a tile
        const unsigned its_tile = SPLIT == 1 ? matrix / 2 : matrix % 2, its_half = SPLIT == 1 ? matrix % 2 : role.first_word / 2;
        return shared_base + stage_index * S::BYTES + S::META_AT + ((first_tile + its_tile) * BLOCKS + role.block) * 256 +
               its_half * 128 + role.lane % 8 * 16;
    }

    static __device__ __forceinline__ void load_metadata(unsigned (&e)[2][4], const unsigned& at, int i) {
        if (i % META_TILES == 0) {
            unsigned(&places)[4] = e[i / META_TILES % 2];
            if constexpr (SPLIT == 1) load_matrices(places, at + i * (BLOCKS * 256));
            else load_two_matrices(places, at + i * (BLOCKS * 256));
        }
    }

    static __device__ __forceinline__ void multiply(
        Sums& sums, const unsigned (&fragments)[WORDS][4], unsigned long long b, const unsigned (&e)[2][4], int i, bool keep
    ) {
#pragma unroll
        for (int word = 0; word < WORDS; word += 2) {  // first_word is even: the selector is that of the word in its pair
            const unsigned places = e[i / META_TILES % 2][SPLIT == 1 ? i % META_TILES * 2 + word / 2 : i % META_TILES];
            multiply_async<0>(NUMBER(), sums[word], fragments[word], b, places, keep);
            multiply_async<1>(NUMBER(), sums[word + 1], fragments[word + 1], b, places, keep);
        }
    }
};

static_assert(Stage<SparseWeights>::WARP_TILES % SparseWeights::META_TILES == 0,
              "a warp takes as much of k at a time as one ldmatrix brings metadata for");

extern "C" __global__ void __launch_bounds__(THREADS + COPY_THREADS, CTAS) sparse_marlin_sm90(
    const __grid_constant__ TensorMap activations,  // [M, K] 16-bit, in boxes of TOKENS x 64
    const __grid_constant__ TensorMap qweight,      // [K'/32, N'/64] of 512 bytes (32 lanes, four words), in boxes of K_STEP/32 x BLOCKS
    const char* __restrict__ meta,         // [K'/32, N'/64] of 256 bytes: two matrices, 8 rows, eight int16
    const char* __restrict__ scales,       // [G', N'] float16
    const unsigned short* __restrict__ bias,  // [N] as activations, or null
    unsigned short* __restrict__ out,      // [M, N]
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS], of a tile's CTAs; null in clusters, as counters
    int* __restrict__ counters,            // [tiles of n][tiles of m], zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int whole,                             // tiles that each CTA computes alone (stripes.cuh)
    int                                    // group_shift, which is GROUP_SHIFT here
) {
    const Output output{scales, bias, out, m, n, GROUPED};
    gemm_sm90<SixteenBitProducts<SparseWeights>>(activations, qweight, meta, nullptr, scales, output, partials, counters, m, n, k, whole);
}
