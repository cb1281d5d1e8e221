"""Rewards, advantages and whitening: the definition in plain PyTorch.

Tensors over tokens are [B, T] with a mask, or packed [N] with cu_seqlens [B+1]; 1 in the mask = keep, None = keep all.
A token under a 0 is passed over as if it were not there: its value may be NaN, the recursion goes from the kept token
after it to the kept token before it in one step, and every output is 0 at its place.

What a backend provides, under these names; all tensors over tokens in one dtype, masks bool:

    gae_fwd(rewards, values, mask, gamma, lam, cu_seqlens, last_values) -> (advantages, returns)
    rlhf_advantages_fwd(scores, log_probs, ref_log_probs, values, mask, kl_coef, gamma, lam, kl_estimator, reward_clip,
                        whiten, cu_seqlens) -> (advantages, returns, rewards, kl)
    whiten_stats_fwd(values, mask) -> [3] fp64: count, mean, sum of squared deviations over the kept entries
    whiten_fwd(values, mask, stats, center) -> like values
"""

import torch
from torch import Tensor

from .bradley_terry import group_index
from .kl import approx_kl_fwd

CASES = ("all_kept", "padded", "gaps", "empty_rows", "one_token", "no_rows", "packed", "bootstrap")


def gae_fwd(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    cu_seqlens: Tensor | None,
    last_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t."""
    if cu_seqlens is not None:
        rewards, values, mask = _unpack(cu_seqlens, rewards, values, mask)
    keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    rewards, values = torch.where(keep, rewards, 0), torch.where(keep, values, 0)
    advantage = rewards.new_zeros(rewards.shape[0])
    next_value = advantage if last_values is None else last_values
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(keep[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(keep[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1) if columns else torch.zeros_like(rewards)
    advantages = torch.where(keep, advantages, 0)
    return tuple(_repack(cu_seqlens, x) for x in (advantages, advantages + values))


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
    """r_t = -kl_coef kl_t, plus the score at the last kept token; then GAE; then whitening over all kept tokens."""
    if cu_seqlens is not None:
        log_probs, ref_log_probs, values, mask = _unpack(cu_seqlens, log_probs, ref_log_probs, values, mask)
    keep = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask
    kl = approx_kl_fwd(torch.where(keep, log_probs, 0), torch.where(keep, ref_log_probs, 0), kl_estimator)
    if reward_clip is not None:
        scores = scores.clamp(-reward_clip, reward_clip)
    kept_after = keep.flip(1).cumsum(1).flip(1)
    rewards = -kl_coef * kl + torch.where(keep & (kept_after == 1), scores[:, None], 0)
    advantages, returns = gae_fwd(rewards, values, keep, gamma, lam, None, None)
    if whiten:
        advantages = whiten_fwd(advantages, keep, whiten_stats_fwd(advantages, keep), True)
    return tuple(_repack(cu_seqlens, x) for x in (advantages, returns, rewards, kl))


def whiten_stats_fwd(values: Tensor, mask: Tensor | None) -> Tensor:
    """[3] fp64: count, mean and sum of squared deviations of the kept entries."""
    keep = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    values = torch.where(keep, values, 0).double()
    count = keep.sum().double()
    mean = values.sum() / count.clamp(min=1)
    return torch.stack((count, mean, torch.where(keep, values - mean, 0).square().sum()))


def whiten_fwd(values: Tensor, mask: Tensor | None, stats: Tensor, center: bool) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), variance over count - 1; plus the mean again if not center."""
    keep = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    count, mean, m2 = stats.unbind()
    scale = torch.rsqrt(m2 / (count - 1).clamp(min=1) + 1e-8)
    white = (values.double() - mean) * scale + (0.0 if center else mean)
    return torch.where(keep, white, 0).to(values.dtype)


def _unpack(cu_seqlens: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """[N] to [B, longest]; the last of the tensors is the mask, and gets False where a row has ended."""
    index, valid = group_index(cu_seqlens)
    *packed, mask = tensors
    if packed[0].shape[0] == 0:
        return [x.new_zeros(valid.shape) for x in packed] + [valid]
    return [x[index] for x in packed] + [valid if mask is None else valid & mask[index]]


def _repack(cu_seqlens: Tensor | None, padded: Tensor) -> Tensor:
    return padded if cu_seqlens is None else padded[group_index(cu_seqlens)[1]]


def example_inputs(case: str, *, dtype: torch.dtype, device="cpu", seed: int = 0) -> dict:
    """All tensors that rlhf_advantages and gae take, of one named case; NaN stands under the mask's zeros."""
    generator = torch.Generator().manual_seed(seed)
    B, T = {"no_rows": (0, 5), "one_token": (3, 1)}.get(case, (5, 37))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    log_probs = -normal(B, T).abs()
    inputs = {
        "scores": normal(B),
        "log_probs": log_probs,
        "ref_log_probs": log_probs + 0.3 * normal(B, T),
        "values": normal(B, T),
        "rewards": normal(B, T),
    }
    inputs["last_values"] = normal(B) if case == "bootstrap" else None
    lengths = torch.randint(1, T + 1, (B, 1), generator=generator, dtype=torch.int64)
    mask = torch.arange(T, dtype=torch.int64) < lengths
    if case in ("gaps", "bootstrap"):
        mask = torch.rand(B, T, generator=generator, dtype=torch.float32) < 0.6
    elif case == "all_kept":
        mask = torch.ones(B, T, dtype=torch.bool)
    elif case == "empty_rows":
        mask[1::2] = False
        inputs["scores"][1::2] = torch.nan
    cu_seqlens = None
    if case == "packed":
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths[:, 0].cumsum(0)))
        inputs = {name: x[mask] if x is not None and x.dim() == 2 else x for name, x in inputs.items()}
        mask = torch.rand(int(cu_seqlens[-1]), generator=generator, dtype=torch.float32) < 0.8
    for name in ("log_probs", "ref_log_probs", "values", "rewards"):
        inputs[name] = torch.where(mask, inputs[name], torch.nan)
    inputs = {name: None if x is None else x.to(device, dtype) for name, x in inputs.items()}
    inputs["mask"] = mask.to(device)
    inputs["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.to(device)
    return inputs
