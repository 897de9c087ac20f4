// One block of columns of the column sweep (marlinctl/quantize/solver.py, `sweep`):
//
//   t_k = target_k + sum of errors_i feedback_ik over i < k in the block ;  q_k = t_k projected ;  errors_k = anchor_k - q_k
//
//   target    [columns, R]  base plus the feedback of all blocks before this one: the host's matrix product
//   anchor    [columns, R]
//   feedback  [columns, columns], rows of K floats, read above the diagonal
//   scales    [G, R]        and group_of [columns]: the row of each column. -DROUND=1: q = clamp(round(t / s)) s, `codes` gets the code;
//                           -DROUND=0: neither is read, q = t, and `codes` gets q
//   keep      [columns, R]  -DMASK=0: not read; 1: where it is 0, q is 0; 2: written, the best two of each four as the sweep comes there
//                           (SparseGPT, arXiv 2301.00774): those with the largest |t pivot| if all before them in the four stayed
//   pivots    [columns]     of -DMASK=2
//   codes, errors           [columns, R], written; high, low [columns, R]: the errors in halves, written
//
// A problem has all K columns of anchor, keep, codes, errors and halves, K x K of feedback, K of group_of and pivots, G rows of scales;
// `target_columns` of target, which may be a matrix of the block alone.
//
// LIMITS.  columns <= 128, a multiple of 4 with -DMASK=2. The code of a column is the reference's unless t / s is within rounding of a
// half: the sums are the same, in another order.
#include "columns.cuh"

// 1 / scale to the last bit but one. The division that rounds right calls a function for numbers that no scale is, whose registers spill.
__device__ __forceinline__ float reciprocal(float scale) {
    const float about = __fdividef(1.0f, scale);
    return __fmaf_rn(about, __fmaf_rn(-scale, about, 1.0f), about);
}

extern "C" __global__ void __launch_bounds__(THREADS) sweep(
    const float* __restrict__ target, const float* __restrict__ anchor, const float* __restrict__ feedback,
    const float* __restrict__ scales, const int* __restrict__ group_of, unsigned char* __restrict__ keep,
    const float* __restrict__ pivots, float* __restrict__ codes, float* __restrict__ errors,
    float* __restrict__ high, float* __restrict__ low,
    int columns, int rows, int k_total, int groups, int target_columns
) {
    extern __shared__ uint4 shared[];
    float* const tile = reinterpret_cast<float*>(shared);
    float* const change = tile + TILE_FLOATS + threadIdx.x;  // of column i at i * THREADS
    const Place place_in = place_of(rows);
    const bool inside = place_in.row < rows;
    const size_t at = inside ? place_in.row : rows - 1;  // every thread reads and meets; those beyond the last row write nothing
    const size_t before = place_in.problem * k_total;  // columns of the problems before this one
    target += place_in.problem * target_columns * rows;
    anchor += before * rows;
    feedback += before * k_total;
    if (ROUND) {
        scales += place_in.problem * groups * rows;
        group_of += before;
    }
    if (MASK != 0) keep += before * rows;
    if (MASK == 2) pivots += before;
    codes += before * rows;
    errors += before * rows;
    high += before * rows;
    low += before * rows;

    for (int run = 0; run < columns; run += RUN) {
        __syncthreads();  // the tile of the run before has been read
        load_tile(tile, feedback, run, columns, k_total);
        float t[RUN], a[RUN], s[RUN];
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
            const int k = min(run + j, columns - 1);
            t[j] = target[k * static_cast<size_t>(rows) + at];
            a[j] = anchor[k * static_cast<size_t>(rows) + at];
            if (ROUND) s[j] = scales[group_of[k] * static_cast<size_t>(rows) + at];
        }
        __syncthreads();
#pragma unroll 4
        for (int i = 0; i < run; ++i) add_row(t, tile, i, change[i * THREADS]);

        unsigned kept = 0;  // of the four that column j lies in
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
            const int k = run + j;
            const size_t place = k * static_cast<size_t>(rows) + at;
            if (k < columns) {  // the same for all threads
                if (MASK == 2 && j % QUAD == 0) {
                    float four[QUAD], score[QUAD];
#pragma unroll
                    for (int i = 0; i < QUAD; ++i) four[i] = t[j + i];
#pragma unroll
                    for (int i = 0; i < QUAD - 1; ++i) {  // what the later ones become if this one stays
#pragma unroll
                        for (int later = i + 1; later < QUAD; ++later)
                            four[later] = __fmaf_rn(tile[(k + i) * RUN + j + later], a[j + i] - four[i], four[later]);
                    }
#pragma unroll
                    for (int i = 0; i < QUAD; ++i) score[i] = fabsf(four[i] * pivots[k + i]);
                    kept = best_two(score);
                }
                bool stays = true;
                if (MASK == 1) stays = keep[place] != 0;
                if (MASK == 2) stays = kept >> j % QUAD & 1;
                float code = ROUND ? fminf(fmaxf(rintf(t[j] * reciprocal(s[j])), LOWEST), HIGHEST) : t[j];
                if (!stays) code = 0.0f;
                const float error = ROUND ? __fmaf_rn(-code, s[j], a[j]) : a[j] - code;
                change[k * THREADS] = error;
                if (inside) {
                    codes[place] = code;
                    errors[place] = error;
                    store_halves(high, low, place, error);
                    if (MASK == 2) keep[place] = stays;
                }
                add_row(t, tile, k, error, j + 1);
            }
        }
    }
}
