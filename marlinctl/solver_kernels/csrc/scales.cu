// The scale of each group and row with the least weighted rounding error (marlinctl/quantize/grid.py, `search_scales`).
//
//   weight      [K, R]  float32
//   importance  [K]     weight of the squared error of a column
//   ratios      [RATIOS + 1]  candidates, as fractions of the scale that just covers the largest weight; then the bar (below)
//   scales      [G, R]  written, as `round_scales` rounds them
//
// Of a stack of problems, [E, K, R], [E, K] and [E, G, R]: E x G groups one behind the other.
//
// A thread has one row of one group and reads its weights twice: for the largest, then for the errors of all candidates at once, which
// lie in registers. -DBOTH_SIGNS=1 tries two signs, w / -8 and w / 7.5; 0 the positive one alone. -DBFLOAT16_EXACT=1 gives scales that
// bfloat16 holds too.
//
// The standing scale is the covering one; another one must promise an error below the bar times its error. Sums are over PART columns
// first, then over parts, so that a group of a whole row is summed as accurately as a short one.
#include "rounding.cuh"

constexpr int THREADS = 128, PART = 128;
constexpr int CANDIDATES = RATIOS * (BOTH_SIGNS ? 2 : 1) + 1;  // the last one stands

extern "C" __global__ void __launch_bounds__(THREADS) scales(
    const float* __restrict__ weight, const float* __restrict__ importance, const float* __restrict__ ratios, float* __restrict__ scales,
    int rows, int group_size
) {
    const int row_blocks = (rows + THREADS - 1) / THREADS;
    const int group = blockIdx.x / row_blocks, row = blockIdx.x % row_blocks * THREADS + threadIdx.x;
    if (row >= rows) return;
    const float* const first = weight + static_cast<size_t>(group) * group_size * rows + row;
    const float* const h = importance + group * group_size;

    float largest = first[0];
    for (int k = 1; k < group_size; ++k) {
        const float w = first[k * static_cast<size_t>(rows)];
        if (fabsf(w) > fabsf(largest)) largest = w;
    }
    const float start[2] = {BOTH_SIGNS ? largest / LOWEST : fabsf(largest) / (HIGHEST + 0.5f), largest / (HIGHEST + 0.5f)};
    float scale[CANDIDATES], inverse[CANDIDATES], total[CANDIDATES];
#pragma unroll
    for (int c = 0; c < CANDIDATES; ++c) {
        scale[c] = round_scale(c + 1 < CANDIDATES ? start[c / RATIOS] * ratios[c % RATIOS] : start[0]);
        inverse[c] = 1.0f / scale[c];
        total[c] = 0.0f;
    }
    for (int part = 0; part < group_size; part += PART) {
        float sum[CANDIDATES] = {};
        for (int k = part; k < min(part + PART, group_size); ++k) {
            const float w = first[k * static_cast<size_t>(rows)], weighs = h[k];
#pragma unroll
            for (int c = 0; c < CANDIDATES; ++c) {
                const float t = w * inverse[c];
                const float delta = fminf(fmaxf(rintf(t), LOWEST), HIGHEST) - t;
                sum[c] = __fmaf_rn(delta * delta, weighs, sum[c]);
            }
        }
#pragma unroll
        for (int c = 0; c < CANDIDATES; ++c) total[c] += sum[c];
    }
    float best = scale[CANDIDATES - 1], least = total[CANDIDATES - 1] * (best * best) * ratios[RATIOS];
#pragma unroll
    for (int c = 0; c + 1 < CANDIDATES; ++c) {
        const float error = total[c] * (scale[c] * scale[c]);
        if (error < least) {
            least = error;
            best = scale[c];
        }
    }
    scales[static_cast<size_t>(group) * rows + row] = best;
}
