// How the CTAs of a grid share the work, and the pipelined loop of one CTA over its share.
//
// STRIPES.  The work is a row of units, (tile of n, tile of m, step of k) with k fastest, cut into equal runs, one for each
// CTA, wherever the cuts fall:
//
//   units   | tile 0: k 0 1 2 3 | tile 1: k 0 1 2 3 | tile 2: k 0 1 2 3 |
//   CTAs    |     0     |     1     |     2     |     3     |          (3 units each)
//
// The partial sums of a tile that several CTAs share are reduced by `complete` (tile.cuh), which costs more than any other step: they go
// to memory and back. So a CTA may be given `whole` tiles of its own, and only the units before these are cut into runs:
//
//   units   | tile 0: k 0 1 2 3 | tile 1: .. | tile 2: .. | tile 3: .. | tile 4: .. |      whole = 2, two CTAs
//   CTAs    |    0    |    1    |     0      |     1      |     0      |     1      |
//
// Its run of the cut tiles comes first: while some CTAs reduce, others compute whole tiles. The tile of m is the fastest of the two, and whole
// tiles are dealt out in turn. So CTAs that work at the same time have the same weights, as many as there are tiles of m, and all tiles of m
// near the same k: both come from memory once. With consecutive tiles for each CTA every tile of m read the weights again, and 4,096 tokens
// took a tenth longer (73728 x 18432, int8; docs/log/2026-12-01-copies-and-order.md).
//
// PAIRS.  On Hopper two CTAs of a cluster may be a pair: neighbouring tiles of n with the same tokens and the same k, so that each copies
// half of the activations, to both (pipeline_sm90.cuh). Then what is cut into runs is pairs of tiles, and CTAs below are pairs of CTAs.
#pragma once
#include "ptx.cuh"

#ifndef PAIRED
#define PAIRED 0
#endif
constexpr int PAIR = PAIRED ? 2 : 1;

// Of the CTA in its pair.
__device__ __forceinline__ unsigned rank_in_pair() { return PAIRED ? cta_index() % PAIR : 0; }

// A place in the row of units, and the unit's number.
struct Cursor {
    int slice, token_tile, step;  // columns, tokens, k
    int unit;
};

// The first and the last CTA of a tile; equal where it has one alone.
struct Sharers {
    int first, last;
};

struct Stripes {
    int token_tiles, steps;
    int cut;          // tiles that are cut into runs, before the whole ones
    int run, longer;  // units of a CTA's run; the first `longer` CTAs take one unit more
    int begin, jump;  // of this CTA: its first unit, and where its run ends
    int resume, end;  // and where its whole tiles begin and end; both are `jump` where it has none
    int others;       // units between two of its whole tiles

    __device__ __forceinline__ Stripes(int slices, int token_tiles, int steps, int whole) : token_tiles(token_tiles), steps(steps) {
        const int ctas = cta_count() / PAIR, cta = cta_index() / PAIR;
        cut = (slices + PAIR - 1) / PAIR * token_tiles - whole * ctas;
        const int units = cut * steps;
        run = units / ctas, longer = units % ctas;
        begin = cta * run + min(cta, longer);
        jump = begin + run + (cta < longer ? 1 : 0);
        others = (ctas - 1) * steps;
        resume = whole ? units + cta * steps : jump;
        end = whole ? resume + (whole - 1) * ctas * steps + steps : jump;
        if (begin == jump) begin = resume;
    }

    __device__ __forceinline__ Cursor at(int unit) const {
        const int tile = unit / steps;
        const int slice = tile / token_tiles * PAIR + static_cast<int>(rank_in_pair());
        return Cursor{slice, tile % token_tiles, unit % steps, unit};
    }

    __device__ __forceinline__ Cursor first() const { return at(begin); }

    __device__ __forceinline__ bool inside(const Cursor& at) const { return at.unit < end; }

    // It may advance beyond `end`; those cursors are not used.
    __device__ __forceinline__ void advance(Cursor& at) const {
        if (++at.unit == jump) {
            at = this->at(resume);
        } else if (++at.step == steps) {
            at = this->at(at.unit > resume ? at.unit + others : at.unit);
        }
    }

    // Whether this CTA's part of a tile ends with the unit, which is step `step` of its tile.
    __device__ __forceinline__ bool ends_part(int unit, int step) const { return step == steps - 1 || unit + 1 == jump; }

    // The next unit of this CTA after the last one of a part.
    __device__ __forceinline__ int after_part(int unit) const {
        return unit + 1 == jump ? resume : unit + 1 > resume ? unit + 1 + others : unit + 1;
    }

    // The same, or NONE at the end.
    static constexpr int NONE = -1;
    __device__ __forceinline__ int begin_or_none() const { return begin < end ? begin : NONE; }
    __device__ __forceinline__ int after_or_none(int unit) const { return after_part(unit) < end ? after_part(unit) : NONE; }

    // Where this CTA's part of the tile of a unit ends: one behind its last unit.
    __device__ __forceinline__ int part_end(int unit) const {
        const int tile_end = (unit / steps + 1) * steps;
        return unit < jump ? min(tile_end, jump) : tile_end;
    }

    // The CTA that computes a unit of a cut tile.
    __device__ __forceinline__ int cta_of(int unit) const {
        const int in_longer = longer * (run + 1);
        return unit < in_longer ? unit / (run + 1) : longer + (unit - in_longer) / run;
    }

    __device__ __forceinline__ Sharers sharers(int tile) const {
        if (tile >= cut) return Sharers{0, 0};
        return Sharers{cta_of(tile * steps), cta_of((tile + 1) * steps - 1)};
    }
};

// The main loop, STAGES deep, one barrier per stage (u counts units of this CTA, S = STAGES):
//
//   cp.async   | u, u+1 .. u+S-2 in flight  | u+S-1 ..
//   warps      | wait for u, barrier        | multiply u | at the end of an output tile, or of the run: finish
//
// fetch_weights(cursor, stage) issues the copies of weights and scales, fetch_activations those of activations, which the previous kernel
// may still be writing, and read_first_activations() fills the first stages with them; multiply(stage, step) is this warp's part of a unit,
// and finish(unit, stage, step) writes the sums and zeroes them.
//
// The copies of the first weights are issued before the kernel waits for the previous one. The activations of these stages are copied
// without cp.async: its groups complete in the order of issue, and stage 0 would wait for the weights of all stages.
template <class FetchWeights, class FetchActivations, class ReadFirst, class Multiply, class Finish>
__device__ __forceinline__ void run_stages(
    const Stripes& stripes, FetchWeights fetch_weights, FetchActivations fetch_activations, ReadFirst read_first_activations,
    Multiply multiply, Finish finish
) {
    Cursor fetching = stripes.first();
    int step = fetching.step;
    let_next_kernel_start();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stripes.inside(fetching)) {
            fetch_weights(fetching, stage);
            stripes.advance(fetching);
        }
        copy_async_commit();
    }
    wait_for_previous_kernel();
    read_first_activations();
    int stage = 0;
    for (int unit = stripes.begin; unit < stripes.end;) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // all threads' copies have arrived, and all warps have read the stage that is filled next
        if (stripes.inside(fetching)) {
            const int free = stage == 0 ? STAGES - 1 : stage - 1;
            fetch_weights(fetching, free);
            fetch_activations(fetching, free);
            stripes.advance(fetching);
        }
        copy_async_commit();
        multiply(stage, step);
        const bool last = stripes.ends_part(unit, step);
        if (last) finish(unit, stage, step);
        step = last ? 0 : step + 1;
        unit = last ? stripes.after_part(unit) : unit + 1;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
}
