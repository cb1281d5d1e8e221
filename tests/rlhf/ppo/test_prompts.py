"""The prompts of a PPO run: which rows are refused before it, what becomes of those that are too long."""

import functools
import json
import logging
import math
from types import SimpleNamespace

import pytest

from rlhf.data import DataError, encoders, large
from rlhf.ppo import PPOTrainer, prompts, train_ppo
from rlhf.rewards import math_answer, regex, row_checks
from tests.tiny import language_model
from tests.tiny_ppo import TIMINGS, WORDS, bananas, make_tokenizer, write_files


@pytest.fixture(scope="module")
def ppo_files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("ppo"))


def write(home, rows, name="rows.jsonl"):
    (home.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(home.path / name)


LENGTHS = ["the cat", "a dog sat on", "it", "the dog and the cat ran", "the mat", "a cat saw it"]
"""The prompts of `tests.tiny_ppo`: 2, 4, 1, 6, 2, 4 tokens."""


def words(trainer):
    return [" ".join(WORDS[token] for token in row["prompt_ids"]) for row in trainer.prompts]


def test_long_prompts_are_cut_by_default(home, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = home.trainer(response_length=45)
    assert words(trainer) == ["the cat", "dog sat on", "it", "the cat ran", "the mat", "cat saw it"]
    assert [row["prompt"] for row in trainer.prompts] == LENGTHS  # what reward functions get
    assert "long_prompts: cut 3 of 6 prompts to the 3 tokens that fit" in caplog.text
    assert trainer.contract["prompt_ids"] == 0
    trainer.train()


def test_a_run_learns_the_same_from_large_data(home, everything_is_large, monkeypatch):
    """Prompts and pretraining texts that lie in the cache; a prompt that the template refuses is left out of both."""
    rows = [{"prompt": prompt} for prompt in LENGTHS] + [{"prompt": [{"role": "user", "content": "a"}]}]
    texts = write(
        home, [{"text": text} for text in ("the cat sat on the mat .", "a dog ran .", "it saw a cat")], "ptx.jsonl"
    )
    options = {"dataset_name": write(home, rows), "bad_rows": "skip", "ptx_dataset_name": texts, "ptx_coef": 0.5}
    options |= {"ptx_max_length": 4, "max_steps": 3, "save_steps": 3}
    found = []
    for size in (1, math.inf):
        monkeypatch.setattr(large, "BYTES", size)
        monkeypatch.setattr(encoders, "LARGE", size)
        trainer = home.trainer(f"run-{size}", **options)
        assert isinstance(trainer.prompts.rows, list) is (size != 1) and words(trainer) == LENGTHS
        trainer.train()
        found.append([{name: row[name] for name in row if name not in TIMINGS} for row in home.rows(f"run-{size}")])
    assert found[0] == found[1] and len(found[0]) == 3
    home.trainer("run-1", resume_from_checkpoint="true", **{**options, "max_steps": 4}).train()  # now as small data
    assert len(home.rows("run-1")) == 4


def test_long_prompts_are_dropped(home, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = home.trainer(max_prompt_length=3, long_prompts="drop", max_steps=-1, rollout_batch_size=4)
    assert words(trainer) == ["the cat", "it", "the mat"]
    assert [row["row_number"] for row in trainer.prompts] == [0, 1, 2]
    assert "long_prompts: dropped 3 of 6 prompts: at most 3 tokens fit" in caplog.text
    assert trainer.prompt_cursor.size == 3 and trainer.iterations == 1  # 3 prompts, 4 an iteration
    path = write(home, [{"prompt": "a a"}, {"prompt": "the cat"}])
    none = r"long_prompts: drop leaves none of 2 prompts, as of .*rows.jsonl:1: the prompt has 2 tokens, longer than"
    with pytest.raises(DataError, match=none):
        home.trainer("none", max_prompt_length=1, long_prompts="drop", dataset_name=path)


def test_long_prompts_are_an_error_with_all_of_them_listed(home):
    with pytest.raises(DataError) as caught:
        home.trainer(response_length=45, long_prompts="error")
    lines = str(caught.value).splitlines()
    assert [line.partition("prompts.jsonl:")[2][0] for line in lines] == ["2", "4", "6"]
    assert lines[1].endswith(
        "the prompt has 6 tokens; with response_length 45 it does not fit the policy's context of 48"
    )
    with pytest.raises(DataError, match=r"prompts.jsonl:4: the prompt has 6 tokens, longer than max_prompt_length 5"):
        home.trainer("b", max_prompt_length=5, long_prompts="error")
    with pytest.raises(ValueError, match="response_length: got 48, which leaves no room for a prompt in the policy's"):
        home.trainer("c", response_length=48)


def test_a_run_goes_on_with_the_same_prompts_only(home):
    options = {"long_prompts": "drop", "max_prompt_length": 4, "save_steps": 1}
    train_ppo(home.config(**options, max_steps=1))
    again = {"resume_from_checkpoint": "true", "max_steps": 2}
    for changes, message in (
        ({"max_prompt_length": 3}, "dataset_name: holds other rows than when .*checkpoint-1 was written"),
        ({"max_prompt_length": 3}, "max_prompt_length: .* was written by a run with 4, this run has 3"),
        ({"long_prompts": "truncate"}, "long_prompts: .* was written by a run with 'drop', this run has 'truncate'"),
    ):
        with pytest.raises(ValueError, match=message):
            home.trainer(**{**options, **again, **changes})
    train_ppo(home.config(**options, **again, dataset_num_proc=1))
    assert [row["step"] for row in home.rows()] == [1, 2]


CHAT = (
    "{% for m in messages %}{{ raise_exception('no system role') if m.role == 'system' }}"
    "<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer():
    tokenizer = make_tokenizer([*WORDS[:13], "<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def talk(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def test_prompts_that_the_template_refuses_are_all_listed_or_left_out(home, caplog):
    bad = [{"role": "system", "content": "sat"}, *talk("the cat")]
    path = write(home, [{"prompt": talk("a dog")}, {"prompt": bad}, {"prompt": "it"}, {"prompt": bad}])
    with pytest.raises(DataError) as caught:
        PPOTrainer(home.config(dataset_name=path, reward_model_path=None), chat_tokenizer(), reward_fn=bananas)
    refused = "the tokenizer's chat template refuses the messages: no system role"
    assert str(caught.value) == f"{path}:2: {refused}\n{path}:4: {refused}"
    options = {"dataset_name": path, "reward_model_path": None, "bad_rows": "skip"}
    with caplog.at_level(logging.WARNING):
        trainer = PPOTrainer(home.config(**options), chat_tokenizer(), reward_fn=bananas)
    assert [row["prompt"] for row in trainer.prompts] == [talk("a dog"), "it"]
    assert f"left out 2 of 4 rows:\n{path}:2,4: {refused}" in caplog.text


def test_prompts_that_the_template_of_another_reward_model_refuses_are_all_listed_or_left_out(caplog):
    tokenizer, good, bad = chat_tokenizer(), talk("a dog"), [{"role": "system", "content": "sat"}, *talk("it")]
    rows = [{"prompt": prompt, "at": f"file:{number}"} for number, prompt in enumerate([bad, "it", bad, good], start=1)]
    found = prompts.Prompts(rows)
    for number in range(4):
        found.add(number, [7])
    run = SimpleNamespace(
        own_tokens=SimpleNamespace(tokenizer=tokenizer), prompts=found,
        args=SimpleNamespace(bad_rows="error", response_length=3, long_prompts="drop", max_prompt_length=None),
        reward_model=language_model(tokenizer, max_position_embeddings=7), reward_server=None,
    )  # fmt: skip
    refused = "of the reward model's tokenizer: the tokenizer's chat template refuses the messages: no system role"
    with pytest.raises(DataError) as caught:
        prompts.fit_prompts(run, {})
    assert str(caught.value) == f"file:1: {refused}\nfile:3: {refused}"
    run.args.bad_rows = "skip"
    with caplog.at_level(logging.WARNING):
        prompts.fit_prompts(run, {})
    assert f"left out 2 of 4 rows:\nfile:1,3: {refused}" in caplog.text
    assert [row["at"] for row in run.prompts] == ["file:2"]  # the other has 5 tokens, too many beside 3


def test_what_functions_and_samples_see_of_a_chat(home):
    """The turns that the policy reads, as messages, with the columns of the row; people see text."""
    tools = [{"type": "function", "function": {"name": "find"}}]
    path = write(home, [{"prompt": talk("the the the the", "a", "cat sat", "on", "a dog"), "tools": tools, "hint": 3}])
    seen = []

    def reward(prompts, completions, completion_ids, **columns):
        seen.append((prompts[0], columns["tools"][0], columns["hint"][0]))
        return [0.0] * len(prompts)

    args = home.config(dataset_name=path, reward_model_path=None, max_prompt_length=12, max_steps=1)
    trainer = PPOTrainer(args, chat_tokenizer(), reward_fn=reward)
    trainer.train()
    kept = talk("cat sat", "on", "a dog")
    assert seen == [(kept, tools, 3)] and seen[0][0].tools == tools
    tokens = " ".join(trainer.tokenizer.convert_ids_to_tokens(trainer.prompts[0]["prompt_ids"]))
    assert tokens == "<|user|> cat sat <|end|> <|assistant|> on <|end|> <|user|> a dog <|end|> <|assistant|>"
    assert home.rows(file="samples.jsonl")[0]["prompt"] == "user: cat sat\nassistant: on\nuser: a dog"


def test_rows_that_a_checker_cannot_use_are_found_before_the_run(home, caplog):
    rows = [
        {"prompt": "it", "pattern": "a", "answer": "1"}, {"prompt": "the cat", "pattern": "(", "answer": "2"},
        {"prompt": "a dog", "answer": r"\frac{1}{"}, {"prompt": "", "pattern": "a"},
        {"prompt": "a cat", "pattern": "b"},
    ]  # fmt: skip
    path = write(home, rows)
    options = {"dataset_name": path, "reward_model_path": None, "bad_rows": "skip"}
    with pytest.raises(DataError) as caught:
        home.trainer(reward_fn=[regex, math_answer], dataset_name=write(home, rows[:3] + rows[4:], "b.jsonl"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "b.jsonl:2: regex: pattern: '(' is not a regular expression" in lines[0]
    assert "b.jsonl:3: regex: the row has no `pattern`; math_answer: answer: got " in lines[1]
    assert not (home.path / "run").exists()
    with caplog.at_level(logging.WARNING):
        trainer = PPOTrainer(home.config(**options), reward_fn=[regex, math_answer])
    assert words(trainer) == ["it", "a cat"]
    assert "left out 1 of 5 rows:" in caplog.text and "left out 2 of 4 rows:" in caplog.text
    trainer.train()
    with pytest.raises(ValueError, match="unit_test: the data have no column `test`"):
        home.trainer("c", reward_function="unit_test", dataset_name=path, reward_model_path=None, bad_rows="skip")


def test_a_batch_without_a_column_that_the_data_have(home):
    """Each batch names all columns of the data, so a function finds its own in every batch."""
    rows = [{"prompt": "it", "pattern": "cat"}, *({"prompt": "a dog"} for _ in range(5))]
    args = home.config(dataset_name=write(home, rows), reward_model_path=None, rollout_batch_size=2, max_steps=3)
    args.per_device_train_batch_size = 2
    train_ppo(args, reward_fn=[regex, bananas])
    assert len(home.rows()) == 3


def test_processes_share_the_checks(monkeypatch):
    rows = [{"at": f"file:{number}", "pattern": "(" if number in (1, 4) else "a"} for number in range(7)]
    fixed = functools.partial(regex, time_limit_s=2)
    said = [row_checks.results({"regex": fixed}, rows[rank::2]) for rank in range(2)]
    monkeypatch.setattr(prompts, "gather_object", lambda mine: said)
    for rank in range(2):
        args = SimpleNamespace(reward_model_path=None, reward_server=None)
        given = SimpleNamespace(reward_model=None)
        run = SimpleNamespace(rank=rank, world=2, reward_functions=[fixed], args=args, given=given)
        assert list(prompts._refused_by_functions(run, rows)) == [1, 4]
