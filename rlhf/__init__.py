"""rlhf: a thin trainer layer that runs SFT, reward model and PPO with the losses of rlhf_kernels.

A stage is a trainer and its settings: `SFTTrainer`, `RewardTrainer`, `DPOTrainer`, `KTOTrainer` and `PPOTrainer` with
`SFTConfig`, `RewardConfig`, `DPOConfig`, `KTOConfig` and `PPOConfig`; `train_sft` and its kin run a stage from settings
alone. The command line is `rlhf.cli`. Importing `rlhf` loads none of them, and no torch: a name is looked up when it is
first used.
"""

import importlib
import importlib.metadata

from . import _moved, extras

_STAGES = {"SFT": "sft", "Reward": "reward", "DPO": "preference", "KTO": "preference", "PPO": "ppo"}
_PUBLIC = {f"{title}{kind}": module for title, module in _STAGES.items() for kind in ("Trainer", "Config")}
_PUBLIC |= {f"train_{title.lower()}": module for title, module in _STAGES.items()}
_PUBLIC |= dict.fromkeys(("Completion", "RolloutEngine"), "rollouts")

__all__ = [
    "Completion",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "RolloutEngine",
    "SFTConfig",
    "SFTTrainer",
    "train_dpo",
    "train_kto",
    "train_ppo",
    "train_reward",
    "train_sft",
]

_moved.install()


def __getattr__(name):
    if name == "__version__":
        return importlib.metadata.version(extras.DISTRIBUTION)
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    except ModuleNotFoundError as error:
        lacking = extras.lacking()
        if lacking:
            raise ImportError(f"rlhf.{name} {lacking}") from error
        raise


def __dir__():
    return sorted({*globals(), *__all__})
