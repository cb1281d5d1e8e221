"""verl's losses, estimators and log-probs, served by ours.

By name, where this package is installed: `actor.policy_loss.loss_mode=rk_vanilla`, `algorithm.adv_estimator=rk_grpo`
and the others of `LOSSES` and `ESTIMATORS`. verl's entry point adds these names and replaces none.
In place of verl's own: `enable()`, `disable()`, `with patched():`, for what has no registry.
docs/integrations/verl.md says what is served, and what differs on purpose.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version

import torch
from torch import Tensor

import rlhf_kernels as rk

from ._masks import kept
from ._patch import Patches, call_on_import

TESTED = ("0.9.1",)
_CORE = "verl.trainer.ppo.core_algos"
_log = logging.getLogger(__name__)

# Policy losses


def _band(config):
    """(low, high) of verl's clip ratios."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (config.clip_ratio if low is None else low), (config.clip_ratio if high is None else high)


def _setting(config, name, default):
    """A number of config.policy_loss, or its default."""
    value = getattr(config.policy_loss, name, None)
    return default if value is None else value


def _geo_mean(config):
    return rk.GMPO(*_band(config))


def _clip_cov(config):
    return rk.ClipCov(
        *_band(config),
        ratio=_setting(config, "clip_cov_ratio", 2e-4),
        cov_low=_setting(config, "clip_cov_lb", 1.0),
        cov_high=_setting(config, "clip_cov_ub", 5.0),
    )


def _kl_cov(config):
    return rk.KLCov(_setting(config, "ppo_kl_coef", 1.0), _setting(config, "kl_cov_ratio", 2e-4))


def _dro(config):
    beta = _setting(config, "dro_beta", None)
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta is {beta!r}, expected a number > 0, which 'dro' needs")
    return rk.DRO(beta)


# {verl's name: (objective of the config, bound of the log-ratio, metrics)}
_KL, _CLIPPED, _LOWER = "approx_kl_k1", "clip_fraction", "dual_clip_fraction"
_ALL = {"actor/pg_clipfrac": _CLIPPED, "actor/ppo_kl": _KL, "actor/pg_clipfrac_lower": _LOWER}
_OBJECTIVES = {
    "vanilla": (lambda c: rk.Clip(*_band(c), c.get("clip_ratio_c", 3.0)), 20.0, _ALL),
    "dppo_tv": (lambda c: rk.DPPO("tv", *_band(c), c.get("clip_ratio_c", 20.0)), 20.0, _ALL),
    "dppo_kl": (lambda c: rk.DPPO("kl", *_band(c), c.get("clip_ratio_c", 20.0)), 20.0, _ALL),
    "gspo": (lambda c: rk.GSPO(*_band(c)), None, _ALL),
    "sapo": (lambda c: rk.SAPO(c.tau_pos, c.tau_neg), 20.0, _ALL),
    "gpg": (lambda c: rk.GPG(), None, {}),
    "clip_cov": (_clip_cov, None, {"actor/pg_clipfrac": "filtered_fraction", "actor/ppo_kl": _KL}),
    "kl_cov": (_kl_cov, None, {}),
    "geo_mean": (_geo_mean, None, _ALL),
    "dro": (_dro, None, {"actor/ppo_kl": _KL}),
    "cispo": (lambda c: rk.CISPO(*_band(c)), 20.0, _ALL),
}


def _normalised(mode, like, info):
    """(num_items_in_batch, factor) of verl's global batch: {dp_size, batch_num_tokens, global_batch_size, ...}."""
    ranks = info.get("dp_size") or 1
    total = info.get("batch_num_tokens" if mode == "token-mean" else "global_batch_size")
    if mode == "token-sum":
        return None, ranks
    if total is None and ranks > 1:
        name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
        raise ValueError(f"{name} is None, but dp_size={ranks!r}: the losses of several ranks need the global count")
    if mode == "seq-mean-token-sum-norm" and info.get("loss_scale_factor") is not None:
        ranks = ranks * like.shape[-1] / info["loss_scale_factor"]
    return total, ranks


def _policy_loss(name):
    objective_of, bound, names = _OBJECTIVES[name]

    def policy_loss(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        info = getattr(config, "global_batch_info", None) or {}
        mask = kept("response_mask", response_mask, response_mask)
        if name == "sapo":  # verl averages these so whatever is asked for
            loss_agg_mode = "seq-mean-token-mean"
        elif name == "geo_mean":  # the mean over all sequences of this call
            loss_agg_mode, info = "seq-mean-token-mean", {"global_batch_size": len(log_prob)}
            if rollout_is_weights is not None:
                rollout_is_weights = _geometric_mean(rollout_is_weights, mask)
        elif name == "clip_cov" and rollout_is_weights is None:
            rollout_is_weights = torch.ones_like(log_prob)  # those of 0 are counted, and so are the tokens it drops
        total, factor = _normalised(loss_agg_mode, log_prob, info)
        out = rk.policy_loss(
            log_prob,
            old_log_prob,
            advantages,
            mask,
            objective=objective_of(config),
            weights=rollout_is_weights,
            log_ratio_clamp=bound,
            loss_agg_mode=loss_agg_mode,
            num_items_in_batch=total,
        )
        metrics = {key: out.metrics[metric] for key, metric in names.items() if metric in out.metrics}
        if name == "kl_cov":
            gap = rk.approx_kl(log_prob.detach(), old_log_prob, estimator="abs")
            metrics["actor/ppo_kl"] = rk.aggregate_loss(gap, mask)
        return out.loss * factor, metrics

    policy_loss.__name__ = policy_loss.__qualname__ = f"rk_{name}"
    policy_loss.__doc__ = f"verl's {name!r}; its metrics are 0-d tensors, so that nothing waits for the device."
    return policy_loss


def _geometric_mean(weights, mask):
    """[B], of the weights of each sequence's kept tokens."""
    logs = torch.where(mask, (weights + 1e-10).log(), 0)
    return (logs.sum(-1) / mask.sum(-1).clamp(min=1)).exp()


LOSSES = {f"rk_{name}": _policy_loss(name) for name in _OBJECTIVES}

# Advantages


def _gae(token_level_rewards, values=None, response_mask=None, gamma=None, lam=None, config=None, **unused):
    """verl's "gae": advantages whitened over the kept tokens, and returns; both are 0 under the mask's zeros."""
    if values is None:
        raise ValueError(
            "values is None: verl hands them to adv_estimator=gae alone; keep that name, and let "
            "rlhf_kernels.integrations.verl.enable() serve it"
        )
    gamma = config.gamma if gamma is None else gamma
    lam = config.lam if lam is None else lam
    mask = kept("response_mask", response_mask, response_mask)
    advantages, returns = rk.gae(token_level_rewards, values, mask, gamma=float(gamma), lam=float(lam))
    return rk.masked_whiten(advantages, mask), returns


def _of_groups(estimator, lengths=False):
    def advantages(
        token_level_rewards,
        response_mask,
        index=None,
        epsilon=1e-6,
        norm_adv_by_std_in_grpo=None,
        config=None,
        **unused,
    ):
        mask = kept("response_mask", response_mask, response_mask)
        chosen = estimator
        if estimator == "grpo":
            by_std = norm_adv_by_std_in_grpo
            if by_std is None:
                by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
            chosen = "grpo" if by_std else "dr_grpo"
        found = rk.group_advantages(
            token_level_rewards.sum(-1),
            group_ids=_groups(index).to(token_level_rewards.device),
            lengths=mask.sum(-1) if lengths else None,
            estimator=chosen,
            eps=epsilon,
            lone="score",
        )
        found = found.unsqueeze(-1) * mask
        return found, found

    advantages.__name__ = advantages.__qualname__ = f"rk_{estimator}"
    return advantages


def _groups(index):
    """verl's uid of each row, of any kind, as integers."""
    if isinstance(index, Tensor):
        return index
    numbers = {}
    found = [numbers.setdefault(name, len(numbers)) for name in index]
    return torch.tensor(found, dtype=torch.int64, device="cpu")


def _reinforce_plus_plus(token_level_rewards, response_mask, config=None, **unused):
    """verl's "reinforce_plus_plus": discounted sums over the kept tokens, whitened."""
    mask = kept("response_mask", response_mask, response_mask)
    zeros = torch.zeros_like(token_level_rewards)
    _, returns = rk.gae(token_level_rewards, zeros, mask, gamma=float(config.gamma), lam=1.0)
    return rk.masked_whiten(returns, mask), returns


def _reinforce_plus_plus_baseline(token_level_rewards, response_mask, index=None, config=None, **unused):
    """verl's "reinforce_plus_plus_baseline": the group's mean taken away, then whitened over the tokens."""
    mask = kept("response_mask", response_mask, response_mask)
    centred, _ = _of_groups("dr_grpo")(token_level_rewards, response_mask, index)
    found = rk.masked_whiten(centred, mask)
    return found, found


ESTIMATORS = {
    "rk_gae": _gae,
    "rk_grpo": _of_groups("grpo"),
    "rk_rloo": _of_groups("rloo"),
    "rk_opo": _of_groups("opo", lengths=True),
    "rk_reinforce_plus_plus": _reinforce_plus_plus,
    "rk_reinforce_plus_plus_baseline": _reinforce_plus_plus_baseline,
}

# What has no registry


def _logprobs_from_logits(logits, labels, inplace_backward=True):
    return rk.logprobs_from_logits(logits, labels, inplace_backward=inplace_backward and not logits.is_leaf)


def _entropy_from_logits(logits):
    return rk.entropy_from_logits(logits)


def _entropy_from_logits_with_chunking(logits, chunk_size=2048):
    return rk.entropy_from_logits(logits)


def _calculate_sum_pi_squared_from_logits(logits):
    labels = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
    return rk.token_statistics_from_logits(logits, labels).log_sum_sq_probs.exp()


def _fused_linear(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
    """(log-probs, entropy) of FusedLinearForPPO, whatever its backend; temperature also [...], one for each token."""
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(input_ids.shape)
    labels = input_ids.to(torch.int64)
    return rk.linear_logprobs(hidden_states, vocab_weights, labels, temperature=temperature, return_entropy=True)


def _compute_value_loss(
    vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode="token-mean", dp_size=1,
    batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None,
):  # fmt: skip
    info = {
        "dp_size": dp_size, "batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size,
        "loss_scale_factor": loss_scale_factor,
    }  # fmt: skip
    total, factor = _normalised(loss_agg_mode, vpreds, info)
    out = rk.value_loss(
        vpreds,
        values,
        returns,
        kept("response_mask", response_mask, response_mask),
        cliprange_value=cliprange_value,
        loss_agg_mode=loss_agg_mode,
        num_items_in_batch=total,
    )
    return out.loss * factor, out.metrics["value_clip_fraction"]


_ESTIMATORS_OF_KL = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def _kl_penalty(logprob, ref_logprob, kl_penalty):
    name = kl_penalty.removesuffix("+")
    if name not in _ESTIMATORS_OF_KL:
        raise NotImplementedError(
            f"kl_penalty must be one of {', '.join(_ESTIMATORS_OF_KL)}, or that with a +; got {kl_penalty!r}"
        )
    estimator = _ESTIMATORS_OF_KL[name]
    return rk.approx_kl(
        logprob,
        ref_logprob,
        estimator=estimator,
        gradient="straight_through" if kl_penalty.endswith("+") else "plain",
        clamp_input=20 if estimator == "k3" else None,
        clamp_output=10 if estimator == "k3" else None,
    )


REPLACED = {
    _CORE: {
        "compute_value_loss": _compute_value_loss,
        "kl_penalty": _kl_penalty,
        "compute_gae_advantage_return": _gae,
    },
    "verl.utils.torch_functional": {
        "logprobs_from_logits": _logprobs_from_logits,
        "entropy_from_logits": _entropy_from_logits,
        "entropy_from_logits_with_chunking": _entropy_from_logits_with_chunking,
        "calculate_sum_pi_squared_from_logits": _calculate_sum_pi_squared_from_logits,
    },
    "verl.utils.experimental.torch_functional": {"FusedLinearForPPO.forward": _fused_linear},
}
_patches = Patches("verl", TESTED, on_import=REPLACED)


def enable() -> None:
    """Serve verl's functions by ours from now on, in this process.

    Raises:
        ImportError: verl is not installed.
        RuntimeError: its version is not one of `TESTED`, or somebody else has replaced one of the functions since the
            first call.
    """
    _patches.enable()


def disable() -> None:
    """Take back one `enable()`: with the last one verl's own functions are there again."""
    _patches.disable()


def patched():
    """`with patched():` serves verl's functions by ours inside the block; see `enable` for what it raises."""
    return _patches.patched()


def register() -> None:
    """Add `LOSSES` and `ESTIMATORS` to verl's registries as soon as they are there; replace nothing.

    verl's entry point calls this in every process that imports verl, so that it never raises: what is in the way
    stands in the log.
    """
    try:
        found = version("verl")
        if found not in TESTED:
            _log.info("rk_ names are not added: verl is %s, tested with %s", found, ", ".join(TESTED))
        elif _CORE in sys.modules:
            _add(sys.modules[_CORE])
        else:
            call_on_import(_CORE, _add)
    except Exception as error:
        _log.info("rk_ names are not added: %s", error)


def _add(core):
    try:
        for registry, ours in ((core.POLICY_LOSS_REGISTRY, LOSSES), (core.ADV_ESTIMATOR_REGISTRY, ESTIMATORS)):
            for name, function in ours.items():
                if registry.setdefault(name, function) is not function:
                    _log.info("%s is not added: verl has another function of that name", name)
    except Exception as error:
        _log.info("rk_ names are not added: %s", error)
