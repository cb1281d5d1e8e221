"""A piece of tokens in Triton: its weights and gradients, the numbers kept of it, and how those are added up."""

import triton
import triton.language as tl

from ..reference.ppo import AGG_MODES
from ._policy_terms import (
    LARGEST,
    SEQUENCE,
    exp_ratio,
    held_ratio,
    held_within,
    policy_term,
    ref_kl_term,
    times,
    value_term,
)
from .advantages import moments_merge
from .kl import k3

# What is kept of a piece, fp64: sums over its kept tokens, their count, the largest ratio, and for ratio, V - R and R
# the mean and the squared deviations from it; then the sums that the metrics of ppo_loss do without.
POLICY_LOSS, KL, CLIPPED, BOUNDED, VALUE_LOSS, HELD, VALUE, ENTROPY_LOSS, ENTROPY = (tl.constexpr(i) for i in range(9))
COUNT, RATIO_MAX, RATIO, RATIO_M2, ERROR, ERROR_M2, TARGET, TARGET_M2 = (tl.constexpr(i) for i in range(9, 17))
ABOVE, LOG_RATIO, KL3, KL_LOSS, REF_KL, FACTOR, FACTOR_M2, FILTERED = (tl.constexpr(i) for i in range(17, 25))

TOKEN_MEAN, TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM_NORM = (
    tl.constexpr(AGG_MODES.index(mode))
    for mode in ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
)


@triton.jit
def weight_of(counts, programs, normalizer, length, MODE: tl.constexpr, ADDED: tl.constexpr):
    """Weight of a token, fp64, before its row's own length divides it."""
    weight = tl.full([], 1.0, tl.float64)
    if MODE != TOKEN_SUM:
        if normalizer is not None:
            total = tl.load(normalizer).to(tl.float64)
        else:
            which = 0 if MODE == TOKEN_MEAN else 1
            some = tl.zeros([ADDED], tl.float64)
            for start in range(0, programs, ADDED):
                at = start + tl.arange(0, ADDED)
                some += tl.load(counts + at * 2 + which, mask=at < programs, other=0.0)
            total = tl.sum(some, 0)
            total = tl.where(total == 0.0, 1.0, total)
        weight = weight / total
        if MODE == SEQ_MEAN_TOKEN_SUM_NORM:
            weight = weight / length
    return weight


@triton.jit
def share_of(lengths, row, keep, MODE: tl.constexpr):
    """Part of a token in its row's weight."""
    share = tl.where(keep, 1.0, 0.0)
    if MODE == SEQ_MEAN_TOKEN_MEAN:
        share = tl.where(keep, 1.0 / tl.load(lengths + row, mask=keep, other=1).to(tl.float32), 0.0)
    return share


@triton.jit
def loaded(x, t, inside):
    """The numbers at t; 0 where they are not inside, which is None where all of them are: whole vectors then."""
    return tl.load(x + t, mask=inside, other=None if inside is None else 0)


@triton.jit
def kept_of(x, t, inside, keep):
    """In fp32, 0 where they are not kept. A mask that was itself loaded would split the load."""
    return tl.where(keep, loaded(x, t, inside).to(tl.float32), 0.0)


@triton.jit
def one_of(x, t):
    """The number at t, or 0 where it is not finite."""
    value = tl.load(x + t).to(tl.float32)
    return tl.where(tl.abs(value) <= LARGEST, value, 0.0)


@triton.jit
def put(totals, pieces, field: tl.constexpr, number):
    tl.store(totals + field * pieces, number.to(tl.float64))


@triton.jit
def put_count(totals, pieces, field: tl.constexpr, true):
    put(totals, pieces, field, tl.sum(true.to(tl.float32), 0))


@triton.jit
def put_two(totals, pieces, first: tl.constexpr, one, other):
    """The sums of two, in neighbouring fields; the program's threads meet once for both."""
    sums = tl.sum(tl.join(one, other), 0)
    tl.store(totals + (first + tl.arange(0, 2)) * pieces, sums.to(tl.float64))


@triton.jit
def put_moments(totals, pieces, x, pilot, keep, count, field: tl.constexpr):
    """Mean and squared deviations. The pilot is one of the x: of equal numbers nothing is left."""
    safe = tl.where(count == 0.0, 1.0, count)
    mean = pilot + tl.sum(tl.where(keep, x - pilot, 0.0), 0) / safe
    gap = tl.where(keep, x - mean, 0.0)
    rest, m2 = tl.split(tl.sum(tl.join(gap, gap * gap), 0).to(tl.float64))
    m2 = m2 - rest * (rest / safe.to(tl.float64))
    rest = tl.where(tl.abs(mean) <= LARGEST, rest / safe.to(tl.float64), 0.0)
    put(totals, pieces, field, tl.where(count == 0.0, 0.0, mean.to(tl.float64) + rest))
    put(totals, pieces, field + 1, tl.where(m2 < 0.0, 0.0, m2))


@triton.jit
def policy_part(
    log_probs, old_log_probs, advantages, ref_log_probs, factors, coefficients, sequences, t, row, one, row_of_one,
    inside, keep, count, weights, share, a, b, c, clamp, kl_coef, kl_low, kl_high, kl_cap, kl_ratio_cap, pieces, totals,
    TERM: tl.constexpr, KL_ESTIMATOR: tl.constexpr, KL_GRADIENT: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """d / d log_prob of objective and KL, and what is kept of them."""
    log_prob, old = kept_of(log_probs, t, inside, keep), kept_of(old_log_probs, t, inside, keep)
    raw, log_ratio, stuck = held_ratio(log_prob, old, clamp)
    put(totals, pieces, KL, tl.sum(raw * raw, 0))
    if MORE:
        put(totals, pieces, LOG_RATIO, tl.sum(raw, 0))
        put(totals, pieces, KL3, tl.sum(k3(-raw), 0))
    of_sequence, slope_length, coefficient = 1.0, 1.0, 0.0
    if sequences is not None:
        of_sequence = tl.load(sequences + row * 2, mask=keep, other=1.0)
        if TERM == SEQUENCE:
            slope_length = tl.load(sequences + row * 2 + 1, mask=keep, other=1.0)
    if coefficients is not None:
        coefficient = kept_of(coefficients, t, inside, keep)
    ratio, loss, slope, low, high, bounded = policy_term(
        log_prob, old, log_ratio, stuck, kept_of(advantages, t, inside, keep), of_sequence, slope_length, coefficient,
        a, b, c, TERM,
    )  # fmt: skip
    put_two(totals, pieces, CLIPPED, ((low | high) & keep).to(tl.float32), (bounded & keep).to(tl.float32))
    if MORE:
        put_count(totals, pieces, ABOVE, high & keep)
    put(totals, pieces, RATIO_MAX, tl.max(tl.where(keep, ratio, 0.0), 0))
    if TERM == SEQUENCE:
        pilot = one_of(sequences, row_of_one * 2)
    else:
        pilot = one_of(log_probs, one) - one_of(old_log_probs, one)
        pilot = exp_ratio(pilot if clamp is None else held_within(pilot, -clamp, clamp))
        pilot = tl.where(pilot <= LARGEST, pilot, 0.0)
    put_moments(totals, pieces, ratio, pilot, keep, count, RATIO)
    if factors is not None:
        factor = kept_of(factors, t, inside, keep)
        loss, slope = times(factor, loss), times(factor, slope)
        put(totals, pieces, FACTOR, tl.sum(factor, 0))
        put(totals, pieces, FACTOR_M2, tl.sum(factor * factor, 0))
        put_count(totals, pieces, FILTERED, (factor == 0.0) & keep)
    put(totals, pieces, POLICY_LOSS, tl.sum(tl.where(keep, share * loss, 0.0), 0))
    grad = weights * slope
    if ref_log_probs is not None:
        gap = log_prob - kept_of(ref_log_probs, t, inside, keep)
        value, slope = ref_kl_term(
            gap, log_ratio, stuck, kl_low, kl_high, kl_cap, kl_ratio_cap, KL_ESTIMATOR, KL_GRADIENT
        )
        grad += kl_coef * weights * slope
        put(totals, pieces, KL_LOSS, tl.sum(tl.where(keep, share * value, 0.0), 0))
        put(totals, pieces, REF_KL, tl.sum(tl.where(keep, value, 0.0), 0))
    return grad


@triton.jit
def value_part(
    values, old_values, returns, t, one, inside, keep, count, weights, share, reach, value_scale, pieces, totals
):  # fmt: skip
    """d / d value of the value loss times value_scale, and what is kept of it."""
    value, target = kept_of(values, t, inside, keep), kept_of(returns, t, inside, keep)
    before = value if old_values is None else kept_of(old_values, t, inside, keep)
    error, square, slope, held = value_term(value, before, target, reach)
    part = tl.where(keep, share * square, 0.0)
    put_two(totals, pieces, VALUE_LOSS, part, (held & keep).to(tl.float32))
    put(totals, pieces, VALUE, tl.sum(value, 0))
    pilot = one_of(returns, one)
    put_moments(totals, pieces, error, one_of(values, one) - pilot, keep, count, ERROR)
    put_moments(totals, pieces, target, pilot, keep, count, TARGET)
    return value_scale * weights * slope


@triton.jit
def add_moments(totals, piece, pieces, kept, count, mean, m2, field: tl.constexpr):
    """Mean and squared deviations with those of more pieces, lane by lane."""
    more_mean = tl.load(totals + field * pieces + piece, mask=piece < pieces, other=0.0)
    more_m2 = tl.load(totals + (field + 1) * pieces + piece, mask=piece < pieces, other=0.0)
    merged = moments_merge(count, mean, m2, kept, more_mean, more_m2)
    return merged[1], merged[2], kept * more_mean


@triton.jit
def all_m2(count, mean, m2):
    """Squared deviations of all lanes together."""
    total = tl.sum(count, 0)
    gap = mean - tl.sum(count * mean, 0) / tl.where(total == 0.0, 1.0, total)
    return tl.sum(m2 + count * gap * gap, 0)


@triton.jit
def add_field(sums, totals, piece, pieces, field: tl.constexpr):
    return sums + tl.load(totals + field * pieces + piece, mask=piece < pieces, other=0.0)


@triton.jit
def store_f32(out, number):
    tl.store(out, number.to(tl.float32))


@triton.jit
def mean_of(total, tokens):
    """NaN where there is nothing to average."""
    return tl.where(tokens == 0.0, float("nan"), total / tl.where(tokens == 0.0, 1.0, tokens))


@triton.jit
def store_mean(out, sums, tokens, PRESENT: tl.constexpr):
    """The mean over the kept tokens; 0 of what is absent."""
    if PRESENT:
        store_f32(out, mean_of(tl.sum(sums, 0), tokens))
    else:
        tl.store(out, 0.0)
