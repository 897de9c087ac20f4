// The instructions that Hopper added, one function each, under the names of the PTX ISA; all of them need sm_90a or sm_90. As ptx.cuh,
// this file has a twin in tests/kernels/software_gpu.
#pragma once
#include "ptx.cuh"

// mbarrier: a phase ends when `arrivals` threads have arrived and all announced bytes have been copied; then the next begins.
__device__ __forceinline__ void barrier_init(unsigned barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After barrier_init and before the threads synchronize: makes the barriers visible to bulk copies too.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At the barrier of that place in CTA `rank` of the cluster. Of the scope of a CTA, because what the warp read need not be ordered for the
// other CTA: with .cluster the compiler puts a MEMBAR.GPU before it, and 1024 tokens took 3,102 us instead of 2,326.
__device__ __forceinline__ void barrier_arrive_at(unsigned rank, unsigned barrier) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

// Arrives, and announces bytes that bulk copies will bring.
__device__ __forceinline__ void barrier_arrive_expecting(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended. A new barrier is in phase 0, and the phase before it counts as ended.
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
    unsigned done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// cp.async.bulk: contiguous bytes, a multiple of 16 from and to multiples of 16, by the copy engine; they count at the barrier.
__device__ __forceinline__ void copy_bulk(unsigned shared, const void* global, unsigned bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared), "l"(global),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// A matrix in global memory as the copy engine knows it (CUtensorMap): the host makes it, for one address and one box (kernels/tensor_maps.py).
struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};

// cp.async.bulk.tensor: the box of a matrix that begins at column x, row y, in the swizzle of its map. Outside of the matrix are zeros; all
// bytes of the box count at the barrier.
__device__ __forceinline__ void copy_box(unsigned shared, const TensorMap& map, unsigned x, unsigned y, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
                 "l"(&map), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}
// The box of a matrix of blocks of 512 bytes that begins at this block and row, as it lies in memory.
__device__ __forceinline__ void copy_blocks(unsigned shared, const TensorMap& map, unsigned block, unsigned row, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared),
                 "l"(&map), "r"(0), "r"(block), "r"(row), "r"(barrier)
                 : "memory");
}
// copy_box to CTAs 0 and 1 of the cluster, at the same place in both, and it counts at the barrier of that place in each.
__device__ __forceinline__ void copy_box_to_pair(unsigned shared, const TensorMap& map, unsigned x, unsigned y, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(static_cast<unsigned short>(3))
        : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Between ordinary accesses of shared memory and those of wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A number that is the same in every lane of the warp. This lets the compiler use uniform registers for what depends on it.
__device__ __forceinline__ unsigned warp_uniform(unsigned number) { return __shfl_sync(0xffffffff, number, 0); }

// A thread block cluster: how many CTAs it has, 1 where the host asked for none, and which of them this is. They are neighbours in the grid.
__device__ __forceinline__ unsigned cluster_size() {
    unsigned out;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(out));
    return out;
}
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned out;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(out));
    return out;
}

// barrier.cluster, for all threads of all CTAs of the cluster except those that have exited. Writes before it are visible to all after it.
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// 16 bytes of the shared memory of CTA `rank` of the cluster, at the address that they have there (mapa: distributed shared memory).
__device__ __forceinline__ float4 load_of_cta(unsigned rank, unsigned shared) {
    float4 out;
    asm volatile(
        "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
        : "=f"(out.x), "=f"(out.y), "=f"(out.z), "=f"(out.w)
        : "r"(shared), "r"(rank)
        : "memory");
    return out;
}

// setmaxnreg, by every warp of a warpgroup.
template <int registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// bar.sync and bar.arrive on barrier `number` of the CTA, 2 .. 15, which `threads` threads complete.
template <int threads>
__device__ __forceinline__ void named_barrier_sync(unsigned number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(threads) : "memory");
}
template <int threads>
__device__ __forceinline__ void named_barrier_arrive(unsigned number) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(threads) : "memory");
}

// Between other accesses of the registers of a wgmma, accumulators and operand A, and the wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `pending` of this warp's groups are pending.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// After a wait: what is read of these accumulators below is read below (the compiler knows nothing of the wait).
template <int slabs>
__device__ __forceinline__ void wgmma_arrived(float (&d)[slabs][4]) {
#pragma unroll
    for (int slab = 0; slab < slabs; ++slab)
        asm volatile("" : "+f"(d[slab][0]), "+f"(d[slab][1]), "+f"(d[slab][2]), "+f"(d[slab][3])::"memory");
}

template <int slabs>
__device__ __forceinline__ void wgmma_arrived(int (&d)[slabs][4]) {
#pragma unroll
    for (int slab = 0; slab < slabs; ++slab)
        asm volatile("" : "+r"(d[slab][0]), "+r"(d[slab][1]), "+r"(d[slab][2]), "+r"(d[slab][3])::"memory");
}

// What operand B is: rows of 64 16-bit or 128 8-bit numbers of k, 128 bytes, one for each column of D. Eight rows lie together, 1024 bytes at a
// multiple of 1024; of row r the 16 bytes c lie in place c ^ (r % 8). `shared` is the first row's first k of the product: inside of the
// 128 bytes k advances by plain addition, because the exchange works on address bits. (PTX ISA, "Matrix Descriptor Format": start and
// stride in units of 16 bytes, swizzle mode 1 = 128 bytes.)
__device__ __forceinline__ unsigned long long describe_rows(unsigned shared) {
    constexpr unsigned long long EIGHT_ROWS = 1024 / 16, SWIZZLE_128 = 1;
    return SWIZZLE_128 << 62 | EIGHT_ROWS << 32 | 1ull << 16 | (shared & 0x3ffff) / 16;
}

// wgmma.mma_async.m64nNk16 and .sp.m64nNk32 with N = TOKENS / TOKEN_PARTS: d = a * b, or d += a * b where `keep` is true, in float32. Each of the four
// warps of a warpgroup has 16 rows of A in registers, laid out as for mma.m16n8k16 (or mma.sp.m16n8k32), and of D the same 16 rows:
// slab s is columns 8s .. 8s + 7, laid out as there. They run asynchronously: registers must stay as they are until a wait.
//
// An asm statement numbers its operands: TOKENS / 2 accumulators, four registers of A, and what follows them.
#ifndef TOKEN_PARTS
#define TOKEN_PARTS 1
#endif
#define MARLIN_TOKENS (TOKENS / TOKEN_PARTS)
#if EIGHT_BIT
#define MARLIN_SUM "+r"
#else
#define MARLIN_SUM "+f"
#endif
#define MARLIN_SLAB(i) MARLIN_SUM(d[i][0]), MARLIN_SUM(d[i][1]), MARLIN_SUM(d[i][2]), MARLIN_SUM(d[i][3])
#define MARLIN_0_3 "%0, %1, %2, %3"
#define MARLIN_0_7 MARLIN_0_3 ", %4, %5, %6, %7"
#define MARLIN_0_15 MARLIN_0_7 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MARLIN_0_23 MARLIN_0_15 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MARLIN_0_31 MARLIN_0_23 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MARLIN_0_47 \
    MARLIN_0_31 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MARLIN_0_63 \
    MARLIN_0_47 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MARLIN_0_127 \
    MARLIN_0_63 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MARLIN_SLABS_2 MARLIN_SLAB(0), MARLIN_SLAB(1)
#define MARLIN_SLABS_4 MARLIN_SLABS_2, MARLIN_SLAB(2), MARLIN_SLAB(3)
#define MARLIN_SLABS_6 MARLIN_SLABS_4, MARLIN_SLAB(4), MARLIN_SLAB(5)
#define MARLIN_SLABS_8 MARLIN_SLABS_6, MARLIN_SLAB(6), MARLIN_SLAB(7)
#define MARLIN_SLABS_12 MARLIN_SLABS_8, MARLIN_SLAB(8), MARLIN_SLAB(9), MARLIN_SLAB(10), MARLIN_SLAB(11)
#define MARLIN_SLABS_16 MARLIN_SLABS_12, MARLIN_SLAB(12), MARLIN_SLAB(13), MARLIN_SLAB(14), MARLIN_SLAB(15)
#define MARLIN_SLABS_32                                                                                             \
    MARLIN_SLABS_16, MARLIN_SLAB(16), MARLIN_SLAB(17), MARLIN_SLAB(18), MARLIN_SLAB(19), MARLIN_SLAB(20), MARLIN_SLAB(21), \
        MARLIN_SLAB(22), MARLIN_SLAB(23), MARLIN_SLAB(24), MARLIN_SLAB(25), MARLIN_SLAB(26), MARLIN_SLAB(27), MARLIN_SLAB(28), \
        MARLIN_SLAB(29), MARLIN_SLAB(30), MARLIN_SLAB(31)

#if MARLIN_TOKENS == 8
#define MARLIN_N "8"
#define MARLIN_D MARLIN_0_3
#define MARLIN_SUMS MARLIN_SLAB(0)
#define MARLIN_A "%4, %5, %6, %7"
#define MARLIN_B "%8"
#define MARLIN_KEEP "%9"
#define MARLIN_PLACES "%10, %11"  // metadata and selector
#elif MARLIN_TOKENS == 16
#define MARLIN_N "16"
#define MARLIN_D MARLIN_0_7
#define MARLIN_SUMS MARLIN_SLABS_2
#define MARLIN_A "%8, %9, %10, %11"
#define MARLIN_B "%12"
#define MARLIN_KEEP "%13"
#define MARLIN_PLACES "%14, %15"  // metadata and selector
#elif MARLIN_TOKENS == 32
#define MARLIN_N "32"
#define MARLIN_D MARLIN_0_15
#define MARLIN_SUMS MARLIN_SLABS_4
#define MARLIN_A "%16, %17, %18, %19"
#define MARLIN_B "%20"
#define MARLIN_KEEP "%21"
#define MARLIN_PLACES "%22, %23"  // metadata and selector
#elif MARLIN_TOKENS == 48
#define MARLIN_N "48"
#define MARLIN_D MARLIN_0_23
#define MARLIN_SUMS MARLIN_SLABS_6
#define MARLIN_A "%24, %25, %26, %27"
#define MARLIN_B "%28"
#define MARLIN_KEEP "%29"
#define MARLIN_PLACES "%30, %31"  // metadata and selector
#elif MARLIN_TOKENS == 64
#define MARLIN_N "64"
#define MARLIN_D MARLIN_0_31
#define MARLIN_SUMS MARLIN_SLABS_8
#define MARLIN_A "%32, %33, %34, %35"
#define MARLIN_B "%36"
#define MARLIN_KEEP "%37"
#define MARLIN_PLACES "%38, %39"  // metadata and selector
#elif MARLIN_TOKENS == 96
#define MARLIN_N "96"
#define MARLIN_D MARLIN_0_47
#define MARLIN_SUMS MARLIN_SLABS_12
#define MARLIN_A "%48, %49, %50, %51"
#define MARLIN_B "%52"
#define MARLIN_KEEP "%53"
#define MARLIN_PLACES "%54, %55"  // metadata and selector
#elif MARLIN_TOKENS == 128
#define MARLIN_N "128"
#define MARLIN_D MARLIN_0_63
#define MARLIN_SUMS MARLIN_SLABS_16
#define MARLIN_A "%64, %65, %66, %67"
#define MARLIN_B "%68"
#define MARLIN_KEEP "%69"
#define MARLIN_PLACES "%70, %71"  // metadata and selector
#elif MARLIN_TOKENS == 256  // of int8 alone
#define MARLIN_N "256"
#define MARLIN_D MARLIN_0_127
#define MARLIN_SUMS MARLIN_SLABS_32
#define MARLIN_A "%128, %129, %130, %131"
#define MARLIN_B "%132"
#define MARLIN_KEEP "%133"
#define MARLIN_PLACES "%134, %135"
#endif

#if EIGHT_BIT
// wgmma.mma_async.m64nNk32 of int8, in int32: a register of A has four numbers of k, 4 (t%4) and up; a[0] row t/4, a[1] row t/4 + 8, and
// a[2], a[3] the same 16 further in k.
__device__ __forceinline__ void wgmma_int8(int (&d)[MARLIN_TOKENS / 8][4], const unsigned (&a)[4], unsigned long long b, bool keep) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, " MARLIN_KEEP ", 0;\n"
        "wgmma.mma_async.sync.aligned.m64n" MARLIN_N "k32.s32.s8.s8 {" MARLIN_D "}, {" MARLIN_A "}, " MARLIN_B ", p;\n}"
        : MARLIN_SUMS
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<unsigned>(keep)));
}

// .sp.m64nNk64 of int8: `a` holds 32 of 64 numbers of k, as above. Metadata `e` of a warp's 16 rows lies in all of its lanes: that of lane t is
// of row t/4 + 8 (t%2), for k 32 (t%4 / 2) and up; four bits for each four k. There is one selector, 0.
__device__ __forceinline__ void wgmma_sparse_int8(int (&d)[MARLIN_TOKENS / 8][4], const unsigned (&a)[4], unsigned long long b, unsigned e,
                                                  bool keep) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, " MARLIN_KEEP ", 0;\n"
        "wgmma.mma_async.sp.sync.aligned.m64n" MARLIN_N "k64.s32.s8.s8 {" MARLIN_D "}, {" MARLIN_A "}, " MARLIN_B ", " MARLIN_PLACES ", p;\n}"
        : MARLIN_SUMS
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<unsigned>(keep)), "r"(e), "n"(0));
}
#else
__device__ __forceinline__ void wgmma_half(float (&d)[TOKENS / 8][4], const unsigned (&a)[4], unsigned long long b, bool keep) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, " MARLIN_KEEP ", 0;\n"
        "wgmma.mma_async.sync.aligned.m64n" MARLIN_N "k16.f32.f16.f16 {" MARLIN_D "}, {" MARLIN_A "}, " MARLIN_B ", p, 1, 1, 0;\n}"
        : MARLIN_SUMS
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<unsigned>(keep)));
}

__device__ __forceinline__ void wgmma_bfloat(float (&d)[TOKENS / 8][4], const unsigned (&a)[4], unsigned long long b, bool keep) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, " MARLIN_KEEP ", 0;\n"
        "wgmma.mma_async.sync.aligned.m64n" MARLIN_N "k16.f32.bf16.bf16 {" MARLIN_D "}, {" MARLIN_A "}, " MARLIN_B ", p, 1, 1, 0;\n}"
        : MARLIN_SUMS
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<unsigned>(keep)));
}

template <int selector>
__device__ __forceinline__ void wgmma_sparse_half(float (&d)[TOKENS / 8][4], const unsigned (&a)[4], unsigned long long b,
                                                   unsigned e, bool keep) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, " MARLIN_KEEP ", 0;\n"
        "wgmma.mma_async.sp.sync.aligned.m64n" MARLIN_N "k32.f32.f16.f16 {" MARLIN_D "}, {" MARLIN_A "}, " MARLIN_B ", " MARLIN_PLACES
        ", p, 1, 1, 0;\n}"
        : MARLIN_SUMS
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<unsigned>(keep)), "r"(e), "n"(selector));
}

template <int selector>
__device__ __forceinline__ void wgmma_sparse_bfloat(float (&d)[TOKENS / 8][4], const unsigned (&a)[4], unsigned long long b,
                                                   unsigned e, bool keep) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, " MARLIN_KEEP ", 0;\n"
        "wgmma.mma_async.sp.sync.aligned.m64n" MARLIN_N "k32.f32.bf16.bf16 {" MARLIN_D "}, {" MARLIN_A "}, " MARLIN_B ", " MARLIN_PLACES
        ", p, 1, 1, 0;\n}"
        : MARLIN_SUMS
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<unsigned>(keep)), "r"(e), "n"(selector));
}
#endif
