"""Preference losses by their published names: which term of `preference_loss` each is, and its parameters.

Each is a frozen dataclass whose fields are checked when it is made. All share the `beta` of the call. With c and r the
log-prob of the chosen and the rejected response less the reference's (or the scores of another divergence, or either
by token), g = c - r, and s = sigmoid:

    from rlhf_kernels import preference_loss, preferences
    preference_loss(..., loss_type=[(preferences.Sigmoid(), 0.8), (preferences.SFT(), 0.2)])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ._checks import check_dtype, check_in, check_range, check_shape


@dataclass(frozen=True)
class PreferenceObjective:
    """Base of the preference losses."""

    name: ClassVar[str] = ""
    term: ClassVar[str] = ""  # of reference.preference.TERMS
    has_reference: ClassVar[bool] = True
    by_divergence: ClassVar[bool] = False  # compares scores of which another divergence may be taken

    @property
    def by_token(self) -> bool:
        """Whether log-probs are divided by the responses' lengths."""
        return False

    def numbers(self) -> tuple[float, float]:
        """The term's a and b."""
        return 0.0, 0.0


@dataclass(frozen=True)
class _Normalizable(PreferenceObjective):
    length_normalized: bool = field(default=False, kw_only=True)

    def __post_init__(self):
        check_in("length_normalized", self.length_normalized, (False, True))

    @property
    def by_token(self):
        return self.length_normalized


@dataclass(frozen=True)
class _Smoothed(_Normalizable):
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_range("label_smoothing", self.label_smoothing, 0, 0.5, high_open=True)

    def numbers(self):
        return float(self.label_smoothing), 0.0


@dataclass(frozen=True)
class Sigmoid(_Smoothed):
    """DPO: -(1 - e) log s(beta g) - e log s(-beta g), Rafailov et al. 2023, eq. (7).

    Args:
        label_smoothing: e, in [0, 0.5), default 0.0: the share of pairs whose label is wrong (conservative DPO).
        length_normalized: log-probs per token, default False; "sigmoid_norm" is this loss with True.
    """

    name = "sigmoid"
    term = "sigmoid"
    by_divergence = True


@dataclass(frozen=True)
class Robust(_Smoothed):
    """Robust DPO: (-(1 - e) log s(beta g) + e log s(-beta g)) / (1 - 2 e), Chowdhury et al. 2024, eq. (11).

    The loss of the right labels on average over labels of which a share e is flipped; a single pair's may be below 0.

    Args:
        label_smoothing: e, in [0, 0.5), default 0.0; the paper: 0.1.
        length_normalized: log-probs per token, default False.
    """

    name = "robust"
    term = "sigmoid"
    by_divergence = True

    def numbers(self):  # -log s(x) - e x / (1 - 2 e)
        return -self.label_smoothing / (1 - 2 * self.label_smoothing), 0.0


@dataclass(frozen=True)
class Hinge(_Normalizable):
    """max(0, 1 - beta g): SLiC, Zhao et al. 2023, normalised by the reference.

    Args:
        length_normalized: log-probs per token, default False.
    """

    name = "hinge"
    term = "hinge"
    by_divergence = True


@dataclass(frozen=True)
class IPO(_Normalizable):
    """(g - 1 / (2 beta))^2, Azar et al. 2023, eq. (17).

    Args:
        length_normalized: log-probs per token, default False; TRL's "ipo" is this loss with True, here "ipo_norm".
    """

    name = "ipo"
    term = "ipo"
    by_divergence = True


@dataclass(frozen=True)
class ExoPair(_Normalizable):
    """EXO: KL(q || p), q = s(beta g) against p = 1 - e, Ji et al. 2024, eq. (16).

    Args:
        label_smoothing: e, in (0, 0.5), default 1e-3, the paper's.
        length_normalized: log-probs per token, default False.
    """

    label_smoothing: float = 1e-3
    name = "exo_pair"
    term = "exo_pair"
    by_divergence = True

    def __post_init__(self):
        super().__post_init__()
        check_range("label_smoothing of exo_pair", self.label_smoothing, 0, 0.5, low_open=True, high_open=True)

    def numbers(self):
        return -math.log1p(-self.label_smoothing), -math.log(self.label_smoothing)


@dataclass(frozen=True)
class DiscoPOP(_Normalizable):
    """Log-ratio modulated loss: (1 - m)(-log s(x)) + m e^-x, x = beta g, m = s(x / tau), Lu et al. 2024, eq. (5).

    Args:
        tau: > 0, default 0.05, the paper's.
        length_normalized: log-probs per token, default False.
    """

    tau: float = 0.05
    name = "discopop"
    term = "discopop"
    by_divergence = True

    def __post_init__(self):
        super().__post_init__()
        check_range("tau", self.tau, 0, low_open=True)

    def numbers(self):
        return float(self.tau), 0.0


@dataclass(frozen=True)
class NCAPair(_Normalizable):
    """-log s(beta c) - 1/2 log s(-beta c) - 1/2 log s(-beta r), Chen et al. 2024 (noise contrastive alignment).

    Args:
        length_normalized: log-probs per token, default False.
    """

    name = "nca_pair"
    term = "nca_pair"


@dataclass(frozen=True)
class BCOPair(_Normalizable):
    """-log s(beta c - delta) - log s(delta - beta r), Jung et al. 2024 (binary classifier optimization).

    Args:
        delta: number or 0-d tensor, a constant: the paper's running mean of the rewards of both sides. Default 0.0,
            as in TRL's DPO trainer.
        length_normalized: log-probs per token, default False.
    """

    delta: float | Tensor = 0.0
    name = "bco_pair"
    term = "bco_pair"

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.delta, Tensor):
            check_dtype("delta", self.delta)
            check_shape("delta", self.delta, (), "a number or a 0-d tensor")
        else:
            check_range("delta", self.delta)


@dataclass(frozen=True)
class SPPOHard(_Normalizable):
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2, Wu et al. 2024, eq. (4.7) with win rates of 1 and 0.

    Args:
        length_normalized: log-probs per token, default False.
    """

    name = "sppo_hard"
    term = "sppo_hard"


@dataclass(frozen=True)
class AOT(_Smoothed):
    """DPO's loss of sorted gaps: g_(i) = the i-th smallest log pi(chosen) - log pi(rejected), less the i-th smallest of
    the reference, among the call's pairs, Melnyk et al. 2024 (distributional alignment by optimal transport).

    Entry i of an unreduced loss belongs to the i-th smallest gaps, not to pair i.

    Args:
        label_smoothing: in [0, 0.5), default 0.0.
        length_normalized: log-probs per token, default False.
    """

    name = "aot"
    term = "sigmoid"


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """As AOT, with g_(i) = c_(i) - r_(i): chosen and rejected sorted apart, so that pairs do not matter.

    Args:
        label_smoothing: in [0, 0.5), default 0.0.
        length_normalized: log-probs per token, default False.
    """

    name = "aot_unpaired"


@dataclass(frozen=True)
class APOZero(_Normalizable):
    """s(-beta c) + s(beta r), D'Oosterlinck et al. 2024, eq. (7): for chosen responses better than the model's own.

    Args:
        length_normalized: log-probs per token, default False.
    """

    name = "apo_zero"
    term = "apo_zero"


@dataclass(frozen=True)
class APODown(_Normalizable):
    """s(beta c) + s(-beta g), D'Oosterlinck et al. 2024, eq. (8): for chosen responses worse than the model's own.

    Args:
        length_normalized: log-probs per token, default False.
    """

    name = "apo_down"
    term = "apo_down"


@dataclass(frozen=True)
class SimPO(PreferenceObjective):
    """-(1 - e) log s(x) - e log s(-x), x = beta (l_c - l_r) - target_margin, l = log-prob per token: no reference,
    Meng et al. 2024, eq. (6).

    Args:
        target_margin: >= 0, default 0.5, the reward gap to reach.
        label_smoothing: e, in [0, 0.5), default 0.0.
    """

    target_margin: float = 0.5
    label_smoothing: float = 0.0
    name = "simpo"
    term = "sigmoid"
    has_reference = False
    by_token = True

    def __post_init__(self):
        check_range("target_margin", self.target_margin, 0)
        check_range("label_smoothing", self.label_smoothing, 0, 0.5, high_open=True)

    def numbers(self):
        return float(self.label_smoothing), float(self.target_margin)


@dataclass(frozen=True)
class ORPO(PreferenceObjective):
    """-l_c - beta log s(log odds_c - log odds_r), l = log-prob per token, odds = p / (1 - p), p = e^l: no reference,
    Hong et al. 2024, eq. (6), the likelihood term averaged within each response.
    """

    name = "orpo"
    term = "orpo"
    has_reference = False
    by_token = True


@dataclass(frozen=True)
class SFT(PreferenceObjective):
    """-log pi(chosen) / mean_length: its mean is the negative log-likelihood of a chosen token; no reference, no beta.

    Args:
        mean_length: number or 0-d tensor, the mean tokens of a chosen response over the whole batch, of which this
            call may be a part; None, the default: of this call's.
    """

    mean_length: float | Tensor | None = None
    name = "sft"
    has_reference = False
    by_divergence = True
    by_token = True

    def __post_init__(self):
        if isinstance(self.mean_length, Tensor):
            check_shape("mean_length", self.mean_length, (), "a number or a 0-d tensor")
        elif self.mean_length is not None:
            check_range("mean_length", self.mean_length, 0, low_open=True)


@dataclass(frozen=True)
class KTO(_Normalizable):
    """w_c s(-beta (c - z)) for each chosen and w_r s(-beta (z - r)) for each rejected response, z = max(kl, 0),
    Ethayarajh et al. 2024, eq. (7). Unpaired: it stands alone.

    Args:
        desirable_weight: w_c > 0, default 1.0.
        undesirable_weight: w_r > 0, default 1.0.
        length_normalized: log-probs per token, default False.
    """

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    name = "kto"
    term = "kto"

    def __post_init__(self):
        super().__post_init__()
        check_range("desirable_weight", self.desirable_weight, 0, low_open=True)
        check_range("undesirable_weight", self.undesirable_weight, 0, low_open=True)

    def numbers(self):
        return float(self.desirable_weight), float(self.undesirable_weight)


@dataclass(frozen=True)
class AlphaDivergence:
    """f'(t) = (t^(alpha - 1) - 1) / (alpha - 1), t = pi / ref, in place of log t: f-DPO, Wang et al. 2023.

    The paper's alpha is 1 minus this one, which is TRL's f_alpha_divergence_coef. 1 is the reverse KL (DPO), 0 the
    forward KL. Exponents are held at 80: a response that much less likely than under the reference has no gradient.

    Args:
        alpha: a finite number, default 0.5; the paper's range is 0 to 1.
    """

    alpha: float = 0.5

    def __post_init__(self):
        check_range("alpha", self.alpha, -1e6, 1e6)


_CLASSES = (
    Sigmoid, IPO, Hinge, ORPO, SimPO, KTO, Robust, ExoPair, DiscoPOP, NCAPair, BCOPair, SPPOHard, AOT, AOTUnpaired,
    APOZero, APODown, SFT,
)  # fmt: skip
BY_NAME = {loss.name: (loss, {}) for loss in _CLASSES} | {
    "sigmoid_norm": (Sigmoid, {"length_normalized": True}),
    "ipo_norm": (IPO, {"length_normalized": True}),
}
"""{loss_type: (class, fields)}."""
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def divergence_numbers(divergence: str | AlphaDivergence) -> tuple[str, float]:
    """(divergence, alpha) as the terms take them."""
    if not isinstance(divergence, AlphaDivergence):
        check_in("divergence", divergence, DIVERGENCES)
        if divergence in ("reverse_kl", "js_divergence"):
            return divergence, 1.0
        divergence = AlphaDivergence(0.0 if divergence == "forward_kl" else 0.5)
    if abs(divergence.alpha - 1) < 1e-6:
        return "reverse_kl", 1.0
    return "alpha_divergence", float(divergence.alpha)


def losses_of(loss_type, fields: dict, by_token: bool) -> list[tuple[PreferenceObjective, float]]:
    """[(loss, weight)] of a loss_type: a name, a loss, or a sequence of names, losses and (either, weight).

    Args:
        fields: {field: value or None} that the caller gives to those of the named losses that have it.
        by_token: a single name takes log-probs per token.
    """
    several = isinstance(loss_type, Sequence) and not isinstance(loss_type, str)
    entries = list(loss_type) if several else [loss_type]
    if not entries:
        raise ValueError("loss_type is empty, expected at least one loss")
    found, taken = [], set()
    for entry in entries:
        loss, weight = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, 1.0)
        check_range("the weight of a loss", weight)
        if isinstance(loss, PreferenceObjective):
            found.append((loss, float(weight)))
            continue
        check_in("loss_type", loss, tuple(BY_NAME))
        kind, own = BY_NAME[loss]
        names = kind.__dataclass_fields__.keys()
        given = {name: value for name, value in fields.items() if value is not None and name in names}
        taken |= given.keys()
        if kind is ExoPair and not given:
            raise ValueError("label_smoothing is 0.0, but loss_type='exo_pair' needs a number > 0; the paper: 1e-3")
        if by_token and not several and "length_normalized" in names:
            own = {"length_normalized": True}
        found.append((kind(**own, **given), float(weight)))
    _check_taken(loss_type, fields, taken)
    if len(found) > 1 and any(isinstance(loss, KTO) for loss, _ in found):
        raise ValueError("loss_type holds 'kto', which is unpaired, beside other losses; it stands alone")
    return found


def _check_taken(loss_type, fields, taken):
    owners = {"target_margin": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto"}
    for name, value in fields.items():
        if value is None or name in taken:
            continue
        if name in owners:
            raise ValueError(f"{name} is an argument of loss_type={owners[name]!r} only, got loss_type={loss_type!r}")
        raise ValueError(f"{name}={value!r} has no meaning for loss_type={loss_type!r}; use 0.0")
