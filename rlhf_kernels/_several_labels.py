"""Log-probs of K labels a row, [..., K], from one read of the row: what `logprobs_fwd` and `logprobs_bwd` do then.

A backend's own functions take one label a row. Of K, one stands for the row, which says whether it is read; the
backend gives the row's statistics and, backwards, -p (g + h (log p + entropy)) of every entry, where g is the sum of
the labels' gradients. What is left are K numbers a row: log p_k = (z_k - max) - log sum, with z as the backend computes
it, because it is that of rows of one entry; and the gradients at the labels, written over those of the backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference.logprobs import label_state

PAIRS = 1 << 24  # pairs of labels that are compared at a time


def row_label(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """[...] of labels [..., K]: one that is outside [0, vocab), else the first one that counts, else ignore_index."""
    if labels.shape[-1] == 0:
        return labels.new_full(labels.shape[:-1], ignore_index)
    kept, outside, _ = label_state(labels, vocab, ignore_index)
    best = (kept.to(torch.int8) + outside.to(torch.int8)).argmax(-1, keepdim=True)
    return labels.gather(-1, best).squeeze(-1)


def _entries(backend, logits, labels, temperatures, temperature, softcap, ignore_index):
    """(x, z) of the labels' logits, each [..., K], in fp32 or fp64; of a label that does not count, anything."""
    safe = label_state(labels, logits.shape[-1], ignore_index)[2]
    x = logits.gather(-1, safe)
    heat = None if temperatures is None else temperatures.view(*x.shape[:-1], 1).expand(x.shape).reshape(-1)
    z = backend.logprobs_fwd(x.unsqueeze(-1), None, heat, temperature, softcap, ignore_index, False)[2]
    return x.to(z.dtype), z


def forward(backend, logits, labels, temperatures, temperature, softcap, ignore_index, with_entropy):
    """As a backend's `logprobs_fwd`, but labels and log-probs are [..., K]."""
    scale = (temperatures, temperature, softcap, ignore_index)
    one = row_label(labels, logits.shape[-1], ignore_index)
    _, entropy, row_max, log_sum = backend.logprobs_fwd(logits, one, *scale, with_entropy)
    z = _entries(backend, logits, labels, *scale)[1]
    nothing = (row_max == -torch.inf).unsqueeze(-1)
    log_p = torch.where(nothing, z, z - row_max.unsqueeze(-1)) - log_sum.unsqueeze(-1)
    return torch.where(labels == ignore_index, 0.0, log_p), entropy, row_max, log_sum


def _shares(labels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """For each label [N, K], the sum of the gradients [N, K] of labels that are the same, and of those that are not."""
    same, others = torch.empty_like(grad), torch.empty_like(grad)
    step = max(1, PAIRS // max(labels.shape[1] ** 2, 1))
    for start in range(0, labels.shape[0], step):
        part = slice(start, start + step)
        alike = labels[part].unsqueeze(-1) == labels[part].unsqueeze(-2)
        for out, chosen in ((same, alike), (others, ~alike)):
            out[part] = torch.where(chosen, grad[part].unsqueeze(-2), 0.0).sum(-1)
    return same, others


def backward(
    backend, grad_logprobs, grad_entropy, logits, labels, temperatures, logprobs, entropy, row_max, log_sum,
    temperature, softcap, ignore_index, inplace=False,
):  # fmt: skip
    """As a backend's `logprobs_bwd`, but labels, log-probs and their gradient are [..., K]."""
    vocab, size = logits.shape[-1], labels.shape[-1]
    kept, outside, safe = label_state(labels, vocab, ignore_index)
    one = row_label(labels, vocab, ignore_index)
    scale, total = (temperatures, temperature, softcap, ignore_index), None
    if grad_logprobs is not None and size > 0:
        grad = torch.where(kept, grad_logprobs.to(logprobs.dtype), 0.0)
        total = grad.sum(-1)
        at_labels = _at_labels(backend, grad, grad_entropy, logits, labels, logprobs, entropy, *scale)
    out = backend.logprobs_bwd(
        total, grad_entropy, logits, one, temperatures, torch.zeros_like(row_max), entropy, row_max, log_sum,
        temperature, softcap, ignore_index, inplace,
    )  # fmt: skip
    if total is None:
        return out
    # Labels that do not count write what the row's own label writes, rows that do not count 0.
    counts = (one != ignore_index).unsqueeze(-1)
    first = (labels == one.unsqueeze(-1)).to(torch.int8).argmax(-1, keepdim=True)
    at_labels = torch.where(kept, at_labels, torch.where(counts, at_labels.gather(-1, first), 0.0))
    at_labels = at_labels.masked_fill(outside.any(-1, keepdim=True), torch.nan)
    places = torch.where(kept & ~outside, safe, safe.gather(-1, first))
    return out.scatter_(-1, places, at_labels.to(out.dtype))


def _at_labels(
    backend, grad, grad_entropy, logits, labels, logprobs, entropy, temperatures, temperature, softcap, ignore_index
):
    """d/dlogits [..., K] at the labels: g (1 - p) - p g' - h p (log p + entropy), g' of the row's other labels."""
    x, z = _entries(backend, logits, labels, temperatures, temperature, softcap, ignore_index)
    rows = labels.shape[:-1].numel()
    own, others = (share.view(labels.shape) for share in _shares(labels.reshape(rows, -1), grad.reshape(rows, -1)))
    p = torch.exp(logprobs)
    d = -own * torch.expm1(logprobs) - p * others
    if grad_entropy is not None:
        surprise = torch.where(p == 0.0, 0.0, logprobs) + entropy.unsqueeze(-1)
        d = d - torch.where(p == 0.0, 0.0, grad_entropy.unsqueeze(-1) * p * surprise)
    heat = temperature if temperatures is None else temperatures.to(x.dtype).view(*x.shape[:-1], 1)
    slope = 1.0 / heat if softcap is None else (1.0 - torch.tanh(x / softcap).square()) / heat
    return torch.where(z == -torch.inf, 0.0, d * slope)
