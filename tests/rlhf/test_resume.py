"""A run of a stage goes on as the same run only: other settings, rows, models or processes are errors."""

import json
import shutil

import pytest

from rlhf import checkpoint, cli, locks
from tests.rlhf.test_train_sft import demonstrations
from tests.tiny import model_folder, write_jsonl
from tests.tiny_reward import rankings

STAGES = ("sft", "reward", "dpo", "kto")
SAME_ONLY = "(resume_from_checkpoint goes on with the same run only)"


def rows_of(stage, seed=0):
    if stage in ("dpo", "kto"):
        words = "bcdefghijklmnopq" if not seed else "qponmlkjihgfedcb"
        return [{"prompt": f"a {word}", "chosen": f"{word} good", "rejected": "bad"} for word in words]
    return demonstrations(16, seed) if stage == "sft" else rankings(16, seed)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a policy, rows, and a run of each stage of which two of four steps are done."""
    path = tmp_path_factory.mktemp("runs")
    model_folder(path / "policy")
    model_folder(path / "policy-other", seed=1)
    for stage in STAGES:
        write_jsonl(path / f"{stage}.jsonl", rows_of(stage))
        write_jsonl(path / f"{stage}-other.jsonl", rows_of(stage, seed=1))
        assert cli.main(flags(path, stage, path / stage, max_steps=2)) == 0
        (path / stage / "model.safetensors").unlink()
    write_jsonl(path / "held-out.jsonl", rows_of("sft", 2))
    return path


def flags(path, stage, run, **changes):
    options = {
        "model_name_or_path": path / "policy", "dataset_name": path / f"{stage}.jsonl", "output_dir": run,
        "max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant", "learning_rate": 1e-2, "logging_steps": 1,
        "disable_tqdm": "true", "use_cpu": "true", "per_device_train_batch_size": 4, **changes,
    }  # fmt: skip
    return [stage, *(f"--{name}={value}" for name, value in options.items())]


def resume(path, stage, run, **changes):
    return cli.main([*flags(path, stage, run, **changes), "--resume_from_checkpoint", "true"])


CHANGES = [
    *((stage, change) for stage in STAGES for change in (
        {"learning_rate": 0.5}, {"seed": 7}, {"eval_fraction": 0.5}, {"per_device_train_batch_size": 2},
        {"dataset_name": "other"}, {"model_name_or_path": "policy"},
        {"weight_decay": 0.1}, {"lr_scheduler_type": "linear"}, {"adam_beta2": 0.5},
    )),
    ("sft", {"dropout": 0.1}), ("sft", {"eval_dataset_name": "held-out"}), ("reward", {"ties": "half"}),
    ("reward", {"demonstrations": "sft"}), ("dpo", {"beta": 0.5}), ("dpo", {"loss_type": "ipo"}),
    ("kto", {"undesirable_weight": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "change"), CHANGES)
def test_another_run_is_not_gone_on_with(begun, capsys, stage, change):
    ((name, value),) = change.items()
    file = {"other": f"{stage}-other.jsonl", "held-out": "held-out.jsonl", "sft": "sft.jsonl", "policy": "policy-other"}
    file = file.get(value)
    log = (begun / stage / "metrics.jsonl").read_text()
    assert resume(begun, stage, begun / stage, **{name: begun / file if file else value}) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rlhf: error: ") and f"{name}: " in said and said.endswith(SAME_ONLY)
    if file is None and name != "lr_scheduler_type":
        assert "was written by a run with" in said and f"this run has {value!r}" in said
    assert (begun / stage / "metrics.jsonl").read_text() == log
    assert not (begun / stage / locks.LOCK).exists()


def test_length_counts_where_the_schedule_looks_to_the_end(begun, tmp_path, capsys):
    assert cli.main(flags(begun, "sft", tmp_path / "run", max_steps=2, lr_scheduler_type="linear")) == 0
    assert resume(begun, "sft", tmp_path / "run", lr_scheduler_type="linear") == 2
    assert "max_steps: " in capsys.readouterr().err


def test_another_stage_version_or_number_of_processes(begun, tmp_path, capsys):
    shutil.copytree(begun / "sft", tmp_path / "run")
    assert resume(begun, "dpo", tmp_path / "run") == 2
    assert "was written by rlhf sft, not dpo" in capsys.readouterr().err
    record = tmp_path / "run" / "checkpoint-2" / "same_run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"num_processes": 2}))
    assert resume(begun, "sft", tmp_path / "run") == 2
    assert "num_processes: " in capsys.readouterr().err
    record.unlink()
    assert resume(begun, "sft", tmp_path / "run") == 2
    assert "was written by another version or another stage" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_what_may_change(begun, tmp_path, stage):
    """Where things lie, how long the run goes on, what it tells and keeps, how it is evaluated."""
    shutil.copytree(begun / stage, tmp_path / "run")
    shutil.copy(begun / f"{stage}.jsonl", tmp_path / "moved.jsonl")
    shutil.copytree(begun / "policy", tmp_path / "policy")
    changes = {
        "dataset_name": tmp_path / "moved.jsonl", "model_name_or_path": tmp_path / "policy", "max_steps": 3,
        "columns": "prompt=prompt", "bad_rows": "skip", "dataset_num_proc": 1,
        "logging_steps": 2, "save_steps": 1, "eval_steps": 1, "per_device_eval_batch_size": 3, "save_total_limit": 5,
    }  # fmt: skip
    assert resume(begun, stage, tmp_path / "run", **changes) == 0
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]
