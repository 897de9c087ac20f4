// What the GEMMs for Hopper have in common: stages, who fills them, and the end of a tile. marlin_sm90.cu explains it. The rest is a policy,
// Products (products_sm90.cuh for 16-bit activations, marlin_a8_sm90.cu):
//
//   S                     what a stage holds and where
//   TILE_K, META_BYTES    k of a row of words, and bytes of metadata for one of 64 columns
//   GroupSums, begin      of the current group, and how they are before the first one
//   end(...)              puts what is left of them into the sums of the tile, and they are as before the first one
//   announced(...)        bytes that the second copying warp brings for a unit, and
//   copy_beside(...)      those of them that are not activations
//   multiply(...)         the warp's part of one stage
//
// Output says where results go; write_result and sort_for_exchange are its functions (write_marlin.cuh, write_sparse_marlin.cuh).
#pragma once
#include "cluster_sm90.cuh"
#include "pipeline_sm90.cuh"

template <class Products, class Output>
__device__ __forceinline__ void gemm_sm90(
    const TensorMap& activations, const TensorMap& qweight, const char* meta, const char* beside, const char* scales, const Output& output,
    float4* partials, int* counters, unsigned m, unsigned n, unsigned k, int whole
) {
    using S = typename Products::S;
    constexpr int K_TILES = S::K_TILES, GROUP_TILES = S::GROUP_TILES, GROUP_ROWS = S::GROUP_ROWS;
    extern __shared__ __align__(1024) uint4 shared[];
    char* const stages = reinterpret_cast<char*>(shared);
    const unsigned shared_base = shared_address(shared);
    const Ring ring{shared_base + S::RING_AT};
    if (threadIdx.x == 0) ring.init();
    if (PAIRED) sync_cluster();  // the other one arrives at these barriers, and copies
    else __syncthreads();

    // Computed by each role for itself: values computed before the roles branch would be spilled.
    auto blocks_of_n = [&] { return (n + 63) / 64; };
    auto tiles_of_k = [&] { return (k + 63) / 64 * (64 / Products::TILE_K); };
    auto make_stripes = [&] {
        return Stripes((blocks_of_n() + BLOCKS - 1) / BLOCKS, (m + TOKENS - 1) / TOKENS, (tiles_of_k() + K_TILES - 1) / K_TILES, whole);
    };

    if (threadIdx.x >= THREADS) {
        give_registers<COPY_REGISTERS>();
        const Stripes stripes = make_stripes();
        const unsigned thread = thread_index() - THREADS, warp = thread / 32, lane = thread % 32;
        if (warp == 0) {
            if (lane == 0) prefetch_map(qweight);
            const unsigned n_blocks = blocks_of_n(), k_tiles = tiles_of_k();
            const unsigned groups = GROUPED ? (k_tiles + GROUP_TILES - 1) / GROUP_TILES : 1;
            produce(stripes, ring, [&](const Cursor& at, int stage) {
                const unsigned first_block = at.slice * BLOCKS, blocks = blocks_inside(first_block, n_blocks);
                const unsigned to = shared_base + stage * S::BYTES, full = ring.full(stage);
                if (lane == 0) {
                    barrier_arrive_expecting(full, BLOCKS * K_TILES * 512 + blocks * (K_TILES * Products::META_BYTES + GROUP_ROWS * 128));
                    copy_blocks(to + S::WEIGHTS_AT, qweight, first_block, at.step * K_TILES, full);
                }
                __syncwarp();
                if constexpr (Products::META_BYTES > 0) {
                    copy_rows<K_TILES, Products::META_BYTES>(
                        to + S::META_AT, meta, at.step * K_TILES, k_tiles, n_blocks, first_block, blocks, full, lane
                    );
                }
                const unsigned first_group = at.step * K_TILES / GROUP_TILES;
                copy_rows<GROUP_ROWS, 128>(to + S::SCALES_AT, scales, first_group, groups, n_blocks, first_block, blocks, full, lane);
            });
        } else if (warp == 1) {
            if (lane == 0) prefetch_map(activations);
            wait_for_previous_kernel();
            produce(stripes, ring, [&](const Cursor& at, int stage) {
                if (lane == 0) {
                    const unsigned to = shared_base + stage * S::BYTES, full = ring.full(stage);
                    barrier_arrive_expecting(full, Products::announced(at, m));
                    copy_activations(activations, at, to, full);
                    Products::copy_beside(beside, at, m, k, to, full);
                }
                __syncwarp();
            });
        } else {
            let_next_kernel_start();
        }
    } else {
        take_registers<MULTIPLY_REGISTERS>();
        const ThreadRole role;
        Sums sums;        // scaled
        typename Products::GroupSums group_sums;
        auto multiply = [&](int stage_index, UnreleasedStage& before) {
            Products::multiply(sums, group_sums, stages, shared_base, stage_index, before, role);
        };

        // The end of an output tile, or of this CTA's part of one.
        bool first = true;
        auto finish = [&](const Stripes& stripes, int unit) {
            Products::end(sums, group_sums);
            if (first) wait_for_previous_kernel();  // which may still use the workspace
            first = false;
            const int tile = unit / stripes.steps;
            const Sharers ctas = stripes.sharers(tile);
            const SharedTile shared_tile{partials, counters + tile * PAIR + rank_in_pair(), ctas.first, ctas.last};
            int* const count = reinterpret_cast<int*>(stages + S::ARRIVED_AT);
            auto end = [&](OwnSums& own) {
                if constexpr (!PAIRED) {
                    if (cluster_size() > 1) {
                        auto write = [&](const SubtileFragment& subtile, int slab, const ThreadRole& owner) {
                            write_result(subtile, output, stripes.at(unit), slab, owner);
                        };
                        complete_in_cluster(own, reinterpret_cast<float4*>(stages), role, write);
                        return;
                    }
                }
                complete(own, shared_tile, count, role, [&](const OwnSums& total, int first_slab) {
                    write_result(total, output, stripes.at(unit), first_slab, role);
                });
            };
            if constexpr (K_WARPS == 1) {
                end(reinterpret_cast<OwnSums&>(sums));  // the same type; in place, because a copy of 128 sums would spill
            } else {
                Sums parts;
                sort_for_exchange(parts, sums);
                OwnSums own;
                reduce_in_cta(own, parts, reinterpret_cast<float4*>(stages + S::SCRATCH_AT), role);
                end(own);
            }
            zero(sums);
        };

        zero(sums);
        Products::begin(group_sums);
        consume(make_stripes, ring, role, multiply, finish);
        if (PAIRED) sync_cluster();  // the other one's warps may still arrive at this CTA's barriers
    }
}
