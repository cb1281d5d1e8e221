"""Chats from a published kind of model to PPO: the ids of SFT, of the reward model and of PPO are the template's."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from rlhf import (
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    cli,
    data,
    evaluate,
    models,
)
from rlhf.ppo import contract
from rlhf.rewards.scoring import tokens_of_other
from rlhf.rollouts.sampling import Rollouts
from tests.rlhf.data.chat_families import CALL, FIND, message, tokenizer_of
from tests.tiny import model_folder, word_tokenizer, write_jsonl

NAMES = ["flower", "bird", "town", "tree"]
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}


def asked(name, *more):
    return [message("user", f"Name a {name}."), *more]


def chats():
    """Demonstrations: single turns, several, with thoughts, with tools."""
    rows = [{"messages": asked(name, message("assistant", "Mud."))} for name in NAMES]
    several = asked("stone", message("assistant", "Mud."), *asked("rock", message("assistant", "Mud.")))
    thoughts = asked("hill", message("assistant", "Mud.", reasoning_content="So."))
    called = message("assistant", "", tool_calls=[CALL]), message("tool", "Mud"), message("assistant", "Mud.")
    return [*rows, {"messages": several}, {"messages": thoughts}, {"messages": asked("ford", *called), "tools": [FIND]}]


def rankings():
    answers = ["Mud.", "A rose, I say.", "No.", "Mud, mud."]
    rows = [{"prompt": asked(name), "completions": answers, "ranks": [0, 2, 3, 1]} for name in NAMES]
    return [*rows, {"prompt": asked("hill"), "tools": [FIND], "completions": answers[:3], "ranks": [0, 1, 1]}]


PROMPTS = [
    *({"prompt": asked(name)} for name in NAMES),
    {"prompt": asked("hill"), "tools": [FIND]},
    {"prompt": asked("hill"), "chat_template_kwargs": {"enable_thinking": False}},
    {"prompt": asked("hill", message("assistant", "Well,"))},
]


def qwen3(path, name="qwen3"):
    """A random Qwen 3 of two layers with the template of a family, in a folder."""
    tokenizer = tokenizer_of(name)
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=512, **SIZE, **ids)
    models.save_model(Qwen3ForCausalLM(config), tokenizer, path)
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, SFT's, reward model's and PPO's trainer), one after the other."""
    path = tmp_path_factory.mktemp("chat")
    common = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no", "eval_fraction": 0.0}
    common |= {"learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    args = SFTConfig(
        output_dir=str(path / "sft"), max_steps=60, num_samples=0, per_device_train_batch_size=16, **common
    )
    sft = SFTTrainer(qwen3(path / "base"), args, train_dataset=write_jsonl(path / "chats.jsonl", chats()))
    sft.train()
    args = RewardConfig(output_dir=str(path / "rm"), max_steps=10, **common)
    reward = RewardTrainer(str(path / "sft"), args, train_dataset=write_jsonl(path / "ranked.jsonl", rankings()))
    reward.train()
    write_jsonl(path / "prompts.jsonl", PROMPTS)
    ppo = PPOTrainer(
        PPOConfig(
            sft_model_path=str(path / "sft"), reward_model_path=str(path / "rm"), output_dir=str(path / "ppo"),
            dataset_name=str(path / "prompts.jsonl"), max_steps=2, rollout_batch_size=14, num_responses=2,
            per_device_train_batch_size=14, num_ppo_epochs=1, response_length=12, disable_tqdm=True,
        )
    )  # fmt: skip
    ppo.train()
    return path, sft, reward, ppo


def test_ppo_keeps_its_contract(runs):
    _, _, _, ppo = runs
    for name in ("prompt_ids", "reward_ids", "value_at_end"):
        assert ppo.contract[name] <= 1e-5, name


def test_responses_stop_at_the_end_of_the_turn(runs):
    path, _, _, ppo = runs
    end = ppo.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ppo.stop_ids == sorted({end, ppo.tokenizer.eos_token_id})
    assert GenerationConfig.from_pretrained(path / "ppo").eos_token_id == ppo.stop_ids
    model = AutoModelForCausalLM.from_pretrained(path / "sft")
    prompt = torch.tensor([data.encode_prompt(ppo.tokenizer, asked("flower"))])
    found = model.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :].tolist()
    assert ppo.tokenizer.decode(found) == "<think>\n\n</think>\n\nMud.<|im_end|>"


def test_the_report_is_written(runs):
    from rlhf.reports.report import write_report

    report = write_report(runs[0] / "ppo").read_text()
    assert "Name a " in report


def test_the_reward_model_was_trained_on_what_ppo_scores(runs):
    """A response that is what the demonstrations say gets in PPO the score that the trainer gives its row."""
    path, _, reward, ppo = runs
    rows = data.load_rows(path / "ranked.jsonl", "ranked")
    (encoded,) = data.encode_row(ppo.tokenizer, rows[0], ("completions",), max_length=512)
    trained, _ = reward.scores([{"prompt": encoded.prompt, "responses": encoded.responses, "row": rows[0]}])
    texts = [f"<think>\n\n</think>\n\n{answer}<|im_end|>" for answer in rankings()[0]["completions"]]
    sampled = [ppo.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    prompt = data.encode_prompt(ppo.tokenizer, rows[0]["prompt"])
    scores = evaluate.reward_scores(ppo.reward_model, Rollouts([prompt] * 4, sampled, [True] * 4))
    assert scores == pytest.approx(trained[0], abs=1e-5)


def test_what_is_learned_is_printed(runs, tmp_path, capsys):
    path = runs[0]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": asked("flower", message("assistant", "A rose."))}] * 2)
    common = {"use_cpu": True, "max_steps": 1, "save_strategy": "no", "eval_fraction": 0.0, "num_samples": 0}
    SFTTrainer(str(path / "sft"), SFTConfig(output_dir=str(tmp_path / "run"), **common), train_dataset=rows)
    text = capsys.readouterr().out
    assert f"{rows}:1 as the model reads it; what is learned stands in ⟦⟧:" in text
    asks = "<|im_start|>user\nName a flower.<|im_end|>\n<|im_start|>assistant\n"
    assert f"\n{asks}⟦<think>\n\n</think>\n\nA rose.<|im_end|>⟧\n" in text


def test_best_of_n_and_evaluation_read_chats(runs, tmp_path, capsys):
    path = runs[0]
    flags = ["--model_name_or_path", path / "sft", "--reward_model_path", path / "rm", "--n", 2, "--response_length", 8]
    flags += ["--dataset_name", path / "prompts.jsonl", "--output_file", tmp_path / "best.jsonl"]
    assert evaluate.main([str(flag) for flag in flags]) == 0
    chosen = data.load_rows(tmp_path / "best.jsonl", "sft")
    assert [row["prompt"] for row in chosen] == [row["prompt"] for row in PROMPTS]
    assert [bool(row["prompt"].tools) for row in chosen] == ["tools" in row for row in PROMPTS]
    policies = {"SFT": path / "sft", "PPO": path / "ppo"}
    prompts = [row["prompt"] for row in data.load_rows(path / "prompts.jsonl", "prompts")]
    found = evaluate.evaluate_policies(policies, prompts, reward_model=path / "rm", response_length=8)
    assert found["prompts"] == len(PROMPTS) and found["policies"][0]["kl"] == 0.0


def test_a_reward_model_of_another_template_reads_the_answer_by_its_own(runs, tmp_path):
    """The policy's empty thoughts are its template's, and the reward model's template has its own way."""
    _, _, _, ppo = runs
    base = qwen3(tmp_path / "base", "llama-2")
    args = RewardConfig(
        output_dir=str(tmp_path / "rm"), use_cpu=True, max_steps=1, disable_tqdm=True, eval_fraction=0.0
    )
    RewardTrainer(base, args, train_dataset=[{**row, "tools": None} for row in rankings()]).train()
    other = tokenizer_of("llama-2")
    own = tokens_of_other(ppo.tokenizer, tmp_path / "rm")
    prompt = data.Chat(asked("flower"))
    ids = data.encode_prompt(ppo.tokenizer, prompt)
    answers = ["<think>\n\n</think>\n\nA rose.<|im_end|>", "<think>\n\n</think>\n\nA ro"]
    sampled = [ppo.tokenizer(text, add_special_tokens=False).input_ids for text in answers]
    rows = [{"prompt": prompt, "at": "file:1"}] * 2
    read = own(rows, Rollouts([ids] * 2, sampled, [True, False]))
    texts = [other.decode(list(one) + list(two)) for one, two in zip(read.prompt_ids, read.response_ids)]
    whole = other.apply_chat_template([*prompt, message("assistant", "A rose.")], tokenize=False)
    assert texts[0] == other.decode(other(whole, add_special_tokens=False).input_ids) and texts[0].endswith(
        "A rose. </s>"
    )
    assert texts[1] == texts[0].partition("se.")[0]


def test_chats_for_a_base_model(tmp_path):
    """chatml from the first stage on: the model grows, and later stages find the template with it."""
    base = model_folder(tmp_path / "base")
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": asked(n, message("assistant", "the dog"))} for n in NAMES]
    )
    pairs = [{"prompt": asked(name), "chosen": "the dog", "rejected": "a cat"} for name in NAMES]
    common = ["--use_cpu", "true", "--max_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true"]
    start = ["--model_name_or_path", str(base), "--dataset_name", str(rows), "--output_dir", str(tmp_path / "sft")]
    assert cli.main(["sft", *start, *common, "--chat_template", "chatml", "--use_peft", "true"]) == 2
    assert cli.main(["sft", *start, *common, "--chat_template", "chatml"]) == 0
    size = json.loads((tmp_path / "sft" / "config.json").read_text())["vocab_size"]
    assert size == len(models.load_tokenizer(tmp_path / "sft")) == len(word_tokenizer()) + 2
    args = RewardConfig(
        output_dir=str(tmp_path / "rm"), use_cpu=True, max_steps=1, disable_tqdm=True, eval_fraction=0.0
    )
    RewardTrainer(str(tmp_path / "sft"), args, train_dataset=pairs).train()
    args = DPOConfig(output_dir=str(tmp_path / "dpo"), use_cpu=True, max_steps=1, disable_tqdm=True, eval_fraction=0.0)
    args.chat_template = "chatml"
    DPOTrainer(str(base), ref_model=str(base), args=args, train_dataset=pairs).train()
    options = {"sft_model_path": str(tmp_path / "sft"), "reward_model_path": str(tmp_path / "rm"), "max_steps": 1}
    options |= {"rollout_batch_size": 4, "per_device_train_batch_size": 4, "response_length": 4, "disable_tqdm": True}
    prompts = [{"prompt": asked(name)} for name in NAMES]
    trainer = PPOTrainer(PPOConfig(output_dir=str(tmp_path / "ppo"), **options), train_dataset=prompts)
    trainer.train()
    assert trainer.contract["reward_ids"] == 0 and trainer.contract["kl"] == 0


def test_ppo_from_a_base_model_with_chatml(tmp_path):
    base = model_folder(tmp_path / "base")
    options = {"sft_model_path": str(base), "max_steps": 1, "chat_template": "chatml", "response_length": 4}
    options |= {"rollout_batch_size": 4, "per_device_train_batch_size": 4, "disable_tqdm": True}
    trainer = PPOTrainer(
        PPOConfig(output_dir=str(tmp_path / "ppo"), **options),
        train_dataset=[{"prompt": asked(name)} for name in NAMES],
        reward_fn=lambda prompts, completions, completion_ids: [1.0] * len(prompts),
    )
    trainer.train()
    assert trainer.contract["kl"] == 0 and models.embedded_ids(trainer.value) == len(word_tokenizer()) + 2
    assert models.load_tokenizer(tmp_path / "ppo").chat_template


@pytest.mark.parametrize(("family", "told"), [("deepseek-r1", True), ("deepseek-v3.1", False), ("qwen3", False)])
def test_a_template_that_asks_otherwise_than_it_answers_is_told(capsys, caplog, family, told):
    """R1 asks with the beginning of thoughts, and renders answers without any."""
    tokenizer, row = tokenizer_of(family), {"prompt": data.Chat(asked("flower")), "at": "file:1"}
    row["prompt_ids"] = data.encode_prompt(tokenizer, row["prompt"])
    trainer = SimpleNamespace(
        tokenizer=tokenizer, prompts=[row], reward_model=object(), own_tokens=None,
        accelerator=SimpleNamespace(is_main_process=True),
    )  # fmt: skip
    answer = tokenizer("Mud.").input_ids[-2:]
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        contract._show(trainer, row, Rollouts([row["prompt_ids"]], [answer], [False]))
    assert any("asks for an answer with '<think>\\n'" in message for message in caplog.messages) == told
    text = f"{tokenizer.decode(row['prompt_ids'])}⟦{tokenizer.decode(answer)}⟧"
    shown = f"file:1 as the policy is asked; the beginning of its answer stands in ⟦⟧:\n{text}\n\n"
    assert capsys.readouterr().out == shown
