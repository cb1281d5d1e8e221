"""Calls of csrc/cuda/bradley_terry.cu; what the functions mean stands in reference/bradley_terry.py."""

import torch

from .._native import DTYPES, launch
from ..reference.bradley_terry import STATS


def _outputs(scores, cu_groups):
    prompts = cu_groups.shape[0] - 1
    sizes = prompts, scores.shape[0], (prompts, len(STATS))
    return tuple(torch.empty(size, dtype=torch.float32, device=scores.device) for size in sizes)


def bradley_terry_fwd(scores, ranks, cu_groups, margins, ties_half):
    scores, outputs = scores.contiguous(), _outputs(scores, cu_groups)
    columns = 0 if margins is None or margins.dim() == 1 else margins.shape[1]
    launch(
        "bradley_terry_fwd", scores, DTYPES[scores.dtype], ranks, cu_groups, cu_groups.shape[0] - 1,
        scores.shape[0], margins, columns, ties_half, *outputs,
    )  # fmt: skip
    return outputs


def plackett_luce_fwd(scores, ranks, cu_groups):
    scores, outputs = scores.contiguous(), _outputs(scores, cu_groups)
    peaks, inverses = torch.empty_like(outputs[1]), torch.empty_like(outputs[1])
    launch(
        "plackett_luce_fwd", scores, DTYPES[scores.dtype], ranks, cu_groups, cu_groups.shape[0] - 1,
        scores.shape[0], peaks, inverses, *outputs,
    )  # fmt: skip
    return outputs


def bradley_terry_bwd(grad_loss, grad, cu_groups):
    out = torch.empty_like(grad)
    launch("bradley_terry_bwd", grad_loss.contiguous(), grad, cu_groups, cu_groups.shape[0] - 1, grad.shape[0], out)
    return out
