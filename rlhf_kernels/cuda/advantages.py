"""Calls of csrc/cuda/advantages.cu; what the functions mean stands in reference/advantages.py.

A block of the GPU walks a row, unless rows are long and too few to occupy it: then each tile of a row has a block. The
choice is made from shapes, so that nothing waits for offsets that lie on the device, and changes no bit of a row.
"""

import torch

from .._native import KL_ESTIMATORS, as_rows, dense_rows, launch, or_infinite, rows

TILE = 1024  # tokens; as in csrc/cuda/advantage_tokens.h
WHITEN_TOKENS = 4096  # of a block that whitens; as in csrc/cuda/advantages.cu
FEW_ROWS = 256  # fewer do not occupy a large GPU
LONG_ROW = 4096  # tokens that one block walks as fast as several blocks would share them


def _cut(tensor, cu_seqlens):
    """Rows, tokens of a row (0 if packed), and tiles with a block of their own (0 = none)."""
    if cu_seqlens is None:
        B, T = tensor.shape
        return B, T, B * -(-T // TILE) if B < FEW_ROWS and T > LONG_ROW else 0
    B, N = cu_seqlens.shape[0] - 1, tensor.shape[0]
    return B, 0, N // TILE + B if B < FEW_ROWS and N > LONG_ROW else 0


def _offsets(cu_seqlens):
    """The two arguments of packed rows: their offsets, and whether these are int64."""
    return (None, 0) if cu_seqlens is None else (cu_seqlens.contiguous(), cu_seqlens.dtype == torch.int64)


def _workspace(units, device):
    """What blocks tell each other: the parts of tiles, and two counters and a word for each tile."""
    parts = torch.empty((units, 2), dtype=torch.float64, device=device)
    return parts, torch.empty(units + 2, dtype=torch.int32, device=device)


def _fresh(like, count):
    return [torch.empty(like.shape, dtype=torch.float32, device=like.device) for _ in range(count)]


def gae_fwd(rewards, values, mask, gamma, lam, cu_seqlens, last_values):
    rewards, values, mask = dense_rows(rewards), dense_rows(values), dense_rows(mask)
    last_values = None if last_values is None else last_values.contiguous()
    advantages, returns = _fresh(rewards, 2)
    B, T, units = _cut(rewards, cu_seqlens)
    launch(
        "gae_fwd_f32", *rows(rewards), *rows(values), *rows(mask), last_values, *_offsets(cu_seqlens), B, T,
        rewards.numel(), gamma, lam, units, *_workspace(units, rewards.device), advantages, returns,
    )  # fmt: skip
    return advantages, returns


def rlhf_advantages_fwd(
    scores, log_probs, ref_log_probs, values, mask, kl_coef, gamma, lam, kl_estimator, reward_clip, whiten, cu_seqlens
):
    scores = scores.contiguous()
    log_probs, ref_log_probs, values, mask = (dense_rows(x) for x in (log_probs, ref_log_probs, values, mask))
    advantages, returns, rewards, kl = _fresh(log_probs, 4)
    B, T, units = _cut(log_probs, cu_seqlens)
    device, moments = log_probs.device, None
    if whiten:
        moments = torch.empty(((units or B) + 1, 3), dtype=torch.float64, device=device)
    launch(
        "rlhf_advantages_fwd_f32", scores, *rows(log_probs), *rows(ref_log_probs), *rows(values), *rows(mask),
        *_offsets(cu_seqlens), B, T, log_probs.numel(), kl_coef, gamma, lam, KL_ESTIMATORS[kl_estimator],
        or_infinite(reward_clip), units, *_workspace(units, device), moments, advantages, returns, rewards, kl,
    )  # fmt: skip
    return advantages, returns, rewards, kl


def whiten_stats_fwd(values, mask):
    x, keep = as_rows(values), as_rows(mask)
    blocks = torch.empty((-(-x.numel() // WHITEN_TOKENS), 3), dtype=torch.float64, device=x.device)
    stats = torch.empty(3, dtype=torch.float64, device=x.device)
    launch("whiten_stats_f32", *rows(x), *rows(keep), *x.shape, blocks, stats)
    return stats


def whiten_fwd(values, mask, stats, center):
    x, keep, stats = as_rows(values), as_rows(mask), stats.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    launch("whiten_fwd_f32", *rows(x), *rows(keep), *x.shape, stats, center, out)
    return out.view(values.shape)
