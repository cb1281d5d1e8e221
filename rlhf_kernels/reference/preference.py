"""Preference losses on the policy's own log-probs (DPO and its family): the definition in plain PyTorch.

What a backend provides, under these names, all tensors contiguous:

    preference_fwd(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, kl,
                   loss_type, beta, label_smoothing, target_margin, chosen_weight, rejected_weight)
        -> (loss, grad_chosen, grad_rejected, chosen_rewards, rejected_rewards)
    preference_bwd(grad_loss, grad_chosen, grad_rejected) -> the two gradients times the upstream gradient

    chosen, rejected and ref_*  [N] summed log-probs of a response; lengths [N] int64 tokens of a response, or None
    kl     0-d, only for "kto", where chosen [C] and rejected [R] are unpaired and the outputs have these lengths
    loss   [N] of each pair, for "kto" [C + R], chosen first; fp64 for fp64 log-probs, otherwise fp32
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "orpo", "simpo", "kto")
REFERENCE_FREE = ("orpo", "simpo")
LENGTH_NORMALIZED = ("orpo", "simpo")
CASES = ("sigmoid", "smoothed", "ipo", "ipo_mean", "hinge", "orpo", "simpo", "kto", "large_gap", "certain", "empty")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled(x: Tensor, lengths: Tensor | None) -> Tensor:
    return x if lengths is None else x / lengths.to(x.dtype)


def _below_one(mean_log_prob: Tensor) -> Tensor:
    """At most -eps: the odds of a response with probability 1 are not finite."""
    return mean_log_prob.clamp(max=-torch.finfo(mean_log_prob.dtype).eps)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it."""
    near = x > -0.6931471805599453
    return torch.where(near, (-torch.expm1(torch.where(near, x, -1))).log(), torch.log1p(-torch.exp(x)))


def preference(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    kl: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    target_margin: float,
    chosen_weight: float,
    rejected_weight: float,
) -> Tensor:
    """Loss of each pair [N] (for "kto" of each response [C + R]), differentiable in chosen and rejected."""
    dtype = accumulator_dtype(chosen.dtype)
    good, bad = _scaled(chosen.to(dtype), chosen_lengths), _scaled(rejected.to(dtype), rejected_lengths)
    if loss_type == "orpo":
        odds = (_below_one(good) - _log1mexp(_below_one(good))) - (_below_one(bad) - _log1mexp(_below_one(bad)))
        return -good - beta * logsigmoid(odds)
    if loss_type != "simpo":
        good = good - _scaled(ref_chosen.to(dtype), chosen_lengths)
        bad = bad - _scaled(ref_rejected.to(dtype), rejected_lengths)
    if loss_type == "kto":
        anchor = kl.to(dtype).clamp(min=0)
        kept = chosen_weight * torch.sigmoid(-beta * (good - anchor))
        dropped = rejected_weight * torch.sigmoid(-beta * (anchor - bad))
        return torch.cat([kept, dropped])
    if loss_type == "ipo":
        return (good - bad - 1 / (2 * beta)).square()
    if loss_type == "hinge":
        return torch.relu(1 - beta * (good - bad))
    logit = beta * (good - bad) - (target_margin if loss_type == "simpo" else 0)
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


def preference_fwd(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    kl: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    target_margin: float,
    chosen_weight: float,
    rejected_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, d loss / d chosen, d loss / d rejected and the implied rewards (beta * what the loss compares)."""
    dtype = accumulator_dtype(chosen.dtype)
    good, bad = _scaled(chosen.to(dtype), chosen_lengths), _scaled(rejected.to(dtype), rejected_lengths)
    if loss_type not in REFERENCE_FREE:
        good = good - _scaled(ref_chosen.to(dtype), chosen_lengths)
        bad = bad - _scaled(ref_rejected.to(dtype), rejected_lengths)
    if loss_type == "kto":
        loss, slope_good, slope_bad = _kto_terms(good, bad, kl.to(dtype), beta, chosen_weight, rejected_weight)
    elif loss_type == "orpo":
        loss, slope_good, slope_bad = _orpo_terms(good, bad, beta)
    else:
        loss, slope_good = _gap_terms(good - bad, loss_type, beta, label_smoothing, target_margin)
        slope_bad = -slope_good
    return loss, _scaled(slope_good, chosen_lengths), _scaled(slope_bad, rejected_lengths), beta * good, beta * bad


def _gap_terms(
    gap: Tensor, loss_type: str, beta: float, label_smoothing: float, target_margin: float
) -> tuple[Tensor, Tensor]:
    """Loss and d loss / d gap of the losses that depend on the gap alone."""
    if loss_type == "ipo":
        off = gap - 1 / (2 * beta)
        return off.square(), 2 * off
    if loss_type == "hinge":
        short = 1 - beta * gap
        return torch.relu(short), -beta * (short > 0).to(gap.dtype)
    logit = beta * gap - (target_margin if loss_type == "simpo" else 0)
    loss = -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)
    slope = -(1 - label_smoothing) * torch.sigmoid(-logit) + label_smoothing * torch.sigmoid(logit)
    return loss, beta * slope


def _kto_terms(
    good: Tensor, bad: Tensor, kl: Tensor, beta: float, chosen_weight: float, rejected_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    anchor = kl.clamp(min=0)
    win, lose = beta * (good - anchor), beta * (anchor - bad)
    loss = torch.cat([chosen_weight * torch.sigmoid(-win), rejected_weight * torch.sigmoid(-lose)])
    slope_good = -beta * chosen_weight * torch.sigmoid(win) * torch.sigmoid(-win)
    return loss, slope_good, beta * rejected_weight * torch.sigmoid(lose) * torch.sigmoid(-lose)


def _orpo_terms(good: Tensor, bad: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """d log odds / d mean log p = 1 / (1 - p), and 0 where p is held below 1."""
    near_good, near_bad = _below_one(good), _below_one(bad)
    odds = (near_good - _log1mexp(near_good)) - (near_bad - _log1mexp(near_bad))
    slope = beta * torch.sigmoid(-odds)
    slope_good = torch.where(good == near_good, slope / torch.expm1(near_good), 0) - 1
    slope_bad = torch.where(bad == near_bad, -slope / torch.expm1(near_bad), 0)
    return -good - beta * logsigmoid(odds), slope_good, slope_bad


def preference_bwd(grad_loss: Tensor, grad_chosen: Tensor, grad_rejected: Tensor) -> tuple[Tensor, Tensor]:
    """The saved gradients times the upstream gradient: [N] for both, or [C + R] split into its parts."""
    chosen, rejected = grad_chosen.shape[0], grad_rejected.shape[0]
    unpaired = grad_loss.shape[0] == chosen + rejected
    for_chosen, for_rejected = grad_loss.split([chosen, rejected]) if unpaired else (grad_loss, grad_loss)
    return for_chosen * grad_chosen, for_rejected * grad_rejected


def example_inputs(case: str, *, dtype: torch.dtype, device="cpu", seed: int = 0) -> dict:
    """The arguments of `preference_fwd` for one named case."""
    generator = torch.Generator().manual_seed(seed)
    loss_type = {
        "smoothed": "sigmoid",
        "large_gap": "sigmoid",
        "ipo_mean": "ipo",
        "certain": "orpo",
        "empty": "sigmoid",
    }
    loss_type = loss_type.get(case, case)
    sizes = {"empty": (0, 0), "kto": (5, 3)}.get(case, (7, 7))
    lengths = [torch.randint(1, 30, (size,), generator=generator, dtype=torch.int64) for size in sizes]
    log_probs = [-n * torch.rand(n.shape, generator=generator, dtype=torch.float64) * 2 for n in lengths]
    ref = [x + torch.randn(x.shape, generator=generator, dtype=torch.float64) * 2 for x in log_probs]
    if case == "large_gap":
        log_probs[0] = log_probs[0] - 5000
    if case == "certain":
        log_probs[0][:3], log_probs[1][2:5] = 0, 0
    use_lengths = loss_type in LENGTH_NORMALIZED or case == "ipo_mean"
    use_ref = loss_type not in REFERENCE_FREE
    return {
        "chosen": log_probs[0].to(device, dtype),
        "rejected": log_probs[1].to(device, dtype),
        "ref_chosen": ref[0].to(device, dtype) if use_ref else None,
        "ref_rejected": ref[1].to(device, dtype) if use_ref else None,
        "chosen_lengths": lengths[0].to(device) if use_lengths else None,
        "rejected_lengths": lengths[1].to(device) if use_lengths else None,
        "kl": torch.tensor(0.3, dtype=dtype, device=device) if loss_type == "kto" else None,
        "loss_type": loss_type,
        "beta": 0.1 if loss_type != "simpo" else 2.0,
        "label_smoothing": 0.1 if case == "smoothed" else 0.0,
        "target_margin": 0.5 if loss_type == "simpo" else 0.0,
        "chosen_weight": 1.0 if loss_type != "kto" else 1.2,
        "rejected_weight": 1.0 if loss_type != "kto" else 0.8,
    }
