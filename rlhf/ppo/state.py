"""What a PPO run carries from one iteration to the next besides its networks."""

import functools
import time

import torch

from .sharding import trained_weights


def timed(phase: str):
    """Make a method add the seconds that it takes to `self.seconds[phase]`."""

    def wrap(method):
        @functools.wraps(method)
        def measured(self, *args, **kwargs):
            start = time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

        return measured

    return wrap


def in_run_precision(method):
    """Make a method run in the run's mixed precision, as the training does; without one nothing changes."""

    @functools.wraps(method)
    def cast(self, *args, **kwargs):
        with self.accelerator.autocast():
            return method(self, *args, **kwargs)

    return cast


class Cursor:
    """Walks through `size` rows in a fresh permutation each epoch; the permutation depends on seed and epoch alone.

    Example:
        >>> cursor = Cursor(3, seed=0)
        >>> sorted(cursor.take(3)), len(cursor.take(4)), cursor.state()
        ([0, 1, 2], 4, {'epoch': 2, 'position': 1})
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self.load({"epoch": 0, "position": 0})

    def state(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}

    def load(self, state: dict) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._shuffle()

    def _shuffle(self) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.order = torch.randperm(self.size, generator=generator).tolist()

    def take(self, count: int) -> list[int]:
        """Return the next `count` row numbers; an epoch's rows all come before any row of the next epoch."""
        taken = []
        while len(taken) < count:
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._shuffle()
            chosen = self.order[self.position : self.position + count - len(taken)]
            self.position += len(chosen)
            taken += chosen
        return taken


class WeightAverage:
    """Exponential moving average, in fp32, of those weights of a model that train.

    `average = decay * average + (1 - decay) * weights`
    """

    def __init__(self, model, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay: got {decay}, want a number in [0, 1) (paper: 0.992), or None for no average")
        self.decay = decay
        self.weights = {name: weight.detach().float().clone() for name, weight in trained_weights(model).items()}

    @torch.no_grad()
    def update(self, model) -> None:
        trained = trained_weights(model)
        for name, average in self.weights.items():
            average.lerp_(trained[name].detach().float(), 1 - self.decay)

    @torch.no_grad()
    def swap(self, model) -> None:
        """Exchange the model's weights with the average (twice gives them back, in the model's dtype)."""
        trained = trained_weights(model)
        for name, average in self.weights.items():
            self.weights[name] = trained[name].detach().float().clone()
            trained[name].copy_(average)


def learning_rate_factor(
    update: int, *, updates_per_iteration: int, iterations: int, warmup_iterations: int, schedule: str
) -> float:
    """Return the factor on the peak rate for optimizer step number `update`, counted from 0.

    It rises linearly from 0.1 over the warm-up, then stays ("constant") or falls to 0 ("linear", "cosine") at the end.
    """
    warmup, total = warmup_iterations * updates_per_iteration, iterations * updates_per_iteration
    if update < warmup:
        return 0.1 + 0.9 * update / warmup
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi, dtype=torch.float64))))
    raise ValueError(f"lr_scheduler_type: got {schedule!r}, want constant, linear or cosine")
