"""The PPO loss: the walk of triton/policy.py with the clipped objective and without a KL."""

import torch

from ..reference.policy import Settings, Tensors
from ..reference.ppo import AGG_MODES
from .policy import policy_bwd, walk


def ppo_fwd(*inputs):
    return walk(*_settings(*inputs), more=False)


def ppo_total_fwd(*inputs, vf_coef, entropy_coef):
    """ppo_fwd with policy + vf_coef value - entropy_coef entropy, policy and value loss, each 0-d, for its losses."""
    parts = [inputs[0].new_empty((), dtype=torch.float32) for _ in range(3)]
    scales = (0.0, float(vf_coef), -float(entropy_coef))
    return *parts, *walk(*_settings(*inputs), more=False, scales=scales, apart=parts)[1:]


def _settings(
    log_probs, old_log_probs, advantages, mask, values, old_values, returns, entropy, normalizer,
    cliprange, cliprange_high, dual_clip, cliprange_value, loss_agg_mode, value_scale=1.0, entropy_scale=1.0,
):  # fmt: skip
    tensors = Tensors(
        mask, log_probs, old_log_probs, advantages, values=values, old_values=old_values, returns=returns,
        entropy=entropy, normalizer=normalizer, entropy_normalizer=normalizer,
    )  # fmt: skip
    mode = AGG_MODES.index(loss_agg_mode)
    settings = Settings(
        a=1.0 - cliprange,
        b=1.0 + cliprange_high,
        c=float("inf") if dual_clip is None else dual_clip,
        cliprange_value=float("inf") if cliprange_value is None else cliprange_value,
        value_scale=float(value_scale),
        entropy_scale=float(entropy_scale),
        loss_agg_mode=mode,
        entropy_agg_mode=mode,
    )
    return tensors, settings


ppo_bwd = policy_bwd
