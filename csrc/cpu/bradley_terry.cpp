// All-pairs Bradley-Terry and Plackett-Luce losses of ragged prompts, with their gradients, in one pass.
//
// Prompts of up to NARROW responses are taken RK_LANES at a time, one to a lane, those of like size together; each pair
// of places (i, j) is then one visit for all of them. A larger prompt's responses are taken RK_LANES at a time, padded
// with absent ones: all responses i visit the lanes j and add to the gradients of the j, whichever of the two is the
// better; the loss of a pair is counted where i is. Either way nothing is summed across prompts, and which way a prompt
// goes depends on its size alone. Prompts are shared among the threads.
#include "bradley_terry.h"

#include "narrow_prompts.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int64_t GRAIN = 256;  // prompts a thread takes at once

struct Rank {  // an int64 in two 32-bit halves that compare as signed, so that it fits the lanes of the scores
    int32_t high, low;
};

inline Rank split(int64_t rank) { return {(int32_t)(rank >> 32), (int32_t)((uint32_t)rank ^ 0x80000000u)}; }

struct Block {  // W responses of a prompt, and what the pairs with them add up to
    Lanes score = {}, grad = {}, loss = {};
    Ints high = {}, low = {}, present = {}, index = {}, pairs = {}, strict = {}, twice_correct = {};
    Ints lead = {};  // how many are worse less how many are better

    Block(const float* scores, const int64_t* ranks, int64_t first, int64_t count) {
        float s[W] = {};
        int32_t upper[W] = {}, lower[W] = {}, there[W] = {}, place[W] = {};
        for (int64_t k = 0; k < count; ++k) {
            const bool here = ranks[first + k] >= 0;
            const Rank rank = split(ranks[first + k]);
            s[k] = here ? scores[first + k] : 0.0f;
            upper[k] = rank.high;
            lower[k] = rank.low;
            there[k] = here ? -1 : 0;
            place[k] = (int32_t)(first + k);
        }
        score = load(s);
        __builtin_memcpy(&high, upper, sizeof(high));
        __builtin_memcpy(&low, lower, sizeof(low));
        __builtin_memcpy(&present, there, sizeof(present));
        __builtin_memcpy(&index, place, sizeof(index));
    }
};

// Response i (score s, rank r) against the block. won: margin where i is the better one; lost: where the lane is.
template <bool Ties, bool Margins>
inline void visit(Block& b, int32_t i, float s, Rank r, Lanes won, Lanes lost) {
    const Lanes zero = {};
    const Ints same_high = b.high == r.high;
    const Ints better = ((b.high > r.high) | (same_high & (b.low > r.low))) & b.present;
    const Ints equal = same_high & (b.low == r.low) & b.present;
    const Ints worse = ~better & ~equal & b.present;
    const Lanes gap = s - b.score;
    const Lanes ahead = better ? gap : -gap;
    const PairTerm<Lanes> pair = pair_term(Margins ? ahead - (better ? won : lost) : ahead);
    Lanes loss = better ? pair.loss : zero;
    Lanes slope = better ? pair.slope : worse ? -pair.slope : zero;
    Ints counted = better;
    if (Ties) {
        const PairTerm<Lanes> tie = tie_term(gap);
        const Ints first = equal & (b.index > i);
        const Ints other = equal & (b.index != i);
        loss = first ? tie.loss : loss;
        slope = other ? -tie.slope : slope;
        counted |= first;
    }
    b.grad += slope;
    b.loss += loss;
    b.lead += better - worse;
    b.pairs -= counted;
    b.strict -= better;
    b.twice_correct -= (better & (gap > zero)) + (better & (gap >= zero));
}

struct Totals {
    double loss = 0.0, margin = 0.0;
    int64_t pairs = 0, strict = 0, twice_correct = 0;

    void add(const Block& b) {
        for (int k = 0; k < W; ++k) {
            loss += (double)b.loss[k];
            margin += (double)b.score[k] * (double)b.lead[k];
            pairs += b.pairs[k];
            strict += b.strict[k];
            twice_correct += b.twice_correct[k];
        }
    }
};

void reward_stats(const float* scores, const int64_t* ranks, int64_t K, float* stats) {
    double sum = 0.0;
    int64_t present = 0;
    float low = __builtin_inff(), high = -__builtin_inff();
    for (int64_t i = 0; i < K; ++i) {
        if (ranks[i] < 0) continue;
        ++present;
        sum += (double)scores[i];
        low = scores[i] < low || scores[i] != scores[i] ? scores[i] : low;
        high = scores[i] > high || scores[i] != scores[i] ? scores[i] : high;
    }
    stats[RESPONSES] = (float)present;
    stats[REWARD_SUM] = (float)sum;
    stats[REWARD_MIN] = low;
    stats[REWARD_MAX] = high;
}

void write_totals(const Totals& all, int64_t counted, float* stats) {
    stats[PAIRS] = (float)counted;
    stats[STRICT_PAIRS] = (float)all.strict;
    stats[CORRECT] = 0.5f * (float)all.twice_correct;
    stats[MARGIN_SUM] = (float)all.margin;
}

template <bool Ties, bool Margins>
void prompt(const Job& job, int64_t p) {
    const int64_t start = job.cu[p], K = job.cu[p + 1] - start;
    const float* scores = job.scores + start;
    const int64_t* ranks = job.ranks + start;
    const int64_t M = job.margin_columns;
    Totals all;
    float won[W] = {}, lost[W] = {};
    if (Margins && M == 0)
        for (int k = 0; k < W; ++k) won[k] = lost[k] = job.margins[p];
    for (int64_t first = 0; first < K; first += W) {
        const int64_t count = K - first < W ? K - first : W;
        Block block(scores, ranks, first, count);
        for (int64_t i = 0; i < K; ++i) {
            if (ranks[i] < 0) continue;
            if (Margins && M != 0)
                for (int64_t k = 0; k < count; ++k) {
                    won[k] = job.margins[(start + i) * M + first + k];
                    lost[k] = job.margins[(start + first + k) * M + i];
                }
            visit<Ties, Margins>(block, (int32_t)i, scores[i], split(ranks[i]), load(won), load(lost));
        }
        for (int64_t k = 0; k < count; ++k) job.grad[start + first + k] = block.grad[k];
        all.add(block);
    }
    const double divisor = all.pairs > 0 ? (double)all.pairs : 1.0;
    job.loss[p] = (float)(all.loss / divisor);
    const float scale = (float)(1.0 / divisor);
    for (int64_t i = 0; i < K; ++i) job.grad[start + i] *= scale;
    write_totals(all, all.pairs, job.stats + p * STATS);
    reward_stats(scores, ranks, K, job.stats + p * STATS);
}

inline bool ranked_above(Rank a, Rank b) { return a.high < b.high || (a.high == b.high && a.low < b.low); }

void plackett_luce_prompt(const Job& job, int64_t p) {
    const int64_t start = job.cu[p], K = job.cu[p + 1] - start;
    const float* scores = job.scores + start;
    const int64_t* ranks = job.ranks + start;
    float* grad = job.grad + start;
    Totals all;
    for (int64_t i = 0; i < K; ++i) grad[i] = 0.0f;
    double loss = 0.0;
    int64_t choices = 0;
    for (int64_t i = 0; i < K; ++i) {
        if (ranks[i] < 0) continue;
        const Rank r = split(ranks[i]);
        const float s = scores[i];
        float peak = s;
        int64_t worse = 0;
        for (int64_t j = 0; j < K; ++j) {
            const bool below = ranks[j] >= 0 && ranked_above(r, split(ranks[j]));
            const float other = below ? scores[j] : s;
            peak = other > peak ? other : peak;
            worse += below;
            all.margin += below ? (double)s - (double)other : 0.0;
            all.twice_correct += below ? (s > other) + (s >= other) : 0;
        }
        all.strict += worse;
        if (worse == 0) continue;
        ++choices;
        double mass = (double)exp_f32(s - peak);
        for (int64_t j = 0; j < K; ++j) {
            const bool below = ranks[j] >= 0 && ranked_above(r, split(ranks[j]));
            const float weight = exp_f32((below ? scores[j] : s) - peak);
            mass += below ? (double)weight : 0.0;
        }
        loss += (double)peak - (double)s + __builtin_log(mass);
        const float inverse = (float)(1.0 / mass);
        double others = 0.0;
        for (int64_t j = 0; j < K; ++j) {
            const bool below = ranks[j] >= 0 && ranked_above(r, split(ranks[j]));
            const float share = exp_f32((below ? scores[j] : s) - peak) * inverse;
            grad[j] += below ? share : 0.0f;
            others += below ? (double)share : 0.0;
        }
        grad[i] -= (float)others;  // p_i - 1, without the cancellation
    }
    const double divisor = choices > 0 ? (double)choices : 1.0;
    job.loss[p] = (float)(loss / divisor);
    for (int64_t i = 0; i < K; ++i) grad[i] = (float)((double)grad[i] / divisor);
    write_totals(all, choices, job.stats + p * STATS);
    reward_stats(scores, ranks, K, job.stats + p * STATS);
}

// At most GRAIN prompts: the wide ones one by one, the narrow ones from the largest to the smallest.
void some_prompts(const Job& job, int64_t begin, int64_t end) {
    int64_t place[NARROW + 2] = {}, sorted[GRAIN];
    for (int64_t p = begin; p < end; ++p) {
        const int64_t K = job.cu[p + 1] - job.cu[p];
        if (K > NARROW)
            job.wide(job, p);
        else
            ++place[K];
    }
    for (int64_t K = NARROW; K >= 0; --K) place[K] += place[K + 1];  // one past the prompts of K responses
    const int64_t narrow = place[0];
    for (int64_t p = end; p-- > begin;) {
        const int64_t K = job.cu[p + 1] - job.cu[p];
        if (K <= NARROW) sorted[--place[K]] = p;
    }
    Columns columns;
    for (int64_t at = 0; at < narrow; at += W) {
        const int count = (int)(narrow - at < W ? narrow - at : W);
        const int64_t K = job.cu[sorted[at] + 1] - job.cu[sorted[at]];
        columns.fill(job, sorted + at, count, K);
        job.narrow(job, sorted + at, count, K, columns);
    }
}

void all_prompts(Job& job, int64_t prompts, int64_t threads) {
    parallel_for(
        prompts, GRAIN, threads,
        [](void* context, int64_t begin, int64_t end) { some_prompts(*(const Job*)context, begin, end); }, &job);
}

template <bool Ties, bool Margins>
void pairs_of(Job& job, int64_t prompts, int64_t threads) {
    job.narrow = narrow_pairs<Ties, Margins>;
    job.wide = prompt<Ties, Margins>;
    all_prompts(job, prompts, threads);
}

}  // namespace

void bradley_terry_fwd_f32(const float* scores, const int64_t* ranks, const int64_t* cu_groups, int64_t prompts,
                           const float* margins, int64_t margin_columns, int64_t ties_half, float* loss, float* grad,
                           float* stats, int64_t threads) {
    Job job = {scores, ranks, cu_groups, margins, margin_columns, loss, grad, stats, nullptr, nullptr};
    const auto run = margins ? (ties_half ? pairs_of<true, true> : pairs_of<false, true>)
                             : (ties_half ? pairs_of<true, false> : pairs_of<false, false>);
    run(job, prompts, threads);
}

void plackett_luce_fwd_f32(const float* scores, const int64_t* ranks, const int64_t* cu_groups, int64_t prompts,
                           float* loss, float* grad, float* stats, int64_t threads) {
    Job job = {scores, ranks, cu_groups, nullptr, 0, loss, grad, stats, narrow_choices, plackett_luce_prompt};
    all_prompts(job, prompts, threads);
}

void bradley_terry_bwd_f32(const float* grad_loss, const float* grad, const int64_t* cu_groups, int64_t prompts,
                           float* grad_scores, int64_t threads) {
    struct Scale {
        const float *grad_loss, *grad;
        const int64_t* cu;
        float* out;
    } scale = {grad_loss, grad, cu_groups, grad_scores};
    parallel_for(
        prompts, 16 * GRAIN, threads,
        [](void* context, int64_t begin, int64_t end) {
            const Scale& s = *(const Scale*)context;
            for (int64_t p = begin; p < end; ++p) {
                int64_t i = s.cu[p];
                const int64_t stop = s.cu[p + 1];
                for (; i + W <= stop; i += W) store(s.out + i, s.grad_loss[p] * load(s.grad + i));
                if (i < stop) store_part(s.out + i, s.grad_loss[p] * load_part(s.grad + i, stop - i), stop - i);
            }
        },
        &scale);
}

}  // namespace RK_ISA
}  // namespace rk

RK_REGISTER(bradley_terry_fwd_f32);
RK_REGISTER(plackett_luce_fwd_f32);
RK_REGISTER(bradley_terry_bwd_f32);
