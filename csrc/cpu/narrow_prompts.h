// Ranking losses of prompts with few responses, RK_LANES prompts at a time, one to a lane: each pair of places is one
// visit for all of them, and nothing is ever summed across lanes.
#pragma once
#include "bradley_terry.h"
#include "lanes.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t NARROW = 16;  // responses
enum Stat { PAIRS, STRICT_PAIRS, CORRECT, MARGIN_SUM, RESPONSES, REWARD_SUM, REWARD_MIN, REWARD_MAX, STATS };

struct Columns;

struct Job {
    const float* scores;
    const int64_t *ranks, *cu;
    const float* margins;
    int64_t margin_columns;  // 0: one margin a prompt
    float *loss, *grad, *stats;
    void (*narrow)(const Job&, const int64_t* prompts, int count, int64_t K, Columns&);  // at most K responses each
    void (*wide)(const Job&, int64_t prompt);
};

inline Ints load_ranks(const int32_t* from) {
    Ints ranks;
    __builtin_memcpy(&ranks, from, sizeof(ranks));
    return ranks;
}

// Sums of one response's pairs are taken first, then added to these: shorter sums round less.
struct LaneTotals {
    Lanes loss = {}, margin = {};
    Ints counted = {}, strict = {}, twice_correct = {};

    void add_gap(Ints one_wins, Lanes ahead, Lanes& gaps) {
        const Lanes zero = {};
        gaps += one_wins ? ahead : zero;
        strict -= one_wins;
        twice_correct -= (one_wins & (ahead > zero)) + (one_wins & (ahead >= zero));
    }
};

// The narrow prompts of a piece, one to a lane: their scores, and ranks that fit 32 bits, -1 where nothing stands.
struct Columns {
    alignas(4 * W) float score[NARROW][W], grad[NARROW][W];
    alignas(4 * W) int32_t rank[NARROW][W];
    int64_t start[W], size[W];

    void fill(const Job& job, const int64_t* prompts, int count, int64_t K) {
        for (int lane = 0; lane < W; ++lane) {
            start[lane] = lane < count ? job.cu[prompts[lane]] : 0;
            size[lane] = lane < count ? job.cu[prompts[lane] + 1] - start[lane] : 0;
            const float* scores = job.scores + start[lane];
            const int64_t* ranks = job.ranks + start[lane];
            bool wide = false;
            for (int64_t k = 0; k < size[lane]; ++k) {
                wide |= ranks[k] > INT32_MAX;
                score[k][lane] = ranks[k] < 0 ? 0.0f : scores[k];
                rank[k][lane] = ranks[k] < 0 ? -1 : (int32_t)ranks[k];
            }
            for (int64_t k = size[lane]; k < K; ++k) {
                score[k][lane] = 0.0f;
                rank[k][lane] = -1;
            }
            for (int64_t k = 0; k < size[lane] && wide; ++k) {  // its place among the prompt's ranks instead
                if (ranks[k] < 0) continue;
                rank[k][lane] = 0;
                for (int64_t m = 0; m < size[lane]; ++m) rank[k][lane] += ranks[m] >= 0 && ranks[m] < ranks[k];
            }
        }
    }

    // The results of all lanes, from what their pairs added up to; the gradients are those of the sums.
    void write(const Job& job, const int64_t* prompts, int count, int64_t K, const LaneTotals& t) {
        const Lanes zero = {}, counted = __builtin_convertvector(t.counted, Lanes);
        const Lanes divisor = counted > zero ? counted : zero + 1.0f;
        Lanes sum = {}, low = splat<Lanes>(__builtin_inff()), high = -low;
        Ints responses = {};
        for (int64_t i = 0; i < K; ++i) {
            const Lanes s = load(score[i]);
            const Ints here = load_ranks(rank[i]) >= Ints{};
            responses -= here;
            sum += s;
            low = here & ((s < low) | (s != s)) ? s : low;
            high = here & ((s > high) | (s != s)) ? s : high;
            store(grad[i], load(grad[i]) / divisor);
        }
        float losses[W], table[STATS][W];
        store(losses, t.loss / divisor);
        store(table[PAIRS], counted);
        store(table[STRICT_PAIRS], __builtin_convertvector(t.strict, Lanes));
        store(table[CORRECT], 0.5f * __builtin_convertvector(t.twice_correct, Lanes));
        store(table[MARGIN_SUM], t.margin);
        store(table[RESPONSES], __builtin_convertvector(responses, Lanes));
        store(table[REWARD_SUM], sum);
        store(table[REWARD_MIN], low);
        store(table[REWARD_MAX], high);
        for (int lane = 0; lane < count; ++lane) {
            job.loss[prompts[lane]] = losses[lane];
            for (int64_t k = 0; k < size[lane]; ++k) job.grad[start[lane] + k] = grad[k][lane];
            for (int k = 0; k < STATS; ++k) job.stats[prompts[lane] * STATS + k] = table[k][lane];
        }
    }
};

template <bool Ties, bool Margins>
void narrow_pairs(const Job& job, const int64_t* prompts, int count, int64_t K, Columns& c) {
    const Lanes zero = {};
    const int64_t M = job.margin_columns;
    LaneTotals all;
    float ahead_by[W] = {}, behind_by[W] = {};  // margins where the first of a pair wins, and where the second does
    for (int lane = 0; lane < count && Margins && M == 0; ++lane)
        ahead_by[lane] = behind_by[lane] = job.margins[prompts[lane]];
    for (int64_t i = 0; i < K; ++i) store(c.grad[i], zero);
    for (int64_t i = 0; i < K; ++i) {
        const Lanes s = load(c.score[i]);
        const Ints r = load_ranks(c.rank[i]), here = r >= Ints{};
        Lanes grad = load(c.grad[i]), loss = {}, gaps = {};
        for (int64_t j = i + 1; j < K; ++j) {
            const Lanes gap = s - load(c.score[j]);
            const Ints other = load_ranks(c.rank[j]), there = other >= Ints{};
            const Ints first = (r < other) & here, second = (other < r) & there, one_wins = first | second;
            const Lanes ahead = second ? -gap : gap;
            if (Margins && M != 0)
                for (int lane = 0; lane < count; ++lane) {
                    if (j >= c.size[lane]) continue;
                    ahead_by[lane] = job.margins[(c.start[lane] + i) * M + j];
                    behind_by[lane] = job.margins[(c.start[lane] + j) * M + i];
                }
            const Lanes by = Margins ? second ? load(behind_by) : load(ahead_by) : zero;
            const PairTerm<Lanes> pair = pair_term(Margins ? ahead - by : ahead);
            Lanes cost = one_wins ? pair.loss : zero;
            Lanes slope = first ? pair.slope : second ? -pair.slope : zero;  // upon the second's score
            Ints counted = one_wins;
            if (Ties) {
                const PairTerm<Lanes> tie = tie_term(gap);
                const Ints equal = (r == other) & here;
                cost = equal ? tie.loss : cost;
                slope = equal ? -tie.slope : slope;
                counted |= equal;
            }
            loss += cost;
            grad -= slope;
            store(c.grad[j], load(c.grad[j]) + slope);
            all.counted -= counted;
            all.add_gap(one_wins, ahead, gaps);
        }
        all.loss += loss;
        all.margin += gaps;
        store(c.grad[i], grad);
    }
    c.write(job, prompts, count, K, all);
}

inline void narrow_choices(const Job& job, const int64_t* prompts, int count, int64_t K, Columns& c) {
    const Lanes zero = {};
    LaneTotals all;
    for (int64_t i = 0; i < K; ++i) store(c.grad[i], zero);
    for (int64_t i = 0; i < K; ++i) {
        const Lanes s = load(c.score[i]);
        const Ints r = load_ranks(c.rank[i]), here = r >= Ints{};
        Lanes peak = s, gaps = {};
        Ints chooses = {};
        for (int64_t j = 0; j < K; ++j) {
            const Lanes other = load(c.score[j]);
            const Ints below = (r < load_ranks(c.rank[j])) & here;
            peak = below & (other > peak) ? other : peak;
            chooses |= below;
            all.add_gap(below, s - other, gaps);
        }
        // One candidate at the peak has weight 1; the others' sum is kept apart from it, so that its log is exact.
        alignas(4 * W) float weights[NARROW][W];
        Ints found = s == peak;
        Lanes rest = found ? zero : exp_nonpositive_f32(s - peak);
        for (int64_t j = 0; j < K; ++j) {
            const Lanes other = load(c.score[j]);
            const Ints below = (r < load_ranks(c.rank[j])) & here;
            const Lanes weight = below ? exp_nonpositive_f32(other - peak) : zero;
            const Ints first = below & ~found & (other == peak);
            rest += first ? zero : weight;
            found |= first;
            store(weights[j], weight);
        }
        const Lanes inverse = 1.0f / (1.0f + rest);
        Lanes others = {};
        for (int64_t j = 0; j < K; ++j) {
            const Lanes weight = load(weights[j]);
            const Lanes share = weight == zero ? zero : weight * inverse;  // 0 also beside a NaN
            others += share;
            store(c.grad[j], load(c.grad[j]) + share);
        }
        store(c.grad[i], load(c.grad[i]) - others);  // p_i - 1, without the cancellation
        all.loss += chooses ? (peak - s) + log1p_f32(rest) : zero;
        all.margin += gaps;
        all.counted -= chooses;
    }
    c.write(job, prompts, count, K, all);
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
