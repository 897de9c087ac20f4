// Scales that a checkpoint can hold: marlinctl/quantize/grid.py, `round_scales`, bit for bit.
#pragma once

// To `KEPT` bits of the significand behind the point, ties to even. Of a normal number whose result is one too.
template <int KEPT>
__device__ __forceinline__ float round_bits(float value) {
    const unsigned bits = __float_as_uint(value), dropped = 23 - KEPT;
    return __uint_as_float((bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1)) >> dropped << dropped);
}

// The nearest float16, which bfloat16 holds too where -DBFLOAT16_EXACT=1; zero and what is below the smallest normal float16 become that.
__device__ __forceinline__ float round_scale(float scale) {
    const float limit = BFLOAT16_EXACT ? 65280.0f : 65504.0f, smallest = 6.103515625e-05f;
    if (BFLOAT16_EXACT) scale = round_bits<7>(scale);
    scale = fminf(fmaxf(scale, -limit), limit);
    if (fabsf(scale) < smallest) scale = copysignf(smallest, scale);
    return round_bits<10>(scale);
}
