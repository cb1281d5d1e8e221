// Arithmetic of generalised advantage estimation and whitening: one token, one merge; the rewards' KL is in kl.h.
#pragma once
#include "kl.h"

namespace rk {
namespace RK_ISA {

// delta = r + gamma V' - V, with V' the value of the next kept token.
template <class T>
RK_HD T gae_delta(T reward, T next_value, T value, float gamma) {
    return reward + gamma * next_value - value;
}

// A stretch of kept tokens: the advantage of its first token if nothing came after it, and the factor, (gamma lam) to
// the number of its tokens, with which the advantage of the token after it is added.
struct GaePart {
    double advantage;
    double factor;
};

RK_HD double gae_join(GaePart part, double later) { return part.advantage + part.factor * later; }

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

// The same from the sums of x - shift and of its square. With a shift among the x the squares cannot cancel badly:
// count (mean - shift)^2 is at most count m2.
RK_HD Moments moments_of(double count, double shift, double sum, double squares) {
    if (count == 0.0) return {0.0, 0.0, 0.0};
    const double m2 = squares - sum * (sum / count);
    return {count, shift + sum / count, m2 > 0.0 ? m2 : 0.0};
}

// (x - mean) / sqrt(var + 1e-8), var over count - 1, plus `add`. The mean is split in two floats, so that nothing of a
// large one is lost; the first difference is exact where x is near it.
struct Whitening {
    float mean, mean_rest, scale, add;
};

RK_HD Whitening whitening_of(Moments m, bool center) {
    const double freedom = m.count > 1.0 ? m.count - 1.0 : 1.0;
    const float mean = (float)m.mean;
    return {mean, (float)(m.mean - (double)mean), (float)(1.0 / __builtin_sqrt(m.m2 / freedom + 1e-8)),
            center ? 0.0f : mean};
}

template <class T>
RK_HD T whiten(T x, Whitening w) {
    return ((x - w.mean) - w.mean_rest) * w.scale + w.add;
}

}  // namespace RK_ISA
}  // namespace rk
