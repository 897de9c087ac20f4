// Dense INT4 x 16-bit GEMM for Ampere and later:  out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N])
//
//   activations  [M, K]        float16 or bfloat16
//   qweight      [K'/16, 2N']  int32, MARLIN tiles            N', K' are N, K rounded up to 64 (docs/formats/marlin.md)
//   scales       [G', N']      float16, in MARLIN order       groups of 32, 64 or 128 in K, or one for all of K
//   out          [M, N]        as activations
//
// THE TRANSPOSED PRODUCT.  The tensor core computes D = A . B with A 16 x 16, B 16 x 8. The weight is operand A and the
// activations are B, so what comes out is outᵀ, 16 (n) x 8 (m): eight tokens fill an instruction, where the other way round
// takes sixteen. One packed word is one A fragment (dequantize.cuh), and a row of activations is a column of B as it lies.
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
// What a CTA and its warps hold, how groups are scaled and how parts of a sum come together: tile.cuh. How the grid shares the
// work, and the main loop: stripes.cuh.
//
// A STAGE holds K_STEP of k:
//
//   weights      [K_STEP/16][BLOCKS][32 lanes]  16 bytes each, as in memory: every lane reads back the 16 bytes of its own
//   activations  [TOKENS][K_STEP/8]             16 bytes each, swizzled (tile.cuh)
//   scales       [K_STEP/32][64 BLOCKS]         float16, the rows of the groups that the stage touches
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

constexpr int K_TILES = K_STEP / 16;                   // rows of qweight in a stage
constexpr int WARP_TILES = K_TILES / K_WARPS;          // and of them those of one warp
constexpr int WEIGHT_BYTES = K_TILES * BLOCKS * 512;
constexpr int STAGE_BYTES = WEIGHT_BYTES + ACTIVATION_BYTES + SCALE_BYTES;

static_assert(STAGES * STAGE_BYTES + SCRATCH_BYTES + 16 == SHARED_BYTES, "the host allots other shared memory than the kernel uses");
static_assert(TOKENS == 8 || TOKENS % 16 == 0, "ldmatrix reads four matrices: 16 tokens x 16 k, or 8 tokens x 32 k");
static_assert(WARP_TILES % 2 == 0, "a warp takes 32 of k at a time, and never a part of a group");
static_assert(THREADS % (BLOCKS * 32) == 0, "a thread copies one column of weights");

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
    extern __shared__ uint4 shared[];
    const unsigned shared_base = shared_address(shared);
    float4* const scratch = reinterpret_cast<float4*>(reinterpret_cast<char*>(shared) + STAGES * STAGE_BYTES);
    int* const arrived = reinterpret_cast<int*>(reinterpret_cast<char*>(shared) + STAGES * STAGE_BYTES + SCRATCH_BYTES);

    const Self self;
    const unsigned lane = self.lane;

    const unsigned n_blocks = (n + 63) / 64, k_tiles = (k + 63) / 64 * 4;
    const bool grouped = group_shift >= 0;
    const int group_mask = grouped ? (1 << group_shift) - 1 : -1;  // -1: no tile ends a group
    const unsigned groups = grouped ? (k_tiles + group_mask) >> group_shift : 1;

    const Stripes stripes((n_blocks + BLOCKS - 1) / BLOCKS, (m + TOKENS - 1) / TOKENS, (k_tiles + K_TILES - 1) / K_TILES, whole);

    // What this thread copies of a stage's weights: every COPY_TILES-th row of tiles from its own on.
    constexpr int COPY_TILES = THREADS / (BLOCKS * 32);
    const unsigned copy_tile = self.thread / (BLOCKS * 32), copy_column = self.thread % (BLOCKS * 32);
    const unsigned weights_to = shared_base + self.thread * 16;
    const size_t tile_row = static_cast<size_t>(n_blocks) * 32;  // uint4 in a row of tiles
    const ActivationCopies copy_activations(self, activations, m, k, shared_base + WEIGHT_BYTES);
    const ScaleCopies copy_scales(self, scales, groups, n_blocks * 64, shared_base + WEIGHT_BYTES + ACTIVATION_BYTES);

    // Weights and scales of one unit on their way into a stage. What lies outside of the matrices becomes zeros: sums of zeros.
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
        if (grouped) copy_scales(at, offset, first_tile >> group_shift, (first_tile + K_TILES - 1) >> group_shift);
    };

    auto fetch_activations = [&](const Cursor& at, int stage) { copy_activations(at, stage * STAGE_BYTES); };
    auto first_activations = [&] { copy_activations.first_stages<STAGE_BYTES>(stripes); };

    const Output output{scales, bias, out, m, n, grouped};
    Sums sums;        // scaled
    Sums group_sums;  // of the group under way: sums of code times activation

    auto close = [&](const char* stage, int first_tile, int k_tile) {
        const unsigned row = (k_tile >> group_shift) - (first_tile >> group_shift);
        close_group(sums, group_sums, stage + WEIGHT_BYTES + ACTIVATION_BYTES + row * COLUMNS * 2, self);
    };

    // The warp's part of one stage.
    auto multiply = [&](int stage_index, int step) {
        const char* stage = reinterpret_cast<const char*>(shared) + stage_index * STAGE_BYTES;
        const unsigned activations_at = shared_base + stage_index * STAGE_BYTES + WEIGHT_BYTES;
        const int first_tile = step * K_TILES;
        const unsigned matrix = lane / 8;                                             // that this lane names for ldmatrix
        const unsigned row = TOKENS == 8 ? lane % 8 : matrix / 2 * 8 + lane % 8;      // its token
        const unsigned chunk = (TOKENS == 8 ? matrix : matrix % 2) ^ lane % 8;        // its 8 of k, swizzled, in the first tile
        unsigned b[SLABS == 1 ? 1 : SLABS / 2][4];
#pragma unroll
        for (int i = 0; i < WARP_TILES; ++i) {
            const unsigned tile = self.k_warp * WARP_TILES + i;
            unsigned words[4];
            load_words(words, stage + ((tile * BLOCKS + self.block) * 32 + lane) * 16 + self.first_word * 4);
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
            const bool leaves = K_WARPS > 1 && i == WARP_TILES - 1;
            const int k_tile = first_tile + tile;
            if (i % 2 == 1 && (((k_tile + 1) & group_mask) == 0 || (leaves && grouped))) close(stage, first_tile, k_tile);
        }
    };

    // The end of an output tile, or of this CTA's part of one.
    auto finish = [&](int unit, int stage, int step) {
        const int last_tile = step * K_TILES + K_TILES - 1;
        if (grouped && K_WARPS == 1 && ((last_tile + 1) & group_mask) != 0) {  // the run ends inside of a group
            close(reinterpret_cast<const char*>(shared) + stage * STAGE_BYTES, step * K_TILES, last_tile);
        }
        close_channels(sums, group_sums, grouped);
        OwnSums own;
        reduce_in_cta(own, sums, scratch, self);
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
