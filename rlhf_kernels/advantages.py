"""Rewards shaped by the KL to the reference, generalised advantage estimation, and whitening over all kept tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from ._autograd import custom_op, direct
from ._checks import (
    FLOATS,
    check_cu_seqlens,
    check_dtype,
    check_in,
    check_mask,
    check_range,
    check_same_device,
    check_shape,
)

_ESTIMATORS = ("k1", "k2", "k3")
_MASKED = ("skip", "zero")


class RLHFAdvantages(NamedTuple):
    """What `rlhf_advantages` returns; every tensor has the shape of log_probs, and 0 under the mask's zeros."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor


def gae(
    rewards,
    values,
    mask=None,
    *,
    gamma=1.0,
    lam=0.95,
    critic_lam=None,
    masked="skip",
    cu_seqlens=None,
    last_values=None,
):
    """Generalised advantage estimates of responses, and the returns that the value function learns.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1} over the kept tokens of a response, as in
    Schulman et al. 2016, eq. (11) and (16); return_t = A_t + V_t, where A_t is that of critic_lam if given: a target
    with less bias than the advantages (decoupled GAE, Yuan et al. 2025; VAPO, Yue et al. 2025).

    masked="skip" passes over a masked token, also one between kept tokens, as if it were not there: no value is read,
    and no factor gamma lam is paid for it (verl). masked="zero" takes it for a token of reward and value 0, so that the
    next kept token's value is not seen across it and a factor gamma lam is paid (OpenRLHF). Where every row's kept
    tokens stand together both are the same. TRL's PPO keeps one token more, the one after the last, on which the
    score stands: give that mask. Whitening is a step of its own, `masked_whiten`.

    Args:
        rewards: [B, T], or [N] with cu_seqlens; fp32|bf16|fp16|fp64.
        values: like rewards, V_t in reward units: the value before token t is chosen.
        mask: like rewards, bool or integer, 1 = keep; None = all. Rewards and values under 0 may be NaN.
        gamma: discount, 0 to 1; the paper does not discount.
        lam: 0 gives the one-step error, 1 the Monte-Carlo return less the value; paper: 0.95.
        critic_lam: 0 to 1, lam of the returns; None = lam; papers: 1.0.
        masked: what a masked token is, "skip" for nothing, the default, or "zero".
        cu_seqlens: [B+1] int64|int32, where packed responses begin and end; None for [B, T].
        last_values: [B], V after the last kept token of a response that was cut off; None = 0, it has ended. Not with
            masked="zero", which would discount it through the padding.
    Returns:
        (advantages, returns), each like rewards, fp32 (fp64 if rewards or values are), 0 under the mask's zeros.
        Not differentiable: they are targets.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; gamma, lam or critic_lam outside [0, 1]; an unknown masked, or
            "zero" with last_values; cu_seqlens not ascending to N.
    Cost:
        Native CPU: reads 9 bytes a token and writes 8, no workspace, threads over responses; a critic_lam of its own is
        a second walk; masked="zero" adds four copies. Reference: T small steps.
    Example:
        >>> import torch
        >>> advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), gamma=1.0, lam=0.5)
        >>> advantages
        tensor([[0.2500, 0.5000, 1.0000]])
    """
    _check_discounts(gamma, lam, critic_lam)
    check_in("masked", masked, _MASKED)
    check_dtype("rewards", rewards, FLOATS)
    check_dtype("values", values, FLOATS)
    rows = _check_layout("rewards", rewards, cu_seqlens)
    check_shape("values", values, rewards.shape, "like rewards")
    mask = None if mask is None else check_mask("mask", mask, rewards.shape)
    if last_values is not None:
        check_dtype("last_values", last_values, FLOATS)
        check_shape("last_values", last_values, (rows,), "[B], one for each response")
        if masked == "zero":
            raise ValueError("last_values is given, but masked='zero' knows no last kept token; take masked='skip'")
    check_same_device(rewards=rewards, values=values, mask=mask, cu_seqlens=cu_seqlens, last_values=last_values)
    dtype = _compute_dtype(rewards, values)
    last_values = None if last_values is None else last_values.detach().to(dtype)
    rewards, values = rewards.detach().to(dtype), values.detach().to(dtype)
    if masked == "skip" or mask is None:
        return _gae(rewards, values, mask, gamma, lam, critic_lam, cu_seqlens, last_values)
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    found = _gae(rewards, values, None, gamma, lam, critic_lam, cu_seqlens, None)
    return tuple(torch.where(mask, x, 0) for x in found)


def _check_discounts(gamma, lam, critic_lam):
    check_range("gamma", gamma, 0, 1)
    check_range("lam", lam, 0, 1)
    if critic_lam is not None:
        check_range("critic_lam", critic_lam, 0, 1)


def _gae(rewards, values, mask, gamma, lam, critic_lam, cu_seqlens, last_values):
    """Advantages with lam and returns with critic_lam; a second walk if they differ."""
    advantages, returns = _gae_fwd(rewards, values, mask, float(gamma), float(lam), cu_seqlens, last_values)
    if critic_lam is not None and critic_lam != lam:
        returns = _gae_fwd(rewards, values, mask, float(gamma), float(critic_lam), cu_seqlens, last_values)[1]
    return advantages, returns


def rlhf_advantages(
    scores,
    log_probs,
    ref_log_probs,
    values,
    response_mask,
    *,
    kl_coef,
    gamma=1.0,
    lam=0.95,
    critic_lam=None,
    kl_estimator="k1",
    reward_clip=None,
    whiten=True,
    cu_seqlens=None,
    process_group=None,
):
    """From the reward model's scores to advantages, in one call: KL-shaped rewards, GAE, whitening.

    r_t = -kl_coef kl_t, plus the score at the last kept token (Ouyang et al. 2022, section 3.5; k1 is its log-ratio);
    then `gae`; then, if whiten, advantages less their mean and over their standard deviation, both over all kept
    tokens of the batch and, with a process_group, of all its ranks together.

    Args:
        scores: [B], one for each response; NaN is allowed where a response has no kept token.
        log_probs: [B, T], or [N] with cu_seqlens; fp32|bf16|fp16|fp64, of the sampled tokens under the policy, nats.
        ref_log_probs: like log_probs, under the reference (SFT) model.
        values: like log_probs, the value before each token is chosen, in reward units.
        response_mask: like log_probs, bool or integer, 1 = keep; None = all. What stands under 0 may be NaN.
        kl_coef: >= 0, reward for each nat; paper: 0.02.
        gamma: discount, 0 to 1.
        lam: 0 to 1; paper: 0.95.
        critic_lam: 0 to 1, lam of the returns, as in `gae`; None = lam.
        kl_estimator: "k1" log r, "k2" (log r)^2 / 2, "k3" 1/r - 1 + log r, with r = policy / reference.
        reward_clip: > 0, scores are clipped to [-reward_clip, reward_clip]; None = not. The KL term never is.
        whiten: whether the advantages are whitened.
        cu_seqlens: [B+1] int64|int32, where packed responses begin and end; None for [B, T].
        process_group: torch.distributed group whose ranks whiten together; None = this process alone.
    Returns:
        RLHFAdvantages(advantages, returns, rewards, kl), each like log_probs, fp32 (fp64 if log_probs or values are),
        0 under the mask's zeros. returns belong to the advantages before whitening. Not differentiable.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; kl_coef < 0, reward_clip <= 0, gamma, lam or critic_lam
            outside [0, 1], an unknown kl_estimator, or cu_seqlens not ascending to N.
    Cost:
        Native CPU: reads 13 bytes a token and writes 16, and 8 more to whiten; workspace 24 bytes a response. A
        critic_lam of its own costs a `gae` more. With a process_group one all-gather of 24 bytes a rank.
    Example:
        >>> import torch
        >>> logp, zeros = torch.tensor([[-0.5, -0.5]]), torch.zeros(1, 2)
        >>> out = rlhf_advantages(
        ...     torch.tensor([1.0]), logp, logp - 0.5, zeros, torch.ones(1, 2).bool(), kl_coef=0.5, whiten=False
        ... )
        >>> out.rewards
        tensor([[-0.2500,  0.7500]])
    """
    check_range("kl_coef", kl_coef, 0)
    _check_discounts(gamma, lam, critic_lam)
    check_in("kl_estimator", kl_estimator, _ESTIMATORS)
    if reward_clip is not None:
        check_range("reward_clip", reward_clip, 0, low_open=True)
    check_dtype("scores", scores, FLOATS)
    check_dtype("log_probs", log_probs, FLOATS)
    rows = _check_layout("log_probs", log_probs, cu_seqlens)
    check_shape("scores", scores, (rows,), "[B], one for each response")
    for name, tensor in (("ref_log_probs", ref_log_probs), ("values", values)):
        check_dtype(name, tensor, FLOATS)
        check_shape(name, tensor, log_probs.shape, "like log_probs")
    mask = None if response_mask is None else check_mask("response_mask", response_mask, log_probs.shape)
    check_same_device(
        log_probs=log_probs,
        scores=scores,
        ref_log_probs=ref_log_probs,
        values=values,
        response_mask=mask,
        cu_seqlens=cu_seqlens,
    )
    dtype = _compute_dtype(log_probs, ref_log_probs, values)
    scores, log_probs, ref_log_probs, values = (
        x.detach().to(dtype) for x in (scores, log_probs, ref_log_probs, values)
    )
    whiten_here = whiten and process_group is None
    advantages, returns, rewards, kl = _rlhf_advantages_fwd(
        scores,
        log_probs,
        ref_log_probs,
        values,
        mask,
        float(kl_coef),
        float(gamma),
        float(lam),
        kl_estimator,
        None if reward_clip is None else float(reward_clip),
        whiten_here,
        cu_seqlens,
    )
    if critic_lam is not None and critic_lam != lam:
        returns = _gae_fwd(rewards, values, mask, float(gamma), float(critic_lam), cu_seqlens, None)[1]
    if whiten and not whiten_here:
        advantages = masked_whiten(advantages, mask, process_group=process_group)
    return RLHFAdvantages(advantages, returns, rewards, kl)


def masked_whiten(
    values,
    mask=None,
    *,
    center=True,
    scale=True,
    correction=1,
    eps=1e-8,
    min_variance=0.0,
    process_group=None,
):
    """The values over their standard deviation, and less their mean, both taken over the kept entries.

    (x - mean) / sqrt(max(var, min_variance) + eps), var over count - correction; a single kept entry gives 0. As it
    stands this is the masked_whiten of verl and of TRL's PPO, whose shift_mean=False, for rewards, is center=False.
    OpenRLHF's whitening of advantages is correction=0, eps=0, min_variance=1e-8, its no_std_norm scale=False.

    Args:
        values: [B, T] or [N] fp32|bf16|fp16|fp64.
        mask: like values, bool or integer, 1 = keep; None = all. Values under 0 may be NaN.
        center: False gives the mean back after scaling, as rewards are whitened.
        scale: False divides by nothing, so that the mean alone is taken away.
        correction: 1, the default, for the unbiased variance, or 0 for that of the entries themselves.
        eps: >= 0, added to the variance.
        min_variance: >= 0, a smaller variance counts as this one. It or eps must be at least 1e-12.
        process_group: torch.distributed group whose ranks whiten together; None = this process alone.
    Returns:
        Like values, fp32 (fp64 for fp64), 0 under the mask's zeros. Not differentiable.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; correction is not 0 or 1; eps or min_variance < 0, or both
            below 1e-12.
    Cost:
        Two reads and one write; with a process_group one all-gather of 24 bytes a rank.
    Example:
        >>> import torch
        >>> masked_whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([1, 1, 0]))
        tensor([-0.7071,  0.7071,  0.0000])
        >>> masked_whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([1, 1, 0]), scale=False)
        tensor([-1.,  1.,  0.])
    """
    check_dtype("values", values, FLOATS)
    if values.dim() not in (1, 2):
        raise ValueError(f"values has shape {list(values.shape)}, expected [B, T] or [N]")
    mask = None if mask is None else check_mask("mask", mask, values.shape)
    check_same_device(values=values, mask=mask)
    check_in("correction", correction, (0, 1))
    check_range("eps", eps, 0)
    check_range("min_variance", min_variance, 0)
    if eps < 1e-12 and min_variance < 1e-12:
        raise ValueError(f"eps is {eps!r} and min_variance is {min_variance!r}, expected one of them to be >= 1e-12")
    values = values.detach().to(_compute_dtype(values))
    stats = _whiten_stats_fwd(values, mask)
    if process_group is not None:
        stats = _merged_stats(stats, process_group)
    if not scale or (correction, eps, min_variance) != (1, 1e-8, 0):
        stats = _with_denominator(stats, scale, correction, eps, min_variance)
    return _whiten_fwd(values, mask, stats, center)


def _with_denominator(stats, scale, correction, eps, min_variance):
    """Statistics of the same mean by which whiten_fwd, which divides by sqrt(m2 / (count - 1) + 1e-8), does so."""
    count, mean, m2 = stats.unbind()
    squared = (m2 / (count - correction).clamp(min=1)).clamp(min=min_variance) + eps
    squared = squared if scale else torch.ones_like(squared)
    return torch.stack((torch.full_like(count, 2), mean, squared - 1e-8))


def _merged_stats(stats, process_group):
    """Count, mean and squared deviations over all ranks, from those of each; the same bits on every rank."""
    parts = [torch.empty_like(stats) for _ in range(torch.distributed.get_world_size(process_group))]
    torch.distributed.all_gather(parts, stats, group=process_group)
    counts, means, m2s = torch.stack(parts, 1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    return torch.stack((count, mean, (m2s + counts * (means - mean).square()).sum()))


def _check_layout(name, tensor, cu_seqlens):
    """Number of responses, after a look at the shape that the layout asks for."""
    if cu_seqlens is None:
        check_shape(name, tensor, (None, None), "[B, T], or packed [N] together with cu_seqlens [B+1]")
        return tensor.shape[0]
    check_shape(name, tensor, (None,), "packed [N], because cu_seqlens is given")
    check_dtype("cu_seqlens", cu_seqlens, (torch.int64, torch.int32))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:  # the offsets themselves are read inside the operator
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, expected [number of responses + 1]")
    return cu_seqlens.shape[0] - 1


def _compute_dtype(*tensors):
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


@custom_op("gae_fwd")
def gae_fwd(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    cu_seqlens: Tensor | None,
    last_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The contract is in reference/advantages.py."""
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, rewards.shape[0])
    backend = dispatch.pick("advantages", rewards)
    return backend.gae_fwd(rewards, values, mask, gamma, lam, cu_seqlens, last_values)


@gae_fwd.register_fake
def _(rewards, values, mask, gamma, lam, cu_seqlens, last_values):
    return tuple(rewards.new_empty(rewards.shape) for _ in range(2))


_gae_fwd = direct(gae_fwd)


@custom_op("rlhf_advantages_fwd")
def rlhf_advantages_fwd(
    scores: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor,
    mask: Tensor | None,
    kl_coef: float,
    gamma: float,
    lam: float,
    kl_estimator: str,
    reward_clip: float | None,
    whiten: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The contract is in reference/advantages.py."""
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, log_probs.shape[0])
    return dispatch.pick("advantages", log_probs).rlhf_advantages_fwd(
        scores,
        log_probs,
        ref_log_probs,
        values,
        mask,
        kl_coef,
        gamma,
        lam,
        kl_estimator,
        reward_clip,
        whiten,
        cu_seqlens,
    )


@rlhf_advantages_fwd.register_fake
def _(scores, log_probs, *options):
    return tuple(log_probs.new_empty(log_probs.shape) for _ in range(4))


_rlhf_advantages_fwd = direct(rlhf_advantages_fwd)


@custom_op("whiten_stats_fwd")
def whiten_stats_fwd(values: Tensor, mask: Tensor | None) -> Tensor:
    """The contract is in reference/advantages.py."""
    return dispatch.pick("advantages", values).whiten_stats_fwd(values, mask)


@whiten_stats_fwd.register_fake
def _(values, mask):
    return values.new_empty(3, dtype=torch.float64)


_whiten_stats_fwd = direct(whiten_stats_fwd)


@custom_op("whiten_fwd")
def whiten_fwd(values: Tensor, mask: Tensor | None, stats: Tensor, center: bool) -> Tensor:
    """The contract is in reference/advantages.py."""
    return dispatch.pick("advantages", values).whiten_fwd(values, mask, stats, center)


@whiten_fwd.register_fake
def _(values, mask, stats, center):
    return values.new_empty(values.shape)


_whiten_fwd = direct(whiten_fwd)
