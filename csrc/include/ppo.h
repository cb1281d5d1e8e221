// Arithmetic of the clipped policy and value loss of one token.
#pragma once
#include "rk.h"

namespace rk {
namespace RK_ISA {

template <class T>
using Truth = typename Bits<T>::type;  // what a comparison gives

template <class T>
struct RatioRange {  // 1 - cliprange, 1 + cliprange_high, and dual_clip or inf
    T low, high, dual;
};

// A token's part of a policy loss. The flags say why its gradient, or its weight, is held.
template <class T>
struct PolicyTerm {
    T ratio;
    T loss;
    T slope;  // d loss / d log_prob
    Truth<T> low, high, bounded;
};

// -A r', r' = r held in the limits that the sign of A sets: A > 0 at most high, A < 0 at least low and at most dual.
// A = 0 takes the largest float as its limit, so that an overflowing r gives 0 and not NaN. A NaN stays NaN.
template <class T>
RK_HD PolicyTerm<T> clip_term(T ratio, T advantage, RatioRange<T> range) {
    const T zero = {};
    const auto gain = advantage > zero;
    const auto harm = advantage < zero;
    const T lower = harm ? range.low : zero;
    const T upper = gain ? range.high : harm ? range.dual : splat<T>(3.40282347e38f);
    const auto below = ratio < lower;
    const auto above = ratio > upper;
    const T used = at_most(at_least(ratio, lower), upper);
    const T slope = below ? zero : above ? zero : -advantage * ratio;
    return {ratio, -advantage * used, slope, below, above & gain, above & harm};
}

template <class T>
struct ValueTerm {
    T error;        // V - R
    T square;       // twice the loss
    T slope;        // d loss / dV
    Truth<T> held;  // the clipped value is further off: the value function may not move
};

// max((V - R)^2, (V' - R)^2), V' = V held within `range` around V_old.
template <class T>
RK_HD ValueTerm<T> value_term(T value, T old, T target, T range) {
    const T zero = {};
    const T error = value - target;
    const T moved = value - old;
    const auto up = moved > range;
    const auto down = moved < -range;
    const T near = (down ? old - range : old + range) - target;
    const T plain = error * error;
    const T clipped = near * near;
    const auto held = (up | down) & (clipped > plain);
    return {error, held ? clipped : plain, held ? zero : error, held};
}

}  // namespace RK_ISA
}  // namespace rk
