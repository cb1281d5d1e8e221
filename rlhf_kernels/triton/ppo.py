"""The PPO loss, its gradients and its metrics, in one pass over the tokens.

Tokens lie flat and are cut into pieces of PIECE, which a program holds in registers: it writes their gradients and what
they add up to, in fp32, with deviations taken around the piece's own mean. One last program adds the pieces up in fp64,
in a fixed order. Where a token's weight depends on how many tokens or sequences are kept, a first kernel counts them:
tokens in pieces of COUNTED or, if sequences matter, by rows.
"""

import torch
import triton
import triton.language as tl

from ..reference.ppo import AGG_MODES, STATS
from . import _launch
from ._launch import pieces, power_of_two
from ._math import LOG2_E
from .advantages import moments_merge

PIECE = 2048  # tokens of a program
COUNTED = 8192  # tokens that a program counts where rows do not matter
TILE = 4096  # of a mask, that it counts at a time
ADDED = 1024  # counts that a program adds at a time
FIELDS = 17  # numbers that are kept of a piece
MERGED = 512  # pieces that the last program adds at a time

# What is kept of a piece, fp64: sums over its kept tokens, their count, the largest ratio, and for ratio, V - R and R
# the mean and the squared deviations from it.
POLICY_LOSS, KL, CLIPPED, BOUNDED, VALUE_LOSS, HELD, VALUE, ENTROPY_LOSS, ENTROPY = (tl.constexpr(i) for i in range(9))
COUNT, RATIO_MAX, RATIO, RATIO_M2, ERROR, ERROR_M2, TARGET, TARGET_M2 = (tl.constexpr(i) for i in range(9, 17))

INF = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.40282347e38)
LOG2_E_REST = tl.constexpr(1.925963033500e-8)  # log2 e less its fp32
TOKEN_MEAN, TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM_NORM = (
    tl.constexpr(AGG_MODES.index(mode))
    for mode in ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
)


@triton.jit
def exp_ratio(x):
    """exp(x) with what x log2 e loses in fp32 put back, so that the relative error does not grow with x."""
    y = x * LOG2_E
    lost = tl.fma(x, LOG2_E + tl.zeros_like(x), -y) + x * LOG2_E_REST
    return tl.exp2(y) * (1.0 + 0.6931471805599453 * tl.where(tl.abs(y) < 200.0, lost, 0.0))


@triton.jit
def count_kernel(
    mask, rows, length, tokens, out_lengths, out_counts, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Kept tokens of ROWS rows, and how many of the rows have any; out_counts [programs, 2] fp64."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * length + columns[None, :]
    counts = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, length, COLUMNS):
        first = program * ROWS * length + start
        inside = (columns < length - start)[None, :] & (place < tl.minimum(tokens - first, 1 << 30).to(tl.int32))
        counts += (tl.load(mask + first + place, mask=inside, other=0) != 0).to(tl.int32)
    kept = tl.sum(counts, 1)
    if out_lengths is not None:
        tl.store(out_lengths + row, kept, mask=row < rows)
    tl.store(out_counts + program * 2, tl.sum(kept.to(tl.int64), 0).to(tl.float64))
    tl.store(out_counts + program * 2 + 1, tl.sum((kept > 0).to(tl.int64), 0).to(tl.float64))


@triton.jit
def weight_of(counts, programs, normalizer, length, MODE: tl.constexpr, ADDED: tl.constexpr):
    """Weight of a token, fp64, before its row's own length divides it."""
    weight = tl.full([], 1.0, tl.float64)
    if MODE != TOKEN_SUM:
        if normalizer is not None:
            total = tl.load(normalizer).to(tl.float64)
        else:
            which = 0 if MODE == TOKEN_MEAN else 1
            some = tl.zeros([ADDED], tl.float64)
            for start in range(0, programs, ADDED):
                at = start + tl.arange(0, ADDED)
                some += tl.load(counts + at * 2 + which, mask=at < programs, other=0.0)
            total = tl.sum(some, 0)
            total = tl.where(total == 0.0, 1.0, total)
        weight = weight / total
        if MODE == SEQ_MEAN_TOKEN_SUM_NORM:
            weight = weight / length
    return weight


@triton.jit
def kept_of(x, t, keep):
    return tl.load(x + t, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def one_of(x, t):
    """The number at t, or 0 where it is not finite."""
    value = tl.load(x + t).to(tl.float32)
    return tl.where(tl.abs(value) <= LARGEST, value, 0.0)


@triton.jit
def put(totals, pieces, field: tl.constexpr, number):
    tl.store(totals + field * pieces, number.to(tl.float64))


@triton.jit
def put_moments(totals, pieces, x, pilot, keep, count, field: tl.constexpr):
    """Mean and squared deviations. The pilot is one of the x: of equal numbers nothing is left."""
    safe = tl.where(count == 0.0, 1.0, count)
    mean = pilot + tl.sum(tl.where(keep, x - pilot, 0.0), 0) / safe
    gap = tl.where(keep, x - mean, 0.0)
    rest = tl.sum(gap, 0).to(tl.float64)
    m2 = tl.sum(gap * gap, 0).to(tl.float64) - rest * (rest / safe.to(tl.float64))
    rest = tl.where(tl.abs(mean) <= LARGEST, rest / safe.to(tl.float64), 0.0)
    put(totals, pieces, field, tl.where(count == 0.0, 0.0, mean.to(tl.float64) + rest))
    put(totals, pieces, field + 1, tl.where(m2 < 0.0, 0.0, m2))


@triton.jit
def policy_term(log_ratio, advantage, low, high, dual):
    """Ratio, loss, d loss / d log_prob, where the clip stops it, where dual_clip does; as in csrc/include/ppo.h."""
    gain, harm = advantage > 0.0, advantage < 0.0
    lower = tl.where(harm, low, 0.0)
    upper = tl.where(gain, high, tl.where(harm, dual, LARGEST))
    ratio = exp_ratio(log_ratio)
    below, above = ratio < lower, ratio > upper
    used = tl.where(below, lower, tl.where(above, upper, ratio))
    slope = tl.where(below | above, 0.0, -advantage * ratio)
    return ratio, -advantage * used, slope, below | (above & gain), above & harm


@triton.jit
def value_term(value, old, target, reach):
    """V - R, twice the loss, d loss / dV, where the clipped value is further off; as in csrc/include/ppo.h."""
    error = value - target
    moved = value - old
    down = moved < -reach
    near = tl.where(down, old - reach, old + reach) - target
    plain, clipped = error * error, near * near
    held = (down | (moved > reach)) & (clipped > plain)
    return error, tl.where(held, clipped, plain), tl.where(held, 0.0, error), held


@triton.jit
def loss_kernel(
    log_probs, old_log_probs, advantages, mask, values, old_values, returns, entropy, normalizer, counts, programs,
    lengths, tokens, length, low, high, dual, reach, value_scale, entropy_scale, grad_log_probs, grad_values,
    grad_entropy, pieces, totals, MODE: tl.constexpr, PIECE: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """The gradients of a piece, and the numbers that are kept of it; totals [FIELDS, pieces] fp64."""
    program = tl.program_id(0).to(tl.int64)
    totals += program
    lanes = tl.arange(0, PIECE)
    t = program * PIECE + lanes
    inside = t < tokens
    keep = tl.load(mask + t, mask=inside, other=0) != 0
    count = tl.sum(keep.to(tl.float32), 0)
    nearest = tl.min(tl.where(keep, lanes, PIECE), 0)
    one = program * PIECE + tl.where(nearest < PIECE, nearest, 0)  # a kept token, if there is one
    put(totals, pieces, COUNT, count)
    weight = weight_of(counts, programs, normalizer, length, MODE, ADDED).to(tl.float32)
    share = tl.where(keep, 1.0, 0.0)  # of a token in its row's weight
    if MODE == SEQ_MEAN_TOKEN_MEAN:
        first = program * PIECE
        row = first // length + ((first % length).to(tl.int32) + lanes) // length
        share = tl.where(keep, 1.0 / tl.load(lengths + row, mask=keep, other=1).to(tl.float32), 0.0)
    weights = weight * share

    old = kept_of(old_log_probs, t, keep)
    log_ratio = tl.where(keep, kept_of(log_probs, t, keep) - old, 0.0)
    ratio, loss, slope, clipped, bounded = policy_term(log_ratio, kept_of(advantages, t, keep), low, high, dual)
    tl.store(grad_log_probs + t, tl.where(keep, weights * slope, 0.0), mask=inside)
    put(totals, pieces, POLICY_LOSS, tl.sum(tl.where(keep, share * loss, 0.0), 0))
    put(totals, pieces, KL, tl.sum(log_ratio * log_ratio, 0))
    put(totals, pieces, CLIPPED, tl.sum((clipped & keep).to(tl.float32), 0))
    put(totals, pieces, BOUNDED, tl.sum((bounded & keep).to(tl.float32), 0))
    put(totals, pieces, RATIO_MAX, tl.max(tl.where(keep, ratio, 0.0), 0))
    pilot = exp_ratio(one_of(log_probs, one) - one_of(old_log_probs, one))
    pilot = tl.where(pilot <= LARGEST, pilot, 0.0)
    put_moments(totals, pieces, ratio, pilot, keep, count, RATIO)

    if values is not None:
        value, target = kept_of(values, t, keep), kept_of(returns, t, keep)
        before = value if old_values is None else kept_of(old_values, t, keep)
        error, square, slope, held = value_term(value, before, target, reach)
        tl.store(grad_values + t, tl.where(keep, value_scale * weights * slope, 0.0), mask=inside)
        put(totals, pieces, VALUE_LOSS, tl.sum(tl.where(keep, share * square, 0.0), 0))
        put(totals, pieces, HELD, tl.sum((held & keep).to(tl.float32), 0))
        put(totals, pieces, VALUE, tl.sum(value, 0))
        pilot = one_of(returns, one)
        put_moments(totals, pieces, error, one_of(values, one) - pilot, keep, count, ERROR)
        put_moments(totals, pieces, target, pilot, keep, count, TARGET)

    if entropy is not None:
        x = kept_of(entropy, t, keep)
        tl.store(grad_entropy + t, entropy_scale * weights, mask=inside)
        put(totals, pieces, ENTROPY_LOSS, tl.sum(tl.where(keep, share * x, 0.0), 0))
        put(totals, pieces, ENTROPY, tl.sum(x, 0))


@triton.jit
def add_moments(totals, piece, pieces, kept, count, mean, m2, field: tl.constexpr):
    """Mean and squared deviations with those of more pieces, lane by lane."""
    more_mean = tl.load(totals + field * pieces + piece, mask=piece < pieces, other=0.0)
    more_m2 = tl.load(totals + (field + 1) * pieces + piece, mask=piece < pieces, other=0.0)
    merged = moments_merge(count, mean, m2, kept, more_mean, more_m2)
    return merged[1], merged[2], kept * more_mean


@triton.jit
def all_m2(count, mean, m2):
    """Squared deviations of all lanes together."""
    total = tl.sum(count, 0)
    gap = mean - tl.sum(count * mean, 0) / tl.where(total == 0.0, 1.0, total)
    return tl.sum(m2 + count * gap * gap, 0)


@triton.jit
def add_field(sums, totals, piece, pieces, field: tl.constexpr):
    return sums + tl.load(totals + field * pieces + piece, mask=piece < pieces, other=0.0)


@triton.jit
def store_f32(out, number):
    tl.store(out, number.to(tl.float32))


@triton.jit
def mean_of(total, tokens):
    """NaN where there is nothing to average."""
    return tl.where(tokens == 0.0, float("nan"), total / tl.where(tokens == 0.0, 1.0, tokens))


@triton.jit
def finish_kernel(
    totals, pieces, normalizer, counts, programs, length, out_losses, out_stats, MODE: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_ENTROPY: tl.constexpr, MERGED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Losses and statistics from the numbers of all pieces; one program, so that they are added in one order."""
    nothing = tl.zeros([MERGED], tl.float64)
    count, peaks = nothing, nothing
    policy_loss, kl, clipped, bounded, ratios, ratio_mean, ratio_m2 = (nothing,) * 7
    value_loss, held, value, targets, error_mean, error_m2, target_mean, target_m2 = (nothing,) * 8
    entropy_loss, entropy = nothing, nothing
    for start in range(0, pieces, MERGED):
        piece = start + tl.arange(0, MERGED).to(tl.int64)
        kept = add_field(nothing, totals, piece, pieces, COUNT)
        policy_loss = add_field(policy_loss, totals, piece, pieces, POLICY_LOSS)
        kl = add_field(kl, totals, piece, pieces, KL)
        clipped = add_field(clipped, totals, piece, pieces, CLIPPED)
        bounded = add_field(bounded, totals, piece, pieces, BOUNDED)
        peak = add_field(nothing, totals, piece, pieces, RATIO_MAX)
        peaks = tl.where(peak > peaks, peak, peaks)
        ratio_mean, ratio_m2, more = add_moments(totals, piece, pieces, kept, count, ratio_mean, ratio_m2, RATIO)
        ratios += more
        if HAS_VALUES:
            value_loss = add_field(value_loss, totals, piece, pieces, VALUE_LOSS)
            held = add_field(held, totals, piece, pieces, HELD)
            value = add_field(value, totals, piece, pieces, VALUE)
            error_mean, error_m2, more = add_moments(totals, piece, pieces, kept, count, error_mean, error_m2, ERROR)
            target_mean, target_m2, more = add_moments(
                totals, piece, pieces, kept, count, target_mean, target_m2, TARGET
            )
            targets += more
        if HAS_ENTROPY:
            entropy_loss = add_field(entropy_loss, totals, piece, pieces, ENTROPY_LOSS)
            entropy = add_field(entropy, totals, piece, pieces, ENTROPY)
        count += kept
    tokens = tl.sum(count, 0)
    ratio = mean_of(tl.sum(ratios, 0), tokens)
    weight = weight_of(counts, programs, normalizer, length, MODE, ADDED)
    store_f32(out_losses, weight * tl.sum(policy_loss, 0))
    store_f32(out_stats, tokens)
    store_f32(out_stats + 1, 0.5 * mean_of(tl.sum(kl, 0), tokens))
    store_f32(out_stats + 2, mean_of(tl.sum(clipped, 0), tokens))
    store_f32(out_stats + 3, mean_of(tl.sum(bounded, 0), tokens))
    store_f32(out_stats + 4, ratio)
    store_f32(out_stats + 5, mean_of(all_m2(count, ratio_mean, ratio_m2), tokens))
    store_f32(out_stats + 6, tl.where(ratio == ratio, tl.max(peaks, 0), ratio))  # a maximum may drop a NaN
    if HAS_ENTROPY:
        store_f32(out_losses + 2, weight * tl.sum(entropy_loss, 0))
        store_f32(out_stats + 7, mean_of(tl.sum(entropy, 0), tokens))
    else:
        tl.store(out_losses + 2, 0.0)
        tl.store(out_stats + 7, 0.0)
    if HAS_VALUES:
        wrong, spread = all_m2(count, error_mean, error_m2), all_m2(count, target_mean, target_m2)
        unspread = tl.where(wrong > 0.0, INF, float("nan"))
        unexplained = tl.where(spread == 0.0, unspread, wrong / tl.where(spread == 0.0, 1.0, spread))
        store_f32(out_losses + 1, 0.5 * weight * tl.sum(value_loss, 0))
        store_f32(out_stats + 8, mean_of(tl.sum(held, 0), tokens))
        store_f32(out_stats + 9, 1.0 - unexplained)
        store_f32(out_stats + 10, mean_of(tl.sum(value, 0), tokens))
        store_f32(out_stats + 11, mean_of(tl.sum(targets, 0), tokens))
    else:
        tl.store(out_losses + 1, 0.0)
        for i in tl.static_range(8, 12):
            tl.store(out_stats + i, 0.0)


@triton.jit
def upstream(x):
    """A gradient of a loss that may be absent, in fp64."""
    total = tl.zeros([], tl.float64)
    if x is not None:
        total += tl.load(x).to(tl.float64)
    return total


@triton.jit
def scaled_copy(x, scale, out, t, count):
    if out is not None:
        inside = t < count
        tl.store(out + t, scale.to(tl.float32) * tl.load(x + t, mask=inside, other=0.0), mask=inside)


@triton.jit
def product_kernel(
    grad_loss, grad_policy_loss, grad_value_loss, value_factor, total_factor, grad_log_probs, grad_values,
    grad_entropy, count, out_log_probs, out_values, out_entropy, PIECE: tl.constexpr,
):  # fmt: skip
    """The saved gradients times what came from above; that of the values is total_factor total + value_factor value."""
    t = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    total, value = upstream(grad_loss), upstream(grad_value_loss)
    scaled_copy(grad_log_probs, total + upstream(grad_policy_loss), out_log_probs, t, count)
    scaled_copy(grad_values, total_factor * total + value_factor * value, out_values, t, count)
    scaled_copy(grad_entropy, total, out_entropy, t, count)


def _bytes(mask):
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _counts(mask, mode, normalizer):
    """Kept tokens of each row, the counts of pieces, and how many pieces; None, None, 0 where nobody asks."""
    own_length = mode == SEQ_MEAN_TOKEN_MEAN.value
    if mode == TOKEN_SUM.value or (normalizer is not None and not own_length):
        return None, None, 0
    tokens = mask.numel()
    rows, length = (pieces(tokens, COUNTED), COUNTED) if mode == TOKEN_MEAN.value else mask.shape
    columns = min(max(power_of_two(length), 16), TILE)
    programs = pieces(rows, TILE // columns)
    lengths = mask.new_empty(rows, dtype=torch.int32) if own_length else None
    counts = mask.new_empty((programs, 2), dtype=torch.float64)
    _launch.run(
        count_kernel, programs, mask, rows, length, tokens, lengths, counts, ROWS=TILE // columns, COLUMNS=columns,
        num_warps=8,
    )  # fmt: skip
    return lengths, counts, programs


def ppo_fwd(
    log_probs, old_log_probs, advantages, mask, values, old_values, returns, entropy, normalizer,
    cliprange, cliprange_high, dual_clip, cliprange_value, loss_agg_mode, value_scale=1.0, entropy_scale=1.0,
):  # fmt: skip
    mode, mask = AGG_MODES.index(loss_agg_mode), _bytes(mask)
    tensors = (log_probs, old_log_probs, advantages, values, old_values, returns, entropy)
    *policy, values, old_values, returns, entropy = (None if x is None else x.contiguous() for x in tensors)
    shape, tokens = mask.shape, mask.numel()
    lengths, counts, programs = _counts(mask, mode, normalizer)
    count = pieces(tokens, PIECE)

    def new(*shape, dtype=torch.float32):
        return mask.new_empty(shape, dtype=dtype)

    grads = [new(0) if x is None else new(*shape) for x in (log_probs, values, entropy)]
    losses, stats, totals = new(3), new(len(STATS)), new(FIELDS, count, dtype=torch.float64)
    _launch.run(
        loss_kernel, count, *policy, mask, values, old_values, returns, entropy, normalizer, counts, programs, lengths,
        tokens, shape[1], 1.0 - cliprange, 1.0 + cliprange_high, float("inf") if dual_clip is None else dual_clip,
        float("inf") if cliprange_value is None else cliprange_value, float(value_scale), float(entropy_scale), *grads,
        count, totals, MODE=mode, PIECE=PIECE, ADDED=ADDED, num_warps=8,
    )  # fmt: skip
    _launch.run(
        finish_kernel, 1, totals, count, normalizer, counts, programs, max(shape[1], 1), losses, stats,
        MODE=mode, HAS_VALUES=values is not None, HAS_ENTROPY=entropy is not None, MERGED=MERGED, ADDED=ADDED,
        num_warps=8,
    )  # fmt: skip
    return losses, *grads, stats


def ppo_bwd(grad_loss, grad_policy_loss, grad_value_loss, grad_log_probs, grad_values, grad_entropy, vf_coef):
    grads = [x.contiguous() for x in (grad_log_probs, grad_values, grad_entropy)]
    products = [torch.empty_like(x) for x in grads]
    count = max(x.numel() for x in grads)
    factors = (1.0 / vf_coef, 1.0) if vf_coef else (1.0, 0.0)
    _launch.run(
        product_kernel, pieces(count, PIECE), grad_loss, grad_policy_loss, grad_value_loss, *factors, *grads, count,
        *(x if x.numel() else None for x in products), PIECE=PIECE, num_warps=8,
    )  # fmt: skip
    return tuple(products)
