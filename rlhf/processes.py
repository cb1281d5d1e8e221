"""Whether a run has the processes, the way of sharing the work and the precision that it was started for."""

import os

import torch
from accelerate.utils import DistributedType

from .errors import RunError

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
NOT_DONE = {"Megatron-LM": "ACCELERATE_USE_MEGATRON_LM", "parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG"}


def asks_for(sharding: str) -> bool:
    """Whether the environment, as `accelerate launch` sets it, asks for FSDP or DeepSpeed."""
    return os.environ.get(SHARDING[sharding], "false").lower() == "true"


def check_launch_settings(accumulation: int) -> None:
    """Refuse what `accelerate launch` was asked for and a run would not do, or do twice.

    Args:
        accumulation: gradient_accumulation_steps of the run's own settings.
    Raises:
        ValueError: names the setting of accelerate, and the one of the run to use.
    """
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if asked not in ("1", str(accumulation)):
        raise ValueError(
            f"gradient_accumulation_steps: accelerate launch got {asked}, the run {accumulation}; give it to the run "
            f"alone (--gradient_accumulation_steps {asked} behind the command's name)"
        )
    for name, variable in NOT_DONE.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise ValueError(f"distributed_type: accelerate was asked for {name}, want one process, DDP or FSDP2")


def mixed_precision(bf16: bool) -> str:
    """The mixed precision of a run that makes its own optimizer steps: "bf16" or "no".

    Args:
        bf16: the run's own setting; where False, that of `accelerate launch` counts.
    Raises:
        ValueError: fp16 or fp8, or compilation, which are not done.
    """
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise ValueError(f"dynamo_backend: accelerate was asked for {backend}, want no: the networks are not compiled")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", "bf16"):
        raise ValueError(f"mixed_precision: accelerate was asked for {asked}, want bf16 (or --bf16 true), or no")
    return "bf16" if bf16 else asked


def check_processes(running: int, distributed_type: DistributedType, *, sharded_by_caller: bool = False) -> None:
    """Stop a run that was meant for several processes, or for sharded weights, and would silently go on without.

    `accelerate launch --cpu --num_processes 2` (or a config file with `distributed_type: MULTI_CPU`) prepares the
    address of a group in the environment, but starts a single process. On a CPU accelerate ignores FSDP and DeepSpeed.

    Args:
        running: the processes that take part, as accelerate counts them.
        distributed_type: how they work together, as accelerate says.
        sharded_by_caller: the caller does on a CPU, too, what the environment asks of accelerate, as PPO does FSDP.
    Raises:
        RunError: the environment asks for something else; the message says how to start the run.
    """
    asked = next((int(os.environ[name]) for name in WORLD_SIZES if os.environ.get(name)), None)
    if asked is not None and asked != running:
        raise RunError(
            f"num_processes: the environment asks for {asked}, but this run has {running}; on a machine without a GPU "
            "add --use_cpu true"
        )
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if asked is None and running == 1 and launched:
        raise RunError(
            "num_processes: accelerate launch was asked for several processes, but on a CPU it starts only one; use "
            "torchrun --nproc_per_node=N, or rlhf/presets/accelerate/ddp_cpu.yaml"
        )
    for name in SHARDING:
        ignored = distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU) and not sharded_by_caller
        if ignored and asks_for(name):
            raise RunError(f"distributed_type: accelerate was asked for {name}, but ignores it on a CPU; use DDP")


def agreed_signal(number: int, accelerator) -> int:
    """The signal that came to any of the processes, the same on all; 0 for none. All must ask at the same place."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
