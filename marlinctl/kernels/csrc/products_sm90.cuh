// The loop of the kernels for 16-bit activations over one stage. marlin_sm90.cu explains it. What differs between dense and 2:4 is a policy,
// Weights:
//
//   TILE_K                k of a row of words, and of one product of the tensor core
//   META_BYTES            of metadata, for a row of words of 64 columns; 0: none
//   AHEAD                 steps of k between a word's load and its decoding
//   metadata_at(...)      where a lane reads metadata of a stage
//   load_metadata(...)    into e, for step i of the warp and as many after it as one ldmatrix serves; nothing where it is loaded already
//   multiply(...)         the products of step i
#pragma once
#include "pipeline_sm90.cuh"

// A stage holds K_STEP of k (pipeline_sm90.cuh says who fills it):
//
//   activations  [K_STEP/64][TOKENS]                rows of 128 bytes, swizzled
//   weights      [K_STEP/TILE_K][BLOCKS][32 lanes]  16 bytes each, as in memory: every lane reads back the 16 bytes of its own
//   metadata     [K_STEP/TILE_K][BLOCKS][2][8]      16 bytes each, as in memory: the 8 rows of a matrix lie in different banks
//   scales       [rows of groups][64 BLOCKS]        float16; room for groups of 32
template <class Weights>
struct Stage {
    static constexpr int K_TILES = K_STEP / Weights::TILE_K;  // rows of words
    static constexpr int WARP_TILES = K_TILES / K_WARPS;      // and of them those of one warp
    static constexpr int ROW_TILES = 64 / Weights::TILE_K;    // in 128 bytes of activations
    static constexpr int GROUP_TILES = GROUPED ? (16 << (GROUPED ? GROUP_SHIFT : 0)) / Weights::TILE_K : K_TILES;
    static constexpr int BATCH = SCALE_SUMS && GROUP_TILES < STEPS ? GROUP_TILES : STEPS;  // steps multiplied at a time, never of two groups
    static constexpr int GROUP_ROWS = !GROUPED ? 0 : K_TILES > GROUP_TILES ? K_TILES / GROUP_TILES : 1;  // of scales
    static constexpr int WEIGHTS_AT = ACTIVATION_BYTES, META_AT = WEIGHTS_AT + K_TILES * BLOCKS * 512;
    static constexpr int SCALES_AT = META_AT + K_TILES * BLOCKS * Weights::META_BYTES, BYTES = SCALES_AT + SCALE_BYTES;
    static constexpr int SCRATCH_AT = STAGES * BYTES, RING_AT = SCRATCH_AT + SCRATCH_BYTES, ARRIVED_AT = RING_AT + RING_BYTES;

    static_assert(ARRIVED_AT + 16 == SHARED_BYTES, "the host allots other shared memory than the kernel uses");
    static_assert(BYTES % 1024 == 0, "the swizzle is one of address bits");
    static_assert(PAIRED || PART_BYTES <= STAGES * BYTES, "a cluster's CTAs show each other their sums where the stages were");
    static_assert(WARP_TILES % ROW_TILES == 0, "a warp's part of k begins with a row of 128 bytes");
    static_assert(WARP_TILES % (2 * BATCH) == 0, "a stage begins with the first half of a");
    static_assert(WARP_TILES % GROUP_TILES == 0 || GROUP_TILES % WARP_TILES == 0, "groups and parts of a stage end together");
};

// For gemm_sm90.
template <class Weights>
struct SixteenBitProducts {
    using S = Stage<Weights>;
    using GroupSums = Sums;  // of the current group: sums of code times activation
    static constexpr int TILE_K = Weights::TILE_K, META_BYTES = Weights::META_BYTES;

    static __device__ __forceinline__ void begin(GroupSums& group_sums) { zero(group_sums); }
    static __device__ __forceinline__ void end(Sums& sums, GroupSums&) {
        if (!SCALE_SUMS) arrived(sums);
    }

    static __device__ __forceinline__ unsigned announced(const Cursor&, unsigned) { return ACTIVATION_BYTES; }
    static __device__ __forceinline__ void copy_beside(const char*, const Cursor&, unsigned, unsigned, unsigned, unsigned) {}

    // The warp's part of one stage.
    static __device__ __forceinline__ void multiply(
        Sums& sums, GroupSums& group_sums, const char* stages, const unsigned& shared_base, int stage_index, UnreleasedStage& before,
        const ThreadRole& role
    ) {
        constexpr int WARP_TILES = S::WARP_TILES, GROUP_TILES = S::GROUP_TILES;
        constexpr int BATCH = S::BATCH, AHEAD = Weights::AHEAD, ROW_TILES = S::ROW_TILES;
        const char* stage = stages + stage_index * S::BYTES;
        const unsigned first_tile = warp_uniform(role.k_warp) * WARP_TILES;
        const unsigned long long b = describe_rows(shared_base + stage_index * S::BYTES + first_tile / ROW_TILES * (TOKENS * 128));
        const char* words_at = stage + S::WEIGHTS_AT + ((first_tile * BLOCKS + role.block) * 32 + role.lane) * 16 + role.first_word * 4;
        const unsigned metadata_at = Weights::metadata_at(shared_base, stage_index, first_tile, role);
        unsigned words[AHEAD + 1][4], a[2 * BATCH][WORDS][4], e[2][4];  // e: metadata
        NUMBER::Scale lower[WORDS], upper[WORDS];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) load_words(words[i], words_at + i * (BLOCKS * 512));
#pragma unroll
        for (int first = 0; first < WARP_TILES; first += BATCH) {
            const bool begins = first % GROUP_TILES == 0;
            const bool ends = (first + BATCH) % GROUP_TILES == 0 || first + BATCH == WARP_TILES;
            const char* const row_of_scales = stage + S::SCALES_AT + (first_tile + first) / GROUP_TILES * (COLUMNS * 2);
#pragma unroll
            for (int i = first; i < first + BATCH; ++i) {
                if (i + AHEAD < WARP_TILES) load_words(words[(i + AHEAD) % (AHEAD + 1)], words_at + (i + AHEAD) * (BLOCKS * 512));
                Weights::load_metadata(e, metadata_at, i);
                if (GROUPED && !SCALE_SUMS && i % GROUP_TILES == 0) {
                    load_scales<NUMBER>(lower, upper, stage + S::SCALES_AT + (first_tile + i) / GROUP_TILES * (COLUMNS * 2), role);
                }
#pragma unroll
                for (int word = 0; word < WORDS; ++word) {
                    unsigned(&fragment)[4] = a[i % (2 * BATCH)][word];
                    dequantize<NUMBER>(fragment, words[i % (AHEAD + 1)][word]);
                    if (GROUPED && !SCALE_SUMS) scale_fragment<NUMBER>(fragment, lower[word], upper[word]);
                }
            }
            wgmma_fence();
#pragma unroll
            for (int i = first; i < first + BATCH; ++i) {
                const unsigned long long step = b + (i / ROW_TILES * (TOKENS * 128) + i % ROW_TILES * (2 * Weights::TILE_K)) / 16;
                const bool keep = !SCALE_SUMS || !begins || i > first;
                Sums& into = SCALE_SUMS ? group_sums : sums;
                const unsigned(&fragments)[WORDS][4] = a[i % (2 * BATCH)];
                Weights::multiply(into, fragments, step, e, i, keep);
            }
            wgmma_commit();
            if (SCALE_SUMS && ends) {
                wgmma_wait<0>();
                arrived(group_sums);
                close_group(sums, group_sums, row_of_scales, role);
            } else {
                wgmma_wait<1>();  // the batch before: its half of a may be overwritten
            }
            if (!SCALE_SUMS && first == 0) before.release();
        }
    }
};
