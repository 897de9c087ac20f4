// Hopper: the CTAs that share an output tile as a thread block cluster, which adds up its parts through distributed shared memory.
//
// Without a cluster the parts of a tile go to L2, and the CTA that comes last reads all of them and writes the tile, while the others have
// left (tile.cuh). Here every CTA keeps its part in shared memory, over the stages that it has read, and each takes as much of the tile:
//
//   CTA of the cluster   0              1              2              3
//   k of its part        first quarter  second         third          last
//   shared memory        float4 [OWN][SLABS][THREADS], the part        .. of all warps of the CTA
//                        ──────────────── all parts are there ────────────────
//   adds and writes      0 4 8 12 ..    1 5 9 13 ..    2 6 10 ..      3 7 11 ..       pieces
//                        ──────────────── all parts are read ─────────────────
//
// A PIECE is one slab of the sums that one warp holds: as many as warps and slabs, dealt out to the CTAs in turns, so that a tile of eight
// tokens is shared as well. A warp adds a piece up in the order of k, whoever's it was, and writes it as its owner would: the same
// bits as through L2.
//
// The host starts clusters only with a grid in which each CTA has one part, and all of them are as long (kernels/configurations.py): the
// end of the part is the end of its work, so nothing more is copied into stages, and the CTAs of a tile are those of a cluster, in
// the order of k. Copying warps do not meet anybody: they end, and barrier.cluster waits for those alone that have not.
#pragma once
#include "tile.cuh"
#include "ptx_sm90.cuh"

constexpr int WARPS = THREADS / 32, PIECES = WARPS * SLABS;
constexpr int PART_BYTES = OWN * SLABS * THREADS * 16;
using Piece = float[OWN][1][4];

// complete (tile.cuh), in a cluster. `part` is where the stages were; write(sums, slab, owner) writes a piece.
template <class Write>
__device__ __forceinline__ void complete_in_cluster(const OwnSums& own, float4* part, const Self& self, Write write) {
    if constexpr (K_WARPS == 1) meet<THREADS>();  // nobody reads a stage any more; where warps share k, they have met to add up
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab) {
            const float(&s)[4] = own[i][slab];
            part[(i * SLABS + slab) * THREADS + self.thread] = make_float4(s[0], s[1], s[2], s[3]);
        }
    meet_in_cluster();
    const unsigned ctas = cluster_size();
    for (unsigned piece = self.warp * ctas + cluster_rank(); piece < PIECES; piece += WARPS * ctas) {
        const Self owner(piece % WARPS * 32 + self.lane);
        const unsigned slab = piece / WARPS, from = shared_address(part) + (slab * THREADS + owner.thread) * 16;
        Piece sums = {};
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
    meet_in_cluster();  // a CTA's memory is there as long as somebody reads it
}
