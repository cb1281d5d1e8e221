"""Preference losses from hidden states and the LM head; the [N, V] logits never exist as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import FLOATS, check_cu_seqlens, check_dtype, check_mask, check_range, check_same_device, check_shape
from .linear import linear_logprobs
from .preference import PreferenceLoss, named_fields, preference_loss
from .preferences import KTO, SFT, losses_of


def linear_preference_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_log_probs: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    cu_responses: Tensor | None = None,
    chosen: Tensor | None = None,
    rejected: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    loss_type="sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence="reverse_kl",
    kl: float | Tensor | None = None,
    ld_alpha: float | None = None,
    wpo: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    chunk_size: int | None = None,
    precision: str = "exact",
    process_group=None,
    vocab_start_index: int = 0,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> PreferenceLoss:
    """`preference_loss` of the responses' log-probs under the LM head's softmax, from hidden states.

    A response's log-prob is the sum of `linear_logprobs` over its labels; its length is their number. With ld_alpha the
    tokens of a response beyond the length of the other of its pair count ld_alpha times (LD-DPO, Liu et al. 2024), in
    all losses but "sft". With wpo each pair's loss is multiplied by the weights of both its responses, which
    `wpo_weights` defines (WPO, Zhou et al. 2024).

    Args:
        hidden_states: [2B, T, H], or [N, H] with rows or cu_responses; fp32, bf16, fp16 or fp64.
        weight: [V, H], the LM head; dtypes as in `linear_logprobs`.
        labels: [2B, T] int64|int32, a response each row, ignore_index where a token is the prompt's or padding; or [N]
            with cu_responses. They are not shifted: row i of hidden_states predicts label i. A response without
            a label has log-prob 0 and counts as of length 1.
        ref_log_probs: +log p of the reference model, a constant: of each token, in the shape of labels, and summed as
            those of the policy, or of each response, [2B], summed already. None, the default, if no loss has
            a reference.
        rows: as in `linear_logprobs`, default None.
        cu_responses: [2B+1] int64|int32 offsets of the responses in flat labels; None, the default, for [2B, T].
        chosen: [B] int64|int32, numbers of the preferred responses; None, the default: the first half, as in TRL. For
            "kto" [C], the desirable responses.
        rejected: [B] int64|int32, the other response of each pair; None, the default: the second half. For "kto" [R].
        bias: [V], or None, the default.
        temperature: > 0, default 1.0; or a tensor in the shape of labels.
        softcap: > 0, or None for no cap, the default.
        ignore_index: label of what does not count, default -100.
        loss_type: as in `preference_loss`, default "sigmoid"; a loss takes log-probs per token only if it says so:
            "sigmoid_norm" and "ipo_norm", "simpo", "orpo", "sft", or length_normalized=True.
        beta: > 0, default 0.1.
        label_smoothing: as in `preference_loss`, default 0.0.
        divergence: as in `preference_loss`, default "reverse_kl".
        kl: as in `preference_loss`, default None: only for "kto", which needs it.
        ld_alpha: in [0, 1]; None, the default, for 1. A response then belongs to one pair at most. Not for "kto".
        wpo: weights of WPO, default False. Not for "kto", "aot" and "aot_unpaired".
        weights: [B] as in `preference_loss`, default None; multiplied by those of WPO.
        reduction: "mean", the default, "sum" or "none".
        num_items_in_batch: as in `preference_loss`, default None.
        chunk_size: tokens handled at a time; default None: the backend chooses.
        precision: "exact", the default, or "fast", as in `linear_logprobs`.
        process_group: ranks that hold the vocabulary's columns, as in `linear_logprobs`, default None.
        vocab_start_index: first token of this rank's shard, default 0.
        lora: (A [r, H], B [V, r], scaling) of a LoRA layer on the head, as in `linear_logprobs`, default None.
    Returns:
        PreferenceLoss(loss, chosen_rewards, rejected_rewards, metrics) as `preference_loss`; loss is differentiable in
        hidden_states, weight, bias, A and B.
    Raises:
        ValueError: as `linear_logprobs` and `preference_loss`; an odd number of responses without chosen and rejected,
            or one of these without the other; ref_log_probs of another shape; ld_alpha or wpo with "kto".
    Cost: 8NVH floating-point operations for forward and backward together, for the slope of a token is known only when
        its response's sum is; with a head that is not trained 4NVH, all in the forward. wpo makes the logits once more,
        2NVH. Memory as `linear_logprobs`. No host sync on a GPU.
    Example:
        >>> import torch
        >>> hidden, head = torch.zeros(2, 3, 4, requires_grad=True), torch.eye(5, 4)
        >>> labels, ref = torch.tensor([[-100, 1, 2], [-100, 3, -100]]), torch.tensor([-4.0, -1.0])
        >>> result = linear_preference_loss(hidden, head, labels, ref)
        >>> result.loss.backward()
        >>> [round(x.item(), 4) for x in (result.chosen_rewards, result.rejected_rewards, result.loss)]
        [0.0781, -0.0609, 0.626]
    """
    head = {
        "rows": rows, "bias": bias, "softcap": softcap, "ignore_index": ignore_index, "chunk_size": chunk_size,
        "precision": precision, "process_group": process_group, "vocab_start_index": vocab_start_index,
        "lora": lora,
    }  # fmt: skip
    losses = losses_of(loss_type, named_fields(label_smoothing=label_smoothing), False)
    for name, given in (("ld_alpha", ld_alpha is not None), ("wpo", wpo)):
        if given and isinstance(losses[0][0], KTO):
            raise ValueError(f"{name} is given, but the responses of loss_type='kto' belong to no pair; leave it out")
    if ld_alpha is not None:
        check_range("ld_alpha", ld_alpha, 0, 1)
    responses = _Responses(labels, cu_responses, chosen, rejected, ignore_index)
    log_probs = linear_logprobs(hidden_states, weight, labels, temperature=temperature, **head)
    if wpo:
        with torch.no_grad():  # sum p^2 = p(label)^2 / p'(label), p' at half the temperature
            halved = linear_logprobs(hidden_states.detach(), weight, labels, temperature=temperature / 2, **head)
        own = responses.weights(halved - log_probs.detach())
        weights = own if weights is None else own * weights
    factors = None if ld_alpha is None else responses.factors(float(ld_alpha), log_probs.dtype)
    lengths = dict(
        zip(("chosen_lengths", "rejected_lengths"), responses.sides(responses.lengths.clamp(min=1)), strict=True)
    )

    def loss_of(some, factors, ref):
        """preference_loss of some of the losses, whose log-probs are summed with these factors."""
        refs = () if ref is None else responses.sides(responses.reference_sums(ref, factors))
        used = lengths if any(loss.by_token for loss, _ in some) else {}
        return preference_loss(
            *responses.sides(responses.sums(log_probs, factors)), *refs, loss_type=some, beta=beta, kl=kl,
            divergence=divergence, weights=weights, reduction=reduction, num_items_in_batch=num_items_in_batch, **used,
        )  # fmt: skip

    likelihood = [(loss, w) for loss, w in losses if isinstance(loss, SFT)]
    others = [(loss, w) for loss, w in losses if not isinstance(loss, SFT)]
    if factors is None or not likelihood:
        return loss_of(losses, factors, ref_log_probs)
    if not others:
        return loss_of(likelihood, None, ref_log_probs)
    result = loss_of(others, factors, ref_log_probs)
    return result._replace(loss=result.loss + loss_of(likelihood, None, None).loss)


def wpo_weights(log_probs: Tensor, log_sum_sq_probs: Tensor, response_mask: Tensor) -> Tensor:
    """Weight of each response in WPO: the mean over its tokens of log p - log sum p^2, exponentiated.

    Zhou et al. 2024, eq. (2) with its alignment: the probability of a token is held against that of the tokens that the
    policy would sample, whose mean is sum over the vocabulary of p^2. A pair's weight is the product of its two, for
    `preference_loss(weights=)`.

    Args:
        log_probs: [B, T] fp32|bf16|fp16|fp64, +log p of each token in nats, a constant.
        log_sum_sq_probs: [B, T], log of the sum over the vocabulary of p^2, for instance 2 log p - log p', with p' at
            half the temperature.
        response_mask: [B, T] bool or integer, 1 = keep. What stands under a 0 may be NaN.
    Returns:
        [B] fp32 (fp64 for fp64), detached; 1 for a response without tokens.
    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    Cost: one pass over B T numbers; no host sync.
    Example:
        >>> import torch
        >>> p = torch.tensor([[0.5, 0.25]])  # of vocabularies {0.5, 0.5} and {0.75, 0.25}
        >>> wpo_weights(p.log(), torch.tensor([[0.5, 0.625]]).log(), torch.ones(1, 2).bool())
        tensor([0.6325])
    """
    check_dtype("log_probs", log_probs, FLOATS)
    check_shape("log_probs", log_probs, (None, None), "[B, T]")
    check_dtype("log_sum_sq_probs", log_sum_sq_probs, FLOATS)
    check_shape("log_sum_sq_probs", log_sum_sq_probs, log_probs.shape, "[B, T], like log_probs")
    mask = check_mask("response_mask", response_mask, log_probs.shape)
    check_same_device(log_probs=log_probs, log_sum_sq_probs=log_sum_sq_probs, response_mask=mask)
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    aligned = torch.where(mask, log_probs.detach().to(dtype) - log_sum_sq_probs.detach().to(dtype), 0)
    return (aligned.sum(1) / mask.sum(1).clamp(min=1)).exp()


class _Responses:
    """Which tokens are whose: sums and lengths of the responses, and the two sides of the pairs."""

    def __init__(self, labels, cu_responses, chosen, rejected, ignore_index):
        if cu_responses is None:
            check_shape("labels", labels, (None, None), "[2B, T], or flat [N] together with cu_responses [2B+1]")
            self.count = labels.shape[0]
        else:
            check_shape("labels", labels, (None,), "flat [N], because cu_responses is given")
            check_cu_seqlens("cu_responses", cu_responses, labels.shape[0])
            self.count = cu_responses.shape[0] - 1
        check_same_device(labels=labels, cu_responses=cu_responses, chosen=chosen, rejected=rejected)
        self.offsets = None if cu_responses is None else cu_responses.long()
        self.kept = labels != ignore_index
        self.pairs = self._pairs(chosen, rejected)
        self.lengths = self._total(self.kept.long())

    def _pairs(self, chosen, rejected):
        if (chosen is None) != (rejected is None):
            raise ValueError("chosen and rejected go together, got only one of them")
        if chosen is None:
            if self.count % 2:
                raise ValueError(
                    f"labels holds {self.count} responses, expected an even number, or chosen and rejected"
                )
            return None
        for name, x in (("chosen", chosen), ("rejected", rejected)):
            check_dtype(name, x, (torch.int64, torch.int32))
            check_shape(name, x, (None,), "numbers of responses")
        return chosen.long(), rejected.long()

    def sides(self, x):
        """What belongs to the chosen and what to the rejected responses, of a number for each [2B]."""
        return x.chunk(2) if self.pairs is None else tuple(x.index_select(0, side) for side in self.pairs)

    def _total(self, x):
        """Sum over each response's tokens [2B]."""
        if self.offsets is None:
            return x.sum(1)
        if not x.is_floating_point():
            before = torch.cat([x.new_zeros(1), x.cumsum(0)])
            return before[self.offsets[1:]] - before[self.offsets[:-1]]
        return torch.segment_reduce(x, "sum", offsets=self.offsets, initial=0, unsafe=True)

    def sums(self, log_probs, factors):
        return self._total(log_probs if factors is None else torch.where(factors == 0, 0, log_probs) * factors)

    def reference_sums(self, ref, factors):
        check_dtype("ref_log_probs", ref, FLOATS)
        check_same_device(labels=self.kept, ref_log_probs=ref)
        if ref.shape == self.kept.shape:
            dtype = torch.float64 if ref.dtype == torch.float64 else torch.float32
            return self.sums(torch.where(self.kept, ref.detach().to(dtype), 0), factors)
        check_shape("ref_log_probs", ref, (self.count,), "one for each response, or in the shape of labels")
        return ref

    def factors(self, ld_alpha, dtype):
        """1 for the tokens up to the length of the other response of the pair, ld_alpha for those beyond."""
        if self.pairs is None:
            shared = torch.minimum(*self.lengths.chunk(2)).repeat(2)
        else:
            chosen, rejected = self.pairs
            least = torch.minimum(self.lengths[chosen], self.lengths[rejected])
            shared = self.lengths.index_copy(0, chosen, least).index_copy(0, rejected, least)
        if self.offsets is None:
            place, limit = self.kept.cumsum(1), shared[:, None]
        else:
            owner = torch.repeat_interleave(self.offsets.diff(), output_size=self.kept.shape[0])
            before = torch.cat([self.lengths.new_zeros(1), self.kept.cumsum(0)])
            place, limit = before[1:] - before[self.offsets[:-1]][owner], shared[owner]
        beyond = torch.full((), ld_alpha, dtype=dtype, device=place.device)
        return torch.where(place <= limit, torch.ones_like(beyond), beyond)

    def weights(self, aligned):
        """Those of `wpo_weights` for each pair, from each token's log p - log sum p^2."""
        total = self._total(torch.where(self.kept, aligned, 0))
        chosen, rejected = self.sides((total / self.lengths.clamp(min=1)).exp())
        return chosen * rejected
