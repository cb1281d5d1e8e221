"""Cross-entropy from the log-probs of logits and of hidden states; reference/cross_entropy.py defines the functions."""

from __future__ import annotations

import torch

from .._native import dense_rows
from ..reference.cross_entropy import FromLogits
from . import logprobs
from .linear import operators


def logits_sums(logits, labels, temperature, softcap, ignore_index):
    rows = dense_rows(logits)
    total, count = torch.zeros(2, rows.shape[0], dtype=torch.float64, device="cpu").unbind()
    logprobs.add_row_sums(rows, None, temperature, softcap, labels != ignore_index, total, count)
    return total, count


_functions = FromLogits(logprobs.logprobs_fwd, logprobs.logprobs_bwd, logits_sums)
cross_entropy_fwd = _functions.cross_entropy_fwd
cross_entropy_bwd = _functions.cross_entropy_bwd
linear_cross_entropy_fwd = operators.linear_cross_entropy_fwd
linear_cross_entropy_each_fwd = operators.linear_cross_entropy_each_fwd
