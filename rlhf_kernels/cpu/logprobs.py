"""Calls of csrc/cpu/logprobs.cpp; what the functions mean stands in reference/logprobs.py."""

import torch

from .._native import DTYPES, dense_fp32, fresh, run
from .._planes import places, planes


def _dense(labels):
    return None if labels is None else labels.contiguous()


def logprobs_fwd(logits, labels, temperatures, temperature, softcap, ignore_index, with_entropy):
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    (rows,) = planes(logits)
    wanted = (labels is not None, with_entropy, True, True)
    out = [fresh(*(shape if want else (0,))) for want in wanted]
    run(
        "logprobs_fwd", rows, DTYPES[rows.dtype], *places(rows), _dense(labels), shape.numel(), vocab,
        dense_fp32(temperatures), temperature, softcap or 0.0, ignore_index, out[0], out[1] if with_entropy else None,
        *out[2:],
    )  # fmt: skip
    return tuple(out)


def token_statistics_fwd(logits, labels, temperatures, temperature, softcap, ignore_index):
    (rows,), shape = planes(logits), logits.shape[:-1]
    out = [torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(6)]
    out.append(torch.empty(shape, dtype=torch.bool, device="cpu"))
    run(
        "token_statistics_fwd", rows, DTYPES[rows.dtype], *places(rows), _dense(labels), shape.numel(),
        logits.shape[-1], dense_fp32(temperatures), temperature, softcap or 0.0, ignore_index, *out,
    )  # fmt: skip
    return tuple(out)


def logprobs_bwd(
    grad_logprobs, grad_entropy, logits, labels, temperatures, logprobs, entropy, row_max, log_sum, temperature,
    softcap, ignore_index, inplace=False, grad_log_sum_exp=None, grad_each=None,
):  # fmt: skip
    (rows,) = planes(logits)
    over = inplace and rows.data_ptr() == logits.data_ptr()
    out = rows if over else fresh(*rows.shape, dtype=rows.dtype)
    upstream = (dense_fp32(g) for g in (grad_logprobs, grad_entropy, grad_log_sum_exp, grad_each))
    run(
        "logprobs_bwd", *upstream, rows, DTYPES[rows.dtype], *places(rows), _dense(labels), logprobs, entropy, row_max,
        log_sum, logits.shape[:-1].numel(), logits.shape[-1], dense_fp32(temperatures), temperature, softcap or 0.0,
        ignore_index, out, *places(out)[1:],
    )  # fmt: skip
    if inplace and not over:
        logits.copy_(out.view(logits.shape))
    return out.view(logits.shape)


def add_row_sums(logits, temperatures, temperature, softcap, kept, total, count):
    """Add `row_sums` of z of logits [N, V] to total and count [N], fp64, in the rows that are kept."""
    run(
        "row_sums", logits, DTYPES[logits.dtype], logits.stride(0), *logits.shape, temperatures, temperature,
        softcap or 0.0, kept, total, count,
    )  # fmt: skip
