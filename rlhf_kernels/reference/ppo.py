"""The PPO loss: the definition in plain PyTorch.

What a backend provides, under these names, all tensors contiguous:

    ppo_fwd(log_probs, old_log_probs, advantages, mask, values, old_values, returns, entropy, normalizer,
            cliprange, cliprange_high, dual_clip, cliprange_value, loss_agg_mode, value_scale=1.0, entropy_scale=1.0)
        -> (losses, grad_log_probs, grad_values, grad_entropy, stats)
    ppo_total_fwd(the same, vf_coef=, entropy_coef=)
        -> (loss, policy_loss, value_loss, grad_log_probs, grad_values, grad_entropy, stats); a backend may be without:
        the loss is then made of the parts, in further launches
    ppo_bwd(grad_loss, grad_policy_loss, grad_value_loss, grad_log_probs, grad_values, grad_entropy, vf_coef)
        -> the three gradients, each times the upstream gradients of the losses that it is part of

    mask [B, T] bool, 1 = keep; all other tensors [B, T] floating, NaN allowed under mask 0; values, old_values,
    returns, entropy and normalizer (0-d) may be None, dual_clip and cliprange_value too (None = off).
    losses  [3] policy, value (with its factor 1/2), entropy, each aggregated; fp64 for fp64 log_probs, otherwise fp32
    grad_x  [B, T] d loss / d x of the loss that x enters, times its scale; dtype of losses, 0 under mask 0; [0] where x
            is None
    grad_loss, grad_policy_loss, grad_value_loss
            0-d or None: of policy + vf_coef * value - entropy_coef * entropy, and of its first two parts alone. The
            gradients that ppo_bwd takes were scaled by vf_coef (1 where that is 0) and -entropy_coef
    stats   [len(STATS)] dtype of losses, 0 for those of an absent input, NaN where there is nothing to average
"""

import torch
from torch import Tensor

AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
STATS = (
    "tokens",
    "approx_kl",
    "clip_fraction",
    "dual_clip_fraction",
    "ratio_mean",
    "ratio_var",
    "ratio_max",
    "entropy",
    "value_clip_fraction",
    "explained_variance",
    "value_mean",
    "return_mean",
)
CASES = ("plain", "masked", "values", "everything", "far", "one_token", "empty_mask", "empty")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def aggregation_weights(mask: Tensor, loss_agg_mode: str, normalizer: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weight of each token [B, T], 0 under mask 0: the aggregated loss is the sum of weight * token loss.

    token-mean 1/tokens; token-sum 1; seq-mean-token-sum 1/sequences; seq-mean-token-mean 1/(sequences * own length);
    seq-mean-token-sum-norm 1/(sequences * T). `normalizer` replaces the count of tokens or sequences; sequences
    without a token are not counted. A packed [N] mask works for the two token modes.
    """
    keep = mask.to(dtype)
    if loss_agg_mode == "token-sum":
        return keep
    lengths = keep.sum(-1, keepdim=True)
    count = lengths.sum() if loss_agg_mode == "token-mean" else (lengths > 0).sum().to(dtype)
    weights = keep / (count.clamp(min=1) if normalizer is None else normalizer.to(dtype))
    if loss_agg_mode == "seq-mean-token-mean":
        weights = weights / lengths.clamp(min=1)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        weights = weights / max(mask.shape[-1], 1)
    return weights


def ppo_token_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped policy loss of each token and its derivative d loss / d log_prob, any shape.

    max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange_high)) with r = exp(log_prob - old_log_prob); with dual_clip,
    where A < 0, at most -A dual_clip. A = 0 gives 0 even where r overflows. Fill masked tokens with numbers first.
    """
    high = cliprange if cliprange_high is None else cliprange_high
    ratio = torch.exp(log_probs - old_log_probs)
    unclipped = torch.where(advantages == 0, 0, -advantages * ratio)
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + high)
    loss, grad = torch.maximum(unclipped, clipped), torch.where(clipped > unclipped, 0, unclipped)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        bounded = (advantages < 0) & (ceiling < loss)
        loss, grad = torch.where(bounded, ceiling, loss), torch.where(bounded, 0, grad)
    return loss, grad


def _kept(x: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else torch.where(mask, x.to(dtype), 0)


def ppo_losses(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | None,
    cliprange: float,
    cliprange_high: float,
    dual_clip: float | None,
    cliprange_value: float | None,
    loss_agg_mode: str,
) -> Tensor:
    """Policy, value and entropy loss [3], differentiable by autograd in log_probs, values and entropy."""
    dtype = accumulator_dtype(log_probs.dtype)
    weights = aggregation_weights(mask, loss_agg_mode, normalizer, dtype)
    advantage = _kept(advantages, mask, dtype)
    ratio = torch.exp(_kept(log_probs, mask, dtype) - _kept(old_log_probs, mask, dtype))
    unclipped = torch.where(advantage == 0, 0, ratio * advantage)
    surrogate = torch.minimum(unclipped, ratio.clamp(1 - cliprange, 1 + cliprange_high) * advantage)
    if dual_clip is not None:
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, dual_clip * advantage), surrogate)
    losses = [-(weights * surrogate).sum(), weights.new_zeros(()), weights.new_zeros(())]
    if values is not None:
        value, target = _kept(values, mask, dtype), _kept(returns, mask, dtype)
        error = (value - target).square()
        if cliprange_value is not None:
            old = _kept(old_values, mask, dtype)
            near = old + (value - old).clamp(-cliprange_value, cliprange_value)
            error = torch.maximum(error, (near - target).square())
        losses[1] = 0.5 * (weights * error).sum()
    if entropy is not None:
        losses[2] = (weights * _kept(entropy, mask, dtype)).sum()
    return torch.stack(losses)


def _value_terms(
    values: Tensor, old_values: Tensor | None, returns: Tensor, cliprange_value: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Value loss of each token, its derivative, and where the clipped term is the larger one."""
    error = values - returns
    if cliprange_value is None:
        return 0.5 * error.square(), error, torch.zeros_like(error, dtype=torch.bool)
    moved = values - old_values
    inside = moved.abs() <= cliprange_value
    near = torch.where(inside, values, old_values + moved.clamp(-cliprange_value, cliprange_value))
    held = (near - returns).square() > error.square()
    return 0.5 * torch.where(held, near - returns, error).square(), torch.where(held, 0, error), held


def ppo_fwd(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | None,
    cliprange: float,
    cliprange_high: float,
    dual_clip: float | None,
    cliprange_value: float | None,
    loss_agg_mode: str,
    value_scale: float = 1.0,
    entropy_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses [3], the three gradients, and the statistics, in one pass over the tokens."""
    dtype = accumulator_dtype(log_probs.dtype)
    weights = aggregation_weights(mask, loss_agg_mode, normalizer, dtype)
    tokens = mask.sum().to(dtype)

    def mean(x):
        return torch.where(mask, x, 0).sum() / tokens

    def variance(x):
        return mean((x - mean(x)).square())

    new, old = _kept(log_probs, mask, dtype), _kept(old_log_probs, mask, dtype)
    advantage = _kept(advantages, mask, dtype)
    loss, slope = ppo_token_loss(
        new, old, advantage, cliprange=cliprange, cliprange_high=cliprange_high, dual_clip=dual_clip
    )
    ratio = torch.exp(new - old)
    outside = ((ratio < 1 - cliprange) & (advantage < 0)) | ((ratio > 1 + cliprange_high) & (advantage > 0))
    beyond = (advantage < 0) & (ratio > dual_clip) if dual_clip is not None else torch.zeros_like(mask)
    undefined = weights.new_full((), torch.nan)
    stats = {
        "tokens": tokens,
        "approx_kl": mean(0.5 * (new - old).square()),
        "clip_fraction": mean(outside.to(dtype)),
        "dual_clip_fraction": mean(beyond.to(dtype)),
        "ratio_mean": mean(ratio),
        "ratio_var": variance(ratio),
        "ratio_max": torch.where(tokens > 0, torch.where(mask, ratio, 0).amax(), undefined)
        if mask.numel()
        else undefined,
    }
    losses = [(weights * loss).sum(), weights.new_zeros(()), weights.new_zeros(())]
    grad_values, grad_entropy = weights.new_empty(0), weights.new_empty(0)
    if values is not None:
        value, target = _kept(values, mask, dtype), _kept(returns, mask, dtype)
        value_loss, value_slope, held = _value_terms(value, _kept(old_values, mask, dtype), target, cliprange_value)
        losses[1], grad_values = (weights * value_loss).sum(), weights * value_slope * value_scale
        stats["value_clip_fraction"] = mean(held.to(dtype))
        stats["explained_variance"] = 1 - variance(target - value) / variance(target)
        stats["value_mean"], stats["return_mean"] = mean(value), mean(target)
    if entropy is not None:
        kept = _kept(entropy, mask, dtype)
        losses[2], grad_entropy, stats["entropy"] = (weights * kept).sum(), weights * entropy_scale, mean(kept)
    stats = torch.stack([stats.get(name, weights.new_zeros(())) for name in STATS])
    return torch.stack(losses), weights * slope, grad_values, grad_entropy, stats


def ppo_bwd(
    grad_loss: Tensor | None,
    grad_policy_loss: Tensor | None,
    grad_value_loss: Tensor | None,
    grad_log_probs: Tensor,
    grad_values: Tensor,
    grad_entropy: Tensor,
    vf_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The saved gradients times the upstream gradients of the losses that they are part of."""
    zero = grad_log_probs.new_zeros(())
    total, policy, value = (zero if x is None else x for x in (grad_loss, grad_policy_loss, grad_value_loss))
    value_scale = total + value / vf_coef if vf_coef else value
    scales = total + policy, value_scale, total
    return tuple(scale * grad for scale, grad in zip(scales, (grad_log_probs, grad_values, grad_entropy)))


def example_inputs(case: str, *, dtype: torch.dtype, device="cpu", seed: int = 0) -> dict:
    """The arguments of `ppo_fwd` for one named case."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"one_token": (1, 1), "empty": (0, 5)}.get(case, (5, 13))

    def normal(scale=1.0):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -normal().abs()
    log_probs = old + normal(30.0 if case == "far" else 0.3)
    tensors = {"log_probs": log_probs, "old_log_probs": old, "advantages": normal()}
    full = case in ("values", "everything", "far", "one_token")
    returns = normal() if full else None
    old_values = None if returns is None else returns + normal(0.5)
    tensors["values"] = None if old_values is None else old_values + normal(0.3)
    tensors["old_values"], tensors["returns"] = old_values, returns
    tensors["entropy"] = normal().abs() if case == "everything" else None
    mask = torch.ones(shape, dtype=torch.bool)
    if case in ("masked", "everything", "far"):
        mask = torch.rand(shape, generator=generator, dtype=torch.float32) < 0.6
        mask[1] = False
    if case == "empty_mask":
        mask[:] = False
    for name, x in tensors.items():
        if x is not None:
            tensors[name] = torch.where(mask, x, torch.nan).to(device, dtype)
    return {
        **tensors,
        "mask": mask.to(device),
        "normalizer": None,
        "cliprange": 0.2,
        "cliprange_high": 0.28 if case == "everything" else 0.2,
        "dual_clip": 1.3 if case == "everything" else None,
        "cliprange_value": 0.2 if full else None,
        "loss_agg_mode": "token-mean",
    }
