"""Log-probs and entropy from logits, differentiable, with one read of the logits."""

from __future__ import annotations

import functools

import torch

from . import _several_labels, dispatch
from ._autograd import custom_op, direct, register
from ._checks import (
    check_dtype,
    check_index,
    check_mask,
    check_range,
    check_same_device,
    check_shape,
    reads_values,
)
from ._linear_checks import check_scale


def check_labels(labels: torch.Tensor, vocab: int, ignore_index: int) -> None:
    """Raise if a label is neither in [0, vocab) nor ignore_index; reads the labels only where checks may do so."""
    if not reads_values(labels):
        return
    if labels.numel() == 0:
        return
    lowest, highest = torch.aminmax(labels)
    if lowest.item() >= 0 and highest.item() < vocab:
        return
    outside = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bool(outside.any()):
        position = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"labels holds {int(labels[position])} at position {list(position)}, "
            f"expected values in [0, {vocab}) or ignore_index = {ignore_index}"
        )


def check_temperatures(temperatures: torch.Tensor | None, labels: torch.Tensor | None, ignore_index: int) -> None:
    """Raise if the temperature of a row that counts is not > 0 and finite; read as `check_labels` does."""
    if temperatures is None or not reads_values(temperatures):
        return
    fits = (temperatures > 0) & (temperatures != float("inf"))
    if labels is not None:
        fits = fits | (labels.reshape(-1) == ignore_index)
    if not bool(fits.all()):
        raise ValueError(f"temperature holds {temperatures[~fits][0].item()}, expected numbers > 0 and finite")


def check_logits(name: str, logits: torch.Tensor) -> None:
    """Raise unless this is a floating tensor [..., V] with V >= 1."""
    check_dtype(name, logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} has shape {list(logits.shape)}, expected [..., V] with V >= 1")


def _are_several(labels: torch.Tensor | None, logits: torch.Tensor) -> bool:
    """Whether a row has K labels, [..., K], instead of one."""
    return labels is not None and labels.dim() == logits.dim()


def _row_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@custom_op("logprobs_fwd")
def logprobs_fwd(
    logits: torch.Tensor, labels: torch.Tensor | None, temperatures: torch.Tensor | None, temperature: float,
    softcap: float | None, ignore_index: int, with_entropy: bool, inplace_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    rows, backend = labels, dispatch.pick("logprobs", logits)
    forward = backend.logprobs_fwd
    if _are_several(labels, logits):
        rows = _several_labels.row_label(labels, logits.shape[-1], ignore_index)
        forward = functools.partial(_several_labels.forward, backend)
    if labels is not None:
        check_labels(labels, logits.shape[-1], ignore_index)
    check_temperatures(temperatures, rows, ignore_index)
    return forward(logits, labels, temperatures, temperature, softcap, ignore_index, with_entropy)


@logprobs_fwd.register_fake
def _(logits, labels, temperatures, temperature, softcap, ignore_index, with_entropy, inplace_backward=False):
    def new(shape):
        return logits.new_empty(shape, dtype=_row_dtype(logits))

    shape = logits.shape[:-1]
    return new(0 if labels is None else labels.shape), new(shape if with_entropy else 0), new(shape), new(shape)


def _backward_of(labels: torch.Tensor | None, logits: torch.Tensor):
    """The function that makes the gradient."""
    backend = dispatch.pick("logprobs", logits)
    if _are_several(labels, logits):
        return functools.partial(_several_labels.backward, backend)
    return backend.logprobs_bwd


@custom_op("logprobs_bwd")
def logprobs_bwd(
    grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None, logits: torch.Tensor,
    labels: torch.Tensor | None, temperatures: torch.Tensor | None, logprobs: torch.Tensor, entropy: torch.Tensor,
    row_max: torch.Tensor, log_sum: torch.Tensor, temperature: float, softcap: float | None, ignore_index: int,
) -> torch.Tensor:  # fmt: skip
    return _backward_of(labels, logits)(
        grad_logprobs, grad_entropy, logits, labels, temperatures, logprobs, entropy, row_max, log_sum, temperature,
        softcap, ignore_index,
    )  # fmt: skip


@logprobs_bwd.register_fake
def _(grad_logprobs, grad_entropy, logits, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@custom_op("logprobs_bwd_", mutates_args=("logits",))
def logprobs_bwd_(
    grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None, logits: torch.Tensor,
    labels: torch.Tensor | None, temperatures: torch.Tensor | None, logprobs: torch.Tensor, entropy: torch.Tensor,
    row_max: torch.Tensor, log_sum: torch.Tensor, temperature: float, softcap: float | None, ignore_index: int,
) -> None:  # fmt: skip
    _backward_of(labels, logits)(
        grad_logprobs, grad_entropy, logits, labels, temperatures, logprobs, entropy, row_max, log_sum, temperature,
        softcap, ignore_index, inplace=True,
    )  # fmt: skip


gradient, gradient_in_place = direct(logprobs_bwd), direct(logprobs_bwd_)


def _setup_context(ctx, inputs, output):
    *tensors, temperature, softcap, ignore_index, ctx.with_entropy, ctx.inplace = inputs
    ctx.options = (temperature, softcap, ignore_index)
    rows = (x.clone() if x.numel() else x for x in output[:2])  # the caller may write over the results
    ctx.save_for_backward(*tensors, *rows, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_entropy, *_):
    logits, labels, *saved = ctx.saved_tensors
    grad_logprobs = None if labels is None else grad_logprobs
    grad_entropy = grad_entropy if ctx.with_entropy else None
    grad = None
    if grad_logprobs is not None or grad_entropy is not None:
        if ctx.inplace:
            grad = logits.detach()
            gradient_in_place(grad_logprobs, grad_entropy, grad, labels, *saved, *ctx.options)
        else:
            grad = gradient(grad_logprobs, grad_entropy, logits, labels, *saved, *ctx.options)
    return grad, None, None, None, None, None, None, None


_logprobs = register(logprobs_fwd, _backward, _setup_context, keeps_inputs=True, logits=0)


def _check_options(temperature, softcap):
    check_range("temperature", temperature, 0.0, float("inf"), low_open=True, high_open=True)
    if softcap is not None:
        check_range("softcap", softcap, 0.0, float("inf"), low_open=True, high_open=True)
    return float(temperature), None if softcap is None else float(softcap)


def _shares_memory(tensor: torch.Tensor) -> bool:
    """Whether writing over this tensor would write over others' entries: it is expanded, or an example of vmap."""
    expanded = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride()))
    return expanded or torch._C._are_functorch_transforms_active()


def _forward(logits, labels, temperature, softcap, ignore_index, row_mask, inplace_backward, with_entropy):
    check_logits("logits", logits)
    labels = check_index("labels", labels)
    rows = tuple(logits.shape[:-1])
    several = _are_several(labels, logits)
    shape = (*rows, None) if several else rows
    check_shape("labels", labels, shape, "the shape of logits without its last dimension, or [..., K]")
    check_same_device(logits=logits, labels=labels, row_mask=row_mask)
    if row_mask is not None:
        kept = check_mask("row_mask", row_mask, rows)
        labels = torch.where(kept.unsqueeze(-1) if several else kept, labels, ignore_index)
    scale = check_scale(temperature, softcap, logits, logits.shape[:-1])
    inplace = inplace_backward and not torch.compiler.is_compiling() and not _shares_memory(logits)
    return _logprobs(logits, labels, *scale, ignore_index, with_entropy, inplace)[:2]


def logprobs_from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_mask: torch.Tensor | None = None,
    inplace_backward: bool = False,
) -> torch.Tensor:
    """Log-prob of each label under softmax(softcap * tanh(logits / softcap) / temperature).

    log p = (z_label - max z) - log(sum exp(z - max z)), summed in fp32 whatever the logits' dtype. A logit of -inf
    (a banned token) has no probability and gets no gradient; a row of nothing but -inf gives -inf and no gradient.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64; any strides.
        labels: [...] int64|int32 in [0, V), or ignore_index; or [..., K], K labels of each row, which may be the same.
        temperature: > 0, divides the logits after the softcap, as samplers do; default 1.0; or a tensor [...], one for
            each row, which is not differentiated.
        softcap: > 0, or None for no cap, the default. A logit of -inf stays -inf.
        ignore_index: label that does not count, default -100. It gives 0 and no gradient, and the logits of a row that
            has no other label may be NaN.
        row_mask: [...] bool or integer, 1 = keep, or None, the default, for all rows; those under 0 are as those of
            ignore_index, whatever their labels.
        inplace_backward: write the gradient over the logits, which saves [..., V] of memory, default False. Nobody
            else may need the logits after the backward; PyTorch raises if a saved copy would be read. Has no effect
            under torch.compile and torch.func.vmap, and on expanded logits.
    Returns:
        The shape of labels, fp32 (fp64 for fp64 logits), in nats, <= 0. Differentiable in logits. It may be written in
        place.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; temperature or softcap not > 0 and finite; a label outside
            [0, V) that is not ignore_index. Labels and a tensor of temperatures are read on the CPU, and elsewhere
            only with RLHF_KERNELS_CHECK=1; without it a row of such a label becomes NaN.
    Cost: reads the logits once, and once more in the backward, which writes their gradient, however many labels a row
        has; K labels compare K^2 pairs a row in the backward. No host sync without RLHF_KERNELS_CHECK=1. The reference
        backend works on blocks of rows in fp32.
    Example:
        >>> import torch
        >>> logits = torch.log(torch.tensor([[0.15, 0.85]]))
        >>> logprobs_from_logits(logits, torch.tensor([0]))
        tensor([-1.8971])
    """
    return _forward(logits, labels, temperature, softcap, ignore_index, row_mask, inplace_backward, False)[0]


def logprobs_and_entropy_from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_mask: torch.Tensor | None = None,
    inplace_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each label and entropy of each row, from one read of the logits; gradients flow through both.

    entropy = -sum_j p_j log p_j of the same softmax as in `logprobs_from_logits`; entries with p = 0 add 0.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64; any strides.
        labels: [...] int64|int32 in [0, V), or ignore_index; or [..., K], K labels of each row.
        temperature: > 0, divides the logits after the softcap; default 1.0; or a tensor [...], one for each row.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label that does not count, default -100: log-prob 0, no gradient; a row without another one has
            entropy 0.
        row_mask: [...] bool or integer, 1 = keep, or None, the default; see `logprobs_from_logits`.
        inplace_backward: write the gradient over the logits, default False; see `logprobs_from_logits`.
    Returns:
        (log-probs in the shape of labels, entropy [...]), fp32 (fp64 for fp64 logits), in nats. Differentiable in
        logits. They may be written in place.
    Raises:
        ValueError: as `logprobs_from_logits`.
    Cost: as `logprobs_from_logits`; the entropy adds no read.
    Example:
        >>> import torch
        >>> logprobs, entropy = logprobs_and_entropy_from_logits(torch.zeros(1, 4), torch.tensor([2]))
        >>> logprobs, entropy
        (tensor([-1.3863]), tensor([1.3863]))
    """
    return _forward(logits, labels, temperature, softcap, ignore_index, row_mask, inplace_backward, True)


def entropy_from_logits(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    row_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Entropy of softmax(softcap * tanh(logits / softcap) / temperature), row by row.

    entropy = -sum_j p_j log p_j = log(sum exp(z - max z)) - sum_j p_j (z_j - max z). Logits of -inf add 0.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64; any strides.
        temperature: > 0, divides the logits after the softcap; default 1.0; or a tensor [...], one for each row.
        softcap: > 0, or None for no cap, the default.
        row_mask: [...] bool or integer, 1 = keep, or None, the default, for all rows; those under 0 are not read, and
            give 0 and no gradient.
    Returns:
        [...] fp32 (fp64 for fp64 logits), in nats, between 0 and log V; a row of nothing but -inf gives 0.
        Differentiable in logits. It may be written in place.
    Raises:
        ValueError: logits is not a floating tensor [..., V]; temperature or softcap not > 0 and finite; row_mask is
            no mask of the rows.
    Cost: reads the logits once, and once more in the backward; no host sync.
    Example:
        >>> import torch
        >>> entropy_from_logits(torch.zeros(1, 8))
        tensor([2.0794])
    """
    check_logits("logits", logits)
    scale = check_scale(temperature, softcap, logits, logits.shape[:-1])
    labels = None
    if row_mask is not None:
        check_same_device(logits=logits, row_mask=row_mask)
        labels = torch.where(check_mask("row_mask", row_mask, tuple(logits.shape[:-1])), 0, -100)
    return _logprobs(logits, labels, *scale, -100, True, False)[1]
