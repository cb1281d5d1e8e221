"""Log-probs from hidden states and the LM head; the [N, V] logits never exist as a whole."""

from __future__ import annotations

from torch import Tensor

from . import _linear_ops as ops
from . import _linear_several
from ._linear_checks import check_execution, check_head, check_labels, check_lora, check_scale, wants_slopes
from ._linear_several import are_several, check_several


def linear_logprobs(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    precision: str = "exact",
    process_group=None,
    vocab_start_index: int = 0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each label under the LM head's softmax, from hidden states, without the [N, V] logits.

    logits = hidden_states[rows] weight^T + bias; then as `logprobs_from_logits`: z = softcap tanh(logits / softcap) /
    temperature, log p = (z_label - max z) - log(sum exp(z - max z)).

    Args:
        hidden_states: [N, H], or [..., H] without rows; fp32, bf16, fp16 or fp64.
        weight: [V, H], the LM head; fp32, bf16 or fp16, which may differ from hidden_states', or fp64 with fp64. Under
            autocast both are cast.
        labels: [N] (or [...]) int64|int32, or [M] with rows; in [0, V) of the whole vocabulary, or ignore_index. Or
            [N, K] ([..., K], [M, K]), K labels of each row, which may be the same; without process_group.
        rows: [M] int64|int32 in [0, N), the row of hidden_states that predicts each label; several labels may read one
            row, as the first tokens of K responses read the prompt's last row. None, the default: row i predicts label
            i.
        bias: [V], or None, the default; entries of -inf ban tokens.
        temperature: > 0, default 1.0; or a tensor with one for each row of labels, which is not differentiated.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label of rows that do not count, default -100: 0, no gradient, hidden states may be NaN.
        return_entropy: return the entropy too, default False.
        chunk_size: tokens handled at a time; None, the default, lets the backend choose. It bounds the memory and
            does not change what is computed.
        precision: "exact", the default: products of the inputs as they are, with fp32 results, also where PyTorch's
            switches ask for TF32 (d/dlogits is rounded once to the inputs' half dtype on a GPU only). "fast": of bf16
            inputs on a CPU, products rounded to bf16, as PyTorch's own are; of a half and an fp32 input, the latter
            rounded to the half dtype.
            docs/ops/linear.md has the speed and the errors of both.
        process_group: ranks that hold the vocabulary's columns, in shards of any size; None, the default, for a head
            in one piece. Every rank passes the same hidden states and labels and its own weight and bias, gets the
            same log-probs, and the whole gradient of hidden_states.
        vocab_start_index: first token of this rank's shard, default 0.
        lora: (A [r, H], B [V, r], scaling) of a LoRA layer on the head, as peft has them: scaling (hidden_states A^T)
            B^T is added to the logits, without weight + scaling B A. A and B fp32, bf16 or fp16, or fp64 with fp64, as
            they are under autocast too; scaling finite. With process_group B is the rank's shard, A the same on all
            ranks. None, the default, for none.
    Returns:
        log-probs in the shape of labels, fp32 (fp64 for fp64), in nats; with return_entropy (log-probs, entropy), one
        entropy a row.
        Differentiable in hidden_states, weight, bias, A and B; their gradients are summed in fp32 and rounded once (the
        share of hidden_states through A apart). Results may be written in place.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; a DTensor; a number out of range; a label, row or temperature
            out of range, checked on the CPU, and elsewhere only with RLHF_KERNELS_CHECK=1; without it the row becomes
            NaN.
    Cost: 2NVH floating-point operations forward and 6NVH backward, which recomputes the logits; one chunk of logits
        in fp32 and, if the head is trained, a [V, H] fp32 sum in memory. Where only hidden_states need a gradient and
        no entropy is asked for: 4NVH forward, none backward, and [M, H] fp32 kept between. With lora 2Nr(V + H) more
        forward and 6NVr + 4NrH more backward, which then always recomputes, and a copy of hidden_states in fp32. K
        labels a row cost 2NKH forward and 4NKH backward more. No host sync on a GPU.
    Example:
        >>> import torch
        >>> hidden, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.7346, 0.0]])
        >>> linear_logprobs(hidden, head, torch.tensor([0, 1]), rows=torch.tensor([0, 0]))
        tensor([-1.8971, -0.1625])
    """
    hidden, weight, bias = check_head(hidden_states, weight, bias)
    several = are_several(labels, rows, hidden_states)
    if several:
        labels = check_several(labels, process_group)
    of_rows = labels[..., 0] if several else labels  # a label of each row
    flat_labels, rows = check_labels(of_rows, rows, hidden_states)
    temperatures, temperature, softcap = check_scale(temperature, softcap, of_rows)
    execution = check_execution(chunk_size, precision, process_group, vocab_start_index)
    if several:
        flat_labels = labels.reshape(-1, labels.shape[-1])
    low = up = None
    if lora is not None:
        kept = flat_labels != ignore_index
        low, up = check_lora(lora, hidden, weight, kept.any(-1) if several else kept, rows)
    inputs = hidden, weight, flat_labels, rows, bias, temperatures, low, up, temperature, softcap, ignore_index
    if several:
        logprobs, entropy, *_ = _linear_several.logprobs(*inputs, return_entropy, *execution[:2])
    else:
        with_slopes = wants_slopes(hidden, weight, bias, low) and not return_entropy
        logprobs, entropy, *_ = ops.logprobs(*inputs, return_entropy, with_slopes, *execution)
    logprobs = logprobs.view(labels.shape)
    return (logprobs, entropy.view(of_rows.shape)) if return_entropy else logprobs
