// Records: what pieces of the tokens add up to for a policy loss and its metrics, and how they are merged.
#pragma once
#include "policy_counts.h"

namespace rk {
namespace RK_ISA {
namespace {

// What is summed over the kept tokens. A GAP is the distance from the piece's mean in fp32, a SQUARE that of the
// distance; in a record they have become the mean and the sum of squared deviations, and the largest ratio follows.
enum Sum {
    POLICY_LOSS, KL, CLIPPED, BOUNDED, VALUE_LOSS, HELD, VALUE, ENTROPY_LOSS, ENTROPY, TOKENS,
    RATIO_GAP, ERROR_GAP, TARGET_GAP, RATIO_SQUARE, ERROR_SQUARE, TARGET_SQUARE, SUMS, RATIO_MAX = SUMS, RECORD,
    // With all metrics a record goes on; a thread adds these up at their number modulo EXTRAS.
    K1 = RECORD, K3, LOW, KL_LOSS, REF_KL, WEIGHT, WEIGHT_SQUARE, FILTERED, LONG_RECORD
};
constexpr int GAPS = RATIO_GAP, SQUARES = RATIO_SQUARE, SPREADS = 3, EXTRAS = LONG_RECORD - RECORD;
static_assert(SUMS == 16 && EXTRAS == 8 && LONG_RECORD <= WARP, "sum_over_warp() leaves a sum in each lane");

template <bool Metrics>
constexpr int RECORD_OF = Metrics ? LONG_RECORD : RECORD;

// Adds up over lanes: two lanes that differ by Half share the sums, so that each keeps half of them.
template <int Half>
__device__ __forceinline__ void share_sums(float* sums) {
    const bool upper = threadIdx.x & Half;
#pragma unroll
    for (int i = 0; i < Half; ++i) {
        const float kept = upper ? sums[i + Half] : sums[i], given = upper ? sums[i] : sums[i + Half];
        sums[i] = kept + __shfl_xor_sync(WHOLE_WARP, given, Half);
    }
}

// The sum over the warp of sums[lane % Count]. All lanes must call.
template <int Count>
__device__ __forceinline__ float sum_over_warp(float* sums) {
    if (Count > 8) share_sums<8>(sums);
    share_sums<4>(sums);
    share_sums<2>(sums);
    share_sums<1>(sums);
    float sum = sums[0];
#pragma unroll
    for (int distance = Count; distance < WARP; distance *= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, distance);
    return sum;
}

struct Spread {  // sums over kept tokens, from which come the means around which squares are taken
    float x[SPREADS];
    float tokens;
};

// The means of a block's numbers in fp32, 0 where they are not finite. All threads must call.
__device__ __forceinline__ Spread means_of(Spread s) {
    __shared__ Spread of_warp[WARPS];
    s = over_warp(s, [](Spread a, Spread b) {
        for (int k = 0; k < SPREADS; ++k) a.x[k] += b.x[k];
        a.tokens += b.tokens;
        return a;
    });
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = s;
    __syncthreads();
    s = of_warp[0];
    for (int w = 1; w < WARPS; ++w) {
        for (int k = 0; k < SPREADS; ++k) s.x[k] += of_warp[w].x[k];
        s.tokens += of_warp[w].tokens;
    }
    for (float& x : s.x) {
        x /= s.tokens > 0.0f ? s.tokens : 1.0f;
        x = absolute(x) <= 3.40282347e38f ? x : 0.0f;
    }
    return s;
}

// The record of a block's piece, from the sums of its threads; written by the first warp. All threads must call.
template <bool Metrics>
__device__ __forceinline__ void put_record(float* sums, float* extras, float ratio_max, const Spread& means,
                                           double* to) {
    constexpr int record = RECORD_OF<Metrics>;
    __shared__ float of_warp[WARPS][record];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    ratio_max = over_warp(ratio_max, [](float a, float b) { return b > a ? b : a; });
    float mine = sum_over_warp<SUMS>(sums);
    if (Metrics) {
        const float extra = sum_over_warp<EXTRAS>(extras);
        mine = lane >= RECORD ? extra : mine;
    }
    if (lane < record) of_warp[warp][lane] = lane == RATIO_MAX ? ratio_max : mine;
    __syncthreads();
    if (warp != 0) return;
    double total = 0.0;
    for (int w = 0; w < WARPS && lane < record; ++w) {
        const double x = (double)of_warp[w][lane];
        total = lane != RATIO_MAX ? total + x : x > total ? x : total;
    }
    const double tokens = (double)means.tokens;
    const double gap = __shfl_sync(WHOLE_WARP, total, lane >= SPREADS ? lane - SPREADS : lane);
    if (lane >= SQUARES && lane < SUMS) {
        total -= tokens > 0.0 ? gap * (gap / tokens) : 0.0;
        total = total < 0.0 ? 0.0 : total;
    }
    const float mean = lane == RATIO_GAP ? means.x[0] : lane == ERROR_GAP ? means.x[1] : means.x[2];
    if (lane >= GAPS && lane < SQUARES) total = tokens > 0.0 ? (double)mean + total / tokens : 0.0;
    if (lane < record) to[lane] = total;
}

// Merges records; the block's first warp writes *to. All threads must call.
template <int Record>
__device__ __forceinline__ void merge(const double* records, int64_t count, double* to) {
    __shared__ double shared[WARPS][Record];
    __shared__ double mean[SPREADS];
    const volatile double* from = records;  // other blocks wrote it: past this block's cache
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const bool gap = lane >= GAPS && lane < GAPS + SPREADS, square = lane >= SQUARES && lane < SQUARES + SPREADS;
    double mine = 0.0;
    __syncthreads();
    for (int64_t i = warp; i < count && lane < Record; i += WARPS) {
        const double x = from[i * Record + lane];
        if (lane == RATIO_MAX)
            mine = x > mine ? x : mine;
        else if (!square)
            mine += gap ? from[i * Record + TOKENS] * x : x;
    }
    if (lane < Record) shared[warp][lane] = mine;
    __syncthreads();
    mine = 0.0;
    for (int w = 0; w < WARPS && lane < Record; ++w)
        mine = lane != RATIO_MAX ? mine + shared[w][lane] : shared[w][lane] > mine ? shared[w][lane] : mine;
    const double tokens = __shfl_sync(WHOLE_WARP, mine, TOKENS);
    if (gap) mine /= tokens > 0.0 ? tokens : 1.0;
    if (gap && warp == 0) mean[lane - GAPS] = mine;
    __syncthreads();
    double m2 = 0.0;
    for (int64_t i = warp; i < count && square; i += WARPS) {
        const double away = from[i * Record + lane - SPREADS] - mean[lane - SQUARES];
        m2 += from[i * Record + lane] + from[i * Record + TOKENS] * away * away;
    }
    if (square) shared[warp][lane] = m2;
    __syncthreads();
    m2 = 0.0;
    for (int w = 0; w < WARPS && square; ++w) m2 += shared[w][lane];
    if (square) mine = m2;
    if (warp == 0 && lane < Record) to[lane] = mine;
}

// True in the block that is the last of `members` to come. What its first warp wrote before, the last one sees.
__device__ __forceinline__ bool last_of(int* done, int members) {
    __shared__ int before;
    if (threadIdx.x < WARP) {
        __threadfence();
        __syncwarp();
        if (threadIdx.x == 0) before = atomicAdd(done, 1);
    }
    __syncthreads();
    const bool last = before == members - 1;
    if (last) __threadfence();
    __syncthreads();
    return last;
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
