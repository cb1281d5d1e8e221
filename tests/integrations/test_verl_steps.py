"""One update of verl's actor and critic, on a tiny model and one CPU, with its functions and with ours.

verl's FSDP engine trains; advantages come from its trainer's `compute_advantage`. What the model gives, loss, every
metric and, as they are before the optimizer's step, the gradients of every weight are compared in fp32.
"""

import importlib
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from rlhf_kernels.integrations import verl

pytest.importorskip("verl", reason="verl is not installed: make test-integrations-verl")
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, LlamaForCausalLM

from tests.integrations.peer_tests import counted
from tests.tiny import model_folder, word_tokenizer

# What the trainer's module imports and compute_advantage does not call.
MOCKED = ("verl.workers.rollout.llm_server", "verl.checkpoint_engine")
B, P, T = 4, 5, 9
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """One rank over gloo, and a CPU as verl's platform."""
    manager = importlib.import_module("verl.plugin.platform.platform_manager")
    platform = MagicMock(device_name="cpu", device_module=torch.cpu)
    platform.current_device.return_value = "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "_current_platform", platform)
        for name in MOCKED:
            patch.setitem(sys.modules, name, MagicMock())
        for name in ("verl.workers.engine.fsdp.transformer_impl", "verl.trainer.ppo.ray_trainer"):
            importlib.import_module(name)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        verl.register()
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved tiny models, with a head of their own and with the embeddings as head."""
    folder = tmp_path_factory.mktemp("models")
    return {"untied": model_folder(folder / "untied"), "tied": model_folder(folder / "tied", tie_word_embeddings=True)}


def engine_of(folder, monkeypatch, kind="language_model", **options):
    """verl's FSDP2 engine in fp32 on one CPU."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp import transformer_impl

    def valued(local_path, torch_dtype, model_config, trust_remote_code):  # verl's own asks for flash-attn
        return AutoModelForTokenClassification.from_pretrained(local_path, dtype=torch_dtype, config=model_config)

    monkeypatch.setattr("verl.utils.model.load_valuehead_model", valued)
    torch.manual_seed(5)
    fused, compiled = options.pop("fused", False), options.pop("compiled", False)
    model = HFModelConfig(
        path=folder, override_config={"attn_implementation": "eager"}, enable_gradient_checkpointing=False,
        use_fused_kernels=fused, model_type=kind, fused_kernel_options={"impl_backend": "torch"},
    )  # fmt: skip
    model.hf_config._attn_implementation = "eager"
    full = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    made = {
        "language_model": transformer_impl.FSDPEngineWithLMHead,
        "value_model": transformer_impl.FSDPEngineWithValueHead,
    }
    engine = made[kind](
        model,
        FSDPEngineConfig(strategy="fsdp2", mixed_precision=full, use_torch_compile=compiled, **options),
        FSDPOptimizerConfig(
            optimizer="SGD", lr=0.1, weight_decay=0.0, clip_grad=1e9, total_training_steps=1, betas=None
        ),
        CheckpointConfig(),
    )
    engine.initialize()
    return engine


@pytest.fixture
def called(monkeypatch):
    """How often each of our functions has been called."""
    calls = Counter()
    core = sys.modules["verl.trainer.ppo.core_algos"]
    for attributes in (*verl.REPLACED.values(), core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY):
        for name, function in list(attributes.items()):
            if function.__module__ == verl.__name__:
                monkeypatch.setitem(attributes, name, counted(calls, name, function))
    return calls


def rollout(folder, temperature):
    """A batch as verl's rollout leaves it: prompts padded on the left, answers on the right, a tool's tokens in one."""
    from verl import DataProto

    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, len(word_tokenizer()), (B, P + T), generator=generator)
    starts, ends = torch.tensor([0, 2, 1, 3])[:, None], P + torch.tensor([T, 4, 7, 5])[:, None]
    attention = ((torch.arange(P + T) >= starts) & (torch.arange(P + T) < ends)).long()
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    mask = attention[:, P:].clone()
    mask[0, 3:5] = 0

    def noise(scale):
        return scale * torch.randn(B, T, generator=generator)

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        hidden = model.model(ids, attention_mask=attention, position_ids=positions).last_hidden_state
        logits = model.lm_head(hidden[:, P - 1 : -1])
    now = (logits / temperature).log_softmax(-1).gather(-1, ids[:, P:, None]).squeeze(-1)
    tensors = {
        "input_ids": ids, "attention_mask": attention, "position_ids": positions, "response_mask": mask,
        "prompts": ids[:, :P], "responses": ids[:, P:],
        "old_log_probs": now + noise(0.3), "ref_log_prob": now + noise(0.5),
        "rollout_is_weights": noise(0.5).exp(), "values": noise(0.5), "token_level_rewards": noise(1.0) * mask,
    }  # fmt: skip
    return DataProto.from_dict(
        tensors=tensors,
        non_tensors={"uid": np.array(["a", "b", "a", "b"], dtype=object)},
        meta_info={"temperature": temperature},
    )


def with_advantages(batch, estimator):
    """The batch with verl's advantages, without the padding, as its trainer hands it to the workers."""
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.workers.utils.padding import left_right_2_no_padding

    batch = compute_advantage(batch, estimator, gamma=0.95, lam=0.9, config=AlgoConfig(gamma=0.95, lam=0.9))
    return left_right_2_no_padding(batch.to_tensordict())


def update(engine, data, loss, **more):
    """(model's outputs, loss and metrics, gradients) of one update by the engine: two micro-batches, one step."""
    from verl.utils import tensordict_utils as tu

    settings = {
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2,
        "global_batch_size": B,
        "return_model_output": True,
    }
    settings |= more
    tu.assign_non_tensor(data, **settings)
    gradients, step = {}, engine.optimizer_step

    def optimizer_step():
        gradients.update({key: x.grad.full_tensor().clone() for key, x in engine.module.named_parameters()})
        return step()

    engine.optimizer_step = optimizer_step
    with engine.train_mode():
        out = engine.train_batch(data, loss_function=loss)
    numbers = {"loss": out["loss"], **{key: x.values().tolist() for key, x in out["model_output"].items()}}
    for key, value in out["metrics"].items():
        numbers[key] = getattr(value, "values", value)
    return numbers, gradients


def compare(step, called, wanted_calls, replaced=True, skipped=()):
    """Loss, metrics and gradients of step(ours=False) with verl's functions and of step(ours=True) with ours.

    A gradient of a weight is a sum over tokens of both signs, so that its fp32 rounding goes with the weight's largest.
    """
    wanted, wanted_gradients = step(False)
    assert not called, "our functions were called where verl's are asked for"
    with verl.patched() if replaced else nullcontext():
        mine, gradients = step(True)
    assert set(called) == wanted_calls
    assert mine.keys() == wanted.keys()
    for key, value in wanted.items():
        if key not in skipped:
            assert np.isfinite(value).all()
            assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert gradients.keys() == wanted_gradients.keys() != set()
    for key, gradient in wanted_gradients.items():
        largest = gradient.abs().max().item()
        assert largest > 0, f"{key} has no gradient to compare"
        torch.testing.assert_close(
            gradients[key], gradient, rtol=1e-5, atol=32 * EPS * largest, msg=lambda text, key=key: f"{key}: {text}"
        )
    return mine


def actor_config(loss_mode, **options):
    from verl.workers.config.actor import ActorConfig, PolicyLossConfig

    policy = PolicyLossConfig(loss_mode=loss_mode, dro_beta=0.3, kl_cov_ratio=0.2, ppo_kl_coef=0.7)
    options = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1, "clip_ratio_c": 1.5, **options}
    return ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, policy_loss=policy, **options)


LOGITS = {"logprobs_from_logits", "entropy_from_logits"}
KL = {"use_kl_loss": True, "kl_loss_coef": 0.2, "entropy_coeff": 0.01}
# {name: (loss_mode, adv_estimator, settings of the actor, of the engine, of the batch, ours that are called)}
ACTORS = {
    "vanilla-gae": ("vanilla", "gae", KL, {}, {}, {*LOGITS, "compute_gae_advantage_return", "kl_penalty"}),
    "padded": ("vanilla", "rloo", KL, {}, {"use_remove_padding": False}, {*LOGITS, "kl_penalty"}),
    "in-place": (
        "vanilla", "opo", {"loss_agg_mode": "seq-mean-token-mean"}, {}, {"temperature": 1.0}, {"logprobs_from_logits"},
    ),
    "dynamic": (
        "vanilla", "grpo", {**KL, "kl_loss_type": "k3+"}, {},
        {"use_dynamic_bsz": True, "max_token_len_per_gpu": 2 * (P + T)}, {*LOGITS, "kl_penalty"},
    ),
    "chunked": (
        "vanilla", "reinforce_plus_plus", {"entropy_coeff": 0.01}, {"entropy_from_logits_with_chunking": True}, {},
        {"logprobs_from_logits", "entropy_from_logits_with_chunking"},
    ),
    "checkpointed": (
        "gspo", "reinforce_plus_plus_baseline", KL, {"entropy_checkpointing": True}, {}, {*LOGITS, "kl_penalty"},
    ),
    "fused": ("vanilla", "rloo", KL, {"fused": True}, {}, {"FusedLinearForPPO.forward", "kl_penalty"}),
    "sum-pi-squared": (
        "vanilla", "rloo", {}, {}, {"calculate_sum_pi_squared": True},
        {"logprobs_from_logits", "calculate_sum_pi_squared_from_logits"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTORS)
def test_actor(name, folders, called, monkeypatch):
    from verl.workers.utils.losses import ppo_loss

    mode, estimator, options, engine_options, settings, wanted_calls = ACTORS[name]
    by_name = {f"rk_{mode}"} | ({f"rk_{estimator}"} if estimator != "gae" else set())  # gae has to be replaced
    temperature = settings.get("temperature", 0.7)
    # a head that is not the embeddings' is not gathered by FSDP2 where verl's fused head reads it: verl fails there
    folder = folders["tied" if "fused" in engine_options else "untied"]
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)  # verl replaces it in the class

    def step(ours):
        named = ours and f"rk_{estimator}" in by_name
        data = with_advantages(rollout(folder, temperature), f"rk_{estimator}" if named else estimator)
        engine = engine_of(folder, monkeypatch, **engine_options)
        config = actor_config(f"rk_{mode}" if ours else mode, **options)
        more = {"calculate_entropy": config.entropy_coeff != 0, "use_fused_kernels": "fused" in engine_options}
        return update(engine, data, partial(ppo_loss, config), **{**more, **settings})

    found = compare(step, called, wanted_calls | by_name)
    assert 0 < sum(found["actor/pg_clipfrac"]) < 2


@pytest.mark.parametrize("mode", sorted({name.removeprefix("rk_") for name in verl.LOSSES} - {"vanilla", "clip_cov"}))
def test_policy_losses_by_name(mode, folders, called, monkeypatch):
    """As `loss_mode` alone, nothing replaced."""
    from verl.workers.utils.losses import ppo_loss

    def step(ours):
        data = with_advantages(rollout(folders["untied"], 0.7), "rk_grpo" if ours else "grpo")
        config = actor_config(f"rk_{mode}" if ours else mode, loss_agg_mode="seq-mean-token-sum")
        return update(engine_of(folders["untied"], monkeypatch), data, partial(ppo_loss, config))

    clips = {"actor/pg_clipfrac", "actor/pg_clipfrac_lower"} if mode == "geo_mean" else ()  # counted otherwise
    compare(step, called, {f"rk_{mode}", "rk_grpo"}, replaced=False, skipped=clips)


def test_critic(folders, called, monkeypatch):
    from verl.workers.config import CriticConfig
    from verl.workers.utils.losses import value_loss

    config = CriticConfig(strategy="fsdp2", ppo_micro_batch_size_per_gpu=2, cliprange_value=0.2)

    def step(ours):
        data = with_advantages(rollout(folders["untied"], 0.7), "gae")
        return update(engine_of(folders["untied"], monkeypatch, kind="value_model"), data, partial(value_loss, config))

    found = compare(step, called, {"compute_gae_advantage_return", "compute_value_loss"})
    assert 0 < sum(found["critic/vf_clipfrac"]) < 2


def test_sft(folders, called, monkeypatch):
    from verl.workers.utils.losses import sft_loss

    def step(ours):
        data = with_advantages(rollout(folders["untied"], 1.0), "grpo")
        answers = (data["position_ids"].values() > 2).long()
        data["loss_mask"] = torch.nested.nested_tensor_from_jagged(answers, data["input_ids"].offsets())
        return update(engine_of(folders["untied"], monkeypatch), data, partial(sft_loss, None))

    compare(step, called, {"logprobs_from_logits"})


def test_compiled_entropy(folders, called, monkeypatch):
    """torch.compile, which is verl's default for the entropy, takes ours."""
    from verl.workers.utils.losses import ppo_loss

    def step(ours):
        data = with_advantages(rollout(folders["untied"], 0.7), "grpo")
        data.pop("rollout_is_weights")
        engine = engine_of(folders["untied"], monkeypatch, compiled=ours)
        config = actor_config("vanilla", entropy_coeff=0.1)
        return update(engine, data, partial(ppo_loss, config), calculate_entropy=True)

    compare(step, called, LOGITS)
