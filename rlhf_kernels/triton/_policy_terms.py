"""A token's terms of the policy loss in Triton: what each objective, KL estimate and value loss is, and its derivative.

Terms, names and numbers (a, b, c) are those of reference.policy. A kept NaN stays NaN; where a ratio overflows, an
advantage, an error or a weight of 0 still gives 0.
"""

import triton
import triton.language as tl

from ..reference.policy import ESTIMATORS, KL_GRADIENTS, TERMS
from ._math import LOG2_E, expm1_f32, log1m_exp_f32
from .kl import k3, k3_slope

CLIP, SEQUENCE, CISPO, SAPO, GMPO, DPPO_TV, DPPO_KL, PLAIN, DRO, KL_COV = (
    tl.constexpr(TERMS.index(name))
    for name in ("clip", "sequence", "cispo", "sapo", "gmpo", "dppo_tv", "dppo_kl", "plain", "dro", "kl_cov")
)
K1, K2, K3 = (tl.constexpr(ESTIMATORS.index(name)) for name in ("k1", "k2", "k3"))
GRADIENT, STRAIGHT_THROUGH, TIMES_RATIO = (
    tl.constexpr(KL_GRADIENTS.index(name)) for name in ("plain", "straight_through", "ratio")
)
LARGEST = tl.constexpr(3.40282347e38)
LOG2_E_REST = tl.constexpr(1.925963033500e-8)  # log2 e less its fp32


@triton.jit
def exp_ratio(x):
    """exp(x) with what x log2 e loses in fp32 put back, so that the relative error does not grow with x."""
    y = x * LOG2_E
    lost = tl.fma(x, LOG2_E + tl.zeros_like(x), -y) + x * LOG2_E_REST
    return tl.exp2(y) * (1.0 + 0.6931471805599453 * tl.where(tl.abs(y) < 200.0, lost, 0.0))


@triton.jit
def exp_double(x):
    """exp of an fp64, in fp32."""
    high = x.to(tl.float32)
    rest = tl.where(tl.abs(high) <= LARGEST, x - high.to(tl.float64), 0.0)
    return exp_ratio(high) * (1.0 + rest.to(tl.float32))


@triton.jit
def held_within(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def times(factor, x):
    """0 where the factor is 0, also of an x that overflowed."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def held_ratio(log_prob, old_log_prob, clamp):
    """log_prob - old_log_prob, the same held within +-clamp, and where that stops its gradient."""
    raw = log_prob - old_log_prob
    if clamp is None:
        return raw, raw, tl.zeros_like(raw) != 0.0
    else:
        return raw, held_within(raw, -clamp, clamp), tl.abs(raw) > clamp


@triton.jit
def gmpo_held(log_ratio, advantage, a, b):
    return (advantage < 0.0) & (log_ratio < -a), (advantage > 0.0) & (log_ratio > b)


@triton.jit
def clip_term(ratio, advantage, a, b, c):
    """As in csrc/include/ppo.h: ratio, loss, slope, low, high, bounded."""
    gain, harm = advantage > 0.0, advantage < 0.0
    lower = tl.where(harm, a, 0.0)
    upper = tl.where(gain, b, tl.where(harm, c, LARGEST))
    below, above = ratio < lower, ratio > upper
    used = tl.where(below, lower, tl.where(above, upper, ratio))
    slope = tl.where(below | above, 0.0, -advantage * ratio)
    return ratio, -advantage * used, slope, below, above & gain, above & harm


@triton.jit
def sapo_term(ratio, advantage, stuck, a, b):
    t = tl.where(advantage > 0.0, a, b)
    x = t * (ratio - 1.0)
    e = exp_ratio(-tl.abs(x))
    gate, rest = tl.where(x < 0.0, e, 1.0) / (1.0 + e), tl.where(x < 0.0, 1.0, e) / (1.0 + e)
    steep = tl.where(stuck, 0.0, times(rest, ratio) * gate)
    return -4.0 / t * gate * advantage, -4.0 * advantage * steep


@triton.jit
def binary_kl(old_log_prob, log_prob):
    """KL between the coins that say whether the sampled token comes."""
    rest = -expm1_f32(old_log_prob)
    other = rest * (log1m_exp_f32(old_log_prob) - log1m_exp_f32(log_prob))
    other = tl.where(old_log_prob >= 0.0, 0.0, other)
    return exp_ratio(old_log_prob) * (old_log_prob - log_prob) + other


@triton.jit
def dppo_held(old_log_prob, log_prob, advantage, a, b, TERM: tl.constexpr):
    """Where the policy has left the trust region downwards, and upwards."""
    p, old = exp_ratio(log_prob), exp_ratio(old_log_prob)
    if TERM == DPPO_TV:
        low, high = p - old < -a, p - old > b
    else:
        gap = binary_kl(old_log_prob, log_prob)
        low, high = (gap > a) & (p < old), (gap > b) & (p > old)
    return low & (advantage <= 0.0), high & (advantage > 0.0)


@triton.jit
def policy_term(
    log_prob, old_log_prob, log_ratio, stuck, advantage, of_sequence, slope_length, coefficient, a, b, c,
    TERM: tl.constexpr,
):  # fmt: skip
    """A token's (ratio, loss, d loss / d log_prob, held below, held above, bounded).

    of_sequence is the sequence's ratio (of gmpo: its loss), slope_length what multiplies its slope.
    """
    no = tl.zeros_like(log_ratio) != 0.0
    if TERM == SEQUENCE:
        ratio, loss, slope, low, high, bounded = clip_term(of_sequence, advantage, a, b, c)
        return ratio, loss, tl.where(stuck, 0.0, slope * slope_length), low, high, bounded
    else:
        ratio = exp_ratio(log_ratio)
        if TERM == CLIP:
            ratio, loss, slope, low, high, bounded = clip_term(ratio, advantage, a, b, c)
            return ratio, loss, tl.where(stuck, 0.0, slope), low, high, bounded
        elif TERM == CISPO:
            slope = -times(advantage, held_within(ratio, a, b))
            return ratio, slope * log_prob, slope, ratio < a, ratio > b, no
        elif TERM == SAPO:
            loss, slope = sapo_term(ratio, advantage, stuck, a, b)
            return ratio, loss, slope, no, no, no
        elif TERM == GMPO:
            low, high = gmpo_held(log_ratio, advantage, a, b)
            slope = tl.where(low | high | stuck | (advantage == 0.0), 0.0, of_sequence)
            return ratio, of_sequence, slope, low, high, no
        elif TERM == PLAIN:
            return ratio, -advantage * log_prob, -advantage, no, no, no
        elif TERM == DRO:
            loss = 0.5 * a * log_ratio * log_ratio - advantage * log_prob
            return ratio, loss, tl.where(stuck, 0.0, a * log_ratio) - advantage, no, no, no
        elif TERM == KL_COV:
            unclipped = -times(advantage, ratio)
            sign = tl.where(log_ratio > 0.0, 1.0, tl.where(log_ratio < 0.0, -1.0, 0.0))
            slope = tl.where(stuck, 0.0, unclipped + coefficient * sign)
            return ratio, unclipped + coefficient * tl.abs(log_ratio), slope, no, no, no
        else:
            low, high = dppo_held(old_log_prob, log_prob, advantage, a, b, TERM)
            slope = tl.where(low | high, 0.0, -times(advantage, tl.where(ratio > c, c, ratio)))
            return ratio, slope * log_prob, slope, low, high, (ratio > c) & ((low | high) == 0)


@triton.jit
def ref_kl_term(
    gap, log_ratio, stuck, low, high, cap, ratio_cap, KL_ESTIMATOR: tl.constexpr, KL_GRADIENT: tl.constexpr
):  # fmt: skip
    """A token's estimate of the KL to the reference and d / d log_prob of it; gap = log_prob - ref_log_prob."""
    held = held_within(gap, low, high)
    if KL_ESTIMATOR == K1:
        value, slope = held, tl.full(held.shape, 1.0, tl.float32)
    elif KL_ESTIMATOR == K2:
        value, slope = 0.5 * held * held, held
    elif KL_ESTIMATOR == K3:
        value, slope = k3(held), k3_slope(held)
    else:
        value, slope = tl.abs(held), tl.where(held > 0.0, 1.0, tl.where(held < 0.0, -1.0, 0.0))
    free = (gap >= low) & (gap <= high) & (tl.abs(value) <= cap)
    value = held_within(value, -cap, cap)
    if KL_GRADIENT == GRADIENT:
        return value, tl.where(free, slope, 0.0)
    elif KL_GRADIENT == STRAIGHT_THROUGH:
        return value, gap
    else:
        ratio = exp_ratio(log_ratio)
        if KL_GRADIENT == TIMES_RATIO:
            whole = tl.where(free, slope, 0.0) + tl.where(stuck, 0.0, value)
            if KL_ESTIMATOR == K3:
                whole = tl.where(free & (stuck == 0), gap, whole)  # the same, without its cancellation
            return times(value, ratio), times(whole, ratio)
        else:
            return value, times(gap, tl.where(ratio > ratio_cap, ratio_cap, ratio))


@triton.jit
def value_term(value, old, target, reach):
    """V - R, twice the loss, d loss / dV, where the clipped value is further off; as in csrc/include/ppo.h."""
    error = value - target
    moved = value - old
    down = moved < -reach
    near = tl.where(down, old - reach, old + reach) - target
    plain, clipped = error * error, near * near
    held = (down | (moved > reach)) & (clipped > plain)
    return error, tl.where(held, clipped, plain), tl.where(held, 0.0, error), held
