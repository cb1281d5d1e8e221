"""What trainers log of a token beside its log-prob, from the same read: from logits and from hidden states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _statistics_ops as ops
from ._checks import check_index, check_mask, check_same_device, check_shape
from ._linear_checks import check_execution, check_head, check_labels, check_lora, check_scale
from .logprobs import check_logits


class TokenStatistics(NamedTuple):
    """Of each token, in the shape of its labels; fp32 (fp64 for fp64 inputs), in nats.

    log_probs: log p of the label, <= 0. Differentiable.
    entropy: -sum p log p of the row, between 0 and log V. Differentiable.
    log_sum_exp: log sum exp(z).
    log_sum_sq_probs: log sum p^2, between -log V and 0: minus the Renyi entropy of order 2; WPO weighs pairs by it.
    mean_logit: mean of the entries z of the row that are not -inf; -inf if there is none.
    is_top1: bool, whether the label is the first of the row's largest entries.
    """

    log_probs: Tensor
    entropy: Tensor
    log_sum_exp: Tensor
    log_sum_sq_probs: Tensor
    mean_logit: Tensor
    is_top1: Tensor


def _results(found, shape):
    log_probs, entropy, row_max, log_sum, *more = found
    return TokenStatistics(*(x.view(shape) for x in (log_probs, entropy, row_max + log_sum, *more)))


def token_statistics_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_mask: Tensor | None = None,
) -> TokenStatistics:
    """Log-prob, entropy, log-sum-exp, log sum p^2, mean logit and whether the label is the most likely, in one read.

    z = softcap * tanh(logits / softcap) / temperature and log p = z - log sum exp(z), as in `logprobs_from_logits`.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64; any strides.
        labels: [...] int64|int32 in [0, V), or ignore_index.
        temperature: > 0, divides the logits after the softcap; default 1.0; or a tensor [...], one for each row.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label that does not count, default -100: 0 and False, no gradient, the logits may be NaN.
        row_mask: [...] bool or integer, 1 = keep, or None, the default; rows under 0 are as those of ignore_index.
    Returns:
        `TokenStatistics`, each in the shape of labels. Log-probs and entropy are differentiable in logits and may be
        written in place; the others are for reading.
    Raises:
        ValueError: as `logprobs_from_logits`.
    Cost: reads the logits once, and once more in the backward, which writes their gradient; no host sync.
    Example:
        >>> import torch
        >>> found = token_statistics_from_logits(torch.log(torch.tensor([[0.5, 0.25, 0.25]])), torch.tensor([0]))
        >>> found.log_sum_sq_probs.exp(), found.is_top1
        (tensor([0.3750]), tensor([True]))
    """
    check_logits("logits", logits)
    labels, rows = check_index("labels", labels), tuple(logits.shape[:-1])
    check_shape("labels", labels, rows, "the shape of logits without its last dimension")
    check_same_device(logits=logits, labels=labels, row_mask=row_mask)
    if row_mask is not None:
        labels = torch.where(check_mask("row_mask", row_mask, rows), labels, ignore_index)
    scale = check_scale(temperature, softcap, labels)
    return _results(ops.token_statistics(logits, labels, *scale, ignore_index), rows)


def linear_token_statistics(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    precision: str = "exact",
    process_group=None,
    vocab_start_index: int = 0,
) -> TokenStatistics:
    """The same as `token_statistics_from_logits` from hidden states and the LM head, without the [N, V] logits.

    Args:
        hidden_states: [N, H], or [..., H] without rows; fp32, bf16, fp16 or fp64.
        weight: [V, H], the LM head; see `linear_logprobs`.
        labels: [N] (or [...]) int64|int32, or [M] with rows; in [0, V) of the whole vocabulary, or ignore_index.
        rows: [M] int64|int32 in [0, N), the row of hidden_states that predicts each label; None, the default: row i
            predicts label i.
        bias: [V], or None, the default; entries of -inf ban tokens.
        lora: (A [r, H], B [V, r], scaling) of a LoRA layer on the head, as in `linear_logprobs`, default None.
        temperature: > 0, default 1.0; or a tensor in the shape of labels, one for each, which is not differentiated.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label of rows that do not count, default -100: 0 and False, no gradient, hidden states may be NaN.
        chunk_size, precision, process_group, vocab_start_index: as in `linear_logprobs`.
    Returns:
        `TokenStatistics`, each in the shape of labels. Log-probs and entropy are differentiable in hidden_states,
        weight, bias, A and B and may be written in place; the others are for reading.
    Raises:
        ValueError: as `linear_logprobs`.
    Cost: as `linear_logprobs` with return_entropy; what is added reads no memory of its own.
    Example:
        >>> import torch
        >>> hidden, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.7346, 0.0]])
        >>> linear_token_statistics(hidden, head, torch.tensor([1])).is_top1
        tensor([True])
    """
    hidden, weight, bias = check_head(hidden_states, weight, bias)
    flat_labels, rows = check_labels(labels, rows, hidden_states)
    temperatures, temperature, softcap = check_scale(temperature, softcap, labels)
    execution = check_execution(chunk_size, precision, process_group, vocab_start_index)
    low, up = check_lora(lora, hidden, weight, flat_labels != ignore_index, rows)
    found = ops.linear_token_statistics(
        hidden, weight, flat_labels, rows, bias, temperatures, low, up, temperature, softcap, ignore_index, *execution
    )
    return _results(found, labels.shape)
