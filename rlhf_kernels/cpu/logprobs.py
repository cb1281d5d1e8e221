"""Calls of csrc/cpu/logprobs.cpp; what the functions mean stands in reference/logprobs.py."""

import torch

from .._native import DTYPES, dense_fp32, dense_rows, fresh, run


def logprobs_fwd(logits, labels, temperature, softcap, ignore_index, with_entropy):
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows = dense_rows(logits.reshape(-1, vocab))
    count = rows.shape[0]
    flat_labels = None if labels is None else labels.reshape(-1).contiguous()
    wanted = (labels is not None, with_entropy, True, True)
    out = [torch.empty(shape if want else 0, dtype=torch.float32, device="cpu") for want in wanted]
    run(
        "logprobs_fwd", rows, DTYPES[rows.dtype], rows.stride(0), flat_labels, count, vocab, temperature,
        softcap or 0.0, ignore_index, out[0], out[1] if with_entropy else None, *out[2:],
    )  # fmt: skip
    return tuple(out)


def logprobs_bwd(
    grad_logprobs, grad_entropy, logits, labels, logprobs, entropy, row_max, log_sum, temperature, softcap,
    ignore_index, inplace=False, grad_log_sum_exp=None, grad_each=None,
):  # fmt: skip
    vocab = logits.shape[-1]
    rows = dense_rows(logits.reshape(-1, vocab))
    over = inplace and rows.data_ptr() == logits.data_ptr()
    out = rows if over else fresh(*rows.shape, dtype=rows.dtype)
    flat_labels = None if labels is None else labels.reshape(-1).contiguous()
    upstream = (dense_fp32(g) for g in (grad_logprobs, grad_entropy, grad_log_sum_exp, grad_each))
    run(
        "logprobs_bwd", *upstream, rows, DTYPES[rows.dtype], rows.stride(0), flat_labels, logprobs, entropy, row_max,
        log_sum, *rows.shape, temperature, softcap or 0.0, ignore_index, out, out.stride(0),
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
