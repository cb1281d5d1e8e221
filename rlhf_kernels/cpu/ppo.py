"""Calls of csrc/cpu/ppo.cpp; what the functions mean stands in reference/ppo.py."""

import torch

from .._native import dense_fp32, fresh, or_infinite, run
from ..reference.ppo import AGG_MODES, STATS

PIECE = 16384  # tokens of which a thread takes one lot at a time, about 20 us of work
TOTALS = 25  # numbers that the kernel keeps of each piece


def ppo_fwd(
    log_probs, old_log_probs, advantages, mask, values, old_values, returns, entropy, normalizer,
    cliprange, cliprange_high, dual_clip, cliprange_value, loss_agg_mode, value_scale=1.0, entropy_scale=1.0,
):  # fmt: skip
    inputs = [dense_fp32(x) for x in (log_probs, old_log_probs, advantages)]
    optional = [dense_fp32(x) for x in (values, old_values, returns, entropy, normalizer)]
    B, T = log_probs.shape
    lengths = fresh(B, dtype=torch.int64)
    workspace = fresh((B * T + PIECE - 1) // PIECE * TOTALS, dtype=torch.float64)
    losses, stats = fresh(3), fresh(len(STATS))
    grads = [fresh(0) if x is None else fresh(B, T) for x in (log_probs, values, entropy)]
    run(
        "ppo_fwd_f32", *inputs, mask, *optional, B, T, cliprange, cliprange_high, or_infinite(dual_clip),
        or_infinite(cliprange_value), AGG_MODES.index(loss_agg_mode), value_scale, entropy_scale, PIECE, lengths,
        workspace, losses, *grads, stats,
    )  # fmt: skip
    return losses, *grads, stats


def ppo_bwd(grad_loss, grad_policy_loss, grad_value_loss, grad_log_probs, grad_values, grad_entropy, vf_coef):
    grads = grad_log_probs, grad_values, grad_entropy
    products = [fresh(*x.shape) for x in grads]
    run(
        "ppo_bwd_f32", grad_loss, grad_policy_loss, grad_value_loss, vf_coef, *grads, *(x.numel() for x in grads),
        *products,
    )  # fmt: skip
    return tuple(products)
