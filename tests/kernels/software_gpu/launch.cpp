// A kernel of csrc as a function of the CPU, for a grid of CTAs in a given order. Built in a folder with copies of csrc, of which
// ptx.cuh and ptx_sm90.cuh have been replaced. -DSPARSE=1 is a 2:4 kernel, -DSPARSE=0 a dense one; -DWGMMA=1 is that for Hopper, and
// -DUNPACK=1 unpack.cu for either.
#if UNPACK
#include "unpack.cu"
#elif SPARSE && WGMMA
#include "sparse_marlin_sm90.cu"
#define KERNEL sparse_marlin_sm90
#elif SPARSE
#include "sparse_marlin_sm80.cu"
#define KERNEL sparse_marlin_sm80
#elif WGMMA
#include "marlin_sm90.cu"
#define KERNEL marlin_sm90
#else
#include "marlin_sm80.cu"
#define KERNEL marlin_sm80
#endif
#if WGMMA
constexpr int CTA_THREADS = THREADS + COPY_THREADS;
#else
constexpr int CTA_THREADS = THREADS;
#endif

struct Arguments {
    const char* activations;
    const void* qweight;
    const void* meta;  // of 2:4 weights alone
    const char* scales;
    const unsigned short* bias;
    void* out;
    float4* partials;
    int* counters;
    int m, n, k, whole, group_shift;
};

static Arguments arguments;

struct Pointer {  // to whatever the kernel says it is
    const void* bytes;
    template <class T> operator T*() const { return static_cast<T*>(const_cast<void*>(bytes)); }
};

static void thread_main() {
    const Arguments& a = arguments;
    const Pointer qweight{a.qweight}, meta{a.meta}, scales{a.scales}, out{a.out};
#if UNPACK
    unpack(qweight, meta, scales, out, a.n, a.k, a.group_shift);
#elif SPARSE
    KERNEL(a.activations, qweight, meta, scales, a.bias, out, a.partials, a.counters, a.m, a.n, a.k, a.whole, a.group_shift);
#else
    KERNEL(a.activations, qweight, scales, a.bias, out, a.partials, a.counters, a.m, a.n, a.k, a.whole, a.group_shift);
#endif
    gpu::fibers[gpu::current].finished = true;
}

// `order`: the CTAs in the order in which they run. `backwards`: the last thread of a CTA goes first. Shared memory starts as
// garbage (0xff: NaN).
extern "C" void launch(Arguments given, const int* order, int ctas, bool eager, bool backwards) {
    arguments = given;
    gpu::eager = eager;
    gridDim.x = ctas;
    gpu::fibers.resize(CTA_THREADS);
    for (gpu::Fiber& fiber : gpu::fibers) fiber.stack.resize(gpu::STACK);
    for (int i = 0; i < ctas; ++i) {
        blockIdx.x = order[i];
        std::memset(shared, 0xff, sizeof shared);
#if WGMMA
        gpu::barriers.clear();
#endif
        for (gpu::Fiber& fiber : gpu::fibers) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = gpu::STACK;
            fiber.context.uc_link = &gpu::scheduler;
            makecontext(&fiber.context, thread_main, 0);
            fiber.finished = false;
            fiber.open.clear();
            fiber.groups.clear();
        }
        for (bool running = true; running;) {
            running = false;
            for (int j = 0; j < CTA_THREADS; ++j) {
                gpu::current = threadIdx.x = backwards ? CTA_THREADS - 1 - j : j;
                if (gpu::fibers[gpu::current].finished) continue;
                running = true;
                swapcontext(&gpu::scheduler, &gpu::fibers[gpu::current].context);
            }
        }
    }
}
