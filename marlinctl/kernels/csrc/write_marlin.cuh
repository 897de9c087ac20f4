// The end of the dense kernels: finished sums as numbers of 16 bits in their places.
#pragma once
#include "dequantize.cuh"
#include "tile.cuh"

struct Output {
    const char* scales;          // [G', N'] float16, which are applied here where they are channel-wise
    const unsigned short* bias;  // [N], or null
    unsigned* out;               // [M, N/2] pairs
    unsigned m, n;
    bool grouped;
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

// Slabs of the tile from `first_slab` on, WRITTEN of the sums of all, or the only one that `own` holds: channel-wise scales, bias,
// rounding; movmatrix turns 8 (n) x 8 (m) around, so that a lane holds neighbours in n.
template <int held>
__device__ __forceinline__ void write_result(
    const float (&own)[OWN][held][4], const Output& output, const Cursor& at, int first_slab, const Self& self
) {
    constexpr int slabs = held == 1 ? 1 : WRITTEN;
    const int first_held = held == 1 ? 0 : first_slab;
    const unsigned lane = self.lane, n = output.n, padded_n = (n + 63) / 64 * 64;
#pragma unroll
    for (int word = 0; word < OWN; ++word)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {  // rows 0..7 and 8..15 of the 16 x 8
            const int eight = (at.slice * BLOCKS + self.block) * 64 + (self.first_word + self.k_warp * OWN + word) * 16 + upper * 8;
            const int column = eight + lane / 4;  // as the accumulator holds it
            float scale = 1.0f, shift = 0.0f;
            if (!output.grouped && column < padded_n) {
                const int slot = column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
                scale = widen_half(reinterpret_cast<const unsigned short*>(output.scales)[slot]);
            }
            if (output.bias != nullptr && column < n) shift = NUMBER::widen(output.bias[column]);
            const unsigned first = eight + lane % 4 * 2;  // as the transposed pair does
            unsigned token = at.token_tile * TOKENS + first_slab * 8 + lane / 4;
            unsigned* to = output.out + (static_cast<size_t>(token) * n + first) / 2;
#pragma unroll
            for (int slab = first_held; slab < first_held + slabs; ++slab, token += 8, to += static_cast<size_t>(4) * n) {
                const float* s = own[word][slab] + 2 * upper;
                const unsigned pair = transpose(NUMBER::round(s[0] * scale + shift, s[1] * scale + shift));
                if (token < output.m && first < n) *to = pair;
            }
        }
}
