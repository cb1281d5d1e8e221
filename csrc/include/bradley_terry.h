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

// log(1 + u) for 0 <= u <= 1 without a division. At most 2 ulp: u + u^2 h(u), minimax remainder 5e-9 of the result.
template <class T>
RK_HD T log1p_polynomial(T u) {
    T h = u * -3.318472238e-3f + 2.02045814e-2f;
    h = h * u - 5.766443309e-2f;
    h = h * u + 0.1068055387f;
    h = h * u - 0.1535539498f;
    h = h * u + 0.1969539994f;
    h = h * u - 0.2495858727f;
    h = h * u + 0.333305113f;
    h = h * u - 0.4999993276f;
    return u + u * u * h;
}

// log(1 + x) for 0 <= x < 2^24. At most 2 ulp: from 1 on 1 + x = 2^n (1 + u). NaN stays NaN.
template <class T>
RK_HD T log1p_f32(T x) {
    const auto bits = to_bits(1.0f + x);
    const auto n = (bits >> 23) - 127;
    const T u = from_bits<T>((bits & 0x7fffff) | 0x3f800000) - 1.0f;
    const T whole = from_bits<T>(to_bits(splat<T>(12582912.0f)) + n) - 12582912.0f;
    const T beyond = x == x ? whole * 0.69314718f + log1p_polynomial(u) : x;
    return x < splat<T>(1.0f) ? log1p_polynomial(x) : beyond;
}

// x = s_better - s_worse - margin; exact for any gap: -120 gives 120 and slope 1.
template <class T>
RK_HD PairTerm<T> pair_term(T x) {
    const T u = exp_nonpositive_f32(-absolute(x));
    const T inverse = 1.0f / (1.0f + u);
    const T below = x < T{} ? -x : T{};
    return {below + log1p_polynomial(u), x < T{} ? inverse : u * inverse};
}

// Half of both directions' losses of a tied pair; slope = d loss / d gap = tanh(gap / 2) / 2.
template <class T>
RK_HD PairTerm<T> tie_term(T gap) {
    const T size = absolute(gap);
    const T u = exp_nonpositive_f32(-size);
    const T half = 0.5f * (1.0f - u) / (1.0f + u);
    return {0.5f * size + log1p_polynomial(u), gap < T{} ? -half : half};
}

}  // namespace RK_ISA
}  // namespace rk
