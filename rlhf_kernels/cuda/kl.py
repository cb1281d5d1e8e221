"""Calls of csrc/cuda/kl.cu; what the functions mean stands in reference/kl.py."""

import math

import torch

from .._native import KL_ESTIMATORS, alike_as_rows, launch, typed_planes, typed_rows
from .._planes import planes

PART = 16384  # entries of a row whose statistics one block takes, as in csrc/cuda/kl.cu


def kl_fwd(logits, ref_logits, temperature, reverse):
    sides, (*shape, vocab) = planes(logits, ref_logits), logits.shape
    count, parts = math.prod(shape), (vocab + PART - 1) // PART

    def new(size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device=logits.device)

    partial = new(4 * count * parts, torch.float64) if parts > 1 else None
    out = [new(shape) for _ in range(5)]
    sides, statistics = (sides, out[1:]) if reverse else (sides[::-1], out[3:] + out[1:3])
    launch("kl_fwd", *typed_planes(*sides), count, vocab, temperature, partial, out[0], *statistics)
    return tuple(out)


def kl_bwd(
    grad, logits, ref_logits, kl, row_max, log_sum, ref_row_max, ref_log_sum, temperature, reverse, need_logits,
    need_ref,
):  # fmt: skip
    sides, (*shape, vocab) = planes(logits, ref_logits), logits.shape
    needs = (need_logits, need_ref)
    grads = [
        torch.empty(x.shape if need else (0,), dtype=x.dtype, device=x.device)
        for x, need in zip(sides, needs, strict=True)
    ]
    wanted = [x if need else None for x, need in zip(grads, needs, strict=True)]
    statistics = [row_max, log_sum, ref_row_max, ref_log_sum]
    if not reverse:
        sides, wanted, statistics = sides[::-1], wanted[::-1], statistics[2:] + statistics[:2]
    if need_logits or need_ref:
        launch(
            "kl_bwd", grad.to(torch.float32).contiguous(), *typed_planes(*sides),
            *(x.contiguous() for x in (kl, *statistics)), math.prod(shape), vocab, temperature, *wanted,
        )  # fmt: skip
    like = (logits, ref_logits)
    return tuple(g.view(x.shape) if need else g for g, x, need in zip(grads, like, needs, strict=True))


def approx_kl_fwd(log_probs, ref_log_probs, estimator):
    p, q = alike_as_rows(log_probs, ref_log_probs)
    out = torch.empty(log_probs.shape, dtype=torch.float32, device=log_probs.device)
    launch("approx_kl_fwd", *typed_rows(p), *typed_rows(q), *p.shape, KL_ESTIMATORS[estimator], out)
    return out


def approx_kl_bwd(grad, log_probs, ref_log_probs, estimator, need_log_probs, need_ref):
    grad, p, q = alike_as_rows(grad.to(torch.float32), log_probs, ref_log_probs)
    needs = (need_log_probs, need_ref)
    grads = [x.new_empty(x.shape if need else 0) for x, need in zip((log_probs, ref_log_probs), needs)]
    wanted = [x if need else None for x, need in zip(grads, needs)]
    launch(
        "approx_kl_bwd",
        grad,
        grad.stride(0),
        *typed_rows(p),
        *typed_rows(q),
        *p.shape,
        KL_ESTIMATORS[estimator],
        *wanted,
    )
    return tuple(grads)
