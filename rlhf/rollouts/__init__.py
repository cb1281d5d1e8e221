"""Sampling responses: our own loop, transformers' generate, or an engine of one's own (`RolloutEngine`)."""

from .sampling import Completion, RolloutEngine, RolloutError, Rollouts, collect, sample

__all__ = ["Completion", "RolloutEngine", "RolloutError", "Rollouts", "collect", "sample"]
