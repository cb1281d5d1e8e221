"""Cross-entropy from logits, and from hidden states and the LM head, where the [N, V] logits never exist as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cross_entropy_ops as ops
from ._autograd import needs_grad
from ._checks import check_dtype, check_in, check_index, check_range, check_same_device, check_shape
from ._linear_checks import check_execution, check_head, check_labels, check_lora, check_scale, wants_slopes
from .logprobs import _check_options, check_logits

REDUCTIONS = ("mean", "sum", "none")
LOSS_TYPES = ("nll", "dft")


def _check_reduction(reduction, num_items_in_batch):
    check_in("reduction", reduction, REDUCTIONS)
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items_in_batch needs reduction='mean', got reduction={reduction!r}")
    if isinstance(num_items_in_batch, Tensor):
        check_shape("num_items_in_batch", num_items_in_batch, (), "a number or a 0-d tensor")
    else:
        check_range("num_items_in_batch", num_items_in_batch, 0, low_open=True)


def _mean(total, labels, ignore_index, num_items_in_batch):
    """The sum of the losses over their number, or over that of the whole batch."""
    if num_items_in_batch is None:
        return total / (labels != ignore_index).sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        return total / num_items_in_batch.detach().to(total.device)
    return total / num_items_in_batch


def _check_terms(labels, shape, weights, ignore_index, label_smoothing, z_loss, loss_type):
    """(labels [N], ignored where the weight is 0, weights [N] or None, label_smoothing, z_loss, dft)."""
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    check_range("z_loss", z_loss, 0.0, float("inf"), high_open=True)
    check_in("loss_type", loss_type, LOSS_TYPES)
    if loss_type == "dft" and label_smoothing:
        raise ValueError(f"label_smoothing must be 0 with loss_type='dft', got {label_smoothing!r}")
    if weights is not None:
        check_dtype("weights", weights)
        check_shape("weights", weights, shape, "the shape of labels")
        check_same_device(labels=labels, weights=weights)
        weights = weights.detach().reshape(-1)
        labels = torch.where(weights == 0, ignore_index, labels)
    return labels, weights, float(label_smoothing), float(z_loss), loss_type == "dft"


def cross_entropy_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: Tensor | None = None,
    loss_type: str = "nll",
    reduction: str = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of labels under the softmax of `logprobs_from_logits`, with what trainers add to it.

    With log p and z of `logprobs_from_logits`, S = log sum exp(z) and e the smoothing, a label costs

        weight (-(1 - e) log p_label - e mean_j log p_j + z_loss S^2)

    as torch.nn.functional.cross_entropy and, for S^2, PaLM (arXiv 2204.02311, section 5). The mean over j leaves out
    banned tokens, whose logit is -inf: for them PyTorch's smoothed loss is inf. With loss_type "dft", dynamic
    fine-tuning (arXiv 2508.05629), -log p_label is multiplied by p_label, as a constant.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64.
        labels: [...] int64|int32 in [0, V), or ignore_index. They are not shifted.
        temperature: > 0, divides the logits after the softcap; default 1.0.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label of rows that do not count, default -100. Their logits and weights may be NaN.
        label_smoothing: >= 0 and <= 1, share of the uniform distribution in the target, default 0.0.
        z_loss: >= 0, weight of S^2, default 0.0; PaLM's is 1e-4.
        weights: [...] floating, of any sign, what each label's loss is multiplied by, a constant; default None. One
            that is 0 leaves its label out, whose logits may then be NaN.
        loss_type: "nll", the default, or "dft", which takes no smoothing.
        reduction: "mean", the default, "sum", or "none" for one loss a label.
        num_items_in_batch: number or 0-d tensor that divides instead of this call's count of labels; only with
            reduction="mean", default None. The count is of all labels but ignore_index, whatever their weights.
    Returns:
        0-d, or [...] with reduction="none", fp32 (fp64 for fp64 logits), in nats. Differentiable in logits. A batch
        without a counting label gives 0.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; a number out of range; unknown reduction or loss_type;
            label_smoothing with "dft"; num_items_in_batch without "mean"; a label outside [0, V), as in
            `logprobs_from_logits`.
    Cost: reads the logits once, and once more in the backward, which writes their gradient; no host sync.
    Example:
        >>> import torch
        >>> logits = torch.log(torch.tensor([[0.15, 0.85]]))
        >>> cross_entropy_from_logits(logits, torch.tensor([0]))
        tensor(1.8971)
        >>> cross_entropy_from_logits(logits, torch.tensor([0]), label_smoothing=0.5)
        tensor(1.4635)
    """
    _check_reduction(reduction, num_items_in_batch)
    check_logits("logits", logits)
    labels = check_index("labels", labels)
    check_shape("labels", labels, tuple(logits.shape[:-1]), "the shape of logits without its last dimension")
    check_same_device(logits=logits, labels=labels)
    flat_labels, weights, *terms = _check_terms(
        labels.reshape(-1), tuple(labels.shape), weights, ignore_index, label_smoothing, z_loss, loss_type
    )
    options = (*_check_options(temperature, softcap), ignore_index, *terms)
    losses = ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), flat_labels, weights, *options)[0]
    if reduction == "none":
        return losses.view(labels.shape)
    total = losses.sum()
    return total if reduction == "sum" else _mean(total, labels, ignore_index, num_items_in_batch)


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: Tensor | None = None,
    loss_type: str = "nll",
    reduction: str = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    chunk_size: int | None = None,
    precision: str = "exact",
    process_group=None,
    vocab_start_index: int = 0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Cross-entropy -log p(label) from hidden states and the LM head, with the gradients made in the forward.

    The sum over counting labels of -log p as in `linear_logprobs`, divided by their number or by num_items_in_batch;
    with label_smoothing, z_loss, weights or loss_type "dft" what `cross_entropy_from_logits` makes of it.

    Args:
        hidden_states: [N, H], or [..., H] without rows; fp32, bf16, fp16 or fp64.
        weight: [V, H], dtypes as in `linear_logprobs`.
        labels: [N] (or [...]) int64|int32, or [M] with rows; in [0, V), or ignore_index. They are not shifted.
        rows: [M] int64|int32, the row of hidden_states that predicts each label; default None: row i predicts label i.
        bias: [V], or None, the default.
        temperature: > 0, default 1.0; or a tensor in the shape of labels.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label of rows that do not count, default -100.
        label_smoothing: >= 0 and <= 1, share of the uniform distribution over the tokens that no bias bans in the
            target, default 0.0.
        z_loss: >= 0, weight of the squared log-sum-exp of the scaled logits, default 0.0.
        weights: like labels, floating, of any sign, constants, default None; a label with weight 0 does not count.
        loss_type: "nll", the default, or "dft": times p(label), as a constant; it takes no smoothing.
        reduction: "mean", the default, "sum", or "none" for one loss a label.
        num_items_in_batch: number or 0-d tensor that divides instead of this call's count of labels, so that the
            gradients of micro-batches and ranks add up to those of the whole batch; only with reduction="mean". The
            count is of all labels but ignore_index, whatever their weights.
        chunk_size: tokens handled at a time; default None: the backend chooses.
        precision: "exact", the default, or "fast", as in `linear_logprobs`.
        process_group: ranks that hold the vocabulary's columns, as in `linear_logprobs`, default None; chunk_size
            must then be equal on all ranks.
        vocab_start_index: first token of this rank's shard, default 0.
        lora: (A [r, H], B [V, r], scaling) of a LoRA layer on the head, as in `linear_logprobs`, default None.
    Returns:
        0-d, or the shape of labels with reduction="none", fp32 (fp64 for fp64), in nats. Differentiable in
        hidden_states, weight, bias, A and B. A batch without a counting label gives 0.
    Raises:
        ValueError: as `linear_logprobs` and `cross_entropy_from_logits`.
    Cost: 6NVH floating-point operations for forward and backward together, whatever the loss adds ("none": 8NVH, or,
        where only hidden_states need a gradient, 4NVH); gradients wait in the inputs' dtypes (fp32 for fp16) until the
        backward multiplies them. No host sync on a GPU.
    Example:
        >>> import torch
        >>> hidden, head = torch.zeros(2, 3, requires_grad=True), torch.eye(4, 3)
        >>> linear_cross_entropy(hidden, head, torch.tensor([1, -100]))
        tensor(1.3863, grad_fn=...)
    """
    _check_reduction(reduction, num_items_in_batch)
    hidden, weight, bias = check_head(hidden_states, weight, bias)
    flat_labels, rows = check_labels(labels, rows, hidden_states)
    flat_labels, weights, *terms = _check_terms(
        flat_labels, tuple(labels.shape), weights, ignore_index, label_smoothing, z_loss, loss_type
    )
    temperatures, temperature, softcap = check_scale(temperature, softcap, labels)
    execution = check_execution(chunk_size, precision, process_group, vocab_start_index)
    low = up = None
    if lora is not None:
        low, up = check_lora(lora, hidden, weight, flat_labels != ignore_index, rows)
    inputs = (hidden, weight, flat_labels, rows, bias, temperatures, low, up, weights)
    options = (temperature, softcap, ignore_index, *terms)
    if reduction == "none":
        with_slopes = wants_slopes(hidden, weight, bias, low)
        losses = ops.linear_cross_entropy_each(*inputs, *options, with_slopes, *execution)[0]
        return losses.view(labels.shape)
    needs = [needs_grad(x) for x in (hidden, weight, bias, low, up)]
    loss = ops.linear_cross_entropy(*inputs, *options, *execution, needs)[0]
    return loss if reduction == "sum" else _mean(loss, labels, ignore_index, num_items_in_batch)
