"""The walk of _linear_walk.py on the chunk kernels of csrc/cpu/linear.cpp; reference/linear.py defines it."""

from __future__ import annotations

import torch

from .. import _linear_walk as walk
from .. import dispatch
from .._native import fresh, run
from ..reference.linear import Head
from . import kl


class _Kernels:
    """What the walk asks of a backend."""

    @staticmethod
    def workspace(size, device):
        return fresh(size)

    fresh = staticmethod(fresh)

    @staticmethod
    def fold(chunk, state):
        run(
            "linear_fold_f32", chunk.logits, chunk.logits.stride(0), *chunk.logits.shape, chunk.first, chunk.bias,
            chunk.temperatures, chunk.temperature, chunk.softcap or 0.0, chunk.labels, chunk.kept, state.max,
            state.sum, state.weighted, state.label_logit, state.here,
        )  # fmt: skip

    @staticmethod
    def gradient(chunk, upstream, results):
        upstream = [None if g is None else g.to(torch.float32).contiguous() for g in upstream]
        run(
            "linear_gradient_f32", chunk.logits, chunk.logits.stride(0), *chunk.logits.shape, chunk.first, chunk.bias,
            chunk.has_bias_in, chunk.temperatures, chunk.temperature, chunk.softcap or 0.0, chunk.labels, chunk.kept,
            *upstream, *results,
        )  # fmt: skip

    divergence = staticmethod(kl.kl_fwd)

    @staticmethod
    def divergence_gradient(grad, logits, ref_logits, temperature, reverse):
        results = kl.kl_fwd(logits, ref_logits, temperature, reverse)
        return kl.kl_bwd(grad, logits, ref_logits, *results, temperature, reverse, True, False)[0]


def linear_logprobs_fwd(
    hidden, weight, labels, rows, bias, temperatures, temperature, softcap, ignore_index, with_entropy, chunk_size,
    group, vocab_start,
):  # fmt: skip
    head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap)
    path = walk.Walk(_Kernels, head, labels, labels != ignore_index, vocab_start)
    logprobs, entropy, row_max, log_sum = walk.logprobs_fwd(path, with_entropy, chunk_size, group)
    return logprobs, hidden.new_zeros(0, dtype=torch.float32) if entropy is None else entropy, row_max, log_sum


def linear_logprobs_bwd(
    grad_logprobs, grad_entropy, hidden, weight, labels, rows, bias, temperatures, logprobs, entropy, row_max, log_sum,
    temperature, softcap, ignore_index, chunk_size, group, vocab_start, need_hidden, need_weight, need_bias,
):  # fmt: skip
    head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap)
    path = walk.Walk(_Kernels, head, labels, labels != ignore_index, vocab_start)
    upstream = (grad_logprobs, grad_entropy)
    results = (logprobs, entropy if grad_entropy is not None else None, row_max, log_sum)
    dtypes = (hidden.dtype, weight.dtype, torch.float32 if bias is None else bias.dtype)
    needs = (need_hidden, need_weight, need_bias)
    return walk.logprobs_bwd(path, upstream, results, needs, chunk_size, group, dtypes)


def linear_cross_entropy_fwd(
    hidden, weight, labels, rows, bias, temperatures, temperature, softcap, ignore_index, chunk_size, group,
    vocab_start, need_hidden, need_weight, need_bias,
):  # fmt: skip
    head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap)
    path = walk.Walk(_Kernels, head, labels, labels != ignore_index, vocab_start)

    def token_gradients(part, logprob, entropy):
        return torch.full_like(logprob, -1.0), None

    needs = (need_hidden, need_weight, need_bias)
    logprobs, _, gradients = walk.with_gradients(path, token_gradients, needs, chunk_size, group, False)
    return 0.0 - logprobs.sum(), *gradients


def linear_ppo_fwd(
    hidden, weight, labels, rows, bias, temperatures, old_log_probs, advantages, mask, normalizer, temperature,
    softcap, cliprange, cliprange_high, dual_clip, entropy_coef, loss_agg_mode, chunk_size, group, vocab_start,
    need_hidden, need_weight, need_bias,
):  # fmt: skip
    head = Head(hidden, weight, bias, rows, temperatures, temperature, softcap)
    path = walk.Walk(_Kernels, head, labels.reshape(-1), mask.reshape(-1), vocab_start)
    clipping = {"cliprange": cliprange, "cliprange_high": cliprange_high, "dual_clip": dual_clip}
    upstream = walk.ppo_upstream(mask, loss_agg_mode, normalizer, old_log_probs, advantages, clipping, entropy_coef)
    needs = (need_hidden, need_weight, need_bias)
    logprobs, entropy, gradients = walk.with_gradients(path, upstream, needs, chunk_size, group, True)
    shape = mask.shape if mask.dim() == 2 else (1, -1)  # packed tokens are one row: only the token modes take them
    rows = [x.reshape(shape).contiguous() for x in (logprobs, old_log_probs, advantages, mask, entropy)]
    losses, _, _, _, stats = dispatch.pick("ppo", logprobs).ppo_fwd(
        *rows[:4], None, None, None, rows[4], normalizer, cliprange, cliprange_high, dual_clip, None, loss_agg_mode,
    )  # fmt: skip
    return losses[0] - entropy_coef * losses[2], losses[0].clone(), stats, *gradients


def _kl_walks(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, temperature, softcap):
    labels = torch.zeros(hidden.shape[0], dtype=torch.int64)
    kept = torch.ones(hidden.shape[0], dtype=torch.bool)
    for h, w, b in ((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)):
        yield walk.Walk(_Kernels, Head(h, w, b, temperature=temperature, softcap=softcap), labels, kept, 0)


def linear_kl_fwd(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, temperature, softcap, reverse, chunk_size):
    walks = _kl_walks(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, temperature, softcap)
    return walk.kl_fwd(*walks, reverse, chunk_size)


def linear_kl_bwd(
    grad, hidden, weight, ref_hidden, ref_weight, bias, ref_bias, temperature, softcap, reverse, chunk_size,
    need_hidden, need_weight, need_bias,
):  # fmt: skip
    walks = _kl_walks(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, temperature, softcap)
    dtypes = (hidden.dtype, weight.dtype, torch.float32 if bias is None else bias.dtype)
    return walk.kl_bwd(grad, *walks, reverse, chunk_size, (need_hidden, need_weight, need_bias), dtypes)
