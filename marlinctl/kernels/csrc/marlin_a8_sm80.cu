// Dense INT4 x INT8 GEMM for Ampere and later:  out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N]), activations rounded to int8
//
//   activations   [M, K'] int8          rounded by round_activations.cu, in the order of the tile (marlin_a8_sm90.cu)
//   token_scales  [M'] or [G128, M']    float32: one for each token, or (TOKEN_GROUPS) for each 128 of its k; M' is M rounded up to 4
//   qweight, scales, bias, out          as in marlin_sm80.cu, which explains the transposed product
//
//   out[m, n] = sum over groups of k  token_scale[m] * scale[n] * (sum over k of code * activation)  + bias[n]
//
// The sum of a group is exact: int32. It is scaled in float32, and rounded once, at the end. So it is on Hopper (marlin_a8_sm90.cu), of the
// same weights and rounded activations. Tiles and pipeline are MARLIN's (Frantar et al., arXiv 2408.11743); QServe (Lin et al., arXiv
// 2405.04532) multiplies 4-bit weights with int8 activations by the same instruction.
//
// ONE STEP OF 32 IN K.  Two rows of words, decoded as on Hopper (decode_int8.cuh), are the A fragments of mma.m16n8k32:
//
//               k 0..31                         m 0..7  8..15
//            ┌──────────┐                     ┌───────┬───────┐
//        n 0 │  word 0  │ 16          k 0     │       │       │      B: int8; a lane's first register is token t/4 at four places
//            ├──────────┤                 .   │   B   │   B   │         from 4 (t % 4) on, its second the same 16 further on. That is
//         16 │  word 1  │  x          k 31    └───────┴───────┘         what ldmatrix delivers of rows of 16 bytes, whatever is in them.
//            ├──────────┤                                               Which k is at a place is the same in A and in B.
//            │    ..    │             n 0..63 │   D   │   D   │      D: int32, where the 16-bit kernels have float32
//
// In a stage a token is [K_STEP/16] chunks of 16 bytes, chunk c of row r in place c ^ (r % 8) (tile.cuh). Rows are 128 bytes or a multiple of
// that, so the eight that ldmatrix reads together lie in different banks.
//
// A GROUP'S SUM AS A FLOAT.  With the factor 16 of decode_int8 it is at most 128 * 128 * 127 in magnitude, less than 2^22. So the first
// product of a group adds to 0x4b400000, the bits of 1.5 * 2^23 in float32, and the sum is in the mantissa: a subtraction makes it a float,
// exactly. On sm_80 a conversion takes four times as long as an addition (CUDA C++ Programming Guide, throughput of arithmetic instructions).
// The group size is known to the compiler: no branch asks where a group ends.
//
// MEASURED.  Nothing on sm_80, 86 and 89.
//
// LIMITS.  As marlin_sm80.cu; K_STEP / K_WARPS is a multiple of 128.
#include "a8_sm80.cuh"

constexpr int NOTHING = 0x4b400000;      // where the sum of a group begins, and
constexpr float AS_FLOAT = 12582912.0f;  // the same bits

struct A8Weights : Int8 {
    static __device__ __forceinline__ void begin(GroupSums&) {}
    static __device__ __forceinline__ void end(Sums&, GroupSums&, bool) {}

    template <class Close>
    static __device__ __forceinline__ void multiply(
        GroupSums& group_sums, const char* shared, const unsigned& shared_base, int stage_index, int, const ThreadRole& role, const Groups&,
        const Close& close
    ) {
        const char* stage = shared + stage_index * Stage<A8Weights>::BYTES;
        auto step = [&](int i, unsigned tile, const StepWords& words, const StepTokens& b) {
#pragma unroll
            for (int word = 0; word < WORDS; ++word) {
                unsigned a[4];
                decode_int8(a, words[0][word], words[1][word]);
#pragma unroll
                for (int slab = 0; slab < SLABS; ++slab) {
                    const unsigned b0 = b[slab / 2][slab % 2 * 2], b1 = b[slab / 2][slab % 2 * 2 + 1];
                    if (i % SUM_TILES == 0) mma_int8_onto(group_sums[word][slab], a, b0, b1, NOTHING);
                    else mma_int8(group_sums[word][slab], a, b0, b1);
                }
            }
            if ((i + 2) % SUM_TILES == 0) close(stage, 0, tile);
        };
        each_step<A8Weights>(shared, shared_base, stage_index, role, step);
    }

    // sums += scales * group_sums, of the group in which row `tile` of the stage's words is; rows t/4 and t/4 + 8 of each word, token 2(t%4)
    // of each eight and the next.
    static __device__ __forceinline__ void close(
        Sums& sums, GroupSums& group_sums, const char* scales, int, int tile, const Groups&, const ThreadRole& role
    ) {
        constexpr float SIXTEENTH = 0.0625f;  // decode_int8's codes are 16 times as large
        const char* token_scales = scales + SCALE_BYTES + (tile / (TOKEN_GROUP / 16) * TOKENS + role.lane % 4 * 2) * 4;
        float lower[WORDS], upper[WORDS];
        unsigned pairs[4];
        if (GROUPED) {
            load_words(pairs, scales + (tile / GROUP_TILES * COLUMNS + role.block * 64 + role.lane / 4 * 8 + 2 * role.first_word) * 2);
        }
#pragma unroll
        for (int word = 0; word < WORDS; ++word) {
            lower[word] = GROUPED ? widen_half(static_cast<unsigned short>(pairs[word])) * SIXTEENTH : SIXTEENTH;
            upper[word] = GROUPED ? widen_half(static_cast<unsigned short>(pairs[word] >> 16)) * SIXTEENTH : SIXTEENTH;
        }
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab) {
            float2 token_scale = make_float2(1.0f, 1.0f);
            if (TOKEN_GROUPS) token_scale = *reinterpret_cast<const float2*>(token_scales + slab * 32);
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
    const TokenOutput output{unscaled, reinterpret_cast<const float*>(token_scales)};
    gemm_sm80<A8Weights>(activations, qweight, nullptr, token_scales, scales, output, partials, counters, m, n, k, whole, GROUP_SHIFT);
}
