// Hopper: warps that copy and warps that multiply, and the ring of stages between them.
//
// A CTA has THREADS consumers that multiply, two or three warpgroups, and after them one producer warpgroup that copies and releases most of
// its registers (setmaxnreg):
//
//   warp 0 of it       weights, boxes of a tensor map, and (metadata and) scales, contiguous runs, by the copy engine (cp.async.bulk)
//   warp 1             activations, boxes of a tensor map, into the 128-byte swizzle that wgmma reads (cp.async.bulk.tensor)
//   warps 2 and 3      let the next kernel start; they exist because setmaxnreg applies to four warps at once
//
//   stage          0         1         2         0         1    ..            STAGES = 3, u counts units of this CTA
//   weights     | u=0     | u=1     | u=2     | wait for empty[0], u=3 | ..
//   activations | u=0     | u=1     | u=2     | wait for empty[0], u=3 | ..
//   multiply    | wait for full[0] .. u=0 .. arrive at empty[0] | wait for full[1] .. | ..
//
// full[stage] completes a phase when all bytes of both have arrived, empty[stage] when every consumer warp has arrived.
//
// WHY TENSOR MAPS.  Of weights: a stage has eight to 32 rows of words, runs of 1 to 4 KB. A copy each, which the copy engine works off one after
// another, kept the activations waiting behind them: 4096 x 14336 took 22.4 us at M = 64 and 28.4 at 96, with one box for all of them 19.0 and
// 24.6 (NVIDIA H200, 2026-12-01, docs/log/2026-12-01-copies-and-order.md).
//
// Of activations: the host makes one for each address, which takes microseconds for a new address. Two warps with cp.async need none; no
// warp waited for them, and up to 32 tokens they are as fast. But 128 tokens took 651 us with them and 549 with a map, 64 tokens 383
// and 355, 128 tokens of 2:4 466 and 382 (73728 x 18432, alternating): an H200 under load is limited by its 700 W power cap, and copies by
// threads presumably take more power.
//
// PAIRED.  Warp 1 of each CTA of a pair (stripes.cuh) copies half of the tokens to the same place in both (multicast), so a stage is full when
// both have copied, and is filled again when the consumers of both have read it: they arrive at the barriers of both.
//
// PROGRAMMATIC DEPENDENT LAUNCH.  Weights do not depend on the previous kernel; activations and the workspace may. So warp 0 starts at
// once, and the others wait for the previous kernel first. A CTA of the next kernel becomes resident when one of this kernel has exited,
// and fetches its weights while other CTAs of this kernel still reduce. Without the launch attribute these instructions do nothing.
#pragma once
#include "tile.cuh"
#include "ptx_sm90.cuh"

// A warp has read a stage when its lanes have synchronized (__syncwarp), and then one lane arrives for all. compute-sanitizer's racecheck
// tracks barriers but not __syncwarp: for it (benchmarks/sanitize_marlin.py) every lane arrives for itself.
#ifndef EVERY_LANE_ARRIVES
#define EVERY_LANE_ARRIVES 0
#endif
constexpr int ARRIVING_LANES = EVERY_LANE_ARRIVES ? 32 : 1;

// A kernel says so, before it includes this, where addresses of metadata would not fit the fewest registers of copying warps.
#ifndef COPIES_METADATA
#define COPIES_METADATA 0
#endif

constexpr bool GROUPED = GROUP_SHIFT >= 0;
constexpr bool SCALE_SUMS = !WHOLE_SUMS && (EIGHT_BIT || (GROUPED && !SCALE_WEIGHTS));
constexpr int COPY_THREADS = 128;
constexpr int RING_BYTES = 16 * STAGES;         // full and empty, 8 bytes each
// Registers of a thread when a CTA starts, in steps of 8. setmaxnreg can only redistribute these: asking for more would never return.
constexpr int START_REGISTERS = 65536 / CTAS / (THREADS + COPY_THREADS) / 8 * 8;
constexpr int COPY_REGISTERS = THREADS * CTAS != 256 || (EIGHT_BIT && COPIES_METADATA) ? 32 : EIGHT_BIT ? 24 : 40;
constexpr int MULTIPLY_REGISTERS = (START_REGISTERS * (THREADS + COPY_THREADS) - COPY_REGISTERS * COPY_THREADS) / THREADS / 8 * 8;

static_assert(COLUMN_WARPS % 4 == 0, "the warps of a warpgroup share their activations, and so their part of k");
constexpr int ROW_K = 128 / ACTIVATION_SIZE;    // of activations, 128 bytes
static_assert(K_STEP % ROW_K == 0, "128 bytes of each row of activations lie together");

// The barriers of the stages.
struct Ring {
    unsigned barriers;

    __device__ __forceinline__ unsigned full(int stage) const { return barriers + 16 * stage; }
    __device__ __forceinline__ unsigned empty(int stage) const { return barriers + 16 * stage + 8; }

    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full(stage), 2);  // weights, activations
            barrier_init(empty(stage), THREADS / 32 * ARRIVING_LANES * PAIR);
        }
        barrier_init_done();
    }
};

// A warp's position in the ring: the stage, and the parity of the number of rounds.
struct Place {
    int stage = 0;
    unsigned parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The loop of a copying warp: fetch(cursor, stage) issues its copies of a unit, and its arrivals.
template <class Fetch>
__device__ __forceinline__ void produce(const Stripes& stripes, const Ring& ring, Fetch fetch) {
    Place place;
    for (Cursor at = stripes.first(); stripes.inside(at); stripes.advance(at)) {
        barrier_wait(ring.empty(place.stage), place.parity ^ 1);
        fetch(at, place.stage);
        place.advance();
    }
}

// A stage that a consumer warp has not released yet.
struct UnreleasedStage {
    const Ring& ring;
    unsigned lane;
    int stage;

    __device__ __forceinline__ void release() {
        __syncwarp();
        if (PAIRED && stage >= 0) {
#pragma unroll
            for (unsigned i = lane; i < 2 * ARRIVING_LANES; i += 32) barrier_arrive_at(i / ARRIVING_LANES, ring.empty(stage));
        }
        if (!PAIRED && lane < ARRIVING_LANES && stage >= 0) barrier_arrive(ring.empty(stage));
        stage = -1;
    }
};

// The loop of a consumer warp. multiply(stage, before) multiplies a stage; where wgmma are still running at its end, it releases the
// previous stage when the products of that one have completed. finish(stripes, unit) is as in run_stages.
//
// The outer loop is over parts, a part being what this CTA computes of one tile. Registers are scarce in the inner loop, so it knows only
// the end of the part, and the stripes are computed again before the end of each part and after it.
template <class MakeStripes, class Multiply, class Finish>
__device__ __forceinline__ void consume(MakeStripes make_stripes, const Ring& ring, const ThreadRole& role, Multiply multiply, Finish finish) {
    Place place;
    UnreleasedStage unreleased{ring, role.lane, -1};
    int unit = make_stripes().begin_or_none();
    while (unit != Stripes::NONE) {
        const int end = make_stripes().part_end(unit);
        do {
            barrier_wait(ring.full(place.stage), place.parity);
            multiply(place.stage, unreleased);
            unreleased.stage = place.stage;
            if (SCALE_SUMS) unreleased.release();
            place.advance();
        } while (++unit != end);
        wgmma_wait<0>();
        unreleased.release();
        finish(make_stripes(), unit - 1);
        unit = make_stripes().after_or_none(unit - 1);
    }
}

// Of a tile's blocks of 64 columns those that the matrix has. The second CTA of a pair may have none.
__device__ __forceinline__ unsigned blocks_inside(unsigned first_block, unsigned n_blocks) {
    if (PAIRED && first_block >= n_blocks) return 0;
    return min(static_cast<unsigned>(BLOCKS), n_blocks - first_block);
}

// Copies rows of a matrix of blocks into a stage, by the copy engine: of each row `blocks` consecutive blocks. Instead of rows beyond the
// last one it copies the last one: activations are zero there.
template <int ROWS, int BLOCK_BYTES>
__device__ __forceinline__ void copy_rows(
    unsigned to, const char* from, unsigned first_row, unsigned rows, unsigned row_blocks, unsigned first_block, unsigned blocks,
    unsigned full, unsigned lane
) {
    for (unsigned i = lane; i < ROWS && (!PAIRED || blocks); i += 32) {
        const size_t row = min(first_row + i, rows - 1);
        copy_bulk(to + i * (BLOCKS * BLOCK_BYTES), from + (row * row_blocks + first_block) * BLOCK_BYTES, blocks * BLOCK_BYTES, full);
    }
}

// Copies activations [M, K] into a stage: [K_STEP/ROW_K][TOKENS] rows of 128 bytes, swizzled. Out of bounds they become zeros, which add
// nothing. Called by one lane, after it has announced ACTIVATION_BYTES.
__device__ __forceinline__ void copy_activations(const TensorMap& activations, const Cursor& at, unsigned to, unsigned full) {
    for (int part = 0; part < K_STEP / ROW_K; ++part) {
        const unsigned first = rank_in_pair() * (TOKENS / PAIR);
        if (PAIRED) {
            const unsigned x = at.step * K_STEP + part * ROW_K, y = at.token_tile * TOKENS + first;
            copy_box_to_pair(to + part * (TOKENS * 128) + first * 128, activations, x, y, full);
            continue;
        }
        copy_box(to + part * (TOKENS * 128), activations, at.step * K_STEP + part * ROW_K, at.token_tile * TOKENS, full);
    }
}

// After a wait, before the sums are read.
__device__ __forceinline__ void arrived(Sums& sums) {
#pragma unroll
    for (int word = 0; word < WORDS; ++word) wgmma_arrived(sums[word]);
}
