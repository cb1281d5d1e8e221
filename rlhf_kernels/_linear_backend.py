"""The functions of a backend's module, as reference/linear.py defines them, by the walk of _linear_walk.py.

Each takes an operator's arguments, makes of them the head and the walk over its chunks, and says which gradients are
wanted.
"""

from __future__ import annotations

import torch

from . import dispatch
from ._linear_walk import (
    Divergence,
    Walk,
    kl_bwd,
    kl_fwd,
    logprobs_bwd,
    logprobs_fwd,
    token_statistics_fwd,
    with_gradients,
)
from .reference._head import Head, dtypes_of
from .reference.cross_entropy import Settings, TokenLoss
from .reference.linear import _ones
from .reference.logprobs import Upstream
from .reference.policy import token_gradients, total_loss
from .reference.ppo import aggregation_weights, ppo_token_loss


def ppo_upstream(mask, loss_agg_mode, normalizer, old_log_probs, advantages, clipping, entropy_coef):
    """token_gradients of the PPO policy loss: `Upstream` of some tokens."""
    weights = aggregation_weights(mask, loss_agg_mode, normalizer, torch.float32).reshape(-1)
    old, advantage = (torch.where(mask, x.to(torch.float32), 0.0).reshape(-1) for x in (old_log_probs, advantages))

    def token_gradients(part, rows):
        _, slope = ppo_token_loss(rows.log_prob, old[part], advantage[part], **clipping)
        return Upstream(weights[part] * slope, -entropy_coef * weights[part] if entropy_coef else None)

    return token_gradients


def linear_policy_results(logprobs, entropy, tensors, settings):
    """(loss, its parts [4], stats) from what the walk found of each token."""
    shape = tensors.mask.shape if tensors.mask.dim() == 2 else (1, -1)  # packed tokens are one row
    tensors = tensors._replace(log_probs=logprobs, entropy=entropy)
    found = {k: x.reshape(shape).contiguous() for k, x in tensors._asdict().items() if x is not None and x.dim()}
    losses, *_, stats = dispatch.pick("policy", logprobs).policy_fwd(tensors._replace(**found), settings)
    return total_loss(losses, settings._replace(value_scale=0.0)), losses, stats


class Operators:
    """The functions, for the `_linear_walk.Kernels` that kernels_for(hidden, weight, fast) gives for a call."""

    def __init__(self, kernels_for):
        self.kernels_for = kernels_for

    def walk(self, head, labels, kept, fast, vocab_start=0):
        return Walk(self.kernels_for(head.hidden, head.weight, fast), head, labels, kept, vocab_start)

    def linear_logprobs_fwd(
        self, hidden, weight, labels, rows, bias, temperatures, low, up, temperature, softcap, ignore_index,
        with_entropy, with_slopes, chunk_size, fast, group, vocab_start,
    ):  # fmt: skip
        head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
        path = self.walk(head, labels, labels != ignore_index, fast, vocab_start)
        empty = [hidden.new_zeros(0, dtype=torch.float32) for _ in range(3)]
        if with_slopes:
            needs = (True, False, False)
            logprobs, _, found = with_gradients(path, _ones, needs, chunk_size, group, False, apart=True)
            return logprobs, *empty, found[0]
        logprobs, entropy, row_max, log_sum, *_ = logprobs_fwd(path, with_entropy, chunk_size, group)
        return logprobs, empty[0] if entropy is None else entropy, row_max, log_sum, empty[1]

    def linear_logprobs_bwd(
        self, grad_logprobs, grad_entropy, hidden, weight, labels, rows, bias, temperatures, low, up, logprobs,
        entropy, row_max, log_sum, temperature, softcap, ignore_index, chunk_size, fast, group, vocab_start, needs,
        grad_log_sum_exp=None, grad_each=None, dtypes=None,
    ):  # fmt: skip
        head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
        path = self.walk(head, labels, labels != ignore_index, fast, vocab_start)
        upstream = Upstream(grad_logprobs, grad_entropy, grad_log_sum_exp, grad_each)
        results = (logprobs, entropy if grad_entropy is not None else None, row_max, log_sum)
        return logprobs_bwd(path, upstream, results, needs, chunk_size, group, dtypes or dtypes_of(head))

    def linear_token_statistics_fwd(
        self, hidden, weight, labels, rows, bias, temperatures, low, up, temperature, softcap, ignore_index, chunk_size,
        fast, group, vocab_start,
    ):  # fmt: skip
        head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
        path = self.walk(head, labels, labels != ignore_index, fast, vocab_start)
        rows, *more = token_statistics_fwd(path, chunk_size, group)
        return *rows[:4], *more

    def linear_cross_entropy_fwd(
        self, hidden, weight, labels, rows, bias, temperatures, low, up, weights, temperature, softcap, ignore_index,
        label_smoothing, z_loss, dft, chunk_size, fast, group, vocab_start, needs,
    ):  # fmt: skip
        head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
        kept = labels != ignore_index
        path, settings = self.walk(head, labels, kept, fast, vocab_start), Settings(label_smoothing, z_loss, dft)
        loss = TokenLoss.start(settings, weights, kept, torch.float32)
        with_sums = bool(label_smoothing)
        _, _, gradients = with_gradients(path, loss, needs, chunk_size, group, False, with_sums=with_sums)
        return loss.losses.sum(), *gradients

    def linear_cross_entropy_each_fwd(
        self, hidden, weight, labels, rows, bias, temperatures, low, up, weights, temperature, softcap, ignore_index,
        label_smoothing, z_loss, dft, with_slopes, chunk_size, fast, group, vocab_start,
    ):  # fmt: skip
        head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
        kept, with_sums = labels != ignore_index, bool(label_smoothing)
        path, settings = self.walk(head, labels, kept, fast, vocab_start), Settings(label_smoothing, z_loss, dft)
        loss = TokenLoss.start(settings, weights, kept, torch.float32)
        empty = [hidden.new_zeros(0, dtype=torch.float32) for _ in range(4)]
        if with_slopes:
            needs = (True, False, False)
            _, _, found = with_gradients(path, loss, needs, chunk_size, group, False, apart=True, with_sums=with_sums)
            return loss.losses, *empty, found[0]
        rows = logprobs_fwd(path, False, chunk_size, group, with_sums)
        loss(slice(0, head.count), rows)
        return loss.losses, rows.log_prob, rows.max, rows.log_sum, rows.count if with_sums else empty[0], empty[1]

    def linear_ppo_fwd(
        self, hidden, weight, labels, rows, bias, temperatures, low, up, old_log_probs, advantages, mask, normalizer,
        temperature, softcap, cliprange, cliprange_high, dual_clip, entropy_coef, loss_agg_mode, chunk_size, fast,
        group, vocab_start, needs,
    ):  # fmt: skip
        head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
        path = self.walk(head, labels.reshape(-1), mask.reshape(-1), fast, vocab_start)
        clipping = {"cliprange": cliprange, "cliprange_high": cliprange_high, "dual_clip": dual_clip}
        upstream = ppo_upstream(mask, loss_agg_mode, normalizer, old_log_probs, advantages, clipping, entropy_coef)
        logprobs, entropy, gradients = with_gradients(path, upstream, needs, chunk_size, group, True)
        shape = mask.shape if mask.dim() == 2 else (1, -1)  # packed tokens are one row: only the token modes take them
        rows = [x.reshape(shape).contiguous() for x in (logprobs, old_log_probs, advantages, mask, entropy)]
        losses, _, _, _, stats = dispatch.pick("ppo", logprobs).ppo_fwd(
            *rows[:4], None, None, None, rows[4], normalizer, cliprange, cliprange_high, dual_clip, None, loss_agg_mode,
        )  # fmt: skip
        return losses[0] - entropy_coef * losses[2], losses[0].clone(), stats, *gradients

    def linear_policy_fwd(
        self, hidden, weight, labels, rows, bias, temperatures, low, up, tensors, settings, temperature, softcap,
        chunk_size, fast, group, vocab_start, needs,
    ):  # fmt: skip
        head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap, low, up)
        mask = tensors.mask
        path = self.walk(head, labels.reshape(-1), mask.reshape(-1), fast, vocab_start)
        first = None
        if settings.by_sequence:
            first = logprobs_fwd(path, False, chunk_size, group)[0].view(mask.shape)
        upstream = token_gradients(tensors, settings, torch.float32, first)
        logprobs, entropy, gradients = with_gradients(path, upstream, needs, chunk_size, group, True)
        return *linear_policy_results(logprobs, entropy, tensors, settings), *gradients

    def divergence(
        self, hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap, reverse, chunk_size,
        fast, group,
    ):  # fmt: skip
        count, walks = (hidden if rows is None else rows).shape[0], []
        labels = torch.zeros(count, dtype=torch.int64, device=hidden.device)
        for h, w, b in ((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)):
            head = Head(h, w, b, rows, temperature=temperature, softcap=softcap)
            walks.append(self.walk(head, labels, torch.ones_like(labels, dtype=torch.bool), fast))
        return Divergence(*walks, reverse, chunk_size, group)

    def linear_kl_fwd(
        self, hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap, reverse, with_slopes,
        chunk_size, fast, group,
    ):  # fmt: skip
        options = (temperature, softcap, reverse, chunk_size, fast, group)
        inputs = (hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias)
        return kl_fwd(self.divergence(*inputs, *options), with_slopes)

    def linear_kl_bwd(
        self, grad, hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias, temperature, softcap, reverse,
        chunk_size, fast, group, need_hidden, need_weight, need_bias,
    ):  # fmt: skip
        options = (temperature, softcap, reverse, chunk_size, fast, group)
        inputs = (hidden, weight, ref_hidden, ref_weight, rows, bias, ref_bias)
        divergence = self.divergence(*inputs, *options)
        return kl_bwd(grad, divergence, (need_hidden, need_weight, need_bias), dtypes_of(divergence.walk.head)[:3])
