"""Corrections for tokens that another policy sampled than the one that is trained: weights, and masks of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATS, check_dtype, check_in, check_mask, check_range, check_same_device, check_shape
from .policy import per_token
from .reference.ppo import accumulator_dtype

LEVELS = ("token", "sequence", "sequence-mean")
_SMALLEST = 1e-6  # of a probability and of what it leaves to 1, in the binary KL: OpenRLHF's


@dataclass(frozen=True)
class Gate:
    """A test that a token, or its sequence, must pass to keep its importance weight.

    With p the probability of the sampled token under the rollout policy, q under the trained one, and r = q / p.

    Args:
        statistic: what is tested: "ratio" r; "k2" (log r)^2 / 2 or "k3" r - 1 - log r, estimates of
            KL(rollout || trained); "binary_kl" p log(p / q) + (1 - p) log((1 - p) / (1 - q)), with p and q held in
            [1e-6, 1 - 1e-6]; or "tv" |p - q|.
        level: "token", the default: of each token. "sequence": summed over its sequence (the ratio's product).
            "sequence-mean": averaged over it (the ratio's geometric mean). "sequence-max": its largest, but not of the
            ratio.
        low: > 0, a smaller ratio fails; None, the default, for no bound. The divergences have none.
        high: > 0, a larger statistic fails; None, the default, for no bound.
    Example:
        >>> Gate("binary_kl", "sequence-mean", high=0.01).level
        'sequence-mean'
    """

    statistic: Literal["ratio", "k2", "k3", "binary_kl", "tv"]
    level: Literal["token", "sequence", "sequence-mean", "sequence-max"] = "token"
    low: float | None = None
    high: float | None = None

    def __post_init__(self):
        check_in("statistic", self.statistic, ("ratio", "k2", "k3", "binary_kl", "tv"))
        of_ratio = self.statistic == "ratio"
        check_in("level", self.level, LEVELS if of_ratio else (*LEVELS, "sequence-max"))
        _check_bounds(self.low, self.high)
        if self.low is not None and not of_ratio:
            raise ValueError(f"low is {self.low!r}, but {self.statistic!r} is a divergence, which high alone bounds")
        if self.low is None and self.high is None:
            raise ValueError("low and high are both None, which every token passes")


class ImportanceWeights(NamedTuple):
    """Weights of the tokens, and a dict of detached scalars on the device."""

    weights: Tensor
    metrics: dict[str, Tensor]


def importance_weights(
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    low: float | None = None,
    high: float | None = None,
    gates: Gate | tuple[Gate, ...] = (),
) -> ImportanceWeights:
    """How much each sampled token counts under the policy that is trained: r = trained / rollout, held or filtered.

    A rollout engine samples from log-probs that are not quite the trainer's (other kernels, lower precision, older
    weights); these weights make the policy loss that of the trained policy again. They are constants: give them to
    `policy_loss` as `weights`, where a weight of 0 leaves the token in the means. To leave it out of them too, as
    verl's rejection does, train with mask & (weights > 0).

    Truncated importance sampling (Yao et al. 2025; verl, TRL "token_truncate") is high=2.0; ICEPOP (TRL "token_mask")
    mode="mask", low=0.5, high=5.0; TRL's "sequence_truncate" and verl's "sequence" level="sequence", high=3.0;
    OpenRLHF's "token", "clip" low=0.5, high=5.0; its "seq", "mask", which tests the geometric mean of the ratio and
    weighs by the token's, gates=Gate("ratio", "sequence-mean", 0.5, 5.0); verl's rejection by "seq_mean_k3"
    gates=Gate("k3", "sequence-mean", high=0.01). verl's "k1" bounds log(1 / r) by logarithms, which is
    Gate("ratio", low=1 / upper, high=1 / lower).

    Args:
        log_probs: [B, T] fp32|bf16|fp16|fp64, +log p of the sampled tokens under the policy that is trained, as it was
            before the update (old_log_probs).
        rollout_log_probs: [B, T], +log p under the policy that sampled them. A kept NaN reaches its weight and the
            metrics; for a token that the engine gave no log-prob put log_probs there, which is weight 1.
        mask: [B, T] bool or integer, 1 = keep. What stands under a 0 may be NaN.
        level: "token", the default: r of each token. "sequence": the product of r over the kept tokens of its
            sequence. "sequence-mean": their geometric mean.
        mode: "truncate", the default: a weight below low or above high counts as that bound. "mask": it is 0.
        low: > 0, None, the default, for no bound.
        high: > 0, None, the default, for no bound.
        gates: further tests; a token that fails one of them gets weight 0. Default (), none.
    Returns:
        ImportanceWeights(weights, metrics): [B, T] fp32 (fp64 for fp64), 0 under the mask's zeros, not differentiable.
        Metrics are over kept tokens, NaN without any: effective_sample_size, a share, (sum w)^2 / (tokens sum w^2);
        truncated_fraction (held at a bound); filtered_fraction (outside the band of "mask", or stopped by a gate);
        filtered_sequences, the share of sequences of which no token is left; weight_mean, weight_min, weight_max; and
        estimates of KL(rollout || trained) in nats, rollout_kl (mean of -log r) and rollout_kl_k3.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; unknown level or mode; a bound not > 0, or low > high; gates
            is not of `Gate`.
    Cost:
        Some 40 of PyTorch's ops, half of them on numbers or rows; torch.compile makes a few of them. A gate adds 5 to
        15. Meant for once an iteration. No host sync.
    Example:
        >>> import torch
        >>> new, rollout = torch.tensor([[0.4, 0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9, 0.2]]).log()
        >>> out = importance_weights(new, rollout, torch.ones(1, 3).bool(), high=2.0)
        >>> out.weights
        tensor([[2.0000, 1.0000, 0.5000]])
        >>> out.metrics["truncated_fraction"]
        tensor(0.3333)
    """
    mask = _check(log_probs, rollout_log_probs, mask)
    check_in("level", level, LEVELS)
    check_in("mode", mode, ("truncate", "mask"))
    _check_bounds(low, high)
    gates = (gates,) if isinstance(gates, Gate) else tuple(gates)
    for gate in gates:
        if not isinstance(gate, Gate):
            raise ValueError(f"gates must hold Gate(...), got {gate!r}")
    new, old = _kept(log_probs, mask), _kept(rollout_log_probs, mask)
    log_ratio = torch.where(new == old, 0, new - old)
    ratio = torch.exp(_over_sequence(log_ratio, mask, level))  # [B, T] or [B, 1], as are what follows
    outside = _outside(ratio, low, high)
    held, filtered = ratio, outside
    if mode == "truncate":
        held = ratio if low is None and high is None else ratio.clamp(low, high)
        filtered = torch.zeros_like(outside)
    for gate in gates:
        filtered = filtered | _stopped(gate, new, old, log_ratio, mask)
    left = mask & ~filtered
    weights = torch.where(left, held, 0)
    return ImportanceWeights(weights, _metrics(weights, mask, left, outside, log_ratio))


def _check(log_probs, rollout_log_probs, mask):
    check_dtype("log_probs", log_probs, FLOATS)
    check_shape("log_probs", log_probs, (None, None), "[B, T]")
    check_dtype("rollout_log_probs", rollout_log_probs, FLOATS)
    check_shape("rollout_log_probs", rollout_log_probs, log_probs.shape, "[B, T], like log_probs")
    mask = check_mask("mask", mask, log_probs.shape).contiguous()
    check_same_device(log_probs=log_probs, rollout_log_probs=rollout_log_probs, mask=mask)
    return mask


def _check_bounds(low, high):
    for name, bound in (("low", low), ("high", high)):
        if bound is not None:
            check_range(name, bound, 0, low_open=True)
    if low is not None and high is not None and low > high:
        raise ValueError(f"low is {low!r}, expected at most high, {high!r}")


def _kept(x, mask):
    """The detached values in fp32 or fp64, rows dense, 0 under mask 0."""
    return torch.where(mask, x.detach().to(accumulator_dtype(x.dtype)), 0).contiguous()


def _over_sequence(x, mask, level):
    """[B, T] itself, or its sum, mean or maximum over the kept tokens of each row, [B, 1]; x holds 0 under mask 0."""
    if level == "token":
        return x
    if level == "sequence-max":
        return torch.where(mask, x, -math.inf).amax(-1, keepdim=True) if x.shape[-1] else x.sum(-1, keepdim=True)
    total = x.sum(-1, keepdim=True)
    return total if level == "sequence" else total / mask.sum(-1, keepdim=True).clamp(min=1)


def _outside(x, low, high):
    """Where x is beyond a bound; NaN is not, so that it is seen in the weights."""
    below = torch.zeros_like(x, dtype=torch.bool) if low is None else x < low
    return below if high is None else below | (x > high)


def _k3(log_ratio):
    return torch.where(log_ratio == math.inf, math.inf, torch.expm1(log_ratio) - log_ratio)


def _stopped(gate, new, old, log_ratio, mask):
    """Where the gate's statistic is beyond its bounds, [B, T] or [B, 1]."""
    if gate.statistic == "ratio":
        return _outside(torch.exp(_over_sequence(log_ratio, mask, gate.level)), gate.low, gate.high)
    if gate.statistic == "k2":
        x = 0.5 * log_ratio.square()
    elif gate.statistic == "k3":
        x = _k3(log_ratio)
    elif gate.statistic == "tv":
        x = (torch.exp(old) - torch.exp(new)).abs()
    else:
        p, q = (torch.exp(y).clamp(_SMALLEST, 1 - _SMALLEST) for y in (old, new))
        x = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return _outside(_over_sequence(torch.where(mask, x, 0), mask, gate.level), None, gate.high)


def _metrics(weights, mask, left, outside, log_ratio):
    """log_ratio and weights hold 0 under mask 0; `left` is what of the mask passed."""
    tokens = mask.sum().to(weights.dtype)
    of_rows = mask.any(-1).sum().to(weights.dtype)
    total, squares = weights.sum(), weights.square().sum()
    least = torch.where(mask, weights, math.inf)
    extremes = (least.amin(), weights.amax()) if weights.numel() else (total, total)
    return {
        "effective_sample_size": torch.where(squares > 0, total * total / (tokens * squares), total / tokens),
        "truncated_fraction": (left & outside).sum() / tokens,
        "filtered_fraction": 1 - left.sum() / tokens,
        "filtered_sequences": 1 - left.any(-1).sum() / of_rows,
        "weight_mean": total / tokens,
        "weight_min": torch.where(tokens > 0, extremes[0], math.nan),
        "weight_max": torch.where(tokens > 0, extremes[1], math.nan),
        "rollout_kl": -log_ratio.sum() / tokens,
        "rollout_kl_k3": _k3(log_ratio).sum() / tokens,
    }


def high_entropy_mask(entropy: Tensor, mask: Tensor, quantile: float, *, process_group=None) -> Tensor:
    """The kept tokens whose entropy is at least this quantile of all kept tokens': where the policy decides something.

    Wang et al. 2025 (arXiv 2506.01939) train on the fifth of the tokens with the highest entropy, quantile 0.8. The
    quantile lies between two entropies where it falls between them, as torch.quantile's. TRL's top_entropy_quantile is
    1 - quantile.

    Args:
        entropy: [B, T] fp32|bf16|fp16|fp64, in nats.
        mask: [B, T] bool or integer, 1 = keep. What stands under a 0 may be NaN.
        quantile: 0 to 1: 0 keeps all tokens, 1 those of the highest entropy.
        process_group: torch.distributed group whose ranks share one quantile, tensors of the same shape on each; None,
            the default, for this process alone.
    Returns:
        [B, T] bool, a part of the mask.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; quantile outside [0, 1].
    Cost:
        Sorts B T entropies; no host sync. With a process_group one all-gather of them, and their sort on each rank.
    Example:
        >>> import torch
        >>> high_entropy_mask(torch.tensor([[0.1, 2.0, 0.3, 9.0]]), torch.tensor([[1, 1, 1, 0]]), 0.5)
        tensor([[False,  True,  True, False]])
    """
    check_dtype("entropy", entropy, FLOATS)
    check_shape("entropy", entropy, (None, None), "[B, T]")
    mask = check_mask("mask", mask, entropy.shape)
    check_range("quantile", quantile, 0, 1)
    check_same_device(entropy=entropy, mask=mask)
    entropy = entropy.detach()
    last = torch.where(mask, entropy, math.inf).flatten()
    if process_group is not None:
        parts = [torch.empty_like(last) for _ in range(torch.distributed.get_world_size(process_group))]
        torch.distributed.all_gather(parts, last, group=process_group)
        last = torch.cat(parts)
    if last.shape[0] == 0:
        return mask
    ordered = last.sort().values
    place = quantile * ((ordered != math.inf).sum() - 1).clamp(min=0).double()
    below, above = (ordered.gather(0, x.to(torch.int64)[None]).double() for x in (place.floor(), place.ceil()))
    threshold = torch.lerp(below, above, place - place.floor())
    return mask & (entropy.double() >= torch.where(below == above, below, threshold))


def off_policy_mask(
    log_probs: Tensor, rollout_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    """The kept tokens but those of bad responses that the policy has moved far from, DeepSeek-V3.2, eq. (9).

    A token is left out where its advantage is negative and the mean of rollout_log_probs - log_probs over the kept
    tokens of its sequence, an estimate of KL(rollout || policy), exceeds the threshold.

    Args:
        log_probs: [B, T] fp32|bf16|fp16|fp64, +log p of the sampled tokens under the policy.
        rollout_log_probs: [B, T], +log p under the policy that sampled them.
        advantages: [B], [B, 1] or [B, T].
        mask: [B, T] bool or integer, 1 = keep. What stands under a 0 may be NaN.
        threshold: nats a token.
    Returns:
        [B, T] bool, a part of the mask. As mask of a loss it takes the tokens out of its means too; as `weights`, after
        .float(), it leaves them there with loss 0, as TRL does.
    Raises:
        ValueError: shapes, dtypes or devices do not fit; threshold is no number.
    Cost:
        Some ten of PyTorch's ops; no host sync.
    Example:
        >>> import torch
        >>> log_probs, mask = torch.tensor([[-3.0, -4.0], [-3.0, -4.0]]), torch.ones(2, 2).bool()
        >>> off_policy_mask(log_probs, log_probs + 2.0, torch.tensor([1.0, -1.0]), mask, threshold=0.5)
        tensor([[ True,  True],
                [False, False]])
    """
    mask = _check(log_probs, rollout_log_probs, mask)
    advantages = per_token("advantages", advantages, log_probs)
    check_same_device(log_probs=log_probs, advantages=advantages)
    check_range("threshold", threshold)
    new, old = _kept(log_probs, mask), _kept(rollout_log_probs, mask)
    far = _over_sequence(torch.where(new == old, 0, old - new), mask, "sequence-mean") > threshold
    return mask & ~(far & (advantages.detach() < 0))
