"""Cross-entropy of labels, with smoothed labels, a z-loss, weights and dynamic fine-tuning: the definition.

With z, p and log p of reference/logprobs.py, S = log sum_j exp(z_j), e the smoothing, y the label, and A the n entries
of the row that are not -inf:

    nll    = -(1 - e) log p_y - e sum_{j in A} log p_j / n = -(1 - e) log p_y + e (S - sum_{j in A} z_j / n)
    loss   = weight (c nll + z_loss S^2)        c = 1, or in dynamic fine-tuning p_y, as a constant

    d loss / d z_j = weight (c (1 - e) (p_j - [j = y]) + (e + 2 z_loss S) p_j - e [j in A] / n)

So a row's loss and gradient come from its log-prob, maximum, log of its sum, and `gap`, how far the mean of its entries
lies below the maximum. Banned entries (-inf) take no part in the smoothing. Rows whose label is `ignore_index` give 0
and no gradient, whatever their logits hold; a row of nothing but -inf gives +inf and no gradient.
"""

import math
from typing import NamedTuple

import torch

from .logprobs import (
    _blocks,
    accumulator_dtype,
    finish_statistics,
    label_state,
    logprobs_and_entropy,
    partial_statistics,
    row_gradient,
    scale_logits,
)

CASES = ("small", "batched", "banned", "ignored", "capped", "wide", "one_entry", "empty")


class Settings(NamedTuple):
    """What the loss adds to -log p."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False


class Slopes(NamedTuple):
    """d loss / d log-prob, d loss / d S, and what every entry that is not banned gets as it is; each [n] or None."""

    log_prob: torch.Tensor
    log_sum_exp: torch.Tensor | None
    each: torch.Tensor | None


def row_sums(z):
    """(sum of the entries that are not -inf, their number) of rows z [n, V], each [n] fp64; they add up over parts."""
    banned = z == -math.inf
    return torch.where(banned, 0.0, z).sum(-1, dtype=torch.float64), (~banned).sum(-1).double()


def gap_below(row_max, total, count):
    """How far the mean total / count lies below the row's maximum; 0 for a row of nothing but -inf."""
    dead = row_max == -math.inf
    gap = torch.where(dead, 0.0, row_max).double() - total / count.clamp(min=1.0)
    return torch.where(dead, 0.0, gap).to(row_max.dtype)


def token_loss(settings, logprob, row_max, log_sum, gap, weights):
    """Loss [n] of each row from its statistics; gap and weights may be None."""
    nll = -logprob
    if settings.dft:
        nll = torch.where(logprob == -math.inf, 0.0, torch.exp(logprob) * nll)
    if settings.label_smoothing:
        smooth, share = log_sum + gap, settings.label_smoothing
        nll = smooth if share == 1.0 else (1.0 - share) * nll + share * smooth
    loss = nll if not settings.z_loss else nll + settings.z_loss * _log_sum_exp(row_max, log_sum).square()
    return loss if weights is None else weights * loss


def token_slopes(settings, logprob, row_max, log_sum, count, weights):
    """`Slopes` of each row's loss; count may be None where nothing is smoothed."""
    share = settings.label_smoothing
    factor = torch.ones_like(logprob) if weights is None else weights
    slope = -(1.0 - share) * factor
    slope = slope * torch.exp(logprob) if settings.dft else slope
    through_sum = each = None
    if share or settings.z_loss:
        through_sum = factor * (share + 2.0 * settings.z_loss * _log_sum_exp(row_max, log_sum))
    if share:
        each = -share * factor / count.clamp(min=1.0).to(factor.dtype)
    return Slopes(slope, through_sum, each)


def _log_sum_exp(row_max, log_sum):
    return torch.where(row_max == -math.inf, 0.0, row_max + log_sum)


def extra_gradient(z, slope, row_max, log_sum, through_sum, each):
    """d/dlogits of rows z [n, V] through S and through the mean of the entries."""
    banned = z == -math.inf
    d = torch.zeros_like(z)
    if through_sum is not None:
        log_p = torch.where(banned, 0.0, (z - row_max.unsqueeze(-1)) - log_sum.unsqueeze(-1))
        d = through_sum.unsqueeze(-1) * torch.exp(log_p)
    if each is not None:
        d = d + each.unsqueeze(-1)
    return torch.where(banned, 0.0, d * slope)


def cross_entropy(
    logits, labels, weights=None, *, temperature=1.0, softcap=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
    dft=False,
):  # fmt: skip
    """The definition, differentiable by autograd: [...] fp32 or fp64."""
    logprob, _ = logprobs_and_entropy(
        logits, labels, temperature=temperature, softcap=softcap, ignore_index=ignore_index
    )
    kept = labels != ignore_index
    z = scale_logits(torch.where(kept.unsqueeze(-1), logits, 0.0), temperature, softcap)[0]
    banned = z == -math.inf
    log_p = torch.log_softmax(z, -1)
    nll = -logprob
    if dft:
        nll = torch.where(nll == math.inf, 0.0, torch.exp(logprob).detach() * nll)
    smooth = -torch.where(banned, 0.0, log_p).sum(-1) / (~banned).sum(-1).clamp(min=1)
    loss = smooth if label_smoothing == 1.0 else (1.0 - label_smoothing) * nll + label_smoothing * smooth
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(z, -1).square()
    return torch.where(kept, loss if weights is None else weights.detach() * loss, 0.0)


def _rows(logits, labels, temperature, softcap, ignore_index):
    """(rows of the block, z, dz/dlogits, kept, outside, safe labels), block by block."""
    for start, stop in _blocks(*logits.shape):
        part = slice(start, stop)
        state = label_state(labels[part], logits.shape[-1], ignore_index)
        yield part, *scale_logits(logits[part], temperature, softcap), *state


def cross_entropy_fwd(logits, labels, weights, temperature, softcap, ignore_index, label_smoothing, z_loss, dft):
    """(loss, log-prob, row maximum, log of the row's sum, number of entries that are not banned), each [N].

    The last is [0] where nothing is smoothed.
    """
    settings, dtype = Settings(label_smoothing, z_loss, dft), accumulator_dtype(logits)
    new = logits.new_zeros
    out = [new(logits.shape[0], dtype=dtype) for _ in range(4)]
    counts = new(logits.shape[0] if label_smoothing else 0, dtype=dtype)
    for part, z, _, kept, outside, safe in _rows(logits, labels, temperature, softcap, ignore_index):
        row_max, total, _ = partial_statistics(z, False)
        label_logit = z.gather(-1, safe.unsqueeze(-1)).squeeze(-1)
        logprob, _, log_sum = finish_statistics(row_max, total, None, label_logit)
        gap = None
        if label_smoothing:
            sums, count = row_sums(z)
            counts[part], gap = count, gap_below(row_max, sums, count)
        loss = token_loss(settings, logprob, row_max, log_sum, gap, _part(weights, part, dtype))
        for target, value in zip(out, (loss, logprob, row_max, log_sum), strict=True):
            target[part] = torch.where(kept, value, 0.0).masked_fill(outside, math.nan)
    return *out, counts


def cross_entropy_bwd(
    grad, logits, labels, weights, logprobs, row_max, log_sum, counts, temperature, softcap, ignore_index,
    label_smoothing, z_loss, dft,
):  # fmt: skip
    """d/dlogits [N, V], in the dtype of the logits."""
    settings, dtype = Settings(label_smoothing, z_loss, dft), accumulator_dtype(logits)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part, z, slope, kept, outside, safe in _rows(logits, labels, temperature, softcap, ignore_index):
        rows = [x[part] for x in (logprobs, row_max, log_sum)]
        count = counts[part] if label_smoothing else None
        slopes = scaled_slopes(grad[part], token_slopes(settings, *rows, count, _part(weights, part, dtype)))
        d = row_gradient(z, slope, safe, slopes.log_prob, None, rows[0], None, *rows[1:])
        d = d + extra_gradient(z, slope, *rows[1:], *slopes[1:])
        out[part] = torch.where(kept.unsqueeze(-1), d, 0.0).masked_fill(outside.unsqueeze(-1), math.nan).to(out.dtype)
    return out


def scaled_slopes(grad, slopes):
    """Slopes of grad [n] times the loss."""
    return Slopes(*(None if x is None else grad * x for x in slopes))


def _part(weights, part, dtype):
    return None if weights is None else weights[part].to(dtype)


def example_inputs(case, *, dtype=torch.float32, device="cpu", seed=0):
    """Keyword arguments of `cross_entropy` for a case of CASES; ignored rows hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    shape = {
        "batched": (2, 3, 17), "wide": (3, 5003), "one_entry": (4, 1), "empty": (0, 5), "small": (4, 7),
    }.get(case, (6, 11))  # fmt: skip
    logits = 3.0 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator, dtype=torch.int64)
    weights = None
    options = {"temperature": 1.0, "softcap": None}
    if case == "banned":
        logits[:, :4] = -math.inf
        labels = labels.clamp(min=4)
    if case == "ignored":
        labels[1] = labels[4] = -100
        logits[1], logits[4] = math.nan, math.inf
    if case == "capped":
        options = {"temperature": 0.7, "softcap": 5.0}
        logits[2, 3] = -math.inf
        labels[2] = 0
    if case in ("batched", "capped", "ignored"):
        weights = torch.randn(shape[:-1], generator=generator, dtype=torch.float64).to(dtype).to(device)
    tensors = {"logits": logits.to(dtype).to(device), "labels": labels.to(device), "weights": weights}
    return {**tensors, **options}
