"""The policy loss: one walk over the tokens for every objective, the KL to a reference, values and entropy.

What a backend provides, under these names, all tensors contiguous:

    policy_fwd(tensors: Tensors, settings: Settings)
        -> (losses, grad_log_probs, grad_values, grad_entropy, stats)
    policy_total_fwd(tensors, settings), where there is a policy or there are values, and not both
        -> (loss, and those); a backend may be without: the loss is then made of the parts, in further launches
    policy_bwd(grad_loss, grad_policy_loss, grad_value_loss, grad_log_probs, grad_values, grad_entropy, vf_coef)
        -> the three gradients, each times the upstream gradients of the losses that it is part of

    losses  [4] policy, kl, value (with its factor 1/2), entropy, each aggregated, none scaled; fp64 for fp64 inputs,
            otherwise fp32; 0 for an absent part
    grad_x  [B, T] dtype of losses, 0 under mask 0; [0] where x is None. grad_log_probs is that of policy + kl_coef kl,
            grad_values and grad_entropy that of their loss times value_scale, entropy_scale
    stats   [len(STATS)] dtype of losses, 0 for those of an absent input, NaN where there is nothing to average

A token's term of the objective, with u = log_prob - old_log_prob held within +-log_ratio_clamp, r = exp(u), A its
advantage; `slope` is d loss / d log_prob, which is what enters grad_log_probs. a, b, c, d are the settings' numbers.

    clip      max(-A r, -A clip(r, a, b)), at most -A c where A < 0                     slope -A r, or 0 where held
    sequence  the same of s = exp(mean of u over the sequence, or its sum where d), as if s moved with each token alone
              slope -A s (times the sequence's length where d), or 0 where held
    cispo     -sg(clip(r, a, b)) A log_prob                                             slope -A clip(r, a, b)
    sapo      -4/t sigmoid(t (r - 1)) A, t = a where A > 0, else b                      slope -4 A r g (1 - g)
    gmpo      -mean(A) exp(mean of v), v = u, but at most b where A > 0, at least -a where A < 0, 0 where A = 0
              slope -mean(A) exp(mean of v), or 0 where v is held
    dppo_tv   -sg(min(r, c)) A log_prob, 0 where p - p_old > b and A > 0 or p - p_old < -a and A <= 0     slope likewise
    dppo_kl   the same, 0 where the binary KL(p_old || p) exceeds b (A > 0 and p > p_old) or a (A <= 0 and p < p_old)
    plain     -A log_prob                                                               slope -A
    dro       -(A log_prob - a/2 u^2)                                                   slope -(A - a u)
    kl_cov    -A r + k |u|, k the token's coefficient                                   slope -A r + k sign(u)

The KL's term, with e = log_prob - ref_log_prob, e' = e held within [kl_low, kl_high], k' held within +-kl_cap:

    k1 e'    k2 e'^2 / 2    k3 exp(-e') - 1 + e'    abs |e'|
    gradient "plain": of that; "straight_through": e, k2's; "ratio": of r k', r the token's own ratio;
    "straight_through_ratio": min(r, kl_ratio_cap) e, with the value of "plain"
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .logprobs import Upstream
from .ppo import AGG_MODES, _value_terms, accumulator_dtype, aggregation_weights, ppo_bwd

TERMS = ("clip", "sequence", "cispo", "sapo", "gmpo", "dppo_tv", "dppo_kl", "plain", "dro", "kl_cov")
ESTIMATORS = ("k1", "k2", "k3", "abs")
KL_GRADIENTS = ("plain", "straight_through", "ratio", "straight_through_ratio")
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
    "approx_kl_k1",
    "approx_kl_k3",
    "clip_fraction_low",
    "clip_fraction_high",
    "ref_kl",
    "effective_sample_size",
    "filtered_fraction",
)
INF = float("inf")
CASES = ("plain", "masked", "everything", "far", "one_token", "empty_mask", "empty")

policy_bwd = ppo_bwd


class Tensors(NamedTuple):
    """Inputs of the walk, [B, T] where not said otherwise; an absent part is None. NaN is allowed under mask 0."""

    mask: Tensor  # bool, 1 = keep
    log_probs: Tensor | None = None  # None: no policy, and no KL
    old_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    ref_log_probs: Tensor | None = None  # None: no KL
    weights: Tensor | None = None  # factor of each token's policy term
    coefficients: Tensor | None = None  # kl_cov's k
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    entropy: Tensor | None = None
    normalizer: Tensor | None = None  # 0-d
    entropy_normalizer: Tensor | None = None  # 0-d


class Settings(NamedTuple):
    """Numbers of the walk, all of which pass an operator as a list of floats."""

    term: float = 0  # index in TERMS
    a: float = 0.8
    b: float = 1.2
    c: float = INF
    d: float = 0.0
    log_ratio_clamp: float = INF
    kl_estimator: float = 0  # index in ESTIMATORS
    kl_gradient: float = 0  # index in KL_GRADIENTS
    kl_coef: float = 0.0
    kl_low: float = -INF
    kl_high: float = INF
    kl_cap: float = INF
    kl_ratio_cap: float = INF
    cliprange_value: float = INF
    value_scale: float = 1.0
    entropy_scale: float = 1.0
    loss_agg_mode: float = 0  # index in AGG_MODES
    entropy_agg_mode: float = 0

    @property
    def by_sequence(self) -> bool:
        """Whether the objective needs a number of the whole sequence first."""
        return TERMS[int(self.term)] in ("sequence", "gmpo")


class Term(NamedTuple):
    """A token's part of the policy loss: its value, d / d log_prob, and why the latter may be 0."""

    ratio: Tensor
    loss: Tensor
    slope: Tensor
    low: Tensor  # bool
    high: Tensor
    bounded: Tensor


def _gmpo_held(log_ratio, advantage, s):
    high = (advantage > 0) & (log_ratio > s.b)
    low = (advantage < 0) & (log_ratio < -s.a)
    return low, high


def sequence_numbers(log_ratio: Tensor, advantage: Tensor, mask: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(log of the sequence's ratio, mean advantage, kept tokens), each [B, 1]; the first is all that "sequence" reads.

    log_ratio and advantage hold 0 under mask 0.
    """
    length = mask.sum(-1, keepdim=True).to(log_ratio.dtype)
    count = length.clamp(min=1)
    if TERMS[int(s.term)] == "gmpo":
        low, high = _gmpo_held(log_ratio, advantage, s)
        held = torch.where(low, -s.a, torch.where(high, s.b, log_ratio))
        held = torch.where(advantage == 0, 0, held)
        return held.sum(-1, keepdim=True) / count, advantage.sum(-1, keepdim=True) / count, length
    total = log_ratio.sum(-1, keepdim=True)
    return total if s.d else total / count, advantage, length


def _clipped(ratio, advantage, s):
    """(ratio held as the sign of A says, below, above, bounded): A > 0 at most b, A < 0 at least a and at most c."""
    gain, harm = advantage > 0, advantage < 0
    low, high, bounded = harm & (ratio < s.a), gain & (ratio > s.b), harm & (ratio > s.c)
    used = torch.where(low, s.a, torch.where(high, s.b, torch.where(bounded, s.c, ratio)))
    return torch.where(advantage == 0, 0, used), low, high, bounded


def binary_kl(old_log_prob: Tensor, log_prob: Tensor) -> Tensor:
    """KL between the coins that say whether the sampled token comes: old p log(old p / p) + (1 - old p) log(...)."""
    old = torch.exp(old_log_prob)
    rest_old = torch.log((-torch.expm1(old_log_prob)).clamp(min=0))
    rest = torch.log((-torch.expm1(log_prob)).clamp(min=0))
    other = torch.where(old_log_prob >= 0, 0, -torch.expm1(old_log_prob) * (rest_old - rest))
    return old * (old_log_prob - log_prob) + other


def policy_term(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, sequence, coefficient: Tensor | None, s: Settings
) -> Term:
    """The objective's term of each token, any shape; masked tokens hold 0. `sequence` as `sequence_numbers` made it."""
    name = TERMS[int(s.term)]
    raw = log_prob - old_log_prob
    u = raw.clamp(-s.log_ratio_clamp, s.log_ratio_clamp)
    moves = raw.abs() <= s.log_ratio_clamp
    ratio = torch.exp(u)
    no = torch.zeros_like(u, dtype=torch.bool)
    if name == "clip":
        used, low, high, bounded = _clipped(ratio, advantage, s)
        slope = torch.where(low | high | bounded | ~moves | (advantage == 0), 0, -advantage * ratio)
        return Term(ratio, -advantage * used, slope, low, high, bounded)
    if name == "sequence":
        log_ratio, _, length = sequence
        ratio = torch.exp(log_ratio).expand_as(u)
        used, low, high, bounded = _clipped(ratio, advantage, s)
        slope = torch.where(low | high | bounded | ~moves | (advantage == 0), 0, -advantage * ratio)
        return Term(ratio, -advantage * used, slope * length if s.d else slope, low, high, bounded)
    if name == "cispo":
        held = ratio.clamp(s.a, s.b)
        slope = torch.where(advantage == 0, 0, -advantage * held)
        return Term(ratio, slope * log_prob, slope, ratio < s.a, ratio > s.b, no)
    if name == "sapo":
        t = torch.where(advantage > 0, s.a, torch.full_like(advantage, s.b))
        gate = torch.sigmoid(t * (ratio - 1))
        steep = torch.where(moves, ratio * gate * torch.sigmoid(-t * (ratio - 1)), 0)
        return Term(ratio, -4 / t * gate * advantage, -4 * advantage * steep.nan_to_num(0), no, no, no)
    if name == "gmpo":
        log_ratio, mean, _ = sequence
        low, high = _gmpo_held(u, advantage, s)
        loss = (-mean * torch.exp(log_ratio)).expand_as(u)
        return Term(ratio, loss, torch.where(low | high | ~moves | (advantage == 0), 0, loss), low, high, no)
    if name in ("dppo_tv", "dppo_kl"):
        p, old = torch.exp(log_prob), torch.exp(old_log_prob)
        if name == "dppo_tv":
            high, low = p - old > s.b, p - old < -s.a
        else:
            gap = binary_kl(old_log_prob, log_prob)
            high, low = (gap > s.b) & (p > old), (gap > s.a) & (p < old)
        high, low = high & (advantage > 0), low & (advantage <= 0)
        slope = torch.where(low | high | (advantage == 0), 0, -advantage * ratio.clamp(max=s.c))
        return Term(ratio, slope * log_prob, slope, low, high, ~low & ~high & (ratio > s.c))
    if name == "plain":
        return Term(ratio, -advantage * log_prob, -advantage, no, no, no)
    if name == "dro":
        slope = torch.where(moves, s.a * u, 0) - advantage
        return Term(ratio, s.a / 2 * u.square() - advantage * log_prob, slope, no, no, no)
    unclipped = torch.where(advantage == 0, 0, -advantage * ratio)  # kl_cov
    slope = torch.where(moves, unclipped + coefficient * torch.sign(u), 0)
    return Term(ratio, unclipped + coefficient * u.abs(), slope, no, no, no)


def kl_term(log_prob: Tensor, ref_log_prob: Tensor, old_log_prob: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """The KL estimate of each token, and d / d log_prob of it; masked tokens hold 0."""
    name, gradient = ESTIMATORS[int(s.kl_estimator)], KL_GRADIENTS[int(s.kl_gradient)]
    e = log_prob - ref_log_prob
    held = e.clamp(s.kl_low, s.kl_high)
    if name == "k1":
        value, slope = held, torch.ones_like(held)
    elif name == "k2":
        value, slope = held.square() / 2, held
    elif name == "k3":
        value, slope = torch.expm1(-held) + held, -torch.expm1(-held)
    else:
        value, slope = held.abs(), torch.sign(held)
    inside = (e >= s.kl_low) & (e <= s.kl_high) & (value.abs() <= s.kl_cap)
    value = value.clamp(-s.kl_cap, s.kl_cap)
    slope = torch.where(inside, slope, 0)
    if gradient == "straight_through":
        return value, e
    if gradient == "plain":
        return value, slope
    raw = log_prob - old_log_prob
    ratio = torch.exp(raw.clamp(-s.log_ratio_clamp, s.log_ratio_clamp))
    if gradient == "straight_through_ratio":
        return value, ratio.clamp(max=s.kl_ratio_cap) * e
    moves = raw.abs() <= s.log_ratio_clamp
    whole = slope + torch.where(moves, value, 0)
    if name == "k3":
        whole = torch.where(inside & moves, e, whole)  # the same, without its cancellation
    return ratio * value, ratio * whole


def kept(x: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """x in this dtype, 0 under mask 0."""
    return None if x is None else torch.where(mask, x.to(dtype), 0)


def weights_of(tensors: Tensors, settings: Settings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(weight of each token in policy, kl and value loss, weight in the entropy), [B, T], 0 under mask 0."""
    modes = AGG_MODES[int(settings.loss_agg_mode)], AGG_MODES[int(settings.entropy_agg_mode)]
    normalizers = tensors.normalizer, tensors.entropy_normalizer
    return tuple(aggregation_weights(tensors.mask, *pair, dtype) for pair in zip(modes, normalizers, strict=True))


def total_loss(losses: Tensor, settings: Settings) -> Tensor:
    """The loss of its parts [4]: policy + kl_coef kl + value_scale value + entropy_scale entropy."""
    total, scales = losses[0], (settings.kl_coef, settings.value_scale, settings.entropy_scale)
    if not any(scales):
        return total.clone()
    for part, scale in enumerate(scales, 1):
        if scale:
            total = total.add(losses[part], alpha=scale)
    return total


def token_gradients(tensors: Tensors, settings: Settings, dtype: torch.dtype, log_probs: Tensor | None = None):
    """f(part, `Rows` of reference/linear.py) -> `Upstream` of a slice of the flat tokens.

    `tensors` are without log_probs and entropy; log_probs [B, T] is needed where the settings are `by_sequence`.
    """
    t, s, mask = tensors, settings, tensors.mask
    weight, entropy_weight = weights_of(t, s, dtype)
    old, advantage, ref, factor, coefficients = (
        kept(x, mask, dtype) for x in (t.old_log_probs, t.advantages, t.ref_log_probs, t.weights, t.coefficients)
    )
    sequence = ()
    if s.by_sequence:
        held = (torch.where(mask, log_probs, 0) - old).clamp(-s.log_ratio_clamp, s.log_ratio_clamp)
        sequence = [x.expand(mask.shape).reshape(-1) for x in sequence_numbers(held, advantage, mask, s)]
    of_policy = weight if factor is None else weight * factor
    flat = (old, advantage, ref, coefficients, weight, of_policy, entropy_weight)
    flat = [None if x is None else x.reshape(-1) for x in flat]

    def gradients(part, rows):
        o, a, r, k, w, of_term, bonus = (None if x is None else x[part] for x in flat)
        slope = of_term * policy_term(rows.log_prob, o, a, [x[part] for x in sequence], k, s).slope
        if r is not None:
            slope = slope + s.kl_coef * w * kl_term(rows.log_prob, r, o, s)[1]
        return Upstream(slope, s.entropy_scale * bonus if s.entropy_scale else None)

    return gradients


def policy_fwd(tensors: Tensors, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses [4], the three gradients, and the statistics, in one pass over the tokens."""
    t, s, mask = tensors, settings, tensors.mask
    dtype = accumulator_dtype((t.values if t.log_probs is None else t.log_probs).dtype)
    weight, entropy_weight = weights_of(t, s, dtype)
    tokens = mask.sum().to(dtype)
    zero = weight.new_zeros(())

    def mean(x):
        return torch.where(mask, x, 0).sum() / tokens

    def variance(x):
        return mean((x - mean(x)).square())

    stats = {"tokens": tokens}
    losses = dict.fromkeys(("policy", "kl", "value", "entropy"), zero)
    grads = [weight.new_empty(0) for _ in range(3)]
    if t.log_probs is not None:
        new, old, advantage = (kept(x, mask, dtype) for x in (t.log_probs, t.old_log_probs, t.advantages))
        raw = new - old
        held = raw.clamp(-s.log_ratio_clamp, s.log_ratio_clamp)
        sequence = sequence_numbers(held, advantage, mask, s) if s.by_sequence else None
        term = policy_term(new, old, advantage, sequence, kept(t.coefficients, mask, dtype), s)
        factor = kept(t.weights, mask, dtype)
        of_policy = weight if factor is None else weight * factor
        losses["policy"] = (of_policy * term.loss).sum()
        grads[0] = of_policy * term.slope
        if t.ref_log_probs is not None:
            value, slope = kl_term(new, kept(t.ref_log_probs, mask, dtype), old, s)
            losses["kl"], grads[0] = (weight * value).sum(), grads[0] + s.kl_coef * weight * slope
            stats["ref_kl"] = mean(value)
        low, high, bounded = (mean(x.to(dtype)) for x in term[3:])
        largest = torch.where(mask, term.ratio, 0).amax() if mask.numel() else zero
        stats |= {
            "approx_kl": mean(0.5 * raw.square()),
            "approx_kl_k1": mean(-raw),
            "approx_kl_k3": mean(torch.expm1(raw) - raw),
            "clip_fraction": low + high,
            "clip_fraction_low": low,
            "clip_fraction_high": high,
            "dual_clip_fraction": bounded,
            "ratio_mean": mean(term.ratio),
            "ratio_var": variance(term.ratio),
            "ratio_max": torch.where(tokens > 0, largest, torch.nan),
        }
        if factor is not None:
            stats["effective_sample_size"] = factor.sum().square() / (tokens * factor.square().sum())
            stats["filtered_fraction"] = mean((factor == 0).to(dtype))
    if t.values is not None:
        value, target = kept(t.values, mask, dtype), kept(t.returns, mask, dtype)
        reach = None if s.cliprange_value == INF else s.cliprange_value
        value_loss, slope, held = _value_terms(value, kept(t.old_values, mask, dtype), target, reach)
        losses["value"], grads[1] = (weight * value_loss).sum(), weight * slope * s.value_scale
        stats["value_clip_fraction"] = mean(held.to(dtype))
        stats["explained_variance"] = 1 - variance(target - value) / variance(target)
        stats["value_mean"], stats["return_mean"] = mean(value), mean(target)
    if t.entropy is not None:
        entropy = kept(t.entropy, mask, dtype)
        losses["entropy"], grads[2] = (entropy_weight * entropy).sum(), entropy_weight * s.entropy_scale
        stats["entropy"] = mean(entropy)
    stats = torch.stack([stats.get(name, zero) for name in STATS])
    return torch.stack(list(losses.values())), *grads, stats


def example_inputs(case: str, *, dtype: torch.dtype, device="cpu", seed: int = 0) -> dict:
    """{"tensors": Tensors, "settings": Settings} for one named case; what stands under the mask is NaN."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"one_token": (1, 1), "empty": (0, 5)}.get(case, (5, 13))

    def normal(scale=1.0):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -normal().abs()
    tensors = {"log_probs": old + normal(30.0 if case == "far" else 0.3), "old_log_probs": old, "advantages": normal()}
    if case != "plain":
        tensors["ref_log_probs"] = old + normal(0.2)
        tensors["weights"] = normal().abs() * (torch.rand(shape, generator=generator, dtype=torch.float32) < 0.8)
    if case == "everything":
        tensors["returns"] = normal()
        tensors["old_values"] = tensors["returns"] + normal(0.5)
        tensors["values"] = tensors["old_values"] + normal(0.3)
        tensors["entropy"] = normal().abs()
    tensors["coefficients"] = normal().abs()
    mask = torch.ones(shape, dtype=torch.bool)
    if case in ("masked", "everything", "far"):
        mask = torch.rand(shape, generator=generator, dtype=torch.float32) < 0.6
        mask[1] = False
    if case == "empty_mask":
        mask[:] = False
    tensors = {name: torch.where(mask, x, torch.nan).to(device, dtype) for name, x in tensors.items()}
    numbers = {"kl_coef": 0.3, "cliprange_value": 0.2} if case == "everything" else {"kl_coef": 0.1}
    return {"tensors": Tensors(mask.to(device), **tensors), "settings": Settings(kl_estimator=2, **numbers)}
