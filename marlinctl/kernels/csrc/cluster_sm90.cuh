// Hopper: the CTAs that share an output tile form a thread block cluster, and reduce its partial sums through distributed shared memory.
//
// Without a cluster the partial sums of a tile go to L2, and the last CTA to finish reads all of them and writes the tile (tile.cuh). Here
// every CTA keeps its partial sums in shared memory, where its stages were, and each CTA reduces and writes an equal share of the tile:
//
//   CTA of the cluster   0              1              2              3
//   k of its part        first quarter  second         third          last
//   shared memory        float4 [OWN][SLABS][THREADS], the sums        .. of all warps of the CTA
//                        ─────────────── barrier: all sums are stored ───────────────
//   reduces and writes   0 4 8 12 ..    1 5 9 13 ..    2 6 10 ..      3 7 11 ..       subtiles
//                        ─────────────── barrier: all sums have been read ───────────
//
// A SUBTILE is one slab of the sums of one warp. There are WARPS x SLABS of them, distributed round-robin over the CTAs, so that even a
// tile of eight tokens is shared. The warp that reduces a subtile adds the CTAs' sums in the order of k and writes the result as the warp
// that computed it would: the bits are those of the reduction through L2.
//
// The host starts clusters only with a grid in which each CTA computes one part of one tile, and all parts have the same length
// (kernels/configurations.py). So no stage is filled any more when the sums are stored, and the CTAs of a tile are those of a cluster, in
// the order of k. Copying warps do not take part: they have exited, and barrier.cluster waits only for threads that have not.
#pragma once
#include "tile.cuh"
#include "ptx_sm90.cuh"

constexpr int WARPS = THREADS / 32, SUBTILES = WARPS * SLABS;
constexpr int PART_BYTES = OWN * SLABS * THREADS * 16;
using SubtileFragment = float[OWN][1][4];

// complete (tile.cuh), in a cluster. `part` is where the stages were; write(sums, slab, owner) writes a subtile that thread `owner` computed.
template <class Write>
__device__ __forceinline__ void complete_in_cluster(const OwnSums& own, float4* part, const ThreadRole& role, Write write) {
    if constexpr (K_WARPS == 1) sync_threads<THREADS>();  // all warps have read their last stage (else by reduce_in_cta)
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab) {
            const float(&s)[4] = own[i][slab];
            part[(i * SLABS + slab) * THREADS + role.thread] = make_float4(s[0], s[1], s[2], s[3]);
        }
    sync_cluster();
    const unsigned ctas = cluster_size();
    for (unsigned subtile = role.warp * ctas + cluster_rank(); subtile < SUBTILES; subtile += WARPS * ctas) {
        const ThreadRole owner(subtile % WARPS * 32 + role.lane);
        const unsigned slab = subtile / WARPS, from = shared_address(part) + (slab * THREADS + owner.thread) * 16;
        SubtileFragment sums = {};
#pragma unroll(4)
        for (unsigned cta = 0; cta < ctas; ++cta)
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const float4 theirs = load_of_cta(cta, from + i * (SLABS * THREADS * 16));
                float(&s)[4] = sums[i][0];
                s[0] += theirs.x, s[1] += theirs.y, s[2] += theirs.z, s[3] += theirs.w;
            }
        write(sums, slab, owner);
    }
    sync_cluster();  // a CTA's shared memory must exist until the others have read it
}
