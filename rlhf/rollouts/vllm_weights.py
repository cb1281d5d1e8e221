"""The policy's weights on a disk, for vLLM to load: a folder for each version, written aside and renamed.

A folder holds what `save_pretrained` writes of a policy: names and tied weights of a checkpoint, adapters merged; or
the adapters alone. The version is its name, and is unlike those of any other run.
"""

import contextlib
import secrets
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor

from ..checkpoint import atomic_directory, remove_directory
from ..models import is_cut, save_cut_weights, unwrapped
from ..models.adapters import merged, merged_whole
from ..models.parts import quiet
from .sampling import RolloutError


@dataclass(frozen=True)
class Version:
    """Weights of the policy as they were at some time: their name, and the folder that holds them."""

    name: str
    folder: str
    adapters: bool = False  # the folder holds LoRA adapters alone


class WeightFolders:
    """Writes versions below `home`, numbered from 1, and removes those that are old.

    Args:
        own: the folder is this run's alone, so that what an earlier one has left there goes, too.
    """

    def __init__(self, home, *, own: bool):
        self.home, self.own, self.number = Path(home).expanduser(), own, 0
        self.run = secrets.token_hex(4)

    def write(self, policy, *, adapters: bool = False, untied: bool = False) -> Version:
        """The policy as it is now in a new folder; called by all processes, of which the first one writes.

        Slices (FSDP2) are gathered a tensor at a time, so that no process holds the whole.

        Args:
            policy: a model of transformers, whole or in slices, or of PEFT around one, whole.
            adapters: write the adapters alone, as PEFT does.
            untied: write weights that are tied under each of their names.
        Raises:
            WriteError: the folder cannot be written.
        """
        self.number += 1
        name = f"rlhf-{self.run}-{self.number}"
        folder = (self.home / name).resolve()
        if not _holds_slices(policy):
            return on_first(lambda: self._write_whole(Version(name, str(folder), adapters), policy, untied))
        first = PartialState().is_main_process
        with atomic_directory(folder) if first else contextlib.nullcontext() as temporary, quiet():
            save_cut_weights(policy, temporary, untied=untied)
        return on_first(lambda: Version(name, str(folder)))

    def _write_whole(self, version: Version, policy, untied: bool) -> Version:
        with atomic_directory(version.folder) as temporary, quiet():
            if version.adapters:
                policy.save_pretrained(temporary, state_dict=_state_while_whole(policy), save_embedding_layers=False)
            else:
                model, state = (merged_whole if is_cut(policy) else merged)(policy)
                model.save_pretrained(temporary, state_dict=_untied(model, state) if untied else state)
        return version

    def keep_only(self, version: Version) -> None:
        """Remove all other versions."""
        for folder in self.home.glob("rlhf-*-*" if self.own else f"rlhf-{self.run}-*"):
            if folder.name != version.name:
                remove_directory(folder)


def _holds_slices(model) -> bool:
    """Whether the weights are slices now; while a network that FSDP2 has cut is whole, they are not."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def _state_while_whole(model) -> dict | None:
    """The state dict of a network that is cut, and whole now: its own `state_dict()` would cut it again. Else None."""
    if not is_cut(model):
        return None
    state = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = buffer
    return {name: tensor.detach() for name, tensor in state.items()}


def _untied(model, state: dict | None) -> dict:
    """The state with a copy of its own for each name of a weight that is tied to another."""
    state = dict(model.state_dict() if state is None else state)
    return state | {name: state[source].clone() for name, source in model.all_tied_weights_keys.items()}


def on_first(work):
    """What `work()` gives on the first process, on all of them; its error, too.

    All processes call; it begins when all are there, so that none is still sampling with the weights before.
    """
    PartialState().wait_for_everyone()
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except (OSError, ValueError, RuntimeError) as error:
            if PartialState().num_processes == 1:
                raise
            outcome[1] = str(error)
            broadcast_object_list(outcome)
            raise
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise RolloutError(f"on the first process: {outcome[1]}")
    return outcome[0]


def vocabulary(policy) -> int:
    """The number of token ids that a policy scores."""
    return unwrapped(policy).get_output_embeddings().weight.shape[0]


def is_tied(policy) -> bool:
    """Whether weights of a policy have several names, as a head that is its embedding has."""
    return bool(unwrapped(policy).all_tied_weights_keys)
