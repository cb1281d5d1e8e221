"""The stages on models that have no classifier in transformers, and on tokenizers that are larger than their model."""

import json
import math

import pytest
import torch
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)

from rlhf import (
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    models,
)
from rlhf.models.classifiers import TrunkClassifier
from tests.tiny import language_model, word_tokenizer, write_jsonl

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}
RUN = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
PROMPTS = ["the dog", "a cat sat", "the cat", "up and down", "was it", "a b c", "d e", "f g"]
RANKED = [{"prompt": prompt, "completions": ["good", "bad", "ran up"], "ranks": [0, 2, 1]} for prompt in PROMPTS]
PAIRS = [{"prompt": prompt, "chosen": "good", "rejected": "bad"} for prompt in PROMPTS]
ANSWERS = [{"prompt": prompt, "completion": "good"} for prompt in PROMPTS]


def granite(folder):
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(vocab_size=len(tokenizer), eos_token_id=2, logits_scaling=2.0, **SHAPE))
    models.save_model(model, tokenizer, folder)
    return str(folder)


def ppo(tmp_path, policy, reward, **options):
    settings = {
        "sft_model_path": policy, "reward_model_path": reward, "output_dir": str(tmp_path / "ppo"),
        "response_length": 4, "rollout_batch_size": 4, "per_device_train_batch_size": 2, "max_steps": 1,
        "dataset_name": write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS]),
        "disable_tqdm": True, "num_ppo_epochs": 1,
    }  # fmt: skip
    return PPOTrainer(PPOConfig(**settings, **options))


@pytest.mark.parametrize("use_peft", [False, True])
def test_granite_from_its_reward_model_to_ppo(tmp_path, use_peft):
    """Reward model, value network and policy are saved, loaded and trained like any other."""
    if use_peft:
        pytest.importorskip("peft")
    policy, options = granite(tmp_path / "policy"), {"use_peft": use_peft, "save_steps": 1}
    args = RewardConfig(output_dir=str(tmp_path / "reward"), learning_rate=1e-2, **RUN, **options)
    RewardTrainer(policy, args=args, train_dataset=RANKED).train()
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert config["architectures"] == ["GraniteForSequenceClassification"]
    reward_model = models.load_reward_model(tmp_path / "reward")
    assert isinstance(reward_model, TrunkClassifier) and reward_model.config.reward_bias != 0.0
    trainer = ppo(tmp_path, policy, str(tmp_path / "reward"), learning_rate=1e-5, **options)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val/ratio"] == pytest.approx(1.0, abs=1e-3)
    assert isinstance(models.unwrapped(trainer.value), TrunkClassifier)
    if not use_peft:
        value = models.load_reward_model(tmp_path / "ppo" / "checkpoint-1" / "value")
        assert all(torch.equal(value.state_dict()[name], weight) for name, weight in trainer.value.state_dict().items())
        assert not torch.equal(value.score.weight, reward_model.score.weight)


def test_mamba_2_in_bf16_from_its_reward_model_to_ppo(tmp_path):
    """Its trunk gives fp32 hidden states to the bf16 heads of the reward model and the value network."""
    tokenizer, sizes = word_tokenizer(), {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 8}
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=len(tokenizer), num_hidden_layers=1, n_groups=1, pad_token_id=0, eos_token_id=2, **sizes
    )
    models.save_model(Mamba2ForCausalLM(config), tokenizer, tmp_path / "policy")
    args = RewardConfig(output_dir=str(tmp_path / "reward"), dtype="bfloat16", learning_rate=1e-2, **RUN)
    RewardTrainer(str(tmp_path / "policy"), args=args, train_dataset=RANKED).train()
    trainer = ppo(tmp_path, str(tmp_path / "policy"), str(tmp_path / "reward"), dtype="bfloat16", packing="false")
    trainer.train()
    assert trainer.value.score.weight.dtype == torch.bfloat16
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(rows[-1]["objective/scores"])


@pytest.mark.parametrize(
    "trainer, config, rows",
    [(SFTTrainer, SFTConfig, ANSWERS), (RewardTrainer, RewardConfig, RANKED), (DPOTrainer, DPOConfig, PAIRS)],
)
def test_a_token_that_the_model_does_not_embed_is_refused_before_training(tmp_path, trainer, config, rows):
    tokenizer = word_tokenizer()
    model = language_model(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    args = config(output_dir=str(tmp_path / "pad"), **RUN)
    with pytest.raises(ValueError, match=r"token '\[PAD\]' has the id 39, but the model embeds ids 0 to 38.*resize"):
        trainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["zebra"])
    args = config(output_dir=str(tmp_path / "fine"), **RUN)
    trainer(model, args=args, train_dataset=rows, processing_class=tokenizer)  # nothing uses the new token
    rows = [{**row, "prompt": f"zebra {row['prompt']}"} for row in rows]
    args = config(output_dir=str(tmp_path / "word"), **RUN)
    with pytest.raises(ValueError, match="the token 'zebra' has the id 39"):
        trainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    assert not (tmp_path / "word").exists() and not (tmp_path / "pad").exists()


def test_ppo_refuses_a_reward_model_that_cannot_read_what_the_policy_says(tmp_path):
    tokenizer = word_tokenizer()
    for name, rows in (("policy", len(tokenizer)), ("other", len(tokenizer) - 2)):
        models.save_model(LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SHAPE)), tokenizer, tmp_path / name)
    models.save_model(models.reward_model_from_policy(tmp_path / "other", 0), tokenizer, tmp_path / "reward")
    with pytest.raises(ValueError, match=r"network: the token 'bad' has the id 38, but the model embeds ids 0 to 36"):
        ppo(tmp_path, str(tmp_path / "policy"), str(tmp_path / "reward"))
