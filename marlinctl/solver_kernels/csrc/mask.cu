// One block of columns of a sweep over the fours of a 2:4 mask (marlinctl/sparsify/masked_ls.py, `improve_mask`): each four in turn takes the
// pair of columns, and the values of them, that lower the layer error most while all other fours stay.
//
//   pull    [columns, R]  H (W - V) of the block's columns before the block: the host's matrix product
//   matrix  [columns, columns] of H, rows of K floats
//   tables  [columns / 4, 6, 3]  of each pair (i, j) the inverse of H restricted to it: at ii, at ij, at jj
//   values  [columns, R]  V, changed in place; errors [columns, R]  W - V, changed along; high, low [columns, R]: errors in halves
//   pairs   [columns / 4, R]  which of 01 02 03 12 13 23 stays, changed in place
//
// A problem has K x K of matrix, K columns of values, errors and halves, K / 4 of tables and pairs, and the columns of the block alone of pull.
//
// With P = pull and b = P + H_qq v, a pair takes u = inverse b and gains b inverse b. A pair must gain more than the standing one by
// MARGIN; among equals the lower one wins. A change u - v of column i subtracts H_ij (u - v) from P_j of the columns after it.
#include "columns.cuh"

constexpr int PAIRS = 6;

extern "C" __global__ void __launch_bounds__(THREADS) mask(
    const float* __restrict__ pull, const float* __restrict__ matrix, const float* __restrict__ tables,
    float* __restrict__ values, float* __restrict__ errors, float* __restrict__ high, float* __restrict__ low,
    unsigned char* __restrict__ pairs,
    int columns, int rows, int k_total
) {
    extern __shared__ uint4 shared[];
    float* const tile = reinterpret_cast<float*>(shared);
    float* const change = tile + TILE_FLOATS + threadIdx.x;
    const Place place_in = place_of(rows);
    const bool inside = place_in.row < rows;
    const size_t at = inside ? place_in.row : rows - 1;
    const size_t before = place_in.problem * k_total;  // columns of the problems before this one
    pull += place_in.problem * columns * rows;
    matrix += before * k_total;
    tables += before / QUAD * PAIRS * 3;
    values += before * rows;
    errors += before * rows;
    high += before * rows;
    low += before * rows;
    pairs += before / QUAD * rows;

    for (int run = 0; run < columns; run += RUN) {
        __syncthreads();
        load_tile(tile, matrix, run, columns, k_total);
        float p[RUN];
#pragma unroll
        for (int j = 0; j < RUN; ++j) p[j] = pull[min(run + j, columns - 1) * static_cast<size_t>(rows) + at];
        __syncthreads();
#pragma unroll 4
        for (int i = 0; i < run; ++i) add_row(p, tile, i, -change[i * THREADS]);

#pragma unroll
        for (int j = 0; j < RUN; j += QUAD) {
            const int k = run + j;
            if (k < columns) {
                float v[QUAD], b[QUAD];
#pragma unroll
                for (int i = 0; i < QUAD; ++i) v[i] = values[(k + i) * static_cast<size_t>(rows) + at];
#pragma unroll
                for (int i = 0; i < QUAD; ++i) {
                    b[i] = p[j + i];
#pragma unroll
                    for (int y = 0; y < QUAD; ++y) b[i] = __fmaf_rn(tile[(k + i) * RUN + j + y], v[y], b[i]);
                }
                const float* const table = tables + k / QUAD * PAIRS * 3;
                const size_t place = k / QUAD * static_cast<size_t>(rows) + at;
                const int standing = pairs[place];
                float most = -1.0f, u[QUAD];
                int chosen = 0;
#pragma unroll
                for (int pair = 0; pair < PAIRS; ++pair) {
                    const int x = pair < 3 ? 0 : pair < 5 ? 1 : 2, y = pair < 3 ? pair + 1 : pair < 5 ? pair - 1 : 3;
                    const float xx = table[pair * 3], xy = table[pair * 3 + 1], yy = table[pair * 3 + 2];
                    const float at_x = __fmaf_rn(xx, b[x], xy * b[y]), at_y = __fmaf_rn(xy, b[x], yy * b[y]);
                    float gain = __fmaf_rn(at_x, b[x], at_y * b[y]);
                    if (pair == standing) gain = gain * (1.0f + MARGIN) + 1.17549435e-38f;  // stays where nothing is gained at all
                    if (gain > most) {
                        most = gain;
                        chosen = pair;
#pragma unroll
                        for (int i = 0; i < QUAD; ++i) u[i] = i == x ? at_x : i == y ? at_y : 0.0f;
                    }
                }
#pragma unroll
                for (int i = 0; i < QUAD; ++i) {
                    const size_t here = (k + i) * static_cast<size_t>(rows) + at;
                    const float difference = u[i] - v[i];
                    change[(k + i) * THREADS] = difference;
                    if (inside) {
                        values[here] = u[i];
                        const float error = errors[here] - difference;
                        errors[here] = error;
                        store_halves(high, low, here, error);
                    }
                    add_row(p, tile, k + i, -difference, j + QUAD);
                }
                if (inside) pairs[place] = static_cast<unsigned char>(chosen);
            }
        }
    }
}
