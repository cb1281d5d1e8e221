"""A row that a model's chat template refuses, in every stage and tool: one line that names it, before anything runs."""

import os

import pytest

from rlhf import cli, models
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
    found = {stage: [stage, *train, "--dataset_name", home / f"{stage}.jsonl"] for stage in ("sft", "reward", "dpo")}
    models_of_ppo = ["--sft_model_path", home / "policy", "--reward_model_path", home / "rm"]
    found["ppo"] = ["ppo", *models_of_ppo, "--dataset_name", home / "prompts.jsonl", "--output_dir", home / "run"]
    best = ["--model_name_or_path", home / "policy", "--reward_model_path", home / "rm", "--n", 2]
    found["best-of-n"] = ["best-of-n", *best, "--dataset_name", home / "prompts.jsonl"]
    pipeline = ["pipeline", "--model_name_or_path", home / "policy", "--output_dir", home / "run"]
    found["pipeline, prompts"] = [*pipeline, "--ranked_dataset", home / "good-reward.jsonl"]
    found["pipeline, prompts"] += ["--prompts_dataset", home / "prompts.jsonl"]
    found["pipeline, rankings"] = [*pipeline, "--ranked_dataset", home / "reward.jsonl"]
    return {name: list(map(str, argv)) for name, argv in found.items()}


NAMES = ["sft", "reward", "dpo", "ppo", "best-of-n", "pipeline, prompts", "pipeline, rankings"]


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
