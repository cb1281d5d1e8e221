"""Log-probs, losses and KL from hidden states and the LM head; the [N, V] logits never exist as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _linear_ops as ops
from ._autograd import needs_grad
from ._checks import FLOATS, check_dtype, check_in, check_mask, check_range, check_same_device, check_shape
from .kl import DIRECTIONS
from .ppo import PPOLoss, _check_numbers, _metrics, _normalizer

_REDUCTIONS = ("mean", "sum", "none")
_PRECISIONS = ("exact", "fast")
_INF = float("inf")


def _check_head(hidden_states, weight, bias, prefix=""):
    """Check one model's hidden states, head and bias; return them as autocast wants them, hidden states flat."""
    names = [prefix + name for name in ("hidden_states", "weight", "bias")]
    for name, x in zip(names, (hidden_states, weight, bias)):
        if hasattr(x, "device_mesh"):
            raise ValueError(
                f"{name} is a DTensor with placements {list(x.placements)}, expected a plain tensor: pass "
                "full_tensor(), or, of a head sharded by vocabulary, to_local() with process_group and "
                "vocab_start_index; under FSDP2 call inside the model's forward (linear_logprobs_from_model does)"
            )
    check_dtype(names[0], hidden_states)
    check_dtype(names[1], weight)
    if hidden_states.dim() < 1 or hidden_states.shape[-1] < 1:
        raise ValueError(f"{names[0]} has shape {list(hidden_states.shape)}, expected [..., H] with H >= 1")
    check_shape(names[1], weight, (None, hidden_states.shape[-1]), f"[V, H], H as in {names[0]}")
    if weight.shape[0] < 1:
        raise ValueError(f"{names[1]} has shape {list(weight.shape)}, expected [V, H] with V >= 1")
    if bias is not None:
        check_dtype(names[2], bias)
        check_shape(names[2], bias, (weight.shape[0],), f"[V], V as in {names[1]}")
    check_same_device(**dict(zip(names, (hidden_states, weight, bias))))
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden_states.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    if (hidden_states.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(
            f"{names[1]} has dtype {weight.dtype}, {names[0]} {hidden_states.dtype}; expected float64 for both or for "
            "neither"
        )
    return hidden_states.reshape(-1, hidden_states.shape[-1]), weight, bias


def _check_scale(temperature, softcap, labels):
    """(temperatures [M] or None, temperature, softcap) from a number or a tensor of temperatures."""
    if softcap is not None:
        check_range("softcap", softcap, 0.0, _INF, low_open=True, high_open=True)
        softcap = float(softcap)
    if isinstance(temperature, Tensor) and labels is not None:
        check_dtype("temperature", temperature)
        check_shape("temperature", temperature, tuple(labels.shape), "a number, or the shape of labels")
        check_same_device(labels=labels, temperature=temperature)
        return temperature.detach().reshape(-1), 1.0, softcap
    check_range("temperature", temperature, 0.0, _INF, low_open=True, high_open=True)
    return None, float(temperature), softcap


def _check_labels(labels, rows, hidden_states):
    """Check labels and rows; return them flat."""
    check_dtype("labels", labels, torch.int64)
    if rows is None:
        check_shape("labels", labels, tuple(hidden_states.shape[:-1]), "hidden_states without its last dimension")
    else:
        if hidden_states.dim() != 2:
            raise ValueError(f"hidden_states has shape {list(hidden_states.shape)}, expected [N, H] to go with rows")
        check_dtype("rows", rows, torch.int64)
        check_shape("rows", rows, tuple(labels.shape), "the shape of labels")
        rows = rows.reshape(-1)
    check_same_device(hidden_states=hidden_states, labels=labels, rows=rows)
    return labels.reshape(-1), rows


def _check_execution(chunk_size, precision, process_group, vocab_start_index):
    """(chunk size or 0, whether factors may be rounded, name of the group or "", first column)."""
    if chunk_size is not None:
        check_range("chunk_size", chunk_size, 1)
    check_in("precision", precision, _PRECISIONS)
    check_range("vocab_start_index", vocab_start_index, 0)
    if process_group is None and vocab_start_index:
        raise ValueError(f"vocab_start_index is {vocab_start_index}, expected 0 when process_group is None")
    name = "" if process_group is None else process_group.group_name
    return int(chunk_size or 0), precision == "fast", name, int(vocab_start_index)


def _wants_slopes(hidden, weight, bias):
    """Whether the gradient goes to the hidden states alone, so that the forward can make it."""
    return needs_grad(hidden) and not (needs_grad(weight) or needs_grad(bias))


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each label under the LM head's softmax, from hidden states, without the [N, V] logits.

    logits = hidden_states[rows] weight^T + bias; then as `logprobs_from_logits`: z = softcap tanh(logits / softcap) /
    temperature, log p = (z_label - max z) - log(sum exp(z - max z)).

    Args:
        hidden_states: [N, H], or [..., H] without rows; fp32, bf16, fp16 or fp64.
        weight: [V, H], the LM head; fp32, bf16 or fp16, which may differ from hidden_states', or fp64 with fp64. Under
            autocast both are cast.
        labels: [N] (or [...]) int64, or [M] with rows; in [0, V) of the whole vocabulary, or ignore_index.
        rows: [M] int64 in [0, N), the row of hidden_states that predicts each label; several labels may read one row,
            as the first tokens of K responses read the prompt's last row. None, the default: row i predicts label i.
        bias: [V], or None, the default; entries of -inf ban tokens.
        temperature: > 0, default 1.0; or a tensor in the shape of labels, one for each, which is not differentiated.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label of rows that do not count, default -100: 0, no gradient, hidden states may be NaN.
        return_entropy: return the entropy too, default False.
        chunk_size: tokens handled at a time; None, the default, lets the backend choose. It bounds the memory and
            does not change what is computed.
        precision: "exact", the default: products of the inputs as they are, with fp32 results (d/dlogits is rounded
            once to the inputs' half dtype on a GPU only). "fast": of bf16 inputs on a CPU, products rounded to bf16,
            as PyTorch's own are; of a half and an fp32 input, the latter rounded to the half dtype.
            docs/ops/linear.md has the speed and the errors of both.
        process_group: ranks that hold the vocabulary's columns, in shards of any size; None, the default, for a head
            in one piece. Every rank passes the same hidden states and labels and its own weight and bias, gets the
            same log-probs, and the whole gradient of hidden_states.
        vocab_start_index: first token of this rank's shard, default 0.
    Returns:
        log-probs in the shape of labels, fp32 (fp64 for fp64), in nats; with return_entropy (log-probs, entropy).
        Differentiable in hidden_states, weight and bias; their gradients are summed in fp32 and rounded once.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; a DTensor; a number out of range; a label, row or temperature
            out of range, checked on the CPU, and elsewhere only with RLHF_KERNELS_CHECK=1; without it the row becomes
            NaN.
    Cost: 2NVH floating-point operations forward and 6NVH backward, which recomputes the logits; one chunk of logits
        in fp32 and, if the head is trained, a [V, H] fp32 sum in memory. Where only hidden_states need a gradient and
        no entropy is asked for: 4NVH forward, none backward, and [M, H] fp32 kept between. No host sync on a GPU.
    Example:
        >>> import torch
        >>> hidden, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.7346, 0.0]])
        >>> linear_logprobs(hidden, head, torch.tensor([0, 1]), rows=torch.tensor([0, 0]))
        tensor([-1.8971, -0.1625])
    """
    hidden, weight, bias = _check_head(hidden_states, weight, bias)
    flat_labels, rows = _check_labels(labels, rows, hidden_states)
    temperatures, temperature, softcap = _check_scale(temperature, softcap, labels)
    execution = _check_execution(chunk_size, precision, process_group, vocab_start_index)
    with_slopes = _wants_slopes(hidden, weight, bias) and not return_entropy
    logprobs, entropy, *_ = ops.logprobs(
        hidden, weight, flat_labels, rows, bias, temperatures, temperature, softcap, ignore_index, return_entropy,
        with_slopes, *execution,
    )  # fmt: skip
    logprobs = logprobs.view(labels.shape)
    return (logprobs, entropy.view(labels.shape)) if return_entropy else logprobs


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
    check_in("reduction", reduction, _REDUCTIONS)
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f"num_items_in_batch needs reduction='mean', got reduction={reduction!r}")
    if reduction == "none":
        return 0.0 - linear_logprobs(
            hidden_states, weight, labels, rows=rows, bias=bias, temperature=temperature, softcap=softcap,
            ignore_index=ignore_index, chunk_size=chunk_size, precision=precision, process_group=process_group,
            vocab_start_index=vocab_start_index,
        )  # fmt: skip
    hidden, weight, bias = _check_head(hidden_states, weight, bias)
    flat_labels, rows = _check_labels(labels, rows, hidden_states)
    temperatures, temperature, softcap = _check_scale(temperature, softcap, labels)
    execution = _check_execution(chunk_size, precision, process_group, vocab_start_index)
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


def linear_ppo_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    loss_agg_mode: str = "token-mean",
    num_items_in_batch: int | float | Tensor | None = None,
    chunk_size: int | None = None,
    precision: str = "exact",
    process_group=None,
    vocab_start_index: int = 0,
) -> PPOLoss:
    """PPO's policy loss from hidden states and the LM head, with the gradients made in the forward.

    policy_loss - entropy_coef * entropy of `ppo_loss`, with log-probs and entropies as in `linear_logprobs`. The value
    loss does not pass through the head: take it from `ppo_loss`, or a plain regression.

    Args:
        hidden_states: [B, T, H], or [N, H] with rows or packed labels; fp32, bf16, fp16 or fp64.
        weight: [V, H], dtypes as in `linear_logprobs`.
        labels: [B, T] int64 in [0, V), the sampled tokens; or [N], packed, for the two token modes. Under mask 0
            they may hold anything.
        old_log_probs: like labels, floating, +log p when the tokens were sampled, in nats.
        advantages: like labels, floating; constants.
        response_mask: like labels, bool or integer, 1 = keep. What stands under a 0 may be NaN.
        rows: like labels, int64, the row of hidden_states that predicts each label; default None.
        bias: [V], or None, the default.
        temperature: > 0, default 1.0: the one the tokens were sampled with; or a tensor like labels.
        softcap: > 0, or None for no cap, the default.
        cliprange: >= 0 and <= 1, default 0.2.
        cliprange_high: >= 0; None, the default, for cliprange.
        dual_clip: > 1, bound on the ratio where the advantage is negative; None, the default, for no bound.
        entropy_coef: >= 0, weight of the entropy bonus, default 0.0.
        loss_agg_mode: as in `ppo_loss`, default "token-mean".
        num_items_in_batch: number or 0-d tensor, as in `ppo_loss`, default None.
        chunk_size: tokens handled at a time; default None: the backend chooses.
        precision: "exact", the default, or "fast", as in `linear_logprobs`.
        process_group: ranks that hold the vocabulary's columns, as in `linear_cross_entropy`, default None.
        vocab_start_index: first token of this rank's shard, default 0.
    Returns:
        PPOLoss(loss, policy_loss, value_loss, metrics), fp32 (fp64 for fp64). Only loss backpropagates, to
        hidden_states, weight and bias; policy_loss is detached, value_loss None. Metrics as in `ppo_loss` with
        entropy.
    Raises:
        ValueError: as `linear_logprobs` and `ppo_loss`; packed labels with a "seq-*" mode.
    Cost: 6NVH floating-point operations for forward and backward together; memory as `linear_cross_entropy`. No host
        sync on a GPU.
    Example:
        >>> import torch
        >>> hidden, head = torch.zeros(1, 2, 3, requires_grad=True), torch.eye(4, 3)
        >>> tokens, old = torch.tensor([[1, 2]]), torch.full((1, 2), -1.3863)
        >>> ppo = linear_ppo_loss(hidden, head, tokens, old, torch.tensor([[0.65, 0.15]]), torch.ones(1, 2).bool())
        >>> ppo.loss.backward()
        >>> ppo.policy_loss, hidden.grad.shape
        (tensor(-0.4000), torch.Size([1, 2, 3]))
    """
    hidden, weight, bias = _check_head(hidden_states, weight, bias)
    _, flat_rows = _check_labels(labels, rows, hidden_states)
    temperatures, temperature, softcap = _check_scale(temperature, softcap, labels)
    for name, x in (("old_log_probs", old_log_probs), ("advantages", advantages)):
        check_dtype(name, x, FLOATS)
        check_shape(name, x, tuple(labels.shape), "the shape of labels")
    mask = check_mask("response_mask", response_mask, tuple(labels.shape))
    check_same_device(hidden_states=hidden, old_log_probs=old_log_probs, advantages=advantages, response_mask=mask)
    _check_numbers(cliprange, cliprange_high, dual_clip, None, 0.0)
    check_range("entropy_coef", entropy_coef, 0)
    normalizer = _normalizer(num_items_in_batch, loss_agg_mode, hidden)
    if labels.dim() != 2 and not (labels.dim() == 1 and loss_agg_mode.startswith("token")):
        wanted = "[B, T], or [N] with loss_agg_mode token-mean or token-sum"
        raise ValueError(f"labels has shape {list(labels.shape)}, expected {wanted}; got {loss_agg_mode!r}")
    loss, policy_loss, stats, *_ = ops.ppo_loss(
        hidden, weight, labels, flat_rows, bias, temperatures, old_log_probs.detach(), advantages.detach(), mask,
        normalizer, temperature, softcap, float(cliprange),
        float(cliprange if cliprange_high is None else cliprange_high),
        None if dual_clip is None else float(dual_clip), float(entropy_coef), loss_agg_mode,
        *_check_execution(chunk_size, precision, process_group, vocab_start_index),
        *(needs_grad(x) for x in (hidden, weight, bias)),
    )  # fmt: skip
    return PPOLoss(loss, policy_loss, None, _metrics(stats, None, loss, dual_clip))


def linear_kl(
    hidden_states: Tensor,
    weight: Tensor,
    ref_hidden_states: Tensor,
    ref_weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    direction: str = "reverse",
    chunk_size: int | None = None,
    precision: str = "exact",
    process_group=None,
) -> Tensor:
    """Exact KL divergence between two models' next-token distributions, from hidden states and LM heads.

    `kl_from_logits` of hidden_states weight^T + bias and ref_hidden_states ref_weight^T + ref_bias, both scaled by
    softcap and temperature as in `linear_logprobs`; neither [N, V] tensor ever exists. The reference is a constant.

    Args:
        hidden_states: [..., H] fp32, bf16, fp16 or fp64, the policy's; [N, H] with rows.
        weight: [V, H], dtypes as in `linear_logprobs`.
        ref_hidden_states: [..., H2], the reference's, with the same leading dimensions; H2 may differ from H.
        ref_weight: [V, H2]; may be the policy's own head.
        rows: [M] int64 in [0, N), the rows of both hidden states to compare; None, the default: all.
        bias: [V], or None, the default.
        ref_bias: [V], or None, the default.
        temperature: > 0, divides both, default 1.0.
        softcap: > 0, applied to both, or None for no cap, the default.
        direction: "reverse", the default: KL(policy || reference); "forward": KL(reference || policy).
        chunk_size: tokens handled at a time; default None: the backend chooses.
        precision: "exact", the default, or "fast", as in `linear_logprobs`.
        process_group: ranks that hold the vocabulary's columns of both heads, cut at the same places, default None.
    Returns:
        [...], or [M] with rows, fp32 (fp64 for fp64 hidden_states), in nats, >= 0; +inf where a bias of -inf makes it
        so. Differentiable in hidden_states, weight and bias; nothing flows to the reference.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; a DTensor; a number out of range; a row out of range (as a
            label in `linear_logprobs`); unknown direction.
    Cost: 2NV(H + H2) floating-point operations forward, 2NV(H + H2) + 4NVH backward; two chunks of logits in fp32.
        Where only hidden_states need a gradient: 2NVH more forward, none backward. No host sync.
    Example:
        >>> import torch
        >>> hidden, head = torch.ones(1, 1), torch.tensor([[0.0], [0.0]])
        >>> linear_kl(hidden, head, hidden, torch.log(torch.tensor([[0.25], [0.75]])))
        tensor([0.1438])
    """
    hidden, weight, bias = _check_head(hidden_states, weight, bias)
    ref_hidden, ref_weight, ref_bias = _check_head(ref_hidden_states, ref_weight, ref_bias, "ref_")
    shape = hidden_states.shape[:-1]
    check_shape(
        "ref_hidden_states", ref_hidden_states, (*shape, ref_hidden.shape[-1]), "leading dimensions of hidden_states"
    )
    check_shape("ref_weight", ref_weight, (weight.shape[0], None), "[V, H2], V as in weight")
    if rows is not None:
        check_dtype("rows", rows, torch.int64)
        check_shape("rows", rows, (None,), "[M]")
        if hidden_states.dim() != 2:
            raise ValueError(f"hidden_states has shape {list(hidden_states.shape)}, expected [N, H] to go with rows")
        shape = rows.shape
    check_same_device(hidden_states=hidden, ref_hidden_states=ref_hidden, rows=rows)
    _, temperature, softcap = _check_scale(temperature, softcap, None)
    check_in("direction", direction, DIRECTIONS)
    execution = _check_execution(chunk_size, precision, process_group, 0)[:3]
    return ops.kl(
        hidden, weight, ref_hidden.detach(), ref_weight.detach(), rows, bias,
        None if ref_bias is None else ref_bias.detach(), temperature, softcap, direction == "reverse",
        _wants_slopes(hidden, weight, bias), *execution,
    )[0].view(shape)  # fmt: skip
