// What gpu.cpp, the software GPU, offers to the instructions of ptx.cuh and ptx_sm90.cuh, and what it needs of kernel.cpp.
//
// Each kernel is compiled against these declarations alone; gpu.cpp, with the standard library, is compiled once for all of them.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x; };

struct TensorMap {  // of a matrix of 16-bit numbers, of bytes, or of blocks of 512 bytes
    const char* matrix;
    unsigned columns, rows;
    unsigned number_bytes = 2;
};

struct Arguments {  // of any kernel
    const char* activations;
    const void* qweight;
    const void* meta;  // of 2:4 weights; with int8 activations of dense ones the scales of the tokens
    const char* scales;
    const unsigned short* bias;
    void* out;
    float4* partials;
    int* counters;
    int m, n, k, whole, group_shift;
    const void* token_scales;  // with int8 activations of 2:4 weights
};

extern dim3 threadIdx, blockIdx, gridDim;
extern uint4 shared[232448 / 16];  // of the CTA that runs

namespace gpu {
// Of kernel.cpp: the threads of a CTA, and what one of them does.
extern const unsigned CTA_THREADS;
void run_thread(const Arguments& arguments);

void sync_cta();
void sync_first(unsigned threads);  // the first threads of the CTA, by a barrier of their own
void sync_named(unsigned number, unsigned threads);
void arrive_named(unsigned number, unsigned threads);  // the same without waiting
void sync_warp();
void sync_cluster();
using Lanes = unsigned[32];
const Lanes& exchange(unsigned number);  // what each lane of this warp gives

float from_half(unsigned bits);  // of the low 16 bits
unsigned to_half(double value);
float from_bfloat(unsigned bits);
unsigned to_bfloat(float value);
unsigned subtract_half(unsigned a, unsigned b);
unsigned multiply_half(unsigned a, unsigned b);
unsigned fma_half(unsigned a, unsigned b, unsigned c);
unsigned fma_bfloat(unsigned a, unsigned b, unsigned c);
unsigned permute(unsigned a, unsigned b, unsigned selector);

void copy_async(unsigned to, const void* from, bool inside);
void copy_async_commit();
void copy_async_wait(unsigned pending);
void load_matrices(unsigned* registers, unsigned address, int matrices);
unsigned transpose(unsigned pair);
void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bool bfloat);
void mma_int8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
void mma_sparse(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e, int selector, bool bfloat);

// Hopper
void barrier_init(unsigned barrier, unsigned arrivals);
void barrier_arrive(unsigned barrier, unsigned expected_bytes);
void barrier_arrive_at(unsigned rank, unsigned barrier);  // of the cluster
void barrier_wait(unsigned barrier, unsigned parity);
void copy_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier);
void copy_blocks(unsigned to, const TensorMap& map, unsigned block, unsigned row, unsigned barrier, unsigned box_blocks, unsigned box_rows);
void copy_box(unsigned to, const TensorMap& map, unsigned x, unsigned y, unsigned barrier, unsigned box_rows, unsigned rank);
unsigned cluster_size();
unsigned cluster_rank();
float4 load_of_cta(unsigned rank, unsigned from);

struct Wgmma {  // one instruction, as one thread issues it
    float (*d)[4];        // or of int8 `sums`
    const unsigned* a;  // the registers
    unsigned long long b;
    unsigned columns;   // of B and D
    bool keep;          // what D holds
    bool bfloat;
    bool sparse;        // A is 2:4
    unsigned e;         // its metadata
    int selector;
    int (*sums)[4] = nullptr;
};
void wgmma(const Wgmma& instruction);
void wgmma_commit();
void wgmma_wait(unsigned pending);
}  // namespace gpu
