// The instructions that the kernels are made of, one function each, under the names of the PTX ISA.
//
// All inline PTX is in this file, so that the rest is plain C++: tests/kernels/software_gpu replaces it by a ptx.cuh of its own
// and runs the kernels on the CPU. No header is included anywhere: NVRTC's wheel brings none, and integers and PTX need none.
// Pairs of 16-bit numbers travel as unsigned, the first one in the low half.
#pragma once

// A generic pointer into shared memory as the 32-bit address that shared-memory instructions take.
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x, blockIdx.x and gridDim.x, read at the place of use: volatile, or the compiler would keep them in registers, or spilled, from
// the start of the kernel.
__device__ __forceinline__ unsigned thread_index() {
    unsigned out;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(out));
    return out;
}
__device__ __forceinline__ unsigned cta_index() {
    unsigned out;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(out));
    return out;
}
__device__ __forceinline__ unsigned cta_count() {
    unsigned out;
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(out));
    return out;
}

// __syncthreads for the first `threads` of a CTA (barrier 0, for all of them, is __syncthreads' own).
template <int threads>
__device__ __forceinline__ void sync_threads() {
    asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory");
}

// shfl.sync.bfly: the largest of the numbers of `lanes` neighbouring lanes, 8 or 32 say, for each of them. By all lanes of the warp.
template <int lanes>
__device__ __forceinline__ unsigned largest_of_lanes(unsigned number) {
#pragma unroll
    for (int distance = lanes / 2; distance > 0; distance /= 2) number = max(number, __shfl_xor_sync(0xffffffff, number, distance));
    return number;
}

// cp.async.cg: 16 bytes from global to shared memory past L1, without registers; the bytes are there after the group's wait.
// Where `inside` is false nothing is read and 16 zeros are written (src-size 0).
// NOTE: no L2 cache hint. The form with one stops with "illegal instruction" on an H200 as the original MARLIN used it.
__device__ __forceinline__ void copy_async(unsigned shared, const void* global, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(inside ? 16 : 0) : "memory");
}

// 16 bytes to shared memory.
__device__ __forceinline__ void store_shared(unsigned shared, uint4 four) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(four.x), "r"(four.y), "r"(four.z), "r"(four.w) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `pending` of this thread's groups are pending.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// atom.acq_rel: adds 1 and returns the old value. A CTA that reads the new value sees, after its next barrier, all that this CTA wrote before
// the barrier in front of the call.
__device__ __forceinline__ int count_up(int* counter) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// griddepcontrol: two kernels of a stream may overlap where the host allows it (programmatic dependent launch, sm_90). CTAs of the next
// kernel start when all CTAs of this one have executed this and resources are free; they see this kernel's writes after their own wait.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before this one have completed and their writes are visible. Does nothing if they already have.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ldmatrix: four 8 x 8 matrices of 16-bit numbers. Lane t names row t % 8 of matrix t / 8 (16 bytes), and receives in
// register i the pair 2 (t % 4) of row t / 4 of matrix i.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

// The first two of them: the lanes of the others name nothing.
__device__ __forceinline__ void load_two_matrices(unsigned (&r)[4], unsigned shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared) : "memory");
}

// movmatrix: an 8 x 8 matrix of 16-bit numbers, a pair in each lane as ldmatrix delivers it, comes back transposed.
__device__ __forceinline__ unsigned transpose(unsigned pair) {
    unsigned out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

// lop3 with the table of (a & b) | c: the truth tables of a, b, c are 0xf0, 0xcc, 0xaa, and (0xf0 & 0xcc) | 0xaa = 0xea.
__device__ __forceinline__ unsigned and_or(unsigned a, unsigned b, unsigned c) {
    unsigned out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// lop3: (a & b) ^ c. Of C++ ptxas makes two instructions.
__device__ __forceinline__ unsigned and_xor(unsigned a, unsigned b, unsigned c) {
    unsigned out;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// prmt: byte i of the result is byte (selector >> 4 i) & 7 of a, its bytes 0 .. 3, and b, 4 .. 7.
__device__ __forceinline__ unsigned permute(unsigned a, unsigned b, unsigned selector) {
    unsigned out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}

// sub.f16x2
__device__ __forceinline__ unsigned subtract_half(unsigned a, unsigned b) {
    unsigned out;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

// mul.f16x2
__device__ __forceinline__ unsigned multiply_half(unsigned a, unsigned b) {
    unsigned out;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

// fma.f16x2: a * b + c, rounded once
__device__ __forceinline__ unsigned fma_half(unsigned a, unsigned b, unsigned c) {
    unsigned out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// fma.bf16x2: a * b + c, rounded once. (sub.bf16x2 needs sm_90.)
__device__ __forceinline__ unsigned fma_bfloat(unsigned a, unsigned b, unsigned c) {
    unsigned out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

// Two float32 rounded to nearest into one register.
__device__ __forceinline__ unsigned round_to_half(float first, float second) {
    unsigned out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    return out;
}

__device__ __forceinline__ unsigned round_to_bfloat(float first, float second) {
    unsigned out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    return out;
}

// To float32, exactly.
__device__ __forceinline__ float widen_half(unsigned short bits) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
}

__device__ __forceinline__ float widen_bfloat(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

// mma.sync.m16n8k16: d += a * b in float32; a is 16 x 16, b 16 x 8, d 16 x 8, spread over the warp.
__device__ __forceinline__ void mma_half(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bfloat(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// mma.sync.m16n8k32 of int8, in int32, which wraps around: a register of a has four numbers of k, 4 (t%4) and up; a[0] row t/4, a[1] row
// t/4 + 8, and a[2], a[3] 16 k further on. d += a * b
__device__ __forceinline__ void mma_int8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d = c in each place + a * b
__device__ __forceinline__ void mma_int8_onto(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int c) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c));
}

// mma.sp.m16n8k32: as mma.sync.m16n8k16 with a 2:4 matrix a, 16 x 32, of which the 16 x 16 kept values are stored as above; b is 32 x 8. e
// says where they were: four bits for each four columns, the places of the two in rising order (ordered_metadata). Of each four lanes two
// hold what is used, the first two where `selector` is 0, the others where it is 1.
template <int selector>
__device__ __forceinline__ void mma_sparse_half(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e), "n"(selector));
}

template <int selector>
__device__ __forceinline__ void mma_sparse_bfloat(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e), "n"(selector));
}
