// A GPU in software, for one kernel at a time: what a .cu of marlinctl/kernels/csrc needs so that a C++ compiler for the CPU can
// build it and a test can call it. It takes the place of csrc/ptx.cuh.
//
// The threads of a CTA are fibers (ucontext) that take turns; they change only where CUDA threads meet: at __syncthreads and
// at the instructions that a whole warp executes. CTAs run one after the other, in the order the test asks for; of a cluster each runs
// until nothing is left of it but threads that wait for the cluster, and the barrier opens when all are that far. cp.async is as
// lazy as the PTX ISA allows, or as eager: the copy happens at the last moment, in wait_group, or at once. A kernel that reads
// a stage too early is caught by the former, one that overwrites a stage too early by the latter. Fragment layouts are those
// of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "Matrix Fragments for sparse mma.m16n8k32 with
// .f16 and .bf16 types", "ldmatrix" and "movmatrix", as (row, column) of lane and register.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(...)

using std::min;
using std::size_t;
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

dim3 threadIdx, blockIdx, gridDim;
uint4 shared[232448 / 16];

namespace gpu {
constexpr unsigned STACK = 1 << 17;
constexpr int SHOWN = 9;  // registers of a lane that an instruction reads: four of A, four of B, metadata
struct Copy { unsigned to; const void* from; bool inside; };
struct Fiber {
    ucontext_t context;  // for its first turn; later ones jump, because swapcontext asks the system for the signal mask each time
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool started, finished, in_cluster_barrier;
    std::vector<Copy> open;                // copies since the last commit
    std::deque<std::vector<Copy>> groups;  // committed and not yet carried out
};
std::vector<Fiber> fibers;  // of the CTA that runs
struct Cta {                // of a cluster, while others of it run
    int index;
    std::vector<Fiber> fibers;
    std::vector<char> memory;
};
std::vector<Cta> cluster;  // by rank
jmp_buf scheduler_place;
unsigned current;
bool eager;

struct Meeting { unsigned waiting = 0, generation = 0; };
Meeting cta, named, warps[32];
unsigned exchange[32][32][SHOWN];  // [warp][lane]: what lanes show each other

inline void yield() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler_place, 1);
}
// A turn of the current fiber: until it yields or ends.
inline void resume() {
    Fiber& fiber = fibers[current];
    if (_setjmp(scheduler_place)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

inline void meet(Meeting& meeting, unsigned members) {
    const unsigned generation = meeting.generation;
    if (++meeting.waiting == members) {
        meeting.waiting = 0;
        ++meeting.generation;
    } else {
        while (meeting.generation == generation) yield();
    }
}

inline void carry_out(const Copy& copy) {
    char* to = reinterpret_cast<char*>(shared) + copy.to;
    if (copy.inside) std::memcpy(to, copy.from, 16);
    else std::memset(to, 0, 16);
}

// All lanes of the warp show `count` registers and then read each other's.
inline const unsigned (&show(const unsigned* registers, int count))[32][SHOWN] {
    const unsigned warp = current / 32;
    meet(warps[warp], 32);  // everybody has read what was there before
    std::memcpy(exchange[warp][current % 32], registers, count * 4);
    meet(warps[warp], 32);
    return exchange[warp];
}

// Every float16 as a float: converting is a call of the compiler's library where a processor has no instruction for it.
const std::vector<float> HALVES = [] {
    std::vector<float> all(1 << 16);
    for (unsigned bits = 0; bits < all.size(); ++bits) {
        _Float16 out;
        const std::uint16_t low = static_cast<std::uint16_t>(bits);
        std::memcpy(&out, &low, 2);
        all[bits] = static_cast<float>(out);
    }
    return all;
}();
inline float half(unsigned bits) { return HALVES[bits & 0xffff]; }
inline unsigned half_bits(double value) {
    const _Float16 rounded = static_cast<_Float16>(value);
    std::uint16_t out;
    std::memcpy(&out, &rounded, 2);
    return out;
}
inline float bfloat(unsigned bits) {
    const unsigned wide = bits << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}
inline unsigned bfloat_bits(float value) {  // to nearest, ties to even; NaN is not needed here
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <class Widen>
inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Widen widen) {
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto& all = show(mine, 6);
    const int lane = current % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int a_lane = row % 8 * 4 + k % 8 / 2, a_register = row / 8 + k / 8 * 2;
            const int b_lane = column * 4 + k % 8 / 2, b_register = 4 + k / 8;
            d[i] += widen(all[a_lane][a_register] >> 16 * (k % 2) & 0xffff) * widen(all[b_lane][b_register] >> 16 * (k % 2) & 0xffff);
        }
    }
}

// A is 16 x 32, two of each four columns. Stored are 16 x 16 values, spread like the A of mma above; B has 32 rows, spread like that
// B, 16 rows further down in its other two registers. Metadata: of each four lanes the selector names two, the first for columns
// 0..15 of A, the second for 16..31; the low half of it is for row lane / 4, the high half for the row 8 below; four bits for each
// four columns, two for the place of the first stored value and two for that of the second.
template <class Widen>
inline void mma_sparse(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e, int selector, Widen widen) {
    const unsigned mine[9] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], e};
    const auto& all = show(mine, 9);
    const int lane = current % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
        for (int stored = 0; stored < 16; ++stored) {
            const int quad = stored / 2;
            const unsigned word = all[row % 8 * 4 + 2 * selector + quad / 4][8] >> 16 * (row / 8) & 0xffff;
            const int first = word >> 4 * (quad % 4) & 3, second = word >> (4 * (quad % 4) + 2) & 3;
            if (first >= second) d[i] = NAN;  // undefined: the two places must rise
            const int k = 4 * quad + (stored % 2 ? second : first);
            const int a_lane = row % 8 * 4 + stored % 8 / 2, a_register = row / 8 + stored / 8 * 2;
            const int b_lane = column * 4 + k % 8 / 2, b_register = 4 + k / 8;
            d[i] += widen(all[a_lane][a_register] >> 16 * (stored % 2) & 0xffff) * widen(all[b_lane][b_register] >> 16 * (k % 2) & 0xffff);
        }
    }
}
}  // namespace gpu

inline void __syncthreads() { gpu::meet(gpu::cta, gpu::fibers.size()); }
inline void __syncwarp() { gpu::meet(gpu::warps[gpu::current / 32], 32); }
template <int threads> inline void meet() { gpu::meet(gpu::named, threads); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int count_up(int* counter) { return (*counter)++; }
template <class T> inline void __stcg(T* place, T value) { *place = value; }
template <class T> inline T __ldcg(const T* place) { return *place; }

inline unsigned thread_index() { return threadIdx.x; }
inline unsigned cta_index() { return blockIdx.x; }
inline unsigned cta_count() { return gridDim.x; }
inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(static_cast<const char*>(pointer) - reinterpret_cast<const char*>(shared));
}
inline void copy_async(unsigned to, const void* from, bool inside) {
    if (reinterpret_cast<std::uintptr_t>(from) % 16 || to % 16) std::abort();  // misaligned address
    if (gpu::eager) gpu::carry_out({to, from, inside});
    else gpu::fibers[gpu::current].open.push_back({to, from, inside});
}
// Kernels run one after another here.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}
inline void store_shared(unsigned to, uint4 four) {
    if (to % 16) std::abort();  // misaligned address
    std::memcpy(reinterpret_cast<char*>(shared) + to, &four, 16);
}
inline void copy_async_commit() {
    gpu::Fiber& fiber = gpu::fibers[gpu::current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int pending>
inline void copy_async_wait() {
    auto& groups = gpu::fibers[gpu::current].groups;
    for (; groups.size() > pending; groups.pop_front())
        for (const gpu::Copy& copy : groups.front()) gpu::carry_out(copy);
}
inline void load_matrices(unsigned* r, unsigned address, int matrices) {
    const auto& all = gpu::show(&address, 1);
    const int lane = gpu::current % 32;
    for (int matrix = 0; matrix < matrices; ++matrix)
        std::memcpy(&r[matrix], reinterpret_cast<const char*>(shared) + all[matrix * 8 + lane / 4][0] + lane % 4 * 4, 4);
}
inline void load_matrices(unsigned (&r)[4], unsigned address) { load_matrices(r, address, 4); }
inline void load_two_matrices(unsigned (&r)[4], unsigned address) { load_matrices(r, address, 2); }
inline unsigned transpose(unsigned pair) {
    const auto& all = gpu::show(&pair, 1);
    const int lane = gpu::current % 32, row = lane / 4, column = lane % 4 * 2;
    auto at = [&](int r, int c) { return all[r * 4 + c / 2][0] >> 16 * (c % 2) & 0xffff; };
    return at(column, row) | at(column + 1, row) << 16;
}
inline unsigned and_or(unsigned a, unsigned b, unsigned c) { return (a & b) | c; }

template <class Both>
inline unsigned each(Both both) { return both(0) | both(16) << 16; }
inline unsigned subtract_half(unsigned a, unsigned b) {
    return each([=](int s) { return gpu::half_bits(double(gpu::half(a >> s)) - gpu::half(b >> s)); });
}
inline unsigned multiply_half(unsigned a, unsigned b) {
    return each([=](int s) { return gpu::half_bits(double(gpu::half(a >> s)) * gpu::half(b >> s)); });
}
inline unsigned fma_half(unsigned a, unsigned b, unsigned c) {
    return each([=](int s) { return gpu::half_bits(double(gpu::half(a >> s)) * gpu::half(b >> s) + gpu::half(c >> s)); });
}
inline unsigned fma_bfloat(unsigned a, unsigned b, unsigned c) {
    auto low = [](unsigned bits) { return gpu::bfloat(bits & 0xffff); };
    return each([=](int s) { return gpu::bfloat_bits(low(a >> s) * low(b >> s) + low(c >> s)); });
}
inline unsigned round_to_half(float first, float second) { return gpu::half_bits(first) | gpu::half_bits(second) << 16; }
inline unsigned round_to_bfloat(float first, float second) { return gpu::bfloat_bits(first) | gpu::bfloat_bits(second) << 16; }
inline float widen_half(unsigned short bits) { return gpu::half(bits); }
inline float widen_bfloat(unsigned short bits) { return gpu::bfloat(bits); }
inline void mma_half(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { gpu::mma(d, a, b0, b1, gpu::half); }
inline void mma_bfloat(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { gpu::mma(d, a, b0, b1, gpu::bfloat); }
template <int selector>
inline void mma_sparse_half(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e) {
    gpu::mma_sparse(d, a, b, e, selector, gpu::half);
}
template <int selector>
inline void mma_sparse_bfloat(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e) {
    gpu::mma_sparse(d, a, b, e, selector, gpu::bfloat);
}
