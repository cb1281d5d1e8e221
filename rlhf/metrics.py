"""Numbers of a run: weighted means over a loop, how sure a rate is, who wins a comparison."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


class Averages:
    """Weighted means of device tensors over a loop, read once at the end: no waiting for the device inside."""

    def __init__(self):
        self.sums = {}

    def add(self, metrics: dict, weight) -> None:
        """Add values that are means over `weight` items. A value that is not finite makes its mean so."""
        for name, value in metrics.items():
            total, count = self.sums.get(name, (0.0, 0.0))
            value, items = (x.detach().double() if isinstance(x, torch.Tensor) else float(x) for x in (value, weight))
            self.sums[name] = (total + value * items, count + items)

    def totals(self) -> dict:
        """Return the sums of value * weight as they are, on the device and of this process alone."""
        return {name: total for name, (total, _) in self.sums.items()}

    def state(self) -> dict[str, list[float]]:
        """Return the sums of value * weight and of weights, to the bit; waits for the device."""
        return {name: [float(x) for x in pair] for name, pair in self.sums.items()}

    def load(self, state: dict) -> None:
        self.sums = {name: tuple(pair) for name, pair in state.items()}

    def read(self, reduce) -> dict[str, float]:
        """Return the means as floats; `reduce` sums a tensor over the processes. A mean over nothing is left out."""
        if not self.sums:
            return {}
        device = next((x.device for pair in self.sums.values() for x in pair if isinstance(x, torch.Tensor)), None)
        pairs = [torch.as_tensor(x, dtype=torch.float64, device=device) for pair in self.sums.values() for x in pair]
        totals = reduce(torch.stack(pairs)).view(-1, 2)
        means = zip(self.sums, totals[:, 1].tolist(), (totals[:, 0] / totals[:, 1]).tolist(), strict=True)
        return {name: mean for name, count, mean in means if count != 0}


Z95 = 1.959963984540054


def wilson_interval(rate: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: the p at which |rate - p| = z sqrt(p (1 - p) / n).

    Args:
        rate: observed share, in [0, 1]; may stem from half wins.
        n: number of (effective) comparisons, > 0.
        z: quantile of the normal; 1.96 for 95 %.
    Returns:
        (low, high), within [0, 1].
    """
    if not 0 <= rate <= 1 or not n > 0:
        raise ValueError(f"rate must lie in [0, 1] and n be > 0, got rate {rate} and n {n}")
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons won, ties counting half, with its 95 % Wilson interval.

    `n_effective` <= n is what the interval is computed with (see `win_rate`).
    """

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    n: int
    n_effective: float


def win_rate(scores: Sequence[float], rivals: Sequence[float], *, per_prompt: int = 1) -> WinRate:
    """Win rate of `scores` over `rivals`, compared one by one, with a 95 % interval.

    Comparisons on one prompt are not independent news about other prompts. So where their means vary between prompts
    more than chance explains, the interval counts fewer comparisons (variance ratio, as in Kish's design effect).

    Args:
        scores, rivals: N judgements each, `per_prompt` after each other for every prompt, higher is better.
        per_prompt: comparisons per prompt.
    Raises:
        ValueError: lengths differ, are 0, or are no multiple of per_prompt.
    """
    if len(scores) != len(rivals) or not len(scores) or len(scores) % per_prompt:
        raise ValueError(
            f"scores and rivals must have one length, a multiple of per_prompt = {per_prompt} above 0, "
            f"got {len(scores)} and {len(rivals)}"
        )
    a, b = np.asarray(scores, dtype=np.float64), np.asarray(rivals, dtype=np.float64)
    won = np.where(a > b, 1.0, np.where(a == b, 0.5, 0.0))
    rate, n = float(won.mean()), float(len(won))
    prompts = won.reshape(-1, per_prompt).mean(axis=1)
    if per_prompt > 1 and len(prompts) > 1 and 0 < rate < 1:
        n = float(min(n, rate * (1 - rate) / max(prompts.var(ddof=1) / len(prompts), 1e-12)))
    low, high = wilson_interval(rate, n)
    return WinRate(rate, low, high, int((a > b).sum()), int((a == b).sum()), len(won), n)


def best_of_n_kl(n: int) -> float:
    """Upper bound on KL(best-of-n || base) in nats: log n - (n - 1) / n; exact where no two responses tie.

    Example:
        >>> round(best_of_n_kl(16), 3)
        1.835
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of(scores: Sequence[float], n: int, ended: Sequence[bool] | None = None) -> list[int]:
    """Index of the best of each successive group of n scores; the first wins a tie.

    Args:
        scores: G * n rewards.
        ended: G * n flags; a response that was cut at the length limit wins only where none of its group ended, since
            the reward model was trained on whole texts and its score of a torso means little.
    Returns:
        G indices into `scores`.
    """
    if n < 1 or len(scores) % n:
        raise ValueError(f"scores must come in whole groups of n = {n}, got {len(scores)}")
    whole = [True] * len(scores) if ended is None else ended
    groups = (range(start, start + n) for start in range(0, len(scores), n))
    return [max(group, key=lambda i: (bool(whole[i]), scores[i], -i)) for group in groups]
