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
// THE LOOP (factored_sm90.cuh) is that of the 16-bit kernels (products_sm90.cuh): while the tensor core works on STEPS steps of 32 k, a warp decodes the words
// of the next ones into the other half of its A registers.
//
// PAIRS.  An SM takes 4,096 products a clock, and a tile of 256 tokens x 128 columns brings 320 bytes for each k, 8 clocks of them: 40 bytes a
// clock, where L2 gives all SMs together about 25 each. So two CTAs share activations (stripes.cuh): 192 bytes. It also takes less power.
//
// MEASURED.  NVIDIA H200, 2026-12-01, microseconds in a CUDA graph, with overlap, groups of 128, the product alone, one call for all rows:
//
//   M                32       64       96      128      256     1024     4096
//   73728 x 18432    180      205      268      302      524     2036     8145
//   torch fp8        473      434      367      354      547     1982     8467
//   torch float16    616      643      641      654     1004     3655    16743
//
// docs/log/2026-12-01-copies-and-order.md; the energy of a product: docs/log/2026-12-01-factored-weights.md.
//
// LIMITS.  As marlin_a8_sm90.cu.
#include "write_marlin.cuh"
#include "factored_sm90.cuh"
#include "gemm_sm90.cuh"

struct DenseA8 {
    static constexpr int TILE_K = 16, META_BYTES = 0;

    static __device__ __forceinline__ const char* metadata_at(const char*, unsigned, const ThreadRole&) { return nullptr; }
    static __device__ __forceinline__ void load_metadata(unsigned (&)[4], const char*, int) {}
    static __device__ __forceinline__ void multiply(PartSums& sums, const unsigned (&fragment)[4], unsigned long long b, unsigned) {
        wgmma_int8(sums, fragment, b, true);
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
    gemm_sm90<FactoredProducts<DenseA8>>(activations, qweight, nullptr, token_scales, factors, output, partials, counters, m, n, k, whole);
}
