// 2:4 INT4 x 16-bit GEMM for Ampere and later:  out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N])
//
//   activations  [M, K]        float16 or bfloat16
//   qweight      [K'/32, 2N']  int32, Sparse-MARLIN tiles     N', K' are N, K rounded up to 64 (docs/formats/marlin_24.md)
//   meta         [K'/32, 2N']  int16, which two of each four neighbours in k the codes of qweight are
//   scales       [G', N']      float16, in Sparse-MARLIN order    groups of 32, 64 or 128 in K, or one for all of K
//   out          [M, N]        as activations
//
// THE TRANSPOSED PRODUCT.  mma.sp takes a 2:4 matrix as operand A alone: so the weight is A, the activations are B, and what
// comes out is outᵀ. One packed word is one A fragment (dequantize.cuh) of 16 outputs x 32 k, of which half is stored.
//
//   a warp, one step of 32 in k:        64 (n) = 4 words of each lane, 16 bytes
//
//                     k 0..31                  m 0..7  8..15
//              ┌───────────────────┐          ┌───────┬───────┐
//   n = 8g + 0 │ word 0 │ survivors│  k 0     │       │       │    B: activations [m, k], 16 bytes = 8 k of one m: the four
//   n = 8g + 4 │        │ and meta │   .      │   B   │   B   │       8 x 8 matrices of one ldmatrix are 32 k of 8 m
//              ├────────┼──────────┤   .      │       │       │
//   n = 8g + 1 │ word 1 │          │  k 31    └───────┴───────┘    D: float32, lane t holds m = 2(t%4) (+ 1) and, with g = t/4,
//   n = 8g + 5 │        │          │          ┌───────┬───────┐       of word j the outputs n = 8g + j and 8g + 4 + j:
//              ├────────┼──────────┤  n 0..63 │   D   │   D   │       over all words eight neighbours, so that out is
//       ..     │   ..   │          │          │       │       │       written as it lies, and nothing has to be turned around
//              └───────────────────┘          └───────┴───────┘
//
// METADATA.  For 64 n x 32 k it is 256 bytes, two 8 x 8 matrices of ldmatrix. A register of it serves two words: lanes 0, 1 of
// each four hold what word 2i needs, lanes 2, 3 what word 2i + 1 needs, and the sparsity selector of mma.sp names the pair of
// lanes. So one ldmatrix brings the metadata of eight words, whatever their products: META_TILES = 2 steps of all four words, or
// 4 steps of two.
//
// What a CTA and its warps hold, how groups are scaled and how parts of a sum come together: tile.cuh. How the grid shares the
// work, and the main loop: stripes.cuh.
//
// A STAGE holds K_STEP of k:
//
//   weights      [K_STEP/32][BLOCKS][32 lanes]  16 bytes each, as in memory: every lane reads back the 16 bytes of its own
//   metadata     [K_STEP/32][BLOCKS][2][8]      16 bytes each, as in memory: the 8 rows of a matrix lie in different banks
//   activations  [TOKENS][K_STEP/8]             16 bytes each, swizzled (tile.cuh)
//   scales       [K_STEP/32][64 BLOCKS]         float16, the rows of the groups that the stage touches
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

constexpr int K_TILES = K_STEP / 32;                   // rows of qweight and meta in a stage
constexpr int WARP_TILES = K_TILES / K_WARPS;          // and of them those of one warp
constexpr int META_TILES = 2 * SPLIT;                  // of which one ldmatrix brings a warp's metadata
constexpr int WEIGHT_BYTES = K_TILES * BLOCKS * 512;
constexpr int META_BYTES = K_TILES * BLOCKS * 256;
constexpr int STAGE_BYTES = WEIGHT_BYTES + META_BYTES + ACTIVATION_BYTES + SCALE_BYTES;

static_assert(STAGES * STAGE_BYTES + SCRATCH_BYTES + 16 == SHARED_BYTES, "the host allots other shared memory than the kernel uses");
static_assert(K_STEP % 128 == 0, "a group never reaches over the end of a stage");
static_assert(WARP_TILES % META_TILES == 0, "a warp takes as much of k at a time as one ldmatrix brings metadata for");
static_assert(THREADS % (BLOCKS * 32) == 0 && META_BYTES % (THREADS * 16) == 0,
              "a thread copies one column of weights, one column of metadata, and as many rows as every other thread");

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
    extern __shared__ uint4 shared[];
    const unsigned shared_base = shared_address(shared);
    float4* const scratch = reinterpret_cast<float4*>(reinterpret_cast<char*>(shared) + STAGES * STAGE_BYTES);
    int* const arrived = reinterpret_cast<int*>(reinterpret_cast<char*>(shared) + STAGES * STAGE_BYTES + SCRATCH_BYTES);

    const Self self;
    const unsigned lane = self.lane;

    const unsigned n_blocks = (n + 63) / 64, k_tiles = (k + 63) / 64 * 2;
    const bool grouped = group_shift >= 0;
    const int tile_shift = group_shift - 1;  // log2 of the tiles, 32 of k each, in a group
    const int group_mask = grouped ? (1 << tile_shift) - 1 : -1;  // -1: no tile ends a group
    const unsigned groups = grouped ? (k_tiles + group_mask) >> tile_shift : 1;

    const Stripes stripes((n_blocks + BLOCKS - 1) / BLOCKS, (m + TOKENS - 1) / TOKENS, (k_tiles + K_TILES - 1) / K_TILES, whole);

    // What this thread copies of a stage's weights and metadata: every COPY_TILES-th or META_ROWS-th row from its own on.
    constexpr int COPY_TILES = THREADS / (BLOCKS * 32), META_ROWS = THREADS / (BLOCKS * 16);
    const unsigned copy_tile = self.thread / (BLOCKS * 32), copy_column = self.thread % (BLOCKS * 32);
    const unsigned meta_tile = self.thread / (BLOCKS * 16), meta_column = self.thread % (BLOCKS * 16);
    const unsigned weights_to = shared_base + self.thread * 16, meta_to = weights_to + WEIGHT_BYTES;
    const size_t tile_row = static_cast<size_t>(n_blocks) * 32, meta_row = static_cast<size_t>(n_blocks) * 16;  // uint4 in a row
    const ActivationCopies copy_activations(self, activations, m, k, shared_base + WEIGHT_BYTES + META_BYTES);
    const ScaleCopies copy_scales(self, scales, groups, n_blocks * 64, shared_base + WEIGHT_BYTES + META_BYTES + ACTIVATION_BYTES);

    // Weights, metadata and scales of one unit on their way into a stage. What lies outside of the matrices becomes zeros: sums of
    // zeros. Zeros are no metadata, though (two survivors in one place are undefined): there, any other is as good as any, the first, say.
    auto fetch_weights = [&](const Cursor& at, int stage) {
        const unsigned offset = stage * STAGE_BYTES, first_tile = at.step * K_TILES;
        const unsigned tile = first_tile + copy_tile, column = at.slice * (BLOCKS * 32) + copy_column;
        const uint4* weights = qweight + (tile * tile_row + column);
        const bool column_inside = column < n_blocks * 32;
#pragma unroll
        for (int i = 0; i < K_TILES / COPY_TILES; ++i) {
            const bool inside = column_inside && tile + i * COPY_TILES < k_tiles;
            copy_async(weights_to + offset + i * (THREADS * 16), weights + i * COPY_TILES * tile_row, inside);
        }
        const unsigned places_tile = first_tile + meta_tile, places_column = at.slice * (BLOCKS * 16) + meta_column;
        const uint4* places = meta + (places_tile * meta_row + places_column);
        const bool places_inside = places_column < n_blocks * 16;
#pragma unroll
        for (int i = 0; i < K_TILES / META_ROWS; ++i) {
            const bool inside = places_inside && places_tile + i * META_ROWS < k_tiles;
            copy_async(meta_to + offset + i * (THREADS * 16), inside ? places + i * META_ROWS * meta_row : meta, true);
        }
        if (grouped) copy_scales(at, offset, first_tile >> tile_shift, (first_tile + K_TILES - 1) >> tile_shift);
    };

    auto fetch_activations = [&](const Cursor& at, int stage) { copy_activations(at, stage * STAGE_BYTES); };
    auto first_activations = [&] { copy_activations.first_stages<STAGE_BYTES>(stripes); };

    const Output output{scales, bias, out, m, n, grouped};
    Sums sums;        // scaled
    Sums group_sums;  // of the group under way: sums of code times activation

    // The warp's part of one stage.
    auto multiply = [&](int stage_index, int step) {
        const char* stage = reinterpret_cast<const char*>(shared) + stage_index * STAGE_BYTES;
        const unsigned meta_at = shared_base + stage_index * STAGE_BYTES + WEIGHT_BYTES, activations_at = meta_at + META_BYTES;
        const int first_tile = step * K_TILES;
        const unsigned matrix = lane / 8;  // that this lane names for ldmatrix: of metadata a half of a tile, of activations 8 of k
        const unsigned its_tile = SPLIT == 1 ? matrix / 2 : matrix, its_half = SPLIT == 1 ? matrix % 2 : self.first_word / 2;
        const unsigned row = lane % 8, chunk = matrix ^ row;  // its token, and its 8 of k, swizzled, in the first tile
        unsigned e[4];
#pragma unroll
        for (int i = 0; i < WARP_TILES; ++i) {
            const unsigned tile = self.k_warp * WARP_TILES + i;
            if (i % META_TILES == 0) {
                load_matrices(e, meta_at + ((tile + its_tile) * BLOCKS + self.block) * 256 + its_half * 128 + row * 16);
            }
            unsigned words[4], a[WORDS][4];
            load_words(words, stage + ((tile * BLOCKS + self.block) * 32 + lane) * 16 + self.first_word * 4);
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
            const bool leaves = K_WARPS > 1 && i == WARP_TILES - 1;
            const int k_tile = first_tile + tile;
            if (((k_tile + 1) & group_mask) == 0 || (leaves && grouped)) {
                const unsigned group = (k_tile >> tile_shift) - (first_tile >> tile_shift);
                close_group(sums, group_sums, stage + WEIGHT_BYTES + META_BYTES + ACTIVATION_BYTES + group * COLUMNS * 2, self);
            }
        }
    };

    // The end of an output tile, or of this CTA's part of one.
    auto finish = [&](int unit, int, int) {
        close_channels(sums, group_sums, grouped);
        Sums parts;
        sort_for_exchange(parts, sums);
        OwnSums own;
        reduce_in_cta(own, parts, scratch, self);
        const int tile = unit / stripes.steps;
        const Sharers ctas = stripes.sharers(tile);
        const Shared part_of{partials, counters + tile, ctas.first, ctas.last};
        complete(own, part_of, arrived, self, [&](const OwnSums& total, int first_slab) {
            write_result(total, output, stripes.at(unit), first_slab, self);
        });
        zero(sums);
    };

    zero(sums);
    zero(group_sums);
    walk(stripes, fetch_weights, fetch_activations, first_activations, multiply, finish);
}
