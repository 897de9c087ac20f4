// From tiles to the plain weight:  MARLIN or Sparse-MARLIN tiles and scales -> weight [N, K] in float16 or bfloat16
//
//   qweight      [K'/16, 2N']  int32, MARLIN tiles             N', K' are N, K rounded up to 64 (docs/formats/marlin.md)
//                [K'/32, 2N']  int32, Sparse-MARLIN tiles      (docs/formats/marlin_24.md)
//   meta         [K'/32, 2N']  int16                           2:4 alone, else not read
//   scales       [G', N']      float16, in the order of the tiles
//   weight       [N, K]        code times scale, rounded once; zero where 2:4 pruned
//
// For large M: decoding the weight once and torch.matmul is faster than decoding it for every 64 tokens (kernels/dispatch.py says when).
// It moves two and a half bytes for each weight and is bound by memory, so the code is the simplest that reads and writes 16 bytes a lane.
//
//   a CTA: 64 (n) x 8 tiles in k, a tile for each of 8 warps: 128 of k dense, 256 of 2:4
//
//     tile  ── 16 bytes a lane, 4 words ──►  lane t of a warp decodes each word as an A fragment (dequantize.cuh)
//
//                 dense, word j:  n = 16 j + t/4 (+ 8)    k = 2 (t%4) + {0, 1} (+ 8)        a pair of neighbours in k: 4 bytes
//                 2:4,   word j:  n = 8 (t/4) + j (+ 4)   kept weights 2 (t%4) + {0, 1} (+ 8), of group of four t%4 (+ 4): 8 bytes
//
//     shared memory [64 n][k]  ── 16 bytes a thread, rows of 256 or 512 bytes ──►  weight
//
// A row of shared memory is longer by 16 (2:4: 32) bytes than its k, so that the rows that a warp writes at once lie in different banks.
//
// LIMITS.  K a multiple of 8, everything aligned to 16 bytes; (K'/span) x (N'/64) < 2^31 CTAs.
//
// MEASURED.  NVIDIA H200, 2026-11-21: 73728 x 18432, dense, takes 0.95 ms (3.4 GB read and written), 4096 x 4096 12 us; both are the
// difference of the operator and torch.matmul alone at M=1024.
#include "dequantize.cuh"

constexpr int TILE = SPARSE ? 32 : 16;                  // k of a row of words
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int SPAN = WARPS * TILE;                      // k of a CTA
constexpr int ROW_BYTES = SPAN * 2 + (SPARSE ? 32 : 16);
constexpr int CHUNKS = SPAN / 8;                        // of 16 bytes in a row

static_assert(64 * ROW_BYTES == SHARED_BYTES, "the host allots other shared memory than the kernel uses");

// Where the scale of column n of a block of 64 lies in it: marlinctl/pack/tile.py.
__device__ __forceinline__ unsigned scale_slot(unsigned n, bool grouped) {
    if (SPARSE) return grouped ? n / 8 * 8 + n % 4 * 2 + n % 8 / 4 : n;
    return grouped ? n % 8 * 8 + n / 8 : n / 32 * 32 + n % 8 / 2 * 8 + n % 32 / 8 * 2 + n % 2;
}

// Two weights, rounded once: a code is exact in either format, and its product with a scale in float32.
__device__ __forceinline__ unsigned scaled(unsigned codes, float scale) {
    const float first = NUMBER::widen(static_cast<unsigned short>(codes));
    const float second = NUMBER::widen(static_cast<unsigned short>(codes >> 16));
    return NUMBER::round(first * scale, second * scale);
}

extern "C" __global__ void __launch_bounds__(THREADS) unpack(
    const uint4* __restrict__ qweight,        // [K'/TILE, N'/64, 32 lanes] of four words
    const unsigned short* __restrict__ meta,  // [K'/32, 2N']
    const unsigned short* __restrict__ scales,  // [G', N'] float16
    char* __restrict__ weight,                // [N, K] 16-bit
    unsigned n, unsigned k,                   // K as in `weight`: up to K', zero beyond the true one
    int group_shift                           // log2(group_size / 16), or -1: channel-wise
) {
    extern __shared__ uint4 shared[];
    char* const rows = reinterpret_cast<char*>(shared);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned n_blocks = (n + 63) / 64, k_tiles = (k + 63) / 64 * (64 / TILE);
    const unsigned block = blockIdx.x % n_blocks, first_tile = blockIdx.x / n_blocks * WARPS, tile = first_tile + warp;

    if (tile < k_tiles) {
        const uint4 four = qweight[(static_cast<size_t>(tile) * n_blocks + block) * 32 + lane];
        const unsigned words[4] = {four.x, four.y, four.z, four.w};
        const bool grouped = group_shift >= 0;
        const unsigned group = grouped ? tile * (TILE / 16) >> group_shift : 0;
        const unsigned short* const scale_row = scales + (static_cast<size_t>(group) * n_blocks + block) * 64;
        const unsigned short* const meta_row = meta + (static_cast<size_t>(tile) * n_blocks + block) * 128;
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            unsigned codes[4];
            dequantize<NUMBER>(codes, words[j]);
#pragma unroll
            for (unsigned upper = 0; upper < 2; ++upper) {  // the two rows of a word: registers 0, 2 and 1, 3
                const unsigned row = SPARSE ? lane / 4 * 8 + j + upper * 4 : j * 16 + lane / 4 + upper * 8;
                const float scale = widen_half(scale_row[scale_slot(row, grouped)]);
                char* const to = rows + row * ROW_BYTES + warp * TILE * 2;
#pragma unroll
                for (unsigned later = 0; later < 2; ++later) {  // the two pairs of a row
                    const unsigned pair = scaled(codes[upper + later * 2], scale);
                    if (SPARSE) {
                        // Word `later` of the row's metadata in this tile has a nibble for each of four groups of four: two bits for
                        // the place of each kept weight.
                        const unsigned at = row % 4 / 2 * 64 + row / 8 * 8 + row % 2 * 4 + later * 2 + row % 8 / 4;
                        const unsigned places = meta_row[at] >> lane % 4 * 4;
                        const unsigned long long group_of_four = static_cast<unsigned long long>(pair & 0xffff) << 16 * (places & 3)
                                                      | static_cast<unsigned long long>(pair >> 16) << 16 * (places >> 2 & 3);
                        *reinterpret_cast<unsigned long long*>(to + (lane % 4 + later * 4) * 8) = group_of_four;
                    } else {
                        *reinterpret_cast<unsigned*>(to + (lane % 4 + later * 4) * 4) = pair;
                    }
                }
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (unsigned chunk = threadIdx.x; chunk < 64 * CHUNKS; chunk += THREADS) {
        const unsigned row = chunk / CHUNKS, place = chunk % CHUNKS;
        const unsigned at_n = block * 64 + row, at_k = first_tile * TILE + place * 8;
        if (at_n < n && at_k < k) {
            *reinterpret_cast<uint4*>(weight + (static_cast<size_t>(at_n) * k + at_k) * 2) =
                *reinterpret_cast<const uint4*>(rows + row * ROW_BYTES + place * 16);
        }
    }
}
