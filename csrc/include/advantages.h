// Arithmetic of generalised advantage estimation and whitening: one token, one merge; the rewards' KL is in kl.h.
#pragma once
#include "kl.h"

namespace rk {
namespace RK_ISA {

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
