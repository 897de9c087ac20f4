// Dense INT4 x 16-bit GEMM for Ampere and later:  out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N])
//
//   activations  [M, K]        float16 or bfloat16
//   qweight      [K'/16, 2N']  int32, MARLIN tiles            N', K' are N, K rounded up to 64 (docs/formats/marlin.md)
//   scales       [G', N']      float16, in MARLIN order       groups of 32, 64 or 128 in K, or one for all of K
//   out          [M, N]        as activations
//
// THE TRANSPOSED PRODUCT.  The tensor core computes D = A . B with A 16 x 16, B 16 x 8. The weight is operand A and the
// activations are B, so the result is outᵀ, 16 (n) x 8 (m): eight tokens fill an instruction; with the activations as A it would
// take sixteen. One packed word is one A fragment (dequantize.cuh), and a row of activations is a column of B without any change.
//
//   a warp, one step of 16 in k:        64 (n) = 4 words of each lane, 16 bytes
//
//               k 0..15                         m 0..7  8..15
//            ┌──────────┐                     ┌───────┬───────┐
//        n 0 │  word 0  │ 16          k 0     │       │       │
//            ├──────────┤                 .   │   B   │   B   │      B: activations [m, k], 16 bytes = 8 k of one m; ldmatrix
//         16 │  word 1  │  x          k 15    └───────┴───────┘         reads rows of 16 bytes, four 8 x 8 matrices at once
//            ├──────────┤                     ┌───────┬───────┐
//         32 │  word 2  │             n 0..63 │       │       │      D: float32, lane t holds n = t/4 (+ 8), m = 2(t%4) (+ 1)
//            ├──────────┤                     │   D   │   D   │         of each 16 x 8
//         48 │  word 3  │                     │       │       │
//            └──────────┘                     └───────┴───────┘
//
// The output tile of a CTA and of its warps, how groups are scaled and partial sums reduced: tile.cuh. How the grid shares the
// work, and the main loop: stripes.cuh. What a stage holds, and all else that dense and 2:4 kernels share: gemm_sm80.cuh.
//
// LIMITS.  N and K multiples of 8 (rows of 16 bytes), everything aligned to 16 bytes; 2^31 units. mma.sync reaches about two
// thirds of what wgmma does on Hopper: there this is a kernel for M up to about 64.
//
// MEASURED.  NVIDIA H200, 2026-11-21, benchmarks/check_marlin.py, microseconds in a CUDA graph, no overlap, groups of 128, float16:
//
//   M                1       16       32       64      128      torch.matmul
//   73728 x 18432    188.5    250.3    360.1    639.2   1256.9    637 to 685
//   18432 x 73728    185.8    246.9    367.8    644.4   1256.6    662 to 691
//
// On sm_80, 86 and 89 nothing was timed. docs/log/2026-11-21-dense-kernel.md has more, kernels/README.md what has changed since.
#include "write_marlin.cuh"
#include "gemm_sm80.cuh"

struct DenseWeights : SixteenBit {
    static constexpr int TILE_K = 16, META_BYTES = 0;
    static constexpr bool GROUPS_END_IN_STAGES = false;

    template <class Close>
    static __device__ __forceinline__ void multiply(
        Sums& group_sums, const char* shared, const unsigned& shared_base, int stage_index, int step, const ThreadRole& role, const Groups& groups,
        const Close& close
    ) {
        using S = Stage<DenseWeights>;
        const unsigned lane = role.lane;
        const char* stage = shared + stage_index * S::BYTES;
        const unsigned activations_at = shared_base + stage_index * S::BYTES + S::ACTIVATIONS_AT;
        const int first_tile = step * S::K_TILES;
        const unsigned matrix = lane / 8;                                             // that this lane names for ldmatrix
        const unsigned row = TOKENS == 8 ? lane % 8 : matrix / 2 * 8 + lane % 8;      // its token
        const unsigned chunk = (TOKENS == 8 ? matrix : matrix % 2) ^ lane % 8;        // its 8 of k, swizzled, in the first tile
        unsigned b[SLABS == 1 ? 1 : SLABS / 2][4];
#pragma unroll
        for (int i = 0; i < S::WARP_TILES; ++i) {
            const unsigned tile = role.k_warp * S::WARP_TILES + i;
            unsigned words[4];
            load_words(words, stage + ((tile * BLOCKS + role.block) * 32 + lane) * 16 + role.first_word * 4);
            if (TOKENS > 8 || i % 2 == 0) {
#pragma unroll
                for (int sixteen = 0; sixteen < (TOKENS + 15) / 16; ++sixteen) {
                    load_matrices(b[sixteen], activations_at + ((sixteen * 16 + row) * CHUNKS + (2 * tile ^ chunk)) * 16);
                }
            }
#pragma unroll
            for (int word = 0; word < WORDS; ++word) {
                unsigned a[4];
                dequantize<NUMBER>(a, words[word]);
#pragma unroll
                for (int slab = 0; slab < SLABS; ++slab) {
                    const int pair = TOKENS == 8 ? i % 2 * 2 : slab % 2 * 2;
                    NUMBER::mma(group_sums[word][slab], a, b[slab / 2][pair], b[slab / 2][pair + 1]);
                }
            }
            // Where warps share k, a warp's next tiles are not those that follow: it closes its part of the group.
            const bool leaves = K_WARPS > 1 && i == S::WARP_TILES - 1;
            const int k_tile = first_tile + tile;
            if (i % 2 == 1 && (((k_tile + 1) & groups.mask) == 0 || (leaves && groups.grouped))) close(stage, first_tile, k_tile);
        }
    }
};

static_assert(TOKENS == 8 || TOKENS % 16 == 0, "ldmatrix reads four matrices: 16 tokens x 16 k, or 8 tokens x 32 k");
static_assert(Stage<DenseWeights>::WARP_TILES % 2 == 0, "a warp takes 32 of k at a time, and never a part of a group");

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) marlin_sm80(
    const char* __restrict__ activations,  // [M, K] 16-bit
    const uint4* __restrict__ qweight,     // [K'/16, N'/64, 32 lanes] of four words
    const char* __restrict__ scales,       // [G', N'] float16
    const unsigned short* __restrict__ bias,  // [N] as activations, or null
    unsigned* __restrict__ out,            // [M, N/2] pairs
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS], of a tile's CTAs
    int* __restrict__ counters,            // [tiles of n][tiles of m], zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int whole,                             // tiles that each CTA computes alone (stripes.cuh)
    int group_shift                        // log2(group_size / 16), or -1: channel-wise
) {
    const Output output{scales, bias, out, m, n, group_shift >= 0};
    gemm_sm80<DenseWeights>(activations, qweight, nullptr, nullptr, scales, output, partials, counters, m, n, k, whole, group_shift);
}
