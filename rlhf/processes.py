"""Whether a run has the processes, and the way of sharing the work, that it was started for."""

import os

from accelerate.utils import DistributedType

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


def asks_for(sharding: str) -> bool:
    """Whether the environment, as `accelerate launch` sets it, asks for FSDP or DeepSpeed."""
    return os.environ.get(SHARDING[sharding], "false").lower() == "true"


def check_processes(running: int, distributed_type: DistributedType, *, sharded_by_caller: bool = False) -> None:
    """Stop a run that was meant for several processes, or for sharded weights, and would silently go on without.

    `accelerate launch --cpu --num_processes 2` (or a config file with `distributed_type: MULTI_CPU`) prepares the
    address of a group in the environment, but starts a single process. On a CPU accelerate ignores FSDP and DeepSpeed.

    Args:
        running: the processes that take part, as accelerate counts them.
        distributed_type: how they work together, as accelerate says.
        sharded_by_caller: the caller does on a CPU, too, what the environment asks of accelerate, as PPO does FSDP.
    Raises:
        RuntimeError: the environment asks for something else; the message says how to start the run.
    """
    asked = next((int(os.environ[name]) for name in WORLD_SIZES if os.environ.get(name)), None)
    if asked is not None and asked != running:
        raise RuntimeError(
            f"num_processes: the environment asks for {asked}, but this run has {running}; on a machine without a GPU "
            "add --use_cpu true"
        )
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if asked is None and running == 1 and launched:
        raise RuntimeError(
            "num_processes: accelerate launch was asked for several processes, but on a CPU it starts only one; use "
            "torchrun --nproc_per_node=N, or rlhf/presets/accelerate/ddp_cpu.yaml"
        )
    for name in SHARDING:
        ignored = distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU) and not sharded_by_caller
        if ignored and asks_for(name):
            raise RuntimeError(f"distributed_type: accelerate was asked for {name}, but ignores it on a CPU; use DDP")
