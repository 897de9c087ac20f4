// What the kernels that go over columns share: a thread has one row, and a run of RUN columns of it in registers.
//
//   a CTA: THREADS rows of one problem, COLUMNS columns (one call of the host for each block of columns, a matrix product between calls)
//
//     for each run of RUN columns
//         tile   shared memory [columns so far and of the run][RUN]    what a change of an earlier column does to those of the run
//         value += change of each earlier column of the block * tile   RUN multiply-adds for each
//         the run's columns one after the other                        in registers, unrolled
//
// Everything is [K, R]: neighbouring threads read neighbouring addresses, and no thread reads what another one computed. A call may be for
// a stack of problems, [E, K, R]: each has CTAs of its own, and `place_of` says which. What the host passes as the start of an array is that
// of the block of columns in the first problem.
#pragma once

constexpr int COLUMNS = 128;  // of a call
constexpr int RUN = 32;       // of them in registers
constexpr int QUAD = 4;       // 2:4 looks at four neighbours
constexpr int THREADS = 128;  // rows of a CTA
constexpr int TILE_FLOATS = COLUMNS * RUN;
constexpr int CHANGE_FLOATS = COLUMNS * THREADS;

static_assert((TILE_FLOATS + CHANGE_FLOATS) * 4 == SHARED_BYTES, "the host allots other shared memory than the kernels use");

struct Place {
    size_t problem;
    int row;  // of it; may lie beyond the last one
};

__device__ __forceinline__ Place place_of(int rows) {
    const int ctas = (rows + THREADS - 1) / THREADS;  // of a problem
    return {blockIdx.x / static_cast<unsigned>(ctas), static_cast<int>(blockIdx.x % ctas * THREADS + threadIdx.x)};
}

// Rows 0..run+RUN-1 and columns run..run+RUN-1 of the block's square part of a matrix with rows of `stride` floats. Zero beyond `columns`.
__device__ __forceinline__ void load_tile(float* tile, const float* matrix, int run, int columns, int stride) {
    const int lane = threadIdx.x % RUN;
    for (int i = threadIdx.x / RUN; i < run + RUN; i += THREADS / RUN) {
        const bool inside = i < columns && run + lane < columns;
        tile[i * RUN + lane] = inside ? matrix[static_cast<size_t>(i) * stride + run + lane] : 0.0f;
    }
}

// value[j] += factor * tile[i][j] for j in [first, RUN): one broadcast of 16 bytes for four products. `first` must be a constant once
// loops are unrolled, for registers have no index.
__device__ __forceinline__ void add_row(float (&value)[RUN], const float* tile, int i, float factor, int first = 0) {
    const float4* const row = reinterpret_cast<const float4*>(tile + i * RUN);
#pragma unroll
    for (int four = 0; four < RUN / 4; ++four) {
        if (four * 4 + 3 < first) continue;
        const float4 t = row[four];
        const float all[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (four * 4 + j >= first) value[four * 4 + j] = __fmaf_rn(all[j], factor, value[four * 4 + j]);
        }
    }
}

// The two numbers of TF32 whose sum `value` is but for 2^-22 of it (marlinctl/quantize/products.py, `split`), for the host's products.
__device__ __forceinline__ void store_halves(float* high, float* low, size_t place, float value) {
    const float rounded = __uint_as_float((__float_as_uint(value) + (1u << 12)) & ~((1u << 13) - 1));
    high[place] = rounded;
    low[place] = value - rounded;
}

// The two highest of four, the lower one among equals: bit i of the result is set where i is one of them.
__device__ __forceinline__ unsigned best_two(const float (&score)[QUAD]) {
    unsigned kept = 0;
#pragma unroll
    for (int j = 0; j < QUAD; ++j) {
        int ahead = 0;
#pragma unroll
        for (int i = 0; i < QUAD; ++i) ahead += score[i] > score[j] || (score[i] == score[j] && i < j);
        kept |= static_cast<unsigned>(ahead < 2) << j;
    }
    return kept;
}
