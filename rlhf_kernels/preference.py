"""Preference losses on the policy's own log-probs: DPO, IPO, hinge, ORPO, SimPO and KTO."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from ._autograd import register
from ._checks import FLOATS, check_dtype, check_in, check_range, check_same_device, check_shape
from .reference.preference import LENGTH_NORMALIZED, LOSS_TYPES, REFERENCE_FREE, accumulator_dtype

_LENGTH_DTYPES = (torch.int64, torch.int32)
_REDUCTIONS = ("mean", "sum", "none")
_SMOOTHED = ("sigmoid", "simpo")


class PreferenceLoss(NamedTuple):
    """The loss, the detached rewards that it implies, and a dict of detached scalars on the device."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
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
    chosen_lengths=None,
    rejected_lengths=None,
    target_margin=None,
    kl=None,
    desirable_weight=1.0,
    undesirable_weight=1.0,
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

    Args:
        policy_chosen_logps: [N] fp32|bf16|fp16|fp64, summed +log p of each preferred response in nats; differentiated.
            The arithmetic is fp32 (fp64 for fp64). For "kto" [C], the desirable responses.
        policy_rejected_logps: [N], the same of the other response of each pair. For "kto" [R], the undesirable
            responses, which belong to no pair, so that R may differ from C, and either may be 0.
        ref_chosen_logps: [N] ([C]) of the reference model, a constant; None for "orpo" and "simpo", which have none.
        ref_rejected_logps: [N] ([R]), the same.
        loss_type: "sigmoid", "ipo", "hinge", "orpo", "simpo" or "kto".
        beta: > 0, dimensionless; the weight of the odds term for "orpo".
        label_smoothing: in [0, 0.5), the share of pairs whose label is wrong (conservative DPO); "sigmoid" and "simpo".
        chosen_lengths: [N] ([C]) int64|int32, tokens of each response, >= 1. Needed by "orpo" and "simpo"; given for
            another type, log-probs per token take the place of sums.
        rejected_lengths: [N] ([R]), the same.
        target_margin: >= 0, only for "simpo", the reward gap to reach; None = 0.5 there.
        kl: number or 0-d tensor, only for "kto", which needs it: the estimate of KL(policy || reference), for instance
            the mean log-ratio of mismatched prompts and responses; a constant.
        desirable_weight: > 0, "kto" only.
        undesirable_weight: > 0, "kto" only.
        reduction: "mean", "sum" or "none": [N], for "kto" [C + R], chosen first.
        num_items_in_batch: number or 0-d tensor, pairs (for "kto" responses) in the whole batch, over all
            micro-batches and processes; divides instead of this call's count. Only with reduction="mean".
    Returns:
        PreferenceLoss(loss, chosen_rewards, rejected_rewards, metrics): loss fp32 (fp64 for fp64), differentiable in
        the policy's log-probs; rewards [N] = beta c, beta r (beta l for "orpo" and "simpo"). Metrics: rewards/chosen,
        rewards/rejected, rewards/margins, logps/chosen, logps/rejected (means) and, except for "kto",
        rewards/accuracies (equal rewards count half).
    Raises:
        ValueError: shapes, dtypes or devices do not fit; an argument is missing for the loss type or has no meaning
            for it; a number out of range; unknown loss_type or reduction.
    Cost:
        One pass over N numbers, gradient in the forward; no host sync.
    Example:
        >>> import torch
        >>> policy, ref = torch.tensor([-10.0]), torch.tensor([-12.0])
        >>> round(preference_loss(policy, ref, ref, ref).loss.item(), 4)  # -log sigmoid(0.1 * 2)
        0.5981
    """
    check_in("loss_type", loss_type, LOSS_TYPES)
    _check_numbers(loss_type, beta, label_smoothing, target_margin, desirable_weight, undesirable_weight)
    _check_reduction(reduction, num_items_in_batch)
    chosen, rejected = policy_chosen_logps, policy_rejected_logps
    check_dtype("policy_chosen_logps", chosen, FLOATS)
    check_shape("policy_chosen_logps", chosen, (None,), "one summed log-prob for each response")
    _check_other("policy_rejected_logps", rejected, chosen, None if loss_type == "kto" else chosen.shape[0], FLOATS)
    _check_pairwise("ref", "logps", loss_type, ref_chosen_logps, ref_rejected_logps, chosen, rejected, FLOATS)
    _check_pairwise("", "lengths", loss_type, chosen_lengths, rejected_lengths, chosen, rejected, _LENGTH_DTYPES)
    tensors = (chosen, rejected, ref_chosen_logps, ref_rejected_logps)
    lengths = (None if x is None else x.long().contiguous() for x in (chosen_lengths, rejected_lengths))
    loss, _, _, chosen_rewards, rejected_rewards = _losses(
        *(None if x is None else x.contiguous() for x in tensors),
        *lengths,
        _kl(kl, loss_type, chosen),
        loss_type,
        float(beta),
        float(label_smoothing),
        0.0 if loss_type != "simpo" else 0.5 if target_margin is None else float(target_margin),
        float(desirable_weight),
        float(undesirable_weight),
    )
    chosen_rewards, rejected_rewards = chosen_rewards.detach(), rejected_rewards.detach()
    metrics = _metrics(loss_type, chosen_rewards, rejected_rewards, chosen.detach(), rejected.detach())
    return PreferenceLoss(_reduce(loss, reduction, num_items_in_batch), chosen_rewards, rejected_rewards, metrics)


def _check_numbers(loss_type, beta, label_smoothing, target_margin, desirable_weight, undesirable_weight):
    check_range("beta", beta, 0, low_open=True)
    check_range("label_smoothing", label_smoothing, 0, 0.5, high_open=True)
    if label_smoothing and loss_type not in _SMOOTHED:
        raise ValueError(f"label_smoothing={label_smoothing!r} has no meaning for loss_type={loss_type!r}; use 0.0")
    if target_margin is not None:
        check_range("target_margin", target_margin, 0)
        if loss_type != "simpo":
            raise ValueError(f"target_margin is an argument of loss_type='simpo' only, got loss_type={loss_type!r}")
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        check_range(name, weight, 0, low_open=True)
        if weight != 1 and loss_type != "kto":
            raise ValueError(f"{name} is an argument of loss_type='kto' only, got loss_type={loss_type!r}")


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


def _check_pairwise(prefix, what, loss_type, for_chosen, for_rejected, chosen, rejected, dtypes):
    """Reference log-probs or lengths: both or none, and as the loss type wants."""
    names = [f"{prefix}_{side}_{what}".removeprefix("_") for side in ("chosen", "rejected")]
    needed = loss_type in LENGTH_NORMALIZED if what == "lengths" else loss_type not in REFERENCE_FREE
    for name, x, like in zip(names, (for_chosen, for_rejected), (chosen, rejected), strict=True):
        if x is not None:
            if prefix == "ref" and not needed:
                raise ValueError(f"{name} is given, but loss_type={loss_type!r} has no reference model; leave it out")
            check_dtype(name, x, dtypes)
            check_shape(name, x, like.shape, "one for each response")
            check_same_device(policy_chosen_logps=chosen, **{name: x})
        elif needed:
            raise ValueError(f"{name} is None, but loss_type={loss_type!r} needs {list(like.shape)} {what}")
    if (for_chosen is None) != (for_rejected is None):
        raise ValueError(f"{names[0]} and {names[1]} go together, got only one of them")


def _kl(kl, loss_type, chosen):
    if loss_type != "kto":
        if kl is not None:
            raise ValueError(f"kl is an argument of loss_type='kto' only, got loss_type={loss_type!r}")
        return None
    if kl is None:
        raise ValueError(
            "kl is None, but loss_type='kto' needs an estimate of KL(policy || reference), a number or 0-d"
        )
    dtype = accumulator_dtype(chosen.dtype)
    if not isinstance(kl, Tensor):
        check_range("kl", kl)
        return torch.full((), float(kl), dtype=dtype, device=chosen.device)
    check_dtype("kl", kl, FLOATS)
    check_shape("kl", kl, (), "a number or a 0-d tensor")
    return kl.detach().to(chosen.device, dtype)


def _reduce(loss, reduction, num_items_in_batch):
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (max(loss.shape[0], 1) if num_items_in_batch is None else num_items_in_batch)


def _metrics(loss_type, chosen_rewards, rejected_rewards, chosen, rejected):
    dtype = chosen_rewards.dtype
    metrics = {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": chosen_rewards.mean() - rejected_rewards.mean(),
        "logps/chosen": chosen.to(dtype).mean(),
        "logps/rejected": rejected.to(dtype).mean(),
    }
    if loss_type != "kto":
        gap = chosen_rewards - rejected_rewards
        metrics["rewards/accuracies"] = ((gap > 0).to(dtype) + 0.5 * (gap == 0).to(dtype)).mean()
    return metrics


@torch.library.custom_op("rlhf_kernels::preference_fwd", mutates_args=())
def preference_fwd(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    kl: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    target_margin: float,
    chosen_weight: float,
    rejected_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, gradients of chosen and rejected, rewards; the contract is in reference/preference.py."""
    return dispatch.pick("preference", chosen).preference_fwd(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        chosen_lengths,
        rejected_lengths,
        kl,
        loss_type,
        beta,
        label_smoothing,
        target_margin,
        chosen_weight,
        rejected_weight,
    )


@torch.library.custom_op("rlhf_kernels::preference_bwd", mutates_args=())
def preference_bwd(grad_loss: Tensor, grad_chosen: Tensor, grad_rejected: Tensor) -> tuple[Tensor, Tensor]:
    """The saved gradients times the upstream gradient of each loss."""
    return dispatch.pick("preference", grad_chosen).preference_bwd(grad_loss, grad_chosen, grad_rejected)


@preference_fwd.register_fake
def _(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, kl, loss_type, *numbers):
    dtype = accumulator_dtype(chosen.dtype)
    size = chosen.shape[0] + rejected.shape[0] if loss_type == "kto" else chosen.shape[0]
    like = [x.new_empty(x.shape, dtype=dtype) for x in (chosen, rejected, chosen, rejected)]
    return chosen.new_empty(size, dtype=dtype), *like


@preference_bwd.register_fake
def _(grad_loss, grad_chosen, grad_rejected):
    return torch.empty_like(grad_chosen), torch.empty_like(grad_rejected)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    nothing = (None,) * 11
    if grad_loss is None:
        return None, None, *nothing
    chosen, rejected = torch.ops.rlhf_kernels.preference_bwd(grad_loss.contiguous(), *ctx.saved_tensors)
    return chosen.to(ctx.dtypes[0]), rejected.to(ctx.dtypes[1]), *nothing


_losses = register(preference_fwd, _backward, _setup_context, policy_chosen_logps=0, policy_rejected_logps=1)
