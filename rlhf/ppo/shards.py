"""Checkpoints in slices: each process writes and reads its own, by `torch.distributed.checkpoint`.

`checkpoint-N/shards/` holds, in place of whole files, all that trains: `policy.<weight>`, `value.<weight>`,
`ema.<weight>`, `within_budget.<weight>` and AdamW's `optimizer.<number of the weight>.<moment>`. Any number of
processes reads it. What does not train comes from where the run took it at its start. torch opens the list of slices
(`.metadata`) with pickle, which can run code: go on from checkpoints of your own alone.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ..models import reshard
from .sharding import trained_weights

FOLDER = "shards"


def holds_shards(directory: Path | None) -> bool:
    """Whether a checkpoint was written in slices."""
    return directory is not None and (directory / FOLDER).is_dir()


def save_shards(trainer, directory: Path) -> None:
    """Write `shards` into a checkpoint's folder, the same one on all processes, which all call.

    Raises:
        OSError: what came in the way of any of the processes.
    """
    tensors = _networks(trainer)
    averages = {"ema": trainer.ema and trainer.ema.weights, "within_budget": trainer.within_budget}
    for part, weights in averages.items():
        tensors |= {f"{part}.{name}": weight for name, weight in (weights or {}).items()}
    for number, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": moment for name, moment in moments.items()}
    _told(dcp.save, tensors, checkpoint_id=directory / FOLDER)


def load_shards(trainer, directory: Path) -> dict:
    """Put back what `save_shards` wrote, but for the optimizer, whose `state` (as in its state dict) is returned."""
    tensors, state, within_budget = _networks(trainer), {}, {}
    trained = trained_weights(trainer.policy)
    if trainer.ema is not None:
        tensors |= {f"ema.{name}": weight for name, weight in trainer.ema.weights.items()}
    weights = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    stored = dcp.FileSystemReader(directory / FOLDER).read_metadata().state_dict_metadata
    for key, found in stored.items():
        part, _, name = key.partition(".")
        if part == "within_budget":
            tensors[key] = within_budget[name] = torch.empty_like(trained[name].detach())
        elif part == "optimizer":
            number, moment = name.split(".")
            like = weights[int(number)].detach() if found.size else torch.zeros((), dtype=torch.float32)
            tensors[key] = torch.empty_like(like, dtype=found.properties.dtype)
            state.setdefault(int(number), {})[moment] = tensors[key]
    _told(dcp.load, tensors, checkpoint_id=directory / FOLDER)
    trainer.within_budget = within_budget or None
    return state


def _networks(trainer) -> dict[str, torch.Tensor]:
    """The tensors of policy and value network as this process holds them; of adapters, what trains."""
    found = {}
    for part, network in trainer.trained().items():
        reshard(network)
        whole = not trainer.args.use_peft
        state, seen = network.state_dict(keep_vars=True) if whole else trained_weights(network), set()
        for name, tensor in state.items():
            if id(tensor) not in seen:  # what is tied has one name
                found[f"{part}.{name}"] = tensor.detach()
            seen.add(id(tensor))
    return found


def _told(call, tensors: dict, **options) -> None:
    """Make torch's call, and raise what failed on any of the processes as what it was there."""
    try:
        call(tensors, **options)
    except CheckpointException as error:
        raise next(failure for failure, _ in error.failures.values()) from error
