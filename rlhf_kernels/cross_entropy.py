"""Cross-entropy from hidden states and the LM head; the [N, V] logits never exist as a whole."""

from __future__ import annotations

from torch import Tensor

from . import _linear_ops as ops
from ._autograd import needs_grad
from ._checks import check_in, check_range, check_shape
from ._linear_checks import check_execution, check_head, check_labels, check_scale
from .linear import linear_logprobs

REDUCTIONS = ("mean", "sum", "none")


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
    reduction: str = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    chunk_size: int | None = None,
    precision: str = "exact",
    process_group=None,
    vocab_start_index: int = 0,
) -> Tensor:
    """Cross-entropy -log p(label) from hidden states and the LM head, with the gradients made in the forward.

    The sum over counting labels of -log p as in `linear_logprobs`, divided by their number or by num_items_in_batch.

    Args:
        hidden_states: [N, H], or [..., H] without rows; fp32, bf16, fp16 or fp64.
        weight: [V, H], dtypes as in `linear_logprobs`.
        labels: [N] (or [...]) int64, or [M] with rows; in [0, V), or ignore_index. They are not shifted.
        rows: [M] int64, the row of hidden_states that predicts each label; default None: row i predicts label i.
        bias: [V], or None, the default.
        temperature: > 0, default 1.0; or a tensor in the shape of labels.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label of rows that do not count, default -100.
        reduction: "mean", the default, "sum", or "none" for one loss a label.
        num_items_in_batch: number or 0-d tensor that divides instead of this call's count of labels, so that the
            gradients of micro-batches and ranks add up to those of the whole batch; only with reduction="mean".
        chunk_size: tokens handled at a time; default None: the backend chooses.
        precision: "exact", the default, or "fast", as in `linear_logprobs`.
        process_group: ranks that hold the vocabulary's columns, as in `linear_logprobs`, default None; chunk_size
            must then be equal on all ranks.
        vocab_start_index: first token of this rank's shard, default 0.
    Returns:
        0-d, or the shape of labels with reduction="none", fp32 (fp64 for fp64), in nats. Differentiable in
        hidden_states, weight and bias. A batch without a counting label gives 0.
    Raises:
        ValueError: as `linear_logprobs`; unknown reduction; num_items_in_batch not > 0 or without "mean".
    Cost: 6NVH floating-point operations for forward and backward together (8NVH with "none"); gradients wait in the
        inputs' dtypes (fp32 for fp16) until the backward multiplies them. No host sync on a GPU.
    Example:
        >>> import torch
        >>> hidden, head = torch.zeros(2, 3, requires_grad=True), torch.eye(4, 3)
        >>> linear_cross_entropy(hidden, head, torch.tensor([1, -100]))
        tensor(1.3863, grad_fn=...)
    """
    check_in("reduction", reduction, REDUCTIONS)
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f"num_items_in_batch needs reduction='mean', got reduction={reduction!r}")
    if reduction == "none":
        return 0.0 - linear_logprobs(
            hidden_states, weight, labels, rows=rows, bias=bias, temperature=temperature, softcap=softcap,
            ignore_index=ignore_index, chunk_size=chunk_size, precision=precision, process_group=process_group,
            vocab_start_index=vocab_start_index,
        )  # fmt: skip
    hidden, weight, bias = check_head(hidden_states, weight, bias)
    flat_labels, rows = check_labels(labels, rows, hidden_states)
    temperatures, temperature, softcap = check_scale(temperature, softcap, labels)
    execution = check_execution(chunk_size, precision, process_group, vocab_start_index)
    needs = [needs_grad(x) for x in (hidden, weight, bias)]
    loss = ops.cross_entropy(
        hidden, weight, flat_labels, rows, bias, temperatures, temperature, softcap, ignore_index, *execution, *needs
    )[0]
    if reduction == "sum":
        return loss
    if num_items_in_batch is None:
        return loss / (labels != ignore_index).sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        check_shape("num_items_in_batch", num_items_in_batch, (), "a number or a 0-d tensor")
        return loss / num_items_in_batch.detach().to(loss.device)
    check_range("num_items_in_batch", num_items_in_batch, 0, low_open=True)
    return loss / num_items_in_batch
