"""Ranking losses of a reward model: the definition in plain PyTorch.

All functions take the flat form: scores [S], ranks [S] and cu_groups [P+1], where prompt p owns the responses
cu_groups[p] .. cu_groups[p+1]-1. A lower rank is better, equal ranks are a tie, and a rank below 0 marks a response
that is absent: its score may be NaN and reaches neither a value nor a gradient.

What a backend provides, under these names, all tensors contiguous:

    bradley_terry_fwd(scores, ranks, cu_groups, margins, ties_half) -> (loss, grad, stats)
    plackett_luce_fwd(scores, ranks, cu_groups) -> (loss, grad, stats)
    bradley_terry_bwd(grad_loss, grad, cu_groups) -> grad_scores; grad_loss [P] may be one number, expanded
    ranking_metrics_fwd(stats) -> metrics [7], columns METRICS; where a backend has none, the one below serves

    scores    [S] fp32 | fp64 | bf16 | fp16         ranks [S] int64        cu_groups [P+1] int64
    margins   None | [P] one for all pairs of a prompt | [S, M] entry [i, j - start] for the pair (response i beats
              response j of the same prompt), M >= the largest prompt; same dtype as loss
    loss      [P] mean over the counted pairs (0 where a prompt has none); fp64 for fp64 scores, otherwise fp32
    grad      [S] d loss[prompt of s] / d scores[s], dtype of loss; 0 for absent responses
    stats     [P, 8] dtype of loss, columns STATS

A backend may make the loss and the metrics of the whole batch too, in the launch that makes their parts:

    ranking_fwd(scores, ranks, cu_groups, columns, prompts, margins, kind, number, normalizer) -> (value, grad, metrics)
    ranking_bwd(grad_value, grad, divisor) -> grad_scores, grad_value * grad / divisor

    cu_groups   None: [P, K] of `columns` = K responses a prompt
    kind        of KINDS: "pairs", "pairs_half" (ties_half), "choices" (Plackett-Luce)
    value       0-d, sum of the prompts' losses over metrics' divisor: normalizer (0-d), or else number, or else, that
                being 0, the prompts that have a pair or choice, at least 1
    metrics     [7] METRICS, dtype of loss; NaN where there is nothing to average
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

STATS = ("pairs", "strict_pairs", "correct", "margin_sum", "responses", "reward_sum", "reward_min", "reward_max")
METRICS = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward", "pairs", "divisor")
KINDS = ("pairs", "pairs_half", "choices")
CASES = ("pairs", "k4", "ragged", "ties", "absent", "margins", "large_gap", "no_pairs", "empty")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_index(cu_groups: Tensor) -> tuple[Tensor, Tensor]:
    """Padded view of the groups: index [P, K] into the flat axis (clamped) and valid [P, K]."""
    sizes = cu_groups.diff()
    largest = int(sizes.max()) if sizes.numel() else 0
    offset = torch.arange(largest, dtype=torch.int64, device=cu_groups.device)
    valid = offset < sizes[:, None]
    return torch.where(valid, cu_groups[:-1, None] + offset, 0), valid


def _padded(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index, valid = group_index(cu_groups)
    rank = ranks[index]
    present = valid & (rank >= 0)
    score = torch.where(present, scores[index].to(accumulator_dtype(scores.dtype)), 0)
    return score, rank, present, index


def _pair_masks(rank: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """better[p, i, j]: i is ranked above j.  tied[p, i, j]: equal ranks, each unordered pair once (i < j)."""
    both = present[:, :, None] & present[:, None, :]
    better = both & (rank[:, :, None] < rank[:, None, :])
    tied = (both & (rank[:, :, None] == rank[:, None, :])).triu(1)
    return better, tied


def _pair_gaps(score: Tensor, index: Tensor, margins: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gap s_i - s_j of all pairs, and the same less the pair's margin."""
    gap = score[:, :, None] - score[:, None, :]
    if margins is None:
        return gap, gap
    pair_margin = margins[:, None, None] if margins.dim() == 1 else margins[index][:, :, : gap.shape[-1]]
    return gap, gap - pair_margin


def bradley_terry(
    scores: Tensor,
    ranks: Tensor,
    cu_groups: Tensor,
    margins: Tensor | None = None,
    ties_half: bool = False,
    center_coef: float = 0.0,
) -> Tensor:
    """Loss of each prompt [P], differentiable: mean over its pairs of -log sigmoid(s_w - s_l - margin), and of
    center_coef (s_w + s_l)^2."""
    score, rank, present, index = _padded(scores, ranks, cu_groups)
    better, tied = _pair_masks(rank, present)
    gap, shifted = _pair_gaps(score, index, margins)
    total = torch.where(better, -logsigmoid(torch.where(better, shifted, 0)), 0).sum((1, 2))
    pairs = better.sum((1, 2))
    if ties_half:
        total = total + torch.where(tied, -0.5 * (logsigmoid(gap) + logsigmoid(-gap)), 0).sum((1, 2))
        pairs = pairs + tied.sum((1, 2))
    if center_coef:
        counted = better | tied if ties_half else better
        sums = score[:, :, None] + score[:, None, :]
        total = total + center_coef * torch.where(counted, sums, 0).square().sum((1, 2))
    return total / pairs.clamp(min=1)


def plackett_luce(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> Tensor:
    """Loss of each prompt [P], differentiable: mean over its choices of -log p(chosen among itself and the worse)."""
    score, rank, present, _ = _padded(scores, ranks, cu_groups)
    better, _ = _pair_masks(rank, present)
    choice = better.any(-1)
    candidates = better | (torch.eye(rank.shape[-1], dtype=torch.bool, device=rank.device) & present[:, :, None])
    field = torch.where(candidates & choice[:, :, None], score[:, None, :].expand(candidates.shape), -torch.inf)
    field = torch.where(choice[:, :, None], field, 0)  # rows that make no choice would be all -inf
    nll = torch.where(choice, field.logsumexp(-1) - score, 0)
    return nll.sum(-1) / choice.sum(-1).clamp(min=1)


def _stats(score: Tensor, rank: Tensor, present: Tensor, pairs: Tensor) -> Tensor:
    better, _ = _pair_masks(rank, present)
    gap = score[:, :, None] - score[:, None, :]
    won = (gap > 0).to(score.dtype) + 0.5 * (gap == 0).to(score.dtype)
    columns = (
        pairs.to(score.dtype),
        better.sum((1, 2)).to(score.dtype),
        torch.where(better, won, 0).sum((1, 2)),
        torch.where(better, gap, 0).sum((1, 2)),
        present.sum(1).to(score.dtype),
        score.sum(1),
        _extreme(torch.where(present, score, torch.inf), largest=False),
        _extreme(torch.where(present, score, -torch.inf), largest=True),
    )
    return torch.stack(columns, 1)


def _extreme(x: Tensor, *, largest: bool) -> Tensor:
    if x.shape[1] == 0:
        return x.new_full((x.shape[0],), -torch.inf if largest else torch.inf)
    return x.amax(1) if largest else x.amin(1)


def _to_flat(grad: Tensor, index: Tensor, present: Tensor, total: int) -> Tensor:
    flat = grad.new_zeros(total)
    flat[index[present]] = grad[present]
    return flat


def center_terms(scores: Tensor, ranks: Tensor, cu_groups: Tensor, ties_half: bool) -> tuple[Tensor, Tensor]:
    """Mean over each prompt's pairs of (s_i + s_j)^2 [P], and its gradient [S], without a host sync.

    Every backend adds it to its loss. With n_i partners of i whose scores sum to t_i, d/ds_i of the sum over pairs is
    2 (n_i s_i + t_i), and the sum itself is sum s_i (n_i s_i + t_i). Partners are all present responses of the prompt
    less those of the same rank (of ties_half: less i itself); sums are taken in float64, since these cancel.
    """
    dtype, wide = accumulator_dtype(scores.dtype), torch.float64
    prompts, total = cu_groups.shape[0] - 1, scores.shape[0]
    numbers = torch.arange(prompts, dtype=torch.int64, device=scores.device)
    prompt = torch.repeat_interleave(numbers, cu_groups.diff(), output_size=total)
    present = ranks >= 0
    score = torch.where(present, scores.to(wide), 0)
    own = torch.stack([present.to(wide), score], 1)  # [S, 2]: how many, and their sum
    of_prompt = _segment_sums(own, cu_groups)
    same = own if ties_half else _same_rank_sums(own, ranks, prompt)
    partners, others = (of_prompt[prompt] - same).unbind(1)
    slope = torch.where(present, partners * score + others, 0)
    pairs, value = _segment_sums(
        torch.stack([torch.where(present, partners, 0) / 2, score * slope], 1), cu_groups
    ).unbind(1)
    pairs = pairs.clamp(min=1)
    return (value / pairs).to(dtype), (2 * slope / pairs[prompt]).to(dtype)


def _segment_sums(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", offsets=offsets, initial=0, unsafe=True)


def _same_rank_sums(x: Tensor, ranks: Tensor, prompt: Tensor) -> Tensor:
    """For each response the sum of x over the responses of its prompt that have its rank, itself among them."""
    order = ranks.argsort(stable=True)
    order = order[prompt[order].argsort(stable=True)]
    rank, owner = ranks[order], prompt[order]
    first = torch.ones_like(rank, dtype=torch.bool)
    first[1:] = (rank[1:] != rank[:-1]) | (owner[1:] != owner[:-1])
    group = first.cumsum(0) - 1
    offsets = torch.searchsorted(group, torch.arange(x.shape[0] + 1, dtype=torch.int64, device=x.device))
    sums = _segment_sums(x[order], offsets)[group]
    return torch.empty_like(sums).index_copy_(0, order, sums)


def bradley_terry_fwd(
    scores: Tensor, ranks: Tensor, cu_groups: Tensor, margins: Tensor | None, ties_half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [P], its gradient [S] and stats [P, 8]; d/ds_w of one pair is -sigmoid(-gap), d/ds_l the opposite."""
    score, rank, present, index = _padded(scores, ranks, cu_groups)
    better, tied = _pair_masks(rank, present)
    gap, shifted = _pair_gaps(score, index, margins)
    pair_loss = torch.where(better, -logsigmoid(shifted), 0)
    pair_grad = torch.where(better, -torch.sigmoid(-shifted), 0)
    pairs = better.sum((1, 2))
    if ties_half:
        pair_loss = torch.where(tied, -0.5 * (logsigmoid(gap) + logsigmoid(-gap)), pair_loss)
        pair_grad = torch.where(tied, 0.5 * torch.tanh(0.5 * gap), pair_grad)
        pairs = pairs + tied.sum((1, 2))
    divisor = pairs.clamp(min=1)
    grad = (pair_grad.sum(2) - pair_grad.sum(1)) / divisor[:, None]
    stats = _stats(score, rank, present, pairs)
    return pair_loss.sum((1, 2)) / divisor, _to_flat(grad, index, present, scores.shape[0]), stats


def plackett_luce_fwd(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [P], its gradient [S] and stats [P, 8] whose first column counts the choices instead of the pairs."""
    score, rank, present, index = _padded(scores, ranks, cu_groups)
    better, _ = _pair_masks(rank, present)
    choice = better.any(-1)
    own = torch.eye(rank.shape[-1], dtype=torch.bool, device=rank.device) & choice[:, :, None]
    field = torch.where(better | own, score[:, None, :].expand(better.shape), -torch.inf)
    peak = field.amax(-1, keepdim=True) if field.shape[-1] else field.sum(-1, keepdim=True)
    peak = torch.where(choice[:, :, None], peak, 0)
    weight = torch.exp(field - peak)
    mass = torch.where(choice, weight.sum(-1), 1)
    divisor = choice.sum(-1).clamp(min=1)
    loss = torch.where(choice, (peak.squeeze(-1) - score) + mass.log(), 0).sum(-1) / divisor
    taken = weight / mass[:, :, None] - own.to(score.dtype)
    grad = taken.sum(1) / divisor[:, None]
    stats = _stats(score, rank, present, choice.sum(-1))
    return loss, _to_flat(grad, index, present, scores.shape[0]), stats


def bradley_terry_bwd(grad_loss: Tensor, grad: Tensor, cu_groups: Tensor) -> Tensor:
    """Upstream gradient [P] times the saved gradient [S]; serves both losses."""
    return torch.repeat_interleave(grad_loss, cu_groups.diff(), output_size=grad.shape[0]) * grad


def ranking_bwd(grad_value: Tensor, grad: Tensor, divisor: Tensor) -> Tensor:
    """The saved gradient times the upstream one of the whole loss."""
    return grad * (grad_value / divisor)


def example_inputs(case: str, *, dtype: torch.dtype, device="cpu", seed: int = 0) -> dict:
    """scores, ranks, cu_groups, margins and ties_half of one named case."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "pairs": [2] * 6,
        "k4": [4] * 5,
        "no_pairs": [1, 0, 3],
        "empty": [],
    }.get(case, [4, 9, 2, 1, 6, 5])
    total = sum(sizes)
    cu_groups = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
    scores = torch.randn(total, generator=generator, dtype=torch.float64)
    permutations = [torch.randperm(size, generator=generator, dtype=torch.int64) for size in sizes]
    ranks = torch.cat(permutations) if permutations else torch.zeros(0, dtype=torch.int64)
    margins, ties_half = None, False
    if case in ("ties", "absent"):
        ranks, ties_half = ranks // 2, True
    if case == "absent":
        absent = torch.rand(total, generator=generator, dtype=torch.float32) < 0.3
        absent[:4] = True  # a prompt of which nothing is left
        ranks[absent], scores[absent] = -1, torch.nan
    if case == "margins":
        margins = torch.rand(total, max(sizes), generator=generator, dtype=torch.float64)
    if case == "large_gap":
        scores = scores * 60
    if case == "no_pairs":
        ranks = torch.zeros(total, dtype=torch.int64)
    accumulator = accumulator_dtype(dtype)
    return {
        "scores": scores.to(device, dtype),
        "ranks": ranks.to(device),
        "cu_groups": cu_groups.to(device),
        "margins": None if margins is None else margins.to(device, accumulator),
        "ties_half": ties_half,
    }


def ranking_metrics_fwd(stats: Tensor) -> Tensor:
    """Means over all strict pairs and responses, their lowest and highest score, counted pairs, and how many prompts
    have any, at least 1."""
    totals = dict(zip(STATS, stats.sum(0).unbind(), strict=True))
    lowest = highest = nothing = totals["responses"].new_full((), torch.nan)
    if stats.shape[0] > 0:
        some = totals["responses"] > 0
        lowest = torch.where(some, stats[:, STATS.index("reward_min")].min(), nothing)
        highest = torch.where(some, stats[:, STATS.index("reward_max")].max(), nothing)
    found = {
        "accuracy": totals["correct"] / totals["strict_pairs"],
        "margin": totals["margin_sum"] / totals["strict_pairs"],
        "min_reward": lowest,
        "mean_reward": totals["reward_sum"] / totals["responses"],
        "max_reward": highest,
        "pairs": totals["pairs"],
        "divisor": (stats[:, 0] > 0).sum().clamp(min=1).to(stats.dtype),
    }
    return torch.stack([found[name] for name in METRICS])
