"""The operators of token_statistics.py: forwards of their own, and the backwards of the log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _linear_ops, dispatch
from . import logprobs as rows
from ._autograd import custom_op, register


@custom_op("token_statistics_fwd")
def token_statistics_fwd(
    logits: Tensor, labels: Tensor, temperatures: Tensor | None, temperature: float, softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probs, entropy, row maximum, log of the row's sum, log sum p^2, mean logit, whether it is the first."""
    rows.check_labels(labels, logits.shape[-1], ignore_index)
    rows.check_temperatures(temperatures, labels, ignore_index)
    backend = dispatch.pick("logprobs", logits)
    return backend.token_statistics_fwd(logits, labels, temperatures, temperature, softcap, ignore_index)


@token_statistics_fwd.register_fake
def _(logits, labels, *rest):
    return _fake(logits, labels.shape)


def _fake(x, shape):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return *(x.new_empty(shape, dtype=dtype) for _ in range(6)), x.new_empty(shape, dtype=torch.bool)


def _setup(ctx, inputs, output):
    """Of any number of tensors, then options: only the log-probs and the entropy are differentiable."""
    count = next(
        place for place, x in enumerate(inputs) if isinstance(x, float)
    )  # the temperature comes first of these
    tensors, ctx.options, ctx.count = inputs[:count], inputs[count:], len(inputs)
    results = (x.clone() for x in output[:2])  # the caller may write over them
    ctx.save_for_backward(*tensors, *results, *output[2:4])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_entropy, *_):
    grad = None
    if grad_logprobs is not None or grad_entropy is not None:
        grad = rows.gradient(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options)
    return grad, *(None,) * (ctx.count - 1)


token_statistics = register(token_statistics_fwd, _backward, _setup, keeps_inputs=True, logits=0)


@custom_op("linear_token_statistics_fwd")
def linear_token_statistics_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    temperatures: Tensor | None, low: Tensor | None, up: Tensor | None, temperature: float, softcap: float | None,
    ignore_index: int, chunk_size: int, fast: bool, group_name: str, vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `token_statistics_fwd`, [M] each."""
    _linear_ops.check_values(hidden, weight, labels, rows, temperatures, ignore_index, group_name)
    with _linear_ops.backend_of(hidden) as backend:
        return backend.linear_token_statistics_fwd(
            hidden, weight, labels, rows, bias, temperatures, low, up, temperature, softcap, ignore_index, chunk_size,
            fast, _linear_ops.group_of(group_name), vocab_start,
        )  # fmt: skip


@linear_token_statistics_fwd.register_fake
def _(hidden, weight, labels, *rest):
    return _fake(hidden, labels.shape)


def _linear_backward(ctx, grad_logprobs, grad_entropy, *_):
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * ctx.count
    needs = [ctx.needs_input_grad[place] for place in _linear_ops.PLACES]
    found = _linear_ops.logprobs_bwd(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, needs)
    return _linear_ops.placed(ctx, found)


linear_token_statistics = register(linear_token_statistics_fwd, _linear_backward, _setup, **_linear_ops.DIFFERENTIABLE)
