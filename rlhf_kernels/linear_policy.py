"""Policy losses from hidden states and the LM head; the [N, V] logits never exist as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _linear_ops as ops
from ._autograd import needs_grad
from ._checks import FLOATS, check_dtype, check_mask, check_range, check_same_device, check_shape
from ._linear_checks import check_execution, check_head, check_labels, check_lora, check_scale
from .linear import linear_logprobs
from .objectives import Clip, ClipCov, KLTerm, Objective
from .policy import PolicyLoss, check_kl, normalizer_of, per_token, policy_metrics, policy_settings, with_selection
from .ppo import PPOLoss, _check_numbers, _metrics
from .reference.policy import Tensors


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
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> PPOLoss:
    """PPO's policy loss from hidden states and the LM head, with the gradients made in the forward.

    policy_loss - entropy_coef * entropy of `ppo_loss`, with log-probs and entropies as in `linear_logprobs`. The value
    loss does not pass through the head: take it from `ppo_loss`, or a plain regression.

    Args:
        hidden_states: [B, T, H], or [N, H] with rows or packed labels; fp32, bf16, fp16 or fp64.
        weight: [V, H], dtypes as in `linear_logprobs`.
        labels: [B, T] int64|int32 in [0, V), the sampled tokens; or [N], packed, for the two token modes. Under mask 0
            they may hold anything.
        old_log_probs: like labels, floating, +log p when the tokens were sampled, in nats.
        advantages: like labels, floating; constants.
        response_mask: like labels, bool or integer, 1 = keep. What stands under a 0 may be NaN.
        rows: like labels, int64|int32, the row of hidden_states that predicts each label; default None.
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
        lora: (A [r, H], B [V, r], scaling) of a LoRA layer on the head, as in `linear_logprobs`, default None.
    Returns:
        PPOLoss(loss, policy_loss, value_loss, metrics), fp32 (fp64 for fp64). Only loss backpropagates, to
        hidden_states, weight, bias, A and B; policy_loss is detached, value_loss None. Metrics as in `ppo_loss` with
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
    hidden, weight, bias = check_head(hidden_states, weight, bias)
    flat_labels, flat_rows = check_labels(labels, rows, hidden_states)
    labels = flat_labels.view(labels.shape)
    temperatures, temperature, softcap = check_scale(temperature, softcap, labels)
    for name, x in (("old_log_probs", old_log_probs), ("advantages", advantages)):
        check_dtype(name, x, FLOATS)
        check_shape(name, x, tuple(labels.shape), "the shape of labels")
    mask = check_mask("response_mask", response_mask, tuple(labels.shape))
    check_same_device(hidden_states=hidden, old_log_probs=old_log_probs, advantages=advantages, response_mask=mask)
    _check_numbers(cliprange, cliprange_high, dual_clip, None, 0.0)
    check_range("entropy_coef", entropy_coef, 0)
    normalizer = normalizer_of("num_items_in_batch", num_items_in_batch, "loss_agg_mode", loss_agg_mode, hidden)
    if labels.dim() != 2 and not (labels.dim() == 1 and loss_agg_mode.startswith("token")):
        wanted = "[B, T], or [N] with loss_agg_mode token-mean or token-sum"
        raise ValueError(f"labels has shape {list(labels.shape)}, expected {wanted}; got {loss_agg_mode!r}")
    low, up = check_lora(lora, hidden, weight, mask.reshape(-1), flat_rows)
    loss, policy_loss, stats, *_ = ops.ppo_loss(
        hidden, weight, labels, flat_rows, bias, temperatures, low, up, old_log_probs.detach(), advantages.detach(),
        mask, normalizer, temperature, softcap, float(cliprange),
        float(cliprange if cliprange_high is None else cliprange_high),
        None if dual_clip is None else float(dual_clip), float(entropy_coef), loss_agg_mode,
        *check_execution(chunk_size, precision, process_group, vocab_start_index),
        [needs_grad(x) for x in (hidden, weight, bias, low, up)],
    )  # fmt: skip
    return PPOLoss(loss, policy_loss, None, _metrics(stats, None, loss, dual_clip))


def linear_policy_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    objective: Objective = Clip(),
    ref_log_probs: Tensor | None = None,
    kl: KLTerm | None = None,
    weights: Tensor | None = None,
    log_ratio_clamp: float | None = None,
    entropy_coef: float = 0.0,
    loss_agg_mode: str = "token-mean",
    num_items_in_batch: int | float | Tensor | None = None,
    entropy_agg_mode: str = "token-mean",
    entropy_num_items_in_batch: int | float | Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    precision: str = "exact",
    process_group=None,
    vocab_start_index: int = 0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> PolicyLoss:
    """`policy_loss` from hidden states and the LM head, with the gradients made in the forward.

    Log-probs and entropies as in `linear_logprobs`; everything else as in `policy_loss`.

    Args:
        hidden_states: [B, T, H], or [N, H] with rows or packed labels; fp32, bf16, fp16 or fp64.
        weight: [V, H], dtypes as in `linear_logprobs`.
        labels: [B, T] int64 or int32 in [0, V), the sampled tokens; or [N], packed, for the two token modes and
            objectives of single tokens. Under mask 0 they may hold anything.
        old_log_probs: like labels, floating, +log p when the tokens were sampled, in nats.
        advantages: like labels, or [B] or [B, 1]; constants.
        response_mask: like labels, bool or integer, 1 = keep. What stands under a 0 may be NaN.
        objective: what is maximised, default Clip().
        ref_log_probs: like labels, +log p under the reference; needed with kl, default None.
        kl: `KLTerm`, the KL to the reference inside the loss; None, the default, for none.
        weights: like labels, or [B] or [B, 1], factors >= 0 of the objective's terms; default None.
        log_ratio_clamp: > 0, or None for no bound on the log-ratio, the default.
        entropy_coef: >= 0, weight of the entropy bonus, default 0.0.
        loss_agg_mode: as in `policy_loss`, default "token-mean".
        num_items_in_batch: number or 0-d tensor, as in `policy_loss`, default None.
        entropy_agg_mode: as in `policy_loss`, default "token-mean".
        entropy_num_items_in_batch: as in `policy_loss`, default None.
        rows: like labels, int64 or int32, the row of hidden_states that predicts each label; default None.
        bias: [V], or None, the default.
        temperature: > 0, default 1.0: the one the tokens were sampled with; or a tensor like labels.
        softcap: > 0, or None for no cap, the default.
        chunk_size: tokens handled at a time; default None: the backend chooses.
        precision: "exact", the default, or "fast", as in `linear_logprobs`.
        process_group: ranks that hold the vocabulary's columns, as in `linear_cross_entropy`, default None.
        vocab_start_index: first token of this rank's shard, default 0.
        lora: (A [r, H], B [V, r], scaling) of a LoRA layer on the head, as in `linear_logprobs`, default None.
    Returns:
        PolicyLoss(loss, metrics), fp32 (fp64 for fp64). loss backpropagates to hidden_states, weight, bias, A and B.
        Metrics as in `policy_loss` with entropy.
    Raises:
        ValueError: as `linear_logprobs` and `policy_loss`; packed labels with a "seq-*" mode or an objective of whole
            sequences; process_group with `ClipCov`, whose ranks would draw different tokens.
    Cost: 6NVH floating-point operations for forward and backward together, with KL and weights too. Objectives of
        whole sequences (`GSPO`, `GMPO`, `RLOO` with a clip) and those that choose tokens over the batch (`ClipCov`,
        `KLCov`) need the log-probs first: 2NVH more. Memory as `linear_cross_entropy`. No host sync on a GPU.
    Example:
        >>> import torch
        >>> from rlhf_kernels import GSPO
        >>> hidden, head = torch.zeros(1, 2, 3, requires_grad=True), torch.eye(4, 3)
        >>> tokens, old = torch.tensor([[1, 2]]), torch.full((1, 2), -1.3863)
        >>> loss = linear_policy_loss(
        ...     hidden, head, tokens, old, torch.tensor([0.4]), torch.ones(1, 2).bool(), objective=GSPO()
        ... )
        >>> loss.loss.backward()
        >>> loss.metrics["policy_loss"], hidden.grad.shape
        (tensor(-0.4000), torch.Size([1, 2, 3]))
    """
    hidden, weight, bias = check_head(hidden_states, weight, bias)
    flat_labels, flat_rows = check_labels(labels, rows, hidden_states)
    labels = flat_labels.view(labels.shape)
    temperatures, temperature, softcap = check_scale(temperature, softcap, labels)
    check_dtype("old_log_probs", old_log_probs, FLOATS)
    check_shape("old_log_probs", old_log_probs, tuple(labels.shape), "the shape of labels")
    tensors = Tensors(
        mask=check_mask("response_mask", response_mask, tuple(labels.shape)),
        old_log_probs=old_log_probs,
        advantages=per_token("advantages", advantages, labels),
        ref_log_probs=None if kl is None else ref_log_probs,
        weights=None if weights is None else per_token("weights", weights, labels),
        normalizer=normalizer_of("num_items_in_batch", num_items_in_batch, "loss_agg_mode", loss_agg_mode, hidden),
        entropy_normalizer=normalizer_of(
            "entropy_num_items_in_batch", entropy_num_items_in_batch, "entropy_agg_mode", entropy_agg_mode, hidden
        ),
    )
    kl_numbers = check_kl(ref_log_probs, kl, labels, "labels")
    check_range("entropy_coef", entropy_coef, 0)
    check_same_device(hidden_states=hidden, **tensors._asdict())
    settings = policy_settings(objective, kl_numbers, log_ratio_clamp, entropy_coef, loss_agg_mode, entropy_agg_mode)
    modes = loss_agg_mode, entropy_agg_mode
    packed = labels.dim() == 1 and all(mode.startswith("token") for mode in modes) and not settings.by_sequence
    if labels.dim() != 2 and not packed:
        wanted = "[B, T], or [N] with token-mean or token-sum and an objective of single tokens"
        raise ValueError(f"labels has shape {list(labels.shape)}, expected {wanted}; got {modes} and {objective!r}")
    execution = check_execution(chunk_size, precision, process_group, vocab_start_index)
    if process_group is not None and isinstance(objective, ClipCov):
        raise ValueError("process_group is given, expected None with ClipCov: its ranks would draw different tokens")
    if objective.selects:
        options = {"rows": flat_rows if rows is None else rows, "bias": bias, "softcap": softcap}
        with torch.no_grad():
            log_probs = linear_logprobs(
                hidden_states, weight, torch.where(tensors.mask, labels, -100),
                temperature=temperature if temperatures is None else temperatures.view(labels.shape),
                chunk_size=chunk_size, precision=precision, process_group=process_group,
                vocab_start_index=vocab_start_index, lora=lora, **options,
            )  # fmt: skip
        tensors = with_selection(tensors._replace(log_probs=log_probs), objective)
    constants = (None if x is None else x.detach() for x in (tensors.mask, *tensors[2:7], *tensors[-2:]))
    low, up = check_lora(lora, hidden, weight, tensors.mask.reshape(-1), flat_rows)
    loss, losses, stats, *_ = ops.policy_loss(
        hidden, weight, labels, flat_rows, bias, temperatures, low, up, *constants, list(settings), temperature,
        softcap, *execution, [needs_grad(x) for x in (hidden, weight, bias, low, up)],
    )  # fmt: skip
    return PolicyLoss(loss, policy_metrics(losses, stats, weights is not None, kl is not None, True))
