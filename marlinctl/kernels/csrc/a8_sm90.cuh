// What the kernels for int8 activations on Hopper have in common: what a stage holds. marlin_a8_sm90.cu explains it. Of a policy, Weights, it needs
//
//   TILE_K       k of a row of words; two rows are a step, 2 TILE_K of k, which one product of the tensor core takes
//   META_BYTES   of metadata, for a row of words of 64 columns; 0: none
#pragma once
#include "cluster_sm90.cuh"
#include "decode_int8.cuh"
#include "pipeline_sm90.cuh"

using PartSums = int[TOKENS / TOKEN_PARTS / 8][4];

// A stage holds K_STEP of k:
//
//   activations   [K_STEP/128][TOKENS]             rows of 128 bytes, swizzled
//   weights       [K_STEP/TILE_K][BLOCKS][32 lanes]    16 bytes each
//   metadata      [K_STEP/TILE_K][BLOCKS]          META_BYTES each
//   scales        [rows of groups][64 BLOCKS]      float16; room for groups of 32
//   token_scales  [K_STEP/128][TOKENS]             float32, used where they have groups
template <class Weights>
struct A8Stage {
    static constexpr int K_TILES = K_STEP / Weights::TILE_K, WARP_TILES = K_TILES / K_WARPS;  // rows of words
    static constexpr int ROW_TILES = 128 / Weights::TILE_K;  // in 128 bytes of activations
    static constexpr int GROUP_TILES = GROUPED ? (16 << (GROUPED ? GROUP_SHIFT : 0)) / Weights::TILE_K : K_TILES;
    static constexpr int GROUP_ROWS = !GROUPED ? 0 : K_TILES > GROUP_TILES ? K_TILES / GROUP_TILES : 1;  // of scales
    static constexpr int SUM_TILES = GROUP_TILES < ROW_TILES ? GROUP_TILES : ROW_TILES;  // of words, that are summed in int32
    static constexpr int WEIGHTS_AT = ACTIVATION_BYTES, META_AT = WEIGHTS_AT + K_TILES * BLOCKS * 512;
    static constexpr int SCALES_AT = META_AT + K_TILES * BLOCKS * Weights::META_BYTES;
    static constexpr int TOKEN_SCALES_AT = SCALES_AT + SCALE_BYTES, TOKEN_SCALE_BYTES = K_STEP / TOKEN_GROUP * TOKENS * 4;
    static constexpr int BYTES = (TOKEN_SCALES_AT + TOKEN_SCALE_BYTES + 1023) / 1024 * 1024;  // the swizzle is one of address bits
    static constexpr int SCRATCH_AT = STAGES * BYTES, RING_AT = SCRATCH_AT + SCRATCH_BYTES, ARRIVED_AT = RING_AT + RING_BYTES;

    static_assert(ARRIVED_AT + 16 == SHARED_BYTES, "the host allots other shared memory than the kernel uses");
    static_assert(PAIRED || PART_BYTES <= STAGES * BYTES, "a cluster's CTAs show each other their sums where the stages were");
    static_assert(WARP_TILES % ROW_TILES == 0, "a warp's part of k is rows of 128 bytes");
    static_assert(TOKENS % (8 * TOKEN_PARTS) == 0 && TOKENS / TOKEN_PARTS <= 256, "a product has up to 256 tokens");
};
