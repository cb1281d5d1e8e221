"""Calls of csrc/cuda/logprobs.cu; what the functions mean stands in reference/logprobs.py."""

import torch

from .._native import DTYPES, dense_fp32, dense_rows, launch

PART = 8192  # entries of a row whose statistics one block takes, as in csrc/cuda/logprobs.cu


def _flat(labels):
    return None if labels is None else labels.reshape(-1).contiguous()


def logprobs_fwd(logits, labels, temperature, softcap, ignore_index, with_entropy):
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    rows = dense_rows(logits.reshape(-1, vocab))
    count, parts = rows.shape[0], (vocab + PART - 1) // PART

    def new(size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device=rows.device)

    partial = new(4 * count * parts, torch.float64) if parts > 1 else None
    out = [new(shape if want else 0) for want in (labels is not None, with_entropy, True, True)]
    launch(
        "logprobs_fwd", rows, DTYPES[rows.dtype], rows.stride(0), _flat(labels), count, vocab, temperature,
        softcap or 0.0, ignore_index, partial, out[0], out[1] if with_entropy else None, *out[2:],
    )  # fmt: skip
    return tuple(out)


def logprobs_bwd(
    grad_logprobs, grad_entropy, logits, labels, logprobs, entropy, row_max, log_sum, temperature, softcap,
    ignore_index, inplace=False,
):  # fmt: skip
    rows = dense_rows(logits.reshape(-1, logits.shape[-1]))
    over = inplace and rows.data_ptr() == logits.data_ptr()
    out = rows if over else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    launch(
        "logprobs_bwd", dense_fp32(grad_logprobs), dense_fp32(grad_entropy), rows, DTYPES[rows.dtype], rows.stride(0),
        _flat(labels), logprobs, entropy, row_max, log_sum, *rows.shape, temperature, softcap or 0.0, ignore_index,
        out, out.stride(0),
    )  # fmt: skip
    if inplace and not over:
        logits.copy_(out.view(logits.shape))
    return out.view(logits.shape)
