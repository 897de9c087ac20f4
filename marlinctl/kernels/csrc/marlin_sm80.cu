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
//   a CTA:  BLOCKS x 64 columns (n), TOKENS rows (m). K_WARPS warps share the k of a stage among them, SPLIT warps the four
//           words of a block (the accumulators of 64 x 64 would not fit one warp's registers).
//
// A STAGE holds K_STEP of k:
//
//   weights      [K_STEP/16][BLOCKS][32 lanes]  16 bytes each, as in memory: every lane reads back the 16 bytes of its own
//   activations  [TOKENS][K_STEP/8]             16 bytes each, chunk c of row r in place c ^ (r % 8): the 8 rows that
//                                               ldmatrix reads together then lie in different banks
//   scales       [K_STEP/32][64 BLOCKS]         float16, the rows of the groups that the stage touches
//
// OVER TIME, STAGES deep, one barrier per stage (u counts stages of this CTA, S = STAGES):
//
//   cp.async   | u, u+1 .. u+S-2 under way  | u+S-1 ..
//   warps      | wait for u, barrier        | ldmatrix, lop3, mma of u | at the end of an output tile: reduce, write
//
// THE SUM.  Codes go to the tensor core unscaled; the sums of a group are multiplied by its scales in float32 when the group
// is over. That is one fma for each accumulator and group instead of one multiplication for each pair of weights, and nothing is rounded
// before the output: with identity activations the output is the dequantized weight rounded once. Channel-wise scales
// multiply the finished sums.
//
// STRIPES.  The work is a row of units, (tile of n, tile of m, step of k) with k fastest, cut into equal runs, one for each
// CTA, wherever the cuts fall:
//
//   units   | tile 0: k 0 1 2 3 | tile 1: k 0 1 2 3 | tile 2: k 0 1 2 3 |
//   CTAs    |     0     |     1     |     2     |     3     |          (3 units each)
//
// A tile that several CTAs share is put together in float32 through `partials`: each of them writes its part to a place of
// its own and counts up `counters[tile]`; whoever comes last adds the parts in the order of k and writes the output. The
// order of the additions never depends on who that is: equal inputs give equal bits on the same number of CTAs. Nobody waits for
// anybody, so CTAs need not be resident together. The last one sets the counter back to 0: the workspace is zeroed once
// in its life. Two launches that may run at the same time need a workspace each.
//
// LIMITS.  N and K multiples of 8 (rows of 16 bytes), everything aligned to 16 bytes; 2^31 units. mma.sync reaches about two
// thirds of what wgmma does on Hopper: there this is a kernel for M up to about 64.
//
// MEASURED.  Nothing: no GPU has run this file yet (kernels/README.md says what is known of it).
//
// Compile-time configuration (kernels/configurations.py): NUMBER, TOKENS, BLOCKS, SPLIT, K_WARPS, K_STEP, STAGES,
// CTAS (per multiprocessor, what registers are allotted for), SHARED_BYTES.
#include "dequantize.cuh"

constexpr int WORDS = 4 / SPLIT;                       // of a lane's four words, those of this warp
constexpr int OWN = WORDS / K_WARPS;                   // those whose sums it finishes
constexpr int SLABS = TOKENS / 8;                      // of eight tokens: the n of mma.m16n8k16
constexpr int COLUMNS = 64 * BLOCKS;                   // n of an output tile
constexpr int COLUMN_WARPS = BLOCKS * SPLIT;           // warps side by side in n
constexpr int THREADS = 32 * COLUMN_WARPS * K_WARPS;
constexpr int K_TILES = K_STEP / 16;                   // rows of qweight in a stage
constexpr int WARP_TILES = K_TILES / K_WARPS;          // and of them those of one warp
constexpr int CHUNKS = K_STEP / 8;                     // of 16 bytes in a row of activations
constexpr int SCALE_ROWS = K_STEP / 32;                // the smallest group is 32

constexpr int WEIGHT_BYTES = K_TILES * BLOCKS * 512;
constexpr int ACTIVATION_BYTES = TOKENS * K_STEP * 2;
constexpr int SCALE_BYTES = SCALE_ROWS * COLUMNS * 2;
constexpr int STAGE_BYTES = WEIGHT_BYTES + ACTIVATION_BYTES + SCALE_BYTES;
constexpr int SCRATCH_BYTES = K_WARPS > 1 ? COLUMN_WARPS * K_WARPS * SLABS * 512 : 0;  // one word's sums of every warp

static_assert(STAGES * STAGE_BYTES + SCRATCH_BYTES + 16 == SHARED_BYTES, "the host allots other shared memory than the kernel uses");
static_assert(SPLIT <= 2, "a lane reads four or two of its words at once");
static_assert(OWN >= 1 && OWN * K_WARPS * SPLIT == 4, "the warps of a block share its four words evenly");
static_assert(TOKENS == 8 || TOKENS % 16 == 0, "ldmatrix reads four matrices: 16 tokens x 16 k, or 8 tokens x 32 k");
static_assert(WARP_TILES % 2 == 0, "a warp takes 32 of k at a time, and never a part of a group");
static_assert(CHUNKS >= 8, "the swizzle needs a row of 128 bytes");
static_assert(STAGES >= 2, "one stage is read while another one is filled");
static_assert(THREADS % (BLOCKS * 32) == 0 && THREADS % CHUNKS == 0 && SCALE_BYTES / 16 <= THREADS,
              "a thread copies one column of weights, one chunk of each of its rows of activations, and at most one piece of scales");

// A place in the row of units.
struct Cursor {
    int slice, token_tile, step;  // columns, tokens, k
};

// The words of this warp among four that lie together.
__device__ __forceinline__ void load_words(unsigned (&words)[4], const char* from) {
    if constexpr (WORDS == 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(from);
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        words[0] = two.x, words[1] = two.y;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) marlin_sm80(
    const char* __restrict__ activations,  // [M, K] 16-bit
    const uint4* __restrict__ qweight,     // [K'/16, N'/64, 32 lanes] of four words
    const char* __restrict__ scales,       // [G', N'] float16
    const unsigned short* __restrict__ bias,  // [N] as activations, or null
    unsigned* __restrict__ out,            // [M, N/2] pairs
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS]: two tiles for each CTA
    int* __restrict__ counters,            // [tiles of n][tiles of m], zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int group_shift                        // log2(group_size / 16), or -1: channel-wise
) {
    extern __shared__ uint4 shared[];
    const unsigned shared_base = shared_address(shared);
    float4* const scratch = reinterpret_cast<float4*>(reinterpret_cast<char*>(shared) + STAGES * STAGE_BYTES);
    int* const arrived = reinterpret_cast<int*>(reinterpret_cast<char*>(shared) + STAGES * STAGE_BYTES + SCRATCH_BYTES);

    const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const unsigned k_warp = warp / COLUMN_WARPS, column_warp = warp % COLUMN_WARPS;
    const unsigned block = column_warp / SPLIT, first_word = column_warp % SPLIT * WORDS;

    const unsigned n_blocks = (n + 63) / 64, k_tiles = (k + 63) / 64 * 4;
    const bool grouped = group_shift >= 0;
    const int group_mask = grouped ? (1 << group_shift) - 1 : -1;  // -1: no tile ends a group
    const unsigned groups = grouped ? (k_tiles + group_mask) >> group_shift : 1;

    const int steps = (k_tiles + K_TILES - 1) / K_TILES;
    const int token_tiles = (m + TOKENS - 1) / TOKENS;
    const int units = (n_blocks + BLOCKS - 1) / BLOCKS * token_tiles * steps;
    const int run = units / gridDim.x, longer = units % gridDim.x;  // the first `longer` CTAs take one unit more
    const int begin = blockIdx.x * run + min(static_cast<int>(blockIdx.x), longer);
    const int end = begin + run + (blockIdx.x < longer ? 1 : 0);

    auto cursor_at = [&](int unit) {
        const int tile = unit / steps;
        return Cursor{tile / token_tiles, tile % token_tiles, unit % steps};
    };
    auto advance = [&](Cursor& at) {
        if (++at.step == steps) {
            at.step = 0;
            if (++at.token_tile == token_tiles) {
                at.token_tile = 0;
                ++at.slice;
            }
        }
    };
    auto cta_of = [&](int unit) {
        const int in_longer = longer * (run + 1);
        return unit < in_longer ? unit / (run + 1) : longer + (unit - in_longer) / run;
    };

    // What this thread copies of a stage: every WEIGHT_TILES-th row of tiles from its own on, every TOKEN_ROWS-th token.
    constexpr int WEIGHT_TILES = THREADS / (BLOCKS * 32), TOKEN_ROWS = THREADS / CHUNKS, SCALE_COLUMNS = COLUMNS / 8;
    const unsigned copy_tile = thread / (BLOCKS * 32), copy_column = thread % (BLOCKS * 32);
    const unsigned copy_row = thread / CHUNKS, copy_chunk = thread % CHUNKS;
    const unsigned copy_group = thread / SCALE_COLUMNS, copy_scales = thread % SCALE_COLUMNS * 8;
    const unsigned weights_to = shared_base + thread * 16;
    const unsigned activations_to = shared_base + WEIGHT_BYTES + copy_row * CHUNKS * 16;
    const unsigned scales_to = shared_base + WEIGHT_BYTES + ACTIVATION_BYTES + thread * 16;
    const size_t tile_row = static_cast<size_t>(n_blocks) * 32;  // uint4 in a row of tiles

    // Everything of one unit on its way into a stage. What lies outside of the matrices becomes zeros: sums of zeros.
    auto fetch_to_shared = [&](const Cursor& at, int stage) {
        const unsigned offset = stage * STAGE_BYTES;
        const unsigned tile = at.step * K_TILES + copy_tile, column = at.slice * (BLOCKS * 32) + copy_column;
        const uint4* weights = qweight + (tile * tile_row + column);
        const bool column_inside = column < n_blocks * 32;
#pragma unroll
        for (int i = 0; i < K_TILES / WEIGHT_TILES; ++i) {
            const bool inside = column_inside && tile + i * WEIGHT_TILES < k_tiles;
            copy_async(weights_to + offset + i * (THREADS * 16), weights + i * WEIGHT_TILES * tile_row, inside);
        }
        const unsigned token = at.token_tile * TOKENS + copy_row, first = at.step * K_STEP + copy_chunk * 8;
        const char* numbers = activations + (static_cast<size_t>(token) * k + first) * 2;
#pragma unroll
        for (int i = 0; i < (TOKENS + TOKEN_ROWS - 1) / TOKEN_ROWS; ++i) {
            const bool inside = first < k && token + i * TOKEN_ROWS < m;
            if (TOKENS % TOKEN_ROWS == 0 || copy_row + i * TOKEN_ROWS < TOKENS) {
                const unsigned place = copy_chunk ^ copy_row % 8 ^ i * TOKEN_ROWS % 8;  // TOKEN_ROWS is a power of two: the row's last bits
                const char* from = numbers + static_cast<size_t>(i * TOKEN_ROWS) * k * 2;
                copy_async(activations_to + offset + i * (THREADS * 16) + place * 16, from, inside);
            }
        }
        if (grouped) {
            const unsigned first_tile = at.step * K_TILES;
            const unsigned first_group = first_tile >> group_shift, last_group = (first_tile + K_TILES - 1) >> group_shift;
            const unsigned group = first_group + copy_group, scale = at.slice * COLUMNS + copy_scales;
            if (group <= last_group) {
                const bool inside = group < groups && scale < n_blocks * 64;
                copy_async(scales_to + offset, scales + (static_cast<size_t>(group) * (n_blocks * 64) + scale) * 2, inside);
            }
        }
    };

    float sums[WORDS][SLABS][4];        // scaled
    float group_sums[WORDS][SLABS][4];  // of the group under way: sums of code times activation

    auto zero = [&](float(&what)[WORDS][SLABS][4]) {
#pragma unroll
        for (int word = 0; word < WORDS; ++word)
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
                for (int i = 0; i < 4; ++i) what[word][slab][i] = 0.0f;
    };

    // sums += scale * group_sums. A lane's scales lie together: slot 8 (n % 8) + (n % 64) / 8 of the block.
    auto close_group = [&](const char* stage, int first_tile, int k_tile) {
        const unsigned row = (k_tile >> group_shift) - (first_tile >> group_shift);
        const char* mine = stage + WEIGHT_BYTES + ACTIVATION_BYTES + (row * COLUMNS + block * 64 + lane / 4 * 8 + 2 * first_word) * 2;
        unsigned pairs[4];  // of each word: n % 16 in 0..7, and 8 further on
        load_words(pairs, mine);
#pragma unroll
        for (int word = 0; word < WORDS; ++word) {
            const float lower = widen_half(static_cast<unsigned short>(pairs[word]));
            const float upper = widen_half(static_cast<unsigned short>(pairs[word] >> 16));
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = sums[word][slab][i];
                    sum = __fmaf_rn(i < 2 ? lower : upper, group_sums[word][slab][i], sum);
                }
        }
        zero(group_sums);
    };

    // Channel-wise: the scale waits until the sums are done.
    auto close_channels = [&] {
#pragma unroll
        for (int word = 0; word < WORDS; ++word)
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[word][slab][i] = group_sums[word][slab][i];
        zero(group_sums);
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
            const unsigned tile = k_warp * WARP_TILES + i;
            unsigned words[4];
            load_words(words, stage + ((tile * BLOCKS + block) * 32 + lane) * 16 + first_word * 4);
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
            if (i % 2 == 1 && (((k_tile + 1) & group_mask) == 0 || (leaves && grouped))) close_group(stage, first_tile, k_tile);
        }
    };

    // Warps that shared k add up, in the order of k; each of them keeps OWN words.
    auto reduce_in_cta = [&](float(&own)[OWN][SLABS][4]) {
#pragma unroll
        for (int word = 0; word < WORDS; ++word) {
            if constexpr (K_WARPS == 1) {
#pragma unroll
                for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
                    for (int i = 0; i < 4; ++i) own[word][slab][i] = sums[word][slab][i];
            } else {
#pragma unroll
                for (int slab = 0; slab < SLABS; ++slab) {
                    const float(&s)[4] = sums[word][slab];
                    scratch[(warp * SLABS + slab) * 32 + lane] = make_float4(s[0], s[1], s[2], s[3]);
                }
                __syncthreads();
                if (k_warp == word / OWN) {
#pragma unroll
                    for (int slab = 0; slab < SLABS; ++slab) {
                        float(&total)[4] = own[word % OWN][slab];
#pragma unroll
                        for (int other = 0; other < K_WARPS; ++other) {
                            const float4 part = scratch[((other * COLUMN_WARPS + column_warp) * SLABS + slab) * 32 + lane];
                            total[0] = other ? total[0] + part.x : part.x;
                            total[1] = other ? total[1] + part.y : part.y;
                            total[2] = other ? total[2] + part.z : part.z;
                            total[3] = other ? total[3] + part.w : part.w;
                        }
                    }
                }
                __syncthreads();
            }
        }
    };

    // Leaves this CTA's part of a shared tile in `partials`; true in the CTA that came last, which then holds the sum of all.
    auto reduce_across_ctas = [&](float(&own)[OWN][SLABS][4], int tile, int first_cta, int last_cta) {
        auto place = [&](int cta, int i) {
            const int slot = 2 * cta + (cta == first_cta ? 1 : 0);  // the part at the start of a tile is a CTA's last, any other its first
            return partials + (static_cast<size_t>(slot) * (OWN * SLABS) + i) * THREADS + thread;
        };
#pragma unroll
        for (int word = 0; word < OWN; ++word)
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab) {
                const float(&s)[4] = own[word][slab];
                __stcg(place(blockIdx.x, word * SLABS + slab), make_float4(s[0], s[1], s[2], s[3]));
            }
        __threadfence();  // the part is visible before the count is
        __syncthreads();
        if (thread == 0) {
            *arrived = atomicAdd(counters + tile, 1);
            __threadfence();
        }
        __syncthreads();
        if (*arrived != last_cta - first_cta) return false;
        if (thread == 0) counters[tile] = 0;
#pragma unroll
        for (int word = 0; word < OWN; ++word)
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
                for (int i = 0; i < 4; ++i) own[word][slab][i] = 0.0f;
#pragma unroll(OWN * SLABS <= 2 ? 4 : 1)
        for (int cta = first_cta; cta <= last_cta; ++cta) {
#pragma unroll
            for (int word = 0; word < OWN; ++word)
#pragma unroll
                for (int slab = 0; slab < SLABS; ++slab) {
                    const float4 part = __ldcg(place(cta, word * SLABS + slab));
                    own[word][slab][0] += part.x;
                    own[word][slab][1] += part.y;
                    own[word][slab][2] += part.z;
                    own[word][slab][3] += part.w;
                }
        }
        return true;
    };

    // Channel-wise scales, bias, rounding; movmatrix turns 8 (n) x 8 (m) around, so that a lane holds neighbours in n.
    auto write_result = [&](float(&own)[OWN][SLABS][4], const Cursor& at) {
#pragma unroll
        for (int word = 0; word < OWN; ++word)
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {  // rows 0..7 and 8..15 of the 16 x 8
                const int eight = (at.slice * BLOCKS + block) * 64 + (first_word + k_warp * OWN + word) * 16 + upper * 8;
                const int column = eight + lane / 4;  // as the accumulator holds it
                float scale = 1.0f, shift = 0.0f;
                if (!grouped && column < n_blocks * 64) {
                    const int slot = column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
                    scale = widen_half(reinterpret_cast<const unsigned short*>(scales)[slot]);
                }
                if (bias != nullptr && column < n) shift = NUMBER::widen(bias[column]);
#pragma unroll
                for (int slab = 0; slab < SLABS; ++slab) {
                    const float* s = own[word][slab] + 2 * upper;
                    const unsigned pair = transpose(NUMBER::round(s[0] * scale + shift, s[1] * scale + shift));
                    const int token = at.token_tile * TOKENS + slab * 8 + lane / 4, first = eight + lane % 4 * 2;
                    if (token < m && first < n) out[(static_cast<size_t>(token) * n + first) / 2] = pair;
                }
            }
    };

    auto finish_tile = [&](const Cursor& at, int tile) {
        float own[OWN][SLABS][4];
        reduce_in_cta(own);
        const int first_cta = cta_of(tile * steps), last_cta = cta_of(tile * steps + steps - 1);
        if (first_cta == last_cta || reduce_across_ctas(own, tile, first_cta, last_cta)) write_result(own, at);
    };

    // Main loop
    Cursor fetching = cursor_at(begin);
    int step = fetching.step;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (begin + stage < end) {
            fetch_to_shared(fetching, stage);
            advance(fetching);
        }
        copy_async_commit();
    }
    zero(sums);
    zero(group_sums);
    int stage = 0;
    for (int unit = begin; unit < end; ++unit) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // everybody's copies have arrived, and everybody is done with the stage that is filled next
        if (unit + STAGES - 1 < end) {
            fetch_to_shared(fetching, stage == 0 ? STAGES - 1 : stage - 1);
            advance(fetching);
        }
        copy_async_commit();
        multiply(stage, step);
        if (step == steps - 1 || unit == end - 1) {
            const int last_tile = step * K_TILES + K_TILES - 1;
            if (grouped && K_WARPS == 1 && ((last_tile + 1) & group_mask) != 0) {  // the run ends inside of a group
                close_group(reinterpret_cast<const char*>(shared) + stage * STAGE_BYTES, step * K_TILES, last_tile);
            }
            if (!grouped) close_channels();
            finish_tile(cursor_at(unit), unit / steps);
            zero(sums);
        }
        step = step == steps - 1 ? 0 : step + 1;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
}
