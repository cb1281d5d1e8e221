"""The policy loss of any objective, its gradients and its metrics, in one pass over the tokens; ppo_loss too.

Tokens lie flat and are cut into pieces of PIECE, of which a program takes up to ROUNDS: it writes their gradients, and
every lane of 4 tokens adds up what it meets, in fp32, with deviations taken around one of its tokens. Only then do the
program's threads meet, and merge the deviations around their common mean. One last program adds the programs up in
fp64, in a fixed order. Where a token's weight depends on how many tokens or sequences are kept, a first kernel counts
them: tokens in pieces of COUNTED or, if sequences matter, by rows. That kernel also makes the numbers of a sequence
that some objectives need. What is absent is None, and what is compiled has no code for it.
"""

import torch
import triton
import triton.language as tl

from ..reference.policy import STATS, Settings, Tensors
from ..reference.ppo import STATS as PPO_STATS
from . import _launch
from ._launch import FREE, pieces, power_of_two
from ._policy_pieces import (
    ABOVE,
    BOUNDED,
    CLIPPED,
    COUNT,
    ENTROPY,
    ENTROPY_LOSS,
    ERROR,
    FACTOR,
    FACTOR_M2,
    FILTERED,
    HELD,
    KL,
    KL3,
    KL_LOSS,
    LOG_RATIO,
    POLICY_LOSS,
    RATIO,
    RATIO_MAX,
    REF_KL,
    SEQ_MEAN_TOKEN_MEAN,
    TARGET,
    TOKEN_MEAN,
    TOKEN_SUM,
    VALUE,
    VALUE_LOSS,
    add_field,
    add_moments,
    all_m2,
    finish_policy,
    finish_values,
    kept_of,
    lane_count,
    lane_sum,
    loaded,
    mean_of,
    policy_part,
    put,
    put_four,
    share_of,
    store_f32,
    store_mean,
    value_part,
    weight_of,
)  # fmt: skip
from ._policy_terms import GMPO, KL_COV, SEQUENCE, exp_double, gmpo_held, held_ratio, times

PIECE = 1024  # tokens that a program holds in registers at a time, 4 a thread
ROUNDS, PROGRAMS = 8, 1056  # most pieces of a program, so that there are not fewer programs: eight for each of 132 SMs
PRODUCT = 2048  # tokens of a program of the backward
COUNTED = 8192  # tokens that a program counts where rows do not matter
TILE, SEQUENCE_TILE = 4096, 2048  # of a mask, that it counts at a time; where it also reads log-probs
ADDED = 1024  # counts that a program adds at a time
FIELDS, MORE_FIELDS = 17, 8  # numbers that are kept of a piece
MERGED = 512  # pieces that the last program adds at a time
INF = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["rows", "tokens"])
def count_kernel(
    mask, log_probs, old_log_probs, advantages, rows, length, tokens, clamp, a, b, out_lengths, out_counts,
    out_sequences, TERM: tl.constexpr, SUMMED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Kept tokens of ROWS rows, and how many of the rows have any; out_counts [programs, 2] fp64.

    out_sequences [rows, 2]: for SEQUENCE the row's ratio and a factor of its slopes, for GMPO the row's loss.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * length + columns[None, :]
    counts = tl.zeros([ROWS, COLUMNS], tl.int32)
    log_ratios, gains = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, length, COLUMNS):
        first = program * ROWS * length + start
        inside = (columns < length - start)[None, :] & (place < tl.minimum(tokens - first, 1 << 30).to(tl.int32))
        keep = tl.load(mask + first + place, mask=inside, other=0) != 0
        counts += keep.to(tl.int32)
        if out_sequences is not None:
            log_prob = kept_of(log_probs + first, place, inside, keep)
            old = kept_of(old_log_probs + first, place, inside, keep)
            _raw, log_ratio, _stuck = held_ratio(log_prob, old, clamp)
            if TERM == GMPO:
                advantage = kept_of(advantages + first, place, inside, keep)
                low, high = gmpo_held(log_ratio, advantage, a, b)
                log_ratio = tl.where(low, -a, tl.where(high, b, log_ratio))
                log_ratio = tl.where(advantage == 0.0, 0.0, log_ratio)
                gains += advantage
            log_ratios += log_ratio
    kept = tl.sum(counts, 1)
    if out_lengths is not None:
        tl.store(out_lengths + row, kept, mask=row < rows)
    if out_counts is not None:
        tl.store(out_counts + program * 2, tl.sum(kept.to(tl.int64), 0).to(tl.float64))
        tl.store(out_counts + program * 2 + 1, tl.sum((kept > 0).to(tl.int64), 0).to(tl.float64))
    if out_sequences is not None:
        total, own = tl.sum(log_ratios.to(tl.float64), 1), tl.where(kept == 0, 1, kept).to(tl.float64)
        number = exp_double(total if SUMMED else total / own)
        if TERM == GMPO:
            number = -times((tl.sum(gains.to(tl.float64), 1) / own).to(tl.float32), number)
        tl.store(out_sequences + row * 2, number, mask=row < rows)
        if TERM == SEQUENCE:
            tl.store(out_sequences + row * 2 + 1, own.to(tl.float32) if SUMMED else 1.0, mask=row < rows)


@triton.jit
def take_piece(
    tally, mask, log_probs, old_log_probs, advantages, ref_log_probs, factors, coefficients, values, old_values,
    returns, entropy, weight, entropy_weight, lengths, sequences, length, a, b, c, clamp, kl_coef, kl_low, kl_high,
    kl_cap, kl_ratio_cap, reach, value_scale, entropy_scale, grad_log_probs, grad_values, grad_entropy, first, inside,
    TERM: tl.constexpr, KL_ESTIMATOR: tl.constexpr, KL_GRADIENT: tl.constexpr, MODE: tl.constexpr,
    ENTROPY_MODE: tl.constexpr, MORE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The gradients of a piece, and the lanes' tally with it.

    ENTROPY_MODE None: the entropy is weighed as the loss. inside None: all of its tokens are.
    """
    count, policy, ratios, of_values, errors, targets, of_entropy = tally
    lanes = tl.arange(0, PIECE)
    t = first + lanes
    keep = loaded(mask, t, inside) != 0
    row = t
    if lengths is not None or sequences is not None:
        row = first // length + ((first % length).to(tl.int32) + lanes) // length
    share = share_of(lengths, row, keep, MODE)
    weights = weight * share
    if log_probs is not None:
        grad, policy, ratios = policy_part(
            policy, ratios, log_probs, old_log_probs, advantages, ref_log_probs, factors, coefficients, sequences, t,
            row, inside, keep, count, weights, share, a, b, c, clamp, kl_coef, kl_low, kl_high, kl_cap, kl_ratio_cap,
            TERM, KL_ESTIMATOR, KL_GRADIENT, MORE,
        )  # fmt: skip
        tl.store(grad_log_probs + t, tl.where(keep, grad, 0.0), mask=inside)
    if values is not None:
        grad, of_values, errors, targets = value_part(
            of_values, errors, targets, values, old_values, returns, t, inside, keep, count, weights, share, reach,
            value_scale,
        )  # fmt: skip
        tl.store(grad_values + t, tl.where(keep, grad, 0.0), mask=inside)
    if entropy is not None:
        x = kept_of(entropy, t, inside, keep)
        if ENTROPY_MODE is not None:
            share = share_of(lengths, row, keep, ENTROPY_MODE)
            weights = entropy_weight * share
        tl.store(grad_entropy + t, tl.where(keep, entropy_scale * weights, 0.0), mask=inside)
        of_entropy = of_entropy[0] + lane_sum(share * x), of_entropy[1] + lane_sum(x)
    return count + lane_count(keep), policy, ratios, of_values, errors, targets, of_entropy


@triton.jit(do_not_specialize=["programs", "tokens", "length", "pieces", "rounds"])
def loss_kernel(
    mask, log_probs, old_log_probs, advantages, ref_log_probs, factors, coefficients, values, old_values, returns,
    entropy, normalizer, entropy_normalizer, counts, programs, lengths, sequences, tokens, length, a, b, c, clamp,
    kl_coef, kl_low, kl_high, kl_cap, kl_ratio_cap, reach, value_scale, entropy_scale, grad_log_probs, grad_values,
    grad_entropy, pieces, rounds, totals, TERM: tl.constexpr, KL_ESTIMATOR: tl.constexpr, KL_GRADIENT: tl.constexpr,
    MODE: tl.constexpr, ENTROPY_MODE: tl.constexpr, MORE: tl.constexpr, PIECE: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """`rounds` pieces each, the last of which may end early: only there are loads and stores under a mask.

    totals [FIELDS, pieces] fp64; here `pieces` are the programs' parts of the tokens.
    """
    program = tl.program_id(0).to(tl.int64)
    totals += program
    first = program * PIECE * rounds
    weight = weight_of(counts, programs, normalizer, length, MODE, ADDED).to(tl.float32)
    entropy_weight = weight
    if ENTROPY_MODE is not None:
        entropy_weight = weight_of(counts, programs, entropy_normalizer, length, ENTROPY_MODE, ADDED).to(tl.float32)
    nothing = tl.zeros([PIECE // 4], tl.float32)
    none = nothing, nothing, nothing
    tally = nothing, (nothing,) * 13, none, none, none, none, (nothing, nothing)
    end = tl.minimum(first + PIECE * rounds, tokens)
    whole = (end - first) // PIECE
    for _ in range(whole.to(tl.int32)):
        tally = take_piece(
            tally, mask, log_probs, old_log_probs, advantages, ref_log_probs, factors, coefficients, values, old_values,
            returns, entropy, weight, entropy_weight, lengths, sequences, length, a, b, c, clamp, kl_coef, kl_low,
            kl_high, kl_cap, kl_ratio_cap, reach, value_scale, entropy_scale, grad_log_probs, grad_values, grad_entropy,
            first, None, TERM, KL_ESTIMATOR, KL_GRADIENT, MODE, ENTROPY_MODE, MORE, PIECE,
        )  # fmt: skip
        first += PIECE
    if first < end:
        tally = take_piece(
            tally, mask, log_probs, old_log_probs, advantages, ref_log_probs, factors, coefficients, values, old_values,
            returns, entropy, weight, entropy_weight, lengths, sequences, length, a, b, c, clamp, kl_coef, kl_low,
            kl_high, kl_cap, kl_ratio_cap, reach, value_scale, entropy_scale, grad_log_probs, grad_values, grad_entropy,
            first, first + tl.arange(0, PIECE) < end, TERM, KL_ESTIMATOR, KL_GRADIENT, MODE, ENTROPY_MODE, MORE, PIECE,
        )  # fmt: skip
    count, policy, ratios, of_values, errors, targets, of_entropy = tally
    kept = tl.sum(count, 0)
    put(totals, pieces, COUNT, kept)
    if log_probs is not None:
        finish_policy(policy, ratios, count, kept, pieces, totals, MORE)
    if values is not None or entropy is not None:
        put_four(totals, pieces, VALUE_LOSS, *of_values, of_entropy[0])
    if values is not None:
        finish_values(of_values, errors, targets, count, kept, pieces, totals)
    if entropy is not None:
        put(totals, pieces, ENTROPY, tl.sum(of_entropy[1], 0))


@triton.jit(do_not_specialize=["pieces", "programs", "length"])
def finish_kernel(
    totals, pieces, normalizer, entropy_normalizer, counts, programs, length, kl_scale, value_scale, entropy_scale,
    out_losses, out_stats, out_total, out_policy, out_value,
    MODE: tl.constexpr, ENTROPY_MODE: tl.constexpr, HAS_POLICY: tl.constexpr, HAS_KL: tl.constexpr,
    HAS_FACTORS: tl.constexpr, HAS_VALUES: tl.constexpr, HAS_ENTROPY: tl.constexpr, MORE: tl.constexpr,
    MERGED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Losses and statistics from the numbers of all pieces; one program, so that they are added in one order.

    out_total, if not None, is the policy loss and the other parts times their scales.
    """
    nothing = tl.zeros([MERGED], tl.float64)
    count, peaks = nothing, nothing
    policy_loss, kl, clipped, bounded, ratios, ratio_mean, ratio_m2 = (nothing,) * 7
    value_loss, held, value, targets, error_mean, error_m2, target_mean, target_m2 = (nothing,) * 8
    entropy_loss, entropy = nothing, nothing
    above, log_ratio, kl3, kl_loss, ref_kl, factor, factor_m2, filtered = (nothing,) * 8
    for start in range(0, pieces, MERGED):
        piece = start + tl.arange(0, MERGED).to(tl.int64)
        kept = add_field(nothing, totals, piece, pieces, COUNT)
        if HAS_POLICY:
            policy_loss = add_field(policy_loss, totals, piece, pieces, POLICY_LOSS)
            kl = add_field(kl, totals, piece, pieces, KL)
            clipped = add_field(clipped, totals, piece, pieces, CLIPPED)
            bounded = add_field(bounded, totals, piece, pieces, BOUNDED)
            peak = add_field(nothing, totals, piece, pieces, RATIO_MAX)
            peaks = tl.where(peak > peaks, peak, peaks)
            ratio_mean, ratio_m2, more = add_moments(totals, piece, pieces, kept, count, ratio_mean, ratio_m2, RATIO)
            ratios += more
            if MORE:
                above = add_field(above, totals, piece, pieces, ABOVE)
                log_ratio = add_field(log_ratio, totals, piece, pieces, LOG_RATIO)
                kl3 = add_field(kl3, totals, piece, pieces, KL3)
            if HAS_KL:
                kl_loss = add_field(kl_loss, totals, piece, pieces, KL_LOSS)
                ref_kl = add_field(ref_kl, totals, piece, pieces, REF_KL)
            if HAS_FACTORS:
                factor = add_field(factor, totals, piece, pieces, FACTOR)
                factor_m2 = add_field(factor_m2, totals, piece, pieces, FACTOR_M2)
                filtered = add_field(filtered, totals, piece, pieces, FILTERED)
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
    weight = weight_of(counts, programs, normalizer, length, MODE, ADDED)
    loss = (weight * tl.sum(policy_loss, 0)).to(tl.float32)
    tl.store(out_losses, loss)
    if out_policy is not None:
        tl.store(out_policy, loss)
    store_f32(out_stats, tokens)
    store_mean(out_stats + 1, 0.5 * kl, tokens, HAS_POLICY)
    store_mean(out_stats + 2, clipped, tokens, HAS_POLICY)
    store_mean(out_stats + 3, bounded, tokens, HAS_POLICY)
    store_mean(out_stats + 4, ratios, tokens, HAS_POLICY)
    if HAS_POLICY:
        ratio = mean_of(tl.sum(ratios, 0), tokens)
        store_f32(out_stats + 5, mean_of(all_m2(count, ratio_mean, ratio_m2), tokens))
        store_f32(out_stats + 6, tl.where(ratio == ratio, tl.max(peaks, 0), ratio))  # a maximum may drop a NaN
    else:
        tl.store(out_stats + 5, 0.0)
        tl.store(out_stats + 6, 0.0)
    store_mean(out_stats + 7, entropy, tokens, HAS_ENTROPY)
    store_mean(out_stats + 8, held, tokens, HAS_VALUES)
    store_mean(out_stats + 10, value, tokens, HAS_VALUES)
    store_mean(out_stats + 11, targets, tokens, HAS_VALUES)
    if MORE:
        store_mean(out_stats + 12, -log_ratio, tokens, HAS_POLICY)
        store_mean(out_stats + 13, kl3, tokens, HAS_POLICY)
        store_mean(out_stats + 14, clipped - above, tokens, HAS_POLICY)
        store_mean(out_stats + 15, above, tokens, HAS_POLICY)
        store_mean(out_stats + 16, ref_kl, tokens, HAS_KL)
        if HAS_FACTORS:
            total = tl.sum(factor, 0)
            store_f32(out_stats + 17, mean_of(total * total, tokens * tl.sum(factor_m2, 0)))
        else:
            tl.store(out_stats + 17, 0.0)
        store_mean(out_stats + 18, filtered, tokens, HAS_FACTORS)
        out_losses += 1
        kl_part = (weight * tl.sum(kl_loss, 0)).to(tl.float32)
        tl.store(out_losses, kl_part)
        loss += times(kl_scale, kl_part)
    if HAS_VALUES:
        wrong, spread = all_m2(count, error_mean, error_m2), all_m2(count, target_mean, target_m2)
        unspread = tl.where(wrong > 0.0, INF, float("nan"))
        unexplained = tl.where(spread == 0.0, unspread, wrong / tl.where(spread == 0.0, 1.0, spread))
        store_f32(out_stats + 9, 1.0 - unexplained)
        of_values = (0.5 * weight * tl.sum(value_loss, 0)).to(tl.float32)
        loss += times(value_scale, of_values)
    else:
        tl.store(out_stats + 9, 0.0)
        of_values = tl.full([], 0.0, tl.float32)
    tl.store(out_losses + 1, of_values)
    if out_value is not None:
        tl.store(out_value, of_values)
    if HAS_ENTROPY:
        if ENTROPY_MODE is not None:
            weight = weight_of(counts, programs, entropy_normalizer, length, ENTROPY_MODE, ADDED)
        entropy_part = (weight * tl.sum(entropy_loss, 0)).to(tl.float32)
        tl.store(out_losses + 2, entropy_part)
        loss += times(entropy_scale, entropy_part)
    else:
        tl.store(out_losses + 2, 0.0)
    if out_total is not None:
        tl.store(out_total, loss)


@triton.jit
def upstream(x):
    """A gradient of a loss that may be absent, in fp64."""
    total = tl.zeros([], tl.float64)
    if x is not None:
        total += tl.load(x).to(tl.float64)
    return total


@triton.jit
def scaled_copy(x, scale, out, t, inside):
    if out is not None:
        tl.store(out + t, scale.to(tl.float32) * loaded(x, t, inside), mask=inside)


@triton.jit(do_not_specialize=["count"])
def product_kernel(
    grad_loss, grad_policy_loss, grad_value_loss, value_factor, total_factor, grad_log_probs, grad_values,
    grad_entropy, count, out_log_probs, out_values, out_entropy, PIECE: tl.constexpr,
):  # fmt: skip
    """The saved gradients times what came from above; that of the values is total_factor total + value_factor value."""
    first = tl.program_id(0).to(tl.int64) * PIECE
    t = first + tl.arange(0, PIECE)
    total, value = upstream(grad_loss), upstream(grad_value_loss)
    of_policy, of_values = total + upstream(grad_policy_loss), total_factor * total + value_factor * value
    if first + PIECE <= count:
        scaled_copy(grad_log_probs, of_policy, out_log_probs, t, None)
        scaled_copy(grad_values, of_values, out_values, t, None)
        scaled_copy(grad_entropy, total, out_entropy, t, None)
    else:
        scaled_copy(grad_log_probs, of_policy, out_log_probs, t, t < count)
        scaled_copy(grad_values, of_values, out_values, t, t < count)
        scaled_copy(grad_entropy, total, out_entropy, t, t < count)


def _bytes(mask):
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _counts(t, s, clamp, weighings):
    """(counts of pieces and how many pieces, kept tokens of each row, numbers of each row); None where nobody asks."""
    own_length = any(mode == SEQ_MEAN_TOKEN_MEAN.value for mode, _ in weighings)
    asked = {mode for mode, normalizer in weighings if mode != TOKEN_SUM.value and normalizer is None}
    by_sequence = t.log_probs is not None and s.by_sequence
    if not (asked or own_length or by_sequence):
        return None, 0, None, None
    mask, tokens = t.mask, t.mask.numel()
    by_rows = own_length or by_sequence or asked != {TOKEN_MEAN.value}
    rows, length = mask.shape if by_rows else (pieces(tokens, COUNTED), COUNTED)
    tile = SEQUENCE_TILE if by_sequence else TILE
    columns = min(max(power_of_two(length), 16), tile)
    programs = pieces(rows, tile // columns)
    lengths = mask.new_empty(rows, dtype=torch.int32) if own_length else None
    counts = mask.new_empty((programs, 2), dtype=torch.float64)
    sequences = mask.new_empty((rows, 2), dtype=torch.float32) if by_sequence else None
    policy = (t.log_probs, t.old_log_probs, t.advantages) if by_sequence else (None,) * 3
    _launch.run(
        count_kernel, programs, mask, *policy, rows, length, tokens,
        clamp if by_sequence else None, s.a, s.b, lengths, counts, sequences,
        TERM=int(s.term) if by_sequence else None, SUMMED=by_sequence and s.d != 0, ROWS=tile // columns,
        COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return counts, programs, lengths, sequences


def walk(tensors: Tensors, settings: Settings, more: bool, scales=None, apart=(None, None, None)):
    """(losses, the three gradients, stats) of policy_fwd; without `more` of ppo_fwd: no KL, fewer metrics.

    scales of KL, values and entropy: `apart`, each 0-d or None, take the sum of the losses, the policy's and the
    values'.
    """
    s = settings
    t = Tensors(*(None if x is None else x.contiguous() for x in tensors))._replace(mask=_bytes(tensors.mask))
    shape, tokens = t.mask.shape, t.mask.numel()
    mode, entropy_mode = int(s.loss_agg_mode), int(s.entropy_agg_mode)
    alike = t.entropy is None or (mode == entropy_mode and tensors.normalizer is tensors.entropy_normalizer)
    weighings = [(mode, t.normalizer)] if alike else [(mode, t.normalizer), (entropy_mode, t.entropy_normalizer)]
    clamp = None if s.log_ratio_clamp == float("inf") else s.log_ratio_clamp
    counts, programs, lengths, sequences = _counts(t, s, clamp, weighings)
    rounds = min(max(tokens // (PIECE * PROGRAMS), 1), ROUNDS)
    count = pieces(tokens, PIECE * rounds)

    def new(*shape, dtype=torch.float32):
        return t.mask.new_empty(shape, dtype=dtype)

    grads = [new(0) if x is None else new(*shape) for x in (t.log_probs, t.values, t.entropy)]
    losses, stats = (new(4), new(len(STATS))) if more else (new(3), new(len(PPO_STATS)))
    totals = new(FIELDS + MORE_FIELDS if more else FIELDS, count, dtype=torch.float64)
    modes = {"MODE": mode, "ENTROPY_MODE": None if alike else entropy_mode}
    coefficients = t.coefficients if int(s.term) == KL_COV.value else None
    _launch.run(
        loss_kernel, count, t.mask, t.log_probs, t.old_log_probs, t.advantages, t.ref_log_probs, t.weights,
        coefficients, t.values, t.old_values, t.returns, t.entropy, t.normalizer, t.entropy_normalizer, counts,
        programs, lengths, sequences, tokens, shape[1], s.a, s.b, s.c, clamp, s.kl_coef, s.kl_low, s.kl_high, s.kl_cap,
        s.kl_ratio_cap, s.cliprange_value, s.value_scale, s.entropy_scale, *grads, count, rounds, totals,
        TERM=int(s.term), KL_ESTIMATOR=int(s.kl_estimator), KL_GRADIENT=int(s.kl_gradient), **modes, MORE=more,
        PIECE=PIECE, ADDED=ADDED, num_warps=8, registers=FREE,
    )  # fmt: skip
    _launch.run(
        finish_kernel, 1, totals, count, t.normalizer, t.entropy_normalizer, counts, programs, max(shape[1], 1),
        *(scales or (0.0, 0.0, 0.0)), losses, stats, *apart, **modes,
        HAS_POLICY=t.log_probs is not None, HAS_KL=t.ref_log_probs is not None,
        HAS_FACTORS=t.weights is not None, HAS_VALUES=t.values is not None, HAS_ENTROPY=t.entropy is not None,
        MORE=more, MERGED=MERGED, ADDED=ADDED, num_warps=8,
    )  # fmt: skip
    return losses, *grads, stats


def policy_fwd(tensors, settings):
    return walk(tensors, settings, more=True)


def policy_total_fwd(tensors, settings):
    """policy_fwd, and before its results the loss that `total_loss` makes of them, in the same launches."""
    total = tensors.mask.new_empty((), dtype=torch.float32)
    scales = settings.kl_coef, settings.value_scale, settings.entropy_scale
    return total, *walk(tensors, settings, True, [float(x) for x in scales], (total, None, None))


def policy_bwd(grad_loss, grad_policy_loss, grad_value_loss, grad_log_probs, grad_values, grad_entropy, vf_coef):
    grads = [x.contiguous() for x in (grad_log_probs, grad_values, grad_entropy)]
    products = [torch.empty_like(x) for x in grads]
    count = max(x.numel() for x in grads)
    factors = (1.0 / vf_coef, 1.0) if vf_coef else (1.0, 0.0)
    _launch.run(
        product_kernel, pieces(count, PRODUCT), grad_loss, grad_policy_loss, grad_value_loss, *factors, *grads, count,
        *(x if x.numel() else None for x in products), PIECE=PRODUCT, num_warps=8,
    )  # fmt: skip
    return tuple(products)
