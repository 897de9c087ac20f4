// Numbers of 16 and of 8 bits, and how the matrices of products are spread over the lanes of a warp: the part of gpu.cpp in which nothing
// waits. Layouts are those of the PTX ISA, as (row, column) of lane and register.
#pragma once
#include "gpu.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace gpu {
namespace {
// Every float16 as a float: converting is a call of the compiler's library where a processor has no instruction for it.
const std::vector<float> HALVES = [] {
    std::vector<float> all(1 << 16);
    for (unsigned bits = 0; bits < all.size(); ++bits) {
        _Float16 out;
        const uint16_t low = static_cast<uint16_t>(bits);
        std::memcpy(&out, &low, 2);
        all[bits] = static_cast<float>(out);
    }
    return all;
}();
inline float half(unsigned bits) { return HALVES[bits & 0xffff]; }
inline float bfloat(unsigned bits) {
    const unsigned wide = bits << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}
inline float number(unsigned bits, bool is_bfloat) { return is_bfloat ? bfloat(bits) : half(bits); }

template <class Both>
unsigned each(Both both) { return both(0) | both(16) << 16; }

// What a lane gives to a product: its registers of A and of B (mma alone) as numbers, and metadata.
struct Operands {
    float a[8], b[8];
    unsigned e;
};

void widen(float* numbers, const unsigned* registers, int count, bool is_bfloat) {
    for (int i = 0; i < count; ++i) {
        numbers[2 * i] = number(registers[i], is_bfloat);
        numbers[2 * i + 1] = number(registers[i] >> 16, is_bfloat);
    }
}

// Rows lane / 4 and 8 below of a warp's A: 16 values each, and where they are in k.
struct Rows {
    float values[2][16];
    int places[2][16];
    bool defined[2];
};

// Of 2:4 the lanes hold 16 of 32 columns. Metadata: of each four lanes the selector names two, the first for columns 0..15 of A, the
// second for 16..31; the low half of it is for row lane / 4, the high half for the row 8 below; four bits for each four columns, two
// for the place of the first stored value and two for that of the second. A row in which the two do not rise is undefined.
Rows rows_of_a(const Operands (&all)[32], unsigned lane, bool sparse, int selector) {
    Rows rows;
    const int first_lane = lane / 4 * 4;
    for (int upper = 0; upper < 2; ++upper) {
        rows.defined[upper] = true;
        for (int stored = 0; stored < 16; ++stored) {
            rows.values[upper][stored] = all[first_lane + stored % 8 / 2].a[(upper + stored / 8 * 2) * 2 + stored % 2];
            rows.places[upper][stored] = stored;
        }
        for (int quad = 0; sparse && quad < 8; ++quad) {
            const unsigned word = all[first_lane + 2 * selector + quad / 4].e >> 16 * upper;
            const int first = word >> 4 * (quad % 4) & 3, second = word >> (4 * (quad % 4) + 2) & 3;
            rows.defined[upper] &= first < second;
            rows.places[upper][2 * quad] = 4 * quad + first;
            rows.places[upper][2 * quad + 1] = 4 * quad + second;
        }
    }
    return rows;
}

// A row of A times a column of B.
void add_product(float& sum, const Rows& rows, int upper, const float* b) {
    if (!rows.defined[upper]) sum = NAN;
    for (int stored = 0; stored < 16; ++stored) sum += rows.values[upper][stored] * b[rows.places[upper][stored]];
}

// The same of int8: four in a register. A lane gives its registers of A and of B (mma alone).
struct Bytes {
    unsigned a[4], b[2], e;  // e: metadata, of 2:4
};

constexpr int OVERWRITTEN = 1 << 30;  // a sum of int8 where float ones are NaN: above all that products of 65,536 of k reach

int int8_of(unsigned word, int byte) { return static_cast<int8_t>(word >> 8 * byte); }

// Rows lane / 4 and 8 below of a warp's A: a0 has columns 4 (lane % 4) .. + 3 of the first and a1 of the second, a2 and a3 16 further on.
//
// Of 2:4 these are 32 of 64 columns. Metadata: of each four lanes the first and the third hold that of row lane / 4, the others that of the row
// 8 below; the first two for columns 0..31 of A, the last two for 32..63; four bits for each four columns, as above.
struct ByteRows {
    int values[2][32];
    int places[2][32];
    bool defined[2];
};
ByteRows rows_of_bytes(const Bytes (&all)[32], unsigned lane, bool sparse) {
    ByteRows rows;
    const int first_lane = lane / 4 * 4;
    for (int upper = 0; upper < 2; ++upper) {
        rows.defined[upper] = true;
        for (int k = 0; k < 32; ++k) {
            rows.values[upper][k] = int8_of(all[first_lane + k % 16 / 4].a[upper + k / 16 * 2], k % 4);
            rows.places[upper][k] = k;
        }
        for (int quad = 0; sparse && quad < 16; ++quad) {
            const unsigned word = all[first_lane + quad / 8 * 2 + upper].e;
            const int first = word >> 4 * (quad % 8) & 3, second = word >> (4 * (quad % 8) + 2) & 3;
            rows.defined[upper] &= first < second;
            rows.places[upper][2 * quad] = 4 * quad + first;
            rows.places[upper][2 * quad + 1] = 4 * quad + second;
        }
    }
    return rows;
}

// Sums wrap around.
void add_product(int& sum, const ByteRows& rows, int upper, const int* column) {
    unsigned total = rows.defined[upper] ? sum : OVERWRITTEN;
    for (int k = 0; k < 32; ++k) total += static_cast<unsigned>(rows.values[upper][k] * column[rows.places[upper][k]]);
    sum = static_cast<int>(total);
}
}  // namespace

float from_half(unsigned bits) { return half(bits); }
unsigned to_half(double value) {
    const _Float16 rounded = static_cast<_Float16>(value);
    uint16_t out;
    std::memcpy(&out, &rounded, 2);
    return out;
}
float from_bfloat(unsigned bits) { return bfloat(bits); }
unsigned to_bfloat(float value) {  // to nearest, ties to even; NaN is not needed here
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
unsigned subtract_half(unsigned a, unsigned b) {
    return each([=](int s) { return to_half(double(half(a >> s)) - half(b >> s)); });
}
unsigned multiply_half(unsigned a, unsigned b) {
    return each([=](int s) { return to_half(double(half(a >> s)) * half(b >> s)); });
}
unsigned fma_half(unsigned a, unsigned b, unsigned c) {
    return each([=](int s) { return to_half(double(half(a >> s)) * half(b >> s) + half(c >> s)); });
}
unsigned fma_bfloat(unsigned a, unsigned b, unsigned c) {
    auto low = [](unsigned bits) { return bfloat(bits & 0xffff); };
    return each([=](int s) { return to_bfloat(low(a >> s) * low(b >> s) + low(c >> s)); });
}

unsigned permute(unsigned a, unsigned b, unsigned selector) {  // prmt without a mode: four bits for each byte of the result
    const unsigned long long both = static_cast<unsigned long long>(b) << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned choice = selector >> 4 * i & 15;
        unsigned byte = both >> 8 * (choice & 7) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;  // its sign, in all bits
        out |= byte << 8 * i;
    }
    return out;
}
}  // namespace gpu
