"""OpenRLHF's functions and losses, served by ours: `enable()`, `disable()`, `with patched():`.

Nothing of OpenRLHF is imported for it: its modules are replaced in when they are imported, or at once where they are.
In Ray's workers `WORKER_SETUP_HOOK` does it: `ray.init(runtime_env={"worker_process_setup_hook": WORKER_SETUP_HOOK})`.
docs/integrations/openrlhf.md says what is served, and what differs on purpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import rlhf_kernels as rk

from ._masks import kept
from ._patch import Patches

TESTED = ("0.11.2",)
WORKER_SETUP_HOOK = "rlhf_kernels.integrations.openrlhf.enable"


def _normalised(token_level_loss, dp_size, batch_num_tokens, global_batch_size):
    """(loss_agg_mode, num_items_in_batch, factor) of OpenRLHF's totals; without a total dp_size has no effect there."""
    mode, total = ("token-mean", batch_num_tokens) if token_level_loss else ("seq-mean-token-mean", global_batch_size)
    return mode, total, 1 if total is None else dp_size


def _aggregate_loss(
    loss, loss_mask, token_level_loss=True, dp_size=1, batch_num_tokens=None, global_batch_size=None
):  # fmt: skip
    mode, total, factor = _normalised(token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    mask = kept("loss_mask", loss_mask, loss)
    return rk.aggregate_loss(loss, mask, loss_agg_mode=mode, num_items_in_batch=total) * factor


def _log_probs_from_logits(logits, labels, temperature=1.0):
    return rk.logprobs_from_logits(logits, labels, temperature=temperature)


def _compute_entropy(logits):
    return rk.entropy_from_logits(logits)


def _compute_approx_kl(log_probs, log_probs_base, log_probs_old=None, kl_estimator="k1", unbiased_gradient=False):
    if unbiased_gradient and log_probs_old is not None:  # the gradient times the ratio, at most 10; the value as it is
        ratio = (log_probs.detach() - log_probs_old).exp().clamp(max=10)
        log_probs = log_probs.detach() + ratio * (log_probs - log_probs.detach())
    return rk.approx_kl(
        log_probs,
        log_probs_base,
        estimator=kl_estimator,
        gradient="straight_through" if unbiased_gradient else "plain",
        clamp_input=(-10, math.inf) if kl_estimator == "k3" else None,
        clamp_output=10,
    )


def _policy_loss(
    self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
    batch_num_tokens=None, global_batch_size=None,
):  # fmt: skip
    """(loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio) of OpenRLHF's PolicyLoss."""
    mask = kept("action_mask", action_mask, log_probs)
    mode, total, factor = _normalised(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    corrected = self.is_correction_level != "off"
    behaviour, weights, vllm_kl, filtered = old_log_probs, None, None, None
    if self.policy_loss_type == "ppo":
        objective = rk.Clip(self.clip_eps_low, self.clip_eps_high, self.dual_clip)
        if corrected:
            weights, vllm_kl, filtered = _correction(self, old_log_probs, rollout_log_probs, mask)
    elif self.policy_loss_type == "gspo":
        if self.dual_clip is not None:
            raise ValueError(
                f"dual_clip is {self.dual_clip!r}, expected None with policy_loss_type='gspo', whose ratio is the "
                "sequence's; leave it out, or train with OpenRLHF's own loss"
            )
        objective = rk.GSPO(self.clip_eps_low, self.clip_eps_high)
        behaviour = rollout_log_probs if corrected else old_log_probs
    else:
        raise ValueError(f"policy_loss_type must be 'ppo' or 'gspo', got {self.policy_loss_type!r}")
    out = rk.policy_loss(
        log_probs,
        behaviour,
        advantages,
        mask,
        objective=objective,
        weights=weights,
        log_ratio_clamp=20.0 if self.policy_loss_type == "ppo" else None,
        loss_agg_mode=mode,
        num_items_in_batch=total,
    )
    ppo_kl = out.metrics["approx_kl_k1"]
    if behaviour is not old_log_probs:
        ppo_kl = rk.aggregate_loss((old_log_probs - log_probs).detach(), mask)
    return out.loss * factor, out.metrics["clip_fraction"], ppo_kl, vllm_kl, filtered


def _correction(self, old_log_probs, rollout_log_probs, mask):
    """Weights of tokens that the rollout engine sampled, and what OpenRLHF logs of them."""
    low, high = self.is_correction_threshold
    low = low if low > 0 else None
    gate = {"mode": "mask", "low": low, "high": high}
    if self.is_correction_mode == "clip":
        gate["mode"] = "truncate"
    elif self.is_correction_level == "seq" or self.is_correction_gating != "ratio":
        level = "sequence-mean" if self.is_correction_level == "seq" else "token"
        low = low if self.is_correction_gating == "ratio" else None
        gate = {"gates": rk.Gate(self.is_correction_gating, level, low=low, high=high)}
    found = rk.importance_weights(old_log_probs, rollout_log_probs, mask, **gate)
    by_mode = "truncated_fraction" if self.is_correction_mode == "clip" else "filtered_fraction"
    name = "filtered_sequences" if self.is_correction_level == "seq" else by_mode
    return found.weights, found.metrics["rollout_kl"], found.metrics[name]


def _value_loss(
    self, values, old_values, returns, action_mask=None, dp_size=1, batch_num_tokens=None, global_batch_size=None
):
    """OpenRLHF's ValueLoss."""
    mode, total, factor = _normalised(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    out = rk.value_loss(
        values,
        old_values,
        returns,
        kept("action_mask", action_mask, values),
        cliprange_value=self.clip_eps,
        loss_agg_mode=mode,
        num_items_in_batch=total,
    )
    return out.loss * factor


def _pair_loss(self, chosen_reward, reject_reward, margin=None):
    """OpenRLHF's PairWiseLoss: the mean over pairs of -log sigmoid(chosen - rejected - margin)."""
    scores = torch.stack((chosen_reward.flatten(), reject_reward.flatten()), -1)
    ranks = torch.arange(2, dtype=torch.int64, device=scores.device).expand(scores.shape)
    margins = margin
    if isinstance(margin, Tensor):
        margins = margin.to(scores.device, torch.promote_types(scores.dtype, torch.float32)).flatten()
    return rk.bradley_terry_loss(scores, ranks, margins=margins).loss


def _log_exp_loss(self, chosen_reward, reject_reward, margin=None):
    """OpenRLHF's LogExpLoss, which reads no margin."""
    return _pair_loss(self, chosen_reward, reject_reward)


def _dpo_loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    """(loss, chosen rewards, rejected rewards) of OpenRLHF's DPOLoss."""
    out = rk.preference_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        loss_type="ipo" if self.ipo else "sigmoid",
        beta=self.beta,
        label_smoothing=0.0 if self.ipo else self.label_smoothing,
    )
    return out.loss, out.chosen_rewards, out.rejected_rewards


def _get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd):
    """OpenRLHF's GAE, in which a masked token has reward and value 0, and passes on what comes behind it."""
    mask = kept("action_mask", action_mask, rewards)
    return rk.gae(torch.where(mask, rewards, 0), torch.where(mask, values, 0), gamma=gamma, lam=lambd)


def _get_cumulative_returns(self, rewards, action_mask, gamma):
    """OpenRLHF's discounted sums of the rewards from each token on."""
    rewards = torch.where(kept("action_mask", action_mask, rewards), rewards, 0)
    return rk.gae(rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0)[1]


REPLACED = {
    "openrlhf.models.utils": {
        "log_probs_from_logits": _log_probs_from_logits,
        "compute_entropy": _compute_entropy,
        "compute_approx_kl": _compute_approx_kl,
    },
    "openrlhf.models.loss": {
        "aggregate_loss": _aggregate_loss,
        "PolicyLoss.forward": _policy_loss,
        "ValueLoss.forward": _value_loss,
        "PairWiseLoss.forward": _pair_loss,
        "LogExpLoss.forward": _log_exp_loss,
        "DPOLoss.forward": _dpo_loss,
    },
    "openrlhf.trainer.ppo_utils.experience_maker": {
        "RemoteExperienceMaker.get_advantages_and_returns": _get_advantages_and_returns,
        "RemoteExperienceMaker.get_cumulative_returns": _get_cumulative_returns,
    },
}
_patches = Patches("openrlhf", TESTED, on_import=REPLACED)


def enable() -> None:
    """Serve OpenRLHF's functions by ours from now on, in this process.

    Raises:
        ImportError: OpenRLHF is not installed.
        RuntimeError: its version is not one of `TESTED`, or somebody else has replaced one of the functions since the
            first call.
    """
    _patches.enable()


def disable() -> None:
    """Take back one `enable()`: with the last one OpenRLHF's own functions are there again."""
    _patches.disable()


def patched():
    """`with patched():` serves OpenRLHF's functions by ours inside the block; see `enable` for what it raises."""
    return _patches.patched()
