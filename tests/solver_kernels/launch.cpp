// A kernel of marlinctl/solver_kernels/csrc as a function of the CPU: its own text, on the fibers of tests/kernels/software_gpu. Threads of
// a CTA take turns at __syncthreads; CTAs run one after the other, the last thread of each first where that is asked for.
#include "ptx.cuh"

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float __fdividef(float a, float b) { return a / b; }

#include SOURCE

struct Pointer {  // to whatever the kernel says it is
    void* bytes;
    template <class T> operator T*() const { return static_cast<T*>(bytes); }
};

static const Pointer* p;
static const int* n;

static void thread_main() {
    CALL;
    gpu::fibers[gpu::current].finished = true;
    _longjmp(gpu::scheduler_place, 1);
}

extern "C" void launch(const Pointer* pointers, const int* sizes, int ctas, bool backwards) {
    p = pointers;
    n = sizes;
    gridDim.x = ctas;
    gpu::fibers.resize(THREADS);
    for (int cta = 0; cta < ctas; ++cta) {
        blockIdx.x = cta;
        std::memset(shared, 0xff, sizeof shared);  // as nobody may read it
        for (gpu::Fiber& fiber : gpu::fibers) {
            if (!fiber.stack) fiber.stack.reset(new char[gpu::STACK]);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = gpu::STACK;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, thread_main, 0);
            fiber.started = fiber.finished = false;
        }
        for (bool running = true; running;) {
            running = false;
            for (int j = 0; j < THREADS; ++j) {
                gpu::current = threadIdx.x = backwards ? THREADS - 1 - j : j;
                if (gpu::fibers[gpu::current].finished) continue;
                running = true;
                gpu::resume();
            }
        }
    }
}
