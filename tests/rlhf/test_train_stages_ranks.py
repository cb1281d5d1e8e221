"""sft, reward, dpo and kto on two gloo processes, with whole weights and with sharded ones: what one process gives."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from rlhf import models
from rlhf.training import StageTrainer
from tests.processes import run
from tests.rlhf.test_train_kto import judged
from tests.rlhf.test_train_preference import preferences
from tests.rlhf.test_train_sft import demonstrations
from tests.stages_ranks import STAGES
from tests.tiny import model_folder, write_jsonl
from tests.tiny_reward import rankings

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "logging_steps": 1,
    "per_device_train_batch_size": 8, "max_steps": 4, "save_steps": 2, "max_grad_norm": 0.5,
    "sample_length": 5, "dtype": "float64",
}  # fmt: skip
# AdamW turns a rounding d of a gradient into at most learning_rate * d / adam_epsilon a step: in float64, for gradients
# of about 1, 4 * 10 * 2**-53. The bound leaves four digits for what grows from step to step; a wrong gradient moves
# weights by 0.01. 32 rows to train on, so that no batch is cut short: accelerate fills up one that is.
SAME_WEIGHTS = 1e4 * 4 * 10 * 2**-53  # 4e-11
RUNS = {  # name: (stage, family, settings beside those); GPT-2 ties its head to its embeddings
    "sft": ("sft", "gpt2", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    "reward": ("reward", "llama", {"packing": "true"}),
    "dpo": ("dpo", "llama", {"gradient_checkpointing": True}),
    "kto": ("kto", "llama", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    "lora": ("reward", "llama", {"use_peft": True}),
}
MEANS_OVER_BATCHES = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward", "pairs")


def settings(home, name, out, processes):
    stage, family, changes = RUNS[name]
    options = {**COMMON, **changes}
    if stage != "sft":
        del options["sample_length"]
    options["per_device_train_batch_size"] //= processes
    paths = {"model_name_or_path": home / family, "output_dir": home / out}
    paths |= {"dataset_name": home / f"{stage}.jsonl", "eval_dataset_name": home / f"held_out_{stage}.jsonl"}
    return [stage, options | {key: str(path) for key, path in paths.items()}]


def names():
    return [name for name in RUNS if name != "lora" or find_spec("peft")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models, data, and every run of RUNS on one process."""
    home = tmp_path_factory.mktemp("stages")
    for family in ("llama", "gpt2"):
        model_folder(home / family, family=family)
    data = {"sft": demonstrations(40), "reward": rankings(40), "dpo": preferences(40), "kto": judged(40)}
    for stage, rows in data.items():
        write_jsonl(home / f"{stage}.jsonl", rows[:32])
        write_jsonl(home / f"held_out_{stage}.jsonl", rows[32:])
    for name in names():
        stage, options = settings(home, name, f"one/{name}", 1)
        make_config, train = STAGES[stage]
        train(make_config(**options))
    return home


@pytest.fixture(scope="module", params=["ddp_cpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def parallel(request, home):
    """The same runs on two processes under a preset of accelerate, and those of two resumed from their second step."""
    if "deepspeed" in request.param and not find_spec("deepspeed"):
        pytest.skip("needs the package deepspeed")
    out = home / request.param
    runs = [settings(home, name, out / name, 2) for name in names()]
    for name in ("reward", "dpo"):
        stage, options = settings(home, name, out / f"{name}-resumed", 2)
        runs.append([stage, options | {"resume_from_checkpoint": str(out / name / "checkpoint-2")}])
    out.mkdir()
    (out / "runs.json").write_text(json.dumps(runs))
    preset = str(ROOT / "rlhf" / "presets" / "accelerate" / f"{request.param}.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", preset, "--num_processes", "2"]
    command += [str(ROOT / "tests" / "stages_ranks.py"), str(out / "runs.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = run(command, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_trap_10_two_processes_equal_one(home, parallel, name):
    """Weights, metrics, samples and calibration; the final files are whole and load without a missing weight."""
    if name not in names():
        pytest.skip("needs the package peft")
    one, two = home / "one" / name, parallel / name
    expected, actual = (load_file(run / "model.safetensors") for run in (one, two))
    assert expected.keys() == actual.keys()
    start = load_file(home / RUNS[name][1] / "model.safetensors")
    assert max((expected[key] - start[key]).abs().max() for key in expected.keys() & start.keys()) > 0.01
    for key, weight in expected.items():
        assert (weight - actual[key]).abs().max() < SAME_WEIGHTS, key
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"time", "train/seconds", *MEANS_OVER_BATCHES}:
            assert a[key] == pytest.approx(b[key], rel=64 * 2**-24, abs=64 * 2**-24), key  # means of fp32 numbers
    if RUNS[name][0] == "sft":
        assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
    if RUNS[name][0] == "reward":
        biases = [models.load_reward_model(run).config.reward_bias for run in (one, two)]
        assert biases[0] == pytest.approx(biases[1], rel=2**-22) and abs(biases[0]) > 1e-2
    else:
        models.load_policy(two)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_two_processes_go_on_to_the_same_bits(parallel, name):
    """The reference of dpo is the model at the start, not the one of the checkpoint."""
    runs = parallel / name, parallel / f"{name}-resumed"
    whole, resumed = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    losses = [[(row["step"], row["loss"]) for row in metrics(run) if "loss" in row] for run in runs]
    assert losses[0][2:] == losses[1] and [step for step, _ in losses[1]] == [3, 4]


@pytest.mark.slow
def test_checkpoint_is_a_whole_model(parallel):
    saved = load_file(parallel / "dpo" / "checkpoint-4" / "model.safetensors")
    last = load_file(parallel / "dpo" / "model.safetensors")
    assert saved.keys() == last.keys() and all(torch.equal(saved[key], last[key]) for key in saved)


@pytest.mark.parametrize(
    ("kind", "fsdp", "message"),
    [
        ("FSDP", None, "fsdp_version: got 1, wants 2"),
        ("DEEPSPEED", None, "zero3_save_16bit_model: got false, wants true"),
        ("MULTI_CPU", "full_shard", "fsdp: got full_shard, which accelerate ignores here"),
    ],
)
def test_sharding_that_cannot_work_is_refused(kind, fsdp, message):
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    plugins = {
        "fsdp_plugin": SimpleNamespace(fsdp_version=1),
        "deepspeed_plugin": SimpleNamespace(deepspeed_config={"zero_optimization": zero}),
    }
    state = SimpleNamespace(distributed_type=DistributedType[kind], **plugins)
    args = SimpleNamespace(fsdp=fsdp, deepspeed=None)
    with pytest.raises(ValueError, match=message):
        StageTrainer.check_sharding(SimpleNamespace(args=args, accelerator=SimpleNamespace(state=state)))


@pytest.mark.slow
def test_wrapped_models_give_the_same_scores_and_losses(gloo_ranks):
    """Every architecture under FSDP2 and DDP on two gloo ranks: values and gradients of the model without a wrapper."""
    gloo_ranks("wrapped_scores_ranks.py", 2)
