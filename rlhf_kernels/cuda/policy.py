"""Calls of csrc/cuda/policy.cu; what the functions mean stands in reference/policy.py."""

import torch

from .._native import dense_fp32, launch
from ..reference.policy import STATS
from .ppo import COUNTING_BLOCKS, ppo_bwd, scratch

RECORD = 25  # numbers that a piece adds up to; as in csrc/cuda/policy_totals.h
_OF_POLICY = ("log_probs", "old_log_probs", "advantages", "ref_log_probs", "weights", "coefficients", "entropy")
_OF_VALUES = ("values", "old_values", "returns")

policy_bwd = ppo_bwd


def policy_fwd(tensors, settings):
    if tensors.log_probs is None or tensors.values is None:
        return _walk(tensors, settings)
    losses, grad_log_probs, _, grad_entropy, stats = _walk(tensors._replace(**dict.fromkeys(_OF_VALUES)), settings)
    value_losses, _, grad_values, _, value_stats = _walk(tensors._replace(**dict.fromkeys(_OF_POLICY)), settings)
    value_stats[STATS.index("tokens")] = 0
    return losses + value_losses, grad_log_probs, grad_values, grad_entropy, stats + value_stats


def policy_total_fwd(tensors, settings):
    """The loss, and the results of policy_fwd where there is a policy, or there are values, and not both."""
    loss = torch.empty((), dtype=torch.float32, device=tensors.mask.device)
    return loss, *_walk(tensors, settings, loss)


def _walk(t, settings, loss=None):
    """The results where there is a policy, or there are values, and not both; fills `loss`."""
    inputs = [dense_fp32(x) for x in t[1:]]
    (B, T), device = t.mask.shape, t.mask.device
    counts, records, done = scratch(B, T, RECORD, device)
    parts = torch.empty(2 * B if settings.by_sequence else 0, dtype=torch.float32, device=device)
    losses, stats = (torch.empty(n, dtype=torch.float32, device=device) for n in (4, len(STATS)))
    shapes = ((0,) if x is None else (B, T) for x in (t.log_probs, t.values, t.entropy))
    grads = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    launch(
        "policy_fwd_f32", t.mask, *inputs, B, T, *settings, counts, counts[2 * COUNTING_BLOCKS :], parts, records, done,
        losses, loss, *grads, stats,
    )  # fmt: skip
    return losses, *grads, stats
