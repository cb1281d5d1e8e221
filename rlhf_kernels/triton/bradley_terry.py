"""All-pairs Bradley-Terry and Plackett-Luce losses of ragged prompts, with their gradients, in one launch.

A program for each prompt; how a prompt is cut depends on its own size alone, which is read on the device. Prompts of up
to SMALL responses are taken GROUP at a time, each as one tile of all its pairs; a larger prompt's pairs are walked in
tiles of ROWS x COLUMNS. Every pair is visited from both sides: each response sums over its own row, so that no sum is
shared and all of them have a fixed order. Gradients are scaled by the count of pairs once it is known.
"""

import torch
import triton
import triton.language as tl

from ..reference.bradley_terry import STATS
from . import _launch
from ._launch import pieces
from ._math import exp_f32, log1p_f32
from ._ranking_metrics import ranking_metrics_fwd

__all__ = ["bradley_terry_bwd", "bradley_terry_fwd", "plackett_luce_fwd", "ranking_metrics_fwd"]

SMALL = 16  # responses of a prompt that is one tile
GROUP = 4  # such prompts of a program: one a warp
ROWS, COLUMNS = 16, 32  # a tile of a larger prompt: 4 pairs a thread
OPTIONS = {"SMALL": SMALL, "GROUP": GROUP, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4}
SCALED_PROMPTS, SCALED_COLUMNS = 16, 32  # a tile of the backward
WIDTH = tl.constexpr(len(STATS))
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def log1p_polynomial(u):
    """log(1 + u) for 0 <= u <= 1, at most 2 ulp."""
    h = tl.fma(u, -3.318472238e-3, 2.02045814e-2)
    h = tl.fma(h, u, -5.766443309e-2)
    h = tl.fma(h, u, 0.1068055387)
    h = tl.fma(h, u, -0.1535539498)
    h = tl.fma(h, u, 0.1969539994)
    h = tl.fma(h, u, -0.2495858727)
    h = tl.fma(h, u, 0.333305113)
    h = tl.fma(h, u, -0.4999993276)
    return tl.fma(u * u, h, u)


@triton.jit
def pair_term(x):
    """(-log sigmoid(x), sigmoid(-x)), exact for any gap."""
    u = exp_f32(-tl.abs(x))
    inverse = 1.0 / (1.0 + u)
    behind = x < 0.0
    return tl.where(behind, -x, 0.0) + log1p_polynomial(u), tl.where(behind, inverse, u * inverse)


@triton.jit
def tie_term(gap):
    """(half of both directions' losses, its slope in the gap)."""
    size = tl.abs(gap)
    u = exp_f32(-size)
    half = 0.5 * (1.0 - u) / (1.0 + u)
    return 0.5 * size + log1p_polynomial(u), tl.where(gap < 0.0, -half, half)


@triton.jit
def responses(scores, ranks, at, inside):
    """Scores in fp32 and ranks; an absent response has rank -1 and score 0."""
    rank = tl.load(ranks + at, mask=inside, other=-1)
    score = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(rank >= 0, score, 0.0), rank


@triton.jit
def visit(s_i, r_i, i, s_j, r_j, j, ahead_by, behind_by, TIES: tl.constexpr):
    """What the pairs (i, j) add to row i: gradient, loss, and counts of better, worse, tied, and right (twice).

    A pair's loss and counts stand where i is the better one, a tie's where i comes first.
    """
    both = (r_i >= 0) & (r_j >= 0)
    wins = both & (r_i < r_j)
    loses = both & (r_j < r_i)
    gap = s_i - s_j
    cost, pull = pair_term(tl.where(wins, gap - ahead_by, -gap - behind_by))
    slope = tl.where(wins, -pull, tl.where(loses, pull, 0.0))
    cost = tl.where(wins, cost, 0.0)
    tied = both & (r_i == r_j) & (i < j)
    if TIES:
        tie_cost, tie_pull = tie_term(gap)
        slope = tl.where(both & (r_i == r_j) & (i != j), tie_pull, slope)
        cost = tl.where(tied, tie_cost, cost)
    right = (wins & (gap > 0.0)).to(tl.int32) + (wins & (gap >= 0.0)).to(tl.int32)
    return slope, cost, wins.to(tl.int32), loses.to(tl.int32), tied.to(tl.int32), right


@triton.jit
def pair_margins(margins, columns, p, start, i, j, inside, MARGINS: tl.constexpr):
    """The margins of i over j and of j over i: none, one a prompt, or one a pair."""
    if MARGINS == 2:
        ahead_by = tl.load(margins + (start + i) * columns + j, mask=inside, other=0.0)
        behind_by = tl.load(margins + (start + j) * columns + i, mask=inside, other=0.0)
        return ahead_by, behind_by
    elif MARGINS == 1:
        by = tl.load(margins + p, mask=p >= 0, other=0.0)
        return by, by
    else:
        return 0.0, 0.0


@triton.jit
def lowest(score, rank, AXIS: tl.constexpr):
    """The smallest score of the responses that are present; infinite if none is, NaN if one of them is."""
    there = rank >= 0
    dirty = tl.sum((there & (score != score)).to(tl.int32), AXIS) > 0
    return tl.where(dirty, float("nan"), tl.min(tl.where(there & (score == score), score, INFINITY), AXIS))


@triton.jit
def add_rewards(s, r, rewards, present, dirty, low, high):
    """Sum, count, count of NaN, lowest and lowest negated score of a prompt, with one more block of responses."""
    there, clean = r >= 0, s == s
    rewards += tl.sum(s.to(tl.float64), 0)
    present += tl.sum(there.to(tl.int64), 0)
    dirty += tl.sum((clean == 0).to(tl.int32), 0)
    low = tl.where(there & clean & (s < low), s, low)
    return rewards, present, dirty, low, tl.where(there & clean & (-s < high), -s, high)


@triton.jit
def store_stats(stats, p, mask, pairs, strict, right, margin, present, rewards, low, high):
    row = stats + p * WIDTH
    tl.store(row, pairs.to(tl.float32), mask=mask)
    tl.store(row + 1, strict.to(tl.float32), mask=mask)
    tl.store(row + 2, 0.5 * right.to(tl.float32), mask=mask)
    tl.store(row + 3, margin.to(tl.float32), mask=mask)
    tl.store(row + 4, present.to(tl.float32), mask=mask)
    tl.store(row + 5, rewards.to(tl.float32), mask=mask)
    tl.store(row + 6, low, mask=mask)
    tl.store(row + 7, high, mask=mask)


@triton.jit
def group_at(cu_groups, p, inside, count):
    """Start and size of a prompt within `count` responses, and 0, or NaN where its offsets leave them or descend."""
    first = tl.load(cu_groups + p, mask=inside, other=0)
    last = tl.load(cu_groups + p + 1, mask=inside, other=0)
    start = tl.minimum(tl.maximum(first, 0), count)
    size = tl.maximum(tl.minimum(last, count) - start, 0)
    wrong = (start != first) | (start + size != last)
    return start, size, tl.where(wrong, float("nan"), 0.0)


@triton.jit
def small_group(scores, ranks, cu_groups, prompts, count, first, SMALL: tl.constexpr, GROUP: tl.constexpr):
    """Of GROUP prompts: which, start, size, whether each is taken, NaN of bad offsets [GROUP]; their responses as rows
    [GROUP, SMALL, 1] and columns [GROUP, 1, SMALL]."""
    p = first + tl.arange(0, GROUP)
    inside = p < prompts
    start, size, bad = group_at(cu_groups, p, inside, count)
    taken = inside & (size <= SMALL)
    i = tl.arange(0, SMALL)[None, :, None]
    j = tl.arange(0, SMALL)[None, None, :]
    base, end = start[:, None, None], tl.where(taken, size, 0)[:, None, None]
    s_i, r_i = responses(scores, ranks, base + i, i < end)
    s_j, r_j = responses(scores, ranks, base + j, j < end)
    return p, start, size, taken, bad, i, j, s_i, r_i, s_j, r_j


@triton.jit
def small_pairs(
    scores, ranks, cu_groups, prompts, count, margins, margin_columns, loss, grad, stats, first, TIES: tl.constexpr,
    MARGINS: tl.constexpr, SMALL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The prompts of at most SMALL responses among GROUP prompts."""
    p, start, size, taken, bad, i, j, s_i, r_i, s_j, r_j = small_group(
        scores, ranks, cu_groups, prompts, count, first, SMALL, GROUP
    )
    base, end = start[:, None, None], tl.where(taken, size, 0)[:, None, None]
    of = tl.where(taken, p, -1)[:, None, None]
    ahead_by, behind_by = pair_margins(margins, margin_columns, of, base, i, j, (i < end) & (j < end), MARGINS)
    slope, cost, wins, loses, tied, right = visit(s_i, r_i, i, s_j, r_j, j, ahead_by, behind_by, TIES)
    strict = tl.sum(tl.sum(wins, 2), 1)
    pairs = strict
    if TIES:
        pairs += tl.sum(tl.sum(tied, 2), 1)
    divisor = tl.maximum(pairs, 1).to(tl.float32) + bad
    tl.store(loss + p, tl.sum(tl.sum(cost, 2), 1) / divisor, mask=taken)
    k = tl.arange(0, SMALL)[None, :]
    inside = taken[:, None] & (k < size[:, None])
    tl.store(grad + start[:, None] + k, tl.sum(slope, 2) / divisor[:, None], mask=inside)
    s, r = responses(scores, ranks, start[:, None] + k, inside)
    margin = tl.sum(s.to(tl.float64) * tl.sum(wins - loses, 2).to(tl.float64), 1)
    present = tl.sum((r >= 0).to(tl.int32), 1)
    twice = tl.sum(tl.sum(right, 2), 1)
    low, high = lowest(s, r, 1), -lowest(-s, r, 1)
    store_stats(stats, p, taken, pairs, strict, twice, margin, present, tl.sum(s.to(tl.float64), 1), low, high)


@triton.jit
def large_pairs(
    scores, ranks, start, size, bad, margins, margin_columns, loss, grad, stats, p, TIES: tl.constexpr,
    MARGINS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One prompt of any size; its gradients are stored unscaled first."""
    total = tl.full([], 0.0, tl.float64)
    margin = tl.full([], 0.0, tl.float64)
    rewards = tl.full([], 0.0, tl.float64)
    strict = tl.full([], 0, tl.int64)
    ties = tl.full([], 0, tl.int64)
    twice = tl.full([], 0, tl.int64)
    present = tl.full([], 0, tl.int64)
    low = tl.full([ROWS], INFINITY, tl.float32)
    high = tl.full([ROWS], INFINITY, tl.float32)
    dirty = tl.full([], 0, tl.int32)
    for top in range(0, size, ROWS):
        k = top + tl.arange(0, ROWS)
        s, r = responses(scores, ranks, start + k, k < size)
        slopes = tl.zeros([ROWS, COLUMNS], tl.float32)
        costs = tl.zeros([ROWS, COLUMNS], tl.float32)
        won = tl.zeros([ROWS, COLUMNS], tl.int32)
        lost = tl.zeros([ROWS, COLUMNS], tl.int32)
        even = tl.zeros([ROWS, COLUMNS], tl.int32)
        rights = tl.zeros([ROWS, COLUMNS], tl.int32)
        for left in range(0, size, COLUMNS):
            i, j = k[:, None], (left + tl.arange(0, COLUMNS))[None, :]
            s_j, r_j = responses(scores, ranks, start + j, j < size)
            inside = (i < size) & (j < size)
            ahead_by, behind_by = pair_margins(margins, margin_columns, p, start, i, j, inside, MARGINS)
            slope, cost, wins, loses, tied, right = visit(
                s[:, None], r[:, None], i, s_j, r_j, j, ahead_by, behind_by, TIES
            )
            slopes += slope
            costs += cost
            won += wins
            lost += loses
            rights += right
            if TIES:
                even += tied
        tl.store(grad + start + k, tl.sum(slopes, 1), mask=k < size)
        better = tl.sum(won, 1)
        total += tl.sum(tl.sum(costs, 1).to(tl.float64), 0)
        margin += tl.sum(s.to(tl.float64) * (better - tl.sum(lost, 1)).to(tl.float64), 0)
        strict += tl.sum(better.to(tl.int64), 0)
        ties += tl.sum(tl.sum(even, 1).to(tl.int64), 0)
        twice += tl.sum(tl.sum(rights, 1).to(tl.int64), 0)
        rewards, present, dirty, low, high = add_rewards(s, r, rewards, present, dirty, low, high)
    pairs = strict + ties
    divisor = tl.maximum(pairs, 1).to(tl.float64) + bad
    tl.store(loss + p, (total / divisor).to(tl.float32))
    lowest_score = tl.where(dirty > 0, float("nan"), tl.min(low, 0))
    highest_score = tl.where(dirty > 0, float("nan"), -tl.min(high, 0))
    store_stats(stats, p, p >= 0, pairs, strict, twice, margin, present, rewards, lowest_score, highest_score)
    divide(grad, start, size, divisor.to(tl.float32), ROWS)


@triton.jit
def divide(grad, start, size, divisor, ROWS: tl.constexpr):
    """The prompt's gradients by their count; other threads of the program may have stored them."""
    tl.debug_barrier()
    for top in range(0, size, ROWS):
        k = top + tl.arange(0, ROWS)
        x = tl.load(grad + start + k, mask=k < size, other=0.0)
        tl.store(grad + start + k, x / divisor, mask=k < size)


@triton.jit(do_not_specialize=["prompts", "count", "margin_columns"])
def bradley_terry_fwd_kernel(
    scores, ranks, cu_groups, prompts, count, margins, margin_columns, loss, grad, stats, TIES: tl.constexpr,
    MARGINS: tl.constexpr, SMALL: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    if p % GROUP == 0:
        small_pairs(
            scores, ranks, cu_groups, prompts, count, margins, margin_columns, loss, grad, stats, p, TIES, MARGINS,
            SMALL, GROUP,
        )  # fmt: skip
    start, size, bad = group_at(cu_groups, p, p < prompts, count)
    size = size.to(tl.int32)
    if size > SMALL:
        large_pairs(
            scores, ranks, start, size, bad, margins, margin_columns, loss, grad, stats, p, TIES, MARGINS, ROWS,
            COLUMNS,
        )  # fmt: skip


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
    scores, ranks, cu_groups, prompts, count, loss, grad, stats, first, SMALL: tl.constexpr, GROUP: tl.constexpr
):
    """The prompts of at most SMALL responses among GROUP prompts."""
    p, start, size, taken, bad, _, _, s_i, r_i, s_j, r_j = small_group(
        scores, ranks, cu_groups, prompts, count, first, SMALL, GROUP
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


@triton.jit(do_not_specialize=["prompts", "count"])
def plackett_luce_fwd_kernel(
    scores, ranks, cu_groups, prompts, count, peaks, inverses, loss, grad, stats, SMALL: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    if p % GROUP == 0:
        small_choices(scores, ranks, cu_groups, prompts, count, loss, grad, stats, p, SMALL, GROUP)
    start, size, bad = group_at(cu_groups, p, p < prompts, count)
    size = size.to(tl.int32)
    if size > SMALL:
        large_choices(scores, ranks, start, size, bad, peaks, inverses, loss, grad, stats, p, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["grad_stride", "prompts", "count"])
def bradley_terry_bwd_kernel(
    grad_loss, grad_stride, grad, cu_groups, prompts, count, out, PROMPTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """PROMPTS prompts, COLUMNS of their responses at a time."""
    p = tl.program_id(0).to(tl.int64) * PROMPTS + tl.arange(0, PROMPTS)
    inside = p < prompts
    start, size, _bad = group_at(cu_groups, p, inside, count)
    upstream = tl.load(grad_loss + p * grad_stride, mask=inside, other=0.0)[:, None]
    for left in range(0, tl.max(size, 0), COLUMNS):
        at = (start + left)[:, None] + tl.arange(0, COLUMNS)[None, :]
        there = at < (start + size)[:, None]
        tl.store(out + at, upstream * tl.load(grad + at, mask=there, other=0.0), mask=there)


def _outputs(scores, cu_groups):
    prompts, new = cu_groups.shape[0] - 1, scores.new_empty
    sizes = prompts, scores.shape[0], (prompts, len(STATS))
    return tuple(new(size, dtype=torch.float32) for size in sizes)


def bradley_terry_fwd(scores, ranks, cu_groups, margins, ties_half):
    scores, prompts = scores.contiguous(), cu_groups.shape[0] - 1
    outputs = _outputs(scores, cu_groups)
    form = 0 if margins is None else margins.dim()
    columns = margins.shape[1] if form == 2 else 0
    _launch.run(
        bradley_terry_fwd_kernel, prompts, scores, ranks, cu_groups, prompts, scores.shape[0], margins, columns,
        *outputs, TIES=ties_half, MARGINS=form, registers=_launch.FREE, **OPTIONS,
    )  # fmt: skip
    return outputs


def plackett_luce_fwd(scores, ranks, cu_groups):
    scores, prompts = scores.contiguous(), cu_groups.shape[0] - 1
    outputs = _outputs(scores, cu_groups)
    peaks, inverses = (torch.empty_like(outputs[1]) for _ in range(2))
    _launch.run(
        plackett_luce_fwd_kernel,
        prompts,
        scores,
        ranks,
        cu_groups,
        prompts,
        scores.shape[0],
        peaks,
        inverses,
        *outputs,
        **OPTIONS,
    )
    return outputs


def bradley_terry_bwd(grad_loss, grad, cu_groups):
    out, prompts = torch.empty_like(grad), cu_groups.shape[0] - 1
    _launch.run(
        bradley_terry_bwd_kernel, pieces(prompts, SCALED_PROMPTS), grad_loss, grad_loss.stride(0), grad, cu_groups,
        prompts, grad.shape[0], out, PROMPTS=SCALED_PROMPTS, COLUMNS=SCALED_COLUMNS,
    )  # fmt: skip
    return out
