"""Calls of csrc/cpu/preference.cpp; what the functions mean stands in reference/preference.py."""

import torch

from .._native import fresh, run
from ..reference.preference import LOSS_TYPES


def preference_fwd(
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, kl, loss_type, beta, label_smoothing,
    target_margin, chosen_weight, rejected_weight,
):  # fmt: skip
    tensors = [
        None if x is None else x.to(torch.float32).contiguous()
        for x in (chosen, rejected, ref_chosen, ref_rejected, kl)
    ]
    *log_probs, kl = tensors
    lengths = [None if x is None else x.contiguous() for x in (chosen_lengths, rejected_lengths)]
    C, R = chosen.shape[0], rejected.shape[0]
    loss = fresh(C + R if loss_type == "kto" else C)
    outputs = (loss, fresh(C), fresh(R), fresh(C), fresh(R))
    margin = target_margin if loss_type == "simpo" else 0.0
    run(
        "preference_fwd_f32", *log_probs, *lengths, C, R, LOSS_TYPES.index(loss_type), kl, beta, label_smoothing,
        margin, chosen_weight, rejected_weight, *outputs,
    )  # fmt: skip
    return outputs


def preference_bwd(grad_loss, grad_chosen, grad_rejected):
    C, R = grad_chosen.shape[0], grad_rejected.shape[0]
    grad_loss, *saved = (x.contiguous() for x in (grad_loss, grad_chosen, grad_rejected))
    upstream = grad_loss.split((C, R)) if grad_loss.shape[0] == C + R else (grad_loss, grad_loss)
    out = fresh(C), fresh(R)
    run("preference_bwd_f32", *upstream, *saved, C, R, *out)
    return out
