"""The command line: help that reads well, YAML and flags checked alike, one clear line when something is wrong."""

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlhf import cli, extras
from tests.rlhf.test_train_sft import demonstrations
from tests.tiny import model_folder, word_tokenizer, write_jsonl
from tests.tiny_reward import rankings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path):
    """Paths of a tiny model, demonstrations and rankings, and a folder for runs."""
    return {
        "model": model_folder(tmp_path / "model"),
        "sft": write_jsonl(tmp_path / "sft.jsonl", demonstrations(12)),
        "ranked": write_jsonl(tmp_path / "ranked.jsonl", rankings(12)),
        "run": str(tmp_path / "run"),
        "tmp": tmp_path,
    }


@pytest.fixture
def fails(capsys):
    """fails(*argv) -> what the command prints after `rlhf: error: `; it must return 2 and print no traceback."""

    def run(*argv):
        assert cli.main(list(argv)) == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        lines = [line for line in err.splitlines() if line.startswith("rlhf: error: ")]
        assert len(lines) == 1
        return err[err.index("rlhf: error: ") + len("rlhf: error: ") :]

    return run


def sft_flags(files, **changes):
    flags = {"model_name_or_path": files["model"], "dataset_name": files["sft"], "output_dir": files["run"]}
    flags |= {"max_steps": 1, "disable_tqdm": "true", "use_cpu": "true", "sample_length": 4, **changes}
    return ["sft", *(f"--{name}={value}" for name, value in flags.items() if value is not None)]


def test_overview_names_every_command(capsys):
    assert cli.main([]) == 0 and cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("sft", "reward", "ppo", "dpo", "kto", "best-of-n", "data", "pipeline", "report", "demo"):
        assert f"  {command} " in out


def test_version(capsys):
    import rlhf_kernels

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf {rlhf_kernels.__version__}\n"


@pytest.mark.parametrize("command", ["sft", "reward", "ppo", "dpo", "kto"])
def test_help_reads_well(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) < {"ppo": 210}.get(command, 170) and max(map(len, lines)) <= 100
    assert "aper" in out and "--output_dir" in out and "--learning_rate" in out
    assert "==SUPPRESS==" not in out and "%%" not in out
    for flag in re.findall(r"^  (--\S+) *(.*)$", out, flags=re.MULTILINE):
        assert flag


def test_help_puts_own_flags_first_and_keeps_the_rest_for_help_all(capsys):
    cli.main(["sft", "--help"])
    short = capsys.readouterr().out
    assert short.index("--dataset_name") < short.index("--dropout") < short.index("--learning_rate")
    assert "--dataloader_num_workers" not in short and "--help-all" in short
    assert "paper: 0.2" in short and "paper: 16" in short
    cli.main(["sft", "--help-all"])
    long = capsys.readouterr().out
    assert "--dataloader_num_workers" in long and long.startswith(short[: short.index("model and data")])


def test_unknown_command_and_flag_name_the_nearest(fails, files):
    assert "there is no command 'rewards'; did you mean reward" in fails("rewards")
    assert "there is no flag --learning_rat; did you mean --learning_rate" in fails(
        *sft_flags(files), "--learning_rat=1"
    )
    assert "there is no flag --modle-name-or-path" in fails(*sft_flags(files), "--modle-name-or-path=x")
    assert "does not know what to do with 'stray'" in fails(*sft_flags(files), "stray")
    assert not Path(files["run"]).exists()


def test_values_of_the_wrong_type(fails, files):
    assert "--learning_rate" in fails(*sft_flags(files, learning_rate="fast"))
    assert "invalid choice: 'shorten'" in fails(*sft_flags(files, long_prompts="shorten"))
    assert "--config needs a file" in fails("sft", "--config")


def test_no_data_is_an_error(fails, files):
    assert "dataset_name: got none" in fails(*sft_flags(files, dataset_name=None))
    assert fails(*sft_flags(files, dataset_name="missing.jsonl")).startswith("missing.jsonl: no such file")


def test_bad_line_is_an_error_before_training(fails, files):
    path = write_jsonl(files["tmp"] / "bad.jsonl", [*demonstrations(3), "{", *demonstrations(2)])
    assert fails(*sft_flags(files, dataset_name=path)).startswith(f"{path}:4: is not JSON")
    assert not Path(files["run"]).exists()


def test_bad_models_are_errors(fails, files):
    assert "does not exist" in fails(*sft_flags(files, model_name_or_path="nowhere"))
    word_tokenizer(pad=None).save_pretrained(files["model"])
    assert "has no pad_token; name one of its tokens with --pad_token" in fails(*sft_flags(files))


def test_prompt_longer_than_the_context(fails, files):
    rows = [*demonstrations(3), {"prompt": " ".join(["dog"] * 70), "completion": "ran"}]
    path = write_jsonl(files["tmp"] / "long.jsonl", rows)
    message = fails(*sft_flags(files, dataset_name=path, long_prompts="error", eval_fraction=0))
    assert message.startswith(f"{path}:4: the prompt has 70 tokens, longer than the 62 that fit")
    assert not Path(files["run"]).exists()


def test_output_directory_of_another_run(fails, files):
    assert cli.main(sft_flags(files)) == 0
    metrics = (Path(files["run"]) / "metrics.jsonl").read_text()
    assert "already holds a run" in fails(*sft_flags(files))
    assert (Path(files["run"]) / "metrics.jsonl").read_text() == metrics


def test_full_disk_is_one_line(fails, files, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert "No space left on device" in fails(*sft_flags(files))
    assert not list(Path(files["run"]).glob("**/*.safetensors"))


def test_debug_shows_the_traceback(files, monkeypatch):
    monkeypatch.setenv("RLHF_DEBUG", "1")
    with pytest.raises(ValueError, match="does not exist"):
        cli.main(sft_flags(files, model_name_or_path="nowhere"))


def parse(command, *argv):
    import importlib

    module, name, _, _ = cli.STAGES[command]
    return cli.parse_stage(command, getattr(importlib.import_module(module), name), list(argv))


def test_yaml_is_overridden_by_flags(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text(
        "dataset_name: here.jsonl\nseed: 7\neval_strategy: no\n"
        "sft:\n  learning_rate: 1e-3\n  seed: 8\n  packing: false\n"
        "  lora_target_modules: [q_proj, v_proj]\n  lr_scheduler_kwargs: {min_lr_rate: 0.1}\nreward:\n  ties: half\n"
    )
    args = parse("sft", "--config", str(config), "--learning_rate", "0.5")
    assert (args.dataset_name, args.seed, args.learning_rate, args.packing) == ("here.jsonl", 8, 0.5, "false")
    assert args.eval_strategy.value == "no"  # YAML reads a bare no as false
    assert args.lora_target_modules == ["q_proj", "v_proj"] and args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert parse("sft", f"--config={config}").learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert parse("reward", "--config", str(config)).ties == "half"


def test_null_in_yaml_is_none_and_overrides(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("max_grad_norm: null\nsave_total_limit: null\nema_decay: ~\nptx_coef: 0\nstop_token:\n")
    args = parse("ppo", "--preset", "instructgpt", "--config", str(config), "--stop_token", "null")
    assert (args.max_grad_norm, args.save_total_limit, args.ema_decay) == (None, None, None)
    assert args.stop_token == "null"  # a word like any other on the command line
    lists = tmp_path / "lists.yaml"
    lists.write_text("reward_clip_range: [-1, 1]\nlora_target_modules: [a]")
    config.write_text("reward_clip_range: null\nlora_target_modules: null")
    args = parse("ppo", "--config", str(lists), "--config", str(config))
    assert args.reward_clip_range is None and args.lora_target_modules is None
    assert parse("ppo", "--max_grad_norm", "None", "--kl_target=null").max_grad_norm is None


def test_null_where_no_none_is_taken(fails, files):
    config = files["tmp"] / "x.yaml"
    config.write_text("learning_rate: null")
    assert "learning-rate: got null, but takes no None" in fails(*sft_flags(files), "--config", str(config))


def test_numbers_in_yaml_and_behind_flags(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("lr_scheduler_kwargs: {min_lr: 1e-6, text: '1e-6', n: [2E3, -1.e-2]}\nrun_name: 1e3\n")
    args = parse("sft", "--config", str(config), "--dataset_name", "x")
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6, "text": "1e-6", "n": [2000.0, -0.01]} and args.run_name == "1e3"
    for words in (["-1e-05", "-inf"], ["-.5", "-2.E+3"]):
        config.write_text(f"reward_weights: [{words[0]}, 3]")
        assert parse("ppo", "--config", str(config)).reward_weights == [float(words[0]), 3]
        assert parse("ppo", "--reward_clip_range", words[1], "5").reward_clip_range == [float(words[1]), 5]
    config.write_text("reward_clip_range: [-.inf, 5]")
    assert parse("ppo", "--config", str(config)).reward_clip_range == [float("-inf"), 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "there is no setting 'learning_rat' in rlhf sft; did you mean learning_rate"),
        ("sft:\n  droput: 1", "there is no setting 'droput' in rlhf sft; did you mean dropout"),
        ("sft: 3", "the section sft holds a int"),
        ("[1]", "holds a list, wants a mapping"),
        ("a: [", "is not YAML"),
        ("learning_rate: [1, 2]", "there is no flag"),
        ("dropout: much", "--dropout"),
    ],
)
def test_bad_yaml(fails, files, text, message):
    config = files["tmp"] / "x.yaml"
    config.write_text(text)
    if text.startswith("learning_rate: ["):
        message = "does not know what to do with '2'"
    assert message in fails(*sft_flags(files), "--config", str(config))
    assert "cannot read" in fails(*sft_flags(files), "--config", str(files["tmp"] / "none.yaml"))


def test_preset_holds_the_papers_recipe():
    args = parse("sft", "--preset", "instructgpt", "--dataset_name", "x")
    assert (args.num_train_epochs, args.learning_rate, args.dropout) == (16, 9.65e-6, 0.2)
    assert args.per_device_train_batch_size == 32 and args.warmup_steps == 0
    assert args.lr_scheduler_type.value == "cosine_with_min_lr" and args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    args = parse("reward", "--preset=instructgpt", "--dataset_name", "x", "--seed", "1")
    assert (args.num_train_epochs, args.learning_rate, args.per_device_train_batch_size) == (1, 9e-6, 64)
    assert args.ties == "drop" and args.lr_scheduler_kwargs == {"min_lr_rate": 0.1} and args.seed == 1
    args = parse("ppo", "--preset", "instructgpt", "--ptx_dataset_name", "x")
    assert (args.total_episodes, args.rollout_batch_size, args.num_mini_batches) == (256_000, 512, 8)
    assert (args.num_ppo_epochs, args.cliprange, args.kl_coef, args.gamma, args.lam) == (1, 0.2, 0.02, 1.0, 0.95)
    assert (args.ptx_coef, args.ptx_batch_multiplier, args.ema_decay, args.temperature) == (27.8, 8, 0.992, 1.0)
    assert (args.learning_rate, args.value_learning_rate, args.warmup_iterations) == (9.6e-6, 9e-6, 10)


def test_presets_hold_only_differences():
    import dataclasses
    import importlib

    preset = yaml.safe_load((cli.PRESETS / "instructgpt.yaml").read_text())
    for command, section in preset.items():
        module, name, _, _ = cli.STAGES[command]
        config_class = getattr(importlib.import_module(module), name)
        fields = {item.name: item.default for item in dataclasses.fields(config_class)}
        for key, value in section.items():
            assert key in fields and fields[key] != value, (command, key)


def test_unknown_preset(fails):
    assert "there is no preset 'instructgtp'; did you mean instructgpt" in fails("sft", "--preset", "instructgtp")


def test_reward_from_the_command_line(files, capsys):
    flags = ["--model_name_or_path", files["model"], "--dataset_name", files["ranked"], "--output_dir", files["run"]]
    assert cli.main(["reward", *flags, "--max_steps", "2", "--use_cpu", "--disable_tqdm", "--eval_fraction=0.3"]) == 0
    out = capsys.readouterr().out
    assert "longer wins" in out and f"{files['run']}/report.html" in out
    assert (Path(files["run"]) / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


IN_A_PROCESS = """
import os, sys
from rlhf import cli, extras
assert "torch" not in sys.modules, "importing rlhf.cli must not import torch"
seen = {}
def tool(argv):
    seen["value"] = os.environ.get("THP_MEM_ALLOC_ENABLE")
sys.modules["rlhf.reports.report"] = type(sys)("rlhf.reports.report")
sys.modules["rlhf.reports.report"].main = tool
cli.main(["report"])
assert "torch" not in sys.modules
print(seen["value"])
"""


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_huge_pages_are_asked_for_before_torch(given, expected):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"PYTHONPATH": str(ROOT), **({"THP_MEM_ALLOC_ENABLE": given} if given else {})}
    result = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == expected


def test_environment_for_a_bug_report(capsys, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_CPU_POOL_MB", "7")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("RLHF_CACHE", "/home/secret/cache")
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    found = dict(line.split("  ", 1) for line in printed.splitlines())
    assert found["torch"].strip() == torch.__version__ and found["RLHF_KERNELS_CPU_POOL_MB"].strip() == "7"
    assert found["backend reference"].strip() == "available"
    assert {"Python", "processor", "threads", "instruction sets", "backend cuda", "rlhf-kernels"} <= found.keys()
    assert "secret" not in printed


REQUIRES = ["torch>=2.8", "transformers>=5.8; extra == 'train'", 'numpy>=1.26 ; extra == "train"']
REQUIRES += ["pytest; extra == 'test'"]


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        ({"transformers": "5.8.1", "numpy": "2.0"}, None),
        ({"numpy": "2.0"}, "needs transformers: pip install 'rlhf-kernels[train]'"),
        ({"transformers": "4.57.0", "numpy": "1.26.0rc1"}, "needs transformers >= 5.8 (there is 4.57.0): pip install"),
        ({}, "needs transformers, numpy: pip install 'rlhf-kernels[train]'"),
    ],
)
def test_without_what_the_trainers_need_one_line_says_so(installed, told, monkeypatch, capsys):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(importlib.metadata, "version", version)
    if told is None:
        assert extras.lacking() is None
        return
    assert extras.lacking().startswith(told)
    assert cli.main(["sft", "--dataset_name", "x.jsonl"]) == 2
    assert capsys.readouterr().err.startswith(f"rlhf: error: rlhf sft {told}")
    assert cli.main(["--help"]) == 0


@pytest.mark.parametrize("command", ["sft", "report", "pipeline"])
def test_ctrl_c_advises_what_the_command_has(command, monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_command", interrupted)
    assert cli.main([command]) == 130
    said = capsys.readouterr().err.strip()
    advice = {"sft": "--resume_from_checkpoint true goes on", "pipeline": "the same command goes on where it was"}
    assert said.startswith("rlhf: stopped") and advice.get(command, "") in said
    assert ("resume_from_checkpoint" in said) == (command == "sft")


@pytest.mark.parametrize("argv", [["sft", "--help-all"], ["--help"], ["env"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_the_command_quietly(argv, unbuffered):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "rlhf", *argv]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE
