// How the CTAs of a grid share the work, and how one CTA walks through its share with copies under way.
//
// STRIPES.  The work is a row of units, (tile of n, tile of m, step of k) with k fastest, cut into equal runs, one for each
// CTA, wherever the cuts fall:
//
//   units   | tile 0: k 0 1 2 3 | tile 1: k 0 1 2 3 | tile 2: k 0 1 2 3 |
//   CTAs    |     0     |     1     |     2     |     3     |          (3 units each)
//
// A tile that several CTAs share is put together by `complete` (tile.cuh).
#pragma once
#include "ptx.cuh"

// A place in the row of units.
struct Cursor {
    int slice, token_tile, step;  // columns, tokens, k
};

struct Stripes {
    int token_tiles, steps;
    int run, longer;  // units of a CTA; the first `longer` CTAs take one unit more
    int begin, end;   // of this CTA

    __device__ __forceinline__ Stripes(int slices, int token_tiles, int steps) : token_tiles(token_tiles), steps(steps) {
        const int units = slices * token_tiles * steps;
        run = units / gridDim.x, longer = units % gridDim.x;
        const int cta = cta_index();
        begin = cta * run + min(cta, longer);
        end = begin + run + (cta < longer ? 1 : 0);
    }

    __device__ __forceinline__ Cursor at(int unit) const {
        const int tile = unit / steps;
        return Cursor{tile / token_tiles, tile % token_tiles, unit % steps};
    }

    __device__ __forceinline__ void advance(Cursor& at) const {
        if (++at.step == steps) {
            at.step = 0;
            if (++at.token_tile == token_tiles) {
                at.token_tile = 0;
                ++at.slice;
            }
        }
    }

    __device__ __forceinline__ int cta_of(int unit) const {
        const int in_longer = longer * (run + 1);
        return unit < in_longer ? unit / (run + 1) : longer + (unit - in_longer) / run;
    }
};

// The main loop, STAGES deep, one barrier per stage (u counts units of this CTA, S = STAGES):
//
//   cp.async   | u, u+1 .. u+S-2 under way  | u+S-1 ..
//   warps      | wait for u, barrier        | multiply u | at the end of an output tile, or of the run: finish
//
// fetch_weights(cursor, stage) issues the copies of what belongs to the model, fetch_activations those of what the kernel before this one
// may still be writing, and read_first_activations() fills the first stages with them; multiply(stage, step) is this warp's part of a unit, and
// finish(unit, stage, step) writes the sums and starts new ones.
//
// The first weights are under way before the kernel waits for the one before it. The activations of these stages are read and stored
// without cp.async: groups of copies complete in the order in which they were sent, and stage 0 would wait for the weights of all.
template <class FetchWeights, class FetchActivations, class ReadFirst, class Multiply, class Finish>
__device__ __forceinline__ void walk(
    const Stripes& stripes, FetchWeights fetch_weights, FetchActivations fetch_activations, ReadFirst read_first_activations,
    Multiply multiply, Finish finish
) {
    Cursor fetching = stripes.at(stripes.begin);
    int step = fetching.step;
    let_next_kernel_start();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stripes.begin + stage < stripes.end) {
            fetch_weights(fetching, stage);
            stripes.advance(fetching);
        }
        copy_async_commit();
    }
    wait_for_previous_kernel();
    read_first_activations();
    int stage = 0;
    for (int unit = stripes.begin; unit < stripes.end; ++unit) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // everybody's copies have arrived, and everybody is done with the stage that is filled next
        if (unit + STAGES - 1 < stripes.end) {
            const int free = stage == 0 ? STAGES - 1 : stage - 1;
            fetch_weights(fetching, free);
            fetch_activations(fetching, free);
            stripes.advance(fetching);
        }
        copy_async_commit();
        multiply(stage, step);
        if (step == stripes.steps - 1 || unit == stripes.end - 1) finish(unit, stage, step);
        step = step == stripes.steps - 1 ? 0 : step + 1;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
}
