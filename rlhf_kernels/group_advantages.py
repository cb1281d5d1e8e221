"""Advantages from the scores of several responses to each prompt, without a value function."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._autograd import custom_op, direct
from ._checks import (
    FLOATS,
    INTEGERS,
    check_cu_seqlens,
    check_dtype,
    check_in,
    check_mask,
    check_range,
    check_same_device,
    check_shape,
)
from .advantages import _compute_dtype, _merged_stats


class _Estimator(NamedTuple):
    """What is taken from a score, and by what the rest is divided."""

    baseline: str  # group | others | lengths (of the group) | batch | none
    divisor: str = "none"  # group | batch | whiten (less the batch's mean too) | none


ESTIMATORS = {
    "grpo": _Estimator("group", "group"),
    "grpo_batch_std": _Estimator("group", "batch"),
    "dr_grpo": _Estimator("group"),
    "rloo": _Estimator("others"),
    "reinforce++": _Estimator("none", "whiten"),
    "reinforce++-baseline": _Estimator("group", "whiten"),
    "opo": _Estimator("lengths"),
    "batch_mean": _Estimator("batch"),
}


def group_advantages(
    scores: Tensor,
    cu_groups: Tensor | None = None,
    *,
    group_ids: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    estimator: str = "grpo",
    eps: float = 1e-6,
    lone: str = "zero",
    process_group=None,
) -> Tensor:
    """One advantage for each response, from its score and those of the other responses to its prompt.

    "grpo": (s - mean) / (std + eps) of the group, Shao et al. 2024. "grpo_batch_std": its mean, the batch's std.
    "dr_grpo": s - mean, Liu et al. 2025. "rloo": s - mean of the others, Ahmadian et al. 2024. "opo": s - mean of the
    group weighted by lengths, Hao et al. 2025. "batch_mean": s - mean of the batch. "reinforce++": the batch whitened,
    and "reinforce++-baseline" the batch of s - mean whitened, Hu 2025: less its mean and over sqrt(var + 1e-8). Each
    std and var is over count - 1.

    Peers: TRL's GRPO has scale_rewards "group", "batch" and "none" for the first three, with eps 1e-4, and masks what
    no function scored; verl "grpo" with 1e-6, and with norm_adv_by_std_in_grpo=False "dr_grpo"; OpenRLHF's group_norm
    is "grpo" with 1e-9, its flash_reinforce "batch_mean". verl and OpenRLHF whiten REINFORCE++ over the tokens of the
    batch: give lengths (OpenRLHF's variance is over count, which is `masked_whiten(..., correction=0)` of advantages
    spread over the tokens). With a KL or a discount in the rewards of the tokens there is no advantage of a whole
    response: `gae` of the rewards with values 0, lam=1, then `masked_whiten`.

    Args:
        scores: [P, K], K responses to each of P prompts, or flat [S]; fp32|bf16|fp16|fp64.
        cu_groups: [P+1] int64|int32, prompt p owns the scores cu_groups[p] .. cu_groups[p+1]-1 of [S]; default None.
        group_ids: [S] integers of any value and order, the same for responses to the same prompt; default None.
        mask: like scores, bool or integer, 1 = keep; None, the default, for all. What is masked counts nowhere, may be
            NaN, and gets 0.
        lengths: like scores, > 0, the tokens of each response: how much it counts in the batch's moments of
            "reinforce++", "reinforce++-baseline" and "batch_mean"; needed for "opo"; default None, each counts as one.
        estimator: one of the eight above, default "grpo".
        eps: >= 0, added to the std of "grpo" and "grpo_batch_std", default 1e-6.
        lone: what the only kept member of a group gets, where the baseline is of its group: "zero", the default, since
            it is compared with nothing (TRL), or "score", its score with baseline 0 and nothing to divide by (verl).
        process_group: torch.distributed group whose ranks are one batch. With group_ids, groups may lie on several
            ranks, each of which must then hold the same number of scores; None, the default, for this process alone.
    Returns:
        Like scores, fp32 (fp64 for fp64). Not differentiable. As advantages [S] of `policy_loss` they count for every
        token of their response.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; cu_groups not ascending to S, or both or neither it and
            group_ids for [S]; unknown estimator or lone; eps < 0; lengths missing for "opo", or given where they have
            no meaning.
    Cost:
        [P, K]: some ten small ops in fp64; [S]: up to four sums by index more, which on a GPU sort; no host sync. With
        a process_group one all-gather of 24 bytes a rank, or of the scores where groups lie on several ranks.
    Example:
        >>> import torch
        >>> group_advantages(torch.tensor([[1.0, 2.0, 6.0]]), estimator="dr_grpo")
        tensor([[-2., -1.,  3.]])
        >>> group_advantages(torch.tensor([1.0, 5.0, 3.0]), group_ids=torch.tensor([8, 2, 8]), estimator="rloo")
        tensor([-2.,  0.,  2.])
    """
    check_in("estimator", estimator, tuple(ESTIMATORS))
    check_in("lone", lone, ("zero", "score"))
    check_range("eps", eps, 0)
    mask = _check(scores, cu_groups, group_ids, mask, lengths, estimator)
    recipe = ESTIMATORS[estimator]
    keep = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    kept = torch.where(keep, scores.detach().double(), 0)
    weights = keep.double() if lengths is None else torch.where(keep, lengths.detach().double(), 0)
    mine = slice(None)
    if process_group is not None and group_ids is not None:
        mine = torch.distributed.get_rank(process_group)
        mine = slice(mine * len(scores), (mine + 1) * len(scores))
        kept, keep, weights, group_ids = (_gathered(x, process_group) for x in (kept, keep, weights, group_ids))
        process_group = None
    sums = _sums_of_groups(cu_groups, group_ids, kept)
    x = _less_baseline(kept, keep, weights, recipe.baseline, sums, lone)
    if recipe.baseline == "batch" or recipe.divisor in ("batch", "whiten"):
        moments = _moments(kept if recipe.divisor == "batch" else x, weights, process_group)
        x = _by_the_batch(x, moments, recipe, eps)
    elif recipe.divisor == "group":
        count, squares = sums(keep.double(), torch.where(keep, x, 0).square())
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        x = torch.where(count > 1, x / (std + eps), x)
    return torch.where(keep, x, 0)[mine].to(_compute_dtype(scores))


def _check(scores, cu_groups, group_ids, mask, lengths, estimator):
    """Raise where the tensors do not fit together; the mask as bool."""
    check_dtype("scores", scores, FLOATS)
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores has shape {list(scores.shape)}, expected [P, K], or [S] with cu_groups or group_ids")
    flat = ESTIMATORS[estimator].baseline in ("batch", "none")
    given = (cu_groups is not None) + (group_ids is not None)
    if scores.dim() == 2 and given:
        raise ValueError("scores is [P, K], whose groups are its rows; give cu_groups or group_ids with [S] only")
    if scores.dim() == 1 and (given > 1 or not (given or flat)):
        raise ValueError(f"scores is [S], and {('neither', '', 'each')[given]} of cu_groups and group_ids is given")
    if cu_groups is not None:
        check_cu_seqlens("cu_groups", cu_groups, scores.shape[0])
    if group_ids is not None:
        check_dtype("group_ids", group_ids, INTEGERS)
        check_shape("group_ids", group_ids, scores.shape, "[S], like scores")
    mask = None if mask is None else check_mask("mask", mask, scores.shape)
    uses = {"reinforce++", "reinforce++-baseline", "batch_mean", "opo"}
    if lengths is not None:
        check_dtype("lengths", lengths, INTEGERS + FLOATS)
        check_shape("lengths", lengths, scores.shape, "like scores")
        if estimator not in uses:
            raise ValueError(f"lengths is given, but estimator={estimator!r} weighs all responses alike")
    elif estimator == "opo":
        raise ValueError("lengths is None, but estimator='opo' weighs the scores by them")
    check_same_device(scores=scores, cu_groups=cu_groups, group_ids=group_ids, mask=mask, lengths=lengths)
    return mask


def _sums_of_groups(cu_groups, group_ids, like):
    """sums(*tensors): of each tensor like `like`, every member's sum over its group."""
    if like.dim() == 2:
        return lambda *xs: tuple(x.sum(1, keepdim=True).expand_as(x) for x in xs)
    if cu_groups is not None:
        members = torch.arange(len(like), dtype=cu_groups.dtype, device=like.device)
        index = torch.searchsorted(cu_groups[1:].contiguous(), members, right=True)
    elif group_ids is not None:
        index = _counted(group_ids)
    else:
        return None
    return lambda *xs: _group_sums(torch.stack(xs), index).unbind()


def _counted(ids):
    """The ids replaced by 0, 1, ... in ascending order."""
    order = torch.argsort(ids, stable=True)
    is_new = torch.nn.functional.pad(ids[order].diff() != 0, (1, 0))[: len(ids)]
    return torch.zeros_like(order).scatter_(0, order, is_new.to(torch.int64).cumsum(0))


def _less_baseline(kept, keep, weights, baseline, sums, lone):
    """Scores less what they are compared with inside their group."""
    if baseline in ("batch", "none"):
        return kept
    if baseline == "lengths":
        count, size, total = sums(keep.double(), weights, weights * kept)
    else:
        count, total = sums(keep.double(), kept)
        size = count
    less = kept - total / size.clamp(min=torch.finfo(size.dtype).tiny)
    if baseline == "others":
        less = less * (count / (count - 1).clamp(min=1))
    return torch.where(count > 1, less, kept if lone == "score" else 0)


def _moments(x, weights, process_group):
    """[3] fp64: the sum of the weights, the weighted mean, the weighted sum of squared deviations; over all ranks."""
    count = weights.sum()
    mean = (weights * x).sum() / torch.where(count > 0, count, 1)
    stats = torch.stack((count, mean, (weights * (x - mean).square()).sum()))
    return stats if process_group is None else _merged_stats(stats, process_group)


def _by_the_batch(x, moments, recipe, eps):
    count, mean, m2 = moments.unbind()
    variance = m2 / (count - 1).clamp(min=1)
    if recipe.divisor == "batch":
        return x / (variance.sqrt() + eps)
    return (x - mean) * torch.rsqrt(variance + 1e-8) if recipe.divisor == "whiten" else x - mean


def _gathered(x, process_group):
    """The tensor of all ranks, one after the other."""
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(process_group))]
    torch.distributed.all_gather(parts, x.contiguous(), group=process_group)
    return torch.cat(parts)


@custom_op("group_sums")
def group_sums(values: Tensor, index: Tensor) -> Tensor:
    """Of values [n, S] fp64 and index [S] in [0, S), the group of each member: each member's sums over its group.

    Added up in the order of the members: on the CPU index_add is a plain loop, elsewhere index_put sorts. It is an op
    because torch.compile would make atomic additions of it.
    """
    totals = torch.zeros_like(values)
    for total, row in zip(totals, values, strict=True):
        if values.device.type == "cpu":
            total.index_add_(0, index, row)
        else:
            total.index_put_((index,), row, accumulate=True)
    return totals[:, index]


@group_sums.register_fake
def _(values, index):
    return values.new_empty(values.shape)


_group_sums = direct(group_sums)
