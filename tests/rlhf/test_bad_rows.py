"""Rows that a model's chat template refuses, in every stage and tool: named before anything runs, or left out."""

import contextlib
import json
import os

import pytest
import yaml

from rlhf import cli, models
from rlhf.data import problems
from tests.tiny import model_folder, word_tokenizer, write_jsonl

TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}{{ m.content }} <|end|> {% endfor %}"
)
GOOD = [{"role": "user", "content": "the dog"}]
REFUSED = [{"role": "system", "content": "good"}, *GOOD]
FIELDS = {
    "sft": {"completion": "ran"},
    "reward": {"completions": ["ran", "sat"], "ranks": [0, 1]},
    "dpo": {"chosen": "ran", "rejected": "sat"},
    "kto": {"completion": "ran", "label": True},
    "prompts": {},
}


@pytest.fixture
def home(tmp_path):
    tokenizer = word_tokenizer(extra=("<|end|>",), chat_template=TEMPLATE)
    model_folder(tmp_path / "policy", tokenizer=tokenizer)
    reward = models.reward_model_from_policy(tmp_path / "policy", 1, pad_token_id=tokenizer.pad_token_id)
    models.save_model(reward, tokenizer, tmp_path / "rm")
    for name, fields in FIELDS.items():
        rows = [{"prompt": prompt, **fields} for prompt in (GOOD, "the cat", REFUSED)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        write_jsonl(tmp_path / f"good-{name}.jsonl", rows[:2])
    return tmp_path


def commands(home):
    train = ["--model_name_or_path", home / "policy", "--use_cpu", "true", "--output_dir", home / "run"]
    found = {
        stage: [stage, *train, "--dataset_name", home / f"{stage}.jsonl"] for stage in ("sft", "reward", "dpo", "kto")
    }
    models_of_ppo = ["--sft_model_path", home / "policy", "--reward_model_path", home / "rm"]
    found["ppo"] = ["ppo", *models_of_ppo, "--dataset_name", home / "prompts.jsonl", "--output_dir", home / "run"]
    best = [
        "--model_name_or_path",
        home / "policy",
        "--reward_model_path",
        home / "rm",
        "--n",
        2,
        "--response_length",
        8,
    ]
    found["best-of-n"] = ["best-of-n", *best, "--dataset_name", home / "prompts.jsonl"]
    pipeline = ["pipeline", "--model_name_or_path", home / "policy", "--output_dir", home / "run"]
    found["pipeline, prompts"] = [*pipeline, "--ranked_dataset", home / "good-reward.jsonl"]
    found["pipeline, prompts"] += ["--prompts_dataset", home / "prompts.jsonl"]
    found["pipeline, rankings"] = [*pipeline, "--ranked_dataset", home / "reward.jsonl"]
    return {name: list(map(str, argv)) for name, argv in found.items()}


NAMES = ["sft", "reward", "dpo", "kto", "ppo", "best-of-n", "pipeline, prompts", "pipeline, rankings"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_named(home, capsys, name):
    argv = commands(home)[name]
    file = next(word for word in reversed(argv) if word.endswith(".jsonl"))
    try:
        status = cli.main(argv)
    except SystemExit as ended:  # of a tool's argument parser
        status = ended.code
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert status == 2
    assert error.endswith(f"{file}:3: the tokenizer's chat template refuses the messages: no system role here")
    assert not (home / "run").exists() or set(os.listdir(home / "run")) <= {"samples.jsonl"}


@pytest.mark.parametrize("name", NAMES)
def test_all_of_them_are_named(home, capsys, name):
    argv = commands(home)[name]
    file = next(word for word in reversed(argv) if word.endswith(".jsonl"))
    with open(file, encoding="utf-8") as lines:
        refused = lines.read().splitlines()[2]
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(f"{refused}\n{refused}\n")
    with pytest.raises(SystemExit) if name in NAMES[NAMES.index("best-of-n") :] else contextlib.nullcontext():
        assert cli.main(argv) == 2
    said = capsys.readouterr().err.strip().split("\n")[-3:]
    assert [f"{file}:{line}: the tokenizer's chat" in text for line, text in zip((3, 4, 5), said)] == [True] * 3


@pytest.fixture
def notes(monkeypatch, caplog):
    """What is told beside errors."""
    monkeypatch.setattr(problems.logger, "propagate", True)
    monkeypatch.setattr(cli, "log_to_stderr", lambda: None)  # which a command before this test may have done
    return caplog


QUICK = {"max_steps": 1, "per_device_train_batch_size": 2, "disable_tqdm": True, "save_strategy": "no"}
STAGE = {**QUICK, "use_cpu": True, "eval_fraction": 0, "max_length": 32}
PPO = {**QUICK, "response_length": 4, "rollout_batch_size": 2, "num_ppo_epochs": 1, "save_steps": 0}
del PPO["save_strategy"]


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto", "ppo"])
def test_they_are_left_out_when_asked(home, notes, name):
    flags = {**(PPO if name == "ppo" else STAGE), "bad_rows": "skip"}
    more = {"num_samples": 0} if name == "sft" else {}
    argv = [
        *commands(home)[name],
        *(str(word) for flag in {**flags, **more}.items() for word in (f"--{flag[0]}", flag[1])),
    ]
    file = next(word for word in argv if word.endswith(".jsonl"))
    with open(file, "a", encoding="utf-8") as lines:
        lines.write("{\n")
    assert cli.main(argv) == 0
    said = "\n".join(notes.messages)
    assert f"left out 1 of 4 rows:\n{file}:4: is not JSON" in said
    which = "" if name == "ppo" else "training "
    assert f"left out 1 of 3 {which}rows:\n{file}:3: the tokenizer's chat template refuses" in said


def test_an_error_says_where_none_is_left(home, capsys):
    """Of two rows the one that is held out is the one that is refused."""
    rows = write_jsonl(home / "two.jsonl", [{"prompt": prompt, "completion": "ran"} for prompt in (GOOD, REFUSED)])
    argv = ["sft", "--model_name_or_path", home / "policy", "--dataset_name", rows, "--bad_rows", "skip"]
    for seed in range(8):
        flags = ["--use_cpu", "true", "--output_dir", home / f"run-{seed}", "--seed", seed, "--eval_fraction", 0.5]
        flags += ["--max_steps", 1, "--num_samples", 0]
        if cli.main(list(map(str, argv + flags))) and "held-out rows" in (said := capsys.readouterr().err):
            break
    lines = said.strip().split("\n")[-2:]
    assert f"{rows}:2: the tokenizer's chat template refuses" in lines[0]
    assert lines[1] == "none of the 1 held-out rows can be used"


def test_a_pipeline_reads_its_data_as_its_stages_do(home, notes):
    """Names of columns, rows to leave out and messages with tools come to every stage, and to the evaluation; what
    reward functions read comes to PPO, once they have looked at it."""
    tools = [{"type": "function", "function": {"name": "find"}}]
    asked = [
        {"q": [{"role": "user", "content": text}], "tools": tools} for text in ("the dog", "the cat", "the", "dog")
    ]
    good = [{**row, "a": "ran", "b": "sat"} for row in asked]
    refused = {**good[0], "q": REFUSED}
    ranked = write_jsonl(home / "r.jsonl", [*good, refused])
    sft = write_jsonl(home / "s.jsonl", [refused, *good])
    patterns = [{**row, "pattern": "ran"} for row in asked]
    wrong = {"q": "the dog ran", "pattern": "("}
    prompts = write_jsonl(home / "p.jsonl", [*patterns, {"q": REFUSED}, *patterns, wrong])
    skip = {"bad_rows": "skip"}
    sections = {
        "sft": {**STAGE, **skip, "columns": "prompt=q,completion=a", "num_samples": 0},
        "reward": {**STAGE, **skip, "columns": "prompt=q,chosen=a,rejected=b"},
        "ppo": {**PPO, **skip, "columns": "prompt=q", "reward_function": "regex"},
        "evaluate": {"samples_per_prompt": 1},
    }
    (home / "settings.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    argv = ["pipeline", "--model_name_or_path", home / "policy", "--output_dir", home / "run", "--sft_dataset", sft]
    argv += ["--ranked_dataset", ranked, "--prompts_dataset", prompts, "--held_out_prompts", 1]
    assert cli.main(list(map(str, [*argv, "--config", home / "settings.yaml"]))) == 0
    written = [json.loads(line) for line in (home / "run" / "data" / "prompts.jsonl").read_text().splitlines()]
    assert len(written) == 3 and all((row["tools"], row["pattern"]) == (tools, "ran") for row in written)
    said = "\n".join(notes.messages)
    assert "p.jsonl:5: the tokenizer's chat template refuses" in said and "s.jsonl:1: the tokenizer's" in said
    assert "left out 1 of 9 rows:" in said and "p.jsonl:10: regex: pattern: '(' is not a regular expression" in said
