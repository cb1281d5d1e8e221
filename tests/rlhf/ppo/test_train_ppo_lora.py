"""PPO on LoRA adapters: the reference is the policy with them off, and a run resumes, averages and merges."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rlhf import models
from rlhf.models.adapters import merged
from rlhf.ppo import train_ppo
from rlhf.ppo.contract import ContractError, check_contract
from tests.tiny_ppo import HAND_MADE, equal, weights

pytest.importorskip("peft", reason="the package peft is not installed: pip install peft")

LORA = {"use_peft": True, "lora_r": 2, "lora_alpha": 4, "learning_rate": 3e-2, "max_steps": 2}


def trained(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def reference_log_probs(trainer):
    return trainer.evaluate(HAND_MADE).ref_log_probs


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trap_29_the_reference_is_the_policy_with_its_adapters_off(home, kind):
    trainer = home.trainer(kind=kind, temperature=0.7, rollout_batch_size=4, **LORA)
    assert trainer.contract["kl"] == 0 and trainer.contract["value_at_end"] < 1e-5
    plain = home.trainer("plain", kind=kind, temperature=0.7)
    before, frozen = reference_log_probs(trainer), weights(trainer.reference)
    assert torch.equal(before, reference_log_probs(plain))
    storage = {weight.data_ptr() for weight in trainer.policy.parameters()}
    assert {weight.data_ptr() for weight in trainer.reference.parameters()} <= storage  # no second copy
    start = weights(models.load_policy(home.path / kind))
    assert sum(x.numel() for x in frozen.values()) == sum(x.numel() for x in start.values())
    first = trainer.iteration()
    assert first["objective/kl"] == 0 and abs(first["val/ratio"] - 1) < 1e-5
    assert trainer.iteration()["objective/kl"] != 0
    assert torch.equal(before, reference_log_probs(trainer)) and equal(frozen, weights(trainer.reference))
    moved = trainer.evaluate(HAND_MADE)
    assert not torch.equal(moved.log_probs, moved.ref_log_probs)


def test_trap_29_adapters_come_back_after_an_exception(home, monkeypatch):
    trainer = home.trainer(**LORA)
    trainer.iteration()
    experience = trainer.evaluate(HAND_MADE)
    inner = models.unwrapped(trainer.policy)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):

        def fail(*args, **kwargs):
            raise RuntimeError("out of memory")

        patch.setattr(inner.lm_head, "forward", fail)
        trainer.reference(torch.tensor([[5, 6]]))
    again = trainer.evaluate(HAND_MADE)
    assert torch.equal(experience.log_probs, again.log_probs)
    assert torch.equal(experience.ref_log_probs, again.ref_log_probs)
    assert trained(trainer.policy) and all("lora_" in name for name in trained(trainer.policy))


def test_trap_17_no_network_changes_its_mode(home):
    """The wrapper around the reference must not put the policy into eval mode, nor take its adapters away."""
    trainer = home.trainer(**LORA)
    trainer.policy.train()
    trainer.reference.eval()
    trainer.reference.requires_grad_(False)
    assert trainer.policy.training and trained(trainer.policy)


def test_the_contract_sees_weights_that_train_beside_the_adapters(home):
    trainer = home.trainer(**LORA)
    next(trainer.reference.parameters()).requires_grad_(True)
    with pytest.raises(ContractError, match="reference_frozen"):
        check_contract(trainer)


def test_only_adapters_and_the_value_head_train(home):
    trainer = home.trainer(ema_decay=0.9, **LORA)
    before = weights(trainer.model)
    trainer.iteration()
    moved = {name for name, weight in weights(trainer.model).items() if not torch.equal(weight, before[name])}
    assert moved and all("lora_" in name or "score.modules_to_save" in name for name in moved)
    assert any(name.startswith("policy") for name in moved) and any("score" in name for name in moved)
    in_optimizer = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    assert len(in_optimizer) == len(trained(trainer.policy)) + len(trained(trainer.value))
    assert trainer.ema.weights.keys() == trained(trainer.policy).keys()
    head = models.linear_head(trainer.policy)  # found under the adapters; no gradient of its size is made
    assert head.weight.shape == (16, 16) and head.weight.grad is None and not head.weight.requires_grad


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_at_the_end(home, kind):
    trainer = home.trainer(kind=kind, lora_target_modules=None, **LORA)
    expected = copy.deepcopy(trainer.policy)
    trainer.train()
    expected.load_state_dict(trainer.policy.state_dict())
    expected = weights(expected.merge_and_unload())
    saved = models.load_policy(home.path / "run")
    assert equal(weights(saved), expected)
    assert not equal(weights(saved), weights(models.load_policy(home.path / kind)))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(saved(ids).logits, trainer.policy(ids).logits, rtol=1e-5, atol=1e-5)
    assert not list((home.path / "run").glob("adapter*"))
    value = models.load_reward_model(home.path / "run" / "value")
    torch.testing.assert_close(models.token_scores(value, ids), models.token_scores(trainer.value, ids))
    assert not torch.equal(value.score.weight, models.load_reward_model(home.path / f"{kind}-rm").score.weight)


def test_a_model_without_adapters_is_its_own(home):
    model = models.load_policy(home.path / "llama")
    assert merged(model) == (model, None)


def test_the_average_is_of_the_adapters_and_is_handed_on(home):
    trainer = home.trainer(ema_decay=0.5, **LORA)
    average = {name: weight.double() for name, weight in trained(trainer.policy).items()}
    for _ in range(2):
        trainer.iteration()
        now = trained(trainer.policy)
        average = {name: 0.5 * weight + 0.5 * now[name].double() for name, weight in average.items()}
    for name, weight in average.items():
        torch.testing.assert_close(trainer.ema.weights[name].double(), weight, rtol=0, atol=1e-6)
    trainer.save({})
    trainer.ema.swap(trainer.policy)
    ids = torch.tensor([[5, 6, 7]])
    saved = models.load_policy(home.path / "run")
    torch.testing.assert_close(saved(ids).logits, trainer.policy(ids).logits, rtol=1e-5, atol=1e-5)


def test_trap_28_resume_is_the_same_to_the_bit(home):
    options = LORA | {
        "ptx_coef": 0.5, "ptx_dataset_name": str(home.path / "text.txt"), "ema_decay": 0.9, "save_steps": 2,
        "num_ppo_epochs": 2, "num_responses": 2, "temperature": 0.7, "max_kl": 50.0, "kl_target": 0.3,
        "save_total_limit": None,
    }  # fmt: skip
    train_ppo(home.config("whole", **options | {"max_steps": 4}))
    train_ppo(home.config("halves", **options))
    torch.manual_seed(999)
    train_ppo(home.config("halves", **options | {"max_steps": 4, "resume_from_checkpoint": "true"}))
    for name in ("", "value", "checkpoint-4", "checkpoint-4/value"):
        file = "adapter_model.safetensors" if "checkpoint" in name else "model.safetensors"
        whole, halves = (load_file(home.path / out / name / file) for out in ("whole", "halves"))
        assert equal(whole, halves), name
    clock = ("time", "throughput", "eps", "tokens_per_sec")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(clock)} for row in home.rows(out)]
        for out in ("whole", "halves")
    ]
    assert rows[0] == rows[1] and rows[0][-1]["objective/kl"] != 0
    with safe_open(home.path / "whole" / "checkpoint-4" / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118 - not a dictionary
    assert not list((home.path / "whole" / "checkpoint-4").glob("model*"))


def test_resuming_with_other_adapters_is_an_error(home):
    train_ppo(home.config(save_steps=1, **LORA))
    with pytest.raises(ValueError, match=r"holds other adapters .*lora_A.weight is \(2, 16\), want \(3, 16\)"):
        train_ppo(home.config(resume_from_checkpoint="true", **LORA | {"lora_r": 3}))
    train_ppo(home.config("plain", save_steps=1, max_steps=1))
    with pytest.raises(ValueError, match="holds no adapters; it was written without use_peft"):
        train_ppo(home.config("plain", resume_from_checkpoint="true", **LORA))


def test_max_kl_goes_back_to_the_adapters_within_it(home):
    seen = []
    note = [lambda trainer, step, metrics: seen.append(trained(trainer.policy))]
    trainer = home.trainer(max_kl=1e-9, callbacks=note, **LORA | {"max_steps": 9})
    seen.append(trained(trainer.policy))
    trainer.train()
    last = len(home.rows())
    assert 1 < last < 9 and trainer.stopped.startswith("max_kl")
    assert equal(trained(trainer.policy), seen[last - 2])  # the policy that the last but one iteration sampled from
    assert last == 2 or not equal(seen[0], seen[last - 2])
    assert json.loads((home.path / "run" / "run.json").read_text())["config"]["use_peft"] is True


def test_shared_prompts_with_adapters(home):
    options = {"num_responses": 4, "response_length": 4, **LORA}
    assert home.trainer("auto", **options).share_width == 16
    assert home.trainer("false", packing="false", **options).share_width is None
