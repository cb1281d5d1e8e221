"""What the ranking losses in Triton share: a prompt's responses, where they lie, and the statistics over them."""

import triton
import triton.language as tl

from ..reference.bradley_terry import STATS

WIDTH = tl.constexpr(len(STATS))
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def responses(scores, ranks, at, inside):
    """Scores in fp32 and ranks; an absent response has rank -1 and score 0."""
    rank = tl.load(ranks + at, mask=inside, other=-1)
    score = tl.load(scores + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(rank >= 0, score, 0.0), rank


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
def group_at(cu_groups, columns, p, inside, count):
    """Start and size of a prompt within `count` responses, and 0, or NaN where its offsets leave them or descend.

    cu_groups None: each has so many columns.
    """
    if cu_groups is None:
        size = tl.where(inside, columns, 0).to(tl.int64)
        return p * size, size, tl.where(inside, 0.0, 0.0)
    else:
        first = tl.load(cu_groups + p, mask=inside, other=0)
        last = tl.load(cu_groups + p + 1, mask=inside, other=0)
        start = tl.minimum(tl.maximum(first, 0), count)
        size = tl.maximum(tl.minimum(last, count) - start, 0)
        wrong = (start != first) | (start + size != last)
        return start, size, tl.where(wrong, float("nan"), 0.0)


@triton.jit
def small_group(scores, ranks, cu_groups, columns, prompts, count, first, SMALL: tl.constexpr, GROUP: tl.constexpr):
    """Of GROUP prompts: which, start, size, whether each is taken, NaN of bad offsets [GROUP]; their responses as rows
    [GROUP, SMALL, 1] and columns [GROUP, 1, SMALL]."""
    p = first + tl.arange(0, GROUP)
    inside = p < prompts
    start, size, bad = group_at(cu_groups, columns, p, inside, count)
    taken = inside & (size <= SMALL)
    i = tl.arange(0, SMALL)[None, :, None]
    j = tl.arange(0, SMALL)[None, None, :]
    base, end = start[:, None, None], tl.where(taken, size, 0)[:, None, None]
    s_i, r_i = responses(scores, ranks, base + i, i < end)
    s_j, r_j = responses(scores, ranks, base + j, j < end)
    return p, start, size, taken, bad, i, j, s_i, r_i, s_j, r_j
