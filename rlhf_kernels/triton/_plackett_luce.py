"""The choices of the Plackett-Luce loss in Triton: prompts of one tile, four a program, and larger ones in tiles."""

import triton
import triton.language as tl

from ._math import exp_f32, log1p_f32
from ._prompts import INFINITY, add_rewards, lowest, responses, small_group, store_stats


@triton.jit
def candidates(s_i, r_i, s_j, r_j):
    """Whether j is worse than i, whether i is worse than j, and how often i is right about it (counted twice)."""
    both = (r_i >= 0) & (r_j >= 0)
    below = both & (r_i < r_j)
    right = (below & (s_i > s_j)).to(tl.int32) + (below & (s_i >= s_j)).to(tl.int32)
    return below, both & (r_j < r_i), right


@triton.jit
def weights(s_j, peak, below):
    """Weights of the worse responses, the same without those at the peak, and which are there."""
    at_peak = below & (s_j == peak)
    weight = tl.where(below, exp_f32(tl.where(below, s_j, peak) - peak), 0.0)
    return weight, tl.where(at_peak, 0.0, weight), at_peak.to(tl.int32)


@triton.jit
def choice_term(s, peak, others, rest, at_peak, chooses):
    """Loss, 1 / mass and 1 - p of a choice. One candidate at the peak weighs 1: the log of the rest is then exact."""
    own = s == peak
    rest = rest + tl.where(own, 0.0, exp_f32(s - peak)) + (at_peak + own.to(tl.int32) - 1).to(tl.float32)
    inverse = 1.0 / (1.0 + rest)
    cost = (peak - s) + log1p_f32(rest)
    return tl.where(chooses, cost, 0.0), inverse, tl.where(chooses, others * inverse, 0.0)


@triton.jit
def small_choices(
    scores, ranks, cu_groups, columns, prompts, count, loss, grad, stats, first, SMALL: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """The prompts of at most SMALL responses among GROUP prompts."""
    p, start, size, taken, bad, _, _, s_i, r_i, s_j, r_j = small_group(
        scores, ranks, cu_groups, columns, prompts, count, first, SMALL, GROUP
    )
    below, above, right = candidates(s_i, r_i, s_j, r_j)
    k = tl.arange(0, SMALL)[None, :]
    inside = taken[:, None] & (k < size[:, None])
    s, r = responses(scores, ranks, start[:, None] + k, inside)
    worse = tl.sum(below.to(tl.int32), 2)
    peak = tl.max(tl.where(below, s_j, s_i), 2)
    weight, others, at_peak = weights(s_j, peak[:, :, None], below)
    cost, inverse, missing = choice_term(s, peak, tl.sum(weight, 2), tl.sum(others, 2), tl.sum(at_peak, 2), worse > 0)
    share = tl.where(above, exp_f32(tl.where(above, s_i - peak[:, None, :], 0.0)) * inverse[:, None, :], 0.0)
    choices = tl.sum((worse > 0).to(tl.int32), 1)
    divisor = tl.maximum(choices, 1).to(tl.float32) + bad
    tl.store(loss + p, tl.sum(cost, 1) / divisor, mask=taken)
    tl.store(grad + start[:, None] + k, (tl.sum(share, 2) - missing) / divisor[:, None], mask=inside)
    margin = tl.sum(s.to(tl.float64) * (worse - tl.sum(above.to(tl.int32), 2)).to(tl.float64), 1)
    present = tl.sum((r >= 0).to(tl.int32), 1)
    strict, twice = tl.sum(worse, 1), tl.sum(tl.sum(right, 2), 1)
    low, high = lowest(s, r, 1), -lowest(-s, r, 1)
    store_stats(stats, p, taken, choices, strict, twice, margin, present, tl.sum(s.to(tl.float64), 1), low, high)


@triton.jit
def large_choices(
    scores, ranks, start, size, bad, peaks, inverses, loss, grad, stats, p, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One prompt of any size: first what each response chooses from, then what all choices take from each response."""
    total = tl.full([], 0.0, tl.float64)
    margin = tl.full([], 0.0, tl.float64)
    rewards = tl.full([], 0.0, tl.float64)
    strict = tl.full([], 0, tl.int64)
    choices = tl.full([], 0, tl.int64)
    twice = tl.full([], 0, tl.int64)
    present = tl.full([], 0, tl.int64)
    dirty = tl.full([], 0, tl.int32)
    low = tl.full([ROWS], INFINITY, tl.float32)
    high = tl.full([ROWS], INFINITY, tl.float32)
    for top in range(0, size, ROWS):
        k = top + tl.arange(0, ROWS)
        s, r = responses(scores, ranks, start + k, k < size)
        s_i, r_i = s[:, None], r[:, None]
        best = tl.zeros([ROWS, COLUMNS], tl.float32) + s_i
        won = tl.zeros([ROWS, COLUMNS], tl.int32)
        lost = tl.zeros([ROWS, COLUMNS], tl.int32)
        rights = tl.zeros([ROWS, COLUMNS], tl.int32)
        for left in range(0, size, COLUMNS):
            j = (left + tl.arange(0, COLUMNS))[None, :]
            s_j, r_j = responses(scores, ranks, start + j, j < size)
            below, above, right = candidates(s_i, r_i, s_j, r_j)
            best = tl.where(below & (s_j > best), s_j, best)
            won += below.to(tl.int32)
            lost += above.to(tl.int32)
            rights += right
        peak, worse = tl.max(best, 1), tl.sum(won, 1)
        weight = tl.zeros([ROWS, COLUMNS], tl.float32)
        others = tl.zeros([ROWS, COLUMNS], tl.float32)
        at_peak = tl.zeros([ROWS, COLUMNS], tl.int32)
        for left in range(0, size, COLUMNS):
            j = (left + tl.arange(0, COLUMNS))[None, :]
            s_j, r_j = responses(scores, ranks, start + j, j < size)
            below, above, right = candidates(s_i, r_i, s_j, r_j)
            more, more_others, more_at_peak = weights(s_j, peak[:, None], below)
            weight += more
            others += more_others
            at_peak += more_at_peak
        cost, inverse, missing = choice_term(
            s, peak, tl.sum(weight, 1), tl.sum(others, 1), tl.sum(at_peak, 1), worse > 0
        )
        tl.store(peaks + start + k, peak, mask=k < size)
        tl.store(inverses + start + k, inverse, mask=k < size)
        tl.store(grad + start + k, -missing, mask=k < size)
        total += tl.sum(cost.to(tl.float64), 0)
        margin += tl.sum(s.to(tl.float64) * (worse - tl.sum(lost, 1)).to(tl.float64), 0)
        strict += tl.sum(worse.to(tl.int64), 0)
        choices += tl.sum((worse > 0).to(tl.int64), 0)
        twice += tl.sum(tl.sum(rights, 1).to(tl.int64), 0)
        rewards, present, dirty, low, high = add_rewards(s, r, rewards, present, dirty, low, high)
    divisor = tl.maximum(choices, 1).to(tl.float64) + bad
    tl.store(loss + p, (total / divisor).to(tl.float32))
    lowest_score = tl.where(dirty > 0, float("nan"), tl.min(low, 0))
    highest_score = tl.where(dirty > 0, float("nan"), -tl.min(high, 0))
    store_stats(stats, p, p >= 0, choices, strict, twice, margin, present, rewards, lowest_score, highest_score)
    tl.debug_barrier()  # what follows was stored by other threads of the program
    for top in range(0, size, ROWS):
        k = top + tl.arange(0, ROWS)
        s, r = responses(scores, ranks, start + k, k < size)
        shares = tl.zeros([ROWS, COLUMNS], tl.float32)
        for left in range(0, size, COLUMNS):
            j = (left + tl.arange(0, COLUMNS))[None, :]
            r_j = tl.load(ranks + start + j, mask=j < size, other=-1)
            peak = tl.load(peaks + start + j, mask=j < size, other=0.0)
            inverse = tl.load(inverses + start + j, mask=j < size, other=0.0)
            above = (r[:, None] >= 0) & (r_j >= 0) & (r_j < r[:, None])
            shares += tl.where(above, exp_f32(tl.where(above, s[:, None] - peak, 0.0)) * inverse, 0.0)
        x = tl.load(grad + start + k, mask=k < size, other=0.0)
        tl.store(grad + start + k, (tl.sum(shares, 1) + x) / divisor.to(tl.float32), mask=k < size)
