// The epilogue of the 2:4 kernels: rounds finished sums to 16 bits and writes them.
#pragma once
#include "dequantize.cuh"
#include "tile.cuh"

struct Output {
    const char* scales;          // [G', N'] float16, which are applied here where they are channel-wise
    const unsigned short* bias;  // [N], or null
    unsigned short* out;         // [M, N]
    unsigned m, n;
    bool grouped;
    const float* token_scales = nullptr;  // [M'], of 8-bit activations: one for each token
};

// The sums of a lane in the order of the output. Of all four words, part 2c + r is row r (0: n = 8g + 0..3, 1: n = 8g + 4..7) of token
// 2(t%4) + c; of two words, part c is both rows of it, two outputs each.
template <int words, int fragment_slabs>
__device__ __forceinline__ float neighbour(const float (&sums)[words][fragment_slabs][4], int part, int slab, int i) {
    return SPLIT == 1 ? sums[i][slab][part % 2 * 2 + part / 2] : sums[i % 2][slab][i / 2 * 2 + part];
}

// Warps that share k exchange whole parts, so sums are sorted into parts first; with K_WARPS = 1 they are sorted when they are written.
__device__ __forceinline__ void sort_for_exchange(Sums& parts, const Sums& sums) {
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
        for (int part = 0; part < WORDS; ++part)
#pragma unroll
            for (int i = 0; i < 4; ++i) parts[part][slab][i] = K_WARPS > 1 ? neighbour(sums, part, slab, i) : sums[part][slab][i];
}

// Writes slabs of the tile from `first_slab` on: WRITTEN of the SLABS in `own`, or the one slab of a subtile's fragment. Channel-wise
// scales, bias, rounding.
template <int fragment_slabs>
__device__ __forceinline__ void write_result(
    const float (&own)[OWN][fragment_slabs][4], const Output& output, const Cursor& at, int first_slab, const ThreadRole& role
) {
    constexpr int slabs = fragment_slabs == 1 ? 1 : WRITTEN;
    const int first_fragment_slab = fragment_slabs == 1 ? 0 : first_slab;
    const unsigned lane = role.lane, n = output.n;
    const int eight = (at.slice * BLOCKS + role.block) * 64 + lane / 4 * 8;  // the lane's eight outputs
    const unsigned short* const channel_scales = reinterpret_cast<const unsigned short*>(output.scales);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const int part = role.k_warp * OWN + i, second = SPLIT == 1 ? part / 2 : part;  // of the two tokens
        const int column = eight + (SPLIT == 1 ? part % 2 * 4 : role.first_word), beyond = SPLIT == 1 ? 2 : 4;  // to the other pair
        if (column >= n) continue;  // n is a multiple of 8: all or nothing
        float scale[4], shift[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int its_column = column + j / 2 * beyond + j % 2;
            scale[j] = output.grouped ? 1.0f : widen_half(channel_scales[its_column]);
            shift[j] = output.bias == nullptr ? 0.0f : NUMBER::widen(output.bias[its_column]);
        }
        unsigned token = at.token_tile * TOKENS + first_slab * 8 + lane % 4 * 2 + second;
        unsigned short* to = output.out + (static_cast<size_t>(token) * n + column);
#pragma unroll
        for (int slab = first_fragment_slab; slab < first_fragment_slab + slabs; ++slab, token += 8, to += static_cast<size_t>(8) * n) {
            float s[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (K_WARPS > 1) s[j] = own[i][slab][j];
                else s[j] = neighbour(own, i, slab, j);
            }
            float whole[4] = {scale[0], scale[1], scale[2], scale[3]};
            if (EIGHT_BIT) {
                const float token_scale = token < output.m ? output.token_scales[token] : 0.0f;
#pragma unroll
                for (int j = 0; j < 4; ++j) whole[j] *= token_scale;
            }
            const unsigned first_pair = NUMBER::round(s[0] * whole[0] + shift[0], s[1] * whole[1] + shift[1]);
            const unsigned second_pair = NUMBER::round(s[2] * whole[2] + shift[2], s[3] * whole[3] + shift[3]);
            if (token >= output.m) continue;
            if constexpr (SPLIT == 1) {
                *reinterpret_cast<uint2*>(to) = uint2{first_pair, second_pair};
            } else {
                *reinterpret_cast<unsigned*>(to) = first_pair;
                *reinterpret_cast<unsigned*>(to + beyond) = second_pair;
            }
        }
    }
}
