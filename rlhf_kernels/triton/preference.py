"""Preference losses of pairs of responses, or of KTO's single responses, with gradients and rewards in one pass.

One entry a lane, BLOCK entries a program, one launch; nothing is summed. KTO's entries are the chosen responses and
then the rejected ones.
"""

import torch
import triton
import triton.language as tl

from ..reference.preference import LOSS_TYPES
from . import _launch
from ._launch import pieces
from ._math import exp_f32, expm1_f32, log1p_f32

BLOCK = 256  # entries of a program, two a thread
IPO, HINGE, ORPO, KTO = (tl.constexpr(LOSS_TYPES.index(name)) for name in ("ipo", "hinge", "orpo", "kto"))
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
def preference_term(chosen, rejected, beta, label_smoothing, target_margin, ideal_gap, KIND: tl.constexpr):
    """Loss of a pair and its slopes in what the loss compares."""
    if KIND == ORPO:
        odds_chosen, slope_chosen = log_odds(chosen)
        odds_rejected, slope_rejected = log_odds(rejected)
        cost, _, below = sigmoid_of(odds_chosen - odds_rejected)
        slope = beta * below
        return beta * cost - chosen, -slope * slope_chosen - 1.0, slope * slope_rejected
    elif KIND == IPO:
        off = (chosen - rejected) - ideal_gap
        return off * off, 2.0 * off, -2.0 * off
    elif KIND == HINGE:
        miss = 1.0 - beta * (chosen - rejected)
        slope = tl.where(miss > 0.0, beta, 0.0)
        return tl.where(miss <= 0.0, 0.0, miss), -slope, slope
    else:
        x = beta * (chosen - rejected) - target_margin
        cost, _, below = sigmoid_of(x)
        smoothed = tl.where(label_smoothing > 0.0, cost + label_smoothing * x, cost)  # 0 * x may be NaN
        slope = beta * (label_smoothing - below)
        return smoothed, slope, -slope


@triton.jit
def compared(log_probs, ref, lengths, at, inside, HAS_REF: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """What the loss compares: the log-prob, less that of the reference model, by token if there are lengths."""
    x = tl.load(log_probs + at, mask=inside, other=-1.0).to(tl.float32)
    if HAS_REF:
        x -= tl.load(ref + at, mask=inside, other=-1.0).to(tl.float32)
    count = tl.full(x.shape, 1.0, tl.float32)
    if HAS_LENGTHS:
        count = tl.load(lengths + at, mask=inside, other=1).to(tl.float32)
        x = x / count
    return x, count


@triton.jit
def preference_fwd_kernel(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, count, beta, label_smoothing,
    target_margin, ideal_gap, loss, grad_chosen, grad_rejected, chosen_rewards, rejected_rewards,
    KIND: tl.constexpr, HAS_REF: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    good, good_length = compared(chosen, ref_chosen, chosen_lengths, at, inside, HAS_REF, HAS_LENGTHS)
    bad, bad_length = compared(rejected, ref_rejected, rejected_lengths, at, inside, HAS_REF, HAS_LENGTHS)
    cost, slope_good, slope_bad = preference_term(good, bad, beta, label_smoothing, target_margin, ideal_gap, KIND)
    if HAS_LENGTHS:
        slope_good = slope_good / good_length
        slope_bad = slope_bad / bad_length
    tl.store(loss + at, cost, mask=inside)
    tl.store(grad_chosen + at, slope_good, mask=inside)
    tl.store(grad_rejected + at, slope_bad, mask=inside)
    tl.store(chosen_rewards + at, beta * good, mask=inside)
    tl.store(rejected_rewards + at, beta * bad, mask=inside)


@triton.jit
def kto_fwd_kernel(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, chosen_count, count, kl, beta,
    chosen_weight, rejected_weight, loss, grad_chosen, grad_rejected, chosen_rewards, rejected_rewards,
    HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight * sigmoid(-x), with x = beta (c - z) of a chosen response and beta (z - r) of a rejected one."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    desirable = at < chosen_count
    undesirable = (at >= chosen_count) & (at < count)
    behind = at - chosen_count  # place of a rejected response
    good, good_length = compared(chosen, ref_chosen, chosen_lengths, at, desirable, True, HAS_LENGTHS)
    bad, bad_length = compared(rejected, ref_rejected, rejected_lengths, behind, undesirable, True, HAS_LENGTHS)
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


@triton.jit
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
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, kl, loss_type, beta, label_smoothing,
    target_margin, chosen_weight, rejected_weight,
):  # fmt: skip
    tensors = (chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    tensors = [None if x is None else x.contiguous() for x in tensors]
    C, R, unpaired = chosen.shape[0], rejected.shape[0], loss_type == "kto"
    count = C + R if unpaired else C
    outputs = tuple(chosen.new_empty(size, dtype=torch.float32) for size in (count, C, R, C, R))
    options = {"HAS_LENGTHS": chosen_lengths is not None, "BLOCK": BLOCK}
    if unpaired:
        _launch.run(
            kto_fwd_kernel, pieces(count, BLOCK), *tensors, C, count, kl, beta, chosen_weight, rejected_weight,
            *outputs, **options,
        )  # fmt: skip
        return outputs
    margin = target_margin if loss_type == "simpo" else 0.0
    _launch.run(
        preference_fwd_kernel, pieces(count, BLOCK), *tensors, count, beta, label_smoothing, margin, 0.5 / beta,
        *outputs, KIND=LOSS_TYPES.index(loss_type), HAS_REF=ref_chosen is not None, **options,
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
