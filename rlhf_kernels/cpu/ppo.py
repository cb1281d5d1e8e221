"""The PPO loss as a call of the policy loss; what the functions mean stands in reference/ppo.py."""

import torch

from .._native import or_infinite
from ..reference.policy import Settings, Tensors
from ..reference.ppo import AGG_MODES, STATS
from .policy import policy_bwd, policy_fwd

ppo_bwd = policy_bwd


def ppo_fwd(
    log_probs, old_log_probs, advantages, mask, values, old_values, returns, entropy, normalizer,
    cliprange, cliprange_high, dual_clip, cliprange_value, loss_agg_mode, value_scale=1.0, entropy_scale=1.0,
):  # fmt: skip
    tensors = Tensors(
        mask, log_probs, old_log_probs, advantages, values=values, old_values=old_values, returns=returns,
        entropy=entropy, normalizer=normalizer, entropy_normalizer=normalizer,
    )  # fmt: skip
    mode = AGG_MODES.index(loss_agg_mode)
    settings = Settings(
        a=1.0 - cliprange, b=1.0 + cliprange_high, c=or_infinite(dual_clip),
        cliprange_value=or_infinite(cliprange_value), value_scale=value_scale, entropy_scale=entropy_scale,
        loss_agg_mode=mode, entropy_agg_mode=mode,
    )  # fmt: skip
    losses, *grads, stats = policy_fwd(tensors, settings)
    return torch.cat((losses[:1], losses[2:])), *grads, stats[: len(STATS)]
