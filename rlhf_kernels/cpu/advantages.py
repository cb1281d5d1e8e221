"""Calls of csrc/cpu/advantages.cpp; what the functions mean stands in reference/advantages.py."""

import torch

from .._native import KL_ESTIMATORS, as_rows, dense_rows, fresh, or_infinite, rows, run


def _shape(tensor, cu_seqlens):
    """Rows and tokens a row; packed tensors count their rows in cu_seqlens."""
    return (cu_seqlens.shape[0] - 1, 0) if cu_seqlens is not None else (tensor.shape[0], tensor.shape[1])


def _offsets(cu_seqlens):
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def gae_fwd(rewards, values, mask, gamma, lam, cu_seqlens, last_values):
    rewards, values, mask, cu_seqlens = dense_rows(rewards), dense_rows(values), dense_rows(mask), _offsets(cu_seqlens)
    last_values = None if last_values is None else last_values.contiguous()
    advantages, returns = fresh(*rewards.shape), fresh(*rewards.shape)
    run(
        "gae_fwd_f32", *rows(rewards), *rows(values), *rows(mask), last_values, cu_seqlens,
        *_shape(rewards, cu_seqlens), gamma, lam, advantages, returns,
    )  # fmt: skip
    return advantages, returns


def rlhf_advantages_fwd(
    scores, log_probs, ref_log_probs, values, mask, kl_coef, gamma, lam, kl_estimator, reward_clip, whiten, cu_seqlens
):
    scores, cu_seqlens = scores.contiguous(), _offsets(cu_seqlens)
    log_probs, ref_log_probs, values, mask = (dense_rows(x) for x in (log_probs, ref_log_probs, values, mask))
    advantages, returns, rewards, kl = (fresh(*log_probs.shape) for _ in range(4))
    row_stats = fresh(scores.shape[0], 3, dtype=torch.float64) if whiten else None
    run(
        "rlhf_advantages_fwd_f32", scores, *rows(log_probs), *rows(ref_log_probs), *rows(values), *rows(mask),
        cu_seqlens, *_shape(log_probs, cu_seqlens), kl_coef, gamma, lam, KL_ESTIMATORS[kl_estimator],
        or_infinite(reward_clip), whiten, row_stats, advantages, returns, rewards, kl,
    )  # fmt: skip
    return advantages, returns, rewards, kl


def whiten_stats_fwd(values, mask):
    x, keep = as_rows(values), as_rows(mask)
    row_stats = fresh(x.shape[0], 3, dtype=torch.float64)
    stats = fresh(3, dtype=torch.float64)
    run("whiten_stats_f32", *rows(x), *rows(keep), *x.shape, row_stats, stats)
    return stats


def whiten_fwd(values, mask, stats, center):
    x, keep, stats = as_rows(values), as_rows(mask), stats.contiguous()
    out = fresh(*x.shape)
    run("whiten_fwd_f32", *rows(x), *rows(keep), *x.shape, stats, center, out)
    return out.view(values.shape)
