// Statistics of the entries that a thread has met: the maximum, and sums over all others told from it.
//
// Entries are compared in pairs, the larger ones again, and so on: the last winner is the maximum, and every loser goes
// into the sums, ties among them. So the maximum's own 1 is left out, as RowStats wants it, and no entry is tested.
// exp(z - max) is 2^(factor (x - max)), factor = log2(e) / temperature: a common offset of the entries changes nothing.
#pragma once
#include "rows.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr float LEAST = -1e30f;  // in the place of -inf in a product with 0

// The largest of the first 2 * Width entries goes to x[0]; all others stay, in some order.
template <int Width, int Count>
__device__ __forceinline__ void win(float (&x)[Count]) {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
        const float a = x[i], b = x[i + Width];
        x[i] = fmaxf(a, b);
        x[i + Width] = smaller_or_nan(a, b);
    }
    if constexpr (Width > 1) win<Width / 2>(x);
}

// The largest entry of all threads of a warp, and how this thread's sums are told from it.
struct Share {
    float max, gap, fall;  // gap <= 0 in the entries' units, fall = exp of it
    bool out;              // this thread's maximum is the one that the warp leaves out, or it has none
};

// All lanes must call.
__device__ __forceinline__ Share share_of(float max, float factor) {
    const float of_warp = over_warp(max, Larger());
    const float gap = max == -INF ? 0.0f : max - of_warp;
    const int first = __ffs((int)__ballot_sync(WHOLE_WARP, max == of_warp)) - 1;
    return {of_warp, gap, power_of_two(gap * factor), max == -INF || (int)(threadIdx.x % WARP) == first};
}

struct Running {
    float max = -INF;
    float rest = 0.0f;      // sum of exp(z - max) over all but one entry at the maximum
    float weighted = 0.0f;  // sum of exp(z - max) (x - max)

    template <bool Entropy, int Count>
    __device__ __forceinline__ void fold(float (&x)[Count], float factor) {
        constexpr int SUMS = 4;
        win<Count / 2>(x);
        const float before = max;
        max = fmaxf(before, x[0]);
        x[0] = smaller_or_nan(before, x[0]);
        const float start = start_of(max);
        float sum[SUMS] = {}, weights[SUMS] = {};
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const float d = x[i] - start, e = power_of_two(d * factor);
            sum[i % SUMS] += e;
            if (Entropy) weights[i % SUMS] = fmaf(e, fmaxf(d, LEAST), weights[i % SUMS]);
        }
        const float moved = before == -INF ? 0.0f : before - start, fall = power_of_two(moved * factor);
        if (Entropy)
            weighted = fmaf(fall, fmaf(rest, moved, weighted), (weights[0] + weights[1]) + (weights[2] + weights[3]));
        rest = fmaf(fall, rest, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }

    // Told from the warp's maximum. A warp leaves one entry at its maximum out, as each lane has before. All lanes must
    // call.
    __device__ __forceinline__ void share_max(float factor) {
        const Share share = share_of(max, factor);
        const float own = share.out ? rest : 1.0f + rest;
        weighted = share.fall * fmaf(own, share.gap, weighted);
        rest = share.fall * own;
        max = share.max;
    }
};

// What a thread has met of two sides, a and b, of KL(a || b): KlStats in fp32, with exp(z - max) as 2^(factor (x - max)).
struct RunningPair {
    float max_a = -INF, max_b = -INF;
    float rest_a = 0.0f, rest_b = 0.0f, gap = 0.0f;
    bool impossible = false;  // a has probability where b has none; then `gap` is not finite either

    template <int Count>
    __device__ __forceinline__ void fold(const float (&a)[Count], const float (&b)[Count], float factor) {
        constexpr int SUMS = 4;
        const float before_a = max_a, before_b = max_b;
#pragma unroll
        for (int i = 0; i < Count; ++i) max_a = fmaxf(max_a, a[i]), max_b = fmaxf(max_b, b[i]);
        const float start_a = start_of(max_a), start_b = start_of(max_b);
        const float moved_a = before_a == -INF ? 0.0f : before_a - start_a;
        const float moved_b = before_b == -INF ? 0.0f : before_b - start_b;
        const float fall_a = power_of_two(moved_a * factor), fall_b = power_of_two(moved_b * factor);
        const float own_a = before_a == -INF ? 0.0f : 1.0f, own_b = before_b == -INF ? 0.0f : 1.0f;
        gap = fall_a * fmaf(own_a + rest_a, moved_a - moved_b, gap);
        rest_a *= fall_a, rest_b *= fall_b;
        float e_a[Count], e_b[Count], gaps[SUMS] = {};
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const float d_a = a[i] - start_a, d_b = b[i] - start_b;
            e_a[i] = power_of_two(d_a * factor), e_b[i] = power_of_two(d_b * factor);
            if (d_a != -INF) gaps[i % SUMS] = fmaf(e_a[i], d_a - d_b, gaps[i % SUMS]);
        }
        const float here = (gaps[0] + gaps[1]) + (gaps[2] + gaps[3]);
        if (!(fabsf(here) < INF)) {
#pragma unroll
            for (int i = 0; i < Count; ++i) impossible |= (b[i] == -INF) & (a[i] != -INF);
        }
        gap += here;
        rest_a += losers(e_a, fall_a * own_a);
        rest_b += losers(e_b, fall_b * own_b);
    }

    // The sum of these powers and `other` without the largest of them.
    template <int Count>
    __device__ __forceinline__ static float losers(float (&e)[Count], float other) {
        constexpr int SUMS = 4;
        win<Count / 2>(e);
        float sum[SUMS] = {smaller_or_nan(e[0], other)};
#pragma unroll
        for (int i = 1; i < Count; ++i) sum[i % SUMS] += e[i];
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }

    // Told from the warp's maxima. All lanes must call.
    __device__ __forceinline__ void share_max(float factor) {
        const Share a = share_of(max_a, factor), b = share_of(max_b, factor);
        const float own_a = max_a == -INF ? 0.0f : 1.0f;
        gap = impossible       ? INF
              : max_b == INF ? __builtin_nanf("")
                             : a.fall * fmaf(own_a + rest_a, a.gap - b.gap, gap);
        rest_a = a.fall * (a.out ? rest_a : 1.0f + rest_a);
        rest_b = b.fall * (b.out ? rest_b : 1.0f + rest_b);
        max_a = a.max, max_b = b.max;
    }
};

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
