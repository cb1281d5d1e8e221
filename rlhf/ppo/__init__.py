"""Stage 3: PPO and PPO-ptx. trainer.py is the algorithm; the rest is what a run needs around it."""

from .config import PPOConfig
from .trainer import PPOTrainer, train_ppo

__all__ = ["PPOConfig", "PPOTrainer", "train_ppo"]
