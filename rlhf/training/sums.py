"""Sums of the log-probs of a batch's responses: one by one, and in pairs of chosen and rejected."""

import torch

from ..models.sequences import aligned_log_probs
from .batches import batch_inputs, response_log_probs


def sums(model, batch):
    """[S] fp32, differentiable: the summed log-prob of each response of a batch."""
    return of_responses(response_log_probs(model, batch), batch)


def of_responses(tokens, batch):
    """Sum over each response's tokens [S]."""
    return torch.segment_reduce(tokens, "sum", lengths=batch["cu_responses"].diff())


def pair_log_probs(model, batch, ld_alpha=None):
    """Summed log-probs [N, 2] fp32 (chosen, rejected), differentiable, and the token counts [N, 2].

    Args:
        ld_alpha: how much a token beyond the shorter response of its pair counts; None: as any other.
    """
    return in_pairs(response_log_probs(model, batch), batch, ld_alpha)


def weighted_pairs(model, batch, ld_alpha=None):
    """As `pair_log_probs`, and the weight [N] of each pair in WPO."""
    log_probs, aligned = aligned_log_probs(model, batch_inputs(batch), batch["labels"], batch["label_rows"])
    summed, lengths = in_pairs(log_probs, batch, ld_alpha)
    mean = of_responses(aligned, batch).view(-1, 2) / lengths
    return summed, lengths, mean.exp().prod(1)


def in_pairs(log_probs, batch, ld_alpha):
    """Sums of the tokens' log-probs [N, 2] and counts of tokens [N, 2]."""
    lengths = batch["cu_responses"].diff()
    if ld_alpha is not None:
        shared = lengths.view(-1, 2).amin(1).repeat_interleave(2)
        first = torch.repeat_interleave(batch["cu_responses"][:-1] + shared, lengths)  # of those beyond
        beyond = torch.arange(len(log_probs), device=log_probs.device) >= first
        log_probs = torch.where(beyond, ld_alpha * log_probs, log_probs)
    return of_responses(log_probs, batch).view(-1, 2), lengths.view(-1, 2)
