"""What a run leaves behind: a model that is whole and finite, or none, one line that says why, and nothing else."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf import cli, models
from rlhf.disk import WriteError
from tests.rlhf.test_disk import FULL, ROOT
from tests.tiny import model_folder, word_tokenizer, write_jsonl

ROWS = {
    "sft": [{"prompt": f"the {x}", "completion": "dog ran up"} for x in "abcdefgh"],
    "reward": [{"prompt": f"the {x}", "completions": ["good dog", "bad"], "ranks": [0, 1]} for x in "abcdefgh"],
    "dpo": [{"prompt": f"the {x}", "chosen": "good dog", "rejected": "bad"} for x in "abcdefgh"],
}
REWARD = "def f(prompts, completions, completion_ids, **columns):\n    return [{value}] * len(prompts)\n"


@pytest.fixture
def home(tmp_path):
    model_folder(tmp_path / "policy")
    for stage, rows in ROWS.items():
        write_jsonl(tmp_path / f"{stage}.jsonl", rows)
    (tmp_path / "good.py").write_text(REWARD.format(value="1.0"))
    (tmp_path / "huge.py").write_text(REWARD.format(value="1e39"))  # infinite as fp32
    return tmp_path


def arguments(home, stage, *more, out="run"):
    if stage == "ppo":
        named = ["--sft_model_path", home / "policy", "--reward_function", f"{home / 'good.py'}:f", "--max_steps", 1]
        named += ["--response_length", 4, "--dataset_name", home / "sft.jsonl"]
    else:
        named = ["--model_name_or_path", home / "policy", "--dataset_name", home / f"{stage}.jsonl"]
        named += ["--use_cpu", "true", "--eval_fraction", 0]
    named += ["--output_dir", home / out, "--disable_tqdm", "true"]
    return [stage, *map(str, [*named, *more])]


def names(folder):
    return sorted(os.listdir(folder))


def one_line(capsys):
    """The error line of a command, which is all that it says as an error."""
    err = capsys.readouterr().err
    lines = [line for line in err.split("\n") if line.startswith("rlhf: error: ")]
    assert len(lines) == 1 and "Traceback" not in err
    assert err.rstrip().endswith(lines[0])
    return lines[0]


@pytest.mark.parametrize("stage", ROWS)
def test_a_diverged_run_is_never_its_result(home, capsys, stage):
    diverging = ["--learning_rate", "1e20", "--per_device_train_batch_size", 2, "--num_train_epochs", 3]
    assert cli.main(arguments(home, stage, *diverging, "--save_steps", 1)) == 2
    line = one_line(capsys)
    assert "became NaN or infinite" in line and "the last checkpoint, checkpoint-" in line
    assert not (home / "run" / "model.safetensors").exists()
    for folder in (home / "run").glob("checkpoint-*"):
        assert all(weight.isfinite().all() for weight in load_file(folder / "model.safetensors").values())
    json.loads((home / "run" / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("stage", ROWS)
def test_a_last_step_that_breaks_the_weights_is_seen(home, capsys, stage):
    """The loss of the only step is finite; the step itself leaves infinite weights."""
    assert cli.main(arguments(home, stage, "--learning_rate", "1e39", "--max_steps", 1, "--save_strategy", "no")) == 2
    rows = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(rows[0]["loss"])
    assert "weights of the model became NaN or infinite" in one_line(capsys)
    assert not (home / "run" / "model.safetensors").exists()


def test_scores_that_are_not_finite_end_ppo_in_one_line(home, capsys):
    assert cli.main(arguments(home, "ppo", "--reward_function", f"{home / 'huge.py'}:f")) == 2
    assert "iteration 1: scores, advantages, returns became NaN or infinite; the batch is in" in one_line(capsys)


@pytest.mark.parametrize("stage", [*ROWS, "ppo"])
def test_what_cannot_be_saved_is_known_before_the_training(home, capsys, monkeypatch, stage):
    """Settings that only sampling reads, without do_sample; transformers refuses to write them once a token changed."""
    if stage in ("reward", "ppo"):  # a reward model generates nothing, and PPO changes no token
        tokenizer = type(word_tokenizer())
        monkeypatch.setattr(tokenizer, "save_pretrained", lambda *args, **options: 1 / 0)
    else:
        settings = {"do_sample": False, "temperature": 0.6, "eos_token_id": 2}
        (home / "policy" / "generation_config.json").write_text(json.dumps(settings))
    assert cli.main(arguments(home, stage)) == 2
    line = one_line(capsys)
    assert "could not be saved after the training" in line and ("temperature" in line or "division" in line)
    assert not [name for name in names(home / "run") if name not in ("run.json", "samples.jsonl", ".rlhf.lock")]


@pytest.mark.parametrize("stage", [*ROWS, "ppo"])
def test_a_trial_leaves_nothing_behind(home, stage):
    assert cli.main(arguments(home, stage)) == 0
    assert not list((home / "run").rglob(".*"))
    models.load_tokenizer(home / "run")


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    model, tokenizer = models.load_policy(model_folder(tmp_path / "policy")), word_tokenizer()
    needed = sum(weight.numel() for weight in model.parameters()) * 4
    for free, fits in ((needed, True), (needed - 1, False)):
        usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if fits:
            models.check_saving(model, tokenizer, tmp_path)
        else:
            with pytest.raises(ValueError, match=r"output_dir: .* has 0.0 GB left on its disk, the weights alone are"):
                models.check_saving(model, tokenizer, tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    model, tokenizer = models.load_policy(model_folder(tmp_path / "policy")), word_tokenizer()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/run: cannot be written \((Not a directory|File exists)\)"):
        models.check_saving(model, tokenizer, tmp_path / "file" / "run")


def test_a_full_disk_is_one_line(home):
    model_folder(home / "policy", hidden_size=32, intermediate_size=64)  # larger than the disk
    rollouts = ("--rollout_batch_size", 64, "--response_length", 32)
    runs = {
        ("sft",): "checkpoint-1: cannot be written (File too large)",
        ("sft", "--save_strategy", "no"): "2: cannot be written (File too large)",
        ("ppo", *rollouts): "checkpoint-1: cannot be written (File too large)",
        ("ppo", "--reward_function", "huge.py:f", *rollouts): "returns became NaN or infinite; the batch could not be",
    }
    commands = [
        arguments(home, stage, "--max_steps", 1, *more, out=str(number))
        for number, (stage, *more) in enumerate(runs, 1)
    ]
    script = f"""{FULL}
import json, sys
from rlhf import cli
for command in json.loads(sys.argv[1]):
    print("status", cli.main(command), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        cwd=home, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.split("\n")
    ends = [(lines[at - 1], line) for at, line in enumerate(lines) if line.startswith("status ")]
    assert [status for _, status in ends] == ["status 2"] * len(runs), done.stderr
    for (last, _), said in zip(ends, runs.values()):
        assert last.startswith("rlhf: error: ") and said in last
    for out in "1234":
        assert not list((home / out).rglob(".*")) and not (home / out / "config.json").exists()


def test_the_best_model_is_the_one_that_is_told_of(home):
    """A rate at which the loss goes up and down, so that the last step is not the best."""
    every = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps", "--save_steps", 1]
    rate = ["--learning_rate", 0.5, "--lr_scheduler_type", "constant", "--max_steps", 5, "--save_total_limit", 9]
    more = [*every, *rate, "--load_best_model_at_end", "true", "--eval_fraction", 0.25]
    assert cli.main(arguments(home, "sft", *more)) == 0
    rows = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert len(losses) == len([row for row in rows if "eval/loss" in row]) == 5
    best = min(losses, key=losses.get)
    assert best != 5, losses
    final = load_file(home / "run" / "model.safetensors")
    saved = load_file(home / "run" / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(final[name], weight) for name, weight in saved.items())
    summary = json.loads((home / "run" / "run.json").read_text())["summary"]
    assert summary["best_step"] == best and summary["eval/loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize(
    ("stage", "flags", "said"),
    [
        ("ppo", ("--attn_implementation", "no_such_attention"), "attn_implementation: got 'no_such_attention'"),
        ("sft", ("--attn_implementation", "flash_attention_2"), "attn_implementation: got 'flash_attention_2'"),
        ("sft", ("--report_to", "no_such_tracker"), "report_to: got "),
        ("dpo", ("--deepspeed", "no_such.json"), "deepspeed: got "),
        ("sft", ("--optim", "galore_adamw", "--optim_target_modules", "attn"), "optim: You need to install"),
        ("ppo", ("--stop_token_id", 9999), "stop token: got the id 9999"),
    ],
)
def test_what_a_user_can_mend_is_one_line(home, capsys, stage, flags, said):
    assert cli.main(arguments(home, stage, *flags)) == 2
    assert said in one_line(capsys)
    assert not {path.name for path in home.glob("run/*")} & {"checkpoint-1", "model.safetensors"}


def test_a_metric_that_is_not_there(home, capsys):
    every = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--metric_for_best_model", "bleu"]
    assert cli.main(arguments(home, "sft", "--load_best_model_at_end", "true", "--eval_fraction", 0.25, *every)) == 2
    assert "eval_bleu" in one_line(capsys)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("content", "said"), [("{", "that is not JSON"), ("[]", "with a list, wants a JSON object")])
def test_settings_of_a_model_that_cannot_be_read(home, capsys, file, content, said):
    (home / "policy" / file).write_text(content)
    assert cli.main(arguments(home, "sft")) == 2
    assert f"holds a {file} {said}" in one_line(capsys)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_tracker_that_is_not_installed(home, capsys, monkeypatch, stage):
    monkeypatch.setattr("importlib.util.find_spec", _without("tensorboard"))
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    assert cli.main(arguments(home, stage, "--report_to", "tensorboard")) == 2
    line = one_line(capsys)
    assert "report_to: got" in line and "tensorboard" in line and "installed" in line


def _without(name):
    from importlib.util import find_spec

    return lambda wanted, *more: None if wanted == name else find_spec(wanted, *more)


def test_output_dir_at_home(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    assert cli.main(arguments(home, "ppo", "--output_dir", "~/there")) == 0
    assert (home / "there" / "model.safetensors").is_file() and not Path("~").exists()
