"""PPO on two gloo processes: the same run as on one with twice the batch, started by torchrun and by accelerate."""

import json
import os
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from rlhf.ppo import train_ppo
from rlhf.processes import SHARDING, WORLD_SIZES, check_processes
from tests.tiny_ppo import ROOT, TIMINGS, forked

PRESETS = ROOT / "rlhf" / "presets" / "accelerate"
SAME = {
    "temperature": 0.7, "num_ppo_epochs": 2, "ptx_coef": 0.5, "ptx_batch_multiplier": 2, "ema_decay": 0.9,
    "kl_target": 0.3, "kl_horizon": 50, "num_responses": 2, "max_steps": 5, "missing_eos_penalty": 1.0,
    "adam_epsilon": 1e-3, "learning_rate": 3e-3, "num_logged_samples": 8,
}  # fmt: skip
# adam_epsilon 1e-3: with Adam's 1e-8 a gradient of size 1e-9 that is rounding alone moves a weight by the full rate


def config(home, out, processes, **changes):
    options = SAME | {"per_device_train_batch_size": 4 // processes, "ptx_dataset_name": str(home.path / "text.txt")}
    return home.config(out, **options | changes)


def assert_equal_runs(home, one, two):
    """Equal samples; metrics and weights equal up to rounding."""
    samples = [home.rows(out, "samples.jsonl") for out in (one, two)]
    assert len(samples[0]) == 8 * 5
    for a, b in zip(*samples, strict=True):
        assert a | {"score": 0} == b | {"score": 0} and a["score"] == pytest.approx(b["score"], abs=1e-5)
    for a, b in zip(home.rows(one), home.rows(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {*TIMINGS, "val/ratio_var", "val/ratio_max"}:  # these two are means over micro-batches
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    start = {"model": home.path / "llama", "value/model": home.path / "llama-rm"}
    for name, folder in start.items():
        first, second = (load_file(home.path / out / f"{name}.safetensors") for out in (one, two))
        before = load_file(folder / "model.safetensors")
        assert max((first[key] - before[key]).abs().max() for key in first) > 1e-4
        assert max((first[key] - second[key]).abs().max() for key in first) < 1e-6


@pytest.mark.slow
def test_trap_30_two_processes_share_the_prompts_and_equal_one(home):
    plan = [{"options": vars(config(home, f"of{ranks}", ranks)), "ranks": ranks} for ranks in (1, 2)]
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
        "cpu": [*launch, "--cpu", "--num_processes", "2", *command],
    }


def start(home, command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=home.path, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_equal_one_from_the_command_line(home, launcher):
    train_ppo(config(home, "one", 1))
    done = start(home, commands(home, config(home, "two", 2))[launcher])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(home, "one", "two")


@pytest.mark.slow
def test_trap_31_accelerate_launch_with_one_process_in_place_of_two(home):
    done = start(home, commands(home, config(home, "two", 2))["cpu"])
    assert done.returncode != 0 and "asked for several processes, but on a CPU it starts only one" in done.stderr
    assert not (home.path / "two").exists()


def test_trap_31_the_processes_that_were_asked_for(monkeypatch):
    for name in (*WORLD_SIZES, *SHARDING, "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
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


@pytest.mark.parametrize("name", ["ddp_cpu", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_presets_of_accelerate(name):
    config = load_config_from_file(str(PRESETS / f"{name}.yaml"))
    kinds = {"fsdp2": DistributedType.FSDP, "deepspeed": DistributedType.DEEPSPEED, "ddp": DistributedType.MULTI_GPU}
    assert config.distributed_type == kinds[name.partition("_")[0]]
    assert config.num_processes == (2 if name == "ddp_cpu" else 8) and config.mixed_precision == "no"
    assert name != "fsdp2" or config.fsdp_config["fsdp_version"] == 2
    assert "zero" not in name or config.deepspeed_config["zero_stage"] == int(name[-1])


def test_sharded_networks_are_refused(home, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="distributed_type: got FSDP, want one process or DDP"):
        home.trainer()
