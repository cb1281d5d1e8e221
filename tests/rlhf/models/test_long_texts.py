"""Rotary embeddings that follow the longest text of a batch: refused beyond their limit, and the way around it."""

import json

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from rlhf import models
from rlhf.models.sequences import per_token_log_probs
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.rollouts.sampling import sample
from rlhf.sft import SFTConfig, SFTTrainer
from tests.roundings import assert_same
from tests.tiny_ppo import make_tokenizer

LIMIT = 12
ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": LIMIT,
}  # fmt: skip
PROMPTS, RESPONSES = [[3, 4, 5], [6, 7]], [[8, 9, 10, 11, 3, 4, 5, 6, 7, 8], [9, 10]]  # 13 tokens, and 4


def phi(**rope):
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, original_max_position_embeddings=LIMIT, rope_parameters={**ROPE, **rope},
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


def apart(model):
    with torch.no_grad():
        rows = [per_token_log_probs(model, [p], [r], temperature=1.0)[0][0] for p, r in zip(PROMPTS, RESPONSES)]
    return torch.cat(rows)


def together(model):
    with torch.no_grad():
        log_probs, mask, _ = per_token_log_probs(model, PROMPTS, RESPONSES, temperature=1.0)
    return log_probs[mask]


def test_beyond_the_limit_a_text_depends_on_its_batch_so_that_is_the_context():
    model = phi()
    assert (together(model) - apart(model)).abs().max() > 0.01
    assert models.context_length(model) == LIMIT


def test_equal_factors_have_no_limit():
    model = phi(short_factor=ROPE["long_factor"])
    assert models.context_length(model) == 64
    assert_same(together(model), apart(model), 2e-5)  # fp32


HINT = (
    r"; the rotary embeddings of longer texts follow the longest of a batch \(see 'Long texts' in docs/training.md\)$"
)


def test_longer_texts_are_refused_by_every_stage(tmp_path):
    tokenizer = make_tokenizer()
    models.save_model(phi(), tokenizer, tmp_path / "phi")
    args = SFTConfig(output_dir=str(tmp_path / "sft"), max_length=LIMIT + 1, use_cpu=True, eval_fraction=0.0)
    with pytest.raises(ValueError, match=f"max_length: got 13, wants 2 to 12, the model's context{HINT}"):
        SFTTrainer(str(tmp_path / "phi"), args, train_dataset=[{"prompt": "the cat", "completion": "sat"}])
    with pytest.raises(ValueError, match=f"it does not fit the model's context of 12{HINT}"):
        sample(phi(), None, PROMPTS, response_length=10, temperature=1.0, stop_token_ids=[])
    models.save_model(
        models.reward_model_from_policy(tmp_path / "phi", 1, pad_token_id=0), tokenizer, tmp_path / "reward"
    )
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the cat sat"}) + "\n")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": " ".join(["the"] * 20)}) + "\n")

    def ppo(**changes):
        settings = {
            "sft_model_path": str(tmp_path / "phi"), "reward_model_path": str(tmp_path / "reward"),
            "dataset_name": str(tmp_path / "prompts.jsonl"), "output_dir": str(tmp_path / "ppo"), "response_length": 8,
            "rollout_batch_size": 1, "per_device_train_batch_size": 1, "max_steps": 1,
        }  # fmt: skip
        return PPOTrainer(PPOConfig(**settings | changes))

    ppo(output_dir=str(tmp_path / "within"))
    with pytest.raises(ValueError, match=f"response_length 10 it does not fit the policy's context of 12{HINT}"):
        ppo(response_length=10, long_prompts="error")
    with pytest.raises(ValueError, match=f"ptx_max_length: got 16, wants at most 12, the policy's context{HINT}"):
        ppo(ptx_coef=1.0, ptx_dataset_name=str(tmp_path / "texts.jsonl"), ptx_max_length=16)
