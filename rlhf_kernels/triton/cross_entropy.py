"""Cross-entropy from the log-probs of logits and of hidden states; reference/cross_entropy.py defines the functions."""

from __future__ import annotations

import torch

from ..reference.cross_entropy import FromLogits
from . import logprobs
from ._launch import rows_of
from ._row_sums import add_row_sums
from .linear import operators


def logits_sums(logits, labels, temperature, softcap, ignore_index):
    rows = rows_of(logits)
    total, count = torch.zeros(2, rows.shape[0], dtype=torch.float64, device=rows.device).unbind()
    add_row_sums(
        rows, rows.stride(0), None, None, 1.0 / temperature, softcap or 0.0, *rows.shape, labels != ignore_index, total,
        count, SCALED=temperature != 1.0, CAPPED=softcap is not None,
    )  # fmt: skip
    return total, count


_functions = FromLogits(logprobs.logprobs_fwd, logprobs.logprobs_bwd, logits_sums)
cross_entropy_fwd = _functions.cross_entropy_fwd
cross_entropy_bwd = _functions.cross_entropy_bwd
linear_cross_entropy_fwd = operators.linear_cross_entropy_fwd
linear_cross_entropy_each_fwd = operators.linear_cross_entropy_each_fwd
