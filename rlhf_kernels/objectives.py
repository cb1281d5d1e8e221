"""Policy objectives by their published names: which term of `policy_loss` each is, and its parameters.

Each is a frozen dataclass whose fields are checked when it is made. `numbers()` gives the fields of reference.policy's
Settings; `select()` what an objective chooses over the whole batch before the walk over its tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._checks import check_in, check_range
from .reference.policy import ESTIMATORS, KL_GRADIENTS, TERMS

_INF = math.inf


def _band(low, high, name_low="low", name_high="high"):
    """(1 - low, 1 + high), high = low where it is None; low at most 1."""
    check_range(name_low, low, 0, 1)
    if high is not None:
        check_range(name_high, high, 0)
    return {"a": 1.0 - float(low), "b": 1.0 + float(low if high is None else high)}


@dataclass(frozen=True)
class Objective:
    """Base of the policy objectives."""

    term = ""
    selects = False  # whether select() chooses anything

    def __post_init__(self):
        self.numbers()

    def numbers(self) -> dict[str, float]:
        """{field of Settings: number}; raises ValueError where a parameter is out of its range."""
        return {"term": float(TERMS.index(self.term))}

    def select(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor):
        """(factor of each token's loss or None, its coefficient or None), [B, T], from the whole batch."""
        return None, None


@dataclass(frozen=True)
class Clip(Objective):
    """PPO's clipped surrogate: max(-A r, -A clip(r, 1 - low, 1 + high)), Schulman et al. 2017, eq. (7).

    Args:
        low: how far below 1 the ratio counts, >= 0 and <= 1, default 0.2.
        high: how far above 1, >= 0; None, the default, for low. DAPO (arXiv 2503.14476): 0.28.
        dual: bound on the ratio where A < 0 (Ye et al. 2020), > 1; None, the default, for no bound. verl: 3.
    """

    low: float = 0.2
    high: float | None = None
    dual: float | None = None
    term = "clip"

    def numbers(self):
        if self.dual is not None:
            check_range("dual", self.dual, 1, low_open=True)
        return {**super().numbers(), **_band(self.low, self.high), "c": _INF if self.dual is None else float(self.dual)}


@dataclass(frozen=True)
class GSPO(Objective):
    """The clipped surrogate of the sequence's ratio, exp(mean over its tokens of log r), arXiv 2507.18071.

    Each token's gradient is that of its own place in the ratio, as the paper's GSPO-token; where the advantages of a
    sequence are equal, that is the gradient of the whole sequence's term under loss_agg_mode="seq-mean-token-mean".

    Args:
        low: how far below 1 the ratio counts, >= 0 and <= 1, default 3e-4, the paper's.
        high: how far above 1, >= 0; None for low; default 4e-4, the paper's.
    """

    low: float = 3e-4
    high: float | None = 4e-4
    term = "sequence"

    def numbers(self):
        return {**super().numbers(), **_band(self.low, self.high)}


@dataclass(frozen=True)
class RLOO(Objective):
    """REINFORCE over whole sequences, for leave-one-out advantages: -A log p, arXiv 2402.14740.

    With `low` the clipped surrogate of the sequence's ratio, exp(sum over its tokens of log r), as TRL's RLOOTrainer.
    The sequence's loss is -A times that; use loss_agg_mode="seq-mean-token-mean" for it, and "seq-mean-token-sum" for
    the ratio-free form.

    Args:
        low: None, the default, for no ratio; else how far below 1 the ratio counts, >= 0 and <= 1.
        high: how far above 1, >= 0; None, the default, for low.
    """

    low: float | None = None
    high: float | None = None
    term = "plain"

    def numbers(self):
        if self.low is None:
            if self.high is not None:
                raise ValueError(
                    f"high is {self.high!r}, expected None where low is None: without a ratio nothing is clipped"
                )
            return super().numbers()
        return {"term": float(TERMS.index("sequence")), **_band(self.low, self.high), "d": 1.0}


@dataclass(frozen=True)
class Reinforce(Objective):
    """REINFORCE: -A log p, Williams 1992; no ratio, so that the tokens should come from the policy as it is."""

    term = "plain"


@dataclass(frozen=True)
class GPG(Reinforce):
    """Group policy gradient: -A log p, arXiv 2504.02546; REINFORCE's term under the name that verl gives it."""


@dataclass(frozen=True)
class CISPO(Objective):
    """Clipped importance weights: -sg(clip(r, 1 - low, 1 + high)) A log p, MiniMax-M1, arXiv 2506.13585.

    Every token keeps a gradient; the weight alone is held.

    Args:
        low: how far below 1 the weight may go, >= 0 and <= 1; None, the default, for no lower bound.
        high: how far above 1, >= 0, default 4.0: weights of at most 5, which TRL writes as epsilon_high=5.
    """

    low: float | None = None
    high: float = 4.0
    term = "cispo"

    def numbers(self):
        return {**super().numbers(), **_band(1.0 if self.low is None else self.low, self.high)}


@dataclass(frozen=True)
class SAPO(Objective):
    """Soft gate instead of a clip: -(4 / t) sigmoid(t (r - 1)) A, arXiv 2511.20347.

    Args:
        positive: t where A > 0, > 0, default 1.0.
        negative: t elsewhere, > 0, default 1.05.
    """

    positive: float = 1.0
    negative: float = 1.05
    term = "sapo"

    def numbers(self):
        check_range("positive", self.positive, 0, _INF, low_open=True, high_open=True)
        check_range("negative", self.negative, 0, _INF, low_open=True, high_open=True)
        return {**super().numbers(), "a": float(self.positive), "b": float(self.negative)}


@dataclass(frozen=True)
class GMPO(Objective):
    """Geometric mean of the token ratios, each clipped on its log: -mean(A) exp(mean log r'), arXiv 2507.20673.

    Use loss_agg_mode="seq-mean-token-mean", for which it is the paper's mean over sequences.

    Args:
        low: log r' is at least -low where A < 0, >= 0, default 0.4.
        high: and at most high where A > 0, >= 0; None, the default, for low.
    """

    low: float = 0.4
    high: float | None = None
    term = "gmpo"

    def numbers(self):
        check_range("low", self.low, 0)
        if self.high is not None:
            check_range("high", self.high, 0)
        high = self.low if self.high is None else self.high
        return {**super().numbers(), "a": float(self.low), "b": float(high)}


@dataclass(frozen=True)
class DPPO(Objective):
    """-sg(min(r, ratio_cap)) A log p where the policy stays near the old one, 0 elsewhere, arXiv 2602.04879.

    What is held is the divergence between the coins that say whether the sampled token comes, not the ratio: a rare
    token may change by a large factor.

    Args:
        divergence: "tv", the default, |p - old p|; or "kl", KL(old coin || coin).
        low: the most that p may have fallen where A <= 0, >= 0, default 0.2.
        high: the most that it may have risen where A > 0, >= 0; None, the default, for low.
        ratio_cap: > 0, the largest weight, default 20.0; None for no cap.
    """

    divergence: Literal["tv", "kl"] = "tv"
    low: float = 0.2
    high: float | None = None
    ratio_cap: float | None = 20.0

    def numbers(self):
        check_in("divergence", self.divergence, ("tv", "kl"))
        check_range("low", self.low, 0)
        if self.high is not None:
            check_range("high", self.high, 0)
        if self.ratio_cap is not None:
            check_range("ratio_cap", self.ratio_cap, 0, low_open=True)
        high = self.low if self.high is None else self.high
        cap = _INF if self.ratio_cap is None else float(self.ratio_cap)
        term = float(TERMS.index(f"dppo_{self.divergence}"))
        return {"term": term, "a": float(self.low), "b": float(high), "c": cap}


@dataclass(frozen=True)
class DRO(Objective):
    """Direct reward optimisation: -(A log p - beta / 2 (log r)^2), arXiv 2405.19107.

    Args:
        beta: > 0, weight of the squared log-ratio.
    """

    beta: float
    term = "dro"

    def numbers(self):
        check_range("beta", self.beta, 0, _INF, low_open=True, high_open=True)
        return {**super().numbers(), "a": float(self.beta)}


def _covariance(log_probs, advantages, mask):
    """(A - mean A)(log p - mean log p) of each kept token, in fp32 or fp64, and the number of kept tokens."""
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    count = mask.sum()
    centred = []
    for x in (advantages, log_probs):
        x = torch.where(mask, x.detach().to(dtype), 0)
        centred.append(torch.where(mask, x - x.sum() / count.clamp(min=1), 0))
    return centred[0] * centred[1], count


def _largest(keys, among, count):
    """[B, T] bool: the `count` (0-d tensor) entries of `among` with the largest keys; of equal ones the first."""
    order = torch.where(among, keys, -_INF).reshape(-1).argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.numel(), dtype=torch.int64, device=order.device)
    )
    return (place < count).view(among.shape) & among


@dataclass(frozen=True)
class ClipCov(Objective):
    """Clip, and no gradient for a few tokens drawn among those of large covariance of A and log p, arXiv 2505.22617.

    max(1, ratio * tokens) tokens are drawn whose covariance (A - mean A)(log p - mean log p) lies between cov_low and
    cov_high and which the clip does not hold; they count in the mean with a loss of 0. Tokens are drawn from the
    default generator of their device, and one sort of the batch orders them.

    Args:
        low: as in `Clip`, default 0.2.
        high: as in `Clip`, default None.
        ratio: share of the tokens to draw, > 0 and <= 1, default 2e-4.
        cov_low: default 1.0.
        cov_high: > cov_low, default 5.0.
    """

    low: float = 0.2
    high: float | None = None
    ratio: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    term = "clip"
    selects = True

    def numbers(self):
        check_range("ratio", self.ratio, 0, 1, low_open=True)
        check_range("cov_low", self.cov_low)
        check_range("cov_high", self.cov_high, self.cov_low, low_open=True)
        return {**super().numbers(), **_band(self.low, self.high)}

    def select(self, log_probs, old_log_probs, advantages, mask):
        covariance, count = _covariance(log_probs, advantages, mask)
        band = _band(self.low, self.high)
        ratio = torch.exp((log_probs.detach() - old_log_probs.detach()).to(covariance.dtype))
        held = ((advantages > 0) & (ratio > band["b"])) | ((advantages < 0) & (ratio < band["a"]))
        among = mask & ~held & (covariance > self.cov_low) & (covariance < self.cov_high)
        drawn = _largest(torch.rand_like(covariance), among, (self.ratio * count).floor().clamp(min=1))
        return (~drawn).to(covariance.dtype), None


@dataclass(frozen=True)
class KLCov(Objective):
    """-A r, and + coef |log r| for the tokens of largest covariance of A and log p, arXiv 2505.22617.

    Args:
        coef: >= 0, default 1.0.
        ratio: share of the tokens that are held, > 0 and <= 1, at least one token, default 2e-4.
    """

    coef: float = 1.0
    ratio: float = 2e-4
    term = "kl_cov"
    selects = True

    def numbers(self):
        check_range("coef", self.coef, 0)
        check_range("ratio", self.ratio, 0, 1, low_open=True)
        return super().numbers()

    def select(self, log_probs, old_log_probs, advantages, mask):
        covariance, count = _covariance(log_probs, advantages, mask)
        chosen = _largest(covariance, mask, (self.ratio * count).floor().clamp(min=1))
        return None, self.coef * chosen.to(covariance.dtype)


@dataclass(frozen=True)
class KLTerm:
    """The KL to a reference inside the policy loss: coef times an estimate of it for each token.

    With e = log_prob - ref_log_prob, in nats.

    Args:
        coef: >= 0, its weight in the loss.
        estimator: "k1" e, "k2" e^2 / 2, "k3", the default, exp(-e) - 1 + e, or "abs" |e|.
        gradient: "plain", the default: of the estimate itself, which for k1 is 0 in the mean, and for k3 that of the
            forward KL. "straight_through": of k2 whatever the estimate, which is the gradient of the reverse KL on
            samples of the policy as it is (verl's "+"). "ratio": of the estimate times the token's ratio, both
            differentiated, as TRL's use_bias_correction_kl; the value is multiplied too. "straight_through_ratio":
            of k2 times the ratio (a constant, held at ratio_cap), as OpenRLHF's unbiased_gradient.
        clamp_input: e is held within +- this number, or within (low, high), before the estimate; None, the default,
            for no bound. verl's k3: 20. OpenRLHF's k3: (-10, inf).
        clamp_output: the estimate is held within +- this number, None, the default, for no bound. verl's k3 and
            OpenRLHF: 10. A clamp that holds has no gradient, but where the gradient is straight-through.
        ratio_cap: > 0, bound on the ratio of "straight_through_ratio"; None, the default. OpenRLHF: 10.
    Example:
        >>> KLTerm(0.04).estimator
        'k3'
    """

    coef: float
    estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    gradient: Literal["plain", "straight_through", "ratio", "straight_through_ratio"] = "plain"
    clamp_input: float | tuple[float, float] | None = None
    clamp_output: float | None = None
    ratio_cap: float | None = None

    def __post_init__(self):
        self.numbers()

    def numbers(self) -> dict[str, float]:
        """{field of Settings: number}; raises ValueError where a parameter is out of its range."""
        check_range("coef", self.coef, 0)
        check_in("estimator", self.estimator, ESTIMATORS)
        check_in("gradient", self.gradient, KL_GRADIENTS)
        bounds = self.clamp_input
        if not isinstance(bounds, tuple):
            if bounds is not None:
                check_range("clamp_input", bounds, 0, low_open=True)
            bounds = (-_INF, _INF) if bounds is None else (-bounds, bounds)
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(
                f"clamp_input is {self.clamp_input!r}, expected a number > 0 or (low, high) with low < high"
            )
        if self.clamp_output is not None:
            check_range("clamp_output", self.clamp_output, 0, low_open=True)
        if self.ratio_cap is not None:
            check_range("ratio_cap", self.ratio_cap, 0, low_open=True)
        return {
            "kl_coef": float(self.coef),
            "kl_estimator": float(ESTIMATORS.index(self.estimator)),
            "kl_gradient": float(KL_GRADIENTS.index(self.gradient)),
            "kl_low": float(bounds[0]),
            "kl_high": float(bounds[1]),
            "kl_cap": _INF if self.clamp_output is None else float(self.clamp_output),
            "kl_ratio_cap": _INF if self.ratio_cap is None else float(self.ratio_cap),
        }
