"""All-pairs Bradley-Terry and Plackett-Luce losses of ragged prompts, with their gradients, in one launch.

Loss and metrics of the whole batch are a second one, of one program (`_ranking_metrics`).

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
from ._math import exp_f32
from ._plackett_luce import large_choices, small_choices
from ._prompts import INFINITY, add_rewards, group_at, lowest, responses, small_group, store_stats
from ._ranking_metrics import ranking_metrics_fwd, whole_loss

__all__ = [
    "bradley_terry_bwd",
    "bradley_terry_fwd",
    "plackett_luce_fwd",
    "ranking_bwd",
    "ranking_fwd",
    "ranking_metrics_fwd",
]

SMALL = 16  # responses of a prompt that is one tile
GROUP = 4  # such prompts of a program: one a warp
ROWS, COLUMNS = 16, 32  # a tile of a larger prompt: 4 pairs a thread
OPTIONS = {"SMALL": SMALL, "GROUP": GROUP, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4}
SCALED_PROMPTS, SCALED_COLUMNS = 16, 32  # a tile of the backward
SCALED = 1024  # responses of a program of the backward of the whole loss


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
def small_pairs(
    scores, ranks, cu_groups, columns, prompts, count, margins, margin_columns, loss, grad, stats, first,
    TIES: tl.constexpr, MARGINS: tl.constexpr, SMALL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The prompts of at most SMALL responses among GROUP prompts."""
    p, start, size, taken, bad, i, j, s_i, r_i, s_j, r_j = small_group(
        scores, ranks, cu_groups, columns, prompts, count, first, SMALL, GROUP
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


@triton.jit(do_not_specialize=["columns", "prompts", "count", "margin_columns"])
def bradley_terry_fwd_kernel(
    scores, ranks, cu_groups, columns, prompts, count, margins, margin_columns, loss, grad, stats, TIES: tl.constexpr,
    MARGINS: tl.constexpr, SMALL: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    if p % GROUP == 0:
        small_pairs(
            scores, ranks, cu_groups, columns, prompts, count, margins, margin_columns, loss, grad, stats, p, TIES,
            MARGINS, SMALL, GROUP,
        )  # fmt: skip
    start, size, bad = group_at(cu_groups, columns, p, p < prompts, count)
    size = size.to(tl.int32)
    if size > SMALL:
        large_pairs(
            scores, ranks, start, size, bad, margins, margin_columns, loss, grad, stats, p, TIES, MARGINS, ROWS,
            COLUMNS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["columns", "prompts", "count"])
def plackett_luce_fwd_kernel(
    scores, ranks, cu_groups, columns, prompts, count, peaks, inverses, loss, grad, stats, SMALL: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    if p % GROUP == 0:
        small_choices(scores, ranks, cu_groups, columns, prompts, count, loss, grad, stats, p, SMALL, GROUP)
    start, size, bad = group_at(cu_groups, columns, p, p < prompts, count)
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
    start, size, _bad = group_at(cu_groups, 0, p, inside, count)
    upstream = tl.load(grad_loss + p * grad_stride, mask=inside, other=0.0)[:, None]
    for left in range(0, tl.max(size, 0), COLUMNS):
        at = (start + left)[:, None] + tl.arange(0, COLUMNS)[None, :]
        there = at < (start + size)[:, None]
        tl.store(out + at, upstream * tl.load(grad + at, mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=["count"])
def ranking_bwd_kernel(grad_value, divisor, grad, count, out, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(grad_value).to(tl.float32) / tl.load(divisor)
    tl.store(out + at, tl.load(grad + at, mask=at < count, other=0.0) * scale, mask=at < count)


def _pairs(scores, ranks, cu_groups, columns, prompts, margins, ties_half):
    scores, outputs = scores.contiguous(), _outputs(scores, prompts)
    form = 0 if margins is None else margins.dim()
    _launch.run(
        bradley_terry_fwd_kernel, prompts, scores, ranks, cu_groups, columns, prompts, scores.shape[0], margins,
        margins.shape[1] if form == 2 else 0, *outputs, TIES=ties_half, MARGINS=form, registers=_launch.FREE, **OPTIONS,
    )  # fmt: skip
    return outputs


def _choices(scores, ranks, cu_groups, columns, prompts):
    scores, outputs = scores.contiguous(), _outputs(scores, prompts)
    peaks, inverses = (torch.empty_like(outputs[1]) for _ in range(2))
    _launch.run(
        plackett_luce_fwd_kernel, prompts, scores, ranks, cu_groups, columns, prompts, scores.shape[0], peaks, inverses,
        *outputs, registers=_launch.FREE, **OPTIONS,
    )  # fmt: skip
    return outputs


def _outputs(scores, prompts):
    sizes = prompts, scores.shape[0], (prompts, len(STATS))
    return tuple(scores.new_empty(size, dtype=torch.float32) for size in sizes)


def bradley_terry_fwd(scores, ranks, cu_groups, margins, ties_half):
    return _pairs(scores, ranks, cu_groups, 0, cu_groups.shape[0] - 1, margins, ties_half)


def plackett_luce_fwd(scores, ranks, cu_groups):
    return _choices(scores, ranks, cu_groups, 0, cu_groups.shape[0] - 1)


def bradley_terry_bwd(grad_loss, grad, cu_groups):
    out, prompts = torch.empty_like(grad), cu_groups.shape[0] - 1
    _launch.run(
        bradley_terry_bwd_kernel, pieces(prompts, SCALED_PROMPTS), grad_loss, grad_loss.stride(0), grad, cu_groups,
        prompts, grad.shape[0], out, PROMPTS=SCALED_PROMPTS, COLUMNS=SCALED_COLUMNS,
    )  # fmt: skip
    return out


def ranking_fwd(scores, ranks, cu_groups, columns, prompts, margins, kind, number, normalizer):
    inputs = scores, ranks, cu_groups, columns, prompts
    if kind == "choices":
        loss, grad, stats = _choices(*inputs)
    else:
        loss, grad, stats = _pairs(*inputs, margins, kind == "pairs_half")
    value, metrics = whole_loss(loss, stats, number, normalizer)
    return value, grad, metrics


def ranking_bwd(grad_value, grad, divisor):
    out, count = torch.empty_like(grad), grad.shape[0]
    _launch.run(ranking_bwd_kernel, pieces(count, SCALED), grad_value, divisor, grad, count, out, BLOCK=SCALED)
    return out
