// Activations to int8, for marlin_a8_sm90.cu and its relatives:  x [M, K] in float16 or bfloat16 -> codes and scales (kernels/activations.py)
//
//   codes   [M, K'] int8       q = round(x / s) to even; K' is K rounded up to 64, 0 beyond K; in tile order (below)
//   scales  [G, M'] float32    s = max |x| / 127, over a token (GROUP=0: G = 1) or each 128 of its k (GROUP=1); M' is M rounded up to 4
//
// A piece is 16 places of codes, one 16-byte store. In tile order it holds two runs of 8 from x, two 16-byte loads:
//
//   k of 32     0 .. 7 | 8 .. 15 | 16 .. 23 | 24 .. 31
//   piece 0     0 1 16 17  2 3 18 19  4 5 20 21  6 7 22 23                          a word of each run for every four places
//   piece 1     8 9 24 25  10 11 26 27  12 13 28 29  14 15 30 31
//
// For 2:4 weights (QUADS=1, sparse_marlin_a8_factored_sm90.cu) the runs are 32 apart, and meet four by four:
//
//   k of 64     0 .. 7 | 8 .. 15 | .. | 32 .. 39 | 40 .. 47 | ..
//   piece 0     0 1 2 3  32 33 34 35  4 5 6 7  36 37 38 39
//   piece 1     8 9 10 11  40 41 42 43  12 13 14 15  44 45 46 47
//
//   GROUP=0   a CTA is one token. Its pieces stay in registers from the maximum to the codes; what exceeds PIECES for each of THREADS is
//             read again, from L2, the last span first.
//   GROUP=1   8 lanes are one group, and a CTA has PIECES for each of its threads, of whatever tokens. No thread waits for another warp.
//
// DIVISION.  Codes are those of the quotient that float32 rounds to, as `rounded` (quantize/activations.py) computes it: x = max / 2 is next
// to a tie, 63.5, and comes often. A division takes a dozen instructions. With r = 1 / s, rounded, and q = x r these three give the same bits
// (Markstein 1990; for all numbers of 11 bits or less and all maxima, tests/kernels/test_rounding.py):
//
//   quotient = fma(fma(-q, s, x), r, q)         and quotient + 1.5 * 2^23 has the code in its lowest byte
//
// Scales below 2^-100 divide as 2^-100, so that nothing underflows on the way; a token of zeros has codes and scale 0. Where the maximum is
// infinite or NaN the scale is NaN and the codes are 0: the product's whole row becomes NaN, and not something that looks like a number.
//
// MEASURED.  NVIDIA H200, 2026-12-01, microseconds in a CUDA graph, K = 18432, GROUP=0 and 1:
//
//   M            32        64       128       256      1024      4096
//             3.0 2.0   3.9 3.5   4.9 4.2   4.9 4.8    16  16    58  63
//
// LIMITS.  K a multiple of 8, x and codes aligned to 16 bytes; M (groups) x G < 2^32 - THREADS.
#include "dequantize.cuh"

#ifndef QUADS
#define QUADS 0
#endif
constexpr unsigned GROUP_PIECES = 8;  // 128 of k: as many lanes
constexpr float SMALLEST_DIVISOR = 7.888609052210118e-31f;  // 2^-100
constexpr float ROUND_TO_INTEGER = 12582912.0f;             // 1.5 * 2^23: a unit in the last place of the sum is 1

static_assert(THREADS % 32 == 0 && THREADS <= 1024, "a token's warps leave a maximum each, for the lanes of one warp");
static_assert(THREADS / 32 * 4 <= SHARED_BYTES, "the host allots less shared memory than the kernel uses");

struct Piece {
    uint4 first, second;  // 8 numbers each, the second ones 16 (QUADS: 32) further in k
};

// Of a row of `chunks` x 8 numbers; zeros beyond.
__device__ __forceinline__ Piece load(const uint4* row, unsigned piece, unsigned chunks) {
    constexpr unsigned APART = QUADS ? 4 : 2;
    const unsigned at = piece / APART * (2 * APART) + piece % APART;
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    return {at < chunks ? row[at] : zeros, at + APART < chunks ? row[at + APART] : zeros};
}

// The largest magnitude, as the bits of a 16-bit number: they rise with it, and infinity and NaN are above all numbers.
__device__ __forceinline__ unsigned largest_of(const Piece& p) {
    const unsigned words[8] = {p.first.x, p.first.y, p.first.z, p.first.w, p.second.x, p.second.y, p.second.z, p.second.w};
    unsigned low = 0, high = 0;
#pragma unroll
    for (const unsigned word : words) {
        low = max(low, word & 0x7fff);
        high = max(high, word & 0x7fff0000);
    }
    return max(low, high >> 16);
}

// What numbers with a maximum are divided by.
struct Scale {
    float stored, divisor, inverse;
    unsigned kept;  // 0 where the codes are

    __device__ __forceinline__ explicit Scale(unsigned largest) {
        const float magnitude = NUMBER::widen(static_cast<unsigned short>(largest));
        const bool finite = magnitude - magnitude == 0.0f;
        stored = finite ? magnitude / 127.0f : __uint_as_float(0x7fc00000);
        divisor = finite && stored > SMALLEST_DIVISOR ? stored : SMALLEST_DIVISOR;
        inverse = 1.0f / divisor;
        kept = finite ? 0xffffffff : 0;
    }

    // In the lowest byte.
    __device__ __forceinline__ unsigned code(unsigned short number) const {
        const float x = NUMBER::widen(number), near = x * inverse;
        const float quotient = __fmaf_rn(__fmaf_rn(-near, divisor, x), inverse, near);
        return __float_as_uint(quotient + ROUND_TO_INTEGER);
    }

    // Of two pairs, the first one's first.
    __device__ __forceinline__ unsigned codes(unsigned first, unsigned second) const {
        const unsigned lower = permute(code(static_cast<unsigned short>(first)), code(static_cast<unsigned short>(first >> 16)), 0x0040);
        const unsigned upper = permute(code(static_cast<unsigned short>(second)), code(static_cast<unsigned short>(second >> 16)), 0x0040);
        return permute(lower, upper, 0x5410) & kept;
    }
    __device__ __forceinline__ uint4 codes(const Piece& p) const {
        if (QUADS) {
            const unsigned first = codes(p.first.x, p.first.y), second = codes(p.second.x, p.second.y);
            return make_uint4(first, second, codes(p.first.z, p.first.w), codes(p.second.z, p.second.w));
        }
        return make_uint4(
            codes(p.first.x, p.second.x), codes(p.first.y, p.second.y), codes(p.first.z, p.second.z), codes(p.first.w, p.second.w)
        );
    }
};

// The last token also writes what lies beyond M in its row of scales.
__device__ __forceinline__ void store_scale(float* row, unsigned token, unsigned m, float scale) {
    row[token] = scale;
    if (token == m - 1)
        for (unsigned beyond = m; beyond % 4 > 0; ++beyond) row[beyond] = 0.0f;
}

// The maximum of all threads of the CTA.
__device__ __forceinline__ unsigned largest_of_cta(unsigned largest) {
    extern __shared__ uint4 shared[];
    unsigned* const of_warps = reinterpret_cast<unsigned*>(shared);
    largest = largest_of_lanes<32>(largest);
    if (THREADS == 32) return largest;
    const unsigned lane = threadIdx.x % 32;
    if (lane == 0) of_warps[threadIdx.x / 32] = largest;
    __syncthreads();
    return largest_of_lanes<32>(lane < THREADS / 32 ? of_warps[lane] : 0);
}

__device__ __forceinline__ void round_token(const uint4* x, uint4* codes, float* scales, unsigned m, unsigned k) {
    constexpr unsigned SPAN = THREADS * PIECES;
    const unsigned token = blockIdx.x, chunks = k / 8, pieces = (k + 63) / 64 * 4, last = (pieces - 1) / SPAN * SPAN;
    x += static_cast<size_t>(token) * chunks;
    codes += static_cast<size_t>(token) * pieces;

    Piece held[PIECES];
    auto load_span = [&](unsigned first) {
#pragma unroll
        for (unsigned i = 0; i < PIECES; ++i) held[i] = load(x, first + i * THREADS + threadIdx.x, chunks);
    };
    unsigned largest = 0;
    for (unsigned first = 0; first <= last; first += SPAN) {
        load_span(first);
#pragma unroll
        for (unsigned i = 0; i < PIECES; ++i) largest = max(largest, largest_of(held[i]));
    }
    const Scale scale(largest_of_cta(largest));
    if (threadIdx.x == 0) store_scale(scales, token, m, scale.stored);
    for (unsigned first = last;; first -= SPAN) {
#pragma unroll
        for (unsigned i = 0; i < PIECES; ++i) {
            const unsigned piece = first + i * THREADS + threadIdx.x;
            if (piece < pieces) codes[piece] = scale.codes(held[i]);
        }
        if (first == 0) break;
        load_span(first - SPAN);
    }
}

__device__ __forceinline__ void round_groups(const uint4* x, uint4* codes, float* scales, unsigned m, unsigned k) {
    constexpr unsigned GROUPS = THREADS / GROUP_PIECES;  // of a CTA at once
    const unsigned chunks = k / 8, pieces = (k + 63) / 64 * 4, groups = (k + 127) / 128, row = (m + 3) / 4 * 4;
    const unsigned lane = threadIdx.x % GROUP_PIECES, first = blockIdx.x * (GROUPS * PIECES) + threadIdx.x / GROUP_PIECES;

    Piece held[PIECES];
#pragma unroll
    for (unsigned i = 0; i < PIECES; ++i) {
        const unsigned unit = first + i * GROUPS, token = unit / groups, piece = unit % groups * GROUP_PIECES + lane;
        held[i] = load(x + static_cast<size_t>(token) * chunks, piece, token < m ? chunks : 0);
    }
#pragma unroll
    for (unsigned i = 0; i < PIECES; ++i) {
        const unsigned unit = first + i * GROUPS, token = unit / groups, group = unit % groups, piece = group * GROUP_PIECES + lane;
        const Scale scale(largest_of_lanes<GROUP_PIECES>(largest_of(held[i])));
        if (token >= m) continue;
        if (piece < pieces) codes[static_cast<size_t>(token) * pieces + piece] = scale.codes(held[i]);
        if (lane == 0) store_scale(scales + static_cast<size_t>(group) * row, token, m, scale.stored);
    }
}

// NOTE: x is not `const .. __restrict__`: such loads may be moved up, over the wait for the kernel that writes x.
extern "C" __global__ void __launch_bounds__(THREADS) round_activations(
    const uint4* x,       // [M, K/8]
    uint4* codes,         // [M, K'/16]
    float* scales,        // [G, M']
    unsigned m, unsigned k
) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    if (GROUP) round_groups(x, codes, scales, m, k);
    else round_token(x, codes, scales, m, k);
}
