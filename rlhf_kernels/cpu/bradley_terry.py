"""Calls of csrc/cpu/bradley_terry.cpp; what the functions mean stands in reference/bradley_terry.py."""

import torch

from .._native import fresh, run
from ..reference.bradley_terry import STATS


def _outputs(scores, cu_groups):
    prompts = cu_groups.shape[0] - 1
    return fresh(prompts), fresh(scores.shape[0]), fresh(prompts, len(STATS))


def bradley_terry_fwd(scores, ranks, cu_groups, margins, ties_half):
    scores = scores.to(torch.float32).contiguous()
    loss, grad, stats = _outputs(scores, cu_groups)
    columns = 0 if margins is None or margins.dim() == 1 else margins.shape[1]
    run(
        "bradley_terry_fwd_f32", scores, ranks, cu_groups, cu_groups.shape[0] - 1, margins, columns, ties_half,
        loss, grad, stats,
    )  # fmt: skip
    return loss, grad, stats


def plackett_luce_fwd(scores, ranks, cu_groups):
    scores = scores.to(torch.float32).contiguous()
    loss, grad, stats = _outputs(scores, cu_groups)
    run("plackett_luce_fwd_f32", scores, ranks, cu_groups, cu_groups.shape[0] - 1, loss, grad, stats)
    return loss, grad, stats


def bradley_terry_bwd(grad_loss, grad, cu_groups):
    out = torch.empty_like(grad)
    run("bradley_terry_bwd_f32", grad_loss.contiguous(), grad, cu_groups, cu_groups.shape[0] - 1, out)
    return out
