"""Preference losses of pairs of responses, or of KTO's single responses, with gradients and rewards in one pass.

One entry a lane, BLOCK entries a program, one launch; nothing is summed. KTO's entries are the chosen responses and
then the rejected ones.
"""

import torch
import triton
import triton.language as tl

from ..reference.preference import DIVERGENCES, HELD, TERMS
from . import _launch
from ._launch import pieces
from ._math import exp_f32, expm1_f32, log1p_f32

BLOCK = 256  # entries of a program, two a thread
IPO, HINGE, ORPO, EXO_PAIR, DISCOPOP, NCA_PAIR, BCO_PAIR, SPPO_HARD, APO_ZERO, APO_DOWN = (
    tl.constexpr(TERMS.index(name))
    for name in (
        "ipo", "hinge", "orpo", "exo_pair", "discopop", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    )
)  # fmt: skip
REVERSE_KL, JS_DIVERGENCE = (tl.constexpr(DIVERGENCES.index(name)) for name in ("reverse_kl", "js_divergence"))
MOST = tl.constexpr(HELD)
BELOW_ONE = tl.constexpr(-1.1920929e-7)  # mean log-probs are held here: a response with probability 1 has infinite odds


@triton.jit
def sigmoid_of(x):
    """(-log sigmoid(x), sigmoid(x), sigmoid(-x)), exact for any x."""
    u = exp_f32(-tl.abs(x))
    large = 1.0 / (1.0 + u)
    small = u * large
    behind = x < 0.0
    loss = tl.where(behind, -x, 0.0) + log1p_f32(u)
    return loss, tl.where(behind, small, large), tl.where(behind, large, small)


@triton.jit
def log_odds(mean_log_prob):
    """l - log(1 - e^l) and its slope 1 / (1 - e^l), 0 where l is held below 0."""
    held = mean_log_prob > BELOW_ONE
    log_p = tl.where(held, BELOW_ONE, mean_log_prob)
    rest = -expm1_f32(log_p)
    return log_p - tl.log(rest), tl.where(held, 0.0, 1.0 / rest)


@triton.jit
def times(weight, x):
    """weight * x, and 0 where the weight is 0, though x be infinite there."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def gap_term(gap, beta, a, b, ideal_gap, KIND: tl.constexpr):
    """Loss and its slope in the gap of a pair, of the losses that depend on the gap alone."""
    if KIND == IPO:
        off = gap - ideal_gap
        return off * off, 2.0 * off
    elif KIND == HINGE:
        miss = 1.0 - beta * gap
        return tl.where(miss <= 0.0, 0.0, miss), -tl.where(miss > 0.0, beta, 0.0)
    elif KIND == EXO_PAIR:
        x = beta * gap
        rest, larger, smaller = sigmoid_of(tl.abs(x))
        q = tl.where(x < 0.0, smaller, larger)
        other = tl.where(x < 0.0, larger, smaller)
        cost = q * a + other * b - rest - times(smaller, tl.abs(x))
        return cost, beta * times(larger * smaller, x - (b - a))
    elif KIND == DISCOPOP:
        x = beta * gap
        warm = x / a
        cost, _, below = sigmoid_of(x)
        _, mixed, plain = sigmoid_of(warm)
        larger = tl.where(x < 0.0, plain, mixed)
        exponential = exp_f32(tl.where(x < 0.0, warm - x, -x)) * larger
        slope = times(mixed * plain / a, cost) + plain * below + exponential * (1.0 - plain / a)
        return times(plain, cost) + exponential, -beta * slope
    else:
        x = beta * gap - b
        cost, _, below = sigmoid_of(x)
        smoothed = tl.where(a != 0.0, cost + a * x, cost)  # 0 * x may be NaN
        return smoothed, beta * (a - below)


@triton.jit
def preference_term(chosen, rejected, beta, a, b, ideal_gap, shift, KIND: tl.constexpr):
    """Loss of a pair and its slopes in what the loss compares."""
    if KIND == ORPO:
        odds_chosen, slope_chosen = log_odds(chosen)
        odds_rejected, slope_rejected = log_odds(rejected)
        cost, _, below = sigmoid_of(odds_chosen - odds_rejected)
        slope = beta * below
        return beta * cost - chosen, -slope * slope_chosen - 1.0, slope * slope_rejected
    elif KIND == SPPO_HARD:
        off = chosen - ideal_gap
        other = rejected + ideal_gap
        return off * off + other * other, 2.0 * off, 2.0 * other
    elif KIND == NCA_PAIR:
        win, value, below = sigmoid_of(beta * chosen)
        against, _, _ = sigmoid_of(-beta * chosen)
        lose, _, bad = sigmoid_of(-beta * rejected)
        return win + 0.5 * against + 0.5 * lose, beta * (0.5 * value - below), 0.5 * beta * bad
    elif KIND == BCO_PAIR:
        win, _, below = sigmoid_of(beta * chosen - shift)
        lose, _, bad = sigmoid_of(shift - beta * rejected)
        return win + lose, -beta * below, beta * bad
    elif KIND == APO_ZERO:
        _, value, below = sigmoid_of(beta * chosen)
        _, bad, good = sigmoid_of(beta * rejected)
        return below + bad, -beta * (value * below), beta * (bad * good)
    elif KIND == APO_DOWN:
        _, value, below = sigmoid_of(beta * chosen)
        _, won, lost = sigmoid_of(beta * (chosen - rejected))
        between = beta * (won * lost)
        return value + lost, beta * (value * below) - between, between
    else:
        cost, slope = gap_term(chosen - rejected, beta, a, b, ideal_gap, KIND)
        return cost, slope, -slope


@triton.jit
def score_of(x, power, DIVERGENCE: tl.constexpr):
    """f'(e^x) and its derivative: JS log(2t / (t + 1)); alpha (t^power - 1) / power, its exponent held at 80."""
    if DIVERGENCE == JS_DIVERGENCE:
        cost, _, below = sigmoid_of(x)
        return 0.6931471805599453 - cost, below  # log 2
    else:
        exponent = power * x
        held = exponent > MOST
        e = tl.where(held, MOST, exponent)
        down = expm1_f32(-tl.abs(e))
        grown = exp_f32(e)
        return tl.where(e > 0.0, -down * grown, down) / power, tl.where(held, 0.0, grown)


@triton.jit
def log_ratio(log_probs, ref, at, inside, HAS_REF: tl.constexpr):
    """The log-prob, less that of the reference model."""
    x = tl.load(log_probs + at, mask=inside, other=-1.0).to(tl.float32)
    if HAS_REF:
        x -= tl.load(ref + at, mask=inside, other=-1.0).to(tl.float32)
    return x


@triton.jit
def by_token(x, lengths, at, inside, HAS_LENGTHS: tl.constexpr):
    """What the loss compares and the length that divides it: x / length if there are lengths."""
    count = tl.full(x.shape, 1.0, tl.float32)
    if HAS_LENGTHS:
        count = tl.load(lengths + at, mask=inside, other=1).to(tl.float32)
        x = x / count
    return x, count


@triton.jit(do_not_specialize=["count"])
def preference_fwd_kernel(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, count, anchor, beta, a, b, ideal_gap,
    power, loss, grad_chosen, grad_rejected, chosen_rewards, rejected_rewards, KIND: tl.constexpr,
    DIVERGENCE: tl.constexpr, HAS_REF: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_ANCHOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    good = log_ratio(chosen, ref_chosen, at, inside, HAS_REF)
    bad = log_ratio(rejected, ref_rejected, at, inside, HAS_REF)
    if DIVERGENCE != REVERSE_KL:
        good, bend_good = score_of(good, power, DIVERGENCE)
        bad, bend_bad = score_of(bad, power, DIVERGENCE)
    good, good_length = by_token(good, chosen_lengths, at, inside, HAS_LENGTHS)
    bad, bad_length = by_token(bad, rejected_lengths, at, inside, HAS_LENGTHS)
    shift = 0.0
    if HAS_ANCHOR:
        shift = tl.load(anchor).to(tl.float32)
    cost, slope_good, slope_bad = preference_term(good, bad, beta, a, b, ideal_gap, shift, KIND)
    if DIVERGENCE != REVERSE_KL:
        slope_good = slope_good * bend_good
        slope_bad = slope_bad * bend_bad
    if HAS_LENGTHS:
        slope_good = slope_good / good_length
        slope_bad = slope_bad / bad_length
    tl.store(loss + at, cost, mask=inside)
    tl.store(grad_chosen + at, slope_good, mask=inside)
    tl.store(grad_rejected + at, slope_bad, mask=inside)
    tl.store(chosen_rewards + at, beta * good, mask=inside)
    tl.store(rejected_rewards + at, beta * bad, mask=inside)


@triton.jit(do_not_specialize=["chosen_count", "count"])
def kto_fwd_kernel(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, chosen_count, count, kl, beta,
    chosen_weight, rejected_weight, loss, grad_chosen, grad_rejected, chosen_rewards, rejected_rewards,
    HAS_REF: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight * sigmoid(-x), with x = beta (c - z) of a chosen response and beta (z - r) of a rejected one."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    desirable = at < chosen_count
    undesirable = (at >= chosen_count) & (at < count)
    behind = at - chosen_count  # place of a rejected response
    good = log_ratio(chosen, ref_chosen, at, desirable, HAS_REF)
    good, good_length = by_token(good, chosen_lengths, at, desirable, HAS_LENGTHS)
    bad = log_ratio(rejected, ref_rejected, behind, undesirable, HAS_REF)
    bad, bad_length = by_token(bad, rejected_lengths, behind, undesirable, HAS_LENGTHS)
    anchor = tl.load(kl).to(tl.float32)
    anchor = tl.where(anchor < 0.0, 0.0, anchor)
    ratio = tl.where(desirable, good, bad)
    sign = tl.where(desirable, 1.0, -1.0)
    weight = tl.where(desirable, chosen_weight, rejected_weight)
    _, value, below = sigmoid_of(sign * beta * (ratio - anchor))
    slope = -sign * beta * (weight * value * below)
    if HAS_LENGTHS:
        slope = slope / tl.where(desirable, good_length, bad_length)
    tl.store(loss + at, weight * below, mask=at < count)
    tl.store(grad_chosen + at, slope, mask=desirable)
    tl.store(grad_rejected + behind, slope, mask=undesirable)
    tl.store(chosen_rewards + at, beta * ratio, mask=desirable)
    tl.store(rejected_rewards + behind, beta * ratio, mask=undesirable)


@triton.jit(do_not_specialize=["rejected_offset", "chosen_count", "rejected_count"])
def preference_bwd_kernel(
    grad_loss, rejected_offset, grad_chosen, grad_rejected, chosen_count, rejected_count, out_chosen, out_rejected,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    good, bad = at < chosen_count, at < rejected_count
    for_chosen = tl.load(grad_loss + at, mask=good, other=0.0)
    for_rejected = tl.load(grad_loss + rejected_offset + at, mask=bad, other=0.0)
    tl.store(out_chosen + at, for_chosen * tl.load(grad_chosen + at, mask=good, other=0.0), mask=good)
    tl.store(out_rejected + at, for_rejected * tl.load(grad_rejected + at, mask=bad, other=0.0), mask=bad)


def preference_fwd(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, anchor, term, beta, a, b, divergence,
    alpha,
):  # fmt: skip
    tensors = (chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    tensors = [None if x is None else x.contiguous() for x in tensors]
    C, R, unpaired = chosen.shape[0], rejected.shape[0], term == "kto"
    count = C + R if unpaired else C
    outputs = tuple(chosen.new_empty(size, dtype=torch.float32) for size in (count, C, R, C, R))
    options = {"HAS_REF": ref_chosen is not None, "HAS_LENGTHS": chosen_lengths is not None, "BLOCK": BLOCK}
    if unpaired:
        _launch.run(
            kto_fwd_kernel, pieces(count, BLOCK), *tensors, C, count, anchor, beta, a, b, *outputs, **options,
        )  # fmt: skip
        return outputs
    _launch.run(
        preference_fwd_kernel, pieces(count, BLOCK), *tensors, count, anchor, beta, a, b, 0.5 / beta, alpha - 1.0,
        *outputs, KIND=TERMS.index(term), DIVERGENCE=DIVERGENCES.index(divergence), HAS_ANCHOR=anchor is not None,
        **options,
    )  # fmt: skip
    return outputs


def preference_bwd(grad_loss, grad_chosen, grad_rejected):
    C, R = grad_chosen.shape[0], grad_rejected.shape[0]
    grad_loss, *saved = (x.contiguous() for x in (grad_loss, grad_chosen, grad_rejected))
    offset = C if grad_loss.shape[0] == C + R else 0
    out = torch.empty_like(saved[0]), torch.empty_like(saved[1])
    _launch.run(
        preference_bwd_kernel, pieces(max(C, R), BLOCK), grad_loss, offset, *saved, C, R, *out, BLOCK=BLOCK,
    )  # fmt: skip
    return out
