// A kernel of csrc for the software GPU. Built in a folder with copies of csrc, of which ptx.cuh and ptx_sm90.cuh have been replaced.
// -DSPARSE=1 is a 2:4 kernel, -DSPARSE=0 a dense one; -DWGMMA=1 is that for Hopper, -DEIGHT_BIT=1 that for int8 activations (with -DWHOLE_SUMS=1
// factored weights), -DUNPACK=1
// unpack.cu for either, and -DREPACK=1 repack.cu.
#if ROUND  // -DROUND=1 is round_activations.cu
#include "round_activations.cu"
#elif REPACK
#include "repack.cu"
#elif UNPACK
#include "unpack.cu"
#elif SPARSE && EIGHT_BIT
#include "sparse_marlin_a8_factored_sm90.cu"
#define KERNEL sparse_marlin_a8_factored_sm90
#elif SPARSE && WGMMA
#include "sparse_marlin_sm90.cu"
#define KERNEL sparse_marlin_sm90
#elif SPARSE
#include "sparse_marlin_sm80.cu"
#define KERNEL sparse_marlin_sm80
#elif EIGHT_BIT && WHOLE_SUMS && WGMMA
#include "marlin_a8_factored_sm90.cu"
#define KERNEL marlin_a8_factored_sm90
#elif EIGHT_BIT && WHOLE_SUMS
#include "marlin_a8_factored_sm80.cu"
#define KERNEL marlin_a8_factored_sm80
#elif EIGHT_BIT && !WGMMA
#include "marlin_a8_sm80.cu"
#define KERNEL marlin_a8_sm80
#elif EIGHT_BIT
#include "marlin_a8_sm90.cu"
#define KERNEL marlin_a8_sm90
#elif WGMMA
#include "marlin_sm90.cu"
#define KERNEL marlin_sm90
#else
#include "marlin_sm80.cu"
#define KERNEL marlin_sm80
#endif
#if WGMMA
const unsigned gpu::CTA_THREADS = THREADS + COPY_THREADS;
#else
const unsigned gpu::CTA_THREADS = THREADS;
#endif

struct Pointer {  // to whatever the kernel says it is
    const void* bytes;
    template <class T> operator T*() const { return static_cast<T*>(const_cast<void*>(bytes)); }
};

void gpu::run_thread(const Arguments& a) {
    const Pointer meta{a.meta}, scales{a.scales}, out{a.out};
#if WGMMA
    const unsigned rows_of_words = (static_cast<unsigned>(a.k) + 63) / 64 * (SPARSE ? 2 : 4);
    const TensorMap qweight{static_cast<const char*>(a.qweight), (static_cast<unsigned>(a.n) + 63) / 64, rows_of_words};
#else
    const Pointer qweight{a.qweight};
#endif
#if EIGHT_BIT && WGMMA
    const TensorMap activations{a.activations, (static_cast<unsigned>(a.k) + 63) / 64 * 64, static_cast<unsigned>(a.m), 1};
#elif WGMMA
    const TensorMap activations{a.activations, static_cast<unsigned>(a.k), static_cast<unsigned>(a.m)};
#else
    const char* const activations = a.activations;
#endif
#if ROUND
    round_activations(Pointer{a.activations}, out, Pointer{a.partials}, a.m, a.k);
#elif REPACK
    repack(Pointer{a.activations}, qweight, a.n, a.m, a.k, a.whole);
#elif UNPACK
    unpack(qweight, meta, scales, out, a.n, a.k, a.group_shift);
#elif SPARSE && EIGHT_BIT
    const Pointer token_scales{a.token_scales};
    KERNEL(activations, qweight, meta, token_scales, scales, a.bias, out, a.partials, a.counters, a.m, a.n, a.k, a.whole, a.group_shift);
#elif SPARSE || EIGHT_BIT
    KERNEL(activations, qweight, meta, scales, a.bias, out, a.partials, a.counters, a.m, a.n, a.k, a.whole, a.group_shift);
#else
    KERNEL(activations, qweight, scales, a.bias, out, a.partials, a.counters, a.m, a.n, a.k, a.whole, a.group_shift);
#endif
}
