// Arithmetic of the policy losses: each objective's term of a token, what it needs of a whole sequence, and the KL to a
// reference. What the terms are stands in rlhf_kernels/reference/policy.py.
//
// An objective is a struct: `of` makes a token's term; SEQUENCE says that it reads `of_sequence` (`log_ratio_of` is then
// what a token adds to the sequence's log-ratio, and `sequence_part` ends it), COEFFICIENT that it reads that number.
#pragma once
#include "kl.h"
#include "ppo.h"
#include "preference.h"

namespace rk {
namespace RK_ISA {

// As in TERMS, ESTIMATORS and KL_GRADIENTS of reference/policy.py.
enum PolicyObjective {
    OBJ_CLIP, OBJ_SEQUENCE, OBJ_CISPO, OBJ_SAPO, OBJ_GMPO, OBJ_DPPO_TV, OBJ_DPPO_KL, OBJ_PLAIN, OBJ_DRO, OBJ_KL_COV, OBJECTIVES
};
enum RefKl { REF_K1, REF_K2, REF_K3, REF_ABS, REF_KLS };
enum RefKlGradient { REF_PLAIN, REF_STRAIGHT_THROUGH, REF_RATIO, REF_STRAIGHT_THROUGH_RATIO, REF_GRADIENTS };

template <class T>
RK_HD T held_within(T x, T low, T high) {  // a NaN stays NaN
    return at_most(at_least(x, low), high);
}

template <class T>
struct PolicyNumbers {
    T a, b, c;      // as the objective reads them
    T clamp;        // the log-ratio is held within +- this
    T least, most;  // and the ratio within these, e^-clamp and e^clamp
};

RK_HD PolicyNumbers<float> policy_numbers(double a, double b, double c, double clamp) {
    return {(float)a, (float)b, (float)c, (float)clamp, exp_f32(-(float)clamp), exp_f32((float)clamp)};
}

template <class T>
RK_HD PolicyNumbers<T> splat_numbers(PolicyNumbers<float> n) {
    return {splat<T>(n.a),     splat<T>(n.b),     splat<T>(n.c),
            splat<T>(n.clamp), splat<T>(n.least), splat<T>(n.most)};
}

// What the objectives read of a token; all of a masked one is 0.
template <class T>
struct PolicyToken {
    T log_prob, old_log_prob, advantage;
    T raw;            // log_prob - old_log_prob
    ExpParts<T> exp;  // of e^raw
    T ratio;          // e^raw, held
    Truth<T> stuck;   // the clamp holds, so that nothing moves with log_prob
    T of_sequence, length;  // as `sequence_part` made them
    T coefficient;
};

// raw: log_prob - old_log_prob. Not Clamped: the clamp is infinite.
template <bool Clamped = true, class T>
RK_HD PolicyToken<T> policy_token(T log_prob, T old_log_prob, T advantage, T raw, PolicyNumbers<T> n) {
    const ExpParts<T> exp = exp_parts(raw);
    const T ratio = Clamped ? held_within(exp_of(exp), n.least, n.most) : exp_of(exp);
    const Truth<T> stuck = Clamped ? absolute(raw) > n.clamp : Truth<T>{};
    return {log_prob, old_log_prob, advantage, raw, exp, ratio, stuck, T{}, T{}, T{}};
}

template <class T>
RK_HD PolicyToken<T> policy_token(T log_prob, T old_log_prob, T advantage, PolicyNumbers<T> n) {
    return policy_token(log_prob, old_log_prob, advantage, log_prob - old_log_prob, n);
}

template <class T>
RK_HD T held_log_ratio(T raw, PolicyNumbers<T> n) {
    return held_within(raw, -n.clamp, n.clamp);
}

// What the kept tokens of a sequence come to.
struct SequenceSums {
    double log_ratio;  // of log_ratio_of
    double advantage;
    int64_t length;
};

struct SequencePart {
    float of_sequence;
    float length;  // factor of the slope
};

struct TokenObjective {
    static constexpr bool SEQUENCE = false, COEFFICIENT = false;
};

struct ClipObjective : TokenObjective {
    template <class T>
    RK_HD static PolicyTerm<T> of(const PolicyToken<T>& t, const PolicyNumbers<T>& n) {
        PolicyTerm<T> term = clip_term(t.ratio, t.advantage, RatioRange<T>{n.a, n.b, n.c});
        term.slope = t.stuck ? T{} : term.slope;
        return term;
    }
};

struct SequenceObjective {  // of_sequence: the ratio
    static constexpr bool SEQUENCE = true, COEFFICIENT = false;

    template <class T>
    RK_HD static T log_ratio_of(T raw, T advantage, const PolicyNumbers<T>& n) {
        (void)advantage;
        return held_log_ratio(raw, n);
    }

    RK_HD static SequencePart sequence_part(SequenceSums s, bool summed) {
        const double count = s.length > 0 ? (double)s.length : 1.0;
        return {(float)__builtin_exp(summed ? s.log_ratio : s.log_ratio / count), summed ? (float)s.length : 1.0f};
    }

    template <class T>
    RK_HD static PolicyTerm<T> of(const PolicyToken<T>& t, const PolicyNumbers<T>& n) {
        PolicyTerm<T> term = clip_term(t.of_sequence, t.advantage, RatioRange<T>{n.a, n.b, n.c});
        term.slope = t.stuck ? T{} : term.slope * t.length;
        return term;
    }
};

struct CispoObjective : TokenObjective {
    template <class T>
    RK_HD static PolicyTerm<T> of(const PolicyToken<T>& t, const PolicyNumbers<T>& n) {
        const T slope = t.advantage == T{} ? T{} : -t.advantage * held_within(t.ratio, n.a, n.b);
        return {t.ratio, slope * t.log_prob, slope, t.ratio < n.a, t.ratio > n.b, Truth<T>{}};
    }
};

struct SapoObjective : TokenObjective {
    template <class T>
    RK_HD static PolicyTerm<T> of(const PolicyToken<T>& t, const PolicyNumbers<T>& n) {
        const T zero = {};
        const T temperature = t.advantage > zero ? n.a : n.b;
        const Sigmoid<T> gate = sigmoid_of(temperature * (t.ratio - 1.0f));
        const T steep = gate.below == zero ? zero : t.ratio * (gate.value * gate.below);  // an infinite ratio: 0
        return {t.ratio, -4.0f / temperature * gate.value * t.advantage,
                t.stuck ? zero : -4.0f * t.advantage * steep, Truth<T>{}, Truth<T>{}, Truth<T>{}};
    }
};

struct GmpoObjective {  // of_sequence: the sequence's loss; that of a masked token must be taken as 0
    static constexpr bool SEQUENCE = true, COEFFICIENT = false;

    template <class T>
    RK_HD static T log_ratio_of(T raw, T advantage, const PolicyNumbers<T>& n) {
        const T u = held_log_ratio(raw, n);
        const T zero = {};
        const T below = u < -n.a ? -n.a : u;
        const T above = u > n.b ? n.b : u;
        return advantage > zero ? above : advantage < zero ? below : advantage == zero ? zero : advantage;
    }

    RK_HD static SequencePart sequence_part(SequenceSums s, bool) {
        const double count = s.length > 0 ? (double)s.length : 1.0;
        return {(float)(-(s.advantage / count) * __builtin_exp(s.log_ratio / count)), 1.0f};
    }

    template <class T>
    RK_HD static PolicyTerm<T> of(const PolicyToken<T>& t, const PolicyNumbers<T>& n) {
        const T zero = {};
        const T u = held_log_ratio(t.raw, n);
        const auto high = (t.advantage > zero) & (u > n.b);
        const auto low = (t.advantage < zero) & (u < -n.a);
        const auto stops = low | high | t.stuck | (t.advantage == zero);
        return {t.ratio, t.of_sequence, stops ? zero : t.of_sequence, low, high, Truth<T>{}};
    }
};

// log(1 - e^x) for x <= 0. At most 4 ulp: near 0 by 1 - e^x, which does not cancel there, far from it by log(1 + u) of
// u = -e^x; -inf from 0 up, -0 where e^x is 0.
template <class T>
RK_HD T log1m_exp_f32(T x) {
    const T rest = -expm1_nonpositive_f32(x);
    const T normal = rest > T{} ? rest : splat<T>(1.0f);
    const auto small = normal < splat<T>(1.17549435e-38f);
    const T near = log_unit_f32(small ? normal * 16777216.0f : normal) - (small ? splat<T>(16.6355324f) : T{});
    const T far = log1p_unit_f32(-exp_f32(x));
    const T value = x > splat<T>(-0.69314718f) ? near : far;
    return rest > T{} ? value : x == x ? splat<T>(-__builtin_inff()) : x;
}

// KL between the coins that say whether the sampled token comes.
template <class T>
RK_HD T binary_kl(T old_log_prob, T log_prob) {
    const T rest = -expm1_nonpositive_f32(old_log_prob);
    const T other = rest * (log1m_exp_f32(old_log_prob) - log1m_exp_f32(log_prob));
    return exp_f32(old_log_prob) * (old_log_prob - log_prob) + (old_log_prob >= T{} ? T{} : other);
}

template <bool Kl>
struct DppoObjective : TokenObjective {
    template <class T>
    RK_HD static PolicyTerm<T> of(const PolicyToken<T>& t, const PolicyNumbers<T>& n) {
        const T zero = {};
        const T rise = exp_f32(t.log_prob) - exp_f32(t.old_log_prob);
        const T gap = Kl ? binary_kl(t.old_log_prob, t.log_prob) : rise;
        const auto far_up = Kl ? (gap > n.b) & (rise > zero) : gap > n.b;
        const auto far_down = Kl ? (gap > n.a) & (rise < zero) : gap < -n.a;
        const auto high = far_up & (t.advantage > zero);
        const auto low = far_down & (t.advantage <= zero);
        const auto over = t.ratio > n.c;
        const auto stops = low | high | (t.advantage == zero);
        const T slope = stops ? zero : -t.advantage * (over ? n.c : t.ratio);
        return {t.ratio, slope * t.log_prob, slope, low, high, over & ((low | high) == Truth<T>{})};
    }
};

struct PlainObjective : TokenObjective {
    template <class T>
    RK_HD static PolicyTerm<T> of(const PolicyToken<T>& t, const PolicyNumbers<T>&) {
        return {t.ratio, -t.advantage * t.log_prob, -t.advantage, Truth<T>{}, Truth<T>{}, Truth<T>{}};
    }
};

struct DroObjective : TokenObjective {
    template <class T>
    RK_HD static PolicyTerm<T> of(const PolicyToken<T>& t, const PolicyNumbers<T>& n) {
        const T u = held_log_ratio(t.raw, n);
        const T loss = 0.5f * n.a * (u * u) - t.advantage * t.log_prob;
        return {t.ratio, loss, (t.stuck ? T{} : n.a * u) - t.advantage, Truth<T>{}, Truth<T>{}, Truth<T>{}};
    }
};

struct KlCovObjective : TokenObjective {
    static constexpr bool COEFFICIENT = true;

    template <class T>
    RK_HD static PolicyTerm<T> of(const PolicyToken<T>& t, const PolicyNumbers<T>& n) {
        const T zero = {};
        const T u = held_log_ratio(t.raw, n);
        const T unclipped = t.advantage == zero ? zero : -t.advantage * t.ratio;
        const T sign = u > zero ? splat<T>(1.0f) : u < zero ? splat<T>(-1.0f) : u;
        const T slope = t.stuck ? zero : unclipped + t.coefficient * sign;
        return {t.ratio, unclipped + t.coefficient * absolute(u), slope, Truth<T>{}, Truth<T>{}, Truth<T>{}};
    }
};

template <class T>
struct RefKlNumbers {
    T low, high;       // bounds of log_prob - ref_log_prob
    T cap, ratio_cap;  // of the estimate's size, and of the ratio of REF_STRAIGHT_THROUGH_RATIO
};

template <class T>
struct RefKlTerm {
    T value;
    T slope;  // d / d log_prob of it, or what stands for that
};

// The KL to the reference; e = log_prob - ref_log_prob, ratio and stuck the token's own. 0 for e = 0 but k1's slope.
template <class T>
RK_HD RefKlTerm<T> ref_kl_term(T e, T ratio, Truth<T> stuck, RefKlNumbers<T> n, int estimator, int gradient) {
    const T zero = {}, one = splat<T>(1.0f);
    const T held = held_within(e, n.low, n.high);
    T value = held, slope = one;
    if (estimator == REF_K2) value = 0.5f * held * held, slope = held;
    if (estimator == REF_K3) value = kl_k3(held), slope = kl_k3_slope(held);
    if (estimator == REF_ABS) value = absolute(held), slope = held > zero ? one : held < zero ? -one : held;
    const auto outside = (e < n.low) | (e > n.high) | (absolute(value) > n.cap);
    value = held_within(value, -n.cap, n.cap);
    slope = outside ? zero : slope;
    if (gradient == REF_PLAIN) return {value, slope};
    if (gradient == REF_STRAIGHT_THROUGH) return {value, e};
    if (gradient == REF_STRAIGHT_THROUGH_RATIO) return {value, (ratio > n.ratio_cap ? n.ratio_cap : ratio) * e};
    T whole = slope + (stuck ? zero : value);
    if (estimator == REF_K3) whole = outside ? whole : stuck ? whole : e;  // the same, without its cancellation
    return {ratio * value, ratio * whole};
}

// The same where both are known beforehand.
template <int Estimator, int Gradient, class T>
RK_HD RefKlTerm<T> ref_kl_term(T e, T ratio, Truth<T> stuck, RefKlNumbers<T> n) {
    return ref_kl_term(e, ratio, stuck, n, Estimator, Gradient);
}

}  // namespace RK_ISA
}  // namespace rk
