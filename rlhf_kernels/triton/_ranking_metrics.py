"""The metrics of ranking losses, and the loss of the whole batch, from what all prompts gave, in one launch."""

import torch
import triton
import triton.language as tl

from ..reference.bradley_terry import METRICS, STATS
from . import _launch
from ._math import ALL, INF

ROWS = 256  # prompts that are added at a time
WIDTH = tl.constexpr(len(STATS))


@triton.jit
def column(stats, row, prompts, index: tl.constexpr, other):
    return tl.load(stats + row * WIDTH + index, mask=row < prompts, other=other)


@triton.jit
def quotient(total, count):
    """NaN where there is nothing to divide by."""
    return tl.where(count == 0.0, float("nan"), total / tl.where(count == 0.0, 1.0, count)).to(tl.float32)


@triton.jit
def least(x):
    """The smallest, NaN if one is."""
    dirty = tl.sum((x != x).to(tl.int32), 0) > 0
    return tl.where(dirty, float("nan"), tl.min(x, 0))


@triton.jit(do_not_specialize=["prompts"])
def metrics_kernel(stats, loss, prompts, normalizer, number, value, out, ROWS: tl.constexpr):
    """reference.bradley_terry.METRICS of stats [P, 8]; one program, so that prompts are added in one order.

    loss [P], if not None: its sum over the divisor, which is then normalizer or else number, if there is one.
    """
    nothing = tl.zeros([ROWS], tl.float64)
    pairs, strict, correct, margin, responses, rewards, some, total = (nothing,) * 8
    low, high = tl.full([ROWS], INF, tl.float32), tl.full([ROWS], INF, tl.float32)
    for start in range(0, prompts, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        counted = column(stats, row, prompts, 0, 0.0)
        pairs += counted
        some += (counted > 0.0).to(tl.float64)
        strict += column(stats, row, prompts, 1, 0.0)
        correct += column(stats, row, prompts, 2, 0.0)
        margin += column(stats, row, prompts, 3, 0.0)
        responses += column(stats, row, prompts, 4, 0.0)
        rewards += column(stats, row, prompts, 5, 0.0)
        low = tl.minimum(low, column(stats, row, prompts, 6, INF), propagate_nan=ALL)
        high = tl.minimum(high, -column(stats, row, prompts, 7, -INF), propagate_nan=ALL)
        if loss is not None:
            total += tl.load(loss + row, mask=row < prompts, other=0.0)
    of_strict, of_responses = tl.sum(strict, 0), tl.sum(responses, 0)
    tl.store(out, quotient(tl.sum(correct, 0), of_strict))
    tl.store(out + 1, quotient(tl.sum(margin, 0), of_strict))
    tl.store(out + 2, tl.where(of_responses > 0.0, least(low), float("nan")))
    tl.store(out + 3, quotient(tl.sum(rewards, 0), of_responses))
    tl.store(out + 4, tl.where(of_responses > 0.0, -least(high), float("nan")))
    tl.store(out + 5, tl.sum(pairs, 0).to(tl.float32))
    divisor = tl.maximum(tl.sum(some, 0), 1.0)
    if loss is not None:
        if normalizer is not None:
            divisor = tl.load(normalizer).to(tl.float64)
        else:
            divisor = tl.where(number > 0.0, number, divisor)
        tl.store(value, (tl.sum(total, 0) / divisor).to(tl.float32))
    tl.store(out + 6, divisor.to(tl.float32))


def ranking_metrics_fwd(stats):
    out = stats.new_empty(len(METRICS), dtype=torch.float32)
    _launch.run(metrics_kernel, 1, stats.contiguous(), None, stats.shape[0], None, 0.0, None, out, ROWS=ROWS)
    return out


def whole_loss(loss, stats, number, normalizer):
    """(0-d loss of all prompts, metrics), as reference.bradley_terry says of ranking_fwd."""
    value, out = (stats.new_empty(size, dtype=torch.float32) for size in ((), len(METRICS)))
    _launch.run(metrics_kernel, 1, stats, loss, stats.shape[0], normalizer, float(number), value, out, ROWS=ROWS)
    return value, out
