"""TRL on two gloo processes, with whole and with sharded weights: a step with the drop-in is one without."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="the package trl is not installed: make test-integrations-trl")
from rlhf_kernels.integrations import trl as rk_trl
from tests.integrations import test_trl_reward
from tests.processes import run

ROOT = Path(__file__).resolve().parents[2]
ZERO3 = {  # every weight in parts: by default those of a small model stay whole
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


@pytest.mark.parametrize("sharding", ("", "fsdp", "deepspeed"), ids=("ddp", "fsdp2", "zero3"))
def test_a_step_on_two_processes(sharding, tmp_path):
    """SFT and pairs are compared inside, every logged number and weight; the ranked rows with one process here."""
    if sharding == "deepspeed" and not find_spec("deepspeed"):
        pytest.skip("needs the package deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    if sharding == "deepspeed":
        (tmp_path / "zero3.json").write_text(json.dumps(ZERO3))
        command += ["--use_deepspeed", "--deepspeed_config_file", str(tmp_path / "zero3.json")]
    else:
        preset = "fsdp2" if sharding else "ddp_cpu"
        command += ["--config_file", str(ROOT / "rlhf" / "presets" / "accelerate" / f"{preset}.yaml")]
    command += [str(Path(__file__).with_name("trl_ranks.py")), str(tmp_path), sharding]
    test_trl_reward.reward_model().save_pretrained(tmp_path / "reward")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr[-5000:]

    changes = {"per_device_train_batch_size": 4, "max_grad_norm": 1e3}
    trainer = test_trl_reward.make(rk_trl.RankedRewardTrainer, test_trl_reward.RANKED[:4], tmp_path / "one", **changes)
    log, weights = test_trl_reward.step(trainer)
    for rank in range(2):
        other_log, other = torch.load(tmp_path / f"ranked-{rank}.pt")
        for key in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
            other_log.pop(key)  # means over two batches
        test_trl_reward.same((other_log, other), ({key: log[key] for key in other_log}, weights))
