"""Checkpoints that take images too, used for text: what is trained loads again, and gives a text the same logits."""

import logging

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    LlavaConfig,
    MllamaConfig,
    MllamaForCausalLM,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
)

from rlhf import SFTConfig, SFTTrainer, models
from tests.tiny import word_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])
TEXT = {
    "vocab_size": 45, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MLLAMA_VISION = {**VISION, "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 32, "max_num_tiles": 1}
CONFIGS = {
    "llava": lambda: LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=44, vision_feature_layer=-1,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE}, vision_config=QWEN_VISION, image_token_id=44,
        video_token_id=43, vision_start_token_id=42, vision_end_token_id=41,
    ),
    "mllama": lambda: MllamaConfig(
        text_config={**TEXT, "cross_attention_layers": [1]},
        vision_config={**MLLAMA_VISION, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
        image_token_index=44,
    ),
    "gemma3": lambda: Gemma3Config(
        text_config={**TEXT, "head_dim": 8}, vision_config=VISION, image_token_index=44, mm_tokens_per_image=4
    ),
}  # fmt: skip
TAKEN_OUT = {"llava": "LlamaForCausalLM"}


def whole(name):
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIGS[name]()).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_gets_the_logits_of_the_whole_model(tmp_path, caplog, name):
    source = whole(name)
    source.save_pretrained(tmp_path / "whole")
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        policy = models.load_policy(tmp_path / "whole").eval()
    assert type(policy).__name__ == TAKEN_OUT.get(name, type(source).__name__)
    assert (f"a {type(source).__name__}: it" in caplog.text) == (name != "gemma3")
    logits = policy(input_ids=IDS).logits
    torch.testing.assert_close(logits, source(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert models.hidden_states(policy, IDS).shape == (*IDS.shape, 16) and models.hidden_size(policy) == 16
    assert models.context_length(policy) == 64

    policy.save_pretrained(tmp_path / "saved")
    auto_class = AutoModelForCausalLM if name in ("llava", "gemma3") else AutoModelForImageTextToText
    for loaded in (models.load_policy(tmp_path / "saved").eval(), auto_class.from_pretrained(tmp_path / "saved")):
        assert loaded.state_dict().keys() == policy.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[key], weight) for key, weight in policy.state_dict().items())
        torch.testing.assert_close(loaded(input_ids=IDS).logits, logits)
    logits.sum().backward()
    for key, weight in policy.named_parameters():
        skipped = "cross_attn" in key or key.startswith("model.language_model.layers.1.")  # layers for images alone
        assert weight.requires_grad == (weight.grad is not None) or (name == "mllama" and skipped)
        assert weight.requires_grad == (not any(part in key for part in ("vision", "visual", "projector")))


@pytest.mark.parametrize("name", CONFIGS)
def test_reward_model_of_an_image_text_model(tmp_path, name):
    whole(name).save_pretrained(tmp_path / "whole")
    model = models.reward_model_from_policy(tmp_path / "whole", 0, pad_token_id=0).eval()
    model.save_pretrained(tmp_path / "reward")
    loaded = models.load_reward_model(tmp_path / "reward").eval()
    assert all(torch.equal(loaded.state_dict()[key], weight) for key, weight in model.state_dict().items())
    torch.testing.assert_close(models.token_scores(loaded, IDS), models.token_scores(model, IDS))
    hidden = models.hidden_states(models.load_policy(tmp_path / "whole").eval(), IDS)
    torch.testing.assert_close(models.token_scores(model, IDS), (hidden @ model.score.weight.T).squeeze(-1))
    assert AutoConfig.from_pretrained(tmp_path / "reward").num_labels == 1


def test_what_could_not_be_loaded_again_is_refused(tmp_path):
    """The text model of Llama 3.2 Vision alone: transformers has no auto class for its config."""
    model = MllamaForCausalLM(CONFIGS["mllama"]().text_config)
    model.save_pretrained(tmp_path)
    for refused in (lambda: models.load_policy(tmp_path), lambda: models.as_policy(model)):
        with pytest.raises(ValueError, match=r"type 'mllama_text_model', for which .* loads again once it is saved"):
            refused()


def test_one_that_attends_both_ways_is_refused(tmp_path):
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    config = PaliGemmaConfig(text_config=text, vision_config=VISION, image_token_index=44, projection_dim=16)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="looks at later tokens"):
        models.load_policy(tmp_path)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_sft_of_an_image_text_model(tmp_path, name):
    tokenizer = word_tokenizer()
    whole(name).save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    rows = [{"prompt": "the dog", "completion": f"{verb} up"} for verb in ("ran", "sat", "was", "and")]
    args = SFTConfig(output_dir=str(tmp_path / "sft"), max_steps=1, eval_fraction=0, num_samples=1, use_cpu=True)
    trainer = SFTTrainer(str(tmp_path / "whole"), args=args, train_dataset=rows)
    trainer.train()
    saved = models.load_policy(tmp_path / "sft").eval()
    assert type(saved) is type(trainer.model)
    assert all(torch.equal(saved.state_dict()[key], weight) for key, weight in trainer.model.state_dict().items())
    torch.testing.assert_close(saved(input_ids=IDS).logits, trainer.model.eval()(input_ids=IDS).logits)
