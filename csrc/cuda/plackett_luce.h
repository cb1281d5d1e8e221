// The Plackett-Luce loss of a prompt: each response is chosen among itself and the strictly worse.
#pragma once
#include "prompts.h"

namespace rk {
namespace RK_ISA {
namespace {

// One response's choice; j runs over the prompt twice, first for compare(), then for weigh().
struct Choice {
    Response own;
    float peak, others = 0.0f, rest = 0.0f;  // weights of the worse, and the same without those at the peak
    float settled_others = 0.0f, settled_rest = 0.0f;  // of earlier pieces of the prompt: shorter sums round less
    int worse = 0, lead = 0, twice_correct = 0, at_peak = 0;

    __device__ __forceinline__ explicit Choice(const Response& x) : own(x), peak(x.score) {}

    __device__ __forceinline__ bool above(const Response& j) const {
        return own.rank >= 0 && j.rank >= 0 && own.rank < j.rank;
    }
    __device__ __forceinline__ void compare(const Response& j) {
        const bool below = above(j);
        peak = below && j.score > peak ? j.score : peak;
        worse += below;
        lead += below - (j.rank >= 0 && j.rank < own.rank);
        twice_correct += below ? (own.score > j.score) + (own.score >= j.score) : 0;
    }
    __device__ __forceinline__ void weigh(const Response& j) {
        if (!above(j)) return;
        const float weight = exp_nonpositive_f32(j.score - peak);
        others += weight;
        rest += j.score == peak ? 0.0f : weight;
        at_peak += j.score == peak;
    }
    __device__ __forceinline__ void settle() {
        settled_others += others;
        settled_rest += rest;
        others = rest = 0.0f;
    }
    // One candidate at the peak weighs 1 and is left out of the sum, so that its logarithm is exact.
    __device__ __forceinline__ float mass_but_one() const {
        const float mine = own.score == peak ? 0.0f : exp_nonpositive_f32(own.score - peak);
        return (settled_rest + rest) + mine + (float)(at_peak + (own.score == peak) - 1);
    }
    __device__ __forceinline__ float loss() const {
        return worse > 0 ? (peak - own.score) + log1p_f32(mass_but_one()) : 0.0f;
    }
    __device__ __forceinline__ float inverse() const { return 1.0f / (1.0f + mass_but_one()); }
    __device__ __forceinline__ float missing() const {  // 1 - p
        return worse > 0 ? (settled_others + others) * inverse() : 0.0f;
    }
};

// What the choice of a better response, with its peak and 1 / mass, takes from x.
__device__ __forceinline__ float share_of(const Response& x, int64_t better_rank, float peak, float inverse) {
    const bool below = x.rank >= 0 && better_rank >= 0 && better_rank < x.rank;
    return below ? exp_nonpositive_f32(x.score - peak) * inverse : 0.0f;
}

// One prompt for W lanes, a response a lane.
struct SmallChoices {
    const Prompts& all;

    template <int W>
    __device__ __forceinline__ void run(int64_t p) const {
        const int lane = threadIdx.x % W, first = threadIdx.x % WARP / W * W;
        const Span span = p >= 0 ? all.span(p) : Span{0, 0, true};
        const int64_t start = span.start;
        const int K = (int)span.used();
        const Response own = response(all, start + lane, lane < K);
        int most = K;
        if (W < WARP) {
            const int other = __shfl_xor_sync(WHOLE_WARP, K, W);
            most = other > K ? other : K;
        }
        Choice choice(own);
        for (int k = 0; k < most; ++k) choice.compare(of_lane(own, first + k));
        for (int k = 0; k < most; ++k) choice.weigh(of_lane(own, first + k));
        const float inverse = choice.inverse();
        float grad = -choice.missing();
        for (int k = 0; k < most; ++k)
            grad += share_of(own, __shfl_sync(WHOLE_WARP, own.rank, first + k),
                             __shfl_sync(WHOLE_WARP, choice.peak, first + k),
                             __shfl_sync(WHOLE_WARP, inverse, first + k));
        const unsigned counts = FewTotals::packed(choice.worse > 0, choice.worse, choice.twice_correct);
        const FewTotals few = {(double)own.score * (double)choice.lead, 0.0, choice.loss(), 0.0f, 0.0f, counts};
        const Totals t = over_lanes<W>(few, own);
        if (lane < K) all.grad[start + lane] = grad / t.divisor();
        if (lane == 0 && p >= 0) t.write(all, p);
    }

    __device__ __forceinline__ static Response of_lane(const Response& own, int lane) {
        return {__shfl_sync(WHOLE_WARP, own.score, lane), __shfl_sync(WHOLE_WARP, own.rank, lane)};
    }
};

// One prompt of any size for a block: a thread a response, THREADS others at a time.
struct LargeChoices {
    const Prompts& all;

    // body(place, response) for all responses of the prompt, settle() after each THREADS of them.
    template <class Body, class Settle>
    __device__ __forceinline__ void each_other(int64_t start, int64_t K, Response* others, Body body,
                                               Settle settle) const {
        for (int64_t left = 0; left < K; left += THREADS) {
            __syncthreads();
            others[threadIdx.x] = response(all, start + left + threadIdx.x, left + threadIdx.x < K);
            __syncthreads();
            const int count = K - left < THREADS ? (int)(K - left) : THREADS;
            for (int k = 0; k < count; ++k) body(left + k, others[k]);
            settle();
        }
    }

    __device__ void run(int64_t p) const {
        __shared__ Response others[THREADS];
        const Span span = all.span(p);
        const int64_t start = span.start, K = span.size;
        Totals t = Totals::none();
        for (int64_t i = threadIdx.x; i - threadIdx.x < K; i += THREADS) {
            Choice choice(response(all, start + i, i < K));
            const auto compare = [&](int64_t, const Response& j) { choice.compare(j); };
            const auto weigh = [&](int64_t, const Response& j) { choice.weigh(j); };
            const auto settle = [&] { choice.settle(); };
            each_other(start, K, others, compare, settle);
            each_other(start, K, others, weigh, settle);
            t.add(choice.own);
            t.loss += (double)choice.loss();
            t.margin += (double)choice.own.score * (double)choice.lead;
            t.counted += choice.worse > 0;
            t.strict += choice.worse;
            t.twice_correct += choice.twice_correct;
            if (i >= K) continue;
            all.peaks[start + i] = choice.peak;
            all.inverses[start + i] = choice.inverse();
            all.grad[start + i] = -choice.missing();
        }
        t = over_block<THREADS>(t, Join());  // and what was stored above can be read by the whole block
        for (int64_t i = threadIdx.x; i - threadIdx.x < K; i += THREADS) {
            const Response own = response(all, start + i, i < K);
            float grad = 0.0f, settled = 0.0f;
            const auto take = [&](int64_t j, const Response& better) {
                grad += share_of(own, better.rank, all.peaks[start + j], all.inverses[start + j]);
            };
            const auto settle = [&] {
                settled += grad;
                grad = 0.0f;
            };
            each_other(start, K, others, take, settle);
            if (i < K) all.grad[start + i] = (all.grad[start + i] + settled) / t.divisor();
        }
        if (threadIdx.x == 0) t.write(all, p);
    }
};

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
