"""The opaque operators behind cross_entropy_from_logits; the contract is reference/cross_entropy.py."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from ._autograd import register
from .logprobs import _row_dtype, check_labels


@torch.library.custom_op("rlhf_kernels::cross_entropy_fwd", mutates_args=())
def cross_entropy_fwd(
    logits: Tensor, labels: Tensor, weights: Tensor | None, temperature: float, softcap: float | None,
    ignore_index: int, label_smoothing: float, z_loss: float, dft: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_labels(labels, logits.shape[-1], ignore_index)
    return dispatch.pick("cross_entropy", logits).cross_entropy_fwd(
        logits, labels, weights, temperature, softcap, ignore_index, label_smoothing, z_loss, dft
    )


@cross_entropy_fwd.register_fake
def _(logits, labels, weights, temperature, softcap, ignore_index, label_smoothing, *rest):
    def new(count):
        return logits.new_empty(count, dtype=_row_dtype(logits))

    count = logits.shape[0]
    return new(count), new(count), new(count), new(count), new(count if label_smoothing else 0)


@torch.library.custom_op("rlhf_kernels::cross_entropy_bwd", mutates_args=())
def cross_entropy_bwd(
    grad: Tensor, logits: Tensor, labels: Tensor, weights: Tensor | None, logprobs: Tensor, row_max: Tensor,
    log_sum: Tensor, counts: Tensor, temperature: float, softcap: float | None, ignore_index: int,
    label_smoothing: float, z_loss: float, dft: bool,
) -> Tensor:  # fmt: skip
    return dispatch.pick("cross_entropy", logits).cross_entropy_bwd(
        grad, logits, labels, weights, logprobs, row_max, log_sum, counts, temperature, softcap, ignore_index,
        label_smoothing, z_loss, dft,
    )  # fmt: skip


@cross_entropy_bwd.register_fake
def _(grad, logits, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.smoothing, ctx.z_loss, ctx.dft = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    options = (ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.smoothing, ctx.z_loss, ctx.dft)
    d = None if grad is None else cross_entropy_bwd(grad, *ctx.saved_tensors, *options)
    return d, *(None,) * 8


cross_entropy = register(cross_entropy_fwd, _backward, _setup_context, keeps_inputs=True, logits=0)
