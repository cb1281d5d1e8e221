// Arithmetic of the ranking losses: one pair of responses.
#pragma once
#include "rk.h"

namespace rk {
namespace RK_ISA {

template <class T>
struct PairTerm {
    T loss;   // -log sigmoid(x)
    T slope;  // sigmoid(-x) = -d loss / dx
};

// x = s_better - s_worse - margin; exact for any gap: -120 gives 120 and slope 1.
template <class T>
RK_HD PairTerm<T> pair_term(T x) {
    const T u = exp_f32(-absolute(x));
    const T inverse = 1.0f / (1.0f + u);
    const T below = x < T{} ? -x : T{};
    return {below + log1p_unit_f32(u), x < T{} ? inverse : u * inverse};
}

// Half of both directions' losses of a tied pair; slope = d loss / d gap = tanh(gap / 2) / 2.
template <class T>
RK_HD PairTerm<T> tie_term(T gap) {
    const T size = absolute(gap);
    const T u = exp_f32(-size);
    const T half = 0.5f * (1.0f - u) / (1.0f + u);
    return {0.5f * size + log1p_unit_f32(u), gap < T{} ? -half : half};
}

}  // namespace RK_ISA
}  // namespace rk
