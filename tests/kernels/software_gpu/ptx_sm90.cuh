// The instructions of csrc/ptx_sm90.cuh as functions of the software GPU (gpu.cpp), in place of that file.
#pragma once
#include "ptx.cuh"

inline void barrier_init(unsigned barrier, unsigned arrivals) { gpu::barrier_init(barrier, arrivals); }
inline void barrier_init_done() {}
inline void barrier_arrive(unsigned barrier) { gpu::barrier_arrive(barrier, 0); }
inline void barrier_arrive_at(unsigned rank, unsigned barrier) { gpu::barrier_arrive_at(rank, barrier); }
inline void barrier_arrive_expecting(unsigned barrier, unsigned bytes) { gpu::barrier_arrive(barrier, bytes); }
inline void barrier_wait(unsigned barrier, unsigned parity) { gpu::barrier_wait(barrier, parity); }
inline void copy_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier) { gpu::copy_bulk(to, from, bytes, barrier); }
inline void copy_box(unsigned to, const TensorMap& map, unsigned x, unsigned y, unsigned barrier) {
    gpu::copy_box(to, map, x, y, barrier, TOKENS, gpu::cluster_rank());
}
inline void copy_box_to_pair(unsigned to, const TensorMap& map, unsigned x, unsigned y, unsigned barrier) {
    for (unsigned rank = 0; rank < 2; ++rank) gpu::copy_box(to, map, x, y, barrier, TOKENS / 2, rank);
}
inline void copy_blocks(unsigned to, const TensorMap& map, unsigned block, unsigned row, unsigned barrier) {
    gpu::copy_blocks(to, map, block, row, barrier, BLOCKS, K_STEP / (SPARSE ? 32 : 16));
}
inline void prefetch_map(const TensorMap&) {}
inline unsigned cluster_size() { return gpu::cluster_size(); }
inline unsigned cluster_rank() { return gpu::cluster_rank(); }
inline void sync_cluster() { gpu::sync_cluster(); }
inline float4 load_of_cta(unsigned rank, unsigned from) { return gpu::load_of_cta(rank, from); }
inline unsigned warp_uniform(unsigned number) { return gpu::exchange(number)[0]; }
template <int> inline void give_registers() {}
template <int> inline void take_registers() {}

template <int threads> inline void named_barrier_sync(unsigned number) { gpu::sync_named(number, threads); }
template <int threads> inline void named_barrier_arrive(unsigned number) { gpu::arrive_named(number, threads); }

inline void wgmma_fence() {}
inline void wgmma_commit() { gpu::wgmma_commit(); }
template <int pending> inline void wgmma_wait() { gpu::wgmma_wait(pending); }
template <int slabs> inline void wgmma_arrived(float (&)[slabs][4]) {}
template <int slabs> inline void wgmma_arrived(int (&)[slabs][4]) {}
inline unsigned long long describe_rows(unsigned shared) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | (shared & 0x3ffff) / 16; }

using Accumulators = float (&)[TOKENS / 8][4];
using Operand = const unsigned (&)[4];
inline void wgmma_half(Accumulators d, Operand a, unsigned long long b, bool keep) {
    gpu::wgmma({d, a, b, TOKENS, keep, false, false, 0, 0});
}
inline void wgmma_bfloat(Accumulators d, Operand a, unsigned long long b, bool keep) {
    gpu::wgmma({d, a, b, TOKENS, keep, true, false, 0, 0});
}
template <int selector>
inline void wgmma_sparse_half(Accumulators d, Operand a, unsigned long long b, unsigned e, bool keep) {
    gpu::wgmma({d, a, b, TOKENS, keep, false, true, e, selector});
}
template <int selector>
inline void wgmma_sparse_bfloat(Accumulators d, Operand a, unsigned long long b, unsigned e, bool keep) {
    gpu::wgmma({d, a, b, TOKENS, keep, true, true, e, selector});
}
template <int slabs> inline void wgmma_int8(int (&d)[slabs][4], Operand a, unsigned long long b, bool keep) {
    gpu::wgmma({nullptr, a, b, slabs * 8, keep, false, false, 0, 0, d});
}
template <int slabs> inline void wgmma_sparse_int8(int (&d)[slabs][4], Operand a, unsigned long long b, unsigned e, bool keep) {
    gpu::wgmma({nullptr, a, b, slabs * 8, keep, false, true, e, 0, d});
}
