"""A piece of tokens in Triton: its weights and gradients, the numbers kept of it, and how those are added up."""

import triton
import triton.language as tl

from ..reference.ppo import AGG_MODES
from ._math import INF
from ._policy_terms import (
    LARGEST,
    SEQUENCE,
    held_ratio,
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
    """Part of a kept token in its row's weight."""
    if MODE == SEQ_MEAN_TOKEN_MEAN:
        return 1.0 / tl.load(lengths + row, mask=keep, other=1).to(tl.float32)
    else:
        return 1.0


@triton.jit
def loaded(x, t, inside):
    """The numbers at t; 0 where they are not inside, which is None where all of them are: whole vectors then."""
    return tl.load(x + t, mask=inside, other=None if inside is None else 0)


@triton.jit
def kept_of(x, t, inside, keep):
    """In fp32, 0 where they are not kept. A mask that was itself loaded would split the load."""
    return tl.where(keep, loaded(x, t, inside).to(tl.float32), 0.0)


@triton.jit
def four(x):
    """The first, second, third and fourth of each 4 consecutive entries of x, each [LANES]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0] // 4, 2, 2]))
    x_0, x_2 = tl.split(even)
    x_1, x_3 = tl.split(odd)
    return x_0, x_1, x_2, x_3


@triton.jit
def lane_sum(x):
    """Sums of each 4 consecutive entries, [LANES]; they are one thread's."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 4, 4]), 1)


@triton.jit
def lane_count(true):
    return lane_sum(true.to(tl.float32))


@triton.jit
def lane_spread(x):
    """Each lane's number for its 4 entries."""
    return tl.reshape(tl.broadcast_to(x[:, None], [x.shape[0], 4]), [4 * x.shape[0]])


@triton.jit
def finite(x):
    """x, or 0 where it is not finite."""
    return tl.where(tl.abs(x) <= LARGEST, x, 0.0)


@triton.jit
def lane_moments(moments, x, keep, count):
    """(a kept one, sums of the distances from it and of their squares) of each lane, with four more tokens of each.

    The kept one is the lane's first, 0 if that is not finite: of equal numbers nothing is left, and the squares are at
    most as many times too large as the lane has tokens. count: of the lane's tokens before.
    """
    pilot, gaps, squares = moments
    x_0, x_1, x_2, x_3 = four(x)
    keep_0, keep_1, keep_2, _ = four(keep)
    first = tl.where(keep_0, x_0, tl.where(keep_1, x_1, tl.where(keep_2, x_2, x_3)))
    pilot = tl.where(count == 0.0, finite(first), pilot)
    gap = tl.where(keep, x - lane_spread(pilot), 0.0)
    return pilot, gaps + lane_sum(gap), squares + lane_sum(gap * gap)


@triton.jit
def put(totals, pieces, field: tl.constexpr, number):
    tl.store(totals + field * pieces, number.to(tl.float64))


@triton.jit
def put_four(totals, pieces, first: tl.constexpr, a, b, c, d):
    """The sums over the lanes of four numbers, in neighbouring fields; the program's threads meet once for all."""
    sums = tl.reshape(tl.sum(tl.join(tl.join(a, c), tl.join(b, d)), 0), [4])
    tl.store(totals + (first + tl.arange(0, 4)) * pieces, sums.to(tl.float64))


@triton.jit
def two_sums(a, b):
    return tl.split(tl.sum(tl.join(a, b), 0))


@triton.jit
def two_peaks(a, b):
    return tl.split(tl.max(tl.join(a, b), 0))


@triton.jit
def lane_means(moments, count):
    """(mean, squared deviations from it) of each lane; 0 without a token."""
    pilot, gaps, squares = moments
    some = count > 0.0
    gap = gaps / tl.where(some, count, 1.0)
    m2 = tl.where(squares == INF, INF, squares - gaps * gap)  # squares that overflow, of a finite mean
    return tl.where(some, pilot + gap, 0.0), m2


@triton.jit
def of_some(x, count, other):
    return tl.where(count > 0.0, x, other)


@triton.jit
def mean_about(pilot, excess, tokens):
    """The mean in fp64, of a sum of distances from the pilot."""
    return pilot.to(tl.float64) + excess.to(tl.float64) / tl.where(tokens == 0.0, 1.0, tokens).to(tl.float64)


@triton.jit
def put_moments(totals, pieces, mean, m2, tokens, field: tl.constexpr):
    """The mean in fp64, and what m2, taken around its fp32, is around itself."""
    rest = tl.where(tl.abs(mean) <= LARGEST, mean - mean.to(tl.float32).to(tl.float64), 0.0)
    m2 = m2.to(tl.float64) - tokens.to(tl.float64) * (rest * rest)
    put(totals, pieces, field, tl.where(tokens == 0.0, 0.0, mean))
    put(totals, pieces, field + 1, tl.where(m2 < 0.0, 0.0, m2))


@triton.jit
def around(lane_mean, lane_m2, mean, count):
    """Squared deviations of a lane's tokens from the whole's mean."""
    gap = of_some(lane_mean - mean.to(tl.float32), count, 0.0)
    return lane_m2 + count * gap * gap


@triton.jit
def policy_part(
    sums, ratios, log_probs, old_log_probs, advantages, ref_log_probs, factors, coefficients, sequences, t, row, inside,
    keep, count, weights, share, a, b, c, clamp, kl_coef, kl_low, kl_high, kl_cap, kl_ratio_cap,
    TERM: tl.constexpr, KL_ESTIMATOR: tl.constexpr, KL_GRADIENT: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """d / d log_prob of objective and KL, and what each lane adds up, with these tokens; `finish_policy` names it."""
    losses, squares, clipped, bounded, peaks, above, log_ratios, k3s, kl_losses, kls, weighed, weighed_2, dropped = sums
    log_prob, old = kept_of(log_probs, t, inside, keep), kept_of(old_log_probs, t, inside, keep)
    raw, log_ratio, stuck = held_ratio(log_prob, old, clamp)
    squares += lane_sum(raw * raw)
    if MORE:
        log_ratios += lane_sum(raw)
        k3s += lane_sum(k3(-raw))
    of_sequence, slope_length, coefficient = 1.0, 1.0, 0.0
    if sequences is not None:
        of_sequence = tl.load(sequences + row * 2, mask=keep, other=1.0)
        if TERM == SEQUENCE:
            slope_length = tl.load(sequences + row * 2 + 1, mask=keep, other=1.0)
    if coefficients is not None:
        coefficient = kept_of(coefficients, t, inside, keep)
    ratio, loss, slope, low, high, bound = policy_term(
        log_prob, old, log_ratio, stuck, kept_of(advantages, t, inside, keep), of_sequence, slope_length, coefficient,
        a, b, c, TERM,
    )  # fmt: skip
    clipped += lane_count((low | high) & keep)
    bounded += lane_count(bound & keep)
    if MORE:
        above += lane_count(high & keep)
    ratio_0, ratio_1, ratio_2, ratio_3 = four(tl.where(keep, ratio, 0.0))
    peaks = tl.maximum(tl.maximum(peaks, tl.maximum(ratio_0, ratio_1)), tl.maximum(ratio_2, ratio_3))
    ratios = lane_moments(ratios, ratio, keep, count)
    if factors is not None:
        factor = kept_of(factors, t, inside, keep)
        loss, slope = times(factor, loss), times(factor, slope)
        weighed += lane_sum(factor)
        weighed_2 += lane_sum(factor * factor)
        dropped += lane_count((factor == 0.0) & keep)
    losses += lane_sum(tl.where(keep, share * loss, 0.0))
    grad = weights * slope
    if ref_log_probs is not None:
        gap = log_prob - kept_of(ref_log_probs, t, inside, keep)
        value, slope = ref_kl_term(
            gap, log_ratio, stuck, kl_low, kl_high, kl_cap, kl_ratio_cap, KL_ESTIMATOR, KL_GRADIENT
        )
        grad += kl_coef * weights * slope
        kl_losses += lane_sum(tl.where(keep, share * value, 0.0))
        kls += lane_sum(tl.where(keep, value, 0.0))
    sums = losses, squares, clipped, bounded, peaks, above, log_ratios, k3s, kl_losses, kls, weighed, weighed_2, dropped
    return grad, sums, ratios


@triton.jit
def finish_policy(sums, ratios, count, tokens, pieces, totals, MORE: tl.constexpr):
    """What is kept of the policy's tokens, from what the lanes added up."""
    losses, squares, clipped, bounded, peaks, above, log_ratios, k3s, kl_losses, kls, weighed, weighed_2, dropped = sums
    put_four(totals, pieces, POLICY_LOSS, losses, squares, clipped, bounded)
    if MORE:
        put_four(totals, pieces, ABOVE, above, log_ratios, k3s, kl_losses)
        put_four(totals, pieces, REF_KL, kls, weighed, weighed_2, dropped)
    lane_mean, lane_m2 = lane_means(ratios, count)
    peak, pilot = two_peaks(peaks, of_some(ratios[0], count, -LARGEST))
    put(totals, pieces, RATIO_MAX, peak)
    mean = mean_about(pilot, tl.sum(count * of_some(lane_mean - pilot, count, 0.0), 0), tokens)
    put_moments(totals, pieces, mean, tl.sum(around(lane_mean, lane_m2, mean, count), 0), tokens, RATIO)


@triton.jit
def value_part(
    sums, errors, targets, values, old_values, returns, t, inside, keep, count, weights, share, reach, value_scale
):  # fmt: skip
    """d / d value of the value loss times value_scale, and what each lane adds up of it, with these tokens."""
    losses, holds, level = sums
    value, target = kept_of(values, t, inside, keep), kept_of(returns, t, inside, keep)
    before = value if old_values is None else kept_of(old_values, t, inside, keep)
    error, square, slope, held = value_term(value, before, target, reach)
    losses += lane_sum(tl.where(keep, share * square, 0.0))
    holds += lane_count(held & keep)
    level += lane_sum(value)
    errors, targets = lane_moments(errors, error, keep, count), lane_moments(targets, target, keep, count)
    return value_scale * weights * slope, (losses, holds, level), errors, targets


@triton.jit
def finish_values(sums, errors, targets, count, tokens, pieces, totals):
    """What is kept of the values' tokens, but for the entropy's loss beside them."""
    error, error_m2 = lane_means(errors, count)
    target, target_m2 = lane_means(targets, count)
    of_error, of_target = two_peaks(of_some(errors[0], count, -LARGEST), of_some(targets[0], count, -LARGEST))
    error_sum, target_sum = two_sums(
        count * of_some(error - of_error, count, 0.0), count * of_some(target - of_target, count, 0.0)
    )
    mean, target_mean = mean_about(of_error, error_sum, tokens), mean_about(of_target, target_sum, tokens)
    error_m2, target_m2 = two_sums(around(error, error_m2, mean, count), around(target, target_m2, target_mean, count))
    put_moments(totals, pieces, mean, error_m2, tokens, ERROR)
    put_moments(totals, pieces, target_mean, target_m2, tokens, TARGET)


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
