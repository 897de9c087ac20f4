// A kernel of marlinctl/solver_kernels/csrc for the software GPU of tests/kernels. -DSOURCE names it, -DCALL calls it with p[..] and n[..].
// The arguments of the software GPU are those of a product; what a kernel of the solver is given lies in two arrays: `activations` points
// to its pointers, `qweight` to its numbers.
#include <math.h>

#include "ptx.cuh"

inline float __fdividef(float a, float b) { return a / b; }

#include SOURCE

const unsigned gpu::CTA_THREADS = THREADS;

struct Pointer {  // to whatever the kernel says it is
    void* bytes;
    template <class T> operator T*() const { return static_cast<T*>(bytes); }
};

void gpu::run_thread(const Arguments& a) {
    const auto* const p = reinterpret_cast<const Pointer*>(a.activations);
    const auto* const n = static_cast<const int*>(a.qweight);
    CALL;
}
