// Arithmetic of KL divergences: the estimators of one sampled token, and a row's exact divergence and its gradients.
#pragma once
#include "logprobs.h"

namespace rk {
namespace RK_ISA {

enum KlEstimator { KL_K1 = 1, KL_K2 = 2, KL_K3 = 3 };

// log p - log q; 0 where both are the same, also both -inf.
template <class T>
RK_HD T log_ratio(T log_p, T log_q) {
    return log_p == log_q ? T{} : log_p - log_q;
}

// exp(-d) - 1 + d, never negative. At most 3 ulp while it is finite. With -d = n ln 2 + r, |r| <= ln(2)/2, and
// e^r = 1 + r + r^2 q(r), it is 2^n r^2 q + (2^n - 1) r + (2^n - 1 - n ln 2): no term cancels against another, and
// near d = 0, where exp(-d) - 1 would, only the first is left.
template <class T>
RK_HD T kl_k3(T d) {
    const float shift = 12582912.0f;  // 1.5 * 2^23, as in exp_f32
    const T x = d < splat<T>(-89.0f) ? splat<T>(89.0f) : d > splat<T>(89.0f) ? splat<T>(-89.0f) : -d;
    const T shifted = x * 1.44269504f + shift;
    const T n = shifted - shift;
    const auto k = to_bits(shifted) - to_bits(splat<T>(shift));
    T r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    T q = r * 1.98578161e-4f + 1.393364233e-3f;  // minimax on |r| <= ln(2)/2: remainder 3e-9
    q = q * r + 8.333360769e-3f;
    q = q * r + 4.166646513e-2f;
    q = q * r + 1.666666653e-1f;
    q = q * r + 5.000000013e-1f;
    const T half = from_bits<T>((k + 126) << 23);  // 2^n / 2, and half of every term: 2^128 would overflow
    const T less = half - 0.5f;
    const T rest = (less - n * 0.3466796875f) + n * 1.06097220e-4f;
    const T general = 2.0f * (half * (q * r * r) + (less * r + rest));
    return d > splat<T>(64.0f) ? d - 1.0f : general;  // exp(-64) is below the last bit of 63
}

// The same from the parts of exp(-d), whose series ends a little earlier: at most 3.5 ulp.
template <class T>
RK_HD T kl_k3_of(ExpParts<T> e, T d) {
    const T half = e.half_power();
    const T less = half - 0.5f;
    const T rest = (less - e.n * 0.3466796875f) + e.n * 1.06097220e-4f;
    const T general = 2.0f * (half * e.r * (e.q * e.r) + (less * e.r + rest));
    return d > splat<T>(64.0f) ? d - 1.0f : general;
}

// Its slope 1 - exp(-d). At most 2 ulp while it is finite: below |d| = 0.5 by its series.
template <class T>
RK_HD T kl_k3_slope(T d) {
    T p = 1.0f / 40320.0f - d * (1.0f / 362880.0f);
    p = 1.0f / 5040.0f - p * d;
    p = 1.0f / 720.0f - p * d;
    p = 1.0f / 120.0f - p * d;
    p = 1.0f / 24.0f - p * d;
    p = 1.0f / 6.0f - p * d;
    p = 0.5f - p * d;
    const T series = d - p * d * d;
    return absolute(d) < splat<T>(0.5f) ? series : 1.0f - exp_f32(-d);
}

// Estimators of KL(policy || reference) from one sampled token, in nats; d = log_ratio(policy, reference).
template <int Estimator, class T>
RK_HD T kl_estimate(T d) {
    if (Estimator == KL_K1) return d;
    if (Estimator == KL_K2) return 0.5f * d * d;
    return kl_k3(d);
}

template <int Estimator, class T>
RK_HD T kl_estimate_slope(T d) {
    if (Estimator == KL_K1) return splat<T>(1.0f);
    if (Estimator == KL_K2) return d;
    return kl_k3_slope(d);
}

// The slope times an upstream gradient; nothing, where that is 0, of slopes that are not finite.
template <int Estimator, class T>
RK_HD T kl_estimate_grad(T upstream, T d) {
    return upstream == T{} ? T{} : upstream * kl_estimate_slope<Estimator>(d);
}

// 2^x for x <= 0.5, within 1.25 ulp on [-125.5, 0.5]; 0 below, NaN stays NaN. Cheaper than an exp: no product is needed
// to find the integer part, nor to take it off.
template <class T>
RK_HD T exp2_nonpositive_f32(T x) {
    const float shift = 12582912.0f + 127.0f;  // rounds to an integer, which sits in the low bits as a biased exponent
    const T shifted = x + shift;
    const T r = x - (shifted - shift);
    T p = r * 1.5353362e-4f + 1.3398875e-3f;  // minimax on |r| <= 1/2 with p(0) = 1: remainder 1.6e-8
    p = p * r + 9.6184369e-3f;
    p = p * r + 5.5503324e-2f;
    p = p * r + 0.24022648f;
    p = p * r + 0.69314718f;
    p = p * r + 1.0f;
    const T value = p * from_bits<T>(to_bits(shifted) << 23);
    return x < splat<T>(-125.5f) ? T{} : value;
}

// What KL(a || b) needs of the logits x_a and x_b seen so far, with d = x - max and exp(z - max z) = 2^(scale d). Nothing
// but -inf has maximum -inf and rest 0.
struct KlStats {
    float max_a, max_b;     // of x
    double rest_a, rest_b;  // sum exp(z - max z) over the others than the maximum, as in logprobs.h
    double gap;             // sum exp(z_a - max z_a) (d_a - d_b); inf where a has probability and b has none
};

RK_HD KlStats no_kl_stats() { return {-__builtin_inff(), -__builtin_inff(), 0.0, 0.0, 0.0}; }

// The same statistics told from maxima that are higher, if these are: the old ones join the others.
RK_HD KlStats raise_kl_max(KlStats s, float max_a, float max_b, float scale) {
    const bool some_a = s.max_a != -__builtin_inff(), some_b = s.max_b != -__builtin_inff();
    const double sum_a = s.rest_a + (some_a ? 1.0 : 0.0);
    const double fall_b = some_b && max_b > s.max_b ? (double)s.max_b - (double)max_b : 0.0;
    const double fall_a = some_a && max_a > s.max_a ? (double)s.max_a - (double)max_a : 0.0;
    if (fall_a < 0.0 || fall_b < 0.0) {
        const double factor = __builtin_exp2(fall_a * (double)scale);
        if (s.gap != __builtin_inf()) s.gap = factor * (s.gap + sum_a * (fall_a - fall_b));
        if (fall_a < 0.0) s.rest_a = factor * sum_a;
        if (fall_b < 0.0) s.rest_b = __builtin_exp2(fall_b * (double)scale) * (1.0 + s.rest_b);
    }
    s.max_a = max_a > s.max_a ? max_a : s.max_a;
    s.max_b = max_b > s.max_b ? max_b : s.max_b;
    return s;
}

template <class T>
struct KlTerms {
    T e_a, e_b;  // exp(z - max z)
    T gap;       // e_a (d_a - d_b); 0 where a has no probability
};

// One entry, from d = x - max.
template <class T>
RK_HD KlTerms<T> kl_terms(T d_a, T d_b, float scale) {
    const T y_a = d_a * scale;
    const T e_a = exp2_nonpositive_f32(y_a);
    return {e_a, exp2_nonpositive_f32(d_b * scale), y_a < splat<T>(-125.5f) ? T{} : e_a * (d_a - d_b)};
}

struct KlSide {  // max x and log sum exp(z - max z); -inf and 0 for nothing but -inf
    float max, log_sum;
};

RK_HD KlSide kl_side(float max, double rest) { return {max, (float)__builtin_log1p(rest)}; }

// KL = gap / sum_a, in units of z, - log(sum_a / sum_b), and at least 0; 0 where a is no distribution. NaN stays NaN. Of
// two distributions that are nearly certain of the same token each term is as small as what they leave to the others.
RK_HD float finish_kl(KlStats s, float scale) {
    if (s.max_a == -__builtin_inff() && s.rest_a == 0.0) return s.rest_b == s.rest_b ? 0.0f : (float)s.rest_b;
    if (s.gap == __builtin_inf()) return __builtin_inff();
    const double gap = s.gap / (1.0 + s.rest_a) * (0.6931471805599453 * (double)scale);
    const double kl = gap - (__builtin_log1p(s.rest_a) - __builtin_log1p(s.rest_b));
    return kl < 0.0 ? 0.0f : (float)kl;
}

// log p = (x - start) * scale - log_sum.
struct KlLine {
    float start, scale, log_sum;

    template <class T>
    RK_HD T operator()(T x) const {
        return (x - start) * scale - log_sum;
    }
};

RK_HD KlLine kl_line(KlSide side, double temperature) {
    return {side.max == -__builtin_inff() ? 0.0f : side.max, (float)(1.0 / temperature), side.log_sum};
}

// d KL(a || b) / d z_a = a (log a - log b - KL) of an entry with these log-probs.
template <class T>
RK_HD T kl_slope_a(T a, T log_a, T log_b, float kl) {
    return log_a < splat<T>(-87.0f) ? T{} : a * (log_a - log_b - kl);
}

// d KL / d z_b is b - a. Where both are above a half, that is (b - 1) - (a - 1), which keeps its digits next to 1.
constexpr float KL_LOG_HALF = -0.69314718f;

template <class T>
RK_HD T kl_likely_slope_b(T log_a, T log_b) {
    return expm1_nonpositive_f32(log_b) - expm1_nonpositive_f32(log_a);
}

}  // namespace RK_ISA
}  // namespace rk
