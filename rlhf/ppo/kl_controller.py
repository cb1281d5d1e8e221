"""The coefficient of the KL reward: fixed, or steered towards a target."""

from dataclasses import dataclass


@dataclass
class KLController:
    """Holds beta. With a target, each iteration moves it as in Ziegler et al. 2019 (arXiv 1909.08593), section 2.2:

    `error = clip(kl / target - 1, -0.2, 0.2)`, `beta = beta * (1 + error * episodes / horizon)`.

    Args:
        value: beta at the start, >= 0.
        target: KL per response to steer to, in nats; None keeps beta as it is.
        horizon: episodes over which a full error of 0.2 changes beta by a fifth.
    Example:
        >>> controller = KLController(0.1, target=6.0, horizon=10_000)
        >>> controller.update(kl=12.0, episodes=500)
        >>> round(controller.value, 6)
        0.101
    """

    value: float
    target: float | None = None
    horizon: float = 10_000

    def __post_init__(self):
        if self.value < 0:
            raise ValueError(f"kl_coef: got {self.value}, want a number >= 0")
        if self.target is not None and not self.target > 0:
            raise ValueError(f"kl_target: got {self.target}, want nats > 0, or None for a fixed kl_coef")
        if not self.horizon > 0:
            raise ValueError(f"kl_horizon: got {self.horizon}, want a number of episodes > 0")

    def update(self, kl: float, episodes: int) -> None:
        """Take the mean over the episodes of `sum_t k1_t` (nats) that the old beta led to."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * episodes / self.horizon
