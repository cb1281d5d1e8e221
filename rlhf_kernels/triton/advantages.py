"""GAE, KL-shaped rewards and whitening.

With U_t = lam A_t + V_t the advantage is A_t = r_t + gamma U_{t+1} - V_t and U_t = V_t + lam (r_t - V_t) +
gamma lam U_{t+1}: one recursion, in which a masked token stands still. So a stretch of tokens is a pair (U of its first
token if nothing followed, factor of the U that follows), pairs are joined as in csrc/include/advantages.h, and a row is
a scan over pairs from its end. Scan and carries are in fp64, so what is rounded is the result.

A row is cut, counted from its end, into parts of PART tokens and blocks of BLOCK. Many rows: a program walks a row, all
its parts. Few rows: first each part by itself, a program each; then each part again, with the parts that follow it
joined in the order in which one program would meet them. Either way the same numbers are joined in the same order, so
the bits of a row depend on its own tokens and, through the block's size, on T. Tokens are read in descending order, one
a thread and load, so that neither strides nor alignment change the shape of the scan.

A packed row's length is known on the device alone. Row b owns the parts from cu[b] // PART + b on, the last of which
may be empty; the grid has N // PART + B, and a program finds its row by a search over cu_seqlens.
"""

import ctypes

import torch
import triton
import triton.language as tl

from .._native import KL_ESTIMATORS
from . import _launch
from ._launch import pieces, power_of_two
from .kl import k3

# Tokens of a row that a program takes where rows are few, tokens that it, a single warp, holds in registers at a time,
# and rows that keep a GPU busy with a program each. In the interpreter they are small: small tests walk every path.
PART, BLOCK, MANY_ROWS = (256, 128, 100) if _launch.INTERPRETED else (1024, 256, 1024)
MANY_TOKENS = 1 << 23  # beyond the caches a second read costs more than the wait for the longest packed row
FAN = 128  # offsets that a step of the search compares
SEARCH = 512  # tokens whose mask is looked at together
WHITE = 4096  # entries of a program of the whitening
MERGED = 1024  # moments that the merge adds at a time

WHOLE, FIRST, SECOND = (tl.constexpr(i) for i in range(3))  # visits


@triton.jit
def join(later, later_factor, value, factor):
    """A stretch and the one after it."""
    return value + factor * later, factor * later_factor


@triton.jit
def double(high, low):
    """The fp64 of which a kernel is handed two fp32."""
    return tl.zeros([], tl.float64) + high + low


@triton.jit
def moments_merge(count, mean, m2, more_count, more_mean, more_m2):
    """Count, mean and squared deviations of the union of two sets."""
    total = count + more_count
    gap = more_mean - mean
    share = more_count / tl.where(total == 0.0, 1.0, total)
    return total, mean + gap * share, m2 + more_m2 + gap * gap * count * share


@triton.jit
def block_moments(x, keep):
    """The same of one block, in fp64; deviations are taken around its own mean, so that their squares cannot cancel."""
    x = tl.where(keep, x, 0.0)
    count = tl.sum(keep.to(tl.float32), 0)
    safe = tl.where(count == 0.0, 1.0, count)
    shift = tl.sum(x, 0) / safe
    gap = tl.where(keep, x - shift, 0.0)
    total, safe = tl.sum(gap, 0).to(tl.float64), safe.to(tl.float64)
    m2 = tl.sum(gap * gap, 0).to(tl.float64) - total * (total / safe)
    return count.to(tl.float64), shift.to(tl.float64) + total / safe, tl.where(m2 > 0.0, m2, 0.0)


@triton.jit
def row_of(cu_seqlens, rows, unit, steps, PART: tl.constexpr, FAN: tl.constexpr):
    """The row that owns a part: the last whose first part is not behind it; 0 if none is. FAN ** steps >= rows."""
    low = unit * 0
    stride = low + 1
    for _ in range(1, steps):
        stride *= FAN
    for _ in range(steps):
        row = low + tl.arange(0, FAN) * stride
        first = tl.load(cu_seqlens + row, mask=row < rows, other=0).to(tl.int64) // PART + row
        low += tl.maximum(tl.sum(((row < rows) & (first <= unit)).to(tl.int64), 0) - 1, 0) * stride
        stride = stride // FAN
    return low


@triton.jit
def any_kept(mask, start, end, SEARCH: tl.constexpr):
    """1 if a token of [start, end) is kept, else 0."""
    found = tl.zeros([], tl.int32)
    if mask is None:
        found += (start < end).to(tl.int32)
    else:
        lanes = tl.arange(0, SEARCH)
        while (start < end) & (found == 0):
            inside = lanes < tl.minimum(end - start, SEARCH).to(tl.int32)
            keep = tl.load(mask + start + lanes, mask=inside, other=0) != 0
            found = tl.max(keep.to(tl.int32), 0)
            start += SEARCH
    return found


@triton.jit
def kl_estimate(log_probs, ref_log_probs, keep, ESTIMATOR: tl.constexpr):
    """kl of the kept tokens that two blocks of pointers name; 0 where both log-probs are the same, also both -inf."""
    p = tl.load(log_probs, mask=keep, other=0.0).to(tl.float32)
    q = tl.load(ref_log_probs, mask=keep, other=0.0).to(tl.float32)
    d = tl.where(p == q, 0.0, p - q)
    if ESTIMATOR == 1:
        return d
    elif ESTIMATOR == 2:
        return 0.5 * d * d
    else:
        return k3(d)


@triton.jit(
    do_not_specialize=[
        "rewards_stride", "values_stride", "mask_stride", "log_probs_stride", "ref_stride", "rows", "length", "tokens",
        "parts", "search_steps",
    ]
)  # fmt: skip
def gae_kernel(
    rewards, rewards_stride, values, values_stride, mask, mask_stride, last_values, scores, log_probs,
    log_probs_stride, ref_log_probs, ref_stride, cu_seqlens, rows, length, tokens, parts, search_steps, gamma,
    gamma_rest, lam, lam_rest, kl_coef, clip, part_value, part_factor, moments, out_advantages, out_returns,
    out_rewards, out_kl, VISIT: tl.constexpr, ESTIMATOR: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
    FAN: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """A row (WHOLE) or one part of it. FIRST leaves the part's pair, and SECOND and WHOLE the results.

    log_probs given: rewards are made here, with the score at the last kept token. moments [units, 3] of the advantages.
    """
    program = tl.program_id(0).to(tl.int64)
    begin = program * 0
    if cu_seqlens is None:
        end = begin + length
        row = program if VISIT == WHOLE else program // parts
        first_unit = row * parts
        count = begin + parts
    else:
        row = program if VISIT == WHOLE else row_of(cu_seqlens, rows, program, search_steps, PART, FAN)
        offset, following = tl.load(cu_seqlens + row).to(tl.int64), tl.load(cu_seqlens + row + 1).to(tl.int64)
        begin = tl.minimum(tl.maximum(offset, 0), tokens)
        end = tl.minimum(tl.maximum(following, begin), tokens)
        wrong = (begin != offset) | (end != following)
        first_unit = begin // PART + row
        count = end // PART + row + 1 - first_unit
    values += row * values_stride
    if mask is not None:
        mask += row * mask_stride
    gamma = double(gamma, gamma_rest)
    lam = double(lam, lam_rest)
    later = tl.zeros([], tl.float64)
    if cu_seqlens is not None:  # a row whose offsets leave the tokens or descend is NaN
        later += tl.where(wrong, float("nan"), 0.0)
    if last_values is not None:
        later += tl.load(last_values + row).to(tl.float64)
    seen = tl.zeros([], tl.int32)
    if log_probs is not None:
        log_probs += row * log_probs_stride
        ref_log_probs += row * ref_stride
        score = tl.load(scores + row).to(tl.float32)
        score = tl.where(score > clip, clip, score)
        score = tl.where(score < -clip, -clip, score)
    else:
        rewards += row * rewards_stride
    low_part = begin * 0
    if VISIT != WHOLE:
        low_part = tl.maximum(program - first_unit, 0)
        high = end - low_part * PART
        count = low_part + (high > begin).to(tl.int64)
        if log_probs is not None:
            seen = any_kept(mask, high, end, SEARCH)
        if VISIT == FIRST:  # nobody asks for the pair of the part at the row's start
            count = tl.where(high - PART > begin, count, low_part)
        elif count > low_part:
            for unit in range(first_unit, program):
                later = tl.load(part_value + unit) + tl.load(part_factor + unit) * later
    if VISIT == SECOND and moments is not None and count == low_part:
        for i in tl.static_range(3):
            tl.store(moments + program * 3 + i, tl.zeros([], tl.float64))
    if VISIT != FIRST:
        out_advantages += row * length
        out_returns += row * length
        if log_probs is not None:
            out_rewards += row * length
            out_kl += row * length
    lanes = tl.arange(0, BLOCK)
    for part in range(low_part, count):
        part_high = end - part * PART
        blocks = (tl.minimum(part_high - begin, PART) + BLOCK - 1) // BLOCK
        value_sum = tl.zeros([], tl.float64)  # the pair of the part so far
        factor_product = tl.full([], 1.0, tl.float64)
        kept = tl.zeros([], tl.float64)
        mean = tl.zeros([], tl.float64)
        m2 = tl.zeros([], tl.float64)
        for block in tl.range(0, blocks, disable_licm=VISIT != SECOND):
            top = part_high - 1 - block * BLOCK  # token of lane 0; lane i holds the token i before it
            inside = lanes < tl.minimum(top + 1 - begin, BLOCK).to(tl.int32)
            keep = inside
            if mask is not None:
                keep = keep & (tl.load(mask + top - lanes, mask=inside, other=0) != 0)
            value = tl.load(values + top - lanes, mask=keep, other=0.0).to(tl.float32)
            if log_probs is not None:
                kl = kl_estimate(log_probs + top - lanes, ref_log_probs + top - lanes, keep, ESTIMATOR)
                nearest = 0 if mask is None else tl.min(tl.where(keep, lanes, BLOCK), 0)
                reward = tl.where(keep, -kl_coef * kl, 0.0)
                reward = tl.where((lanes == nearest) & (seen == 0), reward + score, reward)
                seen = tl.where(nearest < BLOCK, 1, seen)
                if VISIT != FIRST:
                    tl.store(out_rewards + top - lanes, reward, mask=inside)
                    tl.store(out_kl + top - lanes, kl, mask=inside)
            else:
                reward = tl.load(rewards + top - lanes, mask=keep, other=0.0).to(tl.float32)
            v = value.to(tl.float64)
            term = v + lam * (reward.to(tl.float64) - v)
            term, factor = tl.where(keep, term, 0.0), tl.where(keep, gamma * lam, 1.0)
            sums, factors = tl.associative_scan((term, factor), 0, join)
            carry = value_sum + factor_product * later
            if VISIT != FIRST:
                after = tl.gather(sums + factors * carry, tl.maximum(lanes - 1, 0), 0)
                target = reward.to(tl.float64) + gamma * tl.where(lanes == 0, carry, after)
                advantage = tl.where(keep, target - v, 0.0).to(tl.float32)
                tl.store(out_advantages + top - lanes, advantage, mask=inside)
                tl.store(out_returns + top - lanes, tl.where(keep, target, 0.0).to(tl.float32), inside)
                if moments is not None:
                    more = block_moments(advantage, keep)
                    kept, mean, m2 = moments_merge(kept, mean, m2, more[0], more[1], more[2])
            last_factor = tl.sum(tl.where(lanes == BLOCK - 1, factors, 0.0), 0)
            value_sum = tl.sum(tl.where(lanes == BLOCK - 1, sums, 0.0), 0) + last_factor * value_sum
            factor_product = last_factor * factor_product
        if VISIT == FIRST:
            tl.store(part_value + first_unit + part, value_sum)
            tl.store(part_factor + first_unit + part, factor_product)
        else:
            later = value_sum + factor_product * later
            if moments is not None:
                tl.store(moments + (first_unit + part) * 3, kept)
                tl.store(moments + (first_unit + part) * 3 + 1, mean)
                tl.store(moments + (first_unit + part) * 3 + 2, m2)


@triton.jit(do_not_specialize=["blocks"])
def moments_kernel(x, stride, mask, mask_stride, length, blocks, moments, BLOCK: tl.constexpr):
    """Count, mean and squared deviations of the kept entries of one block of a row; moments [rows * blocks, 3]."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    t = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = t < length
    keep = inside
    if mask is not None:
        keep = tl.load(mask + row * mask_stride + t, mask=inside, other=0) != 0
    count, mean, m2 = block_moments(tl.load(x + row * stride + t, mask=inside, other=0.0).to(tl.float32), keep)
    tl.store(moments + program * 3, count)
    tl.store(moments + program * 3 + 1, mean)
    tl.store(moments + program * 3 + 2, m2)


@triton.jit(do_not_specialize=["units"])
def merge_kernel(moments, units, stats, BLOCK: tl.constexpr):
    """Those of all units together; one program, so that they are added in one order."""
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, units, BLOCK):
        unit = start + lanes
        some = tl.load(moments + unit * 3, mask=unit < units, other=0.0)
        count += some
        total += some * tl.load(moments + unit * 3 + 1, mask=unit < units, other=0.0)
    all_kept = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.where(all_kept == 0.0, 1.0, all_kept)
    m2 = tl.zeros([BLOCK], tl.float64)
    for start in range(0, units, BLOCK):
        unit = start + lanes
        some = tl.load(moments + unit * 3, mask=unit < units, other=0.0)
        gap = tl.where(unit < units, tl.load(moments + unit * 3 + 1, mask=unit < units, other=0.0) - mean, 0.0)
        m2 += tl.load(moments + unit * 3 + 2, mask=unit < units, other=0.0) + some * gap * gap
    tl.store(stats, all_kept)
    tl.store(stats + 1, mean)
    tl.store(stats + 2, tl.sum(m2, 0))


@triton.jit(do_not_specialize=["blocks"])
def whiten_kernel(
    x, stride, mask, mask_stride, length, blocks, stats, out, CENTER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(x - mean) / sqrt(var + 1e-8), plus the mean if not CENTER; the mean in two floats, as in advantages.h."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    t = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = t < length
    keep = inside
    if mask is not None:
        keep = tl.load(mask + row * mask_stride + t, mask=inside, other=0) != 0
    count, exact, m2 = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2)
    scale = (1.0 / tl.sqrt(m2 / tl.where(count > 1.0, count - 1.0, 1.0) + 1e-8)).to(tl.float32)
    mean = exact.to(tl.float32)
    rest = (exact - mean.to(tl.float64)).to(tl.float32)
    value = tl.load(x + row * stride + t, mask=inside, other=0.0).to(tl.float32)
    white = ((value - mean) - rest) * scale
    if not CENTER:
        white += mean
    tl.store(out + row * length + t, tl.where(keep, white, 0.0), mask=inside)


def _dense(x):
    """The tensor itself if its rows are dense, else a copy; a mask as bytes."""
    if x is None:
        return None
    x = x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _rows(x):
    """A tensor [B, T] or packed [N] as the two arguments of a kernel: itself and its row stride."""
    x = _dense(x)
    return x, 0 if x is None or x.dim() == 1 else x.stride(0)


def _two_floats(x):
    high = ctypes.c_float(x).value
    return high, x - high


def _gae(rewards, values, mask, last_values, shaping, cu_seqlens, gamma, lam, out, with_moments=False):
    """Launches gae_kernel; shaping is None or (scores, log_probs, ref_log_probs, kl_coef, estimator, clip).

    Returns the moments of the advantages, a row of three for each part, or None.
    """
    if cu_seqlens is None:
        rows, length = values.shape
        block = min(BLOCK, max(power_of_two(length), 32))
        part = PART if length > BLOCK else block
        parts = pieces(length, part)
        units, longest, steps = rows * parts, length, 0
        walked = parts <= 1 or rows >= MANY_ROWS
    else:
        rows, length, block, part, parts = cu_seqlens.shape[0] - 1, 0, BLOCK, PART, 0
        units, longest, steps = values.shape[0] // PART + rows, values.shape[0], 1
        while FAN**steps < rows:
            steps += 1
        walked = longest <= PART or (rows >= MANY_ROWS and longest >= MANY_TOKENS)
    scores, log_probs, ref_log_probs, kl_coef, estimator, clip = shaping or (None, None, None, 0.0, 0, 0.0)
    new = values.new_empty
    moments = new((units, 3), dtype=torch.float64) if with_moments else None
    pairs = [None, None] if walked else [new(units, dtype=torch.float64) for _ in range(2)]
    programs = rows if walked else units
    for visit in (WHOLE,) if walked else (FIRST, SECOND):
        first = visit is FIRST
        _launch.run(
            gae_kernel, programs if values.numel() else 0, *_rows(rewards), *_rows(values), *_rows(mask), last_values,
            scores, *_rows(log_probs), *_rows(ref_log_probs), cu_seqlens, rows, length, longest, parts, steps,
            *_two_floats(gamma), *_two_floats(lam), kl_coef, clip, *pairs, None if first else moments,
            *((None,) * 4 if first else out), VISIT=visit.value, ESTIMATOR=estimator, PART=part, BLOCK=block, FAN=FAN,
            SEARCH=SEARCH, num_warps=1, registers=160 if first and estimator == 3 else None,
        )  # fmt: skip
    return moments if values.numel() else new((0, 3), dtype=torch.float64)


def _merged(moments):
    stats = moments.new_empty(3)
    _launch.run(merge_kernel, 1, moments, moments.shape[0], stats, BLOCK=MERGED, num_warps=4)
    return stats


def _as_rows(values, mask):
    """Both as the arguments of a kernel over rows and blocks of rows; as a single row where neither has gaps."""
    both = [_dense(x) for x in (values, mask)]
    if all(x is None or x.is_contiguous() for x in both):
        both = [x if x is None else x.view(1, -1) for x in both]
    rows, length = both[0].shape
    blocks = pieces(length, WHITE)
    arguments = [argument for x in both for argument in (x, 0 if x is None else x.stride(0))]
    return rows * blocks, [*arguments, length, blocks]


def gae_fwd(rewards, values, mask, gamma, lam, cu_seqlens, last_values):
    out = [values.new_empty(values.shape) for _ in range(2)]
    last_values = None if last_values is None else last_values.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    _gae(rewards, values, mask, last_values, None, cu_seqlens, gamma, lam, [*out, None, None])
    return tuple(out)


def rlhf_advantages_fwd(
    scores, log_probs, ref_log_probs, values, mask, kl_coef, gamma, lam, kl_estimator, reward_clip, whiten, cu_seqlens
):
    out = [values.new_empty(values.shape) for _ in range(4)]
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    clip = float("inf") if reward_clip is None else float(reward_clip)
    shaping = scores.contiguous(), log_probs, ref_log_probs, float(kl_coef), KL_ESTIMATORS[kl_estimator], clip
    moments = _gae(None, values, mask, None, shaping, cu_seqlens, gamma, lam, out, with_moments=whiten)
    if whiten:
        _whiten(out[0], mask, _merged(moments), True, out[0])
    return tuple(out)


def whiten_stats_fwd(values, mask):
    programs, arguments = _as_rows(values, mask)
    moments = values.new_empty((programs, 3), dtype=torch.float64)
    _launch.run(moments_kernel, programs, *arguments, moments, BLOCK=WHITE, num_warps=8)
    return _merged(moments)


def _whiten(values, mask, stats, center, out):
    programs, arguments = _as_rows(values, mask)
    _launch.run(whiten_kernel, programs, *arguments, stats, out, CENTER=center, BLOCK=WHITE, num_warps=8)
    return out


def whiten_fwd(values, mask, stats, center):
    return _whiten(values, mask, stats.contiguous(), center, values.new_empty(values.shape))
