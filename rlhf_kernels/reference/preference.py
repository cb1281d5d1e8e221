"""Preference losses on the policy's own log-probs (DPO and its family): the definition in plain PyTorch.

What a backend provides, under these names, all tensors contiguous:

    preference_fwd(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, anchor,
                   term, beta, a, b, divergence, alpha)
        -> (loss, grad_chosen, grad_rejected, chosen_rewards, rejected_rewards)
    preference_bwd(grad_loss, grad_chosen, grad_rejected) -> the two gradients times the upstream gradient

    chosen, rejected and ref_*  [N] summed log-probs of a response; ref_* None: no reference; lengths [N] int64 tokens
            of a response, or None: the losses compare g (of chosen) and h (of rejected), f'(log-prob less the
            reference's) / length
    anchor  0-d or None: "kto", where chosen [C] and rejected [R] are unpaired and the outputs have these lengths, takes
            it for the KL (held at 0), "bco_pair" for the shift of the rewards (None: 0)
    term    one of TERMS; a and b are its own numbers, 0 where it has none
    divergence, alpha   f' as in `scores`; "reverse_kl" for g = log-prob less the reference's
    loss    [N] of each pair, for "kto" [C + R], chosen first; fp64 for fp64 log-probs, otherwise fp32
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

TERMS = (
    "sigmoid",  # a: smoothing, b: margin
    "ipo", "hinge", "orpo",
    "kto",  # a, b: weights of chosen and rejected
    "exo_pair",  # a: -log(1 - smoothing), b: -log(smoothing)
    "discopop",  # a: tau
    "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "js_divergence", "alpha_divergence")
CASES = (
    "sigmoid", "smoothed", "robust", "ipo", "ipo_mean", "hinge", "orpo", "simpo", "kto", "exo_pair", "discopop",
    "nca_pair", "bco_pair", "bco_shifted", "sppo_hard", "apo_zero", "apo_down", "forward_kl", "js_divergence",
    "alpha_divergence", "js_mean", "large_gap", "exo_large_gap", "discopop_large_gap", "alpha_large_gap", "certain",
    "empty",
)  # fmt: skip
HELD = 80.0  # exponents of an alpha divergence stop here, whatever the dtype: beyond, the score is constant


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


def scores(ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(t) at t = exp(ratio), differentiable: log t, log(2t / (t + 1)), or (t^(alpha - 1) - 1) / (alpha - 1)."""
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(ratio)
    if divergence == "alpha_divergence":
        return torch.expm1(((alpha - 1) * ratio).clamp(max=HELD)) / (alpha - 1)
    return ratio


def _score_slopes(ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """d scores / d ratio."""
    if divergence == "js_divergence":
        return torch.sigmoid(-ratio)
    exponent = (alpha - 1) * ratio
    return torch.where(exponent > HELD, 0, exponent.clamp(max=HELD).exp())


def _compared(log_probs: Tensor, ref: Tensor | None, lengths: Tensor | None, divergence: str, alpha: float) -> Tensor:
    """What a loss compares: the score of the log-ratio, or the log-prob itself, by token if there are lengths."""
    dtype = accumulator_dtype(log_probs.dtype)
    if divergence != "reverse_kl":
        return _scaled(scores(log_probs.to(dtype) - ref.to(dtype), divergence, alpha), lengths)
    own = _scaled(log_probs.to(dtype), lengths)
    return own if ref is None else own - _scaled(ref.to(dtype), lengths)


def preference(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    anchor: Tensor | None,
    term: str,
    beta: float,
    a: float,
    b: float,
    divergence: str,
    alpha: float,
) -> Tensor:
    """Loss of each pair [N] (for "kto" of each response [C + R]), differentiable in chosen and rejected."""
    good = _compared(chosen, ref_chosen, chosen_lengths, divergence, alpha)
    bad = _compared(rejected, ref_rejected, rejected_lengths, divergence, alpha)
    shift = 0.0 if anchor is None else anchor.to(good.dtype)
    x = beta * (good - bad) if term != "kto" else None
    if term == "orpo":
        odds = (_below_one(good) - _log1mexp(_below_one(good))) - (_below_one(bad) - _log1mexp(_below_one(bad)))
        return -good - beta * logsigmoid(odds)
    if term == "kto":
        held = shift.clamp(min=0)
        return torch.cat([a * torch.sigmoid(-beta * (good - held)), b * torch.sigmoid(-beta * (held - bad))])
    if term == "ipo":
        return (good - bad - 1 / (2 * beta)).square()
    if term == "hinge":
        return torch.relu(1 - x)
    if term == "exo_pair":
        return torch.sigmoid(x) * (logsigmoid(x) + a) + torch.sigmoid(-x) * (logsigmoid(-x) + b)
    if term == "discopop":
        return -torch.sigmoid(-x / a) * logsigmoid(x) + torch.exp(logsigmoid(x / a) - x)
    if term == "nca_pair":
        return -logsigmoid(beta * good) - 0.5 * logsigmoid(-beta * good) - 0.5 * logsigmoid(-beta * bad)
    if term == "bco_pair":
        return -logsigmoid(beta * good - shift) - logsigmoid(shift - beta * bad)
    if term == "sppo_hard":
        return (good - 0.5 / beta).square() + (bad + 0.5 / beta).square()
    if term == "apo_zero":
        return torch.sigmoid(-beta * good) + torch.sigmoid(beta * bad)
    if term == "apo_down":
        return torch.sigmoid(beta * good) + torch.sigmoid(-x)
    logit = x - b
    return -(1 - a) * logsigmoid(logit) - a * logsigmoid(-logit)


def preference_fwd(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    anchor: Tensor | None,
    term: str,
    beta: float,
    a: float,
    b: float,
    divergence: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, d loss / d chosen, d loss / d rejected and the implied rewards (beta * what the loss compares)."""
    good = _compared(chosen, ref_chosen, chosen_lengths, divergence, alpha)
    bad = _compared(rejected, ref_rejected, rejected_lengths, divergence, alpha)
    shift = good.new_zeros(()) if anchor is None else anchor.to(good.dtype)
    if term == "kto":
        loss, slope_good, slope_bad = _kto_terms(good, bad, shift, beta, a, b)
    elif term == "orpo":
        loss, slope_good, slope_bad = _orpo_terms(good, bad, beta)
    elif term in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"):
        loss, slope_good, slope_bad = _two_sided_terms(good, bad, shift, term, beta)
    else:
        loss, slope_good = _gap_terms(good - bad, term, beta, a, b)
        slope_bad = -slope_good
    if divergence != "reverse_kl":
        slope_good = slope_good * _score_slopes(chosen.to(good.dtype) - ref_chosen.to(good.dtype), divergence, alpha)
        slope_bad = slope_bad * _score_slopes(rejected.to(bad.dtype) - ref_rejected.to(bad.dtype), divergence, alpha)
    return loss, _scaled(slope_good, chosen_lengths), _scaled(slope_bad, rejected_lengths), beta * good, beta * bad


def _gap_terms(gap: Tensor, term: str, beta: float, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Loss and d loss / d gap of the losses that depend on the gap alone."""
    if term == "ipo":
        off = gap - 1 / (2 * beta)
        return off.square(), 2 * off
    if term == "hinge":
        short = 1 - beta * gap
        return torch.relu(short), -beta * (short > 0).to(gap.dtype)
    if term == "exo_pair":
        return _exo_terms(beta * gap, beta, a, b)
    if term == "discopop":
        return _discopop_terms(beta * gap, beta, a)
    logit = beta * gap - b
    loss = -(1 - a) * logsigmoid(logit) - a * logsigmoid(-logit)
    slope = -(1 - a) * torch.sigmoid(-logit) + a * torch.sigmoid(logit)
    return loss, beta * slope


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, and 0 where the weight is 0, though x be infinite there."""
    return torch.where(weight == 0, 0, weight * x)


def _exo_terms(x: Tensor, beta: float, a: float, b: float) -> tuple[Tensor, Tensor]:
    """With q = sigmoid(x), q log q + (1 - q) log(1 - q) = -log(1 + e^-|x|) - min(q, 1 - q) |x|."""
    small = torch.sigmoid(-x.abs())
    loss = torch.sigmoid(x) * a + torch.sigmoid(-x) * b - softplus(-x.abs()) - _times(small, x.abs())
    return loss, beta * _times(small * torch.sigmoid(x.abs()), x - (b - a))


def _discopop_terms(x: Tensor, beta: float, tau: float) -> tuple[Tensor, Tensor]:
    """The exponential part e^-x sigmoid(x / tau) in one exponent: its factors overflow and vanish together."""
    mixed, plain = torch.sigmoid(x / tau), torch.sigmoid(-x / tau)
    exponential = torch.exp(torch.where(x < 0, x / tau - x, -x)) * torch.sigmoid((x / tau).abs())
    logistic = -logsigmoid(x)
    slope = -_times(mixed * plain / tau, logistic) - plain * torch.sigmoid(-x) - exponential * (1 - plain / tau)
    return _times(plain, logistic) + exponential, beta * slope


def _two_sided_terms(good: Tensor, bad: Tensor, shift: Tensor, term: str, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a pair that are sums over its two responses."""
    if term == "sppo_hard":
        off, other = good - 0.5 / beta, bad + 0.5 / beta
        return off.square() + other.square(), 2 * off, 2 * other
    win, lose = beta * good - shift, beta * bad - shift
    if term == "nca_pair":
        loss = -logsigmoid(win) - 0.5 * logsigmoid(-win) - 0.5 * logsigmoid(-lose)
        slope = 0.5 * torch.sigmoid(win) - torch.sigmoid(-win)
        return loss, beta * slope, 0.5 * beta * torch.sigmoid(lose)
    if term == "bco_pair":
        return -logsigmoid(win) - logsigmoid(-lose), -beta * torch.sigmoid(-win), beta * torch.sigmoid(lose)
    bend = beta * torch.sigmoid(win) * torch.sigmoid(-win)
    if term == "apo_zero":
        loss = torch.sigmoid(-win) + torch.sigmoid(lose)
        return loss, -bend, beta * torch.sigmoid(lose) * torch.sigmoid(-lose)
    gap = beta * (good - bad)
    between = beta * torch.sigmoid(gap) * torch.sigmoid(-gap)
    return torch.sigmoid(win) + torch.sigmoid(-gap), bend - between, between


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
    term, a, b = {
        "smoothed": ("sigmoid", 0.1, 0.0),
        "robust": ("sigmoid", -0.125, 0.0),
        "simpo": ("sigmoid", 0.0, 0.5),
        "kto": ("kto", 1.2, 0.8),
        "certain": ("orpo", 0.0, 0.0),
        "exo": ("exo_pair", -math.log1p(-0.01), -math.log(0.01)),
        "discopop": ("discopop", 0.05, 0.0),
    }.get(case.removesuffix("_pair").removesuffix("_large_gap"), (case, 0.0, 0.0))
    term = {"ipo_mean": "ipo", "bco_shifted": "bco_pair", "alpha_divergence": "hinge"}.get(term, term)
    term = term if term in TERMS else "sigmoid"
    sizes = {"empty": (0, 0), "kto": (5, 3)}.get(case, (7, 7))
    lengths = [torch.randint(1, 30, (size,), generator=generator, dtype=torch.int64) for size in sizes]
    log_probs = [-n * torch.rand(n.shape, generator=generator, dtype=torch.float64) * 2 for n in lengths]
    ref = [x + torch.randn(x.shape, generator=generator, dtype=torch.float64) * 2 for x in log_probs]
    if case.endswith("large_gap"):
        log_probs[0][::2] -= 5000
        log_probs[1][1::2] -= 3000
    if case == "certain":
        log_probs[0][:3], log_probs[1][2:5] = 0, 0
    free = case in ("orpo", "simpo", "certain")
    use_lengths = free or case.endswith("_mean")
    anchor = {"kto": 0.3, "bco_shifted": -0.4}.get(case)
    divergence = {"js_mean": "js_divergence", "forward_kl": "alpha_divergence", "alpha_large_gap": "alpha_divergence"}
    divergence = divergence.get(case, case)
    return {
        "chosen": log_probs[0].to(device, dtype),
        "rejected": log_probs[1].to(device, dtype),
        "ref_chosen": None if free else ref[0].to(device, dtype),
        "ref_rejected": None if free else ref[1].to(device, dtype),
        "chosen_lengths": lengths[0].to(device) if use_lengths else None,
        "rejected_lengths": lengths[1].to(device) if use_lengths else None,
        "anchor": None if anchor is None else torch.tensor(anchor, dtype=dtype, device=device),
        "term": term,
        "beta": 2.0 if case == "simpo" else 0.1,
        "a": a,
        "b": b,
        "divergence": divergence if divergence in DIVERGENCES else "reverse_kl",
        "alpha": 0.0 if case == "forward_kl" else 0.7,
    }
