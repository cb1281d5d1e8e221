"""Fused losses and advantages for reinforcement learning from human feedback."""

from .advantages import RLHFAdvantages, gae, masked_whiten, rlhf_advantages
from .aggregation import aggregate_loss
from .bradley_terry import RankingLoss, bradley_terry_loss, plackett_luce_loss
from .cross_entropy import cross_entropy_from_logits, linear_cross_entropy
from .dispatch import backend, backends
from .distillation import linear_jsd, linear_topk_kl
from .group_advantages import group_advantages
from .importance import Gate, ImportanceWeights, high_entropy_mask, importance_weights, off_policy_mask
from .kept import kept_logprobs_from_logits, linear_kept_logprobs, pad_kept
from .kl import approx_kl, kl_from_logits
from .linear import linear_logprobs
from .linear_divergences import linear_kl
from .linear_policy import linear_policy_loss, linear_ppo_loss
from .linear_preference import linear_preference_loss, wpo_weights
from .logprobs import entropy_from_logits, logprobs_and_entropy_from_logits, logprobs_from_logits
from .model_head import ModelHead, call_with_head, find_head, linear_logprobs_from_model
from .objectives import (
    CISPO,
    DPPO,
    DRO,
    GMPO,
    GPG,
    GSPO,
    RLOO,
    SAPO,
    Clip,
    ClipCov,
    KLCov,
    KLTerm,
    Objective,
    Reinforce,
)
from .packing import PackedResponses, pack_responses, shared_prefix_attention
from .policy import PolicyLoss, ValueLoss, policy_loss, value_loss
from .ppo import PPOLoss, ppo_loss
from .preference import preference_loss, unpaired_preference_loss
from .token_statistics import TokenStatistics, linear_token_statistics, token_statistics_from_logits

__version__ = "0.1.0"
__all__ = [
    "CISPO",
    "DPPO",
    "DRO",
    "GMPO",
    "GPG",
    "GSPO",
    "RLOO",
    "SAPO",
    "Clip",
    "ClipCov",
    "Gate",
    "ImportanceWeights",
    "KLCov",
    "KLTerm",
    "ModelHead",
    "Objective",
    "PPOLoss",
    "PackedResponses",
    "PolicyLoss",
    "RLHFAdvantages",
    "RankingLoss",
    "Reinforce",
    "TokenStatistics",
    "ValueLoss",
    "__version__",
    "aggregate_loss",
    "approx_kl",
    "backend",
    "backends",
    "bradley_terry_loss",
    "call_with_head",
    "cross_entropy_from_logits",
    "entropy_from_logits",
    "find_head",
    "gae",
    "group_advantages",
    "high_entropy_mask",
    "importance_weights",
    "kept_logprobs_from_logits",
    "kl_from_logits",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_kept_logprobs",
    "linear_kl",
    "linear_logprobs",
    "linear_logprobs_from_model",
    "linear_policy_loss",
    "linear_ppo_loss",
    "linear_preference_loss",
    "linear_token_statistics",
    "linear_topk_kl",
    "logprobs_and_entropy_from_logits",
    "logprobs_from_logits",
    "masked_whiten",
    "off_policy_mask",
    "pack_responses",
    "pad_kept",
    "plackett_luce_loss",
    "policy_loss",
    "ppo_loss",
    "preference_loss",
    "rlhf_advantages",
    "shared_prefix_attention",
    "token_statistics_from_logits",
    "unpaired_preference_loss",
    "value_loss",
    "wpo_weights",
]
