// Arithmetic of log-probs and entropy: where rows lie, a row's statistics, their merge, and one entry of the gradient.
#pragma once
#include "rk.h"

namespace rk {
namespace RK_ISA {

// Where rows of entries begin: T of them `stride` entries apart, the next T of them `batch_stride` further on.
struct Planes {
    int64_t T, batch_stride, stride;

    RK_HD int64_t at(int64_t row) const {
        if (row < T) return row * stride;
#ifdef __CUDACC__  // a grid has fewer than 2^32 blocks, and so have rows
        const int64_t plane = (uint32_t)row / (uint32_t)T;
#else
        const int64_t plane = row / T;
#endif
        return plane * batch_stride + (row - plane * T) * stride;
    }
};

// Statistics of some of a row's entries z: max, sum exp(z - max) over the others than the maximum, so that the sum keeps
// its digits where it is far below 1, and sum exp(z - max) (z - max). Equal maxima: all but one are others. Nothing but
// -inf: {-inf, 0, 0}.
struct RowStats {
    float max;
    double rest;
    double weighted;
};

RK_HD RowStats no_stats() { return {-__builtin_inff(), 0.0, 0.0}; }

// The same statistics told from another, higher maximum: the old one joins the others.
RK_HD RowStats raise_max(RowStats s, float max) {
    if (s.max == max || s.max == -__builtin_inff()) return {max, s.rest, s.weighted};
    const double gap = (double)s.max - (double)max, sum = 1.0 + s.rest;
    const double factor = __builtin_exp(gap);
    return {max, factor * sum, factor * (s.weighted + sum * gap)};
}

RK_HD RowStats merge_stats(RowStats a, RowStats b) {
    const float max = a.max > b.max ? a.max : b.max;
    const RowStats left = raise_max(a, max), right = raise_max(b, max);
    const double second = a.max == b.max && max != -__builtin_inff() ? 1.0 : 0.0;
    return {max, left.rest + right.rest + second, left.weighted + right.weighted};
}

// More of a row: sum exp(z - max)^2 over the others than the maximum; sum and number of the entries that are not -inf;
// where the first one at the maximum stands.
struct RowExtras {
    double squares, total, count;
    int64_t first;
};

// The same told from `max`, which is at least `old`, the maximum that they were told from; `first` is left.
RK_HD RowExtras raise_max(RowExtras e, float old, float max) {
    if (old != max && old != -__builtin_inff())
        e.squares = __builtin_exp(2.0 * ((double)old - (double)max)) * (1.0 + e.squares);
    return e;
}

struct RowResult {
    float logprob, entropy, max, log_sum;
};

// log sum p^2 and the mean of the entries that are not -inf; -inf for a row of nothing else.
struct RowMore {
    float log_squares, mean;
};

RK_HD RowMore finish_extras(RowStats s, RowExtras e) {
    if (e.count == 0.0 && s.rest == 0.0) return {-__builtin_inff(), -__builtin_inff()};
    const double log_squares = __builtin_log1p(e.squares) - 2.0 * __builtin_log1p(s.rest);
    return {log_squares > 0.0 ? 0.0f : (float)log_squares, (float)(e.total / e.count)};
}

// log p = (z_label - max) - log(sum),  entropy = log(sum) - weighted / sum,  sum = 1 + rest; a row of nothing but -inf has
// -inf and 0.
RK_HD RowResult finish_stats(RowStats s, double label_logit) {
    if (s.max == -__builtin_inff() && s.rest == 0.0) return {-__builtin_inff(), 0.0f, -__builtin_inff(), 0.0f};
    const double log_sum = __builtin_log1p(s.rest);
    const double logprob = label_logit - (double)s.max - log_sum;
    return {logprob > 0.0 ? 0.0f : (float)logprob, (float)(log_sum - s.weighted / (1.0 + s.rest)), s.max,
            (float)log_sum};
}

// softcap * tanh(x / softcap) * scale, and what the gradient of x carries from it: (1 - tanh^2) * scale.
template <class T>
struct Capped {
    T z, slope;
};

template <class T>
RK_HD Capped<T> cap(T x, float inverse_softcap, float softcap, float scale) {
    const T t = tanh_f32(x * inverse_softcap);
    const T z = t * softcap * scale;
    return {x == splat<T>(-__builtin_inff()) ? x : z, (1.0f - t * t) * scale};
}

// The same slope from z: tanh is z / (softcap * scale). 0 where z is -inf.
template <class T>
RK_HD T cap_slope(T z, float inverse, float scale) {
    const T t = z * inverse;
    return z == splat<T>(-__builtin_inff()) ? T{} : (1.0f - t * t) * scale;
}

// What a loss sends to a row's results: its log-prob, entropy and log sum exp(z), and to every entry that is not -inf.
struct RowUpstream {
    float log_prob, entropy, log_sum_exp, each;
};

// How these, g, h and s, reach an entry with log-prob l and probability p: -p (g - s + h (l + entropy)) = -p (base + h l).
struct RowSlope {
    float base, entropy_grad, each;
};

RK_HD RowSlope row_slope(RowUpstream u, float entropy) {
    return {u.log_prob - u.log_sum_exp + u.entropy * entropy, u.entropy, u.each};
}

// Each: whether s.each is not 0.
template <bool Each, class T>
RK_HD T entry_gradient(T log_p, RowSlope s) {
    const T finite = log_p < splat<T>(EXP_FLOOR) ? splat<T>(EXP_FLOOR) : log_p;  // p = 0 there, and 0 * inf is NaN
    const T d = -exp_nonpositive_f32(log_p) * (s.base + s.entropy_grad * finite);
    return Each ? d + (log_p == splat<T>(-__builtin_inff()) ? T{} : splat<T>(s.each)) : d;
}

// The label's entry: g (1 - p) - h p (l + entropy) + s p + each, where 1 - p does not cancel.
RK_HD float label_gradient(float logprob, float entropy, RowUpstream u) {
    const double p = __builtin_exp((double)logprob);
    const double through_entropy = p == 0.0 ? 0.0 : (double)u.entropy * p * ((double)logprob + (double)entropy);
    const double through_sum = (double)u.log_sum_exp * p + (double)u.each;
    return (float)(-(double)u.log_prob * __builtin_expm1((double)logprob) - through_entropy + through_sum);
}

}  // namespace RK_ISA
}  // namespace rk
