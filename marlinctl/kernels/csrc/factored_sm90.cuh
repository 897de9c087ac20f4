// Products of factored weights: the loop of the kernels for weights whose scales are integers times one scale for each output, dense
// (marlin_a8_factored_sm90.cu, which explains it) and 2:4. What differs is a policy, Weights:
//
//   TILE_K, META_BYTES    as in a8_sm90.cuh
//   metadata_at(...)      where a lane reads metadata of a stage
//   load_metadata(...)    into e, of the warp's words, for one step
//   multiply(...)         the product of one word and one step
#pragma once
#include "a8_sm90.cuh"

using WholeSums = PartSums[WORDS][TOKEN_PARTS];  // over all k that this CTA has of a tile

// The same as Factors where the two rows of words of a step are of two groups.
struct PartedFactors {
    unsigned of[2][2], offset[2];

    __device__ __forceinline__ void set(unsigned pair, unsigned second_pair) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            of[row][0] = static_cast<short>(pair >> 16 * row);
            of[row][1] = static_cast<short>(second_pair >> 16 * row);
            offset[row] = 0x80808080 - 0x0808 * of[row][0] - 0x08080000 * of[row][1];
        }
    }
    __device__ __forceinline__ unsigned times(int row, unsigned nibbles) const {
        return ((nibbles & 0xffff) * of[row][0] + (nibbles & 0xffff0000) * of[row][1] + offset[row]) ^ 0x80808080;
    }
};
template <bool parted>
struct FactorsOf {
    using Type = Factors;
};
template <>
struct FactorsOf<true> {
    using Type = PartedFactors;
};

// For gemm_sm90.
template <class Weights>
struct FactoredProducts {
    using S = A8Stage<Weights>;
    using GroupSums = WholeSums;
    static constexpr int TILE_K = Weights::TILE_K, META_BYTES = Weights::META_BYTES;
    static constexpr bool PARTED = GROUPED && S::GROUP_TILES == 1;

    static_assert(S::WARP_TILES / 2 % (2 * STEPS) == 0, "a stage begins with the first half of a");

    static __device__ __forceinline__ void begin(GroupSums& whole_sums) {
#pragma unroll
        for (int word = 0; word < WORDS; ++word)
#pragma unroll
            for (int part = 0; part < TOKEN_PARTS; ++part)
#pragma unroll
                for (int slab = 0; slab < SLABS / TOKEN_PARTS; ++slab)
#pragma unroll
                    for (int i = 0; i < 4; ++i) whole_sums[word][part][slab][i] = 0;
    }

    // Parts of a tile meet in float32, like those of the other kernels: an int32 sum loses at most 2^-24 of itself.
    static __device__ __forceinline__ void end(Sums& sums, GroupSums& whole_sums) {
#pragma unroll
        for (int word = 0; word < WORDS; ++word)
#pragma unroll
            for (int part = 0; part < TOKEN_PARTS; ++part) {
                wgmma_arrived(whole_sums[word][part]);
#pragma unroll
                for (int slab = 0; slab < SLABS / TOKEN_PARTS; ++slab)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float sum = static_cast<float>(whole_sums[word][part][slab][i]);
                        sums[word][part * (SLABS / TOKEN_PARTS) + slab][i] = GROUPED ? sum : sum * 0.0625f;
                    }
            }
        begin(whole_sums);
    }

    static __device__ __forceinline__ unsigned announced(const Cursor&, unsigned) { return ACTIVATION_BYTES; }
    static __device__ __forceinline__ void copy_beside(const char*, const Cursor&, unsigned, unsigned, unsigned, unsigned) {}

    static __device__ __forceinline__ void multiply(
        Sums&, GroupSums& whole_sums, const char* stages, const unsigned& shared_base, int stage_index, UnreleasedStage& before,
        const ThreadRole& role
    ) {
        constexpr int WARP_STEPS = S::WARP_TILES / 2, GROUP_STEPS = PARTED ? 1 : S::GROUP_TILES / 2;  // of two rows of words
        constexpr int ROW_STEPS = S::ROW_TILES / 2;
        const char* stage = stages + stage_index * S::BYTES;
        const unsigned first_tile = warp_uniform(role.k_warp) * S::WARP_TILES;
        const unsigned long long b = describe_rows(shared_base + stage_index * S::BYTES + first_tile / S::ROW_TILES * (TOKENS * 128));
        const char* words_at = stage + S::WEIGHTS_AT + ((first_tile * BLOCKS + role.block) * 32 + role.lane) * 16 + role.first_word * 4;
        const char* factors_at = stage + S::SCALES_AT + (role.block * 64 + role.lane / 4 * 8 + 2 * role.first_word) * 2;
        const char* metadata_at = Weights::metadata_at(stage + S::META_AT, first_tile, role);
        unsigned words[2][2][4], a[2 * STEPS][WORDS][4], e[2 * STEPS][4];  // words of two steps; e: metadata
        typename FactorsOf<PARTED>::Type factors[WORDS];

        auto load = [&](int step) {
#pragma unroll
            for (int i = 0; i < 2; ++i) load_words(words[step % 2][i], words_at + (2 * step + i) * (BLOCKS * 512));
        };
        load(0);
#pragma unroll
        for (int first = 0; first < WARP_STEPS; first += STEPS) {
#pragma unroll
            for (int step = first; step < first + STEPS; ++step) {
                if (step + 1 < WARP_STEPS) load(step + 1);
                Weights::load_metadata(e[step % (2 * STEPS)], metadata_at, step);
                if (GROUPED && step % GROUP_STEPS == 0) {
                    const char* const row = factors_at + (PARTED ? first_tile + 2 * step : (first_tile / 2 + step) / GROUP_STEPS) * (COLUMNS * 2);
                    unsigned pairs[4];
                    load_words(pairs, row);
                    if constexpr (PARTED) {
                        unsigned second_pairs[4];
                        load_words(second_pairs, row + COLUMNS * 2);
#pragma unroll
                        for (int word = 0; word < WORDS; ++word) factors[word].set(pairs[word], second_pairs[word]);
                    } else {
#pragma unroll
                        for (int word = 0; word < WORDS; ++word) factors[word].set(pairs[word]);
                    }
                }
#pragma unroll
                for (int word = 0; word < WORDS; ++word) {
                    unsigned(&fragment)[4] = a[step % (2 * STEPS)][word];
                    const unsigned w0 = words[step % 2][0][word], w1 = words[step % 2][1][word];
                    if (GROUPED) decode_factored(fragment, w0, w1, factors[word]);
                    else decode_int8(fragment, w0, w1);
                }
            }
            wgmma_fence();
#pragma unroll
            for (int step = first; step < first + STEPS; ++step)
#pragma unroll
                for (int word = 0; word < WORDS; ++word)
#pragma unroll
                    for (int part = 0; part < TOKEN_PARTS; ++part) {
                        const int row = step / ROW_STEPS * TOKENS + part * (TOKENS / TOKEN_PARTS);
                        const unsigned long long rows = b + (row * 128 + step % ROW_STEPS * (2 * TILE_K)) / 16;
                        Weights::multiply(whole_sums[word][part], a[step % (2 * STEPS)][word], rows, e[step % (2 * STEPS)][word]);
                    }
            wgmma_commit();
            wgmma_wait<1>();  // the steps before: their half of a may be overwritten
            if (first == 0) before.release();
        }
    }
};
