// A kernel of csrc as a function of the CPU, for a grid of CTAs in a given order. Built in a folder with copies of csrc, of which
// ptx.cuh has been replaced; -DSPARSE=1 is the 2:4 kernel, -DSPARSE=0 the dense one, and with -DUNPACK=1 unpack.cu for either.
#if UNPACK
#include "unpack.cu"
#elif SPARSE
#include "sparse_marlin_sm80.cu"
#else
#include "marlin_sm80.cu"
#endif

struct Arguments {
    const char* activations;
    const uint4* qweight;
    const uint4* meta;  // of the 2:4 kernel alone
    const char* scales;
    const unsigned short* bias;
    void* out;
    float4* partials;
    int* counters;
    int m, n, k, group_shift;
};

static Arguments arguments;

static void thread_main() {
    const Arguments& a = arguments;
#if UNPACK
    const auto* const meta = reinterpret_cast<const unsigned short*>(a.meta);
    const auto* const scales = reinterpret_cast<const unsigned short*>(a.scales);
    unpack(a.qweight, meta, scales, static_cast<char*>(a.out), a.n, a.k, a.group_shift);
#elif SPARSE
    unsigned short* const out = static_cast<unsigned short*>(a.out);
    sparse_marlin_sm80(a.activations, a.qweight, a.meta, a.scales, a.bias, out, a.partials, a.counters, a.m, a.n, a.k, a.group_shift);
#else
    unsigned* const out = static_cast<unsigned*>(a.out);
    marlin_sm80(a.activations, a.qweight, a.scales, a.bias, out, a.partials, a.counters, a.m, a.n, a.k, a.group_shift);
#endif
    gpu::fibers[gpu::current].finished = true;
}

// `order`: the CTAs in the order in which they run. `backwards`: the last thread of a CTA goes first. Shared memory starts as
// garbage (0xff: NaN).
extern "C" void launch(Arguments given, const int* order, int ctas, bool eager, bool backwards) {
    arguments = given;
    gpu::eager = eager;
    gridDim.x = ctas;
    gpu::fibers.resize(THREADS);
    for (gpu::Fiber& fiber : gpu::fibers) fiber.stack.resize(gpu::STACK);
    for (int i = 0; i < ctas; ++i) {
        blockIdx.x = order[i];
        std::memset(shared, 0xff, sizeof shared);
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
            for (int j = 0; j < THREADS; ++j) {
                gpu::current = threadIdx.x = backwards ? THREADS - 1 - j : j;
                if (gpu::fibers[gpu::current].finished) continue;
                running = true;
                swapcontext(&gpu::scheduler, &gpu::fibers[gpu::current].context);
            }
        }
    }
}
