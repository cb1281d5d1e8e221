"""Train mode computes what eval mode computes: dropouts, dropped layers and jitter wherever a model keeps them."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf import models

SMALL = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
TEXT = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
RANDOM = {  # what is drawn anew in each forward in train mode
    "mixtral": {**SMALL, "num_local_experts": 4, "router_jitter_noise": 0.1, "attention_dropout": 0.1},
    "phimoe": {**SMALL, "num_local_experts": 4, "input_jitter_noise": 0.05},  # and its experts, whatever the config
    "minimax": {**SMALL, "num_local_experts": 4, "router_jitter_noise": 0.1, "block_size": 8},
    "bart": {
        "vocab_size": 48, "d_model": 32, "decoder_ffn_dim": 48, "decoder_layers": 6, "decoder_attention_heads": 4,
        "max_position_embeddings": 64, "decoder_layerdrop": 0.5, "dropout": 0.1, "activation_dropout": 0.1,
        "pad_token_id": 0, "eos_token_id": 1, "is_decoder": True,
    },
    "fuyu": {**TEXT, "text_config": {**TEXT, "model_type": "persimmon", "hidden_dropout": 0.1}, "hidden_dropout": 0.1},
    "gpt2": {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}  # fmt: skip
IDS = torch.arange(2, 26)[None]


def log_probs(model):
    return model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)


@pytest.mark.parametrize("family", RANDOM)
def test_train_mode_is_eval_mode(family):
    torch.manual_seed(0)
    raw = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **RANDOM[family]))
    with torch.no_grad():
        for weight in raw.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
        raw.train()
        assert not torch.equal(log_probs(raw), log_probs(raw))  # else there is nothing to test
        before = log_probs(raw.eval())
    policy = models.as_policy(copy.deepcopy(raw))
    assert policy.training
    first = log_probs(policy)
    with torch.no_grad():
        assert torch.equal(first, log_probs(policy)) and torch.equal(first, log_probs(policy.train()))
        assert torch.equal(first, log_probs(policy.eval())) and torch.equal(first, before)
    policy.train()
    log_probs(policy)[0, :, 3].sum().backward()
    assert all(weight.grad.isfinite().all() for weight in policy.parameters() if weight.grad is not None)
    routers = [weight for name, weight in policy.named_parameters() if "gate.weight" in name or "router" in name]
    assert all(router.grad.abs().max() > 0 for router in routers)


def test_a_module_in_eval_mode_keeps_those_inside_it_in_train_mode():
    torch.manual_seed(0)
    policy = models.as_policy(AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **RANDOM["mixtral"])))
    log_probs(policy)
    still = {type(module).__name__ for module in policy.modules() if not module.training}
    assert still == {"MixtralSparseMoeBlock"}
    hooks = [len(module._forward_pre_hooks) for module in policy.modules()]
    assert [len(module._forward_pre_hooks) for module in models.as_policy(policy).modules()] == hooks
