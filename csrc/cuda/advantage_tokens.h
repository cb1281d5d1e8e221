// The tokens of a row for the kernels of advantages.cu: where they lie, and the scan of a warp's tokens.
#pragma once
#include "moments.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int THREADS = 256;
constexpr int TILE = THREADS * ITEMS;  // tokens; as in rlhf_kernels/cuda/advantages.py

enum Output { ADVANTAGES, RETURNS, REWARDS, KL, OUTPUTS };
enum Control { TICKET, DONE, PUBLISHED };           // counters, and from PUBLISHED on a word for each unit:
enum Publication { NOT_YET, NONE_KEPT, SOME_KEPT };  // whether its part stands in memory, and if it has kept tokens

struct Job {
    const float *scores, *log_probs, *ref, *rewards, *values, *last_values;
    int64_t log_probs_stride, ref_stride, rewards_stride, values_stride;
    const uint8_t* mask;
    int64_t mask_stride;
    const void* cu;  // null: [B, T]
    int64_t cu_wide, B, T, count;  // of tokens, among which offsets must stay
    double gamma, decay;
    float kl_coef, clip;
    int64_t kl_estimator;
    float* out[OUTPUTS];
    int64_t units;     // tiles that have a block of their own; 0: a block walks a row
    GaePart* parts;    // of the units
    int* control;
    Moments* moments;  // of the advantages of each block, and behind them those of all; null: nobody wants them

    __device__ __forceinline__ int64_t offset(int64_t b) const {
        return cu_wide ? ((const int64_t*)cu)[b] : (int64_t)((const int32_t*)cu)[b];
    }
    // Nobody has read the offsets before: wrong ones must not lead out of the memory.
    __device__ __forceinline__ int64_t within(int64_t offset) const {
        return offset < 0 ? 0 : offset > count ? count : offset;
    }
    // Row b owns the units from here to the next row's first: enough of them for its tiles.
    __device__ __forceinline__ int64_t first_unit(int64_t b) const {
        return cu ? within(offset(b)) / TILE + b : b * ((T + TILE - 1) / TILE);
    }
};

struct Row {
    const float *log_probs, *ref, *rewards, *values;
    const uint8_t* mask;
    float* out[OUTPUTS];
    int64_t length;
    bool vector;    // four tokens may be moved at once
    float score;
    double behind;  // what the last kept token is handed
};

template <bool Shape>
__device__ __forceinline__ Row row_of(const Job& j, int64_t b) {
    Row r = {};
    int64_t begin = b * j.T;
    bool right = true;
    r.length = j.T;
    if (j.cu) {
        const int64_t from = j.offset(b), to = j.offset(b + 1);
        right = from >= 0 && from <= to && to <= j.count;
        begin = j.within(from);
        r.length = j.within(to) > begin ? j.within(to) - begin : 0;
    }
    r.values = j.values + (j.cu ? begin : b * j.values_stride);
    r.mask = j.mask ? j.mask + (j.cu ? begin : b * j.mask_stride) : nullptr;
    r.vector = aligned(r.values, 16) && aligned(r.mask, ITEMS);
    for (int i = 0; i < (Shape ? OUTPUTS : REWARDS); ++i) {
        r.out[i] = j.out[i] + begin;
        r.vector = r.vector && aligned(r.out[i], 16);
    }
    if (Shape) {
        r.log_probs = j.log_probs + (j.cu ? begin : b * j.log_probs_stride);
        r.ref = j.ref + (j.cu ? begin : b * j.ref_stride);
        r.vector = r.vector && aligned(r.log_probs, 16) && aligned(r.ref, 16);
        const float score = j.scores[b] > j.clip ? j.clip : j.scores[b];
        r.score = score < -j.clip ? -j.clip : score;
        r.behind = (double)r.score;
    } else {
        r.rewards = j.rewards + (j.cu ? begin : b * j.rewards_stride);
        r.vector = r.vector && aligned(r.rewards, 16);
        r.behind = j.last_values ? j.gamma * (double)j.last_values[b] : 0.0;
    }
    if (!right) r.score = __builtin_nanf(""), r.behind = __builtin_nan("");  // which reaches all kept tokens
    return r;
}

// Four numbers of each lane, side by side in memory. Without alignment they go through shared memory, so that the
// lanes of a warp write next to each other. All lanes must call.
template <int Threads>
__device__ __forceinline__ void put(float* to, int64_t t, int64_t length, bool vector, const float* x) {
    __shared__ float4 staged[Threads];
    if (vector) {
        store(to, t, length, true, x);
        return;
    }
    const int lane = threadIdx.x % WARP;
    const float* stretch = (const float*)(staged + (threadIdx.x - lane));
    const int64_t begin = t - lane * ITEMS;
    __syncwarp();
    staged[threadIdx.x] = make_float4(x[0], x[1], x[2], x[3]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int k = i * WARP + lane;
        if (begin + k < length) to[begin + k] = stretch[k];
    }
}

template <bool Shape>
struct Tokens {
    float a[ITEMS];  // rewards, or log-probs
    float ref[Shape ? ITEMS : 1];
    float value[ITEMS];
    unsigned mask, kept;
};

template <bool Shape>
__device__ __forceinline__ Tokens<Shape> tokens_at(const Row& r, int64_t t) {
    Tokens<Shape> x;
    load(Shape ? r.log_probs : r.rewards, t, r.length, r.vector, x.a);
    if (Shape) load(r.ref, t, r.length, r.vector, x.ref);
    load(r.values, t, r.length, r.vector, x.value);
    x.mask = load_mask(r.mask, t, r.length, r.vector);
    return x;
}

__device__ __forceinline__ float kl_of(int64_t estimator, float log_prob, float ref) {
    const float d = log_ratio(log_prob, ref);
    return estimator == KL_K1   ? kl_estimate<KL_K1>(d)
           : estimator == KL_K2 ? kl_estimate<KL_K2>(d)
                                : kl_estimate<KL_K3>(d);
}

__device__ __forceinline__ GaePart nothing() { return {0.0, 1.0}; }

__device__ __forceinline__ GaePart joined(GaePart first, GaePart rest) {
    return {gae_join(first, rest.advantage), first.factor * rest.factor};
}

// The parts of a warp's later lanes, and in lane 0 of the whole warp. All lanes must call.
struct Scan {
    GaePart after, warp;
};

__device__ __forceinline__ GaePart from_lane(GaePart part, int lane) {
    return {__shfl_sync(WHOLE_WARP, part.advantage, lane), __shfl_sync(WHOLE_WARP, part.factor, lane)};
}

__device__ __forceinline__ GaePart from_later_lane(GaePart part, int distance) {
    return {__shfl_down_sync(WHOLE_WARP, part.advantage, distance),
            __shfl_down_sync(WHOLE_WARP, part.factor, distance)};
}

__device__ __forceinline__ Scan scan(GaePart part) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const GaePart rest = from_later_lane(part, distance);
        if (lane + distance < WARP) part = joined(part, rest);
    }
    const GaePart after = from_later_lane(part, 1);
    return {lane == WARP - 1 ? nothing() : after, part};
}

// The same where all tokens are kept, so that all lanes have the same factor.
struct FullWarp {
    double factor;       // of a lane
    double after, warp;  // as in Scan
};

__device__ __forceinline__ FullWarp full_warp(double decay) {
    double factor = 1.0;
    for (int i = 0; i < ITEMS; ++i) factor *= decay;
    const Scan all = scan({0.0, factor});
    return {factor, all.after.factor, all.warp.factor};
}

__device__ __forceinline__ Scan scan(double part, const FullWarp& full) {
    const int lane = threadIdx.x % WARP;
    double factor = full.factor;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const double rest = __shfl_down_sync(WHOLE_WARP, part, distance);
        if (lane + distance < WARP) part = gae_join({part, factor}, rest);
        factor *= factor;
    }
    const double after = __shfl_down_sync(WHOLE_WARP, part, 1);
    return {{lane == WARP - 1 ? 0.0 : after, full.after}, {part, full.warp}};
}

struct Lane {
    float advantage[ITEMS];  // if nothing came after the lane's tokens
    float kl[ITEMS];
    Scan scan;
    unsigned with;  // a bit for each lane that has kept tokens
};

// The tokens' rewards, if they are to be made, and the scan over the warp. All lanes must call.
template <bool Shape>
__device__ __forceinline__ Lane lane_of(const Job& j, Tokens<Shape>& x, const FullWarp& full) {
    Lane lane;
    const float gamma = (float)j.gamma, decay = (float)j.decay;
    float advantage = 0.0f, next_value = 0.0f;
    double factor = 1.0;
    x.kept = kept_of(x.mask);
#pragma unroll
    for (int i = ITEMS - 1; i >= 0; --i) {
        const bool kept = x.kept >> i & 1;
        if (Shape) {
            lane.kl[i] = kept ? kl_of(j.kl_estimator, x.a[i], x.ref[i]) : 0.0f;
            x.a[i] = kept ? -j.kl_coef * lane.kl[i] : 0.0f;
        }
        const float here = gae_delta(x.a[i], next_value, x.value[i], gamma) + decay * advantage;
        advantage = kept ? here : advantage;
        next_value = kept ? x.value[i] : next_value;
        factor = kept ? factor * j.decay : factor;
        lane.advantage[i] = advantage;
    }
    const double part = fma(j.decay, (double)advantage, j.gamma * (double)next_value);
    lane.with = __ballot_sync(WHOLE_WARP, x.kept != 0);
    lane.scan = {nothing(), nothing()};
    if (__all_sync(WHOLE_WARP, x.kept == ALL))
        lane.scan = scan(part, full);
    else if (lane.with != 0)
        lane.scan = scan({part, factor});
    return lane;
}

template <int Threads>
struct Warps {  // of a block
    GaePart part[Threads / WARP];
    int some[Threads / WARP];
};

struct Tile {  // of a block: the part of all its tokens, and that of a warp's later warps
    GaePart whole, after;
    unsigned with;  // a bit for each warp that has kept tokens
};

// All threads must call.
template <int Threads>
__device__ __forceinline__ Tile tile_of(Warps<Threads>& warps, const Lane& mine) {
    constexpr int WARPS = Threads / WARP;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (WARPS == 1) return {from_lane(mine.scan.warp, 0), nothing(), mine.with != 0};
    if (lane == 0) {
        warps.part[warp] = mine.scan.warp;
        warps.some[warp] = mine.with != 0;
    }
    __syncthreads();
    GaePart part = lane < WARPS ? warps.part[lane] : nothing();
    const unsigned with = __ballot_sync(WHOLE_WARP, lane < WARPS && warps.some[lane % WARPS]);
#pragma unroll
    for (int distance = 1; distance < WARPS; distance *= 2) part = joined(part, from_later_lane(part, distance));
    return {from_lane(part, 0), from_lane(part, warp + 1), with};
}

// Results of four tokens; `behind` is what the block's last kept token is handed, `last` if no later block has any.
template <bool Shape, int Threads>
__device__ __forceinline__ void put_tokens(const Job& j, const Row& r, int64_t t, const Tokens<Shape>& x,
                                           const Lane& lane, const Tile& tile, double behind, bool last, Sums& sums) {
    float out[OUTPUTS][ITEMS], weight = (float)gae_join(lane.scan.after, gae_join(tile.after, behind));
    last = last && tile.with >> (threadIdx.x / WARP) <= 1 && lane.with >> (threadIdx.x % WARP) <= 1;
#pragma unroll
    for (int i = ITEMS - 1; i >= 0; --i) {
        const bool kept = x.kept >> i & 1;
        const float advantage = lane.advantage[i] + weight;
        out[ADVANTAGES][i] = kept ? advantage : 0.0f;
        out[RETURNS][i] = kept ? advantage + x.value[i] : 0.0f;
        if (Shape) out[REWARDS][i] = last && kept ? x.a[i] + r.score : x.a[i];
        weight = kept ? weight * (float)j.decay : weight;
        last = last && !kept;
    }
    put<Threads>(r.out[ADVANTAGES], t, r.length, r.vector, out[ADVANTAGES]);
    put<Threads>(r.out[RETURNS], t, r.length, r.vector, out[RETURNS]);
    if (Shape) put<Threads>(r.out[REWARDS], t, r.length, r.vector, out[REWARDS]);
    if (Shape) put<Threads>(r.out[KL], t, r.length, r.vector, lane.kl);
    if (Shape && j.moments) sums.add(out[ADVANTAGES], x.kept);
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
