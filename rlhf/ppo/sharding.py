"""PPO's networks cut over the processes with FSDP2 (torch's `fully_shard`), as an accelerate config asks for it.

Each process holds a slice of every weight, frozen ones too, of its gradient and of its optimizer state. A unit (a
transformer block, or what is left of a network) is whole while it computes. accelerate would wrap one network, while
PPO calls each by itself, and it ignores FSDP on a CPU; so it is kept out, and the same code runs on gloo and on GPUs.

Files hold whole tensors, the same as those of a run that is not sharded; but for checkpoints, where the config asks for
SHARDED_STATE_DICT: see `rlhf.ppo.shards`.
"""

import contextlib
import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models import reshard, unwrapped
from ..processes import SHARDING, asks_for, check_launch_settings, check_processes, mixed_precision

DEEPSPEED_REFUSED = (
    "distributed_type: got DeepSpeed, want one process, DDP or FSDP2 (rlhf/presets/accelerate/fsdp2.yaml): DeepSpeed's "
    "engine makes the optimizer step, with one gradient limit for all weights; PPO has one for the policy and one for "
    "the value network"
)


def start(args) -> tuple[Accelerator, "Sharding"]:
    """Join the processes of the run; return accelerate's view of them, and how the networks are to be sharded.

    Raises:
        ValueError: DeepSpeed, or something of FSDP or accelerate that PPO does not do; the message names it.
        RuntimeError: as `check_processes`.
    """
    if asks_for("DeepSpeed"):
        raise ValueError(DEEPSPEED_REFUSED)
    check_launch_settings(args.gradient_accumulation_steps)
    precision = mixed_precision(args.bf16)
    wanted = asks_for("FSDP")
    plugin = _plugin() if wanted else None
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # it is kept for the process, and an earlier run had another precision
    with unseen(SHARDING["FSDP"], "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision)
    check_processes(accelerator.num_processes, accelerator.distributed_type, sharded_by_caller=wanted)
    if plugin is None:
        return accelerator, Sharding()
    if accelerator.num_processes == 1:
        raise ValueError("num_processes: got 1 under FSDP, want at least 2 to share the weights (torchrun starts them)")
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision: got {accelerator.mixed_precision} under FSDP, want no: the weights' type is --dtype"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    names = tuple(plugin.transformer_cls_names_to_wrap or ())
    return accelerator, Sharding(mesh, plugin.reshard_after_forward, names, _asks_for_shards())


@contextlib.contextmanager
def unseen(*variables: str):
    """The environment without the variables, inside the block."""
    values = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


def _plugin() -> FullyShardedDataParallelPlugin:
    """The FSDP settings of the environment, as accelerate reads them; what PPO would not do is refused."""
    plugin = FullyShardedDataParallelPlugin()
    refused = {
        "fsdp_version": (plugin.fsdp_version != 2, plugin.fsdp_version, 2),
        "fsdp_offload_params": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), True, False),
        "fsdp_activation_checkpointing": (plugin.activation_checkpointing, True, False),
        "fsdp_ignored_modules": (plugin.ignored_modules is not None, repr(plugin.ignored_modules), "none"),
        "fsdp_auto_wrap_policy": (
            plugin.auto_wrap_policy is size_based_auto_wrap_policy, "SIZE_BASED_WRAP", "TRANSFORMER_BASED_WRAP",
        ),
    }  # fmt: skip
    for name, (bad, got, want) in refused.items():
        if bad:
            raise ValueError(f"{name}: got {got}, want {want}: PPO shards its networks itself, and does not do that")
    return plugin


def _asks_for_shards() -> bool:
    """Whether checkpoints are written in slices; accelerate itself takes that for FSDP2 where nobody says anything."""
    asked = os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    return FullyShardedDataParallelPlugin(state_dict_type=asked).state_dict_type.name == "SHARDED_STATE_DICT"


@dataclass(frozen=True)
class Sharding:
    """How a run's networks are cut; without a mesh they stay whole, and nothing here does anything.

    Args:
        mesh: the processes, in one dimension.
        reshard_after_forward: put a trained network's slices away after the forward, and fetch them again for the
            backward; False keeps it whole in between. Frozen networks are always cut again.
        block_names: classes of the modules that make a unit; empty = those of transformers' `_no_split_modules`.
        shards: each process writes its own slices into a checkpoint, instead of the first one whole tensors.
    """

    mesh: DeviceMesh | None = None
    reshard_after_forward: bool = True
    block_names: tuple[str, ...] = ()
    shards: bool = False

    def __call__(self, model) -> None:
        """Cut a network of transformers in place, possibly one with adapters, and move it to the device.

        One that is cut already (`models.load_policy(..., cut=)` has it cut before its weights are read) stays as it is;
        of a network on the meta device nothing moves.

        A language model is called as a whole, a reward or value model by its parts: `models.token_scores` calls trunk
        and head, so each of them is a root of its own.

        Raises:
            ValueError: the model has no such blocks, or weights outside of the units.
        """
        if self.mesh is None:
            return
        model = unwrapped(model)
        if _units(model):
            reshard(model)
            for unit in _units(model):  # what froze meanwhile is cut again behind a forward
                unit.set_reshard_after_forward(self._reshards(unit), recurse=False)
            return
        names = self.block_names or tuple(model._no_split_modules or ())
        blocks = [module for module in model.modules() if type(module).__name__ in names]
        if not blocks:
            raise ValueError(
                f"fsdp_transformer_layer_cls_to_wrap: got {', '.join(names) or 'none'}, want the class of the "
                f"transformer blocks of {type(model).__name__}"
            )
        _send_from_first(self.mesh.device_type, (weight for weight in model.parameters() if weight.requires_grad))
        parts = [part for part in model.children() if any(True for _ in part.parameters())]
        roots = [model] if isinstance(model.get_output_embeddings(), torch.nn.Module) else parts
        for unit in [*reversed(blocks), *roots]:  # what is inside of another one comes first
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=self._reshards(unit))
        for name, weight in model.named_parameters():
            if not isinstance(weight, DTensor):
                raise ValueError(
                    f"distributed_type: got FSDP, want DDP for {type(model).__name__}, whose {name} stands outside of "
                    "its trunk and its head"
                )

    def _reshards(self, unit) -> bool:
        return self.reshard_after_forward or not any(weight.requires_grad for weight in unit.parameters())

    @contextlib.contextmanager
    def whole(self, model):
        """All weights of the network on each process inside the block, so that processes may run it unequally often.

        All processes must enter together. `named_parameters()` are plain tensors meanwhile; `state_dict()` would cut
        the network again.
        """
        units = _units(model)
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(self._reshards(unit), recurse=False)
                unit.reshard()

    def for_engine(self, model, engine):
        """`whole`, but for a rollout engine that gathers what it wants of the slices; adapters come whole to it, too.

        Args:
            engine: see `rlhf.rollouts.RolloutEngine`; None = the built-in sampler.
        """
        if not getattr(engine, "reads_slices", False) or hasattr(model, "peft_config"):
            return self.whole(model)
        reshard(model)  # what a forward may have left whole
        return contextlib.nullcontext()


@torch.no_grad()
def _send_from_first(device: str, weights) -> None:
    """Give all processes the weights of the first one, as DDP does: each has drawn adapters of its own."""
    for weight in weights:
        if weight.is_meta:
            continue
        sent = weight.detach().to(device)
        torch.distributed.broadcast(sent, 0)
        weight.copy_(sent)


def _units(model) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def trained_weights(model) -> dict[str, torch.nn.Parameter]:
    """The weights that train, by name, as this process holds them: of a sharded network always the slices."""
    reshard(model)
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of which each process holds a slice or a share, on its device; all processes call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of it, or its slice, which may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(tree, *, keep: bool = True):
    """The same dict, list or tensor with every slice replaced by the whole tensor, on the CPU; all processes call.

    Tensors that are whole stay as they are; a slice that occurs twice (tied weights) becomes one tensor.

    Args:
        keep: False on processes that take part, and do not want the result: they get None in place of tensors.
    """
    seen = {}

    def visit(value):
        if isinstance(value, dict):
            return {name: visit(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [visit(entry) for entry in value]
        if not isinstance(value, DTensor):
            return value
        if id(value) not in seen:
            whole = whole_tensor(value.detach())
            seen[id(value)] = whole.cpu() if keep else None
        return seen[id(value)]

    return visit(tree)


def whole_state(model, *, keep: bool = True) -> dict | None:
    """The state dict of a sharded network in whole tensors on the CPU; all processes call, those with `keep` get it.

    None where the network is not sharded: its state is its own.
    """
    return gathered(model.state_dict(keep_vars=True), keep=keep) if _units(model) else None


@torch.no_grad()
def cut_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on all processes, placed as `like` is: on its device, cut as it is cut."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    cut = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, dtype=whole.dtype).copy_(cut)  # a copy: `cut` is a view that keeps the whole alive
