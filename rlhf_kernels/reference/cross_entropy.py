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
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import linear, logprobs
from .logprobs import Upstream, gap_below, logits_sums, logprobs_and_entropy, scale_logits

CASES = ("small", "batched", "banned", "ignored", "capped", "wide", "one_entry", "empty")


class Settings(NamedTuple):
    """What the loss adds to -log p."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False


def token_loss(settings, logprob, row_max, log_sum, gap, weights):
    """Loss [n] of each row from its statistics; gap and weights may be None."""
    nll = 0.0 - logprob
    if settings.dft:
        nll = torch.where(logprob == -math.inf, 0.0, torch.exp(logprob) * nll)
    if settings.label_smoothing:
        smooth, share = log_sum + gap, settings.label_smoothing
        nll = smooth if share == 1.0 else (1.0 - share) * nll + share * smooth
    loss = nll if not settings.z_loss else nll + settings.z_loss * _log_sum_exp(row_max, log_sum).square()
    return loss if weights is None else weights * loss


def token_upstream(settings, logprob, row_max, log_sum, count, weights):
    """`Upstream` of each row's loss; count may be None where nothing is smoothed."""
    share = settings.label_smoothing
    factor = torch.ones_like(logprob) if weights is None else weights
    slope = -(1.0 - share) * factor
    through_sum = each = None
    if settings.dft:
        slope = slope * torch.exp(logprob)
    if share or settings.z_loss:
        through_sum = factor * (share + 2.0 * settings.z_loss * _log_sum_exp(row_max, log_sum))
    if share:
        each = -share * factor / count.clamp(min=1.0).to(factor.dtype)
    return Upstream(slope, None, through_sum, each)


def _log_sum_exp(row_max, log_sum):
    return torch.where(row_max == -math.inf, 0.0, row_max + log_sum)


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


class FromLogits:
    """The functions of a backend, from its log-probs: their forward, backward, and `logits_sums`."""

    def __init__(self, logprobs_fwd, logprobs_bwd, logits_sums):
        self.logprobs_fwd, self.logprobs_bwd, self.logits_sums = logprobs_fwd, logprobs_bwd, logits_sums

    def cross_entropy_fwd(
        self, logits, labels, weights, temperature, softcap, ignore_index, label_smoothing, z_loss, dft
    ):
        """(loss, log-prob, row maximum, log of the row's sum, number of entries that are not -inf), each [N].

        The last is [0] where nothing is smoothed.
        """
        options = (temperature, softcap, ignore_index)
        logprob, _, row_max, log_sum = self.logprobs_fwd(logits, labels, None, *options, False)
        gap, counts = None, logprob.new_zeros(0)
        if label_smoothing:
            total, counts = self.logits_sums(logits, labels, *options)
            gap, counts = gap_below(row_max, total, counts), counts.to(logprob.dtype)
        settings = Settings(label_smoothing, z_loss, dft)
        loss = token_loss(settings, logprob, row_max, log_sum, gap, _like(weights, logprob))
        return torch.where(labels != ignore_index, loss, 0.0), logprob, row_max, log_sum, counts

    def cross_entropy_bwd(
        self, grad, logits, labels, weights, logprob, row_max, log_sum, counts, temperature, softcap, ignore_index,
        label_smoothing, z_loss, dft,
    ):  # fmt: skip
        """d/dlogits [N, V], in the dtype of the logits."""
        settings, counts = Settings(label_smoothing, z_loss, dft), counts if label_smoothing else None
        upstream = token_upstream(settings, logprob, row_max, log_sum, counts, _like(weights, logprob)).times(grad)
        nothing = logprob.new_zeros(0)
        return self.logprobs_bwd(
            upstream.log_prob, None, logits, labels, None, logprob, nothing, row_max, log_sum, temperature, softcap,
            ignore_index, grad_log_sum_exp=upstream.log_sum_exp, grad_each=upstream.each,
        )  # fmt: skip


@dataclass
class TokenLoss:
    """The loss of each label of a walk over rows, and its `Upstream`: `token_gradients` of reference/linear.py."""

    settings: Settings
    weights: torch.Tensor | None  # [M]
    kept: torch.Tensor  # [M]
    losses: torch.Tensor  # [M], filled

    @classmethod
    def start(cls, settings, weights, kept, dtype):
        losses = torch.zeros(kept.shape[0], dtype=dtype, device=kept.device)
        return cls(settings, None if weights is None else weights.to(dtype), kept, losses)

    def __call__(self, part, rows):
        weights = None if self.weights is None else self.weights[part]
        loss = token_loss(self.settings, rows.log_prob, rows.max, rows.log_sum, rows.gap, weights)
        self.losses[part] = torch.where(self.kept[part], loss, 0.0)
        return token_upstream(self.settings, rows.log_prob, rows.max, rows.log_sum, rows.count, weights)


def linear_cross_entropy_fwd(
    hidden, weight, labels, rows, bias, temperatures, low, up, weights, temperature, softcap, ignore_index,
    label_smoothing, z_loss, dft, chunk_size, fast, group, vocab_start, needs,
):  # fmt: skip
    """(sum of the losses of the labels that count, and its gradients as `linear.Gradients`)."""
    head = linear.Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
    settings, kept = Settings(label_smoothing, z_loss, dft), labels != ignore_index
    loss = TokenLoss.start(settings, weights, kept, head.dtype)
    _, _, gradients = linear.walk_with_gradients(
        head, labels, kept, loss, needs, chunk_size, group, vocab_start, False, with_sums=bool(label_smoothing)
    )
    return loss.losses.sum(), *gradients


def linear_cross_entropy_each_fwd(
    hidden, weight, labels, rows, bias, temperatures, low, up, weights, temperature, softcap, ignore_index,
    label_smoothing, z_loss, dft, with_slopes, chunk_size, fast, group, vocab_start,
):  # fmt: skip
    """(losses, log-probs, row maximum, log of the row's sum, numbers of entries, each [M], and slopes [M, H]).

    With slopes no backward needs the statistics: they are [0]. The numbers are [0] where nothing is smoothed.
    """
    head = linear.Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
    settings, kept, with_sums = Settings(label_smoothing, z_loss, dft), labels != ignore_index, bool(label_smoothing)
    loss = TokenLoss.start(settings, weights, kept, head.dtype)
    nothing = [hidden.new_zeros(0, dtype=head.dtype) for _ in range(4)]
    if with_slopes:
        _, _, gradients = linear.walk_with_gradients(
            head, labels, kept, loss, (True, False, False), chunk_size, group, vocab_start, False, apart=True,
            with_sums=with_sums,
        )  # fmt: skip
        return loss.losses, *nothing, gradients[0]
    found = linear.rows_of(head, labels, kept, chunk_size, group, vocab_start, with_sums=with_sums)
    loss(slice(0, head.count), found)
    counts = found.count if with_sums else nothing[0]
    return loss.losses, found.log_prob, found.max, found.log_sum, counts, nothing[1]


def _like(weights, rows):
    return None if weights is None else weights.to(rows.dtype)


_functions = FromLogits(logprobs.logprobs_fwd, logprobs.logprobs_bwd, logits_sums)
cross_entropy_fwd = _functions.cross_entropy_fwd
cross_entropy_bwd = _functions.cross_entropy_bwd


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
