// The instructions of csrc/ptx_sm90.cuh in software. As with cp.async, everything asynchronous happens as late as the PTX ISA allows, or as
// early: a bulk copy when somebody waits for its barrier, a wgmma in the wait for it (with what is in shared memory by then, and NaN
// where its registers of A have become those of another), or both at once. Fragments: PTX ISA, "Register Fragments for
// wgmma.mma_async.m64nNk16" and "..sp", of which a warp's part is that of mma; operand B: "Matrix Descriptor Format" and "Swizzling
// Modes". The barrier of a cluster: "barrier.cluster", which waits for threads that have not exited alone.
#pragma once
#include <functional>
#include <map>
#include <utility>

#include "ptx.cuh"

namespace gpu {
struct Barrier {
    unsigned arrivals, pending, parity = 0;
    long bytes = 0;                              // announced, and not yet copied
    std::vector<std::function<void()>> copies;   // under way
};
std::map<unsigned, Barrier> barriers[8];  // of each CTA of a cluster, by address
inline std::map<unsigned, Barrier>& own_barriers() { return barriers[blockIdx.x % cluster.size()]; }

inline void turn(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.arrivals;
    barrier.parity ^= 1;
}
inline void make_room(Barrier& barrier) {
    if (barrier.pending) return;
    for (const auto& copy : std::exchange(barrier.copies, {})) copy();  // the last moment for those of this phase
    if (barrier.pending == 0) std::abort();  // more arrivals than the phase has
}
inline void arrive(Barrier& barrier) {
    make_room(barrier);
    --barrier.pending;
    turn(barrier);
}
inline Barrier& barrier_at(unsigned address) {
    if (!own_barriers().count(address)) std::abort();  // not initialised
    return own_barriers()[address];
}
inline void begin(Barrier& barrier, std::function<void()> copy) {
    if (eager) copy();
    else barrier.copies.push_back(copy);
}

struct Product {
    float (*d)[4];
    const unsigned* a;  // registers, and what is in them: they may have ended by the time it is carried out, as far as C++ knows
    unsigned long long b;
    bool keep;
    int steps;  // of 16 in k: 1, or 2 where A is 2:4
    unsigned e;
    int selector;
    bool bfloat;
    unsigned values[4] = {a[0], a[1], a[2], a[3]};
    bool overwritten = false;
};
std::vector<Product> open_products[1024];               // of each thread, since the last commit
std::deque<std::vector<Product>> committed[1024];

inline float number(unsigned bits, bool is_bfloat) { return is_bfloat ? bfloat(bits) : half(bits); }

// Column n, row k of operand B.
inline float element(const Product& p, int n, int k) {
    if (p.b >> 62 != 1) std::abort();  // not the 128-byte swizzle
    unsigned address = (p.b & 0x3fff) * 16 + n / 8 * ((p.b >> 32 & 0x3fff) * 16) + n % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    std::uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const char*>(shared) + address, 2);
    return number(bits, p.bfloat);
}

inline void carry_out(const Product& p) {
    const unsigned mine[5] = {p.values[0], p.values[1], p.values[2], p.values[3], p.e};
    const auto& all = show(mine, 5);
    const int lane = current % 32;
    for (int row = lane / 4; row < 16; row += 8) {
        float values[16];  // of this row of A
        int places[16];    // in k
        bool rising = true;
        for (int stored = 0; stored < 16; ++stored) {
            places[stored] = stored;
            if (p.steps == 2) {
                const int quad = stored / 2;
                const unsigned word = all[row % 8 * 4 + 2 * p.selector + quad / 4][4] >> 16 * (row / 8) & 0xffff;
                const int first = word >> 4 * (quad % 4) & 3, second = word >> (4 * (quad % 4) + 2) & 3;
                rising &= first < second;  // else undefined
                places[stored] = 4 * quad + (stored % 2 ? second : first);
            }
            const unsigned pair = all[row % 8 * 4 + stored % 8 / 2][row / 8 + stored / 8 * 2];
            values[stored] = number(pair >> 16 * (stored % 2) & 0xffff, p.bfloat);
        }
        for (int n = lane % 4 * 2; n < TOKENS; n += n % 2 ? 7 : 1) {
            float& d = p.d[n / 8][row / 8 * 2 + n % 2];
            if (!p.keep) d = 0;
            if (p.overwritten || !rising) d = NAN;
            for (int stored = 0; stored < 16; ++stored) d += values[stored] * element(p, n, places[stored]);
        }
    }
}
inline void begin(const Product& p) {
    if (eager) return carry_out(p);
    auto overwrite = [&](std::vector<Product>& under_way) {
        for (Product& before : under_way) before.overwritten |= before.a == p.a;
    };
    for (std::vector<Product>& group : committed[current]) overwrite(group);
    overwrite(open_products[current]);
    open_products[current].push_back(p);
}
}  // namespace gpu

inline void barrier_init(unsigned barrier, unsigned arrivals) { gpu::own_barriers()[barrier] = {arrivals, arrivals}; }
inline void barrier_init_done() {}
inline void barrier_arrive(unsigned barrier) { gpu::arrive(gpu::barrier_at(barrier)); }
inline void barrier_arrive_expecting(unsigned barrier, unsigned bytes) {
    gpu::Barrier& at = gpu::barrier_at(barrier);
    gpu::make_room(at);
    at.bytes += bytes;
    gpu::arrive(at);
}
inline void barrier_wait(unsigned barrier, unsigned parity) {
    gpu::Barrier& at = gpu::barrier_at(barrier);
    for (long turns = 0; at.parity == parity; ++turns) {
        if (turns == 1'000'000) std::abort();  // nobody will ever arrive
        for (const auto& copy : std::exchange(at.copies, {})) copy();
        if (at.parity == parity) gpu::yield();
    }
}
inline void copy_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
    if (reinterpret_cast<std::uintptr_t>(from) % 16 || to % 16 || bytes % 16) std::abort();
    gpu::Barrier& at = gpu::barrier_at(barrier);
    gpu::begin(at, [=, &at] {
        std::memcpy(reinterpret_cast<char*>(shared) + to, from, bytes);
        at.bytes -= bytes;
        gpu::turn(at);
    });
}
// Rows of 128 bytes of a matrix, as the host's map for the 128-byte swizzle says: 64 numbers of 16 bits, TOKENS rows.
struct TensorMap {
    const char* matrix;
    unsigned columns, rows;
};
inline void copy_box(unsigned to, const TensorMap& map, unsigned x, unsigned y, unsigned barrier) {
    if (reinterpret_cast<std::uintptr_t>(map.matrix) % 16 || map.columns % 8 || to % 1024) std::abort();
    gpu::Barrier& at = gpu::barrier_at(barrier);
    gpu::begin(at, [=, &at] {
        for (unsigned row = 0; row < TOKENS; ++row)
            for (unsigned column = 0; column < 64; column += 8) {
                char* place = reinterpret_cast<char*>(shared) + to + row * 128 + (column / 8 ^ row % 8) * 16;
                std::memset(place, 0, 16);
                if (y + row >= map.rows || x + column >= map.columns) continue;
                std::memcpy(place, map.matrix + (static_cast<size_t>(y + row) * map.columns + x + column) * 2, 16);
            }
        at.bytes -= TOKENS * 128;
        gpu::turn(at);
    });
}
inline void prefetch_map(const TensorMap&) {}
inline unsigned cluster_size() { return gpu::cluster.size(); }
inline unsigned cluster_rank() { return blockIdx.x % gpu::cluster.size(); }
inline void meet_in_cluster() {
    gpu::fibers[gpu::current].in_cluster_barrier = true;
    gpu::yield();
}
inline float4 load_of_cta(unsigned rank, unsigned from) {
    if (from % 16 || from + 16 > sizeof shared || rank >= gpu::cluster.size()) std::abort();
    const char* memory = rank == cluster_rank() ? reinterpret_cast<const char*>(shared) : gpu::cluster[rank].memory.data();
    float4 out;
    std::memcpy(&out, memory + from, 16);
    return out;
}
inline unsigned warp_uniform(unsigned number) { return gpu::show(&number, 1)[0][0]; }
template <int> inline void give_registers() {}
template <int> inline void take_registers() {}

inline void wgmma_fence() {}
inline void wgmma_commit() {
    gpu::committed[gpu::current].push_back(std::exchange(gpu::open_products[gpu::current], {}));
}
template <int pending>
inline void wgmma_wait() {
    auto& groups = gpu::committed[gpu::current];
    for (; groups.size() > pending; groups.pop_front())
        for (const gpu::Product& product : groups.front()) gpu::carry_out(product);
}
template <int slabs> inline void wgmma_arrived(float (&)[slabs][4]) {}
inline unsigned long long describe_rows(unsigned shared) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | (shared & 0x3ffff) / 16; }

using Accumulators = float (&)[TOKENS / 8][4];
using Fragment = const unsigned (&)[4];
inline void wgmma_half(Accumulators d, Fragment a, unsigned long long b, bool keep) {
    gpu::begin(gpu::Product{d, a, b, keep, 1, 0, 0, false});
}
inline void wgmma_bfloat(Accumulators d, Fragment a, unsigned long long b, bool keep) {
    gpu::begin(gpu::Product{d, a, b, keep, 1, 0, 0, true});
}
template <int selector>
inline void wgmma_sparse_half(Accumulators d, Fragment a, unsigned long long b, unsigned e, bool keep) {
    gpu::begin(gpu::Product{d, a, b, keep, 2, e, selector, false});
}
template <int selector>
inline void wgmma_sparse_bfloat(Accumulators d, Fragment a, unsigned long long b, unsigned e, bool keep) {
    gpu::begin(gpu::Product{d, a, b, keep, 2, e, selector, true});
}
