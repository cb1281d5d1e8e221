"""The policy's objective, the baseline of its advantages and the correction of its samples, from the settings."""

import dataclasses

import torch

import rlhf_kernels as kernels
from rlhf_kernels import KLTerm, gae, group_advantages, masked_whiten

from ..rollouts.engines import padded_log_probs
from ..rollouts.sampling import RolloutError

OBJECTIVES = {
    "clip": kernels.Clip, "gspo": kernels.GSPO, "rloo": kernels.RLOO, "reinforce": kernels.Reinforce,
    "gpg": kernels.GPG, "cispo": kernels.CISPO, "sapo": kernels.SAPO, "gmpo": kernels.GMPO, "dppo": kernels.DPPO,
    "dro": kernels.DRO, "clip_cov": kernels.ClipCov, "kl_cov": kernels.KLCov,
}  # fmt: skip
OWN = {"clip": ("low", "high", "dual"), "clip_cov": ("low", "high")}
"""Parameters that have settings of their own: cliprange, cliprange_high, dual_clip."""
SETTINGS = {"low": "cliprange", "high": "cliprange_high", "dual": "dual_clip"}


def objective_of(args) -> kernels.Objective:
    """The objective that `objective` names: gspo, or with parameters, cispo:low=0.2,high=4.

    Raises:
        ValueError: unknown name or parameter, or one out of its range.
    """
    name, _, rest = args.objective.partition(":")
    if name not in OBJECTIVES:
        raise ValueError(f"objective: got {name!r}, want one of {', '.join(OBJECTIVES)}")
    kind, own = OBJECTIVES[name], OWN.get(name, ())
    given = {field: getattr(args, SETTINGS[field]) for field in own}
    known = [field.name for field in dataclasses.fields(kind) if field.name not in own]
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key in own:
            raise ValueError(f"objective: got {part!r}, want it in {SETTINGS[key]}")
        if key not in known:
            wanted = ", ".join(known) or "no parameter"
            raise ValueError(f"objective: got {part!r}, want of {name}: {wanted}")
        given[key] = _number(value)
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"objective: got {args.objective!r}: {error}") from error


def _number(text: str):
    if text.lower() in ("none", "null"):
        return None
    try:
        return float(text)
    except ValueError:
        return text


def check_objective(args) -> None:
    """Raise a ValueError where the settings of advantages, objective and KL do not go together."""
    objective_of(args)
    if args.advantage == "gae":
        return
    if args.advantage != "reinforce++" and args.num_responses < 2:
        raise ValueError(
            f"num_responses: got {args.num_responses}, want at least 2 with advantage {args.advantage}, which compares "
            "the responses to one prompt"
        )
    if args.value_model_path is not None:
        raise ValueError(f"value_model_path: got a model, want none with advantage {args.advantage}: it has no values")
    if args.whiten_rewards:
        raise ValueError(f"whiten_rewards: got True, want False with advantage {args.advantage}")
    if args.gamma != 1 and not args.advantage.startswith("reinforce++"):
        raise ValueError(
            f"gamma: got {args.gamma}, want 1 with advantage {args.advantage}, which is of whole responses"
        )


def kl_term(args, coef: float) -> KLTerm | None:
    """The KL inside the loss, with its coefficient as it is now; None where the KL is in the rewards."""
    return KLTerm(coef, args.kl_estimator, args.kl_gradient) if args.kl_in == "loss" else None


def importance_weights(args, experience) -> tuple[torch.Tensor | None, dict]:
    """(weights [B, T] of an engine's samples or None, metrics), from the log-probs that it gave.

    Without `rollout_correction` the one metric is the effective sample size that the bare ratios of the tokens would
    leave; {} where the engine gave no log-probs.

    Raises:
        RolloutError: the engine gave none, and the settings ask for weights.
    """
    given, asked = experience.rollouts.log_probs, args.rollout_correction != "none"
    if given is None:
        if not asked:
            return None, {}
        engine = args.rollout_engine
        raise RolloutError(
            f"rollout_correction: got {args.rollout_correction}, but the engine {engine} gives no log-probs"
        )
    theirs = padded_log_probs(given, experience.mask)
    if not asked:
        bare = kernels.importance_weights(experience.log_probs.double(), theirs, experience.mask).metrics
        return None, {"rollout/effective_sample_size": bare["effective_sample_size"]}
    theirs = theirs.to(experience.log_probs.dtype)
    level, _, mode = args.rollout_correction.partition("_")
    found = kernels.importance_weights(
        experience.log_probs, theirs, experience.mask, level=level, mode=mode, low=args.rollout_correction_low,
        high=args.rollout_correction_high,
    )  # fmt: skip
    return found.weights, {f"rollout/{name}": value for name, value in found.metrics.items()}


def advantages_without_values(args, rewards, mask, scores) -> torch.Tensor:
    """Advantages [B, T] of each token, from rewards [B, T] that hold the KL and, at the last token, the score.

    Args:
        scores: [B], what of the rewards is the score.
    """
    if not args.advantage.startswith("reinforce++"):
        totals = torch.where(mask, rewards, 0).sum(-1).view(-1, args.num_responses)
        per_response = group_advantages(totals, estimator=args.advantage, eps=args.advantage_eps)
        return torch.where(mask, per_response.view(-1, 1), 0)
    if args.advantage == "reinforce++-baseline":
        groups = scores.view(-1, args.num_responses)
        last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
        rewards = rewards - torch.where(last, groups.mean(-1).repeat_interleave(args.num_responses).unsqueeze(-1), 0)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=args.gamma, lam=1.0)
    return masked_whiten(advantages, mask)
