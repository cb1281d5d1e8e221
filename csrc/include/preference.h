// Arithmetic of the preference losses: one pair of responses, or one response of KTO.
#pragma once
#include "rk.h"

namespace rk {
namespace RK_ISA {

enum PreferenceKind { PREF_SIGMOID, PREF_IPO, PREF_HINGE, PREF_ORPO, PREF_SIMPO, PREF_KTO };  // as in LOSS_TYPES

struct PreferenceNumbers {
    float beta, label_smoothing, target_margin;
};

template <class T>
struct PreferenceTerm {
    T loss;
    T slope_chosen, slope_rejected;  // d loss / d what the loss compares
};

template <class T>
struct Sigmoid {
    T loss;          // -log sigmoid(x)
    T value, below;  // sigmoid(x), sigmoid(-x)
};

// Exact for any x: -120 gives 120, and +-inf their limits.
template <class T>
RK_HD Sigmoid<T> sigmoid_of(T x) {
    const T u = exp_f32(-absolute(x));
    const T large = 1.0f / (1.0f + u), small = u * large;
    const T loss = (x < T{} ? -x : T{}) + log1p_unit_f32(u);
    return {loss, x < T{} ? small : large, x < T{} ? large : small};
}

// e^x - 1 for x <= 0. At most 1.5 ulp: above -0.35 its Taylor series to x^8, remainder 3e-10 relative.
template <class T>
RK_HD T expm1_nonpositive_f32(T x) {
    T p = x * (1.0f / 40320.0f) + 1.0f / 5040.0f;
    p = p * x + 1.0f / 720.0f;
    p = p * x + 1.0f / 120.0f;
    p = p * x + 1.0f / 24.0f;
    p = p * x + 1.0f / 6.0f;
    p = p * x + 0.5f;
    const T near = x + x * x * p;
    return x > splat<T>(-0.35f) ? near : exp_f32(x) - 1.0f;
}

// log v for normal v in (0, 1]. At most 2 ulp: v = m 2^e with m in [0.71, 1.42), log m = 2 atanh((m - 1) / (m + 1)),
// the series in s^2 <= 0.0295, remainder 1e-9 relative.
template <class T>
RK_HD T log_unit_f32(T v) {
    const auto bits = to_bits(v) - 0x3f3504f3;  // of sqrt(1/2)
    const auto e = bits >> 23;
    const T m = from_bits<T>((bits & 0x7fffff) + 0x3f3504f3);
    const T n = from_bits<T>(to_bits(splat<T>(12582912.0f)) + e) - 12582912.0f;
    const T s = (m - 1.0f) / (m + 1.0f);
    const T q = s * s;
    T p = q * (1.0f / 9.0f) + 1.0f / 7.0f;
    p = p * q + 1.0f / 5.0f;
    p = p * q + 1.0f / 3.0f;
    return n * 0.693359375f + (2.0f * s + (2.0f * s * q * p - n * 2.12194440e-4f));
}

// (1 - e)(-log sigmoid(x)) + e(-log sigmoid(-x)) = -log sigmoid(x) + e x, and its slope e - sigmoid(-x).
template <class T>
RK_HD PreferenceTerm<T> sigmoid_term(T gap, PreferenceNumbers n) {
    const T x = n.beta * gap - n.target_margin;
    const Sigmoid<T> s = sigmoid_of(x);
    const T loss = n.label_smoothing > 0.0f ? s.loss + n.label_smoothing * x : s.loss;  // also where x is infinite
    const T slope = n.beta * (n.label_smoothing - s.below);
    return {loss, slope, -slope};
}

template <class T>
RK_HD PreferenceTerm<T> ipo_term(T gap, PreferenceNumbers n) {
    const T off = gap - 0.5f / n.beta;
    return {off * off, 2.0f * off, -2.0f * off};
}

template <class T>
RK_HD PreferenceTerm<T> hinge_term(T gap, PreferenceNumbers n) {
    const T miss = 1.0f - n.beta * gap;
    const T slope = miss > T{} ? splat<T>(n.beta) : T{};
    return {miss <= T{} ? T{} : miss, -slope, slope};  // a NaN stays one
}

// Odds l - log(1 - e^l) of mean log-probs, held at -eps: a response with probability 1 has infinite odds. Held, their
// slope is 0; otherwise it is 1 / (1 - e^l).
template <class T>
struct Odds {
    T value, slope;
};

template <class T>
RK_HD Odds<T> log_odds(T mean_log_prob) {
    const T most = splat<T>(-1.1920929e-7f);
    const T l = mean_log_prob > most ? most : mean_log_prob;
    const T rest = -expm1_nonpositive_f32(l);
    return {l - log_unit_f32(rest), mean_log_prob > most ? T{} : 1.0f / rest};
}

template <class T>
RK_HD PreferenceTerm<T> orpo_term(T chosen, T rejected, PreferenceNumbers n) {
    const Odds<T> good = log_odds(chosen), bad = log_odds(rejected);
    const Sigmoid<T> s = sigmoid_of(good.value - bad.value);
    const T slope = n.beta * s.below;
    return {n.beta * s.loss - chosen, -slope * good.slope - 1.0f, slope * bad.slope};
}

template <int Kind, class T>
RK_HD PreferenceTerm<T> preference_term(T chosen, T rejected, PreferenceNumbers n) {
    if (Kind == PREF_ORPO) return orpo_term(chosen, rejected, n);
    if (Kind == PREF_IPO) return ipo_term(chosen - rejected, n);
    if (Kind == PREF_HINGE) return hinge_term(chosen - rejected, n);
    return sigmoid_term(chosen - rejected, n);
}

template <class T>
struct KtoTerm {
    T loss;   // weight * sigmoid(-x)
    T slope;  // -d loss / d x
};

// x = beta (c - z) of a chosen response, beta (z - r) of a rejected one.
template <class T>
RK_HD KtoTerm<T> kto_term(T x, float weight) {
    const Sigmoid<T> s = sigmoid_of(x);
    return {weight * s.below, weight * s.value * s.below};
}

}  // namespace RK_ISA
}  // namespace rk
