// One loop of wgmma_rate_8bit.py, or its check. FORM: 0 float16, 1 raw, 2 signed, 3 lookup, 4 int8. product.cuh is made for N.
#include "ptx_sm90.cuh"
#include "dequantize.cuh"

__device__ __forceinline__ unsigned absolute_differences(unsigned a, unsigned b) {  // of four bytes
    unsigned out;
    asm("vabsdiff4.u32.u32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0));
    return out;
}
// a * b + c on the FMA pipe, where ptxas leaves it there.
__device__ __forceinline__ unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
    unsigned out;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}
#include "w4a8_decoding.cuh"

#if FORM == 4
typedef int Sum;
#else
typedef float Sum;
#endif
constexpr int SLABS = N / 8;
#include "product.cuh"

__device__ __forceinline__ void arrived(float (&d)[SLABS][4]) { wgmma_arrived(d); }
__device__ __forceinline__ void arrived(int (&d)[SLABS][4]) {
#pragma unroll
    for (int slab = 0; slab < SLABS; ++slab)
        asm volatile("" : "+r"(d[slab][0]), "+r"(d[slab][1]), "+r"(d[slab][2]), "+r"(d[slab][3])::"memory");
}

// `zero` keeps the tables in registers: ptxas would load constants before each use.
__device__ __forceinline__ void fragment(unsigned (&a)[4], unsigned w0, unsigned w1, Half::Scale scale, unsigned zero) {
    if (FORM == 0) {
        dequantize<Half>(a, w0);
        scale_fragment<Half>(a, scale, scale);
    }
    if (FORM == 1) decode(a, w0, w1, Raw());
    if (FORM == 2) decode(a, w0, w1, Signed());
    if (FORM == 3) {
        Lookup lookup = {{TABLES}};
        for (int i = 0; i < 4; ++i) lookup.table[i] ^= zero;
        decode(a, w0, w1, lookup);
    }
    if (FORM == 4) decode(a, w0, w1, Int8());
}

// Rows of 128 bytes as describe_rows has them.
__device__ __forceinline__ void fill(uint4* rows, const uint4* activations, int count) {
    for (int i = threadIdx.x; i < count * 8; i += blockDim.x) rows[i / 8 * 8 + (i % 8 ^ i / 8 % 8)] = activations[i];
    __syncthreads();
    fence_proxy_async();
    __syncthreads();
}
extern __shared__ __align__(1024) uint4 rows[];  // [PARTS * N][8], and behind them 2 floats for each pair of tokens

#if CHECK  // one CTA for each 64 outputs, warp j for word j of each lane; out [64 CTAs][N]
extern "C" __global__ void __launch_bounds__(128, 1) rate(const unsigned* qweight, const uint4* activations, Sum* out) {
    fill(rows, activations, N);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned a[4][4];
    for (int step = 0; step < 4; ++step) {
        const unsigned* const row = qweight + (2 * step * gridDim.x + blockIdx.x) * 128 + 4 * lane + warp;
        fragment(a[step], row[0], row[gridDim.x * 128], Half::Scale(), 0);
    }
    const unsigned long long b = describe_rows(shared_address(rows));
    Sum d[SLABS][4] = {};
    wgmma_fence();
    for (int step = 0; step < 4; ++step) product(d, a[step], b + 2 * step, step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    arrived(d);
    for (int slab = 0; slab < SLABS; ++slab)
        for (int i = 0; i < 4; ++i)
            out[(blockIdx.x * 64 + 16 * warp + lane / 4 + i / 2 * 8) * N + 8 * slab + 2 * (lane % 4) + i % 2] = d[slab][i];
}
#else
extern "C" __global__ void __launch_bounds__(128 * WARPGROUPS, 1)
rate(unsigned* clocks, unsigned* never, const uint4* activations, int rounds) {
    fill(rows, activations, PARTS * N);
    float2* const corrections = reinterpret_cast<float2*>(rows + PARTS * N * 8);
    for (int i = threadIdx.x; i < PARTS * N / 2; i += blockDim.x) corrections[i] = {i * 0.01f, i * -0.01f};
    __syncthreads();
    const unsigned long long b = describe_rows(shared_address(rows));
    const Half::Scale half = Half::scale(0x2c00 + threadIdx.x % 7);
    unsigned words[WORDS][2];
    for (int w = 0; w < WORDS; ++w)
        for (int i = 0; i < 2; ++i) words[w][i] = (threadIdx.x * 97 + w * 31 + i * 17) * 2654435761u;
    auto next = [&](unsigned (&a)[4], int w) {
        words[w][0] = words[w][0] * 1664525u + 1013904223u;
        if (FORM) words[w][1] = words[w][1] * 1664525u + 1013904223u;
        fragment(a, words[w][0], words[w][1], half, rounds >> 31);
    };
#if GROUPED
    float sums[WORDS][PARTS][SLABS][4] = {};
    Sum group[TEMPORARIES][SLABS][4] = {};
    unsigned a[2][4][4];
    const float scales[2] = {threadIdx.x * 0.01f, threadIdx.x * -0.02f};
    auto close = [&](int item) {
        const int w = item / PARTS % WORDS, part = item % PARTS;
        Sum (&d)[SLABS][4] = group[item % TEMPORARIES];
        float (&sum)[SLABS][4] = sums[w][part];
        if (FORM == 1) {
            // Before what the products gave is read: an addition to that makes ptxas serialize wgmma (its note C7515).
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab) {
                const float2 c = corrections[(part * SLABS + slab) * 4 + threadIdx.x % 4];
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[slab][i] = __fmaf_rn(scales[i / 2], i % 2 ? c.y : c.x, sum[slab][i]);
            }
        }
        arrived(d);
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[slab][i] = __fmaf_rn(scales[i / 2], static_cast<float>(d[slab][i]), sum[slab][i]);
    };
#else
    Sum sums[WORDS][1][SLABS][4] = {};
    unsigned a[2][WORDS][4];
    for (int w = 0; w < WORDS; ++w)
        for (int i = 0; i < 2; ++i) next(a[i][w], w);
#endif
    const long long start = clock64();
#pragma unroll 1
    for (int round = 0; round < rounds; round += 2) {
#if GROUPED
        // Two groups, and nothing is under way at the end: ptxas serializes wgmma where a round reads what the one before issued (C7514).
        constexpr int ITEMS = 2 * WORDS * PARTS;
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            const int w = item / PARTS, part = item % PARTS;
            if (part == 0)
#pragma unroll
                for (int step = 0; step < 4; ++step) next(a[w % 2][step], w % WORDS);
            if (TEMPORARIES == 1 && item) wgmma_wait<0>(), close(item - 1);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                product(group[item % TEMPORARIES], a[w % 2][step], b + part * N * 8 + 2 * step, step > 0);
            wgmma_commit();
            if (TEMPORARIES == 2 && item) wgmma_wait<1>(), close(item - 1);
        }
        wgmma_wait<0>();
        close(ITEMS - 1);
#else
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int w = 0; w < WORDS; ++w)
                if (DECODED) next(a[i][w], w);
            wgmma_fence();
#pragma unroll
            for (int w = 0; w < WORDS; ++w) product(sums[w][0], a[i][w], b + 2 * (w % 4), true);
            wgmma_commit();
            wgmma_wait<1>();
        }
#endif
    }
    wgmma_wait<0>();
    const long long end = clock64();
    auto sum = 0 * sums[0][0][0][0];
    for (int w = 0; w < WORDS; ++w)
        for (int part = 0; part < PARTS; ++part)
            for (int slab = 0; slab < SLABS; ++slab)
                for (int i = 0; i < 4; ++i) sum += sums[w][part][slab][i];
    if (sum == 12345) *never = 1;  // or nothing would be computed
    if (threadIdx.x == 0) clocks[blockIdx.x] = static_cast<unsigned>(end - start);
}
#endif
