"""Calls of csrc/cuda/ppo.cu; what the functions mean stands in reference/ppo.py."""

import torch

from .._native import dense_fp32, launch, or_infinite
from ..reference.ppo import AGG_MODES, STATS

PIECE = 2048  # tokens of a block; this and the rest as in csrc/cuda/policy_walk.h and its headers
GROUP = 32  # pieces whose records are merged together
RECORD = 17  # numbers that a piece adds up to
COUNTING_BLOCKS = 256


def scratch(B, T, record, device):
    """What a walk over B x T tokens needs: counts, with the rows' lengths behind them; records; blocks that ended."""
    pieces = max(-(-B * T // PIECE), 1)
    groups = -(-pieces // GROUP)
    counts = torch.empty(2 * COUNTING_BLOCKS + B, dtype=torch.int64, device=device)
    records = torch.empty((pieces + groups, record), dtype=torch.float64, device=device)
    return counts, records, torch.empty(groups + 1, dtype=torch.int32, device=device)


def ppo_fwd(
    log_probs, old_log_probs, advantages, mask, values, old_values, returns, entropy, normalizer,
    cliprange, cliprange_high, dual_clip, cliprange_value, loss_agg_mode, value_scale=1.0, entropy_scale=1.0,
    vf_coef=0.0, whole=(None, None, None),
):  # fmt: skip
    """As the contract has it; `whole` takes total, policy and value loss too, if it holds tensors."""
    inputs = [dense_fp32(x) for x in (log_probs, old_log_probs, advantages)]
    optional = [dense_fp32(x) for x in (values, old_values, returns, entropy, normalizer)]
    (B, T), device = log_probs.shape, log_probs.device
    counts, records, done = scratch(B, T, RECORD, device)
    losses, stats = (torch.empty(n, dtype=torch.float32, device=device) for n in (3, len(STATS)))
    shapes = ((0,) if x is None else (B, T) for x in (log_probs, values, entropy))
    grads = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    launch(
        "ppo_fwd_f32", *inputs, mask, *optional, B, T, cliprange, cliprange_high, or_infinite(dual_clip),
        or_infinite(cliprange_value), AGG_MODES.index(loss_agg_mode), value_scale, entropy_scale, vf_coef, counts,
        counts[2 * COUNTING_BLOCKS :], records, done, losses, *whole, *grads, stats,
    )  # fmt: skip
    return losses, *grads, stats


def ppo_total_fwd(*args, vf_coef, entropy_coef):
    """Total, policy and value loss as tensors of their own, and the rest of ppo_fwd: nothing is launched after it.

    The last of args are the two scales, of which that of the entropy is -entropy_coef.
    """
    whole = [torch.empty((), dtype=torch.float32, device=args[0].device) for _ in range(3)]
    return *whole, *ppo_fwd(*args, vf_coef, whole)[1:]


def ppo_bwd(grad_loss, grad_policy_loss, grad_value_loss, grad_log_probs, grad_values, grad_entropy, vf_coef):
    grads = grad_log_probs, grad_values, grad_entropy
    products = [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in grads]
    launch(
        "ppo_bwd_f32", grad_loss, grad_policy_loss, grad_value_loss, vf_coef, *grads, *(x.numel() for x in grads),
        *products,
    )  # fmt: skip
    return tuple(products)
