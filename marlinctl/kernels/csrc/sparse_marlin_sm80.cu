// 2:4 INT4 x 16-bit GEMM for Ampere and later:  out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N])
//
//   activations  [M, K]        float16 or bfloat16
//   qweight      [K'/32, 2N']  int32, Sparse-MARLIN tiles     N', K' are N, K rounded up to 64 (docs/formats/marlin_24.md)
//   meta         [K'/32, 2N']  int16, which two of each four neighbours in k the codes of qweight are
//   scales       [G', N']      float16, in Sparse-MARLIN order    groups of 32, 64 or 128 in K, or one for all of K
//   out          [M, N]        as activations
//
// THE TRANSPOSED PRODUCT.  mma.sp takes a 2:4 matrix only as operand A: so the weight is A, the activations are B, and the
// result is outᵀ. One packed word is one A fragment (dequantize.cuh) of 16 outputs x 32 k, of which half is stored.
//
//   a warp, one step of 32 in k:        64 (n) = 4 words of each lane, 16 bytes
//
//                     k 0..31                  m 0..7  8..15
//              ┌───────────────────┐          ┌───────┬───────┐
//   n = 8g + 0 │ word 0 │ kept     │  k 0     │       │       │    B: activations [m, k], 16 bytes = 8 k of one m: the four
//   n = 8g + 4 │        │ and meta │   .      │   B   │   B   │       8 x 8 matrices of one ldmatrix are 32 k of 8 m
//              ├────────┼──────────┤   .      │       │       │
//   n = 8g + 1 │ word 1 │          │  k 31    └───────┴───────┘    D: float32, lane t holds m = 2(t%4) (+ 1) and, with g = t/4,
//   n = 8g + 5 │        │          │          ┌───────┬───────┐       of word j the outputs n = 8g + j and 8g + 4 + j:
//              ├────────┼──────────┤  n 0..63 │   D   │   D   │       over all words eight consecutive n, so that out is
//       ..     │   ..   │          │          │       │       │       written without a transposition
//              └───────────────────┘          └───────┴───────┘
//
// METADATA.  For 64 n x 32 k it is 256 bytes, two 8 x 8 matrices of ldmatrix. A register of it serves two words: lanes 0, 1 of
// each four hold what word 2i needs, lanes 2, 3 what word 2i + 1 needs, and the sparsity selector of mma.sp names the pair of
// lanes. So one ldmatrix brings the metadata of eight words, whatever their products: META_TILES = 2 steps of all four words, or
// 4 steps of two.
//
// What a CTA and its warps hold, how groups are scaled and how parts of a sum come together: tile.cuh. How the grid shares the
// work, and the main loop: stripes.cuh. What a stage holds, and all else that dense and 2:4 kernels share: gemm_sm80.cuh.
//
// LIMITS.  N and K multiples of 8 (rows of 16 bytes), everything aligned to 16 bytes; 2^31 units. K_STEP is a multiple of 128,
// so that a group never reaches over the end of a stage.
//
// MEASURED.  NVIDIA H200, 2026-11-21, benchmarks/check_marlin.py, microseconds in a CUDA graph, no overlap, groups of 128, float16:
//
//   M                1       16       32       64      128      torch.matmul, dense
//   73728 x 18432    158.3    203.0    280.3    454.8    886.1    637 to 697
//   18432 x 73728    155.8    200.1    278.2    460.0    889.6    664 to 692
//
// On sm_80, 86 and 89 nothing was timed. docs/log/2026-11-21-sparse-kernel.md has more, kernels/README.md what has changed since.
#include "write_sparse_marlin.cuh"
#include "gemm_sm80.cuh"

struct SparseWeights : SixteenBit {
    static constexpr int TILE_K = 32, META_BYTES = 256;
    static constexpr bool GROUPS_END_IN_STAGES = true;
    static constexpr int META_TILES = 2 * SPLIT;  // of which one ldmatrix brings a warp's metadata

    template <class Close>
    static __device__ __forceinline__ void multiply(
        Sums& group_sums, const char* shared, const unsigned& shared_base, int stage_index, int step, const ThreadRole& role, const Groups& groups,
        const Close& close
    ) {
        using S = Stage<SparseWeights>;
        const unsigned lane = role.lane;
        const char* stage = shared + stage_index * S::BYTES;
        const unsigned meta_at = shared_base + stage_index * S::BYTES + S::META_AT, activations_at = meta_at + S::META_BYTES;
        const int first_tile = step * S::K_TILES;
        const unsigned matrix = lane / 8;  // that this lane names for ldmatrix: of metadata a half of a tile, of activations 8 of k
        const unsigned its_tile = SPLIT == 1 ? matrix / 2 : matrix, its_half = SPLIT == 1 ? matrix % 2 : role.first_word / 2;
        const unsigned row = lane % 8, chunk = matrix ^ row;  // its token, and its 8 of k, swizzled, in the first tile
        unsigned e[4];
#pragma unroll
        for (int i = 0; i < S::WARP_TILES; ++i) {
            const unsigned tile = role.k_warp * S::WARP_TILES + i;
            if (i % META_TILES == 0) {
                load_matrices(e, meta_at + ((tile + its_tile) * BLOCKS + role.block) * 256 + its_half * 128 + row * 16);
            }
            unsigned words[4], a[WORDS][4];
            load_words(words, stage + ((tile * BLOCKS + role.block) * 32 + lane) * 16 + role.first_word * 4);
#pragma unroll
            for (int word = 0; word < WORDS; ++word) dequantize<NUMBER>(a[word], words[word]);
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab) {
                unsigned b[4];
                load_matrices(b, activations_at + ((slab * 8 + row) * CHUNKS + (4 * tile ^ chunk)) * 16);
#pragma unroll
                for (int word = 0; word < WORDS; word += 2) {  // first_word is even: the selector is that of the word in its pair
                    const unsigned places = e[SPLIT == 1 ? i % META_TILES * 2 + word / 2 : i % META_TILES];
                    NUMBER::mma_sparse<0>(group_sums[word][slab], a[word], b, places);
                    NUMBER::mma_sparse<1>(group_sums[word + 1][slab], a[word + 1], b, places);
                }
            }
            // Where warps share k, a warp's next tiles are not those that follow: it closes its part of the group.
            const bool leaves = K_WARPS > 1 && i == S::WARP_TILES - 1;
            const int k_tile = first_tile + tile;
            if (((k_tile + 1) & groups.mask) == 0 || (leaves && groups.grouped)) {
                close(stage, first_tile, k_tile);
            }
        }
    }
};

static_assert(K_STEP % 128 == 0, "a group never reaches over the end of a stage");
static_assert(Stage<SparseWeights>::WARP_TILES % SparseWeights::META_TILES == 0,
              "a warp takes as much of k at a time as one ldmatrix brings metadata for");

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) sparse_marlin_sm80(
    const char* __restrict__ activations,  // [M, K] 16-bit
    const uint4* __restrict__ qweight,     // [K'/32, N'/64, 32 lanes] of four words
    const uint4* __restrict__ meta,        // [K'/32, N'/64, 2 matrices, 8 rows] of eight int16
    const char* __restrict__ scales,       // [G', N'] float16
    const unsigned short* __restrict__ bias,  // [N] as activations, or null
    unsigned short* __restrict__ out,      // [M, N]
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS], of a tile's CTAs
    int* __restrict__ counters,            // [tiles of n][tiles of m], zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int whole,                             // tiles that each CTA computes alone (stripes.cuh)
    int group_shift                        // log2(group_size / 16), or -1: channel-wise
) {
    const Output output{scales, bias, out, m, n, group_shift >= 0};
    gemm_sm80<SparseWeights>(activations, qweight, meta, nullptr, scales, output, partials, counters, m, n, k, whole, group_shift);
}
