"""PPO on two gloo processes: the same run as on one with twice the batch, started by torchrun and by accelerate."""

import json
import os
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from rlhf.ppo import train_ppo
from rlhf.processes import SHARDING, WORLD_SIZES, check_processes
from tests.processes import run
from tests.tiny_ppo import ROOT, assert_equal_runs, forked, same_config

PRESETS = ROOT / "rlhf" / "presets" / "accelerate"


def test_trap_30_two_processes_share_the_prompts_and_equal_one(home):
    plan = [{"options": vars(same_config(home, f"of{ranks}", ranks)), "ranks": ranks} for ranks in (1, 2)]
    forked(home, plan)
    assert_equal_runs(home, "of1", "of2")
    noted = [
        [json.loads(line) for line in (home.path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("of1-rollouts-0", "of2-rollouts-0", "of2-rollouts-1")
    ]
    seen = []
    for whole, first, second in zip(*noted, strict=True):
        assert first["responses"] != second["responses"] and len(first["responses"]) == len(second["responses"]) == 4
        for name in ("prompts", "responses"):
            assert first[name] + second[name] == whole[name]
        seen += whole["prompts"][::2]
    epochs = [sorted(seen[start : start + 6]) for start in (0, 6, 12)]
    assert len(seen) == 20 and epochs == [list(range(6))] * 3  # of 6 prompts each comes once an epoch


def commands(home, args):
    flags = [f"--{name}={value}" for name, value in vars(args).items() if value is not None]
    command = ["-m", "rlhf.cli", "ppo", *flags]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    return {
        "torchrun": [*torchrun, *command],
        "accelerate": [*launch, "--config_file", str(PRESETS / "ddp_cpu.yaml"), *command],
        "fsdp2": [*launch, "--config_file", str(PRESETS / "fsdp2_cpu.yaml"), *command],
        "cpu": [*launch, "--cpu", "--num_processes", "2", *command],
    }


def start(home, command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return run(command, cwd=home.path, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "fsdp2"])
def test_two_processes_equal_one_from_the_command_line(home, launcher):
    train_ppo(same_config(home, "one", 1))
    done = start(home, commands(home, same_config(home, "two", 2))[launcher])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(home, "one", "two")


@pytest.mark.slow
def test_trap_31_accelerate_launch_with_one_process_in_place_of_two(home):
    done = start(home, commands(home, same_config(home, "two", 2))["cpu"])
    assert done.returncode != 0 and "asked for several processes, but on a CPU it starts only one" in done.stderr
    assert not (home.path / "two").exists()


def test_trap_31_the_processes_that_were_asked_for(monkeypatch):
    for name in (*WORLD_SIZES, *SHARDING.values(), "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    one, two = (1, DistributedType.NO), (2, DistributedType.MULTI_CPU)
    check_processes(*one)
    monkeypatch.setenv("MASTER_PORT", "29500")
    check_processes(*one)  # an address alone says nothing
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(RuntimeError, match="on a CPU it starts only one; use torchrun"):
        check_processes(*one)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(*two)
    with pytest.raises(RuntimeError, match="asks for 2, but this run has 1"):
        check_processes(*one)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_processes(2, DistributedType.FSDP)
    with pytest.raises(RuntimeError, match="asked for FSDP, but ignores it on a CPU"):
        check_processes(*two)
    check_processes(*two, sharded_by_caller=True)


@pytest.mark.parametrize("name", ["ddp_cpu", "ddp", "fsdp2_cpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_presets_of_accelerate(name):
    config = load_config_from_file(str(PRESETS / f"{name}.yaml"))
    kinds = {"fsdp2": DistributedType.FSDP, "deepspeed": DistributedType.DEEPSPEED, "ddp": DistributedType.MULTI_GPU}
    assert config.distributed_type == kinds[name.partition("_")[0]]
    assert config.num_processes == (2 if name.endswith("_cpu") else 8) and config.mixed_precision == "no"
    assert not name.startswith("fsdp2") or config.fsdp_config["fsdp_version"] == 2
    assert "zero" not in name or config.deepspeed_config["zero_stage"] == int(name[-1])
