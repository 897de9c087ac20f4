// The epilogue of the dense kernels: rounds finished sums to 16 bits and writes them.
#pragma once
#include "dequantize.cuh"
#include "tile.cuh"

struct Output {
    const char* scales;          // [G', N'] float16, which are applied here where they are channel-wise
    const unsigned short* bias;  // [N], or null
    unsigned* out;               // [M, N/2] pairs
    unsigned m, n;
    bool grouped;
    const float* token_scales = nullptr;  // [M'], of 8-bit activations with one for each token
};

// Warps that share k exchange the sums of one word as one part: as they lie.
__device__ __forceinline__ void sort_for_exchange(Sums& parts, const Sums& sums) {
#pragma unroll
    for (int word = 0; word < WORDS; ++word)
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
            for (int i = 0; i < 4; ++i) parts[word][slab][i] = sums[word][slab][i];
}

// Writes slabs of the tile from `first_slab` on: WRITTEN of the SLABS in `own`, or the one slab of a subtile's fragment. Channel-wise
// scales, bias, rounding; movmatrix transposes 8 (n) x 8 (m), so that a lane has a pair of consecutive n.
template <int fragment_slabs>
__device__ __forceinline__ void write_result(
    const float (&own)[OWN][fragment_slabs][4], const Output& output, const Cursor& at, int first_slab, const ThreadRole& role
) {
    constexpr int slabs = fragment_slabs == 1 ? 1 : WRITTEN;
    const int first_fragment_slab = fragment_slabs == 1 ? 0 : first_slab;
    const unsigned lane = role.lane, n = output.n, padded_n = (n + 63) / 64 * 64;
#pragma unroll
    for (int word = 0; word < OWN; ++word)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {  // rows 0..7 and 8..15 of the 16 x 8
            const int eight = (at.slice * BLOCKS + role.block) * 64 + (role.first_word + role.k_warp * OWN + word) * 16 + upper * 8;
            const int column = eight + lane / 4;  // of the accumulator
            float scale = 1.0f, shift = 0.0f;
            if (!output.grouped && column < padded_n) {
                const int slot = column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
                scale = widen_half(reinterpret_cast<const unsigned short*>(output.scales)[slot]);
            }
            if (output.bias != nullptr && column < n) shift = NUMBER::widen(output.bias[column]);
            const unsigned first = eight + lane % 4 * 2;  // of the transposed pair
            unsigned token = at.token_tile * TOKENS + first_slab * 8 + lane / 4;
            unsigned* to = output.out + (static_cast<size_t>(token) * n + first) / 2;
#pragma unroll
            for (int slab = first_fragment_slab; slab < first_fragment_slab + slabs; ++slab, token += 8, to += static_cast<size_t>(4) * n) {
                const float* s = own[word][slab] + 2 * upper;
                float first_scale = scale, second_scale = scale;
                if (EIGHT_BIT && output.token_scales != nullptr) {
                    const unsigned column_token = token - lane / 4 + lane % 4 * 2;  // of the accumulator
                    first_scale *= column_token < output.m ? output.token_scales[column_token] : 0.0f;
                    second_scale *= column_token + 1 < output.m ? output.token_scales[column_token + 1] : 0.0f;
                }
                const unsigned pair = transpose(NUMBER::round(s[0] * first_scale + shift, s[1] * second_scale + shift));
                if (token < output.m && first < n) *to = pair;
            }
        }
}
