"""Calls of csrc/cpu/policy.cpp; what the functions mean stands in reference/policy.py."""

import torch

from .._native import dense_fp32, fresh, run
from ..reference.policy import STATS

PIECE = 16384  # tokens of which a thread takes one lot at a time, about 20 us of work
TOTALS = 33  # numbers that the kernel keeps of each piece


def policy_fwd(tensors, settings):
    mask, *inputs = tensors
    inputs = [dense_fp32(x) for x in inputs]
    B, T = mask.shape
    workspace = fresh((B * T + PIECE - 1) // PIECE * TOTALS, dtype=torch.float64)
    sequences = fresh(2 * B) if settings.by_sequence and tensors.log_probs is not None else None
    losses, stats = fresh(4), fresh(len(STATS))
    grads = [fresh(0) if x is None else fresh(B, T) for x in (tensors.log_probs, tensors.values, tensors.entropy)]
    run(
        "policy_fwd_f32", mask, *inputs, torch.tensor(settings, dtype=torch.float64, device="cpu"), B, T, PIECE,
        fresh(B, dtype=torch.int64), sequences, workspace, losses, *grads, stats,
    )  # fmt: skip
    return losses, *grads, stats


def policy_bwd(grad_loss, grad_policy_loss, grad_value_loss, grad_log_probs, grad_values, grad_entropy, vf_coef):
    grads = grad_log_probs, grad_values, grad_entropy
    products = [fresh(*x.shape) for x in grads]
    run(
        "policy_bwd_f32", grad_loss, grad_policy_loss, grad_value_loss, vf_coef, *grads, *(x.numel() for x in grads),
        *products,
    )  # fmt: skip
    return tuple(products)
