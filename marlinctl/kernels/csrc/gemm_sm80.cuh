// What the GEMMs for Ampere and later have in common: the stages of a CTA, the copies into them, and the end of an output tile.
// marlin_sm80.cu, sparse_marlin_sm80.cu and those for int8 activations (a8_sm80.cuh) each give the rest as a policy, Weights:
//
//   TILE_K                    k of a row of words
//   META_BYTES                of metadata, for a row of words of 64 columns; 0: none
//   GROUPS_END_IN_STAGES      whether no group reaches over the end of a stage
//   GroupSums, begin          of the current group, and how they are before the first one
//   multiply(...)             a warp's part of a stage; it calls close(stage, first_tile, k_tile) where tile k_tile ends a group
//   close(...)                adds the sums of a group to those of the tile
//   end(...)                  puts what is left of them into the sums of the tile, and they are as before the first one
//   BESIDE_BYTES, Beside      of what is copied into a stage together with activations
//
// shared_base and the like are passed by reference: by value, some configurations take one to three registers more (NVRTC 13.0).
//
// Output says where results go; write_result and sort_for_exchange are its functions (write_marlin.cuh, write_sparse_marlin.cuh).
#pragma once
#include "tile.cuh"

// A stage holds K_STEP of k:
//
//   weights      [K_STEP/TILE_K][BLOCKS][32 lanes]  16 bytes each, as in memory: every lane reads back the 16 bytes of its own
//   metadata     [K_STEP/TILE_K][BLOCKS][2][8]      16 bytes each, as in memory: the 8 rows of a matrix lie in different banks
//   activations  [TOKENS][CHUNKS]                   16 bytes each, swizzled (tile.cuh)
//   scales       [K_STEP/32][64 BLOCKS]             float16, the rows of the groups that the stage touches
//   beside       BESIDE_BYTES
template <class Weights>
struct Stage {
    static constexpr int K_TILES = K_STEP / Weights::TILE_K;  // rows of words
    static constexpr int WARP_TILES = K_TILES / K_WARPS;      // and of them those of one warp
    static constexpr int WEIGHT_BYTES = K_TILES * BLOCKS * 512, META_BYTES = K_TILES * BLOCKS * Weights::META_BYTES;
    static constexpr int META_AT = WEIGHT_BYTES, ACTIVATIONS_AT = META_AT + META_BYTES, SCALES_AT = ACTIVATIONS_AT + ACTIVATION_BYTES;
    static constexpr int BESIDE_AT = SCALES_AT + SCALE_BYTES, BYTES = BESIDE_AT + Weights::BESIDE_BYTES;

    static_assert(STAGES * BYTES + SCRATCH_BYTES + 16 == SHARED_BYTES, "the host allots other shared memory than the kernel uses");
    static_assert(THREADS % (BLOCKS * 32) == 0 && META_BYTES % (THREADS * 16) == 0,
                  "a thread copies one column of weights, one column of metadata, and as many rows as every other thread");
};

// The groups of k that share their scales, in tiles of TILE_K.
struct Groups {
    bool grouped;  // or one scale for all of k
    int shift;     // log2 of the tiles in a group
    int mask;      // of a tile's number in its group; -1: no tile ends a group
};

// What kernels for 16-bit activations have in common: sums of groups are float32, and nothing is copied beside activations.
struct SixteenBit {
    using GroupSums = Sums;
    static constexpr int BESIDE_BYTES = 0;

    struct Beside {
        __device__ __forceinline__ Beside(const ThreadRole&, const char*, unsigned, unsigned, unsigned) {}
        __device__ __forceinline__ void operator()(const Cursor&, unsigned) const {}
        template <int>
        __device__ __forceinline__ void first_stages(const Stripes&) const {}
    };

    static __device__ __forceinline__ void begin(GroupSums& group_sums) { zero(group_sums); }
    static __device__ __forceinline__ void close(
        Sums& sums, GroupSums& group_sums, const char* scales, int first_tile, int k_tile, const Groups& groups, const ThreadRole& role
    ) {
        const unsigned row = (k_tile >> groups.shift) - (first_tile >> groups.shift);
        close_group(sums, group_sums, scales + row * COLUMNS * 2, role);
    }
    static __device__ __forceinline__ void end(Sums& sums, GroupSums& group_sums, bool grouped) { close_channels(sums, group_sums, grouped); }
};

template <class Weights, class Output>
__device__ __forceinline__ void gemm_sm80(
    const char* activations, const uint4* qweight, const uint4* meta, const char* beside, const char* scales, const Output& output,
    float4* partials, int* counters, unsigned m, unsigned n, unsigned k, int whole, int group_shift
) {
    using S = Stage<Weights>;
    constexpr int K_TILES = S::K_TILES;
    extern __shared__ uint4 shared[];
    const unsigned shared_base = shared_address(shared);
    float4* const scratch = reinterpret_cast<float4*>(reinterpret_cast<char*>(shared) + STAGES * S::BYTES);
    int* const arrived = reinterpret_cast<int*>(reinterpret_cast<char*>(shared) + STAGES * S::BYTES + SCRATCH_BYTES);

    const ThreadRole role;

    const unsigned n_blocks = (n + 63) / 64, k_tiles = (k + 63) / 64 * (64 / Weights::TILE_K);
    const bool grouped = group_shift >= 0;
    const int tile_shift = group_shift - (Weights::TILE_K == 32 ? 1 : 0);
    const Groups groups_of_k{grouped, tile_shift, grouped ? (1 << tile_shift) - 1 : -1};
    const unsigned groups = grouped ? (k_tiles + groups_of_k.mask) >> groups_of_k.shift : 1;

    const Stripes stripes((n_blocks + BLOCKS - 1) / BLOCKS, (m + TOKENS - 1) / TOKENS, (k_tiles + K_TILES - 1) / K_TILES, whole);

    // What this thread copies of a stage's weights and metadata: every COPY_TILES-th or META_ROWS-th row from its own on.
    constexpr int COPY_TILES = THREADS / (BLOCKS * 32), META_ROWS = THREADS / (BLOCKS * 16);
    const unsigned copy_tile = role.thread / (BLOCKS * 32), copy_column = role.thread % (BLOCKS * 32);
    const unsigned meta_tile = role.thread / (BLOCKS * 16), meta_column = role.thread % (BLOCKS * 16);
    const unsigned weights_to = shared_base + role.thread * 16, meta_to = weights_to + S::META_AT;
    const size_t tile_row = static_cast<size_t>(n_blocks) * 32, meta_row = static_cast<size_t>(n_blocks) * 16;  // uint4 in a row
    const unsigned row_k = EIGHT_BIT ? (k + 63) / 64 * 64 : k;  // of activations in memory
    const ActivationCopies copy_activations(role, activations, m, row_k, shared_base + S::ACTIVATIONS_AT);
    const typename Weights::Beside copy_beside(role, beside, m, k, shared_base + S::BESIDE_AT);
    const ScaleCopies copy_scales(role, scales, groups, n_blocks * 64, shared_base + S::SCALES_AT);

    // Starts the copies of a unit's weights, metadata and scales into a stage. Out of bounds, weights and scales become zeros, which add
    // nothing. Zeros are invalid as metadata (both kept weights in one place), so there the first row of the matrix is copied.
    auto fetch_weights = [&](const Cursor& at, int stage) {
        const unsigned offset = stage * S::BYTES, first_tile = at.step * K_TILES;
        const unsigned tile = first_tile + copy_tile, column = at.slice * (BLOCKS * 32) + copy_column;
        const uint4* weights = qweight + (tile * tile_row + column);
        const bool column_inside = column < n_blocks * 32;
#pragma unroll
        for (int i = 0; i < K_TILES / COPY_TILES; ++i) {
            const bool inside = column_inside && tile + i * COPY_TILES < k_tiles;
            copy_async(weights_to + offset + i * (THREADS * 16), weights + i * COPY_TILES * tile_row, inside);
        }
        if constexpr (Weights::META_BYTES > 0) {
            const unsigned places_tile = first_tile + meta_tile, places_column = at.slice * (BLOCKS * 16) + meta_column;
            const uint4* places = meta + (places_tile * meta_row + places_column);
            const bool places_inside = places_column < n_blocks * 16;
#pragma unroll
            for (int i = 0; i < K_TILES / META_ROWS; ++i) {
                const bool inside = places_inside && places_tile + i * META_ROWS < k_tiles;
                copy_async(meta_to + offset + i * (THREADS * 16), inside ? places + i * META_ROWS * meta_row : meta, true);
            }
        }
        if (grouped) copy_scales(at, offset, first_tile >> groups_of_k.shift, (first_tile + K_TILES - 1) >> groups_of_k.shift);
    };

    auto fetch_activations = [&](const Cursor& at, int stage) {
        copy_activations(at, stage * S::BYTES);
        copy_beside(at, stage * S::BYTES);
    };
    auto first_activations = [&] {
        copy_activations.template first_stages<S::BYTES>(stripes);
        copy_beside.template first_stages<S::BYTES>(stripes);
    };

    Sums sums;                               // scaled
    typename Weights::GroupSums group_sums;  // of the current group: sums of code times activation

    auto close = [&](const char* stage, int first_tile, int k_tile) {
        Weights::close(sums, group_sums, stage + S::SCALES_AT, first_tile, k_tile, groups_of_k, role);
    };

    auto multiply = [&](int stage_index, int step) {
        Weights::multiply(group_sums, reinterpret_cast<const char*>(shared), shared_base, stage_index, step, role, groups_of_k, close);
    };

    // The end of an output tile, or of this CTA's part of one.
    auto finish = [&](int unit, int stage, int step) {
        const int last_tile = step * K_TILES + K_TILES - 1;
        if (!Weights::GROUPS_END_IN_STAGES && grouped && K_WARPS == 1 && ((last_tile + 1) & groups_of_k.mask) != 0) {  // inside of a group
            close(reinterpret_cast<const char*>(shared) + stage * S::BYTES, step * K_TILES, last_tile);
        }
        Weights::end(sums, group_sums, grouped);
        Sums parts;
        sort_for_exchange(parts, sums);
        OwnSums own;
        reduce_in_cta(own, parts, scratch, role);
        const int tile = unit / stripes.steps;
        const Sharers ctas = stripes.sharers(tile);
        const SharedTile shared_tile{partials, counters + tile, ctas.first, ctas.last};
        complete(own, shared_tile, arrived, role, [&](const OwnSums& total, int first_slab) {
            write_result(total, output, stripes.at(unit), first_slab, role);
        });
        zero(sums);
    };

    zero(sums);
    Weights::begin(group_sums);
    run_stages(stripes, fetch_weights, fetch_activations, first_activations, multiply, finish);
}
