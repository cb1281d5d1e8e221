"""Log-probs and entropy from logits.

A row is cut into parts of PART columns, whose statistics (max, sum of the others, weighted sum) are taken by one
program each, in one read: every 8 consecutive columns of a block have a maximum and sums of their own in registers, one
exp2 an entry and one for each 8, and only where the part ends do threads meet. A second, small kernel merges a row's
parts and reads the label's logit. How a row is cut depends on V alone, so its bits do not depend on its neighbours.
Backwards, each program turns one block of a row into its gradient: one read, one write.
"""

import torch
import triton
import triton.language as tl

from .._linear_walk import Chunk, State
from .._planes import places, planes
from . import _launch
from ._launch import pieces, power_of_two, tile_rows, unit, warps
from ._math import (
    NEG_INF,
    add_eights,
    dlogits,
    exp_f32,
    label_gradient,
    log1p_f32,
    log_prob_gradient,
    of_lanes,
    raised,
    row_at,
    scale_of,
    scaled,
    whole_rest,
    widened,
)
from ._row_extras import fold as fold_extras

PART = 32768  # columns whose statistics one program takes
BLOCK = 4096  # columns that it holds in registers at a time
GRADIENT_BLOCK = 4096  # columns of a program of the backward
ROWS = 32  # rows that a program of the merge finishes


@triton.jit(do_not_specialize=["T", "batch_stride", "stride", "vocab", "parts", "ignore_index"])
def statistics_kernel(
    logits, T, batch_stride, stride, labels, vocab, parts, temperatures, scale, softcap, ignore_index, out_max,
    out_rest, out_weighted, HAS_LABELS: tl.constexpr, WITH_ENTROPY: tl.constexpr, SCALED: tl.constexpr,
    CAPPED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """(max z, sum exp(z - max) less 1, sum exp(z - max) (z - max)) of one part of a row; out_* [N, parts]."""
    LANES: tl.constexpr = BLOCK // 8
    program = tl.program_id(0)
    row, first = program // parts, program % parts * PART
    end = tl.minimum(first + PART, vocab)
    if HAS_LABELS:  # an ignored row is not read
        end = tl.where(tl.load(labels + row) == ignore_index, first, end)
    logits += row_at(row, T, batch_stride, stride, UNIT)
    scale = scale_of(row, temperatures, scale)
    lane_max = tl.full([LANES], NEG_INF, tl.float32)
    rest = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    lanes = tl.arange(0, BLOCK)
    end = tl.multiple_of(end, UNIT)
    whole = first + (end - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        z = scaled(widened(tl.load(logits + start + lanes)), scale, softcap, SCALED, CAPPED)
        lane_max, rest, weighted = add_eights(lane_max, rest, weighted, z, WITH_ENTROPY, LANES)
    if whole < end:
        columns = whole + lanes
        x = widened(tl.load(logits + columns, mask=columns < end, other=NEG_INF))
        z = scaled(x, scale, softcap, SCALED, CAPPED)
        lane_max, rest, weighted = add_eights(lane_max, rest, weighted, z, WITH_ENTROPY, LANES)
    row_max, rest, weighted = of_lanes(lane_max, rest, weighted, WITH_ENTROPY)
    tl.store(out_max + program, row_max)
    tl.store(out_rest + program, rest)
    if WITH_ENTROPY:
        tl.store(out_weighted + program, weighted)


@triton.jit(do_not_specialize=["T", "batch_stride", "stride", "rows", "vocab", "parts", "ignore_index"])
def merge_kernel(
    logits, T, batch_stride, stride, labels, rows, vocab, parts, temperatures, scale, softcap, ignore_index, part_max,
    part_rest, part_weighted, logprob, entropy, out_max, out_log_sum, HAS_LABELS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A row's results from the statistics of its parts; 0 where the label is ignored, NaN where it is no column."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    columns = tl.arange(0, PARTS)
    at = row[:, None] * parts + columns[None, :]
    there = inside[:, None] & (columns[None, :] < parts)
    maxima = tl.load(part_max + at, mask=there, other=NEG_INF)
    rests = tl.load(part_rest + at, mask=there, other=0.0)
    row_max = tl.max(maxima, 1)
    shift = tl.where(row_max == NEG_INF, 0.0, row_max)
    joined, tops, fall = raised(maxima, rests, row_max[:, None])
    rest = whole_rest(tl.sum(joined, 1), tl.sum(tops, 1))
    dead = (row_max == NEG_INF) & (rest == 0.0)
    log_sum = log1p_f32(rest)
    kept = inside
    astray = row < 0
    if HAS_LABELS:
        label = tl.load(labels + row, mask=inside, other=0)
        kept = label != ignore_index
        astray = kept & ((label < 0) | (label >= vocab))
        safe = tl.where(kept & (astray == 0), label, 0)
        x = tl.load(logits + row_at(row, T, batch_stride, stride) + safe, mask=inside & kept, other=0.0).to(tl.float32)
        if temperatures is not None:
            scale = 1.0 / tl.load(temperatures + row, mask=inside, other=1.0)
        centred = scaled(x, scale, softcap, SCALED, CAPPED) - shift
        value = tl.where(dead, NEG_INF, centred - log_sum)
        value = tl.where(kept, value, 0.0)
        tl.store(logprob + row, tl.where(astray, float("nan"), value), mask=inside)
    if WITH_ENTROPY:
        weights = tl.load(part_weighted + at, mask=there, other=0.0)
        weighted = tl.sum(exp_f32(fall) * (weights + (1.0 + rests) * fall), 1)
        value = tl.where(dead | (kept == 0), 0.0, log_sum - weighted / (1.0 + rest))
        tl.store(entropy + row, tl.where(astray, float("nan"), value), mask=inside)
    tl.store(out_max + row, tl.where(astray, float("nan"), tl.where(kept, row_max, 0.0)), mask=inside)
    tl.store(out_log_sum + row, tl.where(astray, float("nan"), tl.where(kept, log_sum, 0.0)), mask=inside)


@triton.jit(
    do_not_specialize=[
        "T", "batch_stride", "stride", "vocab", "blocks", "ignore_index", "out_batch_stride", "out_stride",
    ]
)  # fmt: skip
def gradient_kernel(
    logits, T, batch_stride, stride, labels, grad_logprob, grad_entropy, grad_log_sum_exp, grad_each, logprob, entropy,
    row_max, log_sum, vocab, blocks, temperatures, scale, softcap, ignore_index, out, out_batch_stride, out_stride,
    HAS_LABELS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of a row; 0 if its label is ignored, NaN if it is no column."""
    program = tl.program_id(0)
    row, first = program // blocks, program % blocks * BLOCK
    lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.multiple_of(vocab - first, UNIT)
    place = out + row_at(row, T, out_batch_stride, out_stride, UNIT) + first + lanes
    label = tl.full([], -1, tl.int64)
    kept = row >= 0
    if HAS_LABELS:
        label = tl.load(labels + row)
        kept = label != ignore_index
    if kept:
        source = logits + row_at(row, T, batch_stride, stride, UNIT) + first + lanes
        x = widened(tl.load(source, mask=inside))
        scale = scale_of(row, temperatures, scale)
        grad, through_entropy, other, each, own_entropy = 0.0, None, None, None, None
        if grad_logprob is not None:
            grad += tl.load(grad_logprob + row)
        if grad_entropy is not None:
            through_entropy, own_entropy = tl.load(grad_entropy + row), tl.load(entropy + row)
        if grad_log_sum_exp is not None:
            other = tl.load(grad_log_sum_exp + row)
        if grad_each is not None:
            each = tl.load(grad_each + row)
        base = grad if other is None else grad - other
        if HAS_LABELS:
            base = tl.where((label < 0) | (label >= vocab), float("nan"), base)
        z = scaled(x, scale, softcap, SCALED, CAPPED)
        dz = log_prob_gradient(z, tl.load(row_max + row), tl.load(log_sum + row), own_entropy, base, through_entropy)
        if HAS_LABELS and grad_logprob is not None:
            at = label - first
            if (at >= 0) & (at < BLOCK):
                at_label = label_gradient(tl.load(logprob + row), own_entropy, grad, through_entropy, other)
                dz = tl.where(lanes == at.to(tl.int32), at_label, dz)
        dx = dlogits(dz, x, each, scale, softcap, SCALED, CAPPED)
        tl.store(place, dx.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(place, tl.zeros([BLOCK], out.dtype.element_ty), mask=inside)


def _dense(tensor, dtype):
    return None if tensor is None else tensor.to(dtype).contiguous()


def _options(temperatures, temperature, softcap):
    return {"SCALED": temperatures is not None or temperature != 1.0, "CAPPED": softcap is not None}


def logprobs_fwd(logits, labels, temperatures, temperature, softcap, ignore_index, with_entropy):
    (rows,), (*shape, vocab) = planes(logits), logits.shape
    count = rows.shape[0] * rows.shape[1]
    labels = _dense(labels, torch.int64)
    parts = pieces(vocab, PART)
    new = rows.new_empty
    statistics = [new(count * parts, dtype=torch.float32) for _ in range(3 if with_entropy else 2)]
    statistics += [None] * (3 - len(statistics))
    wanted = (labels is not None, with_entropy, True, True)
    results = [new(shape if want else 0, dtype=torch.float32) for want in wanted]
    block = min(BLOCK, max(power_of_two(vocab), 8))
    scalars = (_dense(temperatures, torch.float32), 1.0 / temperature, softcap or 0.0, ignore_index)
    options = {"HAS_LABELS": labels is not None, "WITH_ENTROPY": with_entropy}
    options |= _options(temperatures, temperature, softcap)
    _launch.run(
        statistics_kernel, count * parts, rows, *places(rows), labels, vocab, parts, *scalars, *statistics, PART=PART,
        BLOCK=block, UNIT=unit(vocab, *places(rows)[1:]), num_warps=warps(block), **options,
    )  # fmt: skip
    held = tile_rows(ROWS, parts)
    _launch.run(
        merge_kernel, pieces(count, held), rows, *places(rows), labels, count, vocab, parts, *scalars, *statistics,
        *results, ROWS=held, PARTS=power_of_two(parts), num_warps=1, **options,
    )  # fmt: skip
    return tuple(results)


def token_statistics_fwd(logits, labels, temperatures, temperature, softcap, ignore_index):
    (rows,), shape = planes(logits), logits.shape[:-1]
    labels = labels.reshape(-1).contiguous()
    kept = labels != ignore_index
    state = State.start(shape.numel(), True, rows.device, with_extras=True)
    heat = _dense(temperatures, torch.float32)
    fold_extras(rows, places(rows), Chunk(rows, 0, None, heat, temperature, softcap, labels, kept), state)
    found, *more = state.statistics(labels, kept, torch.zeros_like(kept))
    return tuple(x.view(shape).clone() for x in (*found[:4], *more))  # an operator's results are no views


def logprobs_bwd(
    grad_logprobs, grad_entropy, logits, labels, temperatures, logprobs, entropy, row_max, log_sum, temperature,
    softcap, ignore_index, inplace=False, grad_log_sum_exp=None, grad_each=None,
):  # fmt: skip
    (rows,), vocab = planes(logits), logits.shape[-1]
    over = inplace and rows.data_ptr() == logits.data_ptr()
    out = rows if over else torch.empty_like(rows, memory_format=torch.contiguous_format)
    count = rows.shape[0] * rows.shape[1]
    labels = _dense(labels, torch.int64)
    upstream = (grad_logprobs, grad_entropy, grad_log_sum_exp, grad_each)
    upstream = [_dense(g, torch.float32) for g in upstream]
    block = min(GRADIENT_BLOCK, power_of_two(vocab))
    blocks = pieces(vocab, block)
    _launch.run(
        gradient_kernel, count * blocks, rows, *places(rows), labels, *upstream, logprobs, entropy, row_max, log_sum,
        vocab, blocks, _dense(temperatures, torch.float32), 1.0 / temperature, softcap or 0.0, ignore_index, out,
        *places(out)[1:],
        HAS_LABELS=labels is not None, BLOCK=block, UNIT=unit(vocab, *places(rows)[1:], *places(out)[1:]),
        num_warps=warps(block), **_options(temperatures, temperature, softcap),
    )  # fmt: skip
    if inplace and not over:
        logits.copy_(out.view(logits.shape))
    return out.view(logits.shape)
