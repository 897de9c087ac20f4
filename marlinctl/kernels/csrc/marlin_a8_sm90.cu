// Dense INT4 x INT8 GEMM for Hopper:  out [M, N] = activations [M, K] . weight [N, K]ᵀ (+ bias [N]), activations rounded to 8 bits
//
//   activations   [M, K'] int8          rounded by round_activations.cu, in the order of the tile (below)
//   token_scales  [M'] or [G128, M']    float32: one for each token, or (TOKEN_GROUPS) for each 128 of its k; M' is M rounded up to 4
//   qweight, scales, bias, out          as in marlin_sm90.cu, which explains the transposed product, stages and roles
//
//   out[m, n] = sum over groups of k  token_scale[m] * scale[n] * (sum over k of code * activation)  + bias[n]
//
// The sum of a group is exact: int32. It is scaled in float32, and rounded once, at the end. So the codes of the weights and their scales
// are those of the 16-bit kernels, bit for bit.
//
// FROM WORDS TO INT8.  Words w0 and w1 of a lane, from two neighbouring rows of qweight, are its 16 weights of 32 k. Byte i of
// permute(w0, w1, 0x6420) has two weights of row t/4 of the fragment, those of 0x7531 are of row t/4 + 8:
//
//   ((bytes << 4) & 0xf0f0f0f0) ^ 0x80808080     the low nibbles, 16 x (nibble - 8): a[0], a[1]
//   (bytes        & 0xf0f0f0f0) ^ 0x80808080     the high ones:                      a[2], a[3]
//
// 8 instructions for 16 weights, where float16 takes 26. A lane's four k of a register are then not neighbours in the weight, so activations
// lie in the same order: of each 32 k  0 1 16 17 2 3 18 19 4 5 20 21 .. 14 15 30 31. The factor 16 is taken out with the scale.
//
// THE LOOP.  A group of 128 (or of its own size, if that is less) is 4 products of 64 x N x 32 into `group_sums`, for each word of the
// warp and each of TOKEN_PARTS parts of the tokens; TEMPORARIES of these are under way together. When one is done, float sums take
// scale * group sum: a conversion and an fma for each, or with TOKEN_GROUPS a multiplication more. For that time a warpgroup gives the tensor
// core nothing, so where ORDERED the warpgroups take turns: one multiplies while the other scales.
//
//   warpgroup 0   decode | products ░░░░░ | scale, decode | products ░░░░░ | scale ..
//   warpgroup 1            decode  (turn) | products ░░░░░ | scale, decode | products ..
//
// The turn passes when all products but the last are done. Passed when they are queued it changes nothing: the tensor core takes turns
// itself, both end together, and both scale at once.
//
// STEPS = 2: there are two sets of A registers, and a warp decodes while its own products run. TOKEN_PARTS > 1: a fragment is multiplied with all
// parts of the tokens, so a word is decoded once for more of them.
//
// MEASURED.  NVIDIA H200, 2026-12-01, microseconds in a CUDA graph, with overlap, groups of 128, one scale a token, the product alone:
//
//   M                     32       64       96      128      256     1024
//   73728 x 18432        183      239      326      365      684     2766
//   16-bit activations   212      306      377      482      950     3675 (torch.matmul)
//
// From 64 tokens on it is limited by the GPU's 700 W: every good form of the loop takes 660 to 695 W and the same time to 3 %
// (docs/log/2026-12-01-eight-bit-kernel.md). What is spent beside the products is mostly the scaling: 20 % more time with TOKEN_GROUPS.
//
// LIMITS.  N a multiple of 8, everything aligned to 16 bytes; 2^31 units. A group of 128: 128 * 128 * 127 < 2^31.
#include "write_marlin.cuh"
#include "a8_sm90.cuh"
#include "gemm_sm90.cuh"

constexpr int WARPGROUPS = THREADS / 128;
constexpr int FIRST_TURN = 2;     // barrier of the CTA; 0 and 1 are __syncthreads and sync_threads
using GroupSums = PartSums[TEMPORARIES];

static_assert(TEMPORARIES <= 2 && WORDS * TOKEN_PARTS % TEMPORARIES == 0, "the products of a batch are of one group");

// The warpgroup's turn to give the tensor core products.
struct Turn {
    unsigned warpgroup;

    __device__ __forceinline__ void first() const {
        if (ORDERED && warpgroup == WARPGROUPS - 1) named_barrier_arrive<256>(FIRST_TURN);
    }
    __device__ __forceinline__ void wait() const {
        if (ORDERED) named_barrier_sync<256>(FIRST_TURN + warpgroup);
    }
    __device__ __forceinline__ void pass() const {
        if (ORDERED) named_barrier_arrive<256>(FIRST_TURN + (warpgroup + 1 == WARPGROUPS ? 0 : warpgroup + 1));
    }
};

// sums of a part += scales * group_sums; rows t/4 and t/4 + 8, token 2(t%4) of each eight and the next.
__device__ __forceinline__ void close_group(
    float (&sums)[SLABS][4], const PartSums& group_sums, int part, float upper, float lower, const float* token_scales
) {
    constexpr int PART_SLABS = SLABS / TOKEN_PARTS;
#pragma unroll
    for (int slab = 0; slab < PART_SLABS; ++slab) {
        float2 token_scale = make_float2(1.0f, 1.0f);
        if (TOKEN_GROUPS) token_scale = *reinterpret_cast<const float2*>(token_scales + (part * PART_SLABS + slab) * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& sum = sums[part * PART_SLABS + slab][i];
            float group_sum = static_cast<float>(group_sums[slab][i]);
            if (TOKEN_GROUPS) group_sum *= i % 2 ? token_scale.y : token_scale.x;
            sum = __fmaf_rn(i < 2 ? upper : lower, group_sum, sum);
        }
    }
}

struct A8Products {
    static constexpr int TILE_K = 16, META_BYTES = 0;
    using S = A8Stage<A8Products>;
    using GroupSums = ::GroupSums;

    static __device__ __forceinline__ void end(Sums&, GroupSums&) {}
    static __device__ __forceinline__ void begin(GroupSums&) { Turn{warp_uniform(thread_index() / 128)}.first(); }

    // Of token scales of one group; [G128, M'] ends in the middle of a tile.
    static __device__ __forceinline__ unsigned token_scale_bytes(const Cursor& at, unsigned m) {
        return min(static_cast<unsigned>(TOKENS), (m + 3) / 4 * 4 - at.token_tile * TOKENS) * 4;
    }
    static __device__ __forceinline__ unsigned announced(const Cursor& at, unsigned m) {
        return ACTIVATION_BYTES + (TOKEN_GROUPS ? K_STEP / TOKEN_GROUP * token_scale_bytes(at, m) : 0);
    }
    // Beyond the last group activations are zeros, and scales are copies.
    static __device__ __forceinline__ void copy_beside(
        const char* token_scales, const Cursor& at, unsigned m, unsigned k, unsigned to, unsigned full
    ) {
        if (!TOKEN_GROUPS) return;
        const unsigned groups = (k + TOKEN_GROUP - 1) / TOKEN_GROUP, row = (m + 3) / 4 * 4;
        for (int part = 0; part < K_STEP / TOKEN_GROUP; ++part) {
            const size_t group = min(static_cast<unsigned>(at.step * (K_STEP / TOKEN_GROUP) + part), groups - 1);
            const char* from = token_scales + (group * row + at.token_tile * TOKENS) * 4;
            copy_bulk(to + S::TOKEN_SCALES_AT + part * (TOKENS * 4), from, token_scale_bytes(at, m), full);
        }
    }

    static __device__ __forceinline__ void multiply(
        Sums& sums, GroupSums& group_sums, const char* stages, const unsigned& shared_base, int stage_index, UnreleasedStage&,
        const ThreadRole& role
    ) {
        constexpr int SUM_TILES = S::SUM_TILES, PRODUCTS = SUM_TILES / 2;
        constexpr int ITEMS = S::WARP_TILES / SUM_TILES * WORDS;        // an item is one word of one group, a fragment
        constexpr int BATCH_ITEMS = (TEMPORARIES + TOKEN_PARTS - 1) / TOKEN_PARTS;  // of a batch, whose products are under way together
        constexpr int BATCHES = ITEMS * TOKEN_PARTS / TEMPORARIES;
        const char* stage = stages + stage_index * S::BYTES;
        const unsigned first_tile = warp_uniform(role.k_warp) * S::WARP_TILES;
        const unsigned long long b = describe_rows(shared_base + stage_index * S::BYTES + first_tile / 8 * (TOKENS * 128));
        const char* words_at = stage + S::WEIGHTS_AT + ((first_tile * BLOCKS + role.block) * 32 + role.lane) * 16 + role.first_word * 4;
        const char* scales_at = stage + S::SCALES_AT + (role.block * 64 + role.lane / 4 * 8 + 2 * role.first_word) * 2;
        const float* token_scales = reinterpret_cast<const float*>(stage + S::TOKEN_SCALES_AT) + first_tile / 8 * TOKENS + role.lane % 4 * 2;
        const Turn turn{warp_uniform(role.warp / 4)};
        unsigned words[SUM_TILES][4], a[STEPS * BATCH_ITEMS][PRODUCTS][4];
        unsigned scales[4] = {0x2c002c00, 0x2c002c00, 0x2c002c00, 0x2c002c00};  // 1/16

        auto fragment_of = [](int item) { return item % (STEPS * BATCH_ITEMS); };
        auto load = [&](int batch) {
            const int item = batch * TEMPORARIES / TOKEN_PARTS;
            if (batch * TEMPORARIES % TOKEN_PARTS || item % WORDS || item >= ITEMS) return;
#pragma unroll
            for (int i = 0; i < SUM_TILES; ++i) load_words(words[i], words_at + (item / WORDS * SUM_TILES + i) * (BLOCKS * 512));
        };
        auto decode = [&](int batch) {
            if (batch * TEMPORARIES % TOKEN_PARTS) return;  // its fragment is there
#pragma unroll
            for (int item = batch * TEMPORARIES / TOKEN_PARTS; item < batch * TEMPORARIES / TOKEN_PARTS + BATCH_ITEMS && item < ITEMS; ++item)
#pragma unroll
                for (int i = 0; i < PRODUCTS; ++i)
                    decode_int8(a[fragment_of(item)][i], words[2 * i][item % WORDS], words[2 * i + 1][item % WORDS]);
        };
        load(0);
        decode(0);
#pragma unroll
        for (int batch = 0; batch < BATCHES; ++batch) {
            turn.wait();
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < TEMPORARIES; ++j) {
                const int unit = batch * TEMPORARIES + j, item = unit / TOKEN_PARTS, part = unit % TOKEN_PARTS, tile = item / WORDS * SUM_TILES;
                const int row = tile / 8 * TOKENS + part * (TOKENS / TOKEN_PARTS);
#pragma unroll
                for (int i = 0; i < PRODUCTS; ++i) {
                    if (ORDERED && j == TEMPORARIES - 1 && i == PRODUCTS - 1 && i) wgmma_commit();
                    wgmma_int8(group_sums[j], a[fragment_of(item)][i], b + (row * 128 + (tile % 8 / 2 + i) * 32) / 16, i > 0);
                }
                wgmma_commit();
            }
            load(batch + 1);
            if (STEPS == 2) decode(batch + 1);
#pragma unroll
            for (int j = 0; j < TEMPORARIES; ++j) {
                const int unit = batch * TEMPORARIES + j, item = unit / TOKEN_PARTS, part = unit % TOKEN_PARTS;
                const int tile = item / WORDS * SUM_TILES, word = item % WORDS;  // of the warp's part
                if (GROUPED && word == 0 && part == 0) {
                    load_words(scales, scales_at + (first_tile + tile) / S::GROUP_TILES * (COLUMNS * 2));
                }
                const float upper = widen_half(static_cast<unsigned short>(scales[word])) * (GROUPED ? 0.0625f : 1.0f);
                const float lower = widen_half(static_cast<unsigned short>(scales[word] >> 16)) * (GROUPED ? 0.0625f : 1.0f);
                if (j < TEMPORARIES - 1) {
                    wgmma_wait<(ORDERED && PRODUCTS > 1) ? 2 : 1>();
                } else {
                    if (ORDERED && PRODUCTS > 1) wgmma_wait<1>();  // the other warpgroup's are queued behind the last product
                    turn.pass();
                    wgmma_wait<0>();
                }
                wgmma_arrived(group_sums[j]);
                close_group(sums[word], group_sums[j], part, upper, lower, token_scales + tile / 8 * TOKENS);
            }
            if (STEPS == 1) decode(batch + 1);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + COPY_THREADS, CTAS) marlin_a8_sm90(
    const __grid_constant__ TensorMap activations,  // [M, K'] int8, in boxes of TOKENS x 128
    const __grid_constant__ TensorMap qweight,      // [K'/16, N'/64] of 512 bytes (32 lanes, four words), in boxes of K_STEP/16 x BLOCKS
    const char* __restrict__ token_scales,  // [M'] or [G128, M'] float32
    const char* __restrict__ scales,       // [G', N'] float16
    const unsigned short* __restrict__ bias,  // [N] as the output, or null
    unsigned* __restrict__ out,            // [M, N/2] pairs
    float4* __restrict__ partials,         // [2 CTAs][OWN][SLABS][THREADS], of a tile's CTAs; null in clusters, as counters
    int* __restrict__ counters,            // [tiles of n][tiles of m], zero before and after
    unsigned m, unsigned n, unsigned k,    // true sizes
    int whole,                             // tiles that each CTA computes alone (stripes.cuh)
    int                                    // group_shift, which is GROUP_SHIFT here
) {
    const Output output{scales, bias, out, m, n, GROUPED, TOKEN_GROUPS ? nullptr : reinterpret_cast<const float*>(token_scales)};
    gemm_sm90<A8Products>(activations, qweight, nullptr, token_scales, scales, output, partials, counters, m, n, k, whole);
}
