"""Log-probs of K labels a row, [..., K], from hidden states: one walk over the head, and its rows that the labels name.

The walk gives log p of the likeliest of a row's labels. Of the others, log p_k = log p_best - (z_best - z_k), where z
of a label is the product of its hidden state with its row of the head: K products a row, and nothing of log p_best's
digits is lost where it is nearly certain. Backwards, with G the sum of the labels' gradients, the walk gives
G (e_best - p), and what is left is sum_k g_k (e_k - e_best), on the rows of the head that the labels name. Both are
added in fp32, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _linear_ops as ops
from ._autograd import custom_op, direct, register
from ._checks import check_index
from .logprobs import check_labels
from .reference.kept import kept_logits_bwd, kept_logits_fwd
from .reference.linear import spread_slopes
from .reference.logprobs import scale_logits


def are_several(labels: Tensor, rows: Tensor | None, hidden_states: Tensor) -> bool:
    """Whether a row has K labels instead of one."""
    return labels.dim() == (hidden_states.dim() if rows is None else rows.dim() + 1)


def check_several(labels: Tensor, process_group) -> Tensor:
    """The labels as int64; raise what checks of one label a row do not see."""
    labels = check_index("labels", labels)
    if labels.shape[-1] < 1:
        raise ValueError(f"labels has shape {list(labels.shape)}, expected [..., K] with K >= 1")
    if process_group is not None:  # a rank has not the rows that other ranks' labels name
        raise ValueError("labels [..., K] and process_group do not go together, expected one label for each row")
    return labels


def _heads(hidden, weight, rows, low, up):
    """The hidden states of each row of labels with the head's weight, and the same of a LoRA layer if there is one."""
    if rows is not None:
        rows = rows.clamp(0, max(hidden.shape[0] - 1, 0))
    pairs = [(hidden, weight)] if low is None else [(hidden, weight), (low, up)]
    return [(x if rows is None else x[rows], w) for x, w in pairs]


def _scores(heads, named, bias, temperatures, temperature, softcap):
    """z [R, K] of the tokens named, and dz/dlogits; -inf where none is."""
    x = sum(kept_logits_fwd(h, w, named, bias if i == 0 else None) for i, (h, w) in enumerate(heads))
    heat = temperature if temperatures is None else temperatures
    return scale_logits(x, heat, softcap)


@custom_op("linear_several_fwd")
def linear_several_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, bias: Tensor | None,
    temperatures: Tensor | None, low: Tensor | None, up: Tensor | None, temperature: float, softcap: float | None,
    ignore_index: int, with_entropy: bool, chunk_size: int, fast: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probs [R, K], entropy [R] or [0]; log-prob, row maximum, log of the row's sum, place of the likeliest."""
    check_labels(labels, weight.shape[0], ignore_index)
    named = torch.where(labels == ignore_index, -1, labels)
    with ops.backend_of(hidden) as backend:
        z, _ = _scores(_heads(hidden, weight, rows, low, up), named, bias, temperatures, temperature, softcap)
        counts, least = named >= 0, torch.finfo(z.dtype).min
        # A banned label that counts comes before one that does not count.
        order = torch.where(counts, z.nan_to_num(nan=torch.inf, neginf=least), -torch.inf)
        best = order.argmax(-1, keepdim=True)
        one = labels.gather(-1, best).squeeze(-1)
        ops.check_values(hidden, weight, one, rows, temperatures, ignore_index, "")
        log_prob, entropy, row_max, log_sum, _ = backend.linear_logprobs_fwd(
            hidden, weight, one, rows, bias, temperatures, low, up, temperature, softcap, ignore_index, with_entropy,
            False, chunk_size, fast, None, 0,
        )  # fmt: skip
    own = torch.arange(labels.shape[-1], dtype=torch.int64, device=labels.device) == best
    gap = torch.where(own, 0.0, z.gather(-1, best) - z)
    log_p = torch.where((z == -torch.inf) & ~own, -torch.inf, log_prob.unsqueeze(-1) - gap)
    return torch.where(labels == ignore_index, 0.0, log_p), entropy, log_prob, row_max, log_sum, best


@linear_several_fwd.register_fake
def _(
    hidden, weight, labels, rows, bias, temperatures, low, up, temperature, softcap, ignore_index, with_entropy, *rest
):  # fmt: skip
    def new(*shape):
        return hidden.new_empty(shape, dtype=ops._row_dtype(hidden))

    count = labels.shape[0]
    entropy = new(count) if with_entropy else new(0)
    return new(*labels.shape), entropy, new(count), new(count), new(count), labels.new_empty((count, 1))


@custom_op("linear_several_bwd")
def linear_several_bwd(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, labels: Tensor,
    rows: Tensor | None, bias: Tensor | None, temperatures: Tensor | None, low: Tensor | None, up: Tensor | None,
    entropy: Tensor, log_prob: Tensor, row_max: Tensor, log_sum: Tensor, best: Tensor, temperature: float,
    softcap: float | None, ignore_index: int, chunk_size: int, fast: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, named = ops._row_dtype(hidden), torch.where(labels == ignore_index, -1, labels)
    total = None
    if grad_logprobs is not None:
        grad = torch.where(named >= 0, grad_logprobs.to(dtype), 0.0)
        total = grad.sum(-1)
    with ops.backend_of(hidden) as backend:
        found = backend.linear_logprobs_bwd(
            total, grad_entropy, hidden, weight, labels.gather(-1, best).squeeze(-1), rows, bias, temperatures, low, up,
            log_prob, entropy, row_max, log_sum, temperature, softcap, ignore_index, chunk_size, fast, None, 0, needs,
            dtypes=(dtype,) * 5,
        )  # fmt: skip
        if total is not None:
            heads = _heads(hidden, weight, rows, low, up)
            z, slope = _scores(heads, named, bias, temperatures, temperature, softcap)
            others = grad.scatter(-1, best, 0.0)
            d = others.scatter(-1, best, -others.sum(-1, keepdim=True)) * slope
            _add_named(found, torch.where(z == -torch.inf, 0.0, d), heads, named, rows, needs)
    dtypes = [dtype if x is None else x.dtype for x in (hidden, weight, bias, low, up)]
    return tuple(x.to(dtype) for x, dtype in zip(found, dtypes))


def _add_named(found, d, heads, named, rows, needs):
    """Add to the gradients of hidden, weight, bias, low and up what d [R, K] sends to the tokens named."""
    places = ((0, 1), (3, 4))
    for (h, w), (of_rows, of_head) in zip(heads, places):
        need_bias = needs[2] and of_rows == 0
        d_rows, d_head, d_bias = kept_logits_bwd(d, h, w, named, needs[of_rows], needs[of_head], need_bias)
        if needs[of_rows]:
            ones = torch.ones_like(d_rows[:, 0])
            found[of_rows].add_(
                spread_slopes(ones, d_rows, ones.bool(), rows, found[of_rows].shape, found[of_rows].dtype)
            )
        if needs[of_head]:
            found[of_head].add_(d_head)
        if need_bias:
            found[2].add_(d_bias)


@linear_several_bwd.register_fake
def _(grad_logprobs, grad_entropy, hidden, weight, labels, rows, bias, temperatures, low, up, *rest):
    return ops.fake_gradients((hidden, weight, bias, low, up), rest[-1])


_linear_several_bwd = direct(linear_several_bwd)


def _setup(ctx, inputs, output):
    *tensors, temperature, softcap, ignore_index, ctx.with_entropy, chunk_size, fast = inputs
    ctx.options, ctx.count = (temperature, softcap, ignore_index, chunk_size, fast), len(inputs)
    ctx.save_for_backward(*tensors, output[1].clone(), *output[2:])  # the caller may write over the results
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_entropy, *_):
    grad_entropy = grad_entropy if ctx.with_entropy else None
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * ctx.count
    needs = [ctx.needs_input_grad[place] for place in ops.PLACES]
    found = _linear_several_bwd(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.options, needs)
    return ops.placed(ctx, found)


logprobs = register(linear_several_fwd, _backward, _setup, **ops.DIFFERENTIABLE)
