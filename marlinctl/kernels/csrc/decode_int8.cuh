// From packed int4 to int8: the A operand of wgmma.m64nNk32 and mma.m16n8k32. Words w0 and w1 of a lane, from two neighbouring rows of
// qweight, are its 16 weights of 32 k; marlin_a8_sm90.cu and marlin_a8_factored_sm90.cu explain the masks.
#pragma once
#include "ptx.cuh"

constexpr int TOKEN_GROUP = 128;  // k, of activations that share a scale

// One word's fragment of 32 k, 16 times the codes.
__device__ __forceinline__ void decode_int8(unsigned (&a)[4], unsigned w0, unsigned w1) {
    const unsigned upper = permute(w0, w1, 0x6420), lower = permute(w0, w1, 0x7531);
    a[0] = and_xor(upper << 4, 0xf0f0f0f0, 0x80808080);
    a[1] = and_xor(lower << 4, 0xf0f0f0f0, 0x80808080);
    a[2] = and_xor(upper, 0xf0f0f0f0, 0x80808080);
    a[3] = and_xor(lower, 0xf0f0f0f0, 0x80808080);
}

// The factors of a word's two rows, and (128 - 8 factor) in each byte.
struct Factors {
    unsigned of[2], offset[2];

    __device__ __forceinline__ void set(unsigned pair) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            of[row] = static_cast<short>(pair >> 16 * row);
            offset[row] = 0x80808080 - 0x08080808 * of[row];
        }
    }
    __device__ __forceinline__ unsigned times(int row, unsigned nibbles) const { return (nibbles * of[row] + offset[row]) ^ 0x80808080; }
};

// One word's fragment of 32 k, codes times factors: Factors, or what else has `times`.
template <class Factors>
__device__ __forceinline__ void decode_factored(unsigned (&a)[4], unsigned w0, unsigned w1, const Factors& factors) {
    const unsigned upper = permute(w0, w1, 0x6420), lower = permute(w0, w1, 0x7531);
    a[0] = factors.times(0, upper & 0x0f0f0f0f);
    a[1] = factors.times(1, lower & 0x0f0f0f0f);
    a[2] = factors.times(0, upper >> 4 & 0x0f0f0f0f);
    a[3] = factors.times(1, lower >> 4 & 0x0f0f0f0f);
}
