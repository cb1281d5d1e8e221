"""Preference losses on the policy's own log-probs: DPO and its family, of pairs and of single responses."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATS, check_dtype, check_in, check_mask, check_range, check_same_device, check_shape
from ._preference_ops import Sides, constant, differentiable, weighted_sum
from .preferences import AOT, KTO, divergence_numbers, losses_of
from .reference.preference import accumulator_dtype

_LENGTH_DTYPES = (torch.int64, torch.int32)
_REDUCTIONS = ("mean", "sum", "none")


class PreferenceLoss(NamedTuple):
    """The loss, the detached rewards that it implies, and a dict of detached scalars on the device."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    metrics: dict[str, Tensor]


class UnpairedPreferenceLoss(NamedTuple):
    """The loss, the detached rewards that it implies, and a dict of detached scalars on the device."""

    loss: Tensor
    rewards: Tensor
    metrics: dict[str, Tensor]


def preference_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps=None,
    ref_rejected_logps=None,
    *,
    loss_type="sigmoid",
    beta=0.1,
    label_smoothing=0.0,
    divergence="reverse_kl",
    chosen_lengths=None,
    rejected_lengths=None,
    target_margin=None,
    kl=None,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    weights=None,
    reduction="mean",
    num_items_in_batch=None,
):
    """Loss of the policy on preferred and dispreferred responses, without a reward model.

    With c = log pi(chosen) - log ref(chosen), r the same of the rejected, l = log pi / tokens, odds = p / (1 - p):
    sigmoid: -log sigmoid(beta (c - r)), DPO, Rafailov et al. 2023, eq. (7); hinge: max(0, 1 - beta (c - r));
    ipo: (c - r - 1/(2 beta))^2, Azar et al. 2023, eq. (17); simpo: -log sigmoid(beta (l_c - l_r) - target_margin),
    Meng et al. 2024, eq. (6); orpo: -l_c - beta log sigmoid(log odds_c - log odds_r), p = exp(l), Hong et al. 2024,
    eq. (6), the likelihood term averaged within each response; kto: desirable_weight sigmoid(-beta (c - z)) for each
    chosen and undesirable_weight sigmoid(-beta (z - r)) for each rejected, z = max(kl, 0), Ethayarajh et al. 2024.
    robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm
    and ipo_norm: `rlhf_kernels.preferences` has the formula, the parameters and the paper of each.

    Args:
        policy_chosen_logps: [N] fp32|bf16|fp16|fp64, summed +log p of each preferred response in nats; differentiated.
            The arithmetic is fp32 (fp64 for fp64). For "kto" [C], the desirable responses.
        policy_rejected_logps: [N], the same of the other response of each pair. For "kto" [R], the undesirable
            responses, which belong to no pair, so that R may differ from C, and either may be 0.
        ref_chosen_logps: [N] ([C]) of the reference model, a constant; None if no loss has a reference: "orpo",
            "simpo" and "sft".
        ref_rejected_logps: [N] ([R]), the same.
        loss_type: a name of those above, default "sigmoid"; a loss of `rlhf_kernels.preferences`; or a sequence of
            names, losses and pairs (name or loss, weight), whose weighted sum is the loss.
        beta: > 0, dimensionless, shared by all losses; the weight of the odds term for "orpo".
        label_smoothing: in [0, 0.5), the share of pairs whose label is wrong (conservative DPO); of the losses that are
            named sigmoid, sigmoid_norm, simpo, robust, aot and aot_unpaired take it, and exo_pair needs it.
        divergence: "reverse_kl", the default, "forward_kl", "js_divergence", "alpha_divergence" or
            `preferences.AlphaDivergence(alpha)`: c and r are f'(pi / ref) of this divergence, f-DPO, Wang et al. 2023.
            Another than the default for sigmoid, hinge, ipo, robust, exo_pair, discopop (and sft beside them) only.
        chosen_lengths: [N] ([C]) int64|int32, tokens of each response, >= 1. Needed by "orpo", "simpo", "sft",
            "sigmoid_norm" and "ipo_norm"; given for another single name, log-probs per token take the place of sums.
            Beside a loss of `preferences` or in a sequence only those take it that say so (length_normalized=True).
        rejected_lengths: [N] ([R]), the same.
        target_margin: >= 0, only for "simpo", the reward gap to reach; None = 0.5 there.
        kl: number or 0-d tensor, only for "kto", which needs it: the estimate of KL(policy || reference), for instance
            the mean log-ratio of mismatched prompts and responses; a constant.
        desirable_weight: > 0, "kto" only.
        undesirable_weight: > 0, "kto" only.
        weights: [N] floating, default None: a constant factor of each pair's loss, as in WPO (Zhou et al. 2024, which
            `wpo_weights` gives). They do not enter the count that "mean" divides by. Not for the sorted "aot" losses.
        reduction: "mean", "sum" or "none": [N], for "kto" [C + R], chosen first.
        num_items_in_batch: number or 0-d tensor, pairs (for "kto" responses) in the whole batch, over all
            micro-batches and processes; divides instead of this call's count. Only with reduction="mean".
    Returns:
        PreferenceLoss(loss, chosen_rewards, rejected_rewards, metrics): loss fp32 (fp64 for fp64), differentiable in
        the policy's log-probs; rewards [N] = beta c, beta r (beta l without a reference), of several losses those of
        the first that is not "sft". Metrics: rewards/chosen, rewards/rejected, rewards/margins, logps/chosen,
        logps/rejected (means) and, except for "kto", rewards/accuracies (equal rewards count half).
    Raises:
        ValueError: shapes, dtypes or devices do not fit; an argument is missing for the loss type or has no meaning
            for it; a number out of range; unknown loss_type, divergence or reduction.
    Cost:
        One pass over N numbers for each loss, gradient in the forward; the "aot" losses sort beside it. No host sync.
    Example:
        >>> import torch
        >>> policy, ref = torch.tensor([-10.0]), torch.tensor([-12.0])
        >>> round(preference_loss(policy, ref, ref, ref).loss.item(), 4)  # -log sigmoid(0.1 * 2)
        0.5981
    """
    check_range("beta", beta, 0, low_open=True)
    by_token = chosen_lengths is not None or rejected_lengths is not None
    losses = losses_of(
        loss_type, named_fields(label_smoothing, target_margin, desirable_weight, undesirable_weight), by_token
    )
    _check_reduction(reduction, num_items_in_batch)
    _check_divergence(divergence, losses)
    unpaired = isinstance(losses[0][0], KTO)
    chosen, rejected = policy_chosen_logps, policy_rejected_logps
    check_dtype("policy_chosen_logps", chosen, FLOATS)
    check_shape("policy_chosen_logps", chosen, (None,), "one summed log-prob for each response")
    _check_other("policy_rejected_logps", rejected, chosen, None if unpaired else chosen.shape[0], FLOATS)
    needs_ref = [loss.name for loss, _ in losses if loss.has_reference]
    needs_lengths = [loss.name for loss, _ in losses if loss.by_token]
    _check_pairwise(
        "ref", "logps", loss_type, needs_ref, ref_chosen_logps, ref_rejected_logps, chosen, rejected, FLOATS
    )
    _check_pairwise(
        "", "lengths", loss_type, needs_lengths, chosen_lengths, rejected_lengths, chosen, rejected, _LENGTH_DTYPES
    )
    sides = Sides(
        *(None if x is None else x.contiguous() for x in (chosen, rejected, ref_chosen_logps, ref_rejected_logps)),
        *(None if x is None else x.long().contiguous() for x in (chosen_lengths, rejected_lengths)),
        _kl(kl, unpaired, loss_type, chosen),
        divergence_numbers(divergence),
    )
    loss, *rewards = weighted_sum(losses, sides, float(beta))
    if weights is not None:
        loss = loss * _weights(weights, losses, loss)
    chosen_rewards, rejected_rewards = (x.detach() for x in rewards)
    metrics = _metrics(unpaired, chosen_rewards, rejected_rewards, chosen.detach(), rejected.detach())
    return PreferenceLoss(_reduce(loss, reduction, num_items_in_batch), chosen_rewards, rejected_rewards, metrics)


def unpaired_preference_loss(
    policy_logps,
    labels,
    ref_logps,
    *,
    loss_type="kto",
    beta=0.1,
    kl=None,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    lengths=None,
    reduction="mean",
    num_items_in_batch=None,
):
    """Loss of the policy on single responses that are desirable or not, in one batch in any order.

    With c = log pi - log ref and z = max(kl, 0): kto: desirable_weight sigmoid(-beta (c - z)) or undesirable_weight
    sigmoid(-beta (z - c)), Ethayarajh et al. 2024, eq. (7); apo_zero_unpaired: the same with z = 0, the unpaired form
    of APO-zero, D'Oosterlinck et al. 2024, eq. (7). `preference_loss(loss_type="kto")` takes both sides apart.

    Args:
        policy_logps: [N] fp32|bf16|fp16|fp64, summed +log p of each response in nats; differentiated.
        labels: [N] bool or integer, 1 = desirable.
        ref_logps: [N] of the reference model, a constant.
        loss_type: "kto", the default, or "apo_zero_unpaired".
        beta: > 0, dimensionless, default 0.1.
        kl: number or 0-d tensor, the estimate of KL(policy || reference), a constant; needed by "kto", and without
            meaning for "apo_zero_unpaired".
        desirable_weight: > 0, default 1.0.
        undesirable_weight: > 0, default 1.0.
        lengths: [N] int64|int32, tokens of each response, >= 1; None, the default: sums, not log-probs per token.
        reduction: "mean", the default, "sum" or "none": [N].
        num_items_in_batch: number or 0-d tensor, responses in the whole batch; divides instead of this call's count.
            Only with reduction="mean".
    Returns:
        UnpairedPreferenceLoss(loss, rewards, metrics): loss fp32 (fp64 for fp64), differentiable in policy_logps;
        rewards [N] = beta c, detached. Metrics: rewards/chosen, rewards/rejected, logps/chosen, logps/rejected, means
        over the responses of a label, NaN where there is none, and rewards/margins.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; kl is missing or has no meaning; a number out of range;
            unknown loss_type or reduction.
    Cost:
        About ten passes over N numbers, whatever the order of the labels. No host sync.
    Example:
        >>> import torch
        >>> policy, ref = torch.tensor([-10.0, -9.0]), torch.tensor([-12.0, -8.0])
        >>> labels = torch.tensor([True, False])
        >>> unpaired_preference_loss(policy, labels, ref, kl=0.5, reduction="none").loss  # of 2 and -1 against 0.5
        tensor([0.4626, 0.4626])
    """
    check_in("loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    check_range("beta", beta, 0, low_open=True)
    a, b = KTO(desirable_weight, undesirable_weight).numbers()
    _check_reduction(reduction, num_items_in_batch)
    check_dtype("policy_logps", policy_logps, FLOATS)
    check_shape("policy_logps", policy_logps, (None,), "one summed log-prob for each response")
    labels = check_mask("labels", labels, policy_logps.shape)
    _check_like("ref_logps", ref_logps, policy_logps, FLOATS)
    check_same_device(policy_logps=policy_logps, labels=labels, ref_logps=ref_logps)
    if lengths is not None:
        _check_like("lengths", lengths, policy_logps, _LENGTH_DTYPES)
        check_same_device(policy_logps=policy_logps, lengths=lengths)
    if loss_type == "kto":
        held = _kl(kl, True, loss_type, policy_logps).clamp(min=0)
    elif kl is not None:
        raise ValueError("kl is an argument of loss_type='kto' only, got loss_type='apo_zero_unpaired'")
    else:
        held = torch.zeros((), dtype=accumulator_dtype(policy_logps.dtype), device=policy_logps.device)
    ratio = policy_logps.to(held.dtype) - ref_logps.detach().to(held.dtype)
    ratio = ratio if lengths is None else ratio / lengths.to(held.dtype)
    signed = torch.where(labels, ratio - held, held - ratio)  # the larger, the better the policy knows the label
    nothing = (None,) * 4
    loss, *_ = differentiable(
        signed, signed.detach()[:0], *nothing, torch.zeros_like(held), "kto", float(beta), 1.0, 1.0, "reverse_kl", 1.0
    )
    if (a, b) != (1.0, 1.0):
        loss = torch.where(labels, a * loss, b * loss)
    rewards = beta * ratio.detach()
    metrics = _unpaired_metrics(labels, rewards, policy_logps.detach().to(held.dtype))
    return UnpairedPreferenceLoss(_reduce(loss, reduction, num_items_in_batch), rewards, metrics)


def named_fields(label_smoothing=0.0, target_margin=None, desirable_weight=1.0, undesirable_weight=1.0):
    """What a call gives to the losses that it names; None where it is the neutral value."""
    check_range("label_smoothing", label_smoothing, 0, 0.5, high_open=True)
    if target_margin is not None:
        check_range("target_margin", target_margin, 0)
    given = {"label_smoothing": label_smoothing or None, "target_margin": target_margin}
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        check_range(name, weight, 0, low_open=True)
        given[name] = None if weight == 1 else weight
    return given


def _check_divergence(divergence, losses):
    kind, _ = divergence_numbers(divergence)
    for loss, _ in losses:
        if kind != "reverse_kl" and not loss.by_divergence:
            raise ValueError(
                f"divergence={divergence!r} has no meaning for {loss.name!r}, whose loss is not one of the gap of two "
                "scores; use 'reverse_kl'"
            )


def _weights(weights, losses, loss):
    for one, _ in losses:
        if isinstance(one, AOT):
            raise ValueError(
                f"weights has no meaning for {one.name!r}, whose losses belong to sorted gaps, not to pairs"
            )
    check_dtype("weights", weights, FLOATS)
    check_shape("weights", weights, loss.shape, "one for each pair")
    check_same_device(policy_chosen_logps=loss, weights=weights)
    return weights.detach().to(loss.dtype)


def _check_reduction(reduction, num_items_in_batch):
    check_in("reduction", reduction, _REDUCTIONS)
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items_in_batch goes with reduction='mean' only, got reduction={reduction!r}")
    if isinstance(num_items_in_batch, Tensor):
        check_shape("num_items_in_batch", num_items_in_batch, (), "a number or a 0-d tensor")
    else:
        check_range("num_items_in_batch", num_items_in_batch, 1)


def _check_other(name, x, chosen, size, dtypes):
    check_dtype(name, x, dtypes)
    check_shape(name, x, (size,), "like policy_chosen_logps" if size is not None else "")
    check_same_device(**{"policy_chosen_logps": chosen, name: x})


def _check_like(name, x, like, dtypes):
    check_dtype(name, x, dtypes)
    check_shape(name, x, like.shape, "one for each response")


def _check_pairwise(prefix, what, loss_type, needed, for_chosen, for_rejected, chosen, rejected, dtypes):
    """Reference log-probs or lengths: both or none, and as the losses that need them want."""
    names = [f"{prefix}_{side}_{what}".removeprefix("_") for side in ("chosen", "rejected")]
    for name, x, like in zip(names, (for_chosen, for_rejected), (chosen, rejected), strict=True):
        if x is not None:
            if not needed:
                has = "has no reference model" if prefix == "ref" else "compares sums, not log-probs per token"
                raise ValueError(f"{name} is given, but loss_type={loss_type!r} {has}; leave it out")
            _check_like(name, x, like, dtypes)
            check_same_device(policy_chosen_logps=chosen, **{name: x})
        elif needed:
            if what == "lengths" and (for_chosen is None) != (for_rejected is None):
                raise ValueError(f"{names[0]} and {names[1]} go together, got only one of them")
            raise ValueError(
                f"{name} is None, but loss_type={_named(loss_type, needed)!r} needs {list(like.shape)} {what}"
            )


def _named(loss_type, needed):
    return loss_type if isinstance(loss_type, str) else needed[0]


def _kl(kl, unpaired, loss_type, chosen):
    if not unpaired:
        if kl is not None:
            raise ValueError(f"kl is an argument of loss_type='kto' only, got loss_type={loss_type!r}")
        return None
    if kl is None:
        raise ValueError(
            "kl is None, but loss_type='kto' needs an estimate of KL(policy || reference), a number or 0-d"
        )
    if isinstance(kl, Tensor):
        check_dtype("kl", kl, FLOATS)
        check_shape("kl", kl, (), "a number or a 0-d tensor")
    else:
        check_range("kl", kl)
    return constant(kl, chosen)


def _reduce(loss, reduction, num_items_in_batch):
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (max(loss.shape[0], 1) if num_items_in_batch is None else num_items_in_batch)


def _metrics(unpaired, chosen_rewards, rejected_rewards, chosen, rejected):
    dtype, won, lost = chosen_rewards.dtype, chosen_rewards.mean(), rejected_rewards.mean()
    metrics = {
        "rewards/chosen": won,
        "rewards/rejected": lost,
        "rewards/margins": won - lost,
        "logps/chosen": chosen.to(dtype).mean(),
        "logps/rejected": rejected.to(dtype).mean(),
    }
    if not unpaired:
        gap = chosen_rewards - rejected_rewards
        metrics["rewards/accuracies"] = ((gap > 0).to(dtype) + 0.5 * (gap == 0).to(dtype)).mean()
    return metrics


def _unpaired_metrics(labels, rewards, log_probs):
    found, zero = {}, rewards.new_zeros(())
    for side, kept in (("chosen", labels), ("rejected", ~labels)):
        count = kept.sum()
        found[f"rewards/{side}"] = torch.where(kept, rewards, zero).sum() / count
        found[f"logps/{side}"] = torch.where(kept, log_probs, zero).sum() / count
    return {**found, "rewards/margins": found["rewards/chosen"] - found["rewards/rejected"]}
