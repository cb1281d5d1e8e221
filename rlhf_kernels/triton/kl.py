"""KL divergence between two sets of logits, and the estimators of sampled tokens.

Both directions are one: side a is averaged over, side b is the other. A row is cut into parts of PART columns, whose
statistics are taken by one program each, in one read of both sides: every 8 consecutive columns of a block have maxima
and sums of their own in registers, two exp2 a column, and only where the part ends do threads meet. A second, small
kernel merges a row's parts in fp64. How a row is cut depends on V alone, so its bits do not depend on its neighbours.
Backwards, each program turns one block of a row into its gradients: one read of both sides, one write for each gradient
that is needed.
"""

import torch
import triton
import triton.language as tl

from .._native import KL_ESTIMATORS
from .._planes import places, planes
from . import _launch
from ._launch import pieces, power_of_two, rows_of, tile_rows, unit, warps
from ._math import (
    ALL,
    FLOOR,
    INF,
    LOG2_E,
    LOWEST,
    NEG_INF,
    eight,
    exp_f32,
    expm1_f32,
    log1p_f32,
    raised,
    row_at,
    whole_rest,
    widened,
)

PART = 32768  # columns whose statistics one program takes
BLOCK = 4096  # columns of both sides that it holds in registers at a time
GRADIENT_BLOCK = 4096  # columns of a program of the backward
ROWS = 256  # rows that a program of the merge finishes at most
TOKENS = 1024  # entries of a program of the estimators

FAR = tl.constexpr(1e36)  # bound of a difference of logits in a sum: finite sums stay finite, inf means "impossible"
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def two(one, other):
    """The larger one and the smaller one, which a NaN is."""
    return tl.maximum(one, other), tl.minimum(one, other, propagate_nan=ALL)


@triton.jit
def without_best(e):
    """The largest of eight, and the sum of the other seven."""
    best_0, rest_0 = two(e[0], e[1])
    best_1, rest_1 = two(e[2], e[3])
    best_2, rest_2 = two(e[4], e[5])
    best_3, rest_3 = two(e[6], e[7])
    best_0, rest_4 = two(best_0, best_1)
    best_2, rest_5 = two(best_2, best_3)
    best, rest_6 = two(best_0, best_2)
    return best, ((rest_0 + rest_1) + (rest_2 + rest_3)) + ((rest_4 + rest_5) + rest_6)


@triton.jit
def distances(x, shift):
    return (
        x[0] - shift, x[1] - shift, x[2] - shift, x[3] - shift,
        x[4] - shift, x[5] - shift, x[6] - shift, x[7] - shift,
    )  # fmt: skip


@triton.jit
def exps(d, scale_2):
    return (
        tl.exp2(d[0] * scale_2), tl.exp2(d[1] * scale_2), tl.exp2(d[2] * scale_2), tl.exp2(d[3] * scale_2),
        tl.exp2(d[4] * scale_2), tl.exp2(d[5] * scale_2), tl.exp2(d[6] * scale_2), tl.exp2(d[7] * scale_2),
    )  # fmt: skip


@triton.jit
def add_side(lane_max, rest, x, scale_2):
    """A side's running maximum and sum of each lane with 8 entries more, their distances to the maximum and exps.

    Also the fall of the former maximum and its exp. `rest` leaves out one entry at the maximum.
    """
    highest = lane_max
    for i in tl.static_range(8):
        highest = tl.maximum(highest, x[i])
    shift = tl.maximum(highest, LOWEST)
    fall = tl.maximum(lane_max - shift, -FAR)
    factor = tl.exp2(fall * scale_2)
    d = distances(x, shift)
    e = exps(d, scale_2)
    best, others = without_best(e)
    rest = tl.fma(rest, factor, others) + tl.where(highest > lane_max, factor, best)
    return highest, rest, d, e, fall, factor


@triton.jit
def add_pairs(max_a, rest_a, max_b, rest_b, gap, widest, a, b, scale_2, LANES: tl.constexpr):
    """Each lane's statistics [LANES] with 8 consecutive columns more of both sides [8 LANES].

    `widest` is inf if a has probability in a column and b has none. Where neither has, the difference is a NaN that
    the bounds drop; a NaN of the logits goes into the sums of their side.
    """
    total = rest_a + tl.where(max_a == NEG_INF, 0.0, 1.0)
    max_a, rest_a, d_a, e_a, fall_a, factor = add_side(max_a, rest_a, eight(a, LANES), scale_2)
    max_b, rest_b, d_b, _e_b, fall_b, _factor_b = add_side(max_b, rest_b, eight(b, LANES), scale_2)
    gap = factor * tl.fma(total, fall_a - fall_b, gap)
    for i in tl.static_range(8):
        wide = d_a[i] - d_b[i]
        widest = tl.maximum(widest, wide)
        gap = tl.fma(e_a[i], tl.minimum(tl.maximum(wide, -FAR), FAR), gap)
    return max_a, rest_a, max_b, rest_b, gap, widest


@triton.jit(do_not_specialize=["T", "batch_a", "stride_a", "batch_b", "stride_b", "vocab", "parts"])
def statistics_kernel(
    a, T, batch_a, stride_a, b, batch_b, stride_b, vocab, parts, scale, out_max_a, out_rest_a, out_max_b, out_rest_b,
    out_gap, PART: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One part of a row: max x and sum e less 1, e = exp(scale (x - max x)), of both sides, and sum e_a (d_a - d_b).

    d = x - max x. The last sum is inf where a has probability and b has none. out_* [N, parts].
    """
    LANES: tl.constexpr = BLOCK // 8
    program = tl.program_id(0)
    row, first = program // parts, program % parts * PART
    end = tl.multiple_of(tl.minimum(first + PART, vocab), UNIT)
    max_a = tl.full([LANES], NEG_INF, tl.float32)
    max_b = tl.full([LANES], NEG_INF, tl.float32)
    rest_a = tl.zeros([LANES], tl.float32)
    rest_b = tl.zeros([LANES], tl.float32)
    gap = tl.zeros([LANES], tl.float32)
    widest = tl.zeros([LANES], tl.float32)
    lanes = tl.arange(0, BLOCK)
    a += row_at(row, T, batch_a, stride_a, UNIT)
    b += row_at(row, T, batch_b, stride_b, UNIT)
    scale_2 = scale * LOG2_E
    whole = first + (end - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        x_a, x_b = widened(tl.load(a + start + lanes)), widened(tl.load(b + start + lanes))
        max_a, rest_a, max_b, rest_b, gap, widest = add_pairs(
            max_a, rest_a, max_b, rest_b, gap, widest, x_a, x_b, scale_2, LANES
        )
    if whole < end:
        inside = whole + lanes < end
        x_a = widened(tl.load(a + whole + lanes, mask=inside, other=NEG_INF))
        x_b = widened(tl.load(b + whole + lanes, mask=inside, other=NEG_INF))
        max_a, rest_a, max_b, rest_b, gap, widest = add_pairs(
            max_a, rest_a, max_b, rest_b, gap, widest, x_a, x_b, scale_2, LANES
        )
    highest_a, highest_b = tl.max(max_a, 0), tl.max(max_b, 0)
    joined_a, tops_a, fall_a = raised(max_a, rest_a, highest_a, scale)
    joined_b, tops_b, fall_b = raised(max_b, rest_b, highest_b, scale)
    total = rest_a + tl.where(max_a == NEG_INF, 0.0, 1.0)
    factor = exp_f32(fall_a * scale)
    gap = tl.sum(factor * tl.fma(total, tl.where(factor == 0.0, 0.0, fall_a - fall_b), gap), 0)
    tl.store(out_max_a + program, highest_a)
    tl.store(out_rest_a + program, whole_rest(tl.sum(joined_a, 0), tl.sum(tops_a, 0)))
    tl.store(out_max_b + program, highest_b)
    tl.store(out_rest_b + program, whole_rest(tl.sum(joined_b, 0), tl.sum(tops_b, 0)))
    tl.store(out_gap + program, tl.where(tl.max(widest, 0) == INF, INF, gap))


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


@triton.jit(do_not_specialize=["rows", "parts"])
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
def log_probs_of(x, row_max, log_sum, scale, SCALED: tl.constexpr):
    """log p; FLOOR, whose exp is 0, where x is -inf."""
    d = x - tl.maximum(row_max, LOWEST)
    if SCALED:
        d = d * scale
    return tl.maximum(d - log_sum, FLOOR, propagate_nan=ALL)


@triton.jit
def uncapped(d, x, softcap, CAPPED: tl.constexpr):
    """A gradient of softcap * tanh(y / softcap) as one of y."""
    if CAPPED:
        t = tl.maximum(x / softcap, -1.0)  # of -inf, whose gradient is 0
        d = d * (1.0 - t * t)
    return d


@triton.jit(do_not_specialize=["T", "batch_a", "stride_a", "batch_b", "stride_b", "vocab", "blocks", "out_stride_a",
                               "out_stride_b"])  # fmt: skip
def gradient_kernel(
    a, T, batch_a, stride_a, b, batch_b, stride_b, grad, kl, max_a, log_sum_a, max_b, log_sum_b, vocab, blocks, scale,
    softcap, out_a, out_stride_a, out_b, out_stride_b, NEED_A: tl.constexpr, NEED_B: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """g a (log a - log b - KL) scale and g (b - a) scale of one block of a row; 0 where the divergence is infinite.

    CAPPED: the logits x are softcap * tanh(y / softcap), and the gradients are those of y.
    """
    program = tl.program_id(0)
    row, first = program // blocks, program % blocks * BLOCK
    lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.multiple_of(vocab - first, UNIT)
    a += row_at(row, T, batch_a, stride_a, UNIT) + first
    b += row_at(row, T, batch_b, stride_b, UNIT) + first
    x_a = widened(tl.load(a + lanes, mask=inside, other=NEG_INF))
    x_b = widened(tl.load(b + lanes, mask=inside, other=NEG_INF))
    divergence, upstream = tl.load(kl + row), tl.load(grad + row) * scale
    infinite = divergence == INF
    divergence, upstream = tl.where(infinite, 0.0, divergence), tl.where(infinite, 0.0, upstream)
    highest_a, logs_a, logs_b = tl.load(max_a + row), tl.load(log_sum_a + row), tl.load(log_sum_b + row)
    log_a = log_probs_of(x_a, highest_a, logs_a, scale, SCALED)
    log_b = log_probs_of(x_b, tl.load(max_b + row), logs_b, scale, SCALED)
    p_a = exp_f32(log_a)
    if NEED_A:
        d = uncapped(upstream * (p_a * (log_a - log_b - divergence)), x_a, softcap, CAPPED)
        place = out_a + tl.multiple_of(row.to(tl.int64) * out_stride_a, UNIT) + first + lanes
        tl.store(place, d.to(out_a.dtype.element_ty), mask=inside)
    if NEED_B:
        more = exp_f32(log_b) - p_a
        if (logs_a < LN_2) & (logs_b < LN_2):  # each side has an entry above a half: next to 1, 1 - p keeps its digits
            likely = (log_a > -LN_2) & (log_b > -LN_2)
            if tl.max(likely.to(tl.int32), 0) > 0:
                more = tl.where(likely, expm1_f32(log_b) - expm1_f32(log_a), more)
        nothing = (highest_a == NEG_INF) & (logs_a == logs_a)  # a row of NaN has no maximum either
        d = uncapped(tl.where(nothing, 0.0, upstream) * more, x_b, softcap, CAPPED)
        place = out_b + tl.multiple_of(row.to(tl.int64) * out_stride_b, UNIT) + first + lanes
        tl.store(place, d.to(out_b.dtype.element_ty), mask=inside)


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
    block, scale = min(BLOCK, max(power_of_two(vocab), 8)), 1.0 / temperature
    threads = warps(block) * (1 if vocab % 8 == 0 else 2)  # entries that do not come in vectors take registers
    _launch.run(
        statistics_kernel, count * parts, a, *places(a), b, *places(b)[1:], vocab, parts, scale, *statistics, PART=PART,
        BLOCK=block, UNIT=unit(vocab, *places(a)[1:], *places(b)[1:]), num_warps=threads,
    )  # fmt: skip
    padded, held = power_of_two(parts), tile_rows(ROWS, parts)
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
        NEED_A=out_a is not None, NEED_B=out_b is not None, SCALED=temperature != 1.0, CAPPED=softcap is not None,
        BLOCK=block, UNIT=unit(vocab, *places(a)[1:], *places(b)[1:], outputs[0][1], outputs[1][1]),
        num_warps=2 * warps(block),
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
