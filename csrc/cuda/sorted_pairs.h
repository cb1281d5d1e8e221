// All pairs of a prompt of up to SORTED responses, by a block that sorts them by rank first.
//
// Once sorted, i < j means that i is the better one, so that a pair needs no comparison of ranks and is visited once. A
// tile is 64 x 32 pairs of a warp: a lane keeps two rows i, and the gradients of the columns j go round the warp. Each
// warp sums gradients of its own, which are added at the end in a fixed order. Of the 32 x 2 pairs that a lane visits,
// the factors 1 + e^-|x| are multiplied before one logarithm is taken, and one division serves four pairs. The absolute
// error of a pair's loss is at most 2^-23; slopes keep their digits.
#pragma once
#include "prompts.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int SORTED = 1024, TILE = 2 * WARP;
constexpr float LOG2_E = 1.44269504f;

struct SortedPrompt {
    union {
        uint64_t keys[SORTED];  // ranks; absent responses, whose ranks are negative, come last
        float grads[WARPS][SORTED];
    };
    float scores[SORTED];
    int16_t place[SORTED];  // in the prompt
    int16_t end[SORTED];    // the first place that is worse
    int present;
    Totals totals;  // all but the loss and what is correct
};

__device__ __forceinline__ bool absent(uint64_t key) { return key >> 63; }

__device__ __forceinline__ void sort_by_rank(SortedPrompt& x, int count) {
#pragma unroll 1
    for (int size = 2; size <= count; size *= 2)
#pragma unroll 1
        for (int stride = size / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (int t = threadIdx.x; t < count / 2; t += THREADS) {
                const int a = 2 * t - (t & (stride - 1)), b = a + stride;
                const uint64_t low = x.keys[a], high = x.keys[b];
                if ((low > high) != ((a & size) == 0)) continue;
                x.keys[a] = high;
                x.keys[b] = low;
                const int16_t place = x.place[a];
                x.place[a] = x.place[b];
                x.place[b] = place;
            }
        }
    __syncthreads();
}

// Fills x; `count` is the power of two that K is filled up to.
template <bool Ties>
__device__ __forceinline__ void load_sorted(const Prompts& all, int64_t start, int K, int count, SortedPrompt& x) {
    __syncthreads();  // the last prompt may still be read
    for (int k = threadIdx.x; k < count; k += THREADS) {
        x.keys[k] = k < K ? (uint64_t)all.ranks[start + k] : ~(uint64_t)0;
        x.place[k] = (int16_t)k;
    }
    if (threadIdx.x == 0) x.present = 0;
    sort_by_rank(x, count);
    for (int k = threadIdx.x; k < K; k += THREADS)
        if (!absent(x.keys[k]) && (k + 1 == K || absent(x.keys[k + 1]))) x.present = k + 1;
    __syncthreads();
    const int n = x.present;
    Totals t = Totals::none();
    for (int k = threadIdx.x; k < count; k += THREADS) {
        x.scores[k] = 0.0f;
        x.end[k] = SORTED;
        if (k >= n) continue;
        const uint64_t key = x.keys[k];
        int begin = k, end = k + 1;
        while (begin > 0 && x.keys[begin - 1] == key) --begin;
        while (end < n && x.keys[end] == key) ++end;
        const Response own = {entry(all.scores, all.dtype, start + x.place[k]), 0};
        x.scores[k] = own.score;
        x.end[k] = (int16_t)end;
        t.add(own);
        t.strict += n - end;
        t.counted += Ties ? n - k - 1 : n - end;
        t.margin += (double)own.score * (double)(n - end - begin);
    }
    t = over_block<THREADS>(t, Join());
    if (threadIdx.x == 0) x.totals = t;
    for (int warp = 0; warp < WARPS; ++warp)
        for (int k = threadIdx.x; k < count; k += THREADS) x.grads[warp][k] = 0.0f;
    __syncthreads();
}

struct Rows {  // of a lane
    float score[2], grad[2];
    int end[2];
};

// What a lane's pairs add up to in one tile.
struct LaneSums {
    float behind = 0.0f, growth = 1.0f, correct = 0.0f;
};

// 1 if the better one scores higher, 1/2 if both score the same: two factors lift the smallest gap above 1.
__device__ __forceinline__ float correct_pair(float gap) {
    const float large = 1.2676506e30f;  // 2^100
    return __saturatef(gap * large * large + 0.5f);
}

// All pairs of R rows of a lane with the columns from `left` on, two columns at a time. Checked: the tile also holds
// places that are no pair, or tied.
template <bool Ties, bool Margins, bool Checked, int R>
__device__ __forceinline__ void visit_tile(const SortedPrompt& prompt, Rows& rows, int i, int left, int n, float margin,
                                           float& grad, LaneSums& sums) {
    const int lane = threadIdx.x % WARP, next = (lane + 1) % WARP;
#pragma unroll 2
    for (int step = 0; step < WARP; step += 2) {
        float x[2][R], u[2][R], growth[2][R], product[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int j = left + (lane + step + c) % WARP;
            const float score = prompt.scores[j];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const bool pair = !Checked || (j >= rows.end[r] && j < n);
                const float gap = rows.score[r] - score, correct = correct_pair(gap);
                x[c][r] = Margins ? gap - margin : gap;
                if (!pair) x[c][r] = __builtin_inff();
                u[c][r] = power_of_two(-fabsf(x[c][r]) * LOG2_E);
                growth[c][r] = 1.0f + u[c][r];
                sums.behind += x[c][r] < 0.0f ? -x[c][r] : 0.0f;
                sums.correct += pair ? correct : 0.0f;
            }
            product[c] = R == 2 ? growth[c][0] * growth[c][R - 1] : growth[c][0];
        }
        const float all = product[0] * product[1];
        const float inverse = __fdividef(1.0f, all);
        sums.growth *= all;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float of_column = inverse * product[1 - c];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float share = R == 2 ? of_column * growth[c][R - 1 - r] : of_column;
                float slope = x[c][r] < 0.0f ? share : u[c][r] * share;
                if (Ties && Checked) {
                    const int j = left + (lane + step + c) % WARP, row = i + r * WARP;
                    if (j > row && j < rows.end[r] && j < n) {
                        const PairTerm<float> tie = tie_term(rows.score[r] - prompt.scores[j]);
                        sums.behind += tie.loss;
                        slope = -tie.slope;
                    }
                }
                rows.grad[r] -= slope;
                grad += slope;
            }
            grad = __shfl_sync(WHOLE_WARP, grad, next);
        }
    }
}

struct PairSums {
    double loss;
    int64_t twice_correct;
};

struct AddPairs {
    __device__ __forceinline__ PairSums operator()(const PairSums& a, const PairSums& b) const {
        return {a.loss + b.loss, a.twice_correct + b.twice_correct};
    }
};

template <bool Ties, bool Margins>
__device__ __forceinline__ void tile(SortedPrompt& x, int top, int left, int n, float margin, PairSums& pairs) {
    const int lane = threadIdx.x % WARP, i = top + lane, j = left + lane;
    float* grads = x.grads[threadIdx.x / WARP];
    Rows rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        rows.score[r] = x.scores[i + r * WARP];
        rows.grad[r] = 0.0f;
        rows.end[r] = x.end[i + r * WARP];
    }
    float grad = 0.0f;
    LaneSums sums;
    if (x.end[top + TILE - 1] <= left && left + WARP <= n)
        visit_tile<Ties, Margins, false, 2>(x, rows, i, left, n, margin, grad, sums);
    else if (left > top)
        visit_tile<Ties, Margins, true, 2>(x, rows, i, left, n, margin, grad, sums);
    else  // on the diagonal, where the second rows come after all columns
        visit_tile<Ties, Margins, true, 1>(x, rows, i, left, n, margin, grad, sums);
    pairs.loss += (double)(sums.behind + logf(sums.growth));
    pairs.twice_correct += (int)(2.0f * sums.correct);
    grads[i] += rows.grad[0];
    grads[i + WARP] += rows.grad[1];
    __syncwarp();  // on the diagonal, another lane's row is this lane's column
    grads[j] += grad;
    __syncwarp();
}

template <bool Ties, bool Margins>
__device__ __forceinline__ void sorted_pairs(const Prompts& all, int64_t p, int64_t start, int K) {
    __shared__ SortedPrompt x;
    int count = TILE;
    while (count < K) count *= 2;
    load_sorted<Ties>(all, start, K, count, x);
    const int n = x.present;
    const float margin = Margins ? all.margins[p] : 0.0f;
    PairSums pairs = {0.0, 0};
    int turn = 0;
    for (int top = 0; top < n; top += TILE)
        for (int left = top; left < n; left += WARP)
            if (turn++ % WARPS == (int)threadIdx.x / WARP) tile<Ties, Margins>(x, top, left, n, margin, pairs);
    pairs = over_block<THREADS>(pairs, AddPairs());
    const float scale = 1.0f / x.totals.divisor();
    for (int k = threadIdx.x; k < count; k += THREADS) {
        if (x.place[k] >= K) continue;  // what fills up the power of two
        float grad = 0.0f;
        for (int warp = 0; warp < WARPS; ++warp) grad += x.grads[warp][k];
        all.grad[start + x.place[k]] = k < n ? grad * scale : 0.0f;
    }
    if (threadIdx.x != 0) return;
    Totals t = x.totals;
    t.loss = pairs.loss;
    t.twice_correct = pairs.twice_correct;
    t.write(all, p);
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
