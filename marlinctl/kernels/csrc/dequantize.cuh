// From packed int4 to the A operand of mma.m16n8k16 and mma.sp.m16n8k32: one word in, four registers out, in float16 or bfloat16.
//
// A word holds eight nibbles, code + 8 each (marlinctl/pack/tile.py). Lane t, word j of the tile (k0, n0):
//
//   bits      31..28  27..24  23..20  19..16  15..12   11..8    7..4    3..0
//   k - k0       9       1       9       1       8       0       8       0      + 2 (t % 4)
//   n - n0       8       8       0       0       8       8       0       0      + 16 j + t / 4
//
// The A operand is 16 rows x 16 columns; here its rows are outputs n and its columns are k, that is, A is a block of the
// weight [N, K] as torch knows it. Register by register the lane must hold (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//
//   a0   row t/4       columns 2(t%4) + {0, 1}       word & 0x000f000f            nibbles 0 and 4
//   a1   row t/4 + 8   columns 2(t%4) + {0, 1}       word & 0x0f000f00            nibbles 2 and 6
//   a2   row t/4       columns 2(t%4) + {8, 9}       word & 0x00f000f0            nibbles 1 and 5
//   a3   row t/4 + 8   columns 2(t%4) + {8, 9}       word & 0xf000f000            nibbles 3 and 7
//
// A word of Sparse-MARLIN has the same nibbles in the same order: k then counts kept weights, which mma.sp.m16n8k32 stores like a
// 16 x 16 block, and the rows t/4 and t/4 + 8 are outputs n and n + 4 instead of n and n + 8.
//
// Each mask leaves two nibbles at the same height of the two halves of the register: one instruction decodes two weights.
//
// How a nibble x becomes the number x - 8 without a conversion instruction (which the GPU has few of). Writing x into the
// mantissa of a power of two adds x units in the last place to it:
//
//   float16, 10 bits of mantissa   0x6400 = 1024, one unit = 1      0x6400 | x        = 1024 + x
//                                                                   0x6400 | x << 4   = 1024 + 16 x
//   bfloat16, 7 bits of mantissa   0x4300 =  128, one unit = 1      0x4300 | x        =  128 + x       (x << 4 would not fit)
//
// so that                          (1024 +    x) - 1032             = x - 8
//                                  (1024 + 16 x) / 16 - 72          = x - 8
//                                  ( 128 +    x) - 136              = x - 8
//
// All of them are exact: every intermediate is an integer, or 64 + x, that the format holds, and fma rounds once. Masking and
// setting the exponent is a single lop3, (word & mask) | exponent. In float16 the upper nibble of a byte is decoded without
// a shift, so a word costs 1 shift, 4 lop3 and 4 fma or add for 8 weights; in bfloat16 3 shifts, 4 lop3 and 4 fma.
#pragma once
#include "ptx.cuh"

// For kernels that scale weights before they multiply: Scale is a scale in the form that `times` takes. `times` gives the decoded weights
// by their definition: code * scale, rounded once to 16 bits.

// The two formats of activations, under the same names.
struct Half {
    static __device__ __forceinline__ unsigned lower(unsigned word) {  // codes of nibbles 0 and 4
        return subtract_half(and_or(word, 0x000f000f, 0x64006400), 0x64086408);  // 1032
    }
    static __device__ __forceinline__ unsigned upper(unsigned word) {  // codes of nibbles 1 and 5
        return fma_half(and_or(word, 0x00f000f0, 0x64006400), 0x2c002c00, 0xd480d480);  // 1/16, -72
    }
    static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        mma_half(d, a, b0, b1);
    }
    template <int selector>
    static __device__ __forceinline__ void mma_sparse(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e) {
        mma_sparse_half<selector>(d, a, b, e);
    }
    struct Scale {
        unsigned both;
    };
    static __device__ __forceinline__ Scale scale(unsigned short bits) { return {bits * 0x10001u}; }
    static __device__ __forceinline__ unsigned times(unsigned codes, Scale s) { return multiply_half(codes, s.both); }
    static __device__ __forceinline__ unsigned round(float first, float second) { return round_to_half(first, second); }
    static __device__ __forceinline__ float widen(unsigned short bits) { return widen_half(bits); }
};

struct BFloat {
    static __device__ __forceinline__ unsigned lower(unsigned word) {
        return fma_bfloat(and_or(word, 0x000f000f, 0x43004300), 0x3f803f80, 0xc308c308);  // 1, -136
    }
    static __device__ __forceinline__ unsigned upper(unsigned word) { return lower(word >> 4); }
    static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        mma_bfloat(d, a, b0, b1);
    }
    template <int selector>
    static __device__ __forceinline__ void mma_sparse(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e) {
        mma_sparse_bfloat<selector>(d, a, b, e);
    }
    // A float16 has 11 bits and bfloat16 8: upper is what fits, and lower the rest, of 3 bits. A code has 4, so code * lower is
    // exact, and code * upper + that is rounded once, to what code * scale would be rounded to.
    struct Scale {
        unsigned upper, lower;
    };
    static __device__ __forceinline__ Scale scale(unsigned short bits) {
        const float whole = widen_half(bits);
        const unsigned upper = round(whole, whole);
        const float rest = whole - widen_bfloat(static_cast<unsigned short>(upper));
        return {upper, round(rest, rest)};
    }
    static __device__ __forceinline__ unsigned times(unsigned codes, Scale s) {
        return fma_bfloat(codes, s.upper, fma_bfloat(codes, s.lower, 0x80008000));  // - 0
    }
    static __device__ __forceinline__ unsigned round(float first, float second) { return round_to_bfloat(first, second); }
    static __device__ __forceinline__ float widen(unsigned short bits) { return widen_bfloat(bits); }
};

// The A fragment of a word.
template <class Number>
__device__ __forceinline__ void dequantize(unsigned (&a)[4], unsigned word) {
    a[0] = Number::lower(word);
    a[2] = Number::upper(word);
    a[1] = Number::lower(word >> 8);
    a[3] = Number::upper(word >> 8);
}

// The same fragment, scaled: rows t/4 with one scale, rows t/4 + 8 with the other.
template <class Number>
__device__ __forceinline__ void scale_fragment(unsigned (&a)[4], typename Number::Scale lower, typename Number::Scale upper) {
    a[0] = Number::times(a[0], lower);
    a[2] = Number::times(a[2], lower);
    a[1] = Number::times(a[1], upper);
    a[3] = Number::times(a[3], upper);
}
