// The instructions of csrc/ptx.cuh as functions of the software GPU (gpu.cpp): it takes that file's place where a C++ compiler builds the
// kernels for the CPU.
#pragma once
#include "gpu.h"

#define __device__
#define __global__
#define __grid_constant__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(...)

template <class T> inline T min(T a, T b) { return b < a ? b : a; }
inline unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }  // as CUDA has it
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __syncthreads() { gpu::sync_cta(); }
inline void __syncwarp() { gpu::sync_warp(); }
template <int threads> inline void sync_threads() { gpu::sync_first(threads); }
inline unsigned __float_as_uint(float number) {
    unsigned bits;
    __builtin_memcpy(&bits, &number, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float number;
    __builtin_memcpy(&number, &bits, 4);
    return number;
}
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline int count_up(int* counter) { return (*counter)++; }
template <class T> inline void __stcg(T* place, T value) { *place = value; }
template <class T> inline T __ldcg(const T* place) { return *place; }

inline unsigned thread_index() { return threadIdx.x; }
inline unsigned cta_index() { return blockIdx.x; }
inline unsigned cta_count() { return gridDim.x; }
inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(static_cast<const char*>(pointer) - reinterpret_cast<const char*>(shared));
}
inline void copy_async(unsigned to, const void* from, bool inside) { gpu::copy_async(to, from, inside); }
// Kernels run one after another here.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}
inline void store_shared(unsigned to, uint4 four) {
    if (to % 16) __builtin_abort();  // misaligned address
    shared[to / 16] = four;
}
inline void copy_async_commit() { gpu::copy_async_commit(); }
template <int pending> inline void copy_async_wait() { gpu::copy_async_wait(pending); }
inline void load_matrices(unsigned (&r)[4], unsigned address) { gpu::load_matrices(r, address, 4); }
inline void load_two_matrices(unsigned (&r)[4], unsigned address) { gpu::load_matrices(r, address, 2); }
inline unsigned transpose(unsigned pair) { return gpu::transpose(pair); }
template <int lanes> inline unsigned largest_of_lanes(unsigned number) {
    const unsigned first = threadIdx.x % 32 / lanes * lanes;
    const gpu::Lanes& all = gpu::exchange(number);
    unsigned largest = 0;
    for (unsigned lane = first; lane < first + lanes; ++lane) largest = max(largest, all[lane]);
    return largest;
}
inline unsigned and_or(unsigned a, unsigned b, unsigned c) { return (a & b) | c; }
inline unsigned and_xor(unsigned a, unsigned b, unsigned c) { return (a & b) ^ c; }
inline unsigned permute(unsigned a, unsigned b, unsigned selector) { return gpu::permute(a, b, selector); }
inline unsigned subtract_half(unsigned a, unsigned b) { return gpu::subtract_half(a, b); }
inline unsigned multiply_half(unsigned a, unsigned b) { return gpu::multiply_half(a, b); }
inline unsigned fma_half(unsigned a, unsigned b, unsigned c) { return gpu::fma_half(a, b, c); }
inline unsigned fma_bfloat(unsigned a, unsigned b, unsigned c) { return gpu::fma_bfloat(a, b, c); }
inline unsigned round_to_half(float first, float second) { return gpu::to_half(first) | gpu::to_half(second) << 16; }
inline unsigned round_to_bfloat(float first, float second) { return gpu::to_bfloat(first) | gpu::to_bfloat(second) << 16; }
inline float widen_half(unsigned short bits) { return gpu::from_half(bits); }
inline float widen_bfloat(unsigned short bits) { return gpu::from_bfloat(bits); }
inline void mma_half(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { gpu::mma(d, a, b0, b1, false); }
inline void mma_bfloat(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { gpu::mma(d, a, b0, b1, true); }
inline void mma_int8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { gpu::mma_int8(d, a, b0, b1); }
inline void mma_int8_onto(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int c) {
    for (int& sum : d) sum = c;
    gpu::mma_int8(d, a, b0, b1);
}
template <int selector>
inline void mma_sparse_half(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e) {
    gpu::mma_sparse(d, a, b, e, selector, false);
}
template <int selector>
inline void mma_sparse_bfloat(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e) {
    gpu::mma_sparse(d, a, b, e, selector, true);
}
