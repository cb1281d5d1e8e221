"""Calls of csrc/cuda/bradley_terry.cu; what the functions mean stands in reference/bradley_terry.py."""

import torch

from .._native import DTYPES, dense_fp32, launch
from ..reference.bradley_terry import KINDS, METRICS, STATS

RECORD = 10  # numbers that a block's prompts add up to; this and the rest as in csrc/cuda/prompts.h
PROMPTS = 8  # of a block, if they are small
BLOCKS = 1056


def _outputs(scores, cu_groups):
    prompts = cu_groups.shape[0] - 1
    sizes = prompts, scores.shape[0], (prompts, len(STATS))
    return tuple(torch.empty(size, dtype=torch.float32, device=scores.device) for size in sizes)


def _margin_columns(margins):
    return 0 if margins is None or margins.dim() == 1 else margins.shape[1]


def bradley_terry_fwd(scores, ranks, cu_groups, margins, ties_half):
    scores, outputs, columns = scores.contiguous(), _outputs(scores, cu_groups), _margin_columns(margins)
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


def ranking_fwd(scores, ranks, cu_groups, columns, prompts, margins, kind, number, normalizer):
    scores, responses = scores.contiguous(), scores.shape[0]

    def new(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device=scores.device)

    work = [new(responses), new(responses)] if kind == "choices" else [None, None]
    records = new(max(-(-prompts // PROMPTS), min(prompts, BLOCKS), 1), RECORD, dtype=torch.float64)
    value, grad, metrics = new(), new(responses), new(len(METRICS))
    launch(
        "ranking_fwd", scores, DTYPES[scores.dtype], ranks, cu_groups, columns, prompts, responses, margins,
        _margin_columns(margins), KINDS.index(kind), dense_fp32(normalizer), number, *work, records,
        new(1, dtype=torch.int32), value, grad, metrics,
    )  # fmt: skip
    return value, grad, metrics


def ranking_bwd(grad_value, grad, divisor):
    out = torch.empty_like(grad)
    launch("ranking_bwd", dense_fp32(grad_value), divisor, grad, grad.shape[0], out)
    return out
