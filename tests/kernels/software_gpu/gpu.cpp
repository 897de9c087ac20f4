// A GPU in software, for one kernel at a time: what runs a .cu of marlinctl/kernels/csrc on the CPU. kernel.cpp holds the kernel.
//
// The threads of a CTA are fibers (ucontext) that take turns; they change only where CUDA threads synchronize: at __syncthreads and
// at the instructions that a whole warp executes. CTAs run one after the other, in the order the test asks for; those of a cluster take
// turns, and its barrier opens when nothing is left of all of them but threads that wait for it.
//
// Everything asynchronous happens as late as the PTX ISA allows, or as early. As late: cp.async in wait_group, a bulk copy when somebody
// waits for its mbarrier, a wgmma in the wait for it (with what is in shared memory by then, and NaN, or of int8 a very large number,
// where its registers of A have been given to another one). As early: at once. A kernel that reads a stage too early is caught by the
// former, one that overwrites a stage too early by the latter.
//
// Fragment layouts are those of the PTX ISA as (row, column) of lane and register: "Matrix Fragments for mma.m16n8k16 with floating point
// type", "Matrix Fragments for mma.m16n8k32" (int8), "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types", "ldmatrix",
// "movmatrix", "Register Fragments for wgmma.mma_async.m64nNk16", "..k32" and "..sp", of which a warp's part is that of mma; operand B of
// wgmma: "Matrix Descriptor Format" and "Swizzling Modes". The barrier of a cluster, "barrier.cluster", waits only for threads that have
// not exited.
#include "fragments.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

dim3 threadIdx, blockIdx, gridDim;
uint4 shared[232448 / 16];

namespace gpu {
namespace {
constexpr unsigned STACK = 1 << 17;
constexpr int AHEAD_TURNS = 6;
constexpr int ROUNDS = 50;  // of all threads, before another CTA of the cluster has its turn

struct ThreadBarrier { unsigned waiting = 0, generation = 0; };
struct Copy { unsigned to; const void* from; bool inside; };
struct Fiber {
    ucontext_t context;  // for its first turn; later ones jump, because swapcontext asks the system for the signal mask each time
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool started, finished, in_cluster_barrier;
    const ThreadBarrier* waits_for;        // or null
    unsigned generation;                   // of that barrier, when the fiber came to it
    std::vector<Copy> open;                // copies since the last commit
    std::deque<std::vector<Copy>> groups;  // committed and not yet carried out
};
struct Mbarrier {
    unsigned arrivals, pending, parity = 0;
    long bytes = 0;                             // announced, and not yet copied
    std::vector<std::function<void()>> copies;  // under way
};
struct Product : Wgmma {  // under way
    unsigned values[4];   // of A, when the instruction was issued
    bool overwritten = false;
};

constexpr int BARRIERS = 16;  // of a CTA, by number
// What threads of a CTA give each other, and what is under way.
struct Exchange {
    ThreadBarrier all, first, named[BARRIERS], warps[32];
    unsigned numbers[32][2][32];  // [warp][even and odd generations of its barrier][lane]
    Operands operands[32][2][32];
    Bytes bytes[32][2][32];
    std::vector<Product> open_products[1024];         // of each thread, since the last commit
    std::deque<std::vector<Product>> committed[1024];
};
enum class State { RUNNING, WAITING, ENDED };  // WAITING: all threads that have not ended, for the cluster
struct Cta {  // of a cluster, while others of it run
    int index;
    State state;
    std::vector<Fiber> fibers;
    std::unique_ptr<Exchange> exchange;
    std::vector<char> memory;
};

Arguments arguments;
std::vector<Fiber> fibers;  // of the CTA that runs
std::vector<Cta> cluster;   // by rank
jmp_buf scheduler_place;
unsigned current;
bool eager;
std::unique_ptr<Exchange> own;              // of the CTA that runs
std::map<unsigned, Mbarrier> mbarriers[8];  // of each CTA of a cluster, by address

char* shared_bytes(unsigned address) { return reinterpret_cast<char*>(shared) + address; }

void yield() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler_place, 1);
}

// A turn of the current fiber: until it yields or ends.
void resume() {
    Fiber& fiber = fibers[current];
    if (_setjmp(scheduler_place)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

// True for the last of the members.
bool arrive(ThreadBarrier& barrier, unsigned members) {
    if (++barrier.waiting < members) return false;
    barrier.waiting = 0;
    ++barrier.generation;
    return true;
}
void sync(ThreadBarrier& barrier, unsigned members) {
    if (arrive(barrier, members)) return;
    Fiber& fiber = fibers[current];
    fiber.waits_for = &barrier;
    fiber.generation = barrier.generation;
    yield();
}

ThreadBarrier& named_barrier(unsigned number, unsigned threads) {
    if (number < 2 || number >= BARRIERS || threads % 32) std::abort();  // 0 is __syncthreads, 1 sync_threads
    return own->named[number];
}

void carry_out(const Copy& copy) {
    if (copy.inside) std::memcpy(shared_bytes(copy.to), copy.from, 16);
    else std::memset(shared_bytes(copy.to), 0, 16);
}

// This lane's part of D += A . B of an mma, where `b_registers` hold 16 rows of B in each two.
void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned* b, int b_registers, bool sparse, unsigned e, int selector, bool is_bfloat) {
    const unsigned warp = current / 32, lane = current % 32;
    const auto& all = own->operands[warp][own->warps[warp].generation % 2];
    Operands& mine = own->operands[warp][own->warps[warp].generation % 2][lane];
    widen(mine.a, a, 4, is_bfloat);
    widen(mine.b, b, b_registers, is_bfloat);
    mine.e = e;
    sync_warp();
    const Rows rows = rows_of_a(all, lane, sparse, selector);
    for (unsigned right = 0; right < 2; ++right) {
        float column[32];
        for (int k = 0; k < 8 * b_registers; ++k) column[k] = all[(lane % 4 * 2 + right) * 4 + k % 8 / 2].b[k / 8 * 2 + k % 2];
        for (int upper = 0; upper < 2; ++upper) add_product(d[upper * 2 + right], rows, upper, column);
    }
}

// Mbarriers

std::map<unsigned, Mbarrier>& own_mbarriers() { return mbarriers[cluster_rank()]; }
Mbarrier& mbarrier_at(unsigned address) {
    const auto found = own_mbarriers().find(address);
    if (found == own_mbarriers().end()) std::abort();  // not initialised
    return found->second;
}
void end_phase_if_complete(Mbarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.arrivals;
    barrier.parity ^= 1;
}
void carry_out_copies(Mbarrier& barrier) {
    for (const auto& copy : std::exchange(barrier.copies, {})) copy();
}
void expect_arrival(Mbarrier& barrier) {
    if (barrier.pending) return;
    carry_out_copies(barrier);  // the last moment for those of this phase
    if (barrier.pending == 0) std::abort();  // more arrivals than the phase has
}
void begin(Mbarrier& barrier, std::function<void()> copy) {
    if (eager) copy();
    else barrier.copies.push_back(std::move(copy));
}

// The 16 bytes of B in column n of D, from byte `at` of the product's rows on.
void load_b(void* to, const Product& p, unsigned n, unsigned at) {
    if (p.b >> 62 != 1) std::abort();  // not the 128-byte swizzle
    const unsigned start = (p.b & 0x3fff) * 16, eight_rows = (p.b >> 32 & 0x3fff) * 16;
    unsigned address = start + n / 8 * eight_rows + n % 8 * 128 + at;
    address ^= (address >> 7 & 7) << 4;
    std::memcpy(to, shared_bytes(address), 16);
}

void carry_out_int8(const Product& p) {
    const unsigned warp = current / 32, lane = current % 32;
    const auto& all = own->bytes[warp][own->warps[warp].generation % 2];
    Bytes& mine = own->bytes[warp][own->warps[warp].generation % 2][lane];
    std::memcpy(mine.a, p.values, sizeof p.values);
    mine.e = p.e;
    sync_warp();
    const ByteRows rows = rows_of_bytes(all, lane, p.sparse);
    for (unsigned n = lane % 4 * 2; n < p.columns; n += n % 2 ? 7 : 1) {
        const int count = p.sparse ? 64 : 32;
        int8_t column[64];
        for (int k = 0; k < count; k += 16) load_b(column + k, p, n, k);
        int wide[64];
        for (int k = 0; k < count; ++k) wide[k] = column[k];
        for (int upper = 0; upper < 2; ++upper) {
            int& d = p.sums[n / 8][upper * 2 + n % 2];
            if (!p.keep) d = 0;
            if (p.overwritten) d = OVERWRITTEN;
            add_product(d, rows, upper, wide);
        }
    }
}

void carry_out(const Product& p) {
    if (p.sums) return carry_out_int8(p);
    const unsigned warp = current / 32, lane = current % 32;
    const auto& all = own->operands[warp][own->warps[warp].generation % 2];
    Operands& mine = own->operands[warp][own->warps[warp].generation % 2][lane];
    widen(mine.a, p.values, 4, p.bfloat);
    mine.e = p.e;
    sync_warp();
    const Rows rows = rows_of_a(all, lane, p.sparse, p.selector);
    for (unsigned n = lane % 4 * 2; n < p.columns; n += n % 2 ? 7 : 1) {
        float column[32];
        for (unsigned k = 0; k < (p.sparse ? 32 : 16); k += 8) {
            unsigned pairs[4];
            load_b(pairs, p, n, k * 2);
            widen(column + k, pairs, 4, p.bfloat);
        }
        for (int upper = 0; upper < 2; ++upper) {
            float& d = p.d[n / 8][upper * 2 + n % 2];
            if (!p.keep) d = 0;
            if (p.overwritten) d = NAN;
            add_product(d, rows, upper, column);
        }
    }
}

// CTAs

void thread_main() {
    run_thread(arguments);
    fibers[current].finished = true;
    _longjmp(scheduler_place, 1);
}

// Puts in place what belongs to one CTA, or puts it away again.
void exchange_cta(Cta& cta) {
    std::swap(fibers, cta.fibers);
    std::swap(own, cta.exchange);
    std::swap_ranges(cta.memory.begin(), cta.memory.end(), shared_bytes(0));
}

// Shared memory which must not be read: before a CTA has started and after it has ended.
void forget_memory(Cta& cta) { cta.memory.assign(sizeof shared, '\xff'); }

void start(Cta& cta, int index) {
    cta.index = index;
    forget_memory(cta);
    mbarriers[index % cluster.size()].clear();
    cta.exchange.reset(new Exchange);
    cta.state = State::RUNNING;
    cta.fibers.resize(CTA_THREADS);
    for (Fiber& fiber : cta.fibers) {
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;  // its end jumps
        makecontext(&fiber.context, thread_main, 0);
        fiber.started = fiber.finished = fiber.in_cluster_barrier = false;
        fiber.waits_for = nullptr;
        fiber.open.clear();
        fiber.groups.clear();
    }
}

// Until all threads have ended or wait for the cluster, or ROUNDS of them where others of it wait for their turn.
void run(Cta& cta, bool backwards) {
    blockIdx.x = cta.index;
    exchange_cta(cta);
    bool waiting = false, running = true;
    for (int round = 0; running && (round < ROUNDS || cluster.size() == 1); ++round) {
        bool resumed = running = waiting = false;
        // Backwards, a warp has several turns before the next has one: they drift apart.
        for (unsigned j = 0; j < CTA_THREADS * (backwards ? AHEAD_TURNS : 1); ++j) {
            const unsigned warp = backwards ? j / (32 * AHEAD_TURNS) : j / 32, thread = warp * 32 + j % 32;
            current = threadIdx.x = backwards ? CTA_THREADS - 1 - thread : thread;
            Fiber& fiber = fibers[current];
            waiting |= fiber.in_cluster_barrier;
            if (fiber.finished || fiber.in_cluster_barrier) continue;
            running = true;
            if (fiber.waits_for && fiber.waits_for->generation == fiber.generation) continue;
            fiber.waits_for = nullptr;
            resumed = true;
            resume();
        }
        if (running && !resumed && !waiting) std::abort();  // all wait for a barrier that no other thread reaches
    }
    exchange_cta(cta);
    cta.state = running ? State::RUNNING : waiting ? State::WAITING : State::ENDED;
}
}  // namespace

void sync_cta() { sync(own->all, CTA_THREADS); }
void sync_first(unsigned threads) { sync(own->first, threads); }
void sync_named(unsigned number, unsigned threads) { sync(named_barrier(number, threads), threads); }
void arrive_named(unsigned number, unsigned threads) { arrive(named_barrier(number, threads), threads); }
void sync_warp() { sync(own->warps[current / 32], 32); }
void sync_cluster() {
    fibers[current].in_cluster_barrier = true;
    yield();
}
const Lanes& exchange(unsigned number) {
    // Whoever writes here again, two generations later, has seen all lanes come to the one between: they have read what they wanted.
    const unsigned warp = current / 32;
    auto& all = own->numbers[warp][own->warps[warp].generation % 2];
    all[current % 32] = number;
    sync_warp();
    return all;
}

void copy_async(unsigned to, const void* from, bool inside) {
    if (reinterpret_cast<uintptr_t>(from) % 16 || to % 16) std::abort();  // misaligned address
    if (eager) carry_out(Copy{to, from, inside});
    else fibers[current].open.push_back({to, from, inside});
}
void copy_async_commit() {
    Fiber& fiber = fibers[current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
void copy_async_wait(unsigned pending) {
    auto& groups = fibers[current].groups;
    for (; groups.size() > pending; groups.pop_front())
        for (const Copy& copy : groups.front()) carry_out(copy);
}
void load_matrices(unsigned* registers, unsigned address, int matrices) {
    const Lanes& all = exchange(address);
    const int lane = current % 32;
    for (int matrix = 0; matrix < matrices; ++matrix)
        std::memcpy(&registers[matrix], shared_bytes(all[matrix * 8 + lane / 4] + lane % 4 * 4), 4);
}
unsigned transpose(unsigned pair) {
    const Lanes& all = exchange(pair);
    const int lane = current % 32, row = lane / 4, column = lane % 4 * 2;
    auto at = [&](int r, int c) { return all[r * 4 + c / 2] >> 16 * (c % 2) & 0xffff; };
    return at(column, row) | at(column + 1, row) << 16;
}
void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bool bfloat) {
    const unsigned b[2] = {b0, b1};
    multiply(d, a, b, 2, false, 0, 0, bfloat);
}
void mma_int8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned warp = current / 32, lane = current % 32;
    const auto& all = own->bytes[warp][own->warps[warp].generation % 2];
    own->bytes[warp][own->warps[warp].generation % 2][lane] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    sync_warp();
    const ByteRows rows = rows_of_bytes(all, lane, false);
    for (unsigned right = 0; right < 2; ++right) {
        int column[32];  // lane 4 n + t has k = 4 t .. 4 t + 3 of column n, and 16 more
        for (int k = 0; k < 32; ++k) column[k] = int8_of(all[(lane % 4 * 2 + right) * 4 + k % 16 / 4].b[k / 16], k % 4);
        for (int upper = 0; upper < 2; ++upper) add_product(d[upper * 2 + right], rows, upper, column);
    }
}
void mma_sparse(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned e, int selector, bool bfloat) {
    multiply(d, a, b, 4, true, e, selector, bfloat);
}

void barrier_init(unsigned barrier, unsigned arrivals) { own_mbarriers()[barrier] = {arrivals, arrivals}; }
void barrier_arrive(unsigned barrier, unsigned expected_bytes) {
    Mbarrier& at = mbarrier_at(barrier);
    expect_arrival(at);
    at.bytes += expected_bytes;
    --at.pending;
    end_phase_if_complete(at);
}
void barrier_arrive_at(unsigned rank, unsigned barrier) {
    const auto found = mbarriers[rank].find(barrier);
    if (rank >= cluster.size() || found == mbarriers[rank].end() || found->second.pending == 0) std::abort();
    --found->second.pending;
    end_phase_if_complete(found->second);
}
void barrier_wait(unsigned barrier, unsigned parity) {
    Mbarrier& at = mbarrier_at(barrier);
    for (long turns = 0; at.parity == parity; ++turns) {
        if (turns == 1'000'000) std::abort();  // no thread will ever arrive
        carry_out_copies(at);
        if (at.parity == parity) yield();
    }
}
void copy_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
    if (reinterpret_cast<uintptr_t>(from) % 16 || to % 16 || bytes % 16) std::abort();
    Mbarrier& at = mbarrier_at(barrier);
    begin(at, [=, &at] {
        std::memcpy(shared_bytes(to), from, bytes);
        at.bytes -= bytes;
        end_phase_if_complete(at);
    });
}
void copy_blocks(unsigned to, const TensorMap& map, unsigned block, unsigned row, unsigned barrier, unsigned box_blocks, unsigned box_rows) {
    if (reinterpret_cast<uintptr_t>(map.matrix) % 16 || to % 128) std::abort();
    Mbarrier& at = mbarrier_at(barrier);
    begin(at, [=, &at] {
        for (unsigned i = 0; i < box_rows; ++i)
            for (unsigned j = 0; j < box_blocks; ++j) {
                char* place = shared_bytes(to) + (i * box_blocks + j) * 512;
                std::memset(place, 0, 512);
                if (row + i >= map.rows || block + j >= map.columns) continue;
                std::memcpy(place, map.matrix + (static_cast<size_t>(row + i) * map.columns + block + j) * 512, 512);
            }
        at.bytes -= box_rows * box_blocks * 512;
        end_phase_if_complete(at);
    });
}
// As the host's map for the 128-byte swizzle says: a row of the box is 128 bytes, 64 numbers or 128.
void copy_box(unsigned to, const TensorMap& map, unsigned x, unsigned y, unsigned barrier, unsigned box_rows, unsigned rank) {
    const unsigned in_16_bytes = 16 / map.number_bytes;
    if (reinterpret_cast<uintptr_t>(map.matrix) % 16 || map.columns % in_16_bytes || to % 1024) std::abort();
    const auto found = mbarriers[rank].find(barrier);
    if (found == mbarriers[rank].end()) std::abort();
    Mbarrier& at = found->second;
    begin(at, [=, &at] {
        char* const memory = rank == cluster_rank() ? shared_bytes(0) : cluster[rank].memory.data();
        for (unsigned row = 0; row < box_rows; ++row)
            for (unsigned chunk = 0; chunk < 8; ++chunk) {
                char* place = memory + to + row * 128 + (chunk ^ row % 8) * 16;
                std::memset(place, 0, 16);
                const unsigned column = x + chunk * in_16_bytes;
                if (y + row >= map.rows || column >= map.columns) continue;
                std::memcpy(place, map.matrix + (static_cast<size_t>(y + row) * map.columns + column) * map.number_bytes, 16);
            }
        at.bytes -= box_rows * 128;
        end_phase_if_complete(at);
    });
}
unsigned cluster_size() { return cluster.size(); }
unsigned cluster_rank() { return blockIdx.x % cluster.size(); }
float4 load_of_cta(unsigned rank, unsigned from) {
    if (from % 16 || from + 16 > sizeof shared || rank >= cluster.size()) std::abort();
    float4 out;
    std::memcpy(&out, rank == cluster_rank() ? shared_bytes(from) : cluster[rank].memory.data() + from, 16);
    return out;
}

void wgmma(const Wgmma& instruction) {
    Product product{instruction};
    std::memcpy(product.values, instruction.a, sizeof product.values);
    if (eager) return carry_out(product);
    auto overwrite = [&](std::vector<Product>& under_way) {
        // A fragment may be multiplied twice at once: then its registers hold what they held.
        for (Product& before : under_way) {
            before.overwritten |= before.a == instruction.a && std::memcmp(before.values, product.values, sizeof product.values);
        }
    };
    for (std::vector<Product>& group : own->committed[current]) overwrite(group);
    overwrite(own->open_products[current]);
    own->open_products[current].push_back(product);
}
void wgmma_commit() { own->committed[current].push_back(std::exchange(own->open_products[current], {})); }
void wgmma_wait(unsigned pending) {
    auto& groups = own->committed[current];
    for (; groups.size() > pending; groups.pop_front())
        for (const Product& product : groups.front()) carry_out(product);
}
}  // namespace gpu

// `order`: the CTAs in the order in which they run, `cluster` neighbours of the grid after each other. `backwards`: the last thread of a
// CTA goes first, and its warp a few steps ahead. Shared memory starts as garbage (0xff: NaN), and is garbage again when its CTA has ended.
extern "C" __attribute__((visibility("default"))) void launch(
    Arguments given, const int* order, int ctas, int cluster_ctas, bool eager, bool backwards
) {
    using namespace gpu;
    arguments = given;
    gpu::eager = eager;
    gridDim.x = ctas;
    cluster.resize(cluster_ctas);
    for (int first = 0; first < ctas; first += cluster_ctas) {
        std::vector<Cta*> left;
        for (int i = first; i < first + cluster_ctas; ++i) {
            if (order[i] / cluster_ctas != order[first] / cluster_ctas) std::abort();  // no neighbours
            left.push_back(&cluster[order[i] % cluster_ctas]);
            start(*left.back(), order[i]);
        }
        while (!left.empty()) {
            std::vector<Cta*> running, waiting;
            for (Cta* cta : left) {
                if (cta->state == State::RUNNING) run(*cta, backwards);
                if (cta->state == State::RUNNING) running.push_back(cta);
                if (cta->state == State::WAITING) waiting.push_back(cta);
                if (cta->state == State::ENDED) forget_memory(*cta);
            }
            if (running.empty()) {  // whoever has not ended has arrived: the barrier opens
                for (Cta* cta : waiting) {
                    cta->state = State::RUNNING;
                    for (Fiber& fiber : cta->fibers) fiber.in_cluster_barrier = false;
                }
            }
            left.erase(std::remove_if(left.begin(), left.end(), [](Cta* cta) { return cta->state == State::ENDED; }), left.end());
        }
    }
}
