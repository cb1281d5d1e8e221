"""Modules that moved into rooms still import from their old places; a DeprecationWarning names the new one."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

MOVED = {
    "rlhf.rankings": "rlhf.data.rankings",
    "rlhf.adapters": "rlhf.models.adapters",
    "rlhf.sequences": "rlhf.models.sequences",
    "rlhf.rollout": "rlhf.rollouts.sampling",
    "rlhf.rollout_engines": "rlhf.rollouts.engines",
    "rlhf.scoring": "rlhf.rewards.scoring",
    "rlhf.sandbox": "rlhf.rewards.sandbox",
    "rlhf.guards": "rlhf.ppo.guards",
    "rlhf.kl_controller": "rlhf.ppo.kl_controller",
    "rlhf.ppo_checkpoint": "rlhf.ppo.checkpoint",
    "rlhf.ppo_config": "rlhf.ppo.config",
    "rlhf.ppo_iteration": "rlhf.ppo.iteration",
    "rlhf.ppo_run": "rlhf.ppo.run",
    "rlhf.ppo_state": "rlhf.ppo.state",
    "rlhf.sharding": "rlhf.ppo.sharding",
    "rlhf.startup_check": "rlhf.ppo.contract",
    "rlhf.health": "rlhf.reports.health",
    "rlhf.page": "rlhf.reports.page",
    "rlhf.plots": "rlhf.reports.plots",
    "rlhf.report": "rlhf.reports.report",
    "rlhf.reward_report": "rlhf.reports.reward_model",
    "rlhf.runs": "rlhf.reports.runs",
}


class _OldPlaces(MetaPathFinder, Loader):
    """Finds a module that moved, as one whose every name is looked up in the new place."""

    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec):
        return None  # the usual one

    def exec_module(self, module):
        place = MOVED[module.__name__]
        found = importlib.import_module(place)
        warnings.warn(f"{module.__name__} moved to {place}", DeprecationWarning, stacklevel=2)
        module.__getattr__ = lambda name: getattr(found, name)
        module.__dir__ = lambda: dir(found)


def install():
    """Let `import` find the old places, after everything else was asked."""
    if not any(isinstance(finder, _OldPlaces) for finder in sys.meta_path):
        sys.meta_path.append(_OldPlaces())
