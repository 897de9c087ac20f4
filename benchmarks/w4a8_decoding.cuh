// From MARLIN's words to the A operand of 8-bit products, m64nNk32: four ways. permute, absolute_differences, multiply_add and
// and_xor are instructions (wgmma_rate_8bit.cu); everything else is plain C++, and tests/benchmarking/test_wgmma_rate_8bit.py builds it for the CPU.
#pragma once

// The 16 weights of a lane in 32 k: w0 and w1 are one word of two neighbouring rows of qweight. x has row lane / 4 of the fragment and y
// the row 8 below; low nibbles are a0 and a1, high ones a2 and a3.
template <class Form>
__device__ __forceinline__ void decode(unsigned (&a)[4], unsigned w0, unsigned w1, Form form) {
    form(a[0], a[2], permute(w0, w1, 0x6420));
    form(a[1], a[3], permute(w0, w1, 0x7531));
}

// The bytes 0..15 of e4m3 are their number times 2^-9.
struct Raw {
    __device__ __forceinline__ void operator()(unsigned& low, unsigned& high, unsigned x) const {
        low = x & 0x0f0f0f0f;
        high = x >> 4 & 0x0f0f0f0f;
    }
};

// |nibble - 8|, which is its own operand as Raw's, and the sign where bit 3 of the nibble is 0.
struct Signed {
    __device__ __forceinline__ void operator()(unsigned& low, unsigned& high, unsigned x) const {
        low = absolute_differences(x & 0x0f0f0f0f, 0x08080808) | (~(x << 4) & 0x80808080);
        high = absolute_differences(x >> 4 & 0x0f0f0f0f, 0x08080808) | (~x & 0x80808080);
    }
};

// Four nibbles are a selector of prmt: bits 0..2 choose a byte of eight, and where bit 3 is set all bits become the chosen byte's sign,
// which is 0 in both tables. So the table that has no answer gives 0, and the sum is the weight. Bytes of negative codes have the sign:
// their table holds the halves of bytes, which are even for 1.0 to 8.0. a0 and a1 are of w0, a2 and a3 of w1.
#define TABLES 0x65666768, 0x5c606264, 0x44403800, 0x4e4c4a48  // -8 to -1 and 0 to 7
struct Lookup {
    unsigned table[4];  // TABLES

    __device__ __forceinline__ void operator()(unsigned& low, unsigned& high, unsigned x) const {
        const unsigned flipped = x ^ 0x88888888;
        low = weights(x, flipped);
        high = weights(x >> 16, flipped >> 16);
    }
    __device__ __forceinline__ unsigned weights(unsigned below, unsigned above) const {
        return multiply_add(permute(table[0], table[1], below), 2, permute(table[2], table[3], above));
    }
};

// 16 times the code.
struct Int8 {
    __device__ __forceinline__ void operator()(unsigned& low, unsigned& high, unsigned x) const {
        low = and_xor(x << 4, 0xf0f0f0f0, 0x80808080);
        high = and_xor(x, 0xf0f0f0f0, 0x80808080);
    }
};
