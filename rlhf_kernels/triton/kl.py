"""KL divergence between two sets of logits, and the estimators of sampled tokens.

Both directions are one: side a is averaged over, side b is the other. A row is cut into parts of PART columns, whose
statistics are taken by one program each, in one read of both sides: two maxima per block of columns, two exp2 per
column, and sums that stay in registers until the part ends. Only a block that raises a maximum pays for rescaling them.
A second, small kernel merges a row's parts in fp64. How a row is cut depends on V alone, so its bits do not depend on
its neighbours. Backwards, each program turns one block of a row into its gradients: one read of both sides, one write
for each gradient that is needed.
"""

import torch
import triton
import triton.language as tl

from .._native import KL_ESTIMATORS
from .._planes import places, planes
from . import _launch
from ._launch import pieces, power_of_two, rows_of, warps
from ._math import (
    INF,
    LOG2_E,
    NEG_INF,
    exp_f32,
    expm1_f32,
    first_lane,
    log1p_f32,
    raised,
    row_at,
    whole_rest,
    with_former,
)

PART = 32768  # columns whose statistics one program takes
BLOCK = 2048  # columns of both sides that it holds in registers at a time
GRADIENT_BLOCK = 2048  # columns of a program of the backward
MERGED = 256  # parts, of one or more rows, that a program of the merge holds
TOKENS = 1024  # entries of a program of the estimators

FLOOR = tl.constexpr(-1e36)  # of a difference of logits in a sum: finite sums stay finite, and inf means "impossible"
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fall(before, after):
    """before - after of running maxima, as finite; 0 if nothing came before."""
    return tl.where(before == NEG_INF, 0.0, tl.maximum(before - after, FLOOR))


@triton.jit
def statistics_kernel(
    a, T, batch_a, stride_a, b, batch_b, stride_b, vocab, parts, scale, out_max_a, out_rest_a, out_max_b, out_rest_b,
    out_gap, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of a row: max x and sum e less 1, e = exp(scale (x - max x)), of both sides, and sum e_a (d_a - d_b).

    d = x - max x. The last sum is inf where a has probability and b has none. out_* [N, parts].
    """
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts
    first = part * PART
    end = tl.minimum(first + PART, vocab)
    max_a = tl.full([], NEG_INF, tl.float32)
    max_b = tl.full([], NEG_INF, tl.float32)
    rest_a = tl.zeros([BLOCK], tl.float32)
    rest_b = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    lanes = tl.arange(0, BLOCK)
    a += row_at(row, T, batch_a, stride_a)
    b += row_at(row, T, batch_b, stride_b)
    for start in range(first, end, BLOCK):
        columns = start + lanes
        x_a = tl.load(a + columns, mask=columns < end, other=NEG_INF).to(tl.float32)
        x_b = tl.load(b + columns, mask=columns < end, other=NEG_INF).to(tl.float32)
        block_a, block_b = tl.max(x_a, 0), tl.max(x_b, 0)
        left_out_a = tl.full([], -1, tl.int32)  # the lane of a new maximum
        left_out_b = tl.full([], -1, tl.int32)
        if (block_a > max_a) | (block_b > max_b):
            higher_a, higher_b = tl.maximum(max_a, block_a), tl.maximum(max_b, block_b)
            fall_a, fall_b = fall(max_a, higher_a), fall(max_b, higher_b)
            factor = exp_f32(fall_a * scale)
            delta = tl.where(factor == 0.0, 0.0, fall_a - fall_b)
            gap = tl.where(gap == INF, gap, factor * (gap + with_former(rest_a, max_a, lanes) * delta))
            if block_a > max_a:
                rest_a = factor * with_former(rest_a, max_a, lanes)
                left_out_a = first_lane(x_a, block_a, lanes, BLOCK)
            if block_b > max_b:
                rest_b = exp_f32(fall_b * scale) * with_former(rest_b, max_b, lanes)
                left_out_b = first_lane(x_b, block_b, lanes, BLOCK)
            max_a, max_b = higher_a, higher_b
        d_a = x_a - tl.where(max_a == NEG_INF, 0.0, max_a)
        d_b = x_b - tl.where(max_b == NEG_INF, 0.0, max_b)
        e_a = exp_f32(d_a * scale)
        rest_a += tl.where(lanes == left_out_a, 0.0, e_a)
        rest_b += tl.where(lanes == left_out_b, 0.0, exp_f32(d_b * scale))
        term = e_a * (tl.maximum(d_a, FLOOR) - tl.maximum(d_b, FLOOR))
        gap += tl.where((x_b == NEG_INF) & (x_a != NEG_INF), INF, term)
    tl.store(out_max_a + program, max_a)
    tl.store(out_rest_a + program, tl.sum(rest_a, 0))
    tl.store(out_max_b + program, max_b)
    tl.store(out_rest_b + program, tl.sum(rest_b, 0))
    tl.store(out_gap + program, tl.sum(gap, 0))


@triton.jit
def merged_side(part_max, part_rest, at, there, scale):
    """(max x, rest) of a side's rows [rows], sums and falls of the maxima of their parts [rows, parts]."""
    maxima = tl.load(part_max + at, mask=there, other=NEG_INF)
    rests = tl.load(part_rest + at, mask=there, other=0.0).to(tl.float64)
    row_max = tl.max(maxima, 1)
    joined, tops, falls = raised(maxima, rests, row_max[:, None], scale)
    sums = rests + tl.where(maxima == NEG_INF, 0.0, 1.0)
    return row_max, whole_rest(tl.sum(joined, 1), tl.sum(tops, 1)), sums, falls


@triton.jit
def store_side(out_max, out_log_sum, row, inside, row_max, rest):
    """max x and log sum exp(z - max z); -inf and 0 for nothing but -inf. Returns the latter."""
    log_sum = log1p_f32(rest)  # in fp64, as rest is
    tl.store(out_max + row, row_max, mask=inside)
    tl.store(out_log_sum + row, log_sum.to(tl.float32), mask=inside)
    return log_sum


@triton.jit
def merge_kernel(
    rows, parts, scale, part_max_a, part_rest_a, part_max_b, part_rest_b, part_gap, kl, max_a, log_sum_a, max_b,
    log_sum_b, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """KL = scale gap / sum_a - log(sum_a / sum_b) of each row, at least 0, and both sides' max x and log sum."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    scale = tl.full([], 0.0, tl.float32) + scale
    columns = tl.arange(0, PARTS)
    at = row[:, None] * parts + columns[None, :]
    there = inside[:, None] & (columns[None, :] < parts)
    highest_a, whole_a, sums_a, falls_a = merged_side(part_max_a, part_rest_a, at, there, scale)
    highest_b, whole_b, _sums_b, falls_b = merged_side(part_max_b, part_rest_b, at, there, scale)
    gap = tl.load(part_gap + at, mask=there, other=0.0)
    impossible = tl.max((gap == INF).to(tl.int32), 1) > 0
    gap = tl.where(gap == INF, 0.0, gap).to(tl.float64)
    gap = tl.sum(exp_f32(falls_a * scale) * (gap + sums_a * (falls_a.to(tl.float64) - falls_b.to(tl.float64))), 1)
    logs_a = store_side(max_a, log_sum_a, row, inside, highest_a, whole_a)
    logs_b = store_side(max_b, log_sum_b, row, inside, highest_b, whole_b)
    value = gap / (1.0 + whole_a) * scale.to(tl.float64) - (logs_a - logs_b)
    value = tl.where(value < 0.0, 0.0, value)
    value = tl.where(impossible & (whole_a == whole_a) & (whole_b == whole_b), INF, value)
    nothing = (highest_a == NEG_INF) & (whole_a == 0.0)
    value = tl.where(nothing, tl.where(whole_b == whole_b, 0.0, whole_b), value)
    tl.store(kl + row, value.to(tl.float32), mask=inside)


@triton.jit
def log_probs_of(x, row_max, log_sum, scale):
    """log p; 0 where x is -inf."""
    return tl.where(x == NEG_INF, 0.0, (x - tl.where(row_max == NEG_INF, 0.0, row_max)) * scale - log_sum)


@triton.jit
def gradient_kernel(
    a, T, batch_a, stride_a, b, batch_b, stride_b, grad, kl, max_a, log_sum_a, max_b, log_sum_b, vocab, blocks, scale,
    softcap, out_a, out_stride_a, out_b, out_stride_b, NEED_A: tl.constexpr, NEED_B: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """g a (log a - log b - KL) scale and g (b - a) scale of one block of a row; 0 where the divergence is infinite.

    CAPPED: the logits x are softcap * tanh(y / softcap), and the gradients are those of y.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    x_a = tl.load(a + row_at(row, T, batch_a, stride_a) + columns, mask=inside, other=NEG_INF).to(tl.float32)
    x_b = tl.load(b + row_at(row, T, batch_b, stride_b) + columns, mask=inside, other=NEG_INF).to(tl.float32)
    scale = tl.full([], 0.0, tl.float32) + scale
    divergence, upstream = tl.load(kl + row), tl.load(grad + row)
    highest_a, logs_a = tl.load(max_a + row), tl.load(log_sum_a + row)
    nothing = (highest_a == NEG_INF) & (logs_a == logs_a)  # a row of NaN has no maximum either
    logs_b = tl.load(log_sum_b + row)
    log_a = log_probs_of(x_a, highest_a, logs_a, scale)
    log_b = log_probs_of(x_b, tl.load(max_b + row), logs_b, scale)
    p_a = tl.where(x_a == NEG_INF, 0.0, exp_f32(log_a))
    if NEED_A:
        d = upstream * (p_a * (log_a - log_b - divergence)) * scale
        if CAPPED:
            t = x_a / softcap
            d = d * (1.0 - t * t)
        d = tl.where(divergence == INF, 0.0, tl.where(p_a == 0.0, 0.0, d))
        tl.store(out_a + row * out_stride_a + columns, d.to(out_a.dtype.element_ty), mask=inside)
    if NEED_B:
        p_b = tl.where(x_b == NEG_INF, 0.0, exp_f32(log_b))
        more = p_b - p_a
        if (logs_a < LN_2) & (logs_b < LN_2):  # each side has an entry above a half: next to 1, 1 - p keeps its digits
            likely = (log_a > -LN_2) & (log_b > -LN_2)
            more = tl.where(likely, expm1_f32(log_b) - expm1_f32(log_a), more)
        d = upstream * more * scale
        if CAPPED:
            t = x_b / softcap
            d = d * (1.0 - t * t)
        d = tl.where((divergence == INF) | nothing, 0.0, tl.where(x_b == NEG_INF, 0.0, d))
        tl.store(out_b + row * out_stride_b + columns, d.to(out_b.dtype.element_ty), mask=inside)


@triton.jit
def reduced(d):
    """(n, r, q, 2^n / 2) with -d = n ln 2 + r and exp(r) = 1 + r + r^2 q; d within [-89, 80]."""
    x = tl.where(d < -89.0, 89.0, tl.where(d > 80.0, -80.0, -d))
    n = tl.floor(x * LOG2_E + 0.5)
    r = x - n * 0.693359375
    r = r + n * 2.12194440e-4
    q = r * 1.98578161e-4 + 1.393364233e-3  # minimax on |r| <= ln(2) / 2, as in csrc/include/kl.h
    q = q * r + 8.333360769e-3
    q = q * r + 4.166646513e-2
    q = q * r + 1.666666653e-1
    q = q * r + 5.000000013e-1
    return n, r, q, ((n.to(tl.int32) + 126) << 23).to(tl.float32, bitcast=True)  # half, because 2^128 would overflow


@triton.jit
def k3(d):
    """exp(-d) - 1 + d, never negative: no term cancels against another."""
    n, r, q, half = reduced(d)
    less = half - 0.5
    rest = (less - n * 0.3466796875) + n * 1.06097220e-4
    general = 2.0 * (half * (q * r * r) + (less * r + rest))
    return tl.where(d > 64.0, d - 1.0, general)  # exp(-64) is below the last bit of 63


@triton.jit
def k3_slope(d):
    """1 - exp(-d)."""
    _n, r, q, half = reduced(d)
    return -2.0 * (half * (q * r * r + r) + (half - 0.5))


@triton.jit
def place(index, columns, stride, DENSE: tl.constexpr):
    """Offset of an entry of a matrix with this row stride; of one row if DENSE."""
    if DENSE:
        return index
    else:
        return index // columns * stride + index % columns


@triton.jit
def log_ratio(p, stride_p, q, stride_q, index, columns, inside, DENSE: tl.constexpr):
    """log p - log q; 0 where both are the same, also both -inf."""
    log_p = tl.load(p + place(index, columns, stride_p, DENSE), mask=inside, other=0.0).to(tl.float32)
    log_q = tl.load(q + place(index, columns, stride_q, DENSE), mask=inside, other=0.0).to(tl.float32)
    return tl.where(log_p == log_q, 0.0, log_p - log_q)


@triton.jit
def approx_kl_fwd_kernel(
    p, stride_p, q, stride_q, columns, count, out, ESTIMATOR: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    d = log_ratio(p, stride_p, q, stride_q, index, columns, inside, DENSE)
    if ESTIMATOR == 2:
        d = 0.5 * d * d
    elif ESTIMATOR == 3:
        d = k3(d)
    tl.store(out + index, d, mask=inside)


@triton.jit
def approx_kl_bwd_kernel(
    grad, stride, p, stride_p, q, stride_q, columns, count, out_p, out_q, NEED_P: tl.constexpr, NEED_Q: tl.constexpr,
    ESTIMATOR: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    d = log_ratio(p, stride_p, q, stride_q, index, columns, inside, DENSE)
    slope = tl.load(grad + place(index, columns, stride, DENSE), mask=inside, other=0.0)
    if ESTIMATOR == 2:
        slope = tl.where(slope == 0.0, 0.0, slope * d)
    elif ESTIMATOR == 3:
        slope = tl.where(slope == 0.0, 0.0, slope * k3_slope(d))
    if NEED_P:
        tl.store(out_p + index, slope.to(out_p.dtype.element_ty), mask=inside)
    if NEED_Q:
        tl.store(out_q + index, (-slope).to(out_q.dtype.element_ty), mask=inside)


def divergence(a, b, temperature, shape=None):
    """(KL(a || b), max and log sum of a, the same two of b) of rows [N, V] with a dense last dimension.

    Each is [N], or has the shape of N entries that is given.
    """
    a, b = planes(a, b)
    count, vocab = a.shape[0] * a.shape[1], a.shape[2]
    parts = pieces(vocab, PART)
    statistics = [a.new_empty(count * parts, dtype=torch.float32) for _ in range(5)]
    results = [a.new_empty(count if shape is None else shape, dtype=torch.float32) for _ in range(5)]
    block, scale = min(BLOCK, power_of_two(vocab)), 1.0 / temperature
    _launch.run(
        statistics_kernel, count * parts, a, *places(a), b, *places(b)[1:], vocab, parts, scale, *statistics, PART=PART,
        BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    padded = power_of_two(parts)
    held = max(MERGED // padded, 1)
    _launch.run(
        merge_kernel, pieces(count, held), count, parts, scale, *statistics, *results, ROWS=held, PARTS=padded,
        num_warps=1,
    )  # fmt: skip
    return results


def divergence_gradient(grad, a, b, results, temperature, out_a, out_b, softcap=None):
    """Fill out_a and out_b, each [N, V] or None, with the gradients of grad * KL(a || b).

    results are those of `divergence` for these rows; a and b may be some of their columns.
    """
    a, b = planes(a, b)
    count, vocab = a.shape[0] * a.shape[1], a.shape[2]
    block = min(GRADIENT_BLOCK, power_of_two(vocab))
    blocks = pieces(vocab, block)
    outputs = [(x, 0 if x is None else x.stride(0)) for x in (out_a, out_b)]
    _launch.run(
        gradient_kernel, count * blocks, a, *places(a), b, *places(b)[1:], grad.to(torch.float32).contiguous(),
        *(x.contiguous() for x in results), vocab, blocks, 1.0 / temperature, softcap or 0.0, *outputs[0], *outputs[1],
        NEED_A=out_a is not None, NEED_B=out_b is not None, CAPPED=softcap is not None, BLOCK=block,
        num_warps=warps(block),
    )  # fmt: skip


def kl_fwd(logits, ref_logits, temperature, reverse):
    sides = (logits, ref_logits) if reverse else (ref_logits, logits)
    kl, *statistics = divergence(*sides, temperature, logits.shape[:-1])
    return kl, *(statistics if reverse else statistics[2:] + statistics[:2])


def kl_bwd(
    grad, logits, ref_logits, kl, row_max, log_sum, ref_row_max, ref_log_sum, temperature, reverse, need_logits,
    need_ref,
):  # fmt: skip
    sides, needs = (logits, ref_logits), (need_logits, need_ref)
    grads = [x.new_empty(x.shape if need else 0) for x, need in zip(sides, needs)]
    outputs = [x.view(-1, x.shape[-1]) if need else None for x, need in zip(grads, needs)]
    statistics = [row_max, log_sum, ref_row_max, ref_log_sum]
    if not reverse:
        sides, outputs, statistics = sides[::-1], outputs[::-1], statistics[2:] + statistics[:2]
    if any(needs):
        divergence_gradient(grad, *sides, [kl, *statistics], temperature, *outputs)
    return tuple(grads)


def _as_rows(*tensors):
    """Tensors of one shape as [rows, columns]: in place if they are matrices, else as one row, copied if need be."""
    if tensors[0].dim() == 2 and not all(x.is_contiguous() for x in tensors):
        return [rows_of(x) for x in tensors]
    return [x.contiguous().view(1, -1) for x in tensors]


def _options(estimator, rows):
    return {"ESTIMATOR": KL_ESTIMATORS[estimator], "DENSE": rows.shape[0] == 1, "BLOCK": TOKENS, "num_warps": 4}


def approx_kl_fwd(log_probs, ref_log_probs, estimator):
    p, q = _as_rows(log_probs, ref_log_probs)
    out = torch.empty(log_probs.shape, dtype=torch.float32, device=log_probs.device)
    _launch.run(
        approx_kl_fwd_kernel, pieces(p.numel(), TOKENS), p, p.stride(0), q, q.stride(0), p.shape[1], p.numel(), out,
        **_options(estimator, p),
    )  # fmt: skip
    return out


def approx_kl_bwd(grad, log_probs, ref_log_probs, estimator, need_log_probs, need_ref):
    grad, p, q = _as_rows(grad.to(torch.float32), log_probs, ref_log_probs)
    needs = (need_log_probs, need_ref)
    grads = [
        torch.empty(x.shape if need else 0, dtype=x.dtype, device=x.device)
        for x, need in zip((log_probs, ref_log_probs), needs)
    ]
    if any(needs):
        _launch.run(
            approx_kl_bwd_kernel, pieces(p.numel(), TOKENS), grad, grad.stride(0), p, p.stride(0), q, q.stride(0),
            p.shape[1], p.numel(), *(x if need else None for x, need in zip(grads, needs)), NEED_P=needs[0],
            NEED_Q=needs[1], **_options(estimator, p),
        )  # fmt: skip
    return tuple(grads)
