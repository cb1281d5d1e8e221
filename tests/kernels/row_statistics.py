"""Token statistics in float64, written down as the words say."""

import math

import torch


def expected_statistics(logits, labels, temperature=1.0, softcap=None):
    """{field of rlhf_kernels.TokenStatistics: [...]} of logits [..., V] in float64; differentiable."""
    kept, labels = labels != -100, labels.clamp(min=0)
    logits = torch.where(kept.unsqueeze(-1), logits, 0.0)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double().unsqueeze(-1)
    banned = logits == -math.inf
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z = (z / temperature).masked_fill(banned, -math.inf)
    dead = banned.all(-1)
    safe = torch.where(dead.unsqueeze(-1), 0.0, z)
    log_p = torch.log_softmax(safe, -1)
    p = log_p.exp()
    own = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    found = {
        "log_probs": torch.where(dead, -math.inf, own),
        "entropy": torch.where(dead, 0.0, -(p * torch.where(banned, 0.0, log_p)).sum(-1)),
        "log_sum_exp": torch.where(dead, -math.inf, torch.logsumexp(safe, -1)),
        "log_sum_sq_probs": torch.where(dead, -math.inf, p.square().sum(-1).log()),
        "mean_logit": torch.where(dead, -math.inf, torch.where(banned, 0.0, z).sum(-1) / (~banned).sum(-1)),
    }
    found = {name: torch.where(kept, x, 0.0) for name, x in found.items()}
    first = (z == z.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)
    return {**found, "is_top1": kept & ~dead & (first == labels)}
