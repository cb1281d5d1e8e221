"""KL divergences: exact, between rows of two sets of logits, and estimated from log-probs of samples.

Exact, with p = softmax(logits / temperature) and q = softmax(ref_logits / temperature):

    reverse: KL(p || q) = sum_j p_j (log p_j - log q_j)      forward: KL(q || p) = sum_j q_j (log q_j - log p_j)

    d KL(a || b) / d logits of a = a_j (log a_j - log b_j - KL)       d KL(a || b) / d logits of b = b_j - a_j

Where both are above a half, b_j - a_j is (b_j - 1) - (a_j - 1): next to 1 the difference keeps its digits. Entries with
a_j = 0 add 0. Where a_j > 0 = b_j the divergence is +inf, and the row gets no gradient.

Estimated from a token sampled from p, with d = log p - log q: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. The means
of k1 and k3 under p are KL(p || q) exactly; k2's is close where p and q are.
"""

import math

import torch
import torch.distributed as dist

from .._planes import blocks, planes
from . import logprobs
from .logprobs import accumulator_dtype, finish_statistics, partial_statistics, raised, whole_rest

CASES = ("small", "batched", "masked_logits", "warm", "wide", "one_entry", "empty")


def row_statistics(z):
    """(maximum, log of sum exp(z - maximum)) of rows z [..., V]; (-inf, 0) for nothing but -inf."""
    row_max, rest, _ = partial_statistics(z, False)
    return row_max, finish_statistics(row_max, rest, None, None)[2]


def log_softmax_rows(z, statistics=None):
    """(log p, p) of rows z [..., V] with their gradient; log p is 0 where p = 0, so that products stay finite."""
    banned = z == -math.inf
    row_max, log_sum = row_statistics(z) if statistics is None else statistics
    shift = torch.where(row_max == -math.inf, 0.0, row_max)
    log_p = torch.where(banned, 0.0, z - shift.unsqueeze(-1) - log_sum.unsqueeze(-1))
    return log_p, torch.where(banned, 0.0, torch.exp(log_p))


def divergence(z_a, z_b, statistics_a=None, statistics_b=None):
    """KL(a || b) of rows of scaled logits [..., V], and what its gradients need: (kl, log a, a, log b, b)."""
    log_a, a = log_softmax_rows(z_a, statistics_a)
    log_b, b = log_softmax_rows(z_b, statistics_b)
    impossible = ((z_b == -math.inf) & (z_a != -math.inf)).any(-1)
    kl = torch.clamp((a * (log_a - log_b)).sum(-1), min=0.0)
    return torch.where(impossible, math.inf, kl), log_a, a, log_b, b


def divergence_gradient(grad, z_a, z_b, kl=None, statistics_a=None, statistics_b=None):
    """(d/dz_a, d/dz_b) of grad * KL(a || b); both are 0 in rows whose divergence is infinite.

    kl and the statistics may be those of longer rows, of which z_a and z_b are some columns.
    """
    again, log_a, a, log_b, b = divergence(z_a, z_b, statistics_a, statistics_b)
    kl = again if kl is None else kl
    infinite = (kl == math.inf).unsqueeze(-1)
    grad = grad.unsqueeze(-1)
    d_a = torch.where(infinite, 0.0, grad * (a * (log_a - log_b - kl.unsqueeze(-1))))
    row_max = z_a.amax(-1) if statistics_a is None else statistics_a[0]
    nothing = (row_max == -math.inf).unsqueeze(-1)
    likely = (a > 0.5) & (b > 0.5)
    more = torch.where(likely, torch.expm1(log_b) - torch.expm1(log_a), b - a)
    d_b = torch.where(infinite | nothing | (z_b == -math.inf), 0.0, grad * more)
    return torch.where(z_a == -math.inf, 0.0, d_a), d_b


def merge_divergence(results, group, temperature=1.0):
    """(KL(a || b), max and log sum of a, the same two of b) [n] over the columns of all ranks, from those of each rank.

    The maxima are of z times `temperature`. With d = z - max z and e = exp(d), KL + log s_a - log s_b is
    (sum e_a (d_a - d_b)) / s_a, in a shard and in the whole row; told from the whole row's maxima these sums add up.
    """
    if group is None:
        return results
    kl, max_a, log_sum_a, max_b, log_sum_b = (x.double() for x in results)
    highest = torch.stack((max_a, max_b))
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    maxima, rests = torch.stack((max_a, max_b)), torch.expm1(torch.stack((log_sum_a, log_sum_b)))
    joined, tops, falls = raised(maxima / temperature, rests, highest / temperature)
    sum_a = torch.where(max_a == -math.inf, rests[0], 1.0 + rests[0])
    gap = sum_a * (kl + log_sum_a - log_sum_b + falls[0] - falls[1])
    gap = torch.where(kl == math.inf, kl, torch.exp(falls[0]) * gap)
    sums = torch.cat((joined, tops, gap.unsqueeze(0)))
    dist.all_reduce(sums, group=group)
    rest_a, rest_b = whole_rest(sums[:2], sums[2:4])
    log_sum_a, log_sum_b = torch.log1p(rest_a), torch.log1p(rest_b)
    kl = torch.clamp(sums[4] / (1.0 + rest_a) - (log_sum_a - log_sum_b), min=0.0)
    kl = torch.where(highest[0] == -math.inf, sums[4], kl)
    merged = (kl, highest[0], log_sum_a, highest[1], log_sum_b)
    return tuple(x.to(old.dtype) for x, old in zip(merged, results, strict=True))


def kl_divergence(logits, ref_logits, *, temperature=1.0, direction="reverse"):
    """The definition, differentiable by autograd: [...] fp32 or fp64, in nats."""
    dtype = accumulator_dtype(logits, ref_logits)
    z_p = (logits.to(dtype) / temperature).masked_fill(logits == -math.inf, -math.inf)
    z_q = (ref_logits.to(dtype) / temperature).masked_fill(ref_logits == -math.inf, -math.inf)
    return divergence(z_p, z_q)[0] if direction == "reverse" else divergence(z_q, z_p)[0]


def _blocks(logits, ref_logits):
    """(rows of the block, the policy's logits [n, V], the reference's), block by block, in fp32 or fp64."""
    dtype = accumulator_dtype(logits, ref_logits)
    vocab = logits.shape[-1]
    sides = planes(logits, ref_logits)
    for part, place in blocks(sides[0], logprobs.BLOCK_ELEMENTS):
        yield part, *(x[place].reshape(-1, vocab).to(dtype) for x in sides)


def kl_fwd(logits, ref_logits, temperature, reverse):
    """(exact KL, the policy's largest logit and log of its row's sum, the same two of the reference), each [...]."""
    shape, dtype = logits.shape[:-1], accumulator_dtype(logits, ref_logits)
    out = [logits.new_zeros(shape, dtype=dtype) for _ in range(5)]
    for part, *sides in _blocks(logits, ref_logits):
        z_p, z_q = (x / temperature for x in sides)
        p, q = row_statistics(z_p), row_statistics(z_q)
        kl = divergence(z_p, z_q, p, q)[0] if reverse else divergence(z_q, z_p, q, p)[0]
        results = (kl, sides[0].amax(-1), p[1], sides[1].amax(-1), q[1])
        for target, value in zip(out, results, strict=True):
            target.view(-1)[part] = value
    return tuple(out)


def kl_bwd(
    grad, logits, ref_logits, kl, row_max, log_sum, ref_row_max, ref_log_sum, temperature, reverse, need_logits,
    need_ref,
):  # fmt: skip
    """(d/dlogits, d/dref_logits), each in its input's dtype; of shape [0] where not needed."""
    vocab = logits.shape[-1]
    sides, needs = (logits, ref_logits), (need_logits, need_ref)
    out = [x.new_zeros((x.numel() // vocab, vocab) if need else 0) for x, need in zip(sides, needs, strict=True)]
    per_row = [x.reshape(-1) for x in (grad, kl, row_max, log_sum, ref_row_max, ref_log_sum)]
    for part, *rows in _blocks(logits, ref_logits):
        z_p, z_q = (x / temperature for x in rows)
        upstream, total, *statistics = (x[part] for x in per_row)
        p, q = ((largest / temperature, log_sum) for largest, log_sum in (statistics[:2], statistics[2:]))
        if reverse:
            d_p, d_q = divergence_gradient(upstream, z_p, z_q, total, p, q)
        else:
            d_q, d_p = divergence_gradient(upstream, z_q, z_p, total, q, p)
        for target, d, need in zip(out, (d_p, d_q), needs, strict=True):
            if need:
                target[part] = (d / temperature).to(target.dtype)
    return tuple(d.view(x.shape) if need else d for d, x, need in zip(out, sides, needs, strict=True))


def log_ratio(log_probs, ref_log_probs):
    """log p - log q in fp32 or fp64; 0 where both are the same, also both -inf."""
    dtype = accumulator_dtype(log_probs, ref_log_probs)
    log_p, log_q = (x.to(dtype).contiguous() for x in (log_probs, ref_log_probs))
    return torch.where(log_p == log_q, 0.0, log_p - log_q)


def approx_kl(log_probs, ref_log_probs, estimator):
    """The definition of the estimators, elementwise; autograd of finite entries is exact."""
    d = log_probs.to(accumulator_dtype(log_probs, ref_log_probs)) - ref_log_probs
    return {
        "k1": lambda: d,
        "k2": lambda: 0.5 * d * d,
        "k3": lambda: torch.exp(-d) - 1.0 + d,
        "abs": lambda: d.abs(),
    }[estimator]()


def approx_kl_fwd(log_probs, ref_log_probs, estimator):
    """k1, k2 or k3 of each entry; k3 without cancellation, and never below 0."""
    d = log_ratio(log_probs, ref_log_probs)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    return torch.where(d == -math.inf, math.inf, torch.clamp(torch.expm1(-d) + d, min=0.0))


def approx_kl_bwd(grad, log_probs, ref_log_probs, estimator, need_log_probs, need_ref):
    """(d/dlog_probs, d/dref_log_probs), each in its input's dtype; of shape [0] where not needed. 0 where grad is."""
    d = log_ratio(log_probs, ref_log_probs)
    slope = {"k1": lambda: torch.ones_like(d), "k2": lambda: d, "k3": lambda: -torch.expm1(-d)}[estimator]()
    out = torch.where(grad == 0, 0, grad.contiguous() * slope)
    return (
        out.to(log_probs.dtype) if need_log_probs else log_probs.new_empty(0),
        (-out).to(ref_log_probs.dtype) if need_ref else ref_log_probs.new_empty(0),
    )


def example_inputs(case, *, dtype=torch.float32, device="cpu", seed=0):
    """Keyword arguments of `kl_from_logits` for a case of CASES."""
    generator = torch.Generator().manual_seed(seed)
    shape = {
        "small": (4, 7),
        "batched": (2, 3, 17),
        "masked_logits": (6, 11),
        "warm": (3, 19),
        "wide": (3, 4099),
        "one_entry": (4, 1),
        "empty": (0, 5),
    }[case]
    logits = 3.0 * torch.randn(shape, generator=generator, dtype=torch.float64)
    ref_logits = logits + torch.randn(shape, generator=generator, dtype=torch.float64)
    if case == "masked_logits":
        banned = torch.rand(shape, generator=generator, dtype=torch.float32) < 0.4
        banned[:, 0] = False
        logits[banned] = -math.inf
        ref_logits[banned] = -math.inf
        logits[1, 0] = -math.inf  # only the reference allows it: adds 0 in reverse, +inf in forward
        ref_logits[2, 0] = -math.inf  # only the policy allows it: +inf in reverse, adds 0 in forward
        logits[3, :] = ref_logits[3, :] = -math.inf  # nothing allowed at all: 0
    return {
        "logits": logits.to(dtype).to(device),
        "ref_logits": ref_logits.to(dtype).to(device),
        "temperature": 0.7 if case == "warm" else 1.0,
    }
