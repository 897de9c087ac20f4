// What the kernels for int8 activations on Ampere and later have in common: marlin_a8_sm80.cu, which explains it, and
// marlin_a8_factored_sm80.cu. Each of them is a policy of gemm_sm80.cuh.
#pragma once
#include "decode_int8.cuh"
#include "write_marlin.cuh"
#include "gemm_sm80.cuh"

constexpr bool GROUPED = GROUP_SHIFT >= 0;
constexpr int GROUP_TILES = GROUPED ? 1 << (GROUPED ? GROUP_SHIFT : 0) : K_STEP / 16;  // rows of words
constexpr int SUM_TILES = GROUP_TILES < 8 ? GROUP_TILES : 8;                           // of them, those that are summed in int32
using IntSums = int[WORDS][SLABS][4];
using StepWords = unsigned[2][4];           // of 32 k: a lane's words in two rows
using StepTokens = unsigned[SLABS / 2][4];  // the two registers of B of eight tokens, and of the next eight

static_assert(TOKENS % 16 == 0, "ldmatrix reads four matrices: 16 tokens x 32 k");
static_assert(K_STEP / K_WARPS % TOKEN_GROUP == 0, "a warp's part of k ends with a group, of weights and of activations");

// Copies of the scales of tokens [G128, M'] into stages: [K_STEP/128][TOKENS] float32. Out of bounds they become zeros, as activations do.
struct TokenScaleCopies {
    static constexpr unsigned ROW = TOKENS / 4, COPIES = TOKEN_GROUPS ? K_STEP / TOKEN_GROUP * ROW : 0;  // of 16 bytes
    const char* scales;
    unsigned thread, row, groups, to;

    static_assert(COPIES <= THREADS, "a thread copies at most one");

    __device__ __forceinline__ TokenScaleCopies(const ThreadRole& role, const char* scales, unsigned m, unsigned k, unsigned first_stage)
        : scales(scales), thread(role.thread), row((m + 3) / 4 * 4), groups((k + TOKEN_GROUP - 1) / TOKEN_GROUP) {
        to = first_stage + role.thread * 16;
    }

    template <class Copy>
    __device__ __forceinline__ void each(const Cursor& at, unsigned offset, Copy copy) const {
        if (COPIES == 0 || thread >= COPIES) return;
        const unsigned group = at.step * (K_STEP / TOKEN_GROUP) + thread / ROW, token = at.token_tile * TOKENS + thread % ROW * 4;
        copy(to + offset, scales + (static_cast<size_t>(group) * row + token) * 4, group < groups && token < row);
    }

    __device__ __forceinline__ void operator()(const Cursor& at, unsigned offset) const {
        each(at, offset, [](unsigned shared, const char* global, bool inside) { copy_async(shared, global, inside); });
    }

    // As ActivationCopies fills them, and for the same reasons.
    template <int stage_bytes>
    __device__ __forceinline__ void first_stages(const Stripes& stripes) const {
        Cursor at = stripes.first();
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            const bool there = stripes.inside(at);
            each(at, stage * stage_bytes, [&](unsigned shared, const char* global, bool inside) {
                store_shared(shared, there && inside ? __ldcg(reinterpret_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0));
            });
            stripes.advance(at);
        }
    }
};

// Where results go, and the scales of tokens that have one each. They multiply sums here, and not in the other write_result, which would
// load them again for every 8 columns: that was half of the kernel's instructions.
struct TokenOutput {
    Output output;
    const float* token_scales;  // [M']
};

template <int slabs>
__device__ __forceinline__ void write_result(
    const float (&own)[OWN][slabs][4], const TokenOutput& to, const Cursor& at, int first_slab, const ThreadRole& role
) {
    float scaled[OWN][slabs][4];
    const unsigned row = (to.output.m + 3) / 4 * 4;
#pragma unroll
    for (int slab = first_slab; slab < first_slab + WRITTEN; ++slab) {
        const unsigned token = at.token_tile * TOKENS + slab * 8 + role.lane % 4 * 2;
        float2 scale = make_float2(1.0f, 1.0f);
        if (!TOKEN_GROUPS) scale = *reinterpret_cast<const float2*>(to.token_scales + (token < row ? token : 0));
#pragma unroll
        for (int word = 0; word < OWN; ++word)
#pragma unroll
            for (int i = 0; i < 4; ++i) scaled[word][slab][i] = own[word][slab][i] * (i % 2 ? scale.y : scale.x);
    }
    write_result(scaled, to.output, at, first_slab, role);
}

// The part of a policy that both have.
struct Int8 {
    using GroupSums = IntSums;
    using Beside = TokenScaleCopies;
    static constexpr int TILE_K = 16, META_BYTES = 0, BESIDE_BYTES = K_STEP / TOKEN_GROUP * TOKENS * 4;
    static constexpr bool GROUPS_END_IN_STAGES = true;

    // A warp's part of a stage: step(i, tile, words, b) for each 32 of its k, rows `tile` and the next of the stage's words, and i and the
    // next of the warp's.
    template <class Weights, class Step>
    static __device__ __forceinline__ void each_step(
        const char* shared, const unsigned& shared_base, int stage_index, const ThreadRole& role, const Step& step
    ) {
        using S = Stage<Weights>;
        const unsigned lane = role.lane;
        const char* words_at = shared + stage_index * S::BYTES + (role.block * 32 + lane) * 16 + role.first_word * 4;
        const unsigned activations_at = shared_base + stage_index * S::BYTES + S::ACTIVATIONS_AT;
        const unsigned matrix = lane / 8;                // that this lane names for ldmatrix
        const unsigned row = matrix / 2 * 8 + lane % 8;  // its token
        const unsigned chunk = matrix % 2 ^ lane % 8;    // its 16 of k, swizzled, in the first step
#pragma unroll
        for (int i = 0; i < S::WARP_TILES; i += 2) {
            const unsigned tile = role.k_warp * S::WARP_TILES + i;
            StepWords words;
            StepTokens b;
            load_words(words[0], words_at + tile * (BLOCKS * 512));
            load_words(words[1], words_at + (tile + 1) * (BLOCKS * 512));
#pragma unroll
            for (int sixteen = 0; sixteen < SLABS / 2; ++sixteen) {
                load_matrices(b[sixteen], activations_at + ((sixteen * 16 + row) * CHUNKS + (tile ^ chunk)) * 16);
            }
            step(i, tile, words, b);
        }
    }
};
