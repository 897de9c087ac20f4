// Dense INT4 x INT8 GEMM for Ampere and later, of weights whose scales are integers times one scale for each output:
//
//   out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N]),  weight[n, k] = code * factor[n, group of k] * channel_scale[n]
//
//   activations   [M, K'] int8      rounded by round_activations.cu, in the order of the tile (marlin_a8_sm90.cu)
//   token_scales  [M'] float32      one for each token
//   qweight       [K'/16, 2N']      int32, MARLIN tiles
//   factors       [G' + 1, N']      16 bits: rows of factors and, as the last row, channel scales (kernels/factored.py). Channel-wise: that
//                                   row alone
//
//   out[m, n] = token_scale[m] * channel_scale[n] * (sum over all k of code * factor * activation)  + bias[n]
//
// marlin_a8_factored_sm90.cu is the same for Hopper, and explains how words become code * factor; marlin_a8_sm80.cu explains the fragments.
// The sum over all of K is exact, int32, and there are no float sums beside it: registers hold twice as many tokens. QServe (Lin et al.,
// arXiv 2405.04532) and LiquidGEMM (Hu et al., arXiv 2509.01229) have scales of this form.
//
// MEASURED.  Nothing on sm_80, 86 and 89.
//
// LIMITS.  As marlin_a8_sm80.cu; K at most 131,072 (factored.py).
#include "a8_sm80.cuh"

struct FactoredWeights : Int8 {
    static __device__ __forceinline__ void begin(GroupSums& whole_sums) {
#pragma unroll
        for (int word = 0; word < WORDS; ++word)
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
                for (int i = 0; i < 4; ++i) whole_sums[word][slab][i] = 0;
    }

    // Parts of a tile meet in float32, like those of the other kernels: an int32 sum loses at most 2^-24 of itself.
    static __device__ __forceinline__ void end(Sums& sums, GroupSums& whole_sums, bool) {
#pragma unroll
        for (int word = 0; word < WORDS; ++word)
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float sum = static_cast<float>(whole_sums[word][slab][i]);
                    sums[word][slab][i] = GROUPED ? sum : sum * 0.0625f;  // decode_int8's codes are 16 times as large
                }
        begin(whole_sums);
    }
    static __device__ __forceinline__ void close(Sums&, GroupSums&, const char*, int, int, const Groups&, const ThreadRole&) {}

    template <class Close>
    static __device__ __forceinline__ void multiply(
        GroupSums& whole_sums, const char* shared, const unsigned& shared_base, int stage_index, int, const ThreadRole& role, const Groups&,
        const Close&
    ) {
        using S = Stage<FactoredWeights>;
        const char* stage = shared + stage_index * S::BYTES;
        const char* factors_at = stage + S::SCALES_AT + (role.block * 64 + role.lane / 4 * 8 + 2 * role.first_word) * 2;
        Factors factors[WORDS];
        auto step = [&](int i, unsigned tile, const StepWords& words, const StepTokens& b) {
            if (GROUPED && i % GROUP_TILES == 0) {
                unsigned pairs[4];
                load_words(pairs, factors_at + tile / GROUP_TILES * (COLUMNS * 2));
#pragma unroll
                for (int word = 0; word < WORDS; ++word) factors[word].set(pairs[word]);
            }
#pragma unroll
            for (int word = 0; word < WORDS; ++word) {
                unsigned a[4];
                if (GROUPED) decode_factored(a, words[0][word], words[1][word], factors[word]);
                else decode_int8(a, words[0][word], words[1][word]);
#pragma unroll
                for (int slab = 0; slab < SLABS; ++slab) {
                    mma_int8(whole_sums[word][slab], a, b[slab / 2][slab % 2 * 2], b[slab / 2][slab % 2 * 2 + 1]);
                }
            }
        };
        each_step<FactoredWeights>(shared, shared_base, stage_index, role, step);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) marlin_a8_factored_sm80(
    const char* __restrict__ activations,  // [M, K'] int8
    const uint4* __restrict__ qweight,     // [K'/16, N'/64, 32 lanes] of four words
    const char* __restrict__ token_scales,  // [M'] float32
    const char* __restrict__ factors,      // [G' + 1, N'] of 16 bits
    const unsigned short* __restrict__ bias,  // [N] as the output, or null
    unsigned* __restrict__ out,            // [M, N/2] pairs
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS], of a tile's CTAs
    int* __restrict__ counters,            // [tiles of n][tiles of m], zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int whole,                             // tiles that each CTA computes alone (stripes.cuh)
    int                                    // group_shift, which is GROUP_SHIFT here
) {
    constexpr unsigned GROUP = GROUPED ? 16 << (GROUPED ? GROUP_SHIFT : 0) : 1;
    const size_t groups = GROUPED ? ((k + 63) / 64 * 64 + GROUP - 1) / GROUP : 0;
    const Output unscaled{factors + groups * ((n + 63) / 64 * 128), bias, out, m, n, false};
    const TokenOutput output{unscaled, reinterpret_cast<const float*>(token_scales)};
    gemm_sm80<FactoredWeights>(activations, qweight, nullptr, nullptr, factors, output, partials, counters, m, n, k, whole, GROUP_SHIFT);
}
