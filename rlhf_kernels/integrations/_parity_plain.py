"""What the comparisons of `rlhf_kernels.parity` share: inputs, and the losses written down plainly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * scale


def selected(logits, labels, temperature=1.0):
    """The labels' log-probs."""
    return (torch.log_softmax(logits / temperature, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1),)


def entropy(logits):
    log_p = torch.log_softmax(logits, -1)
    return (-(log_p.exp() * log_p).sum(-1),)


def head(hidden, weight, labels, temperature=1.0, softcap=None):
    """Log-probs, entropy, log sum p^2, mean logit and top-1 of the labels; the logits are [rows, vocab]."""
    logits = hidden @ weight.t()
    z = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    log_p = torch.log_softmax(z, -1)
    more = (2 * log_p.detach()).logsumexp(-1), z.detach().mean(-1), (z.argmax(-1) == labels).to(z.dtype)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1), *more


def problem(generator, shape, dtype, device):
    """Hidden states [rows, hidden], a head whose logits have a standard deviation of 2, and labels [rows]."""
    hidden = normal(generator, shape.rows, shape.hidden).to(dtype).to(device)
    weight = normal(generator, shape.vocab, shape.hidden, scale=2.0 / shape.hidden**0.5).to(dtype).to(device)
    labels = torch.randint(0, shape.vocab, (shape.rows,), generator=generator, dtype=torch.int64, device="cpu")
    return hidden, weight, labels.to(device)


def mean_of(x, mask):
    return (x * mask).sum() / mask.sum()


def clipped(new, old, advantages, mask, dual=None):
    """The mean of PPO's clipped loss at 0.2, with the bound of the loss of negative advantages."""
    ratio = torch.exp(new - old)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)
    return (mean_of(loss, mask),)


def value(values, old, returns, mask):
    """Half the mean of the clipped square at 0.2."""
    held = old + (values - old).clamp(-0.2, 0.2)
    return (0.5 * mean_of(torch.maximum((values - returns).square(), (held - returns).square()), mask),)


def k3(new, ref):
    return (torch.exp(ref - new) - 1 - (ref - new),)


def gae(rewards, values, gamma, lam):
    """(advantages, returns) [B, T], without a mask."""
    found, ahead = [], torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        later = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(ahead)
        ahead = rewards[:, t] + gamma * later - values[:, t] + gamma * lam * ahead
        found.append(ahead)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values


class Tokens(NamedTuple):
    """Numbers of [B, T] tokens as a trainer holds them; the mask is fp32, right-padded."""

    new: Tensor
    old: Tensor
    ref: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    mask: Tensor


def tokens(generator: torch.Generator, rows: int, device: torch.device) -> Tokens:
    """About so many tokens, at most 128 a sequence."""
    length = min(rows, 128)
    shape = max(rows // length, 2), length
    old = -normal(generator, *shape).abs()
    found = [old + 0.3 * normal(generator, *shape), old, old + 0.2 * normal(generator, *shape)]
    found += [normal(generator, *shape) for _ in range(3)]
    lengths = torch.randint(1, length + 1, (shape[0], 1), generator=generator, dtype=torch.int64, device="cpu")
    mask = torch.arange(length, dtype=torch.int64, device="cpu") < lengths
    return Tokens(*(x.to(device) for x in (*found, mask.to(torch.float32))))
