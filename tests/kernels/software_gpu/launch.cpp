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
constexpr int AHEAD_TURNS = 6;

struct Pointer {  // to whatever the kernel says it is
    const void* bytes;
    template <class T> operator T*() const { return static_cast<T*>(const_cast<void*>(bytes)); }
};

static void thread_main() {
    const Arguments& a = arguments;
    const Pointer qweight{a.qweight}, meta{a.meta}, scales{a.scales}, out{a.out};
#if WGMMA
    const TensorMap activations{a.activations, static_cast<unsigned>(a.k), static_cast<unsigned>(a.m)};
#else
    const char* const activations = a.activations;
#endif
#if UNPACK
    unpack(qweight, meta, scales, out, a.n, a.k, a.group_shift);
#elif SPARSE
    KERNEL(activations, qweight, meta, scales, a.bias, out, a.partials, a.counters, a.m, a.n, a.k, a.whole, a.group_shift);
#else
    KERNEL(activations, qweight, scales, a.bias, out, a.partials, a.counters, a.m, a.n, a.k, a.whole, a.group_shift);
#endif
    gpu::fibers[gpu::current].finished = true;
    _longjmp(gpu::scheduler_place, 1);
}

// Puts in place what belongs to one CTA, or puts it away again.
static void exchange_cta(gpu::Cta& cta) {
    std::swap(gpu::fibers, cta.fibers);
    std::swap_ranges(cta.memory.begin(), cta.memory.end(), reinterpret_cast<char*>(shared));
}

// Shared memory as nobody may read it: before a CTA has started and after it has ended.
static void forget_memory(gpu::Cta& cta) { cta.memory.assign(sizeof shared, '\xff'); }

static void start(gpu::Cta& cta, int index) {
    cta.index = index;
    forget_memory(cta);
#if WGMMA
    gpu::barriers[index % gpu::cluster.size()].clear();
#endif
    cta.fibers.resize(CTA_THREADS);
    for (gpu::Fiber& fiber : cta.fibers) {
        if (!fiber.stack) fiber.stack.reset(new char[gpu::STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = gpu::STACK;
        fiber.context.uc_link = nullptr;  // its end jumps
        makecontext(&fiber.context, thread_main, 0);
        fiber.started = fiber.finished = fiber.in_cluster_barrier = false;
        fiber.open.clear();
        fiber.groups.clear();
    }
}

// Until all threads have ended or wait for the cluster. True where some wait.
static bool run(gpu::Cta& cta, bool backwards) {
    blockIdx.x = cta.index;
    exchange_cta(cta);
    bool waiting = false;
    for (bool running = true; running;) {
        running = waiting = false;
        // Backwards, a warp has several turns before the next has one: they drift apart.
        for (int j = 0; j < CTA_THREADS * (backwards ? AHEAD_TURNS : 1); ++j) {
            const int warp = backwards ? j / (32 * AHEAD_TURNS) : j / 32, thread = warp * 32 + j % 32;
            gpu::current = threadIdx.x = backwards ? CTA_THREADS - 1 - thread : thread;
            gpu::Fiber& fiber = gpu::fibers[gpu::current];
            waiting |= fiber.in_cluster_barrier;
            if (fiber.finished || fiber.in_cluster_barrier) continue;
            running = true;
            gpu::resume();
        }
    }
    exchange_cta(cta);
    return waiting;
}

// `order`: the CTAs in the order in which they run, `cluster` neighbours of the grid after each other. `backwards`: the last thread of a
// CTA goes first, and its warp a few steps ahead. Shared memory starts as garbage (0xff: NaN), and is garbage again when its CTA has ended.
extern "C" void launch(Arguments given, const int* order, int ctas, int cluster, bool eager, bool backwards) {
    arguments = given;
    gpu::eager = eager;
    gridDim.x = ctas;
    gpu::cluster.resize(cluster);
    for (int first = 0; first < ctas; first += cluster) {
        std::vector<gpu::Cta*> left;
        for (int i = first; i < first + cluster; ++i) {
            if (order[i] / cluster != order[first] / cluster) std::abort();  // no neighbours
            left.push_back(&gpu::cluster[order[i] % cluster]);
            start(*left.back(), order[i]);
        }
        while (!left.empty()) {
            std::vector<gpu::Cta*> waiting;
            for (gpu::Cta* cta : left) {
                if (run(*cta, backwards)) waiting.push_back(cta);
                else forget_memory(*cta);
            }
            // Whoever has not ended has arrived: the barrier opens.
            for (gpu::Cta* cta : waiting)
                for (gpu::Fiber& fiber : cta->fibers) fiber.in_cluster_barrier = false;
            left = waiting;
        }
    }
}
