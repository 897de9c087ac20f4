// Dense INT4 x INT8 GEMM for Hopper, of weights whose scales are integers times one scale for each output:
//
//   out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N]),  weight[n, k] = code * factor[n, group of k] * channel_scale[n]
//
//   activations   [M, K'] int8      as in marlin_a8_sm90.cu, which explains the order of their k and how words become int8
//   token_scales  [M'] float32      one for each token
//   qweight       [K'/16, 2N']      int32, MARLIN tiles
//   factors       [G' + 1, N']      16 bits: rows of factors, -15 .. 16, in MARLIN's order of scales of groups, and as the last row channel
//                                   scales, float16 in the order of channel-wise ones (kernels/factored.py). Channel-wise: that row alone
//
//   out[m, n] = token_scale[m] * channel_scale[n] * (sum over all k of code * factor * activation)  + bias[n]
//
// The sum is exact: code * factor is -128 .. 120 and fits int8, and K is at most 131,072 (factored.py). So it is never scaled before the
// end, which takes marlin_a8_sm90.cu a fifth of its energy, and the tensor core never waits for it. QServe (Lin et al., arXiv 2405.04532)
// and LiquidGEMM (Hu et al., arXiv 2509.01229) have scales of this form, with factors of their own formats.
//
// FROM WORDS TO INT8.  With q = code + 8, the nibble, and f the factor of a row, each byte of
//
//   ((bytes & 0x0f0f0f0f) * f + (128 - 8 f) * 0x01010101) ^ 0x80808080
//
// is code * f: q f + 128 - 8 f is 0 .. 248, so that the bytes of the 32-bit result are these four numbers, whatever the product alone
// carried or borrowed between them; and the exclusive or takes 128 away. 16 instructions for 16 weights. Channel-wise the factor is 16: decode_int8's codes, whose 16 is taken out at the end.
//
// THE LOOP is that of the 16-bit kernels (products_sm90.cuh): while the tensor core works on STEPS steps of 32 k, a warp decodes the words
// of the next ones into the other half of its A registers.
//
// PAIRS.  An SM takes 4,096 products a clock, and a tile of 256 tokens x 128 columns brings 320 bytes for each k, 8 clocks of them: 40 bytes a
// clock, where L2 gives all SMs together about 25 each. So two CTAs share activations (stripes.cuh): 192 bytes. It also takes less power.
//
// MEASURED.  NVIDIA H200, 2026-12-01, microseconds in a CUDA graph, with overlap, groups of 128, the product alone, one call for all rows:
//
//   M                     64       96      128      256     1024     4096
//   73728 x 18432        210      302      316      555     2254     9104
//   marlin_a8_sm90       260      338      404      709     3108    11376
//   torch fp8            435      380      368      568     2050     9205
//
// and M = 1024 in runs of 0.7 s: 2261 us at 735 W, 1.66 J; not paired 2657 us, 1.93 J; marlin_a8_sm90 2.08 J; torch fp8 2284 us, 1.65 J;
// torch float16 3.02 J (docs/log/2026-12-01-factored-weights.md).
//
// LIMITS.  As marlin_a8_sm90.cu.
#include "write_marlin.cuh"
#include "a8_sm90.cuh"
#include "gemm_sm90.cuh"

using WholeSums = PartSums[WORDS][TOKEN_PARTS];  // over all k that this CTA has of a tile

static_assert(A8Stage::WARP_TILES / 2 % (2 * STEPS) == 0, "a stage begins with the first half of a");

struct FactoredProducts {
    using S = A8Stage;
    using GroupSums = WholeSums;
    static constexpr int TILE_K = 16, META_BYTES = 0;

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
        constexpr int WARP_STEPS = S::WARP_TILES / 2, GROUP_STEPS = S::GROUP_TILES / 2;  // of 32 k
        const char* stage = stages + stage_index * S::BYTES;
        const unsigned first_tile = warp_uniform(role.k_warp) * S::WARP_TILES;
        const unsigned long long b = describe_rows(shared_base + stage_index * S::BYTES + first_tile / 8 * (TOKENS * 128));
        const char* words_at = stage + S::WEIGHTS_AT + ((first_tile * BLOCKS + role.block) * 32 + role.lane) * 16 + role.first_word * 4;
        const char* factors_at = stage + S::SCALES_AT + (role.block * 64 + role.lane / 4 * 8 + 2 * role.first_word) * 2;
        unsigned words[2][2][4], a[2 * STEPS][WORDS][4];  // words of two steps
        Factors factors[WORDS];

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
                if (GROUPED && step % GROUP_STEPS == 0) {
                    unsigned pairs[4];
                    load_words(pairs, factors_at + (first_tile / 2 + step) / GROUP_STEPS * (COLUMNS * 2));
#pragma unroll
                    for (int word = 0; word < WORDS; ++word) factors[word].set(pairs[word]);
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
                        const int row = step / 4 * TOKENS + part * (TOKENS / TOKEN_PARTS);
                        wgmma_int8(whole_sums[word][part], a[step % (2 * STEPS)][word], b + (row * 128 + step % 4 * 32) / 16, true);
                    }
            wgmma_commit();
            wgmma_wait<1>();  // the steps before: their half of a may be overwritten
            if (first == 0) before.release();
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + COPY_THREADS, CTAS) marlin_a8_factored_sm90(
    const __grid_constant__ TensorMap activations,  // [M, K'] int8, in boxes of TOKENS (PAIRED: half of them) x 128
    const __grid_constant__ TensorMap qweight,      // [K'/16, N'/64] of 512 bytes (32 lanes, four words), in boxes of K_STEP/16 x BLOCKS
    const char* __restrict__ token_scales,  // [M'] float32
    const char* __restrict__ factors,      // [G' + 1, N'] of 16 bits
    const unsigned short* __restrict__ bias,  // [N] as the output, or null
    unsigned* __restrict__ out,            // [M, N/2] pairs
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS], of a tile's CTAs; null in clusters that are no pairs, as counters
    int* __restrict__ counters,            // [tiles of n][tiles of m], of pairs [pairs of tiles of n][tiles of m][2]; zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int whole,                             // tiles that each CTA computes alone (stripes.cuh)
    int                                    // group_shift, which is GROUP_SHIFT here
) {
    constexpr unsigned GROUP = GROUPED ? 16 << (GROUPED ? GROUP_SHIFT : 0) : 1;
    const size_t groups = GROUPED ? ((k + 63) / 64 * 64 + GROUP - 1) / GROUP : 0;
    const Output output{factors + groups * ((n + 63) / 64 * 128), bias, out, m, n, false, reinterpret_cast<const float*>(token_scales)};
    gemm_sm90<FactoredProducts>(activations, qweight, nullptr, token_scales, factors, output, partials, counters, m, n, k, whole);
}
