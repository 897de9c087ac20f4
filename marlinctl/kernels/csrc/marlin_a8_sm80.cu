// Dense INT4 x INT8 GEMM for Ampere and later:  out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N]), activations rounded to 8 bits
//
//   activations   [M, K'] int8          rounded by round_activations.cu, in the order of the tile (marlin_a8_sm90.cu)
//   token_scales  [M'] or [G128, M']    float32: one for each token, or (TOKEN_GROUPS) for each 128 of its k; M' is M rounded up to 4
//   qweight, scales, bias, out          as in marlin_sm80.cu, which explains the transposed product
//
//   out[m, n] = sum over groups of k  token_scale[m] * scale[n] * (sum over k of code * activation)  + bias[n]
//
// The sum of a group is exact: int32. It is scaled in float32, and rounded once, at the end. marlin_a8_sm90.cu does the same on Hopper, from the
// same folder and the same rounded activations. MARLIN (Frantar et al., arXiv 2408.11743) has the tiles and the pipeline, QServe (Lin et al.,
// arXiv 2405.04532) multiplies 4-bit weights with 8-bit activations on these GPUs.
//
// ONE STEP OF 32 IN K.  Two rows of words, decoded as on Hopper (decode_int8.cuh), are the A fragments of mma.m16n8k32:
//
//               k 0..31                         m 0..7  8..15
//            ┌──────────┐                     ┌───────┬───────┐
//        n 0 │  word 0  │ 16          k 0     │       │       │      B: int8 activations, a lane's register is four neighbours in memory, from
//            ├──────────┤                 .   │   B   │   B   │         4 (t % 4) on, of token t/4; the next register 16 further on. That is what
//         16 │  word 1  │  x          k 31    └───────┴───────┘         ldmatrix delivers of rows of 16 bytes: it does not know that they are
//            ├──────────┤                                               int8. The order of k inside of the 32 is the tile's, in A and in B
//            │    ..    │             n 0..63 │   D   │   D   │      D: int32, at the places of the 16-bit kernels
//
// A stage has [TOKENS][K_STEP/16] chunks of 16 bytes, chunk c of row r in place c ^ (r % 8) (tile.cuh): rows are 128 bytes or twice as many, so
// the eight that ldmatrix reads together lie in different banks.
//
// A GROUP'S SUM AS A FLOAT.  At most 128 * 128 * 127 = 2,080,768 in magnitude, 16 times the codes included, it is below 2^22. So the first
// product of a group adds to 0x4b400000, the bits of 1.5 * 2^23 as a float, and the sum's bits are those of 1.5 * 2^23 + sum: a subtraction makes
// it a float, exactly, where a conversion would take four times as long on sm_80 (CUDA C++ Programming Guide, throughput of native
// arithmetic instructions). The group size is known to the compiler: where a group begins and ends is no branch.
//
// NOT MEASURED on sm_80, 86 or 89: nothing of ours has been timed there, configurations are reasoned (kernels/configurations.py).
//
// LIMITS.  N a multiple of 8, everything aligned to 16 bytes; 2^31 units.
#include "a8_sm80.cuh"

constexpr int NOTHING = 0x4b400000;          // where a group's sum begins, and
constexpr float AS_FLOAT = 12582912.0f;      // the same bits

struct A8Weights : Int8 {
    static __device__ __forceinline__ void begin(GroupSums&) {}
    static __device__ __forceinline__ void end(Sums&, GroupSums&, bool) {}

    template <class Close>
    static __device__ __forceinline__ void multiply(
        GroupSums& group_sums, const char* shared, const unsigned& shared_base, int stage_index, int, const ThreadRole& role, const Groups&,
        const Close& close
    ) {
        const char* stage = shared + stage_index * Stage<A8Weights>::BYTES;
        each_step<A8Weights>(shared, shared_base, stage_index, role, [&](int i, unsigned tile, const unsigned(&words)[2][4], const unsigned(&b)[SLABS / 2][4]) {
#pragma unroll
            for (int word = 0; word < WORDS; ++word) {
                unsigned a[4];
                decode_int8(a, words[0][word], words[1][word]);
#pragma unroll
                for (int slab = 0; slab < SLABS; ++slab) {
                    const unsigned(&both)[4] = b[slab / 2];
                    int(&sums)[4] = group_sums[word][slab];
                    if (i % SUM_TILES == 0) mma_int8_onto(sums, a, both[slab % 2 * 2], both[slab % 2 * 2 + 1], NOTHING);
                    else mma_int8(sums, a, both[slab % 2 * 2], both[slab % 2 * 2 + 1]);
                }
            }
            if ((i + 2) % SUM_TILES == 0) close(stage, 0, tile);
        });
    }

    // sums += scales * group_sums, of the group of row `tile` of the stage's words; rows t/4 and t/4 + 8 of each word, token 2(t%4) of each eight
    // and the next.
    static __device__ __forceinline__ void close(
        Sums& sums, GroupSums& group_sums, const char* scales_of_stage, int, int tile, const Groups&, const ThreadRole& role
    ) {
        constexpr float SIXTEENTH = 0.0625f;  // of decode_int8's codes
        const char* scales = scales_of_stage + tile / GROUP_TILES * (COLUMNS * 2);
        const float* token_scales = reinterpret_cast<const float*>(scales_of_stage + SCALE_BYTES) + tile / (TOKEN_GROUP / 16) * TOKENS + role.lane % 4 * 2;
        unsigned pairs[4];
        if (GROUPED) load_words(pairs, scales + (role.block * 64 + role.lane / 4 * 8 + 2 * role.first_word) * 2);
        float lower[WORDS], upper[WORDS];
#pragma unroll
        for (int word = 0; word < WORDS; ++word) {
            lower[word] = GROUPED ? widen_half(static_cast<unsigned short>(pairs[word])) * SIXTEENTH : SIXTEENTH;
            upper[word] = GROUPED ? widen_half(static_cast<unsigned short>(pairs[word] >> 16)) * SIXTEENTH : SIXTEENTH;
        }
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab) {
            float2 token_scale = make_float2(1.0f, 1.0f);
            if (TOKEN_GROUPS) token_scale = *reinterpret_cast<const float2*>(token_scales + slab * 8);
#pragma unroll
            for (int word = 0; word < WORDS; ++word)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = sums[word][slab][i];
                    float group_sum = __uint_as_float(static_cast<unsigned>(group_sums[word][slab][i])) - AS_FLOAT;
                    if (TOKEN_GROUPS) group_sum *= i % 2 ? token_scale.y : token_scale.x;
                    sum = __fmaf_rn(i < 2 ? lower[word] : upper[word], group_sum, sum);
                }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) marlin_a8_sm80(
    const char* __restrict__ activations,  // [M, K'] int8
    const uint4* __restrict__ qweight,     // [K'/16, N'/64, 32 lanes] of four words
    const char* __restrict__ token_scales,  // [M'] or [G128, M'] float32
    const char* __restrict__ scales,       // [G', N'] float16
    const unsigned short* __restrict__ bias,  // [N] as the output, or null
    unsigned* __restrict__ out,            // [M, N/2] pairs
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS], of a tile's CTAs
    int* __restrict__ counters,            // [tiles of n][tiles of m], zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int whole,                             // tiles that each CTA computes alone (stripes.cuh)
    int                                    // group_shift, which is GROUP_SHIFT here
) {
    const Output unscaled{scales, bias, out, m, n, GROUPED};
    const TokenOutput output{unscaled, TOKEN_GROUPS ? nullptr : reinterpret_cast<const float*>(token_scales)};
    gemm_sm80<A8Weights>(activations, qweight, nullptr, token_scales, scales, output, partials, counters, m, n, k, whole, GROUP_SHIFT);
}
