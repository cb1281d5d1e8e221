"""Ranking losses of a reward model: all pairs of K ranked responses (Bradley-Terry), or the order (Plackett-Luce)."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from ._autograd import custom_op, direct, register
from ._checks import (
    FLOATS,
    check_cu_seqlens,
    check_dtype,
    check_in,
    check_range,
    check_same_device,
    check_shape,
    reads_values,
)
from .reference.bradley_terry import METRICS, STATS, accumulator_dtype, center_terms, ranking_metrics_fwd
from .reference.bradley_terry import ranking_bwd as reference_bwd

_RANK_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)
_REDUCTIONS = ("mean", "sum", "none")
_TIES = ("drop", "half")


class RankingLoss(NamedTuple):
    """The loss, and a dict of detached scalars on the device of the scores."""

    loss: Tensor
    metrics: dict[str, Tensor]


def bradley_terry_loss(
    scores,
    ranks,
    cu_groups=None,
    *,
    margins=None,
    ties="drop",
    center_coef=0.0,
    reduction="mean",
    num_items_in_batch=None,
):
    """Reward-model loss over all pairs of each prompt's ranked responses.

    For one prompt, -1/|pairs| * sum over (w better than l) of log sigmoid(s_w - s_l - margin), then the mean over the
    prompts that have a pair: Ouyang et al. 2022, eq. (1), so a prompt with 9 responses weighs as much as one with 4.
    Without ties |pairs| is K(K-1)/2; a tie is no pair, unless ties="half". A prompt without a pair counts nowhere.
    With center_coef each pair adds center_coef (s_w + s_l)^2 to its loss, which keeps scores near 0 (Eisenstein et al.
    2023, eq. (2)): for K = 2 it is TRL's center_rewards_coefficient. A pair with a margin is centred like any other.

    Args:
        scores: [P, K] or [S] fp32|bf16|fp16|fp64, the reward model's scores; the arithmetic is fp32 (fp64 for fp64).
        ranks: like scores, integer, a lower rank is better, equal ranks are a tie. A rank below 0 (use -1) marks an
            absent response, the way to pad [P, K]; its score may be NaN.
        cu_groups: [P+1] int64|int32 offsets for flat scores: prompt p owns the entries cu_groups[p] up to
            cu_groups[p+1]; None for [P, K].
        margins: gap that the better response must win by, not differentiated; None = 0. A number or [P]: the same for
            all pairs of a prompt. [P, K, K]: entry [p, i, j] for the pair "i beats j". With flat scores [S, M]: entry
            [i, n] for the pair "i beats the n-th response of its prompt", M >= the largest prompt. Ties have none.
        ties: "drop" (the paper), or "half": a tied pair adds half of both directions' losses, which pulls the two
            scores together, and counts as one pair.
        center_coef: >= 0, weight of the squared sum of a pair's scores; default 0.0, not centred. TRL recommends 0.01.
        reduction: "mean" over the prompts that have a pair, "sum" over prompts, or "none" for [P] (0 without a pair).
        num_items_in_batch: number or 0-d tensor, prompts that have a pair in the whole batch, over all micro-batches
            and processes; divides instead of this call's count. Only with reduction="mean".
    Returns:
        RankingLoss(loss, metrics); loss is fp32 (fp64 for fp64), differentiable in scores. Metrics, over all pairs
        that are no ties: accuracy (equal scores count half), margin (mean s_w - s_l), pairs (that the loss counts);
        over all present responses: min_reward, mean_reward, max_reward. NaN where there is nothing to average.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; unknown ties or reduction; center_coef below 0; cu_groups not
            ascending to S; num_items_in_batch below 1 or with another reduction than "mean".
    Cost:
        K(K-1)/2 pairs a prompt, forward only: the gradient is made there; backward is one product. center_coef adds
        two sorts of the S scores. No host sync in the native backends.
    Example:
        >>> import torch
        >>> scores = torch.tensor([[1.8, 0.9, 0.3, -0.5]], requires_grad=True)
        >>> loss, metrics = bradley_terry_loss(scores, torch.tensor([[0, 1, 2, 3]]))
        >>> loss.backward()
        >>> round(loss.item(), 3), int(metrics["pairs"]), metrics["accuracy"].item()
        (0.278, 6, 1.0)
    """
    check_in("ties", ties, _TIES)
    check_range("center_coef", center_coef, 0)
    _check_reduction(reduction, num_items_in_batch)
    flat = _flatten(scores, ranks, cu_groups)
    flat_margins = _flatten_margins(margins, scores, flat.prompts)
    kind = "pairs_half" if ties == "half" else "pairs"
    if reduction != "none" and not center_coef:
        return _whole(flat, flat_margins, kind, reduction, num_items_in_batch)
    inputs = flat.scores, flat.ranks, flat.offsets(), flat_margins
    return _of_prompts(_pairs(*inputs, ties == "half", float(center_coef)), "pairs", reduction, num_items_in_batch)


def plackett_luce_loss(scores, ranks, cu_groups=None, *, reduction="mean", num_items_in_batch=None):
    """Reward-model loss of a whole ranking: the best is chosen among all, the second among the rest, and so on.

    For one prompt the mean over its choices of -log(exp(s_i) / (exp(s_i) + sum over all j worse than i of exp(s_j)));
    times K - 1 it is the negative log-likelihood of the order (Plackett 1975). Then the mean over prompts. For K = 2
    it is the Bradley-Terry loss. Ties: tied responses do not compete with each other, each is chosen among itself
    and the strictly worse, so a tie says nothing about the order of its members; a response with nobody worse
    makes no choice.

    Args:
        scores: [P, K] or [S] fp32|bf16|fp16|fp64.
        ranks: like scores, integer, lower is better, equal is a tie, below 0 is absent (its score may be NaN).
        cu_groups: [P+1] int64|int32 offsets for flat scores; None for [P, K].
        reduction: "mean" over the prompts that have a choice, "sum" over prompts, or "none" for [P].
        num_items_in_batch: number or 0-d tensor, prompts that have a choice in the whole batch; divides instead of
            this call's count. Only with reduction="mean".
    Returns:
        RankingLoss(loss, metrics); metrics as in `bradley_terry_loss` with `choices` in place of `pairs`.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; unknown reduction; cu_groups not ascending to S.
    Cost:
        K(K-1)/2 exponentials a prompt, forward only: the gradient is made there; backward is one product.
    Example:
        >>> import torch
        >>> loss, metrics = plackett_luce_loss(torch.zeros(1, 3), torch.tensor([[0, 1, 2]]))
        >>> round(loss.item(), 4)  # log(3 * 2) / 2 choices
        0.8959
    """
    _check_reduction(reduction, num_items_in_batch)
    flat = _flatten(scores, ranks, cu_groups)
    if reduction != "none":
        return _whole(flat, None, "choices", reduction, num_items_in_batch)
    return _of_prompts(_orders(flat.scores, flat.ranks, flat.offsets()), "choices", reduction, num_items_in_batch)


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


class _Flat(NamedTuple):
    """Flat scores and ranks; offsets of the prompts, or None where each has so many columns."""

    scores: Tensor
    ranks: Tensor
    cu_groups: Tensor | None
    columns: int
    prompts: int

    def offsets(self):
        return _offsets(self.scores, self.cu_groups, self.columns, self.prompts)


def _offsets(scores, cu_groups, columns, prompts):
    if cu_groups is not None:
        return cu_groups
    if columns == 0:
        return torch.zeros(prompts + 1, dtype=torch.int64, device=scores.device)
    return torch.arange(0, prompts * columns + 1, columns, dtype=torch.int64, device=scores.device)


def _flatten(scores, ranks, cu_groups):
    check_dtype("scores", scores, FLOATS)
    check_dtype("ranks", ranks, _RANK_DTYPES)
    check_same_device(scores=scores, ranks=ranks, cu_groups=cu_groups)
    columns = 0
    if cu_groups is None:
        check_shape("scores", scores, (None, None), "[P, K], or flat [S] together with cu_groups [P+1]")
        check_shape("ranks", ranks, scores.shape, "like scores")
        prompts, columns = scores.shape
    else:
        check_shape("scores", scores, (None,), "flat [S], because cu_groups is given")
        check_shape("ranks", ranks, scores.shape, "like scores")
        check_dtype("cu_groups", cu_groups, (torch.int64, torch.int32))
        if cu_groups.dim() != 1 or cu_groups.shape[0] < 1:  # the offsets themselves are read inside the operator
            raise ValueError(f"cu_groups has shape {list(cu_groups.shape)}, expected [number of prompts + 1]")
        cu_groups, prompts = cu_groups.contiguous().long(), cu_groups.shape[0] - 1
    flat = scores.reshape(-1).contiguous(), ranks.reshape(-1).contiguous().long()
    return _Flat(*flat, cu_groups, columns, prompts)


def _flatten_margins(margins, scores, prompts):
    if margins is None:
        return None
    dtype = accumulator_dtype(scores.dtype)
    if not isinstance(margins, Tensor):
        check_range("margins", margins)
        return torch.full((prompts,), float(margins), dtype=dtype, device=scores.device)
    check_dtype("margins", margins, FLOATS)
    check_same_device(scores=scores, margins=margins)
    if margins.dim() == 1:
        check_shape("margins", margins, (prompts,), "[P], one for each prompt")
    elif scores.dim() == 2:
        check_shape("margins", margins, (*scores.shape, scores.shape[1]), "[P, K, K], one for each pair")
        margins = margins.reshape(scores.numel(), scores.shape[1])
    else:
        check_shape("margins", margins, (scores.shape[0], None), "[S, M], one for each pair")
    if margins.dim() == 2 and margins.shape[1] == 0:  # prompts without responses have no pairs
        return torch.zeros(prompts, dtype=dtype, device=scores.device)
    return margins.detach().to(dtype).contiguous()


def _whole(flat, margins, kind, reduction, num_items_in_batch):
    """The loss of all prompts, made where its parts are made."""
    normalizer = num_items_in_batch if isinstance(num_items_in_batch, Tensor) else None
    if normalizer is not None:
        normalizer = normalizer.detach().to(flat.scores.device, accumulator_dtype(flat.scores.dtype))
    number = 1.0 if reduction == "sum" else float(num_items_in_batch or 0) if normalizer is None else 0.0
    value, _, metrics = _ranking(*flat, margins, kind, number, normalizer)
    return RankingLoss(value, _named(metrics, "choices" if kind == "choices" else "pairs"))


def _of_prompts(results, counted, reduction, num_items_in_batch):
    """The same of the losses of each prompt, with autograd's operators."""
    loss, _, stats = results
    metrics = _ranking_metrics(stats.detach())
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (metrics[METRICS.index("divisor")] if num_items_in_batch is None else num_items_in_batch)
    return RankingLoss(loss, _named(metrics, counted))


def _named(metrics, counted):
    found = dict(zip(METRICS[:-1], metrics.unbind(), strict=False))
    return {counted if name == "pairs" else name: x for name, x in found.items()}


@custom_op("ranking_metrics")
def ranking_metrics(stats: Tensor) -> Tensor:
    """Metrics [7] of stats [P, 8]; the contract is in reference/bradley_terry.py."""
    return _metrics_of(dispatch.pick("bradley_terry", stats), stats)


def _metrics_of(backend, stats):
    return getattr(backend, "ranking_metrics_fwd", ranking_metrics_fwd)(stats)


@ranking_metrics.register_fake
def _(stats):
    return stats.new_empty(len(METRICS))


_ranking_metrics = direct(ranking_metrics)


@custom_op("ranking_fwd")
def ranking_fwd(
    scores: Tensor,
    ranks: Tensor,
    cu_groups: Tensor | None,
    columns: int,
    prompts: int,
    margins: Tensor | None,
    kind: str,
    number: float,
    normalizer: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of all prompts, gradient [S] before the division, metrics [7]; see reference/bradley_terry.py."""
    if cu_groups is not None:
        _check_values(scores, cu_groups, margins)
    backend = dispatch.pick("bradley_terry", scores)
    if hasattr(backend, "ranking_fwd"):
        return backend.ranking_fwd(scores, ranks, cu_groups, columns, prompts, margins, kind, number, normalizer)
    inputs = scores, ranks, _offsets(scores, cu_groups, columns, prompts)
    if kind == "choices":
        loss, grad, stats = backend.plackett_luce_fwd(*inputs)
    else:
        loss, grad, stats = backend.bradley_terry_fwd(*inputs, margins, kind == "pairs_half")
    metrics = _metrics_of(backend, stats)
    divisor = metrics[METRICS.index("divisor")]
    if normalizer is not None:
        divisor.copy_(normalizer)
    elif number:
        divisor.fill_(number)
    return loss.sum() / divisor, grad, metrics


@custom_op("ranking_bwd")
def ranking_bwd(grad_value: Tensor, grad: Tensor, metrics: Tensor) -> Tensor:
    """Upstream gradient of the loss times the saved gradient [S] over the divisor among the metrics."""
    backend = dispatch.pick("bradley_terry", grad)
    return getattr(backend, "ranking_bwd", reference_bwd)(grad_value, grad, metrics[METRICS.index("divisor")])


@custom_op("bradley_terry_fwd")
def bradley_terry_fwd(
    scores: Tensor, ranks: Tensor, cu_groups: Tensor, margins: Tensor | None, ties_half: bool, center_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [P], gradient [S], stats [P, 8]; the contract is in reference/bradley_terry.py."""
    _check_values(scores, cu_groups, margins)
    backend = dispatch.pick("bradley_terry", scores)
    loss, grad, stats = backend.bradley_terry_fwd(scores, ranks, cu_groups, margins, ties_half)
    if center_coef:
        center, center_grad = center_terms(scores, ranks, cu_groups, ties_half)
        loss, grad = loss + center_coef * center, grad + center_coef * center_grad
    return loss, grad, stats


@custom_op("plackett_luce_fwd")
def plackett_luce_fwd(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [P], gradient [S], stats [P, 8]; the contract is in reference/bradley_terry.py."""
    _check_values(scores, cu_groups, None)
    return dispatch.pick("bradley_terry", scores).plackett_luce_fwd(scores, ranks, cu_groups)


@custom_op("bradley_terry_bwd")
def bradley_terry_bwd(grad_loss: Tensor, grad: Tensor, cu_groups: Tensor) -> Tensor:
    """Upstream gradient [P] times the saved gradient [S]."""
    return dispatch.pick("bradley_terry", grad).bradley_terry_bwd(grad_loss, grad, cu_groups)


def _check_values(scores, cu_groups, margins):
    """Checks that read data; they sit inside the operators, so that they also run in compiled programs."""
    check_cu_seqlens("cu_groups", cu_groups, scores.shape[0])
    if margins is not None and margins.dim() == 2 and reads_values(cu_groups) and cu_groups.shape[0] > 1:
        largest = int(cu_groups.diff().max())
        if margins.shape[1] < largest:
            raise ValueError(f"margins has {margins.shape[1]} columns, expected at least {largest}, the largest prompt")


@bradley_terry_fwd.register_fake
def _(scores, ranks, cu_groups, margins, ties_half, center_coef):
    return _fake_forward(scores, cu_groups)


@plackett_luce_fwd.register_fake
def _(scores, ranks, cu_groups):
    return _fake_forward(scores, cu_groups)


@bradley_terry_bwd.register_fake
def _(grad_loss, grad, cu_groups):
    return torch.empty_like(grad)


@ranking_fwd.register_fake
def _(scores, *_):
    dtype = accumulator_dtype(scores.dtype)
    return tuple(scores.new_empty(shape, dtype=dtype) for shape in ((), scores.shape, (len(METRICS),)))


@ranking_bwd.register_fake
def _(grad_value, grad, metrics):
    return torch.empty_like(grad)


_bradley_terry_bwd = direct(bradley_terry_bwd)
_ranking_bwd = direct(ranking_bwd)


def _fake_forward(scores, cu_groups):
    dtype, prompts = accumulator_dtype(scores.dtype), cu_groups.shape[0] - 1
    return (
        scores.new_empty(prompts, dtype=dtype),
        scores.new_empty(scores.shape[0], dtype=dtype),
        scores.new_empty((prompts, len(STATS)), dtype=dtype),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2])
    ctx.scores_dtype, ctx.n_inputs = inputs[0].dtype, len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, grad_grad, grad_stats):
    nothing = (None,) * (ctx.n_inputs - 1)
    if grad_loss is None:
        return None, *nothing
    grad, cu_groups = ctx.saved_tensors
    grad_scores = _bradley_terry_bwd(grad_loss, grad, cu_groups)
    return grad_scores.to(ctx.scores_dtype), *nothing


def _setup_ranking(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])
    ctx.scores_dtype, ctx.n_inputs = inputs[0].dtype, len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _ranking_backward(ctx, grad_value, *_):
    nothing = (None,) * (ctx.n_inputs - 1)
    if grad_value is None:
        return None, *nothing
    return _ranking_bwd(grad_value, *ctx.saved_tensors).to(ctx.scores_dtype), *nothing


_ranking = register(ranking_fwd, _ranking_backward, _setup_ranking, scores=0)
_pairs = register(bradley_terry_fwd, _backward, _setup_context, scores=0)
_orders = register(plackett_luce_fwd, _backward, _setup_context, scores=0)
