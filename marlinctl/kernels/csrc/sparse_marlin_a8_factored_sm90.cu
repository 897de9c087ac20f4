// 2:4 INT4 x INT8 GEMM for Hopper, of weights whose scales are integers times one scale for each output:
//
//   out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N]),  weight[n, k] = code * factor[n, group of k] * channel_scale[n], or 0
//
//   activations   [M, K'] int8      rounded by round_activations.cu, in the order of 2:4 tiles (below)
//   token_scales  [M'] float32      one for each token; M' is M rounded up to 4
//   qweight       [K'/32, 2N']      int32, Sparse-MARLIN tiles     N', K' are N, K rounded up to 64 (docs/formats/marlin_24.md)
//   meta          [K'/32, 2N']      int16, the metadata of these tiles in another order (below; kernels/int8_metadata.py)
//   factors       [G' + 1, N']      16 bits: as in marlin_a8_factored_sm90.cu, in the orders of Sparse-MARLIN's scales
//   bias, out                       [N], [M, N], 16-bit numbers
//
//   out[m, n] = token_scale[m] * channel_scale[n] * (sum over all k of code * factor * activation)  + bias[n]
//
// This is marlin_a8_factored_sm90.cu, where the exact sum over all of K, the bytes of code times factor, the loop and pairs of CTAs are
// explained, with wgmma.sp: its m64nNk64 takes 64 of k in the time of m64nNk32 without zeros. Stages and roles are those of marlin_sm90.cu.
// The tiles are those of Sparse-MARLIN (Frantar et al., arXiv 2408.11743).
//
// A STEP is 64 of k, two rows of words. Words w0 and w1 of a lane are survivors of the outputs n = 8g + j and 8g + 4 + j, g = t/4:
//
//   word j of lane t, row of words r      survivors 2(t%4) + {0, 1, 8, 9} of 16: both of quad t%4 and of quad 4 + t%4 of eight
//
// so that the bytes that decode_factored makes of them are, in the registers that the product wants (9.7.15.6 and 9.7.14.6.2 of the PTX
// ISA; a quad is four neighbours in k, and has two survivors):
//
//                 output      bytes 0 1              bytes 2 3               places in a row of 32 kept numbers
//   a[0]          8g + j      w0, quad t%4           w1, quad t%4            4(t%4) .. + 3
//   a[1]          8g + 4 + j  w0, quad t%4           w1, quad t%4            4(t%4) .. + 3
//   a[2]          8g + j      w0, quad 4 + t%4       w1, quad 4 + t%4        16 + 4(t%4) .. + 3
//   a[3]          8g + 4 + j  w0, quad 4 + t%4       w1, quad 4 + t%4        16 + 4(t%4) .. + 3
//
// ACTIVATIONS therefore lie, in each 64 of k, quad by quad in the order
//
//   0 8 1 9 2 10 3 11 4 12 5 13 6 14 7 15
//
// METADATA of a product is one register of every lane: of lane t row t/4 + 8 (t%2) of the fragment, 32 (t%4 / 2) of k and up, four bits for
// each quad in that order. So it lies in memory as words do, 128 of 32 bits for a step and 64 outputs, but in two rows of 256 bytes:
//
//   row j/2       [32 lanes][2]     of words j = 0 and 1, or 2 and 3
//
// Metadata of columns out of bounds is the previous content of the stage, as in sparse_marlin_sm90.cu; below the last row of words it is a
// copy of that row, and activations are zeros there.
//
// GROUPS of 32 end between the two words of a step: each word's bytes meet its own factor, for one more multiplication (factored_sm90.cuh).
//
// MEASURED.  NVIDIA H200, 2026-12-01, microseconds in a CUDA graph, with overlap, groups of 128, rounding included, one call:
//
//   M                      64       96      128      256      512     1024
//   73728 x 18432         160      206      218      396      812     1654
//   sparse_marlin_sm90    206      254      332      652
//   torch fp8             442      370      361      575     1082     2097
//
// What limits it is expected to be L2: a tile of 128 tokens x 256 columns brings 224 bytes for each k, 160 in pairs, and an SM multiplies
// them in 4 clocks.
//
// LIMITS.  As marlin_a8_factored_sm90.cu. SPLIT is 1 or 2 (write_sparse_marlin.cuh).
#define COPIES_METADATA 1
#include "write_sparse_marlin.cuh"
#include "factored_sm90.cuh"
#include "gemm_sm90.cuh"

struct SparseA8 {
    static constexpr int TILE_K = 32, META_BYTES = 256;

    static __device__ __forceinline__ const char* metadata_at(const char* metadata, unsigned first_tile, const ThreadRole& role) {
        return metadata + ((first_tile + role.first_word / 2) * BLOCKS + role.block) * META_BYTES + role.lane * 8;
    }

    static __device__ __forceinline__ void load_metadata(unsigned (&e)[4], const char* at, int step) {
#pragma unroll
        for (int pair = 0; pair < WORDS / 2; ++pair) {
            const uint2 two = *reinterpret_cast<const uint2*>(at + (2 * step + pair) * (BLOCKS * META_BYTES));
            e[2 * pair] = two.x, e[2 * pair + 1] = two.y;
        }
    }

    static __device__ __forceinline__ void multiply(PartSums& sums, const unsigned (&fragment)[4], unsigned long long b, unsigned e) {
        wgmma_sparse_int8(sums, fragment, b, e, true);
    }
};

static_assert(SPLIT <= 2, "a lane writes two neighbouring outputs or four");

extern "C" __global__ void __launch_bounds__(THREADS + COPY_THREADS, CTAS) sparse_marlin_a8_factored_sm90(
    const __grid_constant__ TensorMap activations,  // [M, K'] int8, in boxes of TOKENS (PAIRED: half of them) x 128
    const __grid_constant__ TensorMap qweight,      // [K'/32, N'/64] of 512 bytes (32 lanes, four words), in boxes of K_STEP/32 x BLOCKS
    const char* __restrict__ meta,         // [K'/64, 2, N'/64] of 256 bytes: 32 lanes, two registers
    const char* __restrict__ token_scales,  // [M'] float32
    const char* __restrict__ factors,      // [G' + 1, N'] of 16 bits
    const unsigned short* __restrict__ bias,  // [N] as the output, or null
    unsigned short* __restrict__ out,      // [M, N]
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS], of a tile's CTAs; null in clusters that are no pairs, as counters
    int* __restrict__ counters,            // [tiles of n][tiles of m], of pairs [pairs of tiles of n][tiles of m][2]; zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int whole,                             // tiles that each CTA computes alone (stripes.cuh)
    int                                    // group_shift, which is GROUP_SHIFT here
) {
    constexpr unsigned GROUP = GROUPED ? 16 << (GROUPED ? GROUP_SHIFT : 0) : 1;
    const size_t groups = GROUPED ? ((k + 63) / 64 * 64 + GROUP - 1) / GROUP : 0;
    const Output output{factors + groups * ((n + 63) / 64 * 128), bias, out, m, n, false, reinterpret_cast<const float*>(token_scales)};
    gemm_sm90<FactoredProducts<SparseA8>>(activations, qweight, meta, token_scales, factors, output, partials, counters, m, n, k, whole);
}
