// From the words of GPTQ or compressed-tensors to MARLIN tiles, bits alone:
//
//   words      int32, [K/8, N] with any strides: rows of N lie together in GPTQ, columns of K/8 in compressed-tensors
//              nibble i of word (r, n) is code + 8 of k = 8 r + i
//   qweight    [K/16, 2N] int32, MARLIN tiles (docs/formats/marlin.md), with the same nibbles in other places
//
//   a CTA: 64 (n) x 8 tiles in k, that is 16 rows of words; a tile for each of 8 warps
//
//     words ── the threads of a warp where words lie together ──► shared memory [16 rows][64 n]
//                                                     │
//     lane t of a warp, word j of its four:  columns 16 j + t/4 and 8 more, byte t%4 of the words of both rows:
//         k = 2 (t%4) + {0, 1} from the first row, 8 more from the second
//                                                     │
//     qweight ◄── 16 bytes a lane, 512 bytes a warp ──┘
//
// A row of shared memory is a word longer than 64, so that words of a column lie in different banks.
//
// LIMITS.  K and N multiples of 64, qweight aligned to 16 bytes; strides and sizes below 2^31.
#include "ptx.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int ROWS = 2 * WARPS, COLUMNS = 64, PITCH = COLUMNS + 1;

static_assert(4 * ROWS * PITCH == SHARED_BYTES, "the host allots other shared memory than the kernel uses");

extern "C" __global__ void __launch_bounds__(THREADS) repack(
    const unsigned* __restrict__ words,
    uint4* __restrict__ qweight,               // [K/16, N/64, 32 lanes]
    unsigned n, unsigned rows,                 // rows = K/8
    unsigned row_stride, unsigned column_stride  // in words; one of them is 1, mostly
) {
    extern __shared__ uint4 shared[];
    unsigned* const held = reinterpret_cast<unsigned*>(shared);
    const unsigned n_blocks = n / COLUMNS, block = blockIdx.x % n_blocks, first_row = blockIdx.x / n_blocks * ROWS;
    const bool down = column_stride > row_stride;  // neighbours in memory are neighbours in k

#pragma unroll
    for (unsigned i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
        const unsigned row = down ? i % ROWS : i / COLUMNS, column = down ? i / ROWS : i % COLUMNS;
        if (first_row + row < rows) {
            const size_t at = static_cast<size_t>(first_row + row) * row_stride + static_cast<size_t>(block * COLUMNS + column) * column_stride;
            held[row * PITCH + column] = words[at];
        }
    }
    __syncthreads();
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = first_row / 2 + warp;
    if (2 * tile >= rows) return;
    unsigned made[4];
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
        made[j] = 0;
#pragma unroll
        for (unsigned later = 0; later < 2; ++later) {  // eight columns
#pragma unroll
            for (unsigned half = 0; half < 2; ++half) {  // eight of k
                const unsigned pair = held[(2 * warp + half) * PITCH + 16 * j + lane / 4 + 8 * later] >> 8 * (lane % 4) & 0xff;
                made[j] |= ((pair & 0xf) | (pair & 0xf0) << 12) << 4 * (half + 2 * later);
            }
        }
    }
    qweight[(static_cast<size_t>(tile) * n_blocks + block) * 32 + lane] = make_uint4(made[0], made[1], made[2], made[3]);
}
