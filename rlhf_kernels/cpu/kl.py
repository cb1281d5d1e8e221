"""Calls of csrc/cpu/kl.cpp; what the functions mean stands in reference/kl.py."""

import math

import torch

from .._native import KL_ESTIMATORS, alike_as_rows, fresh, run, typed_planes, typed_rows
from .._planes import planes


def _gradient(rows, needed):
    return fresh(*rows.shape, dtype=rows.dtype) if needed else rows.new_empty(0)


def _wanted(gradient, needed):
    return gradient if needed else None


def kl_fwd(logits, ref_logits, temperature, reverse):
    sides, (*shape, vocab) = planes(logits, ref_logits), logits.shape
    out = [fresh(*shape) for _ in range(5)]
    sides, statistics = (sides, out[1:]) if reverse else (sides[::-1], out[3:] + out[1:3])
    run("kl_fwd", *typed_planes(*sides), math.prod(shape), vocab, temperature, out[0], *statistics)
    return tuple(out)


def kl_bwd(
    grad, logits, ref_logits, kl, row_max, log_sum, ref_row_max, ref_log_sum, temperature, reverse, need_logits,
    need_ref,
):  # fmt: skip
    sides, (*shape, vocab) = planes(logits, ref_logits), logits.shape
    grads = [_gradient(x, need) for x, need in zip(sides, (need_logits, need_ref), strict=True)]
    wanted = [_wanted(x, need) for x, need in zip(grads, (need_logits, need_ref), strict=True)]
    statistics = [row_max, log_sum, ref_row_max, ref_log_sum]
    if not reverse:
        sides, wanted, statistics = sides[::-1], wanted[::-1], statistics[2:] + statistics[:2]
    if need_logits or need_ref:
        run(
            "kl_bwd", grad.to(torch.float32).contiguous(), *typed_planes(*sides),
            *(x.contiguous() for x in (kl, *statistics)), math.prod(shape), vocab, temperature, *wanted,
        )  # fmt: skip
    like = (logits, ref_logits)
    return tuple(
        g.view(x.shape) if need else g for g, x, need in zip(grads, like, (need_logits, need_ref), strict=True)
    )


def approx_kl_fwd(log_probs, ref_log_probs, estimator):
    p, q = alike_as_rows(log_probs, ref_log_probs)
    out = fresh(*log_probs.shape)
    run("approx_kl_fwd", *typed_rows(p), *typed_rows(q), *p.shape, KL_ESTIMATORS[estimator], out)
    return out


def approx_kl_bwd(grad, log_probs, ref_log_probs, estimator, need_log_probs, need_ref):
    grad, p, q = alike_as_rows(grad.to(torch.float32), log_probs, ref_log_probs)
    needs = (need_log_probs, need_ref)
    grads = [_gradient(x, need) for x, need in zip((log_probs, ref_log_probs), needs, strict=True)]
    wanted = [_wanted(x, need) for x, need in zip(grads, needs, strict=True)]
    run(
        "approx_kl_bwd", grad, grad.stride(0), *typed_rows(p), *typed_rows(q), *p.shape, KL_ESTIMATORS[estimator],
        *wanted,
    )  # fmt: skip
    return tuple(grads)
