"""LoRA adapters: which layers get them, and that merged weights compute what the adapters do, tried before training."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf import models
from rlhf.models.adapters import ALL_LINEAR, add_adapters, check_merge, default_targets, merged, trained_names, unfit
from rlhf.sft import SFTConfig, SFTTrainer
from tests.roundings import assert_same
from tests.tiny import language_model, model_folder, word_tokenizer

peft = pytest.importorskip("peft", reason="the package peft is not installed: pip install peft")

SMALL = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "gemma2": {"attn_implementation": "eager"},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "gpt_oss": {**EXPERTS, "attn_implementation": "eager"},
    "deepseek_v3": {
        **EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8},
    "phimoe": EXPERTS,
}  # fmt: skip
IDS = torch.arange(3, 15)[None]


def build(family):
    """A random model of the architecture in float64; experts one by one, as grouped products know no float64."""
    options = dict(FAMILIES[family])
    attention = options.pop("attn_implementation", "sdpa" if family != "mamba2" else "eager")
    known = AutoConfig.for_model(family)
    changes = {name: value for name, value in {**SMALL, **options}.items() if hasattr(known, name) or name in options}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float64)
    if "num_experts_per_tok" in options:
        model.config._experts_implementation = "eager"
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return model.eval()


def settings(**changes):
    options = {"use_peft": True, "lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "lora_target_modules": None}
    return SimpleNamespace(**options | changes)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def stirred(model):
    """The model with other adapters than new ones, which do nothing; and what it computed without them."""
    with model.disable_adapter():
        plain = logits(model.eval())
    names = trained_names(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in names:
                weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.2)
    return model, plain


def assert_merged(model, folder):
    """Merged, and saved and loaded, the model computes what it computes with its adapters, which stay as they are."""
    model, plain = stirred(model)
    adapted = logits(model)
    before = copy.deepcopy(model.state_dict())
    base, state = merged(model)
    assert (adapted - plain).abs().max() > 0.01
    assert_same(logits(base), adapted)
    base.save_pretrained(folder, state_dict=state)
    attention = base.config._attn_implementation
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation=attention).eval()
    if getattr(base.config, "_experts_implementation", None):
        saved.config._experts_implementation = base.config._experts_implementation
    assert_same(logits(saved), adapted)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("targets", [None, [ALL_LINEAR]], ids=["default", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_do_what_adapters_do(family, targets, tmp_path):
    assert_merged(add_adapters(settings(lora_target_modules=targets), build(family), "CAUSAL_LM"), tmp_path)


KINDS = {
    "DoRA": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "rsLoRA": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "patterns": {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 1}},
    "whole layers": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [4, 7]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_of_every_kind(kind, tied, tmp_path):
    model = language_model(word_tokenizer(), tie_word_embeddings=tied).double()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, **KINDS[kind])
    assert_merged(add_adapters(settings(), model, "CAUSAL_LM", config), tmp_path)


def test_merged_adapters_of_another_name_and_of_experts(tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"])
    assert_merged(peft.get_peft_model(build("llama"), config, adapter_name="mine"), tmp_path / "name")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=[], target_parameters=experts)
    assert_merged(add_adapters(settings(), build("qwen3_moe"), "CAUSAL_LM", config), tmp_path / "experts")


def test_the_layers_that_get_adapters(caplog):
    with caplog.at_level(logging.WARNING, "rlhf"):
        assert default_targets(build("llama")) == ["q_proj", "v_proj"]  # peft's own choice
        assert not caplog.records
        hybrid = build("qwen3_5_text")
        found = default_targets(hybrid)
    linear = {name for name, module in hybrid.named_modules() if isinstance(module, nn.Linear)}
    kernels = {name for name in linear if name.endswith("linear_attn.out_proj")}
    assert set(found) == linear - {"lm_head"} - kernels and len(kernels) == 1
    assert "peft names none for qwen3_5_text; 14 linear layers get adapters (down_proj, " in caplog.text
    mamba = build("mamba2")
    assert default_targets(mamba) == [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]
    assert unfit(mamba) == [f"backbone.layers.{i}.mixer.out_proj" for i in range(2)]
    assert [name.rpartition(".")[2] for name in unfit(build("phimoe"))] == ["router", "router"]


def test_tied_layers_get_no_adapters():
    model = build("llama")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    assert unfit(model) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_target_modules": ["nose"]},
            r"lora_target_modules: got nose, which peft cannot adapt in LlamaForCausalLM",
        ),
        ({"lora_r": 0}, r"lora_target_modules: got q_proj, v_proj, which peft cannot adapt .*`r` should be a positive"),
    ],
)
def test_what_peft_refuses_names_the_setting(options, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        add_adapters(settings(**options), build("llama"), "CAUSAL_LM")
    assert "\n" not in str(caught.value)


class Reads(nn.Module):
    """A block that uses a layer's weight without calling the layer, as fused kernels do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32, dtype=torch.float64)

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight)


def test_adapters_that_cannot_be_merged_are_refused_before_the_training():
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = Reads()
    with pytest.raises(
        ValueError, match=r"^lora_target_modules: got inner, v_proj, whose merged weights are off by \d+%"
    ):
        add_adapters(settings(lora_target_modules=["inner", "v_proj"]), model, "CAUSAL_LM")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"^peft_config: .*cannot merge the adapters"):
        add_adapters(settings(), build("llama"), "CAUSAL_LM", config)


def test_trying_the_merge_leaves_adapters_and_random_numbers_alone():
    model = add_adapters(settings(), build("llama"), "CAUSAL_LM").train()
    before, draws = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    check_merge(model, "model")
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(draws, torch.random.get_rng_state()) and model.training


def test_all_linear_and_given_adapters_through_the_trainer(tmp_path):
    policy = model_folder(tmp_path / "policy")
    rows = [{"prompt": "the dog", "completion": "ran up"}] * 4
    options = {"use_cpu": True, "disable_tqdm": True, "max_steps": 1, "num_samples": 0, "eval_fraction": 0.0}
    for number, targets in enumerate((ALL_LINEAR, [ALL_LINEAR])):
        out = str(tmp_path / str(number))
        args = SFTConfig(
            model_name_or_path=policy,
            output_dir=out,
            use_peft=True,
            lora_target_modules=targets,
            learning_rate=1e-2,
            **options,
        )
        trainer = SFTTrainer(args=args, train_dataset=rows)
        trainer.train()
        start, saved = models.load_policy(policy).state_dict(), models.load_policy(out).state_dict()
        moved = {name.split(".")[-2] for name in start if not torch.equal(start[name], saved[name])}
        assert moved == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    other = peft.get_peft_model(
        models.load_policy(policy), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match=r"^model: peft cannot merge the adapters"):
        SFTTrainer(
            other, SFTConfig(model_name_or_path=policy, output_dir=str(tmp_path / "x"), **options), train_dataset=rows
        )
