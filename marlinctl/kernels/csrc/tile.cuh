// The output tile of a CTA: which thread has which sums, how groups are scaled, how partial sums are reduced. Dense and 2:4
// kernels differ in how weights are stored and multiplied, and in where an accumulator lies in the output; the rest is here.
//
//   a CTA:  BLOCKS x 64 columns (n), TOKENS rows (m). K_WARPS warps share the k of a stage among them, SPLIT warps the four
//           words of a block (the accumulators of 64 x 64 would not fit one warp's registers).
//
//   a warp: WORDS x SLABS accumulators of 16 (n) x 8 (m), float32: lane t holds rows t/4 and t/4 + 8, columns 2(t%4) and the next
//
// THE SUM.  Codes go to the tensor core unscaled; the sums of a group are multiplied by its scales in float32 at the end of the
// group. That is one fma for each accumulator and group instead of one multiplication for each pair of weights, and nothing
// is rounded before the output: with identity activations the output is the dequantized weight rounded once. Channel-wise
// scales multiply the finished sums.
//
// Compile-time configuration (kernels/configurations.py): NUMBER, TOKENS, BLOCKS, SPLIT, K_WARPS, K_STEP, STAGES,
// CTAS (per multiprocessor, what registers are allotted for), SHARED_BYTES. EIGHT_BIT: activations are int8. WHOLE_SUMS: and
// sums go over all of K. PAIRED: stripes.cuh.
//
// On Hopper the warps here are the consumers; the copying warps come after them (pipeline_sm90.cuh).
#pragma once
#include "stripes.cuh"

#ifndef EIGHT_BIT
#define EIGHT_BIT 0
#endif
#ifndef WHOLE_SUMS
#define WHOLE_SUMS 0
#endif

constexpr int WORDS = 4 / SPLIT;                       // of a lane's four words, those of this warp
constexpr int OWN = WORDS / K_WARPS;                   // parts of its sums, a word's worth each, that it finishes
constexpr int SLABS = TOKENS / 8;                      // of eight tokens: the n of mma.m16n8
constexpr int COLUMNS = 64 * BLOCKS;                   // n of an output tile
constexpr int COLUMN_WARPS = BLOCKS * SPLIT;           // warps side by side in n
constexpr int THREADS = 32 * COLUMN_WARPS * K_WARPS;
constexpr int ACTIVATION_SIZE = EIGHT_BIT ? 1 : 2;     // bytes
constexpr int CHUNK_K = 16 / ACTIVATION_SIZE;          // k of 16 bytes of activations
constexpr int CHUNKS = K_STEP / CHUNK_K;               // of 16 bytes in a row of them
constexpr int SCALE_ROWS = K_STEP / 32;                // the smallest group is 32

constexpr int ACTIVATION_BYTES = TOKENS * K_STEP * ACTIVATION_SIZE;
constexpr int SCALE_BYTES = SCALE_ROWS * COLUMNS * 2;
constexpr int SCRATCH_BYTES = K_WARPS > 1 ? COLUMN_WARPS * K_WARPS * SLABS * 512 : 0;  // one part of the sums of every warp

static_assert(SPLIT <= 4, "a lane reads four, two or one of its words at once");
static_assert(OWN >= 1 && OWN * K_WARPS * SPLIT == 4, "the warps of a block share its four words evenly");
static_assert(CHUNKS >= 8, "the swizzle needs a row of 128 bytes");
static_assert(STAGES >= 2, "one stage is read while another one is filled");
static_assert(THREADS % CHUNKS == 0 && SCALE_BYTES / 16 <= THREADS,
              "a thread copies one chunk of each of its rows of activations, and at most one chunk of scales");

using Sums = float[WORDS][SLABS][4];
using OwnSums = float[OWN][SLABS][4];

// The thread's role in the CTA: its warp's share of k, its block of 64 columns, and the first of its words.
struct ThreadRole {
    unsigned thread, lane, warp, k_warp, column_warp, block, first_word;

    __device__ __forceinline__ ThreadRole() : ThreadRole(thread_index()) {}

    __device__ __forceinline__ explicit ThreadRole(unsigned thread) : thread(thread), lane(thread % 32), warp(thread / 32) {
        k_warp = warp / COLUMN_WARPS, column_warp = warp % COLUMN_WARPS;
        block = column_warp / SPLIT, first_word = column_warp % SPLIT * WORDS;
    }
};

// Copies of activations [M, K] into stages: [TOKENS][CHUNKS] of 16 bytes, chunk c of row r in place c ^ (r % 8), so that the
// 8 rows that ldmatrix reads together lie in different banks. A thread copies one chunk of every ROWS-th token.
struct ActivationCopies {
    static constexpr int ROWS = THREADS / CHUNKS, THREAD_CHUNKS = (TOKENS + ROWS - 1) / ROWS;
    const char* activations;
    unsigned m, k, copy_row, copy_chunk, to;

    __device__ __forceinline__ ActivationCopies(const ThreadRole& role, const char* activations, unsigned m, unsigned k, unsigned first_stage)
        : activations(activations), m(m), k(k), copy_row(role.thread / CHUNKS), copy_chunk(role.thread % CHUNKS) {
        to = first_stage + copy_row * CHUNKS * 16;
    }

    // copy(i, to, from, inside) for each of this thread's chunks of 16 bytes. Out of bounds activations become zeros, which add nothing.
    template <class Copy>
    __device__ __forceinline__ void each(const Cursor& at, unsigned offset, Copy copy) const {
        const unsigned token = at.token_tile * TOKENS + copy_row, first = at.step * K_STEP + copy_chunk * CHUNK_K;
        const char* numbers = activations + (static_cast<size_t>(token) * k + first) * ACTIVATION_SIZE;
#pragma unroll
        for (int i = 0; i < THREAD_CHUNKS; ++i) {
            const bool inside = first < k && token + i * ROWS < m;
            if (TOKENS % ROWS == 0 || copy_row + i * ROWS < TOKENS) {
                const unsigned place = copy_chunk ^ copy_row % 8 ^ i * ROWS % 8;  // ROWS is a power of two: the row's last bits
                copy(i, to + offset + i * (THREADS * 16) + place * 16, numbers + static_cast<size_t>(i * ROWS) * k * ACTIVATION_SIZE, inside);
            }
        }
    }

    __device__ __forceinline__ void operator()(const Cursor& at, unsigned offset) const {
        each(at, offset, [](int, unsigned shared, const char* global, bool inside) { copy_async(shared, global, inside); });
    }

    // Fills the stages before the main loop through registers: all loads are issued before the first store. The loads bypass L1, because
    // the previous kernel may have written the activations after this one had started.
    template <int stage_bytes>
    __device__ __forceinline__ void first_stages(const Stripes& stripes) const {
        uint4 loaded[STAGES - 1][THREAD_CHUNKS];
        Cursor at = stripes.first();
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            const bool there = stripes.inside(at);
            each(at, 0, [&](int i, unsigned, const char* global, bool inside) {
                loaded[stage][i] = there && inside ? __ldcg(reinterpret_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
            });
            stripes.advance(at);
        }
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            each(at, stage * stage_bytes, [&](int i, unsigned shared, const char*, bool) { store_shared(shared, loaded[stage][i]); });
        }
    }
};

// Copies of grouped scales [G', N'] into stages: [K_STEP/32][64 BLOCKS], the rows of the groups that the stage touches.
struct ScaleCopies {
    static constexpr int ROW_CHUNKS = COLUMNS / 8;  // of 16 bytes in a row
    const char* scales;
    unsigned groups, columns, copy_group, copy_scales, to;

    __device__ __forceinline__ ScaleCopies(const ThreadRole& role, const char* scales, unsigned groups, unsigned columns, unsigned first_stage)
        : scales(scales), groups(groups), columns(columns), copy_group(role.thread / ROW_CHUNKS), copy_scales(role.thread % ROW_CHUNKS * 8) {
        to = first_stage + role.thread * 16;
    }

    __device__ __forceinline__ void operator()(const Cursor& at, unsigned offset, unsigned first_group, unsigned last_group) const {
        const unsigned group = first_group + copy_group, scale = at.slice * COLUMNS + copy_scales;
        if (group <= last_group) {
            const bool inside = group < groups && scale < columns;
            copy_async(to + offset, scales + (static_cast<size_t>(group) * columns + scale) * 2, inside);
        }
    }
};

// The words of this warp among four that lie together.
__device__ __forceinline__ void load_words(unsigned (&words)[4], const char* from) {
    if constexpr (WORDS == 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(from);
        words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else if constexpr (WORDS == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(from);
        words[0] = two.x, words[1] = two.y;
    } else {
        words[0] = *reinterpret_cast<const unsigned*>(from);
    }
}

__device__ __forceinline__ void zero(Sums& sums) {
#pragma unroll
    for (int word = 0; word < WORDS; ++word)
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[word][slab][i] = 0.0f;
}

// The scales that close_group multiplies sums with, for kernels that scale weights instead.
template <class Number>
__device__ __forceinline__ void load_scales(
    typename Number::Scale (&lower)[WORDS], typename Number::Scale (&upper)[WORDS], const char* row_of_scales, const ThreadRole& role
) {
    unsigned pairs[4];
    load_words(pairs, row_of_scales + (role.block * 64 + role.lane / 4 * 8 + 2 * role.first_word) * 2);
#pragma unroll
    for (int word = 0; word < WORDS; ++word) {
        lower[word] = Number::scale(static_cast<unsigned short>(pairs[word]));
        upper[word] = Number::scale(static_cast<unsigned short>(pairs[word] >> 16));
    }
}

// sums += scale * group_sums. In both formats a lane's eight scales lie together, rows t/4 and t/4 + 8 of a word side by side.
__device__ __forceinline__ void close_group(Sums& sums, Sums& group_sums, const char* row_of_scales, const ThreadRole& role) {
    unsigned pairs[4];
    load_words(pairs, row_of_scales + (role.block * 64 + role.lane / 4 * 8 + 2 * role.first_word) * 2);
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
}

// The end of a tile, after its last group. Channel-wise there are no groups: the finished sums are scaled. A select and not a branch,
// around which the compiler would copy every sum.
__device__ __forceinline__ void close_channels(Sums& sums, Sums& group_sums, bool grouped) {
#pragma unroll
    for (int word = 0; word < WORDS; ++word)
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[word][slab][i] = grouped ? sums[word][slab][i] : group_sums[word][slab][i];
    zero(group_sums);
}

// Reduces the sums of warps that share k, in the order of k; warp i of them gets parts i * OWN and up of sums[part].
__device__ __forceinline__ void reduce_in_cta(OwnSums& own, const Sums& sums, float4* scratch, const ThreadRole& role) {
#pragma unroll
    for (int part = 0; part < WORDS; ++part) {
        if constexpr (K_WARPS == 1) {
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
                for (int i = 0; i < 4; ++i) own[part][slab][i] = sums[part][slab][i];
        } else {
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab) {
                const float(&s)[4] = sums[part][slab];
                scratch[(role.warp * SLABS + slab) * 32 + role.lane] = make_float4(s[0], s[1], s[2], s[3]);
            }
            sync_threads<THREADS>();
            if (role.k_warp == part / OWN) {
#pragma unroll
                for (int slab = 0; slab < SLABS; ++slab) {
                    float(&total)[4] = own[part % OWN][slab];
#pragma unroll
                    for (int other = 0; other < K_WARPS; ++other) {
                        const float4 theirs = scratch[((other * COLUMN_WARPS + role.column_warp) * SLABS + slab) * 32 + role.lane];
                        total[0] = other ? total[0] + theirs.x : theirs.x;
                        total[1] = other ? total[1] + theirs.y : theirs.y;
                        total[2] = other ? total[2] + theirs.z : theirs.z;
                        total[3] = other ? total[3] + theirs.w : theirs.w;
                    }
                }
            }
            sync_threads<THREADS>();
        }
    }
}

// The partial sums of a tile that several CTAs share are reduced in float32 through `partials`, or on Hopper in a cluster
// (cluster_sm90.cuh): each CTA writes its sums to a place of its own and increments `counters[tile]` (contribute); the last one to do so
// adds all of them in the order of k (gather) and writes the output. The order of the additions does not depend on which CTA is last:
// equal inputs give equal bits on the same number of CTAs. No CTA waits for another, so they need not be resident together. The last one
// resets the counter to 0: the workspace is zeroed once, when it is allocated. Launches that may run concurrently need separate workspaces.
struct SharedTile {  // a tile and its CTAs
    float4* partials;  // [2 CTAs][OWN][SLABS][THREADS]: two tiles for each CTA
    int* counter;      // of this tile
    int first_cta, last_cta;

    __device__ __forceinline__ float4* place(int cta, int part, int slab, const ThreadRole& role) const {
        // The part at the start of a tile is a CTA's last, any other its first.
        const int slot = 2 * (cta * PAIR + static_cast<int>(rank_in_pair())) + (cta == first_cta ? 1 : 0);
        return partials + (static_cast<size_t>(slot) * (OWN * SLABS) + part * SLABS + slab) * THREADS + role.thread;
    }
};

// True in the CTA that came last. `arrived` is a place in shared memory.
__device__ __forceinline__ bool contribute(const OwnSums& own, const SharedTile& tile, int* arrived, const ThreadRole& role) {
#pragma unroll
    for (int part = 0; part < OWN; ++part)
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab) {
            const float(&s)[4] = own[part][slab];
            __stcg(tile.place(cta_index() / PAIR, part, slab, role), make_float4(s[0], s[1], s[2], s[3]));
        }
    sync_threads<THREADS>();
    if (role.thread == 0) *arrived = count_up(tile.counter);  // a CTA that sees the count sees the sums that were written before it
    sync_threads<THREADS>();
    const bool last = *arrived == tile.last_cta - tile.first_cta;
    if (last && role.thread == 0) *tile.counter = 0;
    return last;
}

// Adds the partial sums of `slabs` slabs. Loads of several CTAs' sums are in flight together where registers allow: one after the other,
// each would cost the latency of L2.
template <int slabs>
__device__ __forceinline__ void gather(OwnSums& own, const SharedTile& tile, int first_slab, const ThreadRole& role) {
    constexpr int NUMBERS = OWN * slabs, GATHERED = NUMBERS <= 2 ? 4 : THREADS > 256 || SLABS > 12 ? 1 : NUMBERS <= 8 ? 4 : NUMBERS <= 16 ? 2 : 1;
#pragma unroll
    for (int part = 0; part < OWN; ++part)
#pragma unroll
        for (int slab = first_slab; slab < first_slab + slabs; ++slab)
#pragma unroll
            for (int i = 0; i < 4; ++i) own[part][slab][i] = 0.0f;
#pragma unroll(GATHERED)
    for (int cta = tile.first_cta; cta <= tile.last_cta; ++cta) {
#pragma unroll
        for (int part = 0; part < OWN; ++part)
#pragma unroll
            for (int slab = first_slab; slab < first_slab + slabs; ++slab) {
                const float4 theirs = __ldcg(tile.place(cta, part, slab, role));
                float(&s)[4] = own[part][slab];
                s[0] += theirs.x, s[1] += theirs.y, s[2] += theirs.z, s[3] += theirs.w;
            }
    }
}

// The end of a tile in its CTA: write(own, first_slab) writes WRITTEN slabs. More than eight slabs are gathered and written in two halves.
// The two cases below each have their own copy of the code: with a common one the compiler moves registers and spills.
constexpr int WRITTEN = SLABS > 8 && SLABS % 2 == 0 ? SLABS / 2 : SLABS;

template <class Write>
__device__ __forceinline__ void complete(OwnSums& own, const SharedTile& tile, int* arrived, const ThreadRole& role, Write write) {
    if (tile.first_cta == tile.last_cta) {
#pragma unroll
        for (int slab = 0; slab < SLABS; slab += WRITTEN) write(own, slab);
    } else if (contribute(own, tile, arrived, role)) {
#pragma unroll
        for (int slab = 0; slab < SLABS; slab += WRITTEN) {
            gather<WRITTEN>(own, tile, slab, role);
            write(own, slab);
        }
    }
}
