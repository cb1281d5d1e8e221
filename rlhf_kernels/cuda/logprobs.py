"""Calls of csrc/cuda/logprobs.cu; what the functions mean stands in reference/logprobs.py."""

import torch

from .._native import DTYPES, dense_fp32, launch
from .._planes import places, planes

PART = 32768  # entries of a row whose statistics one block takes, as in csrc/cuda/logprobs.cu
WHOLE_PART = 8192  # likewise, of those with the extras


def _dense(labels):
    return None if labels is None else labels.contiguous()


def logprobs_fwd(logits, labels, temperatures, temperature, softcap, ignore_index, with_entropy):
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    (rows,) = planes(logits)
    count, parts = shape.numel(), (vocab + PART - 1) // PART

    def new(size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device=rows.device)

    partial = new(4 * count * parts, torch.float64) if parts > 1 else None
    out = [new(shape if want else 0) for want in (labels is not None, with_entropy, True, True)]
    launch(
        "logprobs_fwd", rows, DTYPES[rows.dtype], *places(rows), _dense(labels), count, vocab,
        dense_fp32(temperatures), temperature, softcap or 0.0, ignore_index, partial, out[0],
        out[1] if with_entropy else None, *out[2:],
    )  # fmt: skip
    return tuple(out)


def token_statistics_fwd(logits, labels, temperatures, temperature, softcap, ignore_index):
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    (rows,) = planes(logits)
    count, parts = shape.numel(), (vocab + WHOLE_PART - 1) // WHOLE_PART

    def new(size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device=rows.device)

    partial = new(8 * count * parts, torch.float64) if parts > 1 else None
    out = [*(new(shape) for _ in range(6)), new(shape, torch.bool)]
    launch(
        "token_statistics_fwd", rows, DTYPES[rows.dtype], *places(rows), _dense(labels), count, vocab,
        dense_fp32(temperatures), temperature, softcap or 0.0, ignore_index, partial, *out,
    )  # fmt: skip
    return tuple(out)


def logprobs_bwd(
    grad_logprobs, grad_entropy, logits, labels, temperatures, logprobs, entropy, row_max, log_sum, temperature,
    softcap, ignore_index, inplace=False,
):  # fmt: skip
    (rows,) = planes(logits)
    over = inplace and rows.data_ptr() == logits.data_ptr()
    out = rows if over else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    launch(
        "logprobs_bwd", dense_fp32(grad_logprobs), dense_fp32(grad_entropy), rows, DTYPES[rows.dtype], *places(rows),
        _dense(labels), logprobs, entropy, row_max, log_sum, logits.shape[:-1].numel(), logits.shape[-1],
        dense_fp32(temperatures), temperature, softcap or 0.0, ignore_index, out, *places(out)[1:],
    )  # fmt: skip
    if inplace and not over:
        logits.copy_(out.view(logits.shape))
    return out.view(logits.shape)
