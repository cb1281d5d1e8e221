"""SIGTERM and Ctrl-C: a run of the command ends after its step, with a checkpoint from which it goes on to the bit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf import checkpoint, cli, interrupt
from rlhf.ppo import PPOTrainer
from rlhf.sft import SFTConfig, SFTTrainer
from tests.rlhf.test_train_sft import demonstrations
from tests.tiny import model_folder, write_jsonl
from tests.tiny_ppo import assert_same_run, own_home, write_files
from tests.tiny_reward import rankings

ROOT = Path(__file__).resolve().parents[2]
GOES_ON = "the same command with --resume_from_checkpoint true goes on"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    model_folder(path / "policy")
    pairs = [{"prompt": f"a {word}", "chosen": f"{word} good", "rejected": "bad"} for word in "bcdefghijklmnopq"]
    write_jsonl(path / "sft.jsonl", demonstrations(16))
    write_jsonl(path / "reward.jsonl", rankings(16))
    write_jsonl(path / "dpo.jsonl", pairs)
    return path


def flags(home, stage, out, **changes):
    options = {
        "model_name_or_path": home / "policy", "dataset_name": home / f"{stage}.jsonl", "output_dir": out,
        "per_device_train_batch_size": 3, "max_steps": 7, "logging_steps": 3, "eval_steps": 4, "save_steps": 0,
        "learning_rate": 1e-2, "disable_tqdm": "true", "use_cpu": "true", "seed": 5, **changes,
    }  # fmt: skip
    return [stage, *(f"--{name}={value}" for name, value in options.items())]


def log_of(run):
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("time", "train/seconds")} for row in rows]


def assert_equal(whole, resumed):
    first, second = (load_file(Path(run) / "model.safetensors") for run in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert log_of(whole) == log_of(resumed) and len(log_of(whole)) > 3
    if (Path(whole) / "samples.jsonl").exists():
        assert (Path(whole) / "samples.jsonl").read_text() == (Path(resumed) / "samples.jsonl").read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_signal_ends_a_stage_with_a_checkpoint(home, tmp_path, monkeypatch, capfd, stage, number, status):
    assert cli.main(flags(home, stage, tmp_path / "whole")) == 0
    before, original = [signal.getsignal(each) for each in interrupt.SIGNALS], torch.optim.AdamW.step
    steps = []

    def step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert cli.main(flags(home, stage, tmp_path / "run")) == status
    said = capfd.readouterr().err
    assert f"stopped by {number.name}; checkpoint-4 is written; {GOES_ON}" in said and "at once if it comes" in said
    assert len(steps) == 4 and [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    assert [signal.getsignal(each) for each in interrupt.SIGNALS] == before
    assert cli.main([*flags(home, stage, tmp_path / "run"), "--resume_from_checkpoint", "true"]) == 0
    assert_equal(tmp_path / "whole", tmp_path / "run")


@pytest.fixture(scope="module")
def ppo_files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("ppo"))


def ppo_flags(home, out, *more):
    options = {
        "sft_model_path": home.path / "llama", "reward_model_path": home.path / "llama-rm", "seed": 7,
        "dataset_name": home.path / "prompts.jsonl", "output_dir": home.path / out, "response_length": 8,
        "rollout_batch_size": 8, "per_device_train_batch_size": 4, "num_ppo_epochs": 2, "num_mini_batches": 2,
        "learning_rate": 1e-2, "max_steps": 3, "disable_tqdm": "true", "ema_decay": 0.9, "save_steps": 3, "max_kl": 1e6,
    }  # fmt: skip
    return ["ppo", *(f"--{name}={value}" for name, value in options.items()), *more]


@pytest.mark.parametrize(
    ("method", "call", "written"),
    [("sample", 2, "checkpoint-1-0"), ("update", 6, "checkpoint-1-2"), ("update", 8, "checkpoint-2"),
     ("_log", 1, "checkpoint-1")],
)  # fmt: skip
def test_a_signal_ends_ppo_between_two_steps(ppo_files, tmp_path, monkeypatch, capfd, method, call, written):
    home, calls = own_home(ppo_files, tmp_path), []
    original = getattr(PPOTrainer, method)

    def signalled(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    assert cli.main(ppo_flags(home, "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, method, signalled)
        assert cli.main(ppo_flags(home, "run")) == 143
    assert f"stopped by SIGTERM; {written} is written; {GOES_ON}" in capfd.readouterr().err
    assert [path.name for path in checkpoint.checkpoints(home.path / "run")] == [written]
    assert cli.main(ppo_flags(home, "run", "--resume_from_checkpoint", "true")) == 0
    assert_same_run(home, "whole", "run")


def test_a_signal_ends_a_pipeline_and_the_same_command_goes_on(home, tmp_path, monkeypatch, capfd):
    common = {"max_steps": 3, "disable_tqdm": True, "per_device_train_batch_size": 4}
    sections = {
        "reward": common | {"use_cpu": True}, "ppo": common | {"response_length": 8},
        "evaluate": {"response_length": 8, "batch_size": 4},
    }  # fmt: skip
    (tmp_path / "settings.yaml").write_text(json.dumps(sections))
    argv = ["pipeline", "--model_name_or_path", str(home / "policy"), "--ranked_dataset", str(home / "reward.jsonl")]
    argv += ["--config", str(tmp_path / "settings.yaml"), "--held_out_prompts", "4", "--quiet"]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    original, calls = PPOTrainer.update, []

    def update(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "update", update)
        assert cli.main([*argv, "--output_dir", str(tmp_path / "run")]) == 143
    assert "written; the same command goes on where it was" in capfd.readouterr().err
    assert cli.main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    said = capfd.readouterr().out
    assert "Reward model: " in said and "done before" in said
    for stage in ("reward", "ppo"):
        first, second = (load_file(tmp_path / run / stage / "model.safetensors") for run in ("whole", "run"))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_signal_in_the_last_step_lets_the_run_finish(home, tmp_path, monkeypatch):
    original = SFTTrainer.finish

    def finish(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(SFTTrainer, "finish", finish)
    assert cli.main(flags(home, "sft", tmp_path / "run")) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_second_signal_ends_at_once(home, tmp_path, monkeypatch, capsys):
    def twice(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", twice)
    assert cli.main(flags(home, "sft", tmp_path / "run")) == 130
    assert "rlhf: stopped; " in capsys.readouterr().err and not checkpoint.checkpoints(tmp_path / "run")


def test_programs_and_threads_keep_their_handlers(home, tmp_path):
    """Outside of the command nothing is noted: Ctrl-C is a KeyboardInterrupt, and other threads may train."""
    seen = []

    def train(out):
        args = SFTConfig(
            str(tmp_path / out), model_name_or_path=str(home / "policy"), max_steps=1, use_cpu=True, disable_tqdm=True
        )
        trainer = SFTTrainer(args=args, train_dataset=demonstrations(8))
        trainer.log = lambda *_, **__: seen.append(signal.getsignal(signal.SIGTERM))
        trainer.train()

    before = signal.getsignal(signal.SIGTERM)
    train("main")
    with interrupt.enabled():
        thread = threading.Thread(target=train, args=["thread"])
        thread.start()
        thread.join()
    assert seen and set(seen) == {before} and (tmp_path / "thread" / "model.safetensors").exists()


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.01)


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def test_a_process_that_is_told_to_end(home, tmp_path):
    """As a scheduler does it, from outside, with workers that load the data."""
    argv = flags(home, "sft", tmp_path / "run", max_steps=100_000, logging_steps=1, eval_strategy="no")
    argv += ["--dataloader_num_workers", "1", "--lr_scheduler_type", "constant"]
    command = [sys.executable, "-m", "rlhf", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        log = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, process)
        refused = subprocess.run(command, capture_output=True, text=True, env=environment())
        process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
    assert process.returncode == 143 and "Traceback" not in errors
    assert refused.returncode == 2
    assert f"is being written by process {process.pid} of " in refused.stderr and "Traceback" not in refused.stderr
    last = int(checkpoint.last_checkpoint(tmp_path / "run").name.removeprefix("checkpoint-"))
    assert log_of(tmp_path / "run")[-1]["step"] == last
    again = flags(home, "sft", tmp_path / "run", max_steps=last + 2, logging_steps=1, eval_strategy="no")
    again += ["--lr_scheduler_type", "constant", "--resume_from_checkpoint", "true"]
    assert cli.main(again) == 0
    whole = [word.replace(str(tmp_path / "run"), str(tmp_path / "whole")) for word in again[:-2]]
    assert cli.main(whole) == 0
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [[row["loss"] for row in log_of(tmp_path / run) if "loss" in row] for run in ("whole", "run")]
    assert rows[0] == rows[1] and len(rows[0]) == last + 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_processes_agree_on_the_step(home, ppo_files, tmp_path, stage):
    """The signal comes to one of two processes; both stop, after the same step, and go on to the same bits."""
    own = own_home(ppo_files, tmp_path)

    def start(out, *more):
        argv = flags(home, "sft", tmp_path / out, logging_steps=1, max_steps=40, save_steps=40)
        if stage == "ppo":
            argv = ppo_flags(own, out, "--max_steps=12", "--save_steps=12", "--per_device_train_batch_size=2")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        command += ["rlhf", *argv, *more]
        return subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment(ACCELERATE_USE_CPU="true"),
        )

    def finish(process):
        errors = process.stderr.read()
        process.wait()
        return errors

    whole = start("whole")
    assert finish(whole) is not None and whole.returncode == 0
    process, log = start("run"), tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 1, process)
    rank = int((tmp_path / "run" / ".rlhf.lock").read_text().split()[1])
    os.kill(rank, signal.SIGTERM)
    errors = finish(process)
    assert process.returncode != 0 and errors.count(": stopped by SIGTERM; checkpoint-") == 2
    assert not (tmp_path / "run" / "model.safetensors").exists()
    again = start("run", "--resume_from_checkpoint", "true")
    assert finish(again) is not None and again.returncode == 0
    if stage == "ppo":
        assert_same_run(own, "whole", "run")
    else:
        assert_equal(tmp_path / "whole", tmp_path / "run")
