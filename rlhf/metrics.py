"""Numbers of a run: weighted means over a loop, and how sure a rate is."""

import math

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
