// Arithmetic of the preference losses: one pair of responses, or one response of KTO.
#pragma once
#include "rk.h"

namespace rk {
namespace RK_ISA {

enum PreferenceKind {  // as in TERMS of reference/preference.py, which says what a and b are
    PREF_SIGMOID, PREF_IPO, PREF_HINGE, PREF_ORPO, PREF_KTO, PREF_EXO_PAIR, PREF_DISCOPOP, PREF_NCA_PAIR, PREF_BCO_PAIR,
    PREF_SPPO_HARD, PREF_APO_ZERO, PREF_APO_DOWN
};
enum Divergence { REVERSE_KL, JS_DIVERGENCE, ALPHA_DIVERGENCE };  // as in DIVERGENCES

struct PreferenceNumbers {
    float beta, a, b;
    float shift;  // of the rewards, for bco_pair
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
    const T x = n.beta * gap - n.b;
    const Sigmoid<T> s = sigmoid_of(x);
    const T loss = n.a != 0.0f ? s.loss + n.a * x : s.loss;  // also where x is infinite
    const T slope = n.beta * (n.a - s.below);
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

// weight x, and 0 where the weight is 0, though x be infinite there.
template <class T>
RK_HD T times(T weight, T x) {
    return weight == T{} ? T{} : weight * x;
}

// KL(q || p) of q = (sigmoid(x), sigmoid(-x)) and p = e^-(a, b): q log q + (1 - q) log(1 - q) is
// -log(1 + e^-|x|) - min(q, 1 - q) |x|, whose parts do not cancel.
template <class T>
RK_HD PreferenceTerm<T> exo_pair_term(T gap, PreferenceNumbers n) {
    const T x = n.beta * gap, size = absolute(x);
    const Sigmoid<T> s = sigmoid_of(size);  // s.loss = log(1 + e^-|x|), s.below the smaller probability
    const T q = x < T{} ? s.below : s.value, rest = x < T{} ? s.value : s.below;
    const T slope = n.beta * times(s.value * s.below, x - (n.b - n.a));
    return {q * n.a + rest * n.b - s.loss - times(s.below, size), slope, -slope};
}

// m = sigmoid(x / tau): (1 - m) (-log sigmoid(x)) + m e^-x, the latter in one exponent, since its factors overflow and
// vanish together.
template <class T>
RK_HD PreferenceTerm<T> discopop_term(T gap, PreferenceNumbers n) {
    const T x = n.beta * gap, warm = x / n.a;
    const Sigmoid<T> s = sigmoid_of(x), m = sigmoid_of(warm);
    const T larger = x < T{} ? m.below : m.value;
    const T exponential = exp_f32(x < T{} ? warm - x : -x) * larger;
    const T slope = times(m.value * m.below / n.a, s.loss) + m.below * s.below + exponential * (1.0f - m.below / n.a);
    return {times(m.below, s.loss) + exponential, -n.beta * slope, n.beta * slope};
}

template <class T>
RK_HD PreferenceTerm<T> nca_pair_term(T chosen, T rejected, PreferenceNumbers n) {
    const T win = n.beta * chosen, lose = n.beta * rejected;
    const Sigmoid<T> w = sigmoid_of(win), against = sigmoid_of(-win), l = sigmoid_of(-lose);
    return {w.loss + 0.5f * against.loss + 0.5f * l.loss, n.beta * (0.5f * w.value - w.below), 0.5f * n.beta * l.below};
}

template <class T>
RK_HD PreferenceTerm<T> bco_pair_term(T chosen, T rejected, PreferenceNumbers n) {
    const Sigmoid<T> w = sigmoid_of(n.beta * chosen - n.shift), l = sigmoid_of(n.shift - n.beta * rejected);
    return {w.loss + l.loss, -n.beta * w.below, n.beta * l.below};
}

template <class T>
RK_HD PreferenceTerm<T> sppo_hard_term(T chosen, T rejected, PreferenceNumbers n) {
    const T off = chosen - 0.5f / n.beta, other = rejected + 0.5f / n.beta;
    return {off * off + other * other, 2.0f * off, 2.0f * other};
}

template <class T>
RK_HD PreferenceTerm<T> apo_zero_term(T chosen, T rejected, PreferenceNumbers n) {
    const Sigmoid<T> w = sigmoid_of(n.beta * chosen), l = sigmoid_of(n.beta * rejected);
    return {w.below + l.value, -n.beta * (w.value * w.below), n.beta * (l.value * l.below)};
}

template <class T>
RK_HD PreferenceTerm<T> apo_down_term(T chosen, T rejected, PreferenceNumbers n) {
    const Sigmoid<T> w = sigmoid_of(n.beta * chosen), gap = sigmoid_of(n.beta * (chosen - rejected));
    const T between = n.beta * (gap.value * gap.below);
    return {w.value + gap.below, n.beta * (w.value * w.below) - between, between};
}

template <int Kind, class T>
RK_HD PreferenceTerm<T> preference_term(T chosen, T rejected, PreferenceNumbers n) {
    if (Kind == PREF_ORPO) return orpo_term(chosen, rejected, n);
    if (Kind == PREF_IPO) return ipo_term(chosen - rejected, n);
    if (Kind == PREF_HINGE) return hinge_term(chosen - rejected, n);
    if (Kind == PREF_EXO_PAIR) return exo_pair_term(chosen - rejected, n);
    if (Kind == PREF_DISCOPOP) return discopop_term(chosen - rejected, n);
    if (Kind == PREF_NCA_PAIR) return nca_pair_term(chosen, rejected, n);
    if (Kind == PREF_BCO_PAIR) return bco_pair_term(chosen, rejected, n);
    if (Kind == PREF_SPPO_HARD) return sppo_hard_term(chosen, rejected, n);
    if (Kind == PREF_APO_ZERO) return apo_zero_term(chosen, rejected, n);
    if (Kind == PREF_APO_DOWN) return apo_down_term(chosen, rejected, n);
    return sigmoid_term(chosen - rejected, n);
}

// e^x - 1. At most 4 ulp: for x > 0 it is -(e^-x - 1) e^x.
template <class T>
RK_HD T expm1_f32(T x) {
    const T down = expm1_nonpositive_f32(-absolute(x));
    return x > T{} ? -down * exp_f32(x) : x != x ? x : down;
}

template <class T>
struct Score {
    T value, slope;
};

// f'(e^x) of an f-divergence between policy and reference, and its derivative in x. JS: log(2t / (t + 1)); alpha, with
// power = alpha - 1: (t^power - 1) / power, whose exponent is held at 80, from where on the score is constant.
template <class T>
RK_HD Score<T> score_of(T x, int64_t divergence, float power) {
    if (divergence == JS_DIVERGENCE) {
        const Sigmoid<T> s = sigmoid_of(x);
        return {0.69314718f - s.loss, s.below};
    }
    const T held = splat<T>(80.0f), exponent = power * x;
    const T e = exponent > held ? held : exponent;
    return {expm1_f32(e) / power, exponent > held ? T{} : exp_f32(e)};
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
