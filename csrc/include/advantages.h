// Arithmetic of KL-shaped rewards, generalised advantage estimation and whitening: one token, one merge.
#pragma once
#include "rk.h"

namespace rk {
namespace RK_ISA {

enum KlEstimator { KL_K1 = 1, KL_K2 = 2, KL_K3 = 3 };

// log p - log q; 0 where both are the same, also both -inf.
template <class T>
RK_HD T log_ratio(T log_p, T log_q) {
    return log_p == log_q ? T{} : log_p - log_q;
}

// exp(-d) - 1 + d, never negative. For |d| < 0.5 the series, where the plain form would cancel; remainder 3e-10 d^2.
template <class T>
RK_HD T kl_k3(T d) {
    T p = 1.0f / 362880.0f - d * (1.0f / 3628800.0f);
    p = 1.0f / 40320.0f - p * d;
    p = 1.0f / 5040.0f - p * d;
    p = 1.0f / 720.0f - p * d;
    p = 1.0f / 120.0f - p * d;
    p = 1.0f / 24.0f - p * d;
    p = 1.0f / 6.0f - p * d;
    p = 0.5f - p * d;
    const T series = p * d * d;
    const T plain = d == splat<T>(-__builtin_inff()) ? -d : (exp_f32(-d) - 1.0f) + d;
    return absolute(d) < splat<T>(0.5f) ? series : plain;
}

// Estimators of KL(policy || reference) from one sampled token, in nats; d = log_ratio(policy, reference).
template <int Estimator, class T>
RK_HD T kl_estimate(T d) {
    if (Estimator == KL_K1) return d;
    if (Estimator == KL_K2) return 0.5f * d * d;
    return kl_k3(d);
}

// What the recursion hands from a kept token to the kept token before it.
struct GaeCarry {
    double advantage;
    double value;
};

// delta = r + gamma V' - V;  A = delta + gamma lam A'
RK_HD GaeCarry gae_step(GaeCarry next, double reward, double value, double gamma, double decay) {
    const double delta = reward + gamma * next.value - value;
    return {delta + decay * next.advantage, value};
}

// Count, mean and sum of squared deviations of a set, and of the union of two sets.
struct Moments {
    double count;
    double mean;
    double m2;
};

RK_HD Moments moments_merge(Moments a, Moments b) {
    const double count = a.count + b.count;
    if (count == 0.0) return {0.0, 0.0, 0.0};
    const double gap = b.mean - a.mean;
    const double share = b.count / count;
    return {count, a.mean + gap * share, a.m2 + b.m2 + gap * gap * a.count * share};
}

}  // namespace RK_ISA
}  // namespace rk
