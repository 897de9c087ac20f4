// 2:4 INT4 x 16-bit GEMM for Hopper:  out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N])
//
//   activations  [M, K]        float16 or bfloat16
//   qweight      [K'/32, 2N']  int32, Sparse-MARLIN tiles     N', K' are N, K rounded up to 64 (docs/formats/marlin_24.md)
//   meta         [K'/32, 2N']  int16, which two of each four neighbours in k the codes of qweight are
//   scales       [G', N']      float16, in Sparse-MARLIN order    groups of 32, 64 or 128 in K, or one for all of K
//   out          [M, N]        as activations
//
// marlin_sm90.cu with wgmma.sp: roles, ring, scales and the half of A registers that is decoded while the tensor core reads the
// other are explained there. What is different is what sparse_marlin_sm80.cu explains of mma.sp:
//
//   a warpgroup, one step of 32 in k          m 0 .. TOKENS-1
//
//                    k 0..31                  ┌─────────────┐
//              ┌───────────────────┐    k 0   │             │    B: activations [m, k] as they lie, rows of 128 bytes,
//     warp 0   │ word j, survivors │ 16  .    │      B      │       swizzled; half a row is a step
//              ├───────────────────┤     .    │             │
//     warp 1   │ word j   and meta │    k 31  └─────────────┘    D: of a lane, with g = t/4, the outputs n = 8g + j and
//              ├───────────────────┤          ┌─────────────┐       8g + 4 + j of its warp's block: over all words eight
//     warp 2   │ word j            │          │             │       neighbours
//              ├───────────────────┤          │      D      │
//     warp 3   │ word j            │          │             │
//              └───────────────────┘          └─────────────┘
//
// METADATA of a warp's 16 rows lies in its lanes as for mma.sp.m16n8k32: of each four lanes two, which the selector names, the first
// for k 0..15, the second for k 16..31; low half of a register row t/4, high half row t/4 + 8. One ldmatrix brings that of two steps.
//
// A STAGE holds K_STEP of k:
//
//   activations  [K_STEP/64][TOKENS]            rows of 128 bytes, swizzled
//   weights      [K_STEP/32][BLOCKS][32 lanes]  16 bytes each, as in memory: every lane reads back the 16 bytes of its own
//   metadata     [K_STEP/32][BLOCKS][2][8]      16 bytes each, as in memory: the 8 rows of a matrix lie in different banks
//   scales       [rows of groups][64 BLOCKS]    float16; room for groups of 32
//
// Metadata beyond the columns is what was in the stage before, at first anything. What wgmma.sp makes of two survivors in one place is
// not defined, but it stays in their row of D, which nobody writes.
//
// LIMITS.  As marlin_sm90.cu.
//
// MEASURED.  NVIDIA H200, 2026-11-22, microseconds in a CUDA graph, with overlap, groups of 128, float16; torch.matmul takes 615 to 686,
// and 1117 at M=256:
//
//   M                1       16       32       64      128      256
//   73728 x 18432    134      158      183      251      395      762
//
// What bounds it is the GPU's 700 W: docs/log/2026-11-22-power-and-tensor-maps.md.
#include "write_sparse_marlin.cuh"
#include "cluster_sm90.cuh"
#include "pipeline_sm90.cuh"

constexpr int K_TILES = K_STEP / 32;                   // rows of qweight and meta in a stage
constexpr int WARP_TILES = K_TILES / K_WARPS;          // and of them those of one warp
constexpr int META_TILES = 2;                          // of which one ldmatrix brings a warp's metadata
constexpr int GROUP_TILES = GROUPED ? 1 << GROUP_SHIFT >> 1 : K_TILES;
constexpr int BATCH = SCALE_SUMS && GROUP_TILES < STEPS ? GROUP_TILES : STEPS;  // steps of k multiplied at a time, never of two groups
constexpr int GROUP_ROWS = !GROUPED ? 0 : K_TILES > GROUP_TILES ? K_TILES / GROUP_TILES : 1;  // of scales in a stage
constexpr int WEIGHT_BYTES = K_TILES * BLOCKS * 512;
constexpr int META_BYTES = K_TILES * BLOCKS * 256;
constexpr int WEIGHTS_AT = ACTIVATION_BYTES, META_AT = WEIGHTS_AT + WEIGHT_BYTES, SCALES_AT = META_AT + META_BYTES;
constexpr int STAGE_BYTES = SCALES_AT + SCALE_BYTES;
constexpr int SCRATCH_AT = STAGES * STAGE_BYTES, RING_AT = SCRATCH_AT + SCRATCH_BYTES, ARRIVED_AT = RING_AT + RING_BYTES;

static_assert(ARRIVED_AT + 16 == SHARED_BYTES, "the host allots other shared memory than the kernel uses");
static_assert(STAGE_BYTES % 1024 == 0, "the swizzle is one of address bits");
static_assert(PART_BYTES <= STAGES * STAGE_BYTES, "a cluster's CTAs show each other their sums where the stages were");
static_assert(WARP_TILES % 2 == 0, "a warp's part of k begins with a row of 128 bytes");
static_assert(WARP_TILES % META_TILES == 0, "a warp takes as much of k at a time as one ldmatrix brings metadata for");
static_assert(WARP_TILES % (2 * BATCH) == 0, "a stage begins with the first half of a");
static_assert(WARP_TILES % GROUP_TILES == 0 || GROUP_TILES % WARP_TILES == 0, "groups and parts of a stage end together");

template <int selector>
__device__ __forceinline__ void multiply_async(
    Half, float (&d)[SLABS][4], const unsigned (&a)[4], unsigned long long b, unsigned e, bool keep
) {
    wgmma_sparse_half<selector>(d, a, b, e, keep);
}
template <int selector>
__device__ __forceinline__ void multiply_async(
    BFloat, float (&d)[SLABS][4], const unsigned (&a)[4], unsigned long long b, unsigned e, bool keep
) {
    wgmma_sparse_bfloat<selector>(d, a, b, e, keep);
}

extern "C" __global__ void __launch_bounds__(THREADS + COPY_THREADS, CTAS) sparse_marlin_sm90(
    const __grid_constant__ TensorMap activations,  // [M, K] 16-bit, in boxes of TOKENS x 64
    const char* __restrict__ qweight,      // [K'/32, N'/64] of 512 bytes: 32 lanes, four words
    const char* __restrict__ meta,         // [K'/32, N'/64] of 256 bytes: two matrices, 8 rows, eight int16
    const char* __restrict__ scales,       // [G', N'] float16
    const unsigned short* __restrict__ bias,  // [N] as activations, or null
    unsigned short* __restrict__ out,      // [M, N]
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS], of a tile's CTAs; null in clusters, as counters
    int* __restrict__ counters,            // [tiles of n][tiles of m], zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int whole,                             // tiles that each CTA computes alone (stripes.cuh)
    int                                    // group_shift, which is GROUP_SHIFT here
) {
    extern __shared__ __align__(1024) uint4 shared[];
    char* const stages = reinterpret_cast<char*>(shared);
    const unsigned shared_base = shared_address(shared);
    const Ring ring{shared_base + RING_AT};
    if (threadIdx.x == 0) ring.init();
    __syncthreads();

    // For each role anew: what is computed before they part is kept in memory.
    auto blocks_of_n = [&] { return (n + 63) / 64; };
    auto tiles_of_k = [&] { return (k + 63) / 64 * 2; };
    auto make_stripes = [&] {
        return Stripes((blocks_of_n() + BLOCKS - 1) / BLOCKS, (m + TOKENS - 1) / TOKENS, (tiles_of_k() + K_TILES - 1) / K_TILES, whole);
    };

    if (threadIdx.x >= THREADS) {
        give_registers<COPY_REGISTERS>();
        const Stripes stripes = make_stripes();
        const unsigned thread = thread_index() - THREADS, warp = thread / 32, lane = thread % 32;
        if (warp == 0) {
            const unsigned n_blocks = blocks_of_n(), k_tiles = tiles_of_k();
            const unsigned groups = GROUPED ? (k_tiles + GROUP_TILES - 1) / GROUP_TILES : 1;
            fill(stripes, ring, [&](const Cursor& at, int stage) {
                const unsigned first_block = at.slice * BLOCKS, blocks = min(static_cast<unsigned>(BLOCKS), n_blocks - first_block);
                const unsigned to = shared_base + stage * STAGE_BYTES, full = ring.full(stage);
                if (lane == 0) barrier_arrive_expecting(full, blocks * (K_TILES * (512 + 256) + GROUP_ROWS * 128));
                __syncwarp();
                copy_rows<K_TILES, 512>(to + WEIGHTS_AT, qweight, at.step * K_TILES, k_tiles, n_blocks, first_block, blocks, full, lane);
                copy_rows<K_TILES, 256>(to + META_AT, meta, at.step * K_TILES, k_tiles, n_blocks, first_block, blocks, full, lane);
                const unsigned first_group = at.step * K_TILES / GROUP_TILES;
                copy_rows<GROUP_ROWS, 128>(to + SCALES_AT, scales, first_group, groups, n_blocks, first_block, blocks, full, lane);
            });
        } else if (warp == 1) {
            if (lane == 0) prefetch_map(activations);
            wait_for_previous_kernel();
            fill(stripes, ring, [&](const Cursor& at, int stage) {
                if (lane == 0) copy_activations(activations, at, shared_base + stage * STAGE_BYTES, ring.full(stage));
                __syncwarp();
            });
        } else {
            let_next_kernel_start();
        }
    } else {
        take_registers<MULTIPLY_REGISTERS>();
        const Self self;
        Sums sums;        // scaled
        Sums group_sums;  // of the group under way: sums of code times activation

        // The warp's part of one stage.
        auto multiply = [&](int stage_index, Held& before) {
            const char* stage = stages + stage_index * STAGE_BYTES;
            const unsigned first_tile = warp_uniform(self.k_warp) * WARP_TILES;
            const unsigned long long b = describe_rows(shared_base + stage_index * STAGE_BYTES + first_tile / 2 * (TOKENS * 128));
            const char* words_at = stage + WEIGHTS_AT + ((first_tile * BLOCKS + self.block) * 32 + self.lane) * 16 + self.first_word * 4;
            const unsigned matrix = self.lane / 8;  // of metadata, that this lane names for ldmatrix: a half of a tile
            const unsigned its_tile = SPLIT == 1 ? matrix / 2 : matrix % 2, its_half = SPLIT == 1 ? matrix % 2 : self.first_word / 2;
            const unsigned meta_at = shared_base + stage_index * STAGE_BYTES + META_AT +
                                     ((first_tile + its_tile) * BLOCKS + self.block) * 256 + its_half * 128 + self.lane % 8 * 16;
            unsigned words[2][4], a[2 * BATCH][WORDS][4], e[2][4];
            NUMBER::Scale lower[WORDS], upper[WORDS];
            load_words(words[0], words_at);
#pragma unroll
            for (int first = 0; first < WARP_TILES; first += BATCH) {
                const bool begins = first % GROUP_TILES == 0;
                const bool ends = (first + BATCH) % GROUP_TILES == 0 || first + BATCH == WARP_TILES;
                const char* const row_of_scales = stage + SCALES_AT + (first_tile + first) / GROUP_TILES * (COLUMNS * 2);
#pragma unroll
                for (int i = first; i < first + BATCH; ++i) {
                    if (i + 1 < WARP_TILES) load_words(words[(i + 1) % 2], words_at + (i + 1) * (BLOCKS * 512));
                    if (i % META_TILES == 0) {
                        unsigned(&places)[4] = e[i / META_TILES % 2];
                        if constexpr (SPLIT == 1) load_matrices(places, meta_at + i * (BLOCKS * 256));
                        else load_two_matrices(places, meta_at + i * (BLOCKS * 256));
                    }
                    if (GROUPED && !SCALE_SUMS && i % GROUP_TILES == 0) {
                        load_scales<NUMBER>(lower, upper, stage + SCALES_AT + (first_tile + i) / GROUP_TILES * (COLUMNS * 2), self);
                    }
#pragma unroll
                    for (int word = 0; word < WORDS; ++word) {
                        unsigned(&fragment)[4] = a[i % (2 * BATCH)][word];
                        dequantize<NUMBER>(fragment, words[i % 2][word]);
                        if (GROUPED && !SCALE_SUMS) scale_fragment<NUMBER>(fragment, lower[word], upper[word]);
                    }
                }
                wgmma_fence();
#pragma unroll
                for (int i = first; i < first + BATCH; ++i) {
                    const unsigned long long step = b + (i / 2 * (TOKENS * 128) + i % 2 * 64) / 16;
                    const bool keep = !SCALE_SUMS || !begins || i > first;
                    Sums& into = SCALE_SUMS ? group_sums : sums;
                    const unsigned(&fragments)[WORDS][4] = a[i % (2 * BATCH)];
#pragma unroll
                    for (int word = 0; word < WORDS; word += 2) {  // first_word is even: the selector is that of the word in its pair
                        const unsigned places = e[i / META_TILES % 2][SPLIT == 1 ? i % META_TILES * 2 + word / 2 : i % META_TILES];
                        multiply_async<0>(NUMBER(), into[word], fragments[word], step, places, keep);
                        multiply_async<1>(NUMBER(), into[word + 1], fragments[word + 1], step, places, keep);
                    }
                }
                wgmma_commit();
                if (SCALE_SUMS && ends) {
                    wgmma_wait<0>();
                    arrived(group_sums);
                    close_group(sums, group_sums, row_of_scales, self);
                } else {
                    wgmma_wait<1>();  // the batch before: its half of a may be filled again
                }
                if (!SCALE_SUMS && first == 0) before.release();
            }
        };

        // The end of an output tile, or of this CTA's part of one.
        const Output output{scales, bias, out, m, n, GROUPED};
        bool first = true;
        auto finish = [&](const Stripes& stripes, int unit) {
            if (!SCALE_SUMS) arrived(sums);
            if (first) wait_for_previous_kernel();  // the workspace is its until then
            first = false;
            const int tile = unit / stripes.steps;
            const Sharers ctas = stripes.sharers(tile);
            const Shared part_of{partials, counters + tile, ctas.first, ctas.last};
            int* const count = reinterpret_cast<int*>(stages + ARRIVED_AT);
            auto end = [&](OwnSums& own) {
                if (cluster_size() > 1) {
                    complete_in_cluster(own, reinterpret_cast<float4*>(stages), self, [&](const Piece& piece, int slab, const Self& owner) {
                        write_result(piece, output, stripes.at(unit), slab, owner);
                    });
                    return;
                }
                complete(own, part_of, count, self, [&](const OwnSums& total, int first_slab) {
                    write_result(total, output, stripes.at(unit), first_slab, self);
                });
            };
            if constexpr (K_WARPS == 1) {
                end(reinterpret_cast<OwnSums&>(sums));  // the same type, and in place: 128 of them leave no room for a copy
            } else {
                Sums parts;
                sort_for_exchange(parts, sums);
                OwnSums own;
                reduce_in_cta(own, parts, reinterpret_cast<float4*>(stages + SCRATCH_AT), self);
                end(own);
            }
            zero(sums);
        };

        zero(sums);
        zero(group_sums);
        drain(make_stripes, ring, self, multiply, finish);
    }
}
