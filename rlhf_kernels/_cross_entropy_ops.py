"""The opaque operators behind cross_entropy.py; the contract is reference/cross_entropy.py.

Those from hidden states take what _linear_ops.py describes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _linear_ops as linear
from . import dispatch
from ._autograd import custom_op, direct, register
from .logprobs import _row_dtype, check_labels
from .reference.cross_entropy import Settings, token_upstream
from .reference.linear import spread_slopes


@custom_op("cross_entropy_fwd")
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


@custom_op("cross_entropy_bwd")
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


_cross_entropy_bwd = direct(cross_entropy_bwd)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.smoothing, ctx.z_loss, ctx.dft = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    options = (ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.smoothing, ctx.z_loss, ctx.dft)
    d = None if grad is None else _cross_entropy_bwd(grad, *ctx.saved_tensors, *options)
    return d, *(None,) * 8


cross_entropy = register(cross_entropy_fwd, _backward, _setup_context, keeps_inputs=True, logits=0)


@custom_op("linear_cross_entropy_fwd")
def linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    temperatures: Tensor | None, low: Tensor | None, up: Tensor | None, weights: Tensor | None, temperature: float,
    softcap: float | None, ignore_index: int, label_smoothing: float, z_loss: float, dft: bool, chunk_size: int,
    fast: bool, group_name: str, vocab_start: int, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    linear.check_values(hidden, weight, labels, rows, temperatures, ignore_index, group_name)
    with linear.backend_of(hidden, "cross_entropy") as backend:
        return backend.linear_cross_entropy_fwd(
            hidden, weight, labels, rows, bias, temperatures, low, up, weights, temperature, softcap, ignore_index,
            label_smoothing, z_loss, dft, chunk_size, fast, linear.group_of(group_name), vocab_start, needs,
        )  # fmt: skip


@linear_cross_entropy_fwd.register_fake
def _(hidden, weight, labels, rows, bias, temperatures, low, up, *rest):
    loss = hidden.new_empty((), dtype=_row_dtype(hidden))
    return loss, *linear.fake_gradients((hidden, weight, bias, low, up), rest[-1], saved=True)


linear_cross_entropy = register(
    linear_cross_entropy_fwd, linear.fused_backward, linear.fused_setup, **linear.DIFFERENTIABLE
)


@custom_op("linear_cross_entropy_each_fwd")
def linear_cross_entropy_each_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    temperatures: Tensor | None, low: Tensor | None, up: Tensor | None, weights: Tensor | None, temperature: float,
    softcap: float | None, ignore_index: int, label_smoothing: float, z_loss: float, dft: bool, with_slopes: bool,
    chunk_size: int, fast: bool, group_name: str, vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    linear.check_values(hidden, weight, labels, rows, temperatures, ignore_index, group_name)
    with linear.backend_of(hidden, "cross_entropy") as backend:
        return backend.linear_cross_entropy_each_fwd(
            hidden, weight, labels, rows, bias, temperatures, low, up, weights, temperature, softcap, ignore_index,
            label_smoothing, z_loss, dft, with_slopes, chunk_size, fast, linear.group_of(group_name), vocab_start,
        )  # fmt: skip


@linear_cross_entropy_each_fwd.register_fake
def _(
    hidden, weight, labels, rows, bias, temperatures, low, up, weights, temperature, softcap, ignore_index,
    label_smoothing, z_loss, dft, with_slopes, *rest,
):  # fmt: skip
    def new(wanted, *shape):
        return hidden.new_empty(shape if wanted else 0, dtype=_row_dtype(hidden))

    count, saved = labels.shape[0], not with_slopes
    statistics = (new(saved, count), new(saved, count), new(saved, count), new(saved and label_smoothing, count))
    return new(True, count), *statistics, new(with_slopes, count, hidden.shape[1])


@custom_op("linear_cross_entropy_each_bwd")
def linear_cross_entropy_each_bwd(
    grad: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    temperatures: Tensor | None, low: Tensor | None, up: Tensor | None, weights: Tensor | None, logprobs: Tensor,
    row_max: Tensor, log_sum: Tensor, counts: Tensor, temperature: float, softcap: float | None, ignore_index: int,
    label_smoothing: float, z_loss: float, dft: bool, chunk_size: int, fast: bool, group_name: str, vocab_start: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    settings, weights = Settings(label_smoothing, z_loss, dft), None if weights is None else weights.to(logprobs.dtype)
    upstream = token_upstream(settings, logprobs, row_max, log_sum, counts if label_smoothing else None, weights)
    upstream = upstream.times(grad)
    with linear.backend_of(hidden) as backend:
        return backend.linear_logprobs_bwd(
            upstream.log_prob, None, hidden, weight, labels, rows, bias, temperatures, low, up, logprobs, None,
            row_max, log_sum, temperature, softcap, ignore_index, chunk_size, fast, linear.group_of(group_name),
            vocab_start, needs, upstream.log_sum_exp, upstream.each,
        )  # fmt: skip


@linear_cross_entropy_each_bwd.register_fake
def _(grad, hidden, weight, labels, rows, bias, temperatures, low, up, *rest):
    return linear.fake_gradients((hidden, weight, bias, low, up), rest[-1])


_linear_cross_entropy_each_bwd = direct(linear_cross_entropy_each_bwd)


def _each_setup(ctx, inputs, output):
    tensors, options, (ctx.with_slopes, *execution) = inputs[:9], inputs[9:15], inputs[15:]
    ctx.options, ctx.count = (*options, *execution), len(inputs)
    hidden, _, labels, rows = tensors[:4]
    if ctx.with_slopes:
        ctx.save_for_backward(output[5], labels != options[2], rows)
        ctx.hidden = hidden.shape, hidden.dtype
    else:
        ctx.save_for_backward(*tensors, *output[1:5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _each_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * ctx.count
    if ctx.with_slopes:
        return linear.placed(ctx, [spread_slopes(grad, *ctx.saved_tensors, *ctx.hidden)])
    needs = [ctx.needs_input_grad[place] for place in linear.PLACES]
    return linear.placed(ctx, _linear_cross_entropy_each_bwd(grad, *ctx.saved_tensors, *ctx.options, needs))


linear_cross_entropy_each = register(
    linear_cross_entropy_each_fwd, _each_backward, _each_setup, **linear.DIFFERENTIABLE
)
