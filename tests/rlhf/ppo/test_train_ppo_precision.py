"""PPO in mixed precision: one precision for all forwards; what accelerate is asked for is done, or refused."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf.ppo import PPOConfig
from rlhf_kernels import Clip
from tests.tiny_ppo import experience_of

ONE_STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
}  # one optimizer step, before which the policy is as it was


@pytest.mark.parametrize("how", ["the run's setting", "accelerate's environment"])
def test_the_first_ratio_is_one_in_mixed_precision(home, monkeypatch, how):
    if how == "accelerate's environment":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = home.trainer("mixed", bf16=how == "the run's setting", **ONE_STEP)
    assert {weight.dtype for weight in trainer.policy.parameters()} == {torch.float32}
    mixed, _ = experience_of(trainer)
    trainer.prompt_cursor.load({"epoch": 0, "position": 0})
    trainer.train()
    row = home.rows("mixed")[0]
    assert row["val/ratio_max"] == pytest.approx(1, abs=1e-6) and abs(row["policy/approxkl_avg"]) < 1e-9
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    whole = home.trainer("whole", **ONE_STEP)
    assert whole.accelerator.mixed_precision == "no"  # accelerate keeps its state for the process
    plain = whole.evaluate(mixed.rollouts)
    for name in ("log_probs", "ref_log_probs", "values"):
        gap = (getattr(plain, name) - getattr(mixed, name)).abs().max()
        assert 1e-4 < gap < 0.3, name  # products of bf16, whose steps are 2**-8


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(home, lora):
    """What autograd keeps of a step's forward, and the run's numbers: without dropout both forwards are equal."""
    if lora:
        pytest.importorskip("peft", reason="the package peft is not installed: pip install peft")
    options = {"max_steps": 2, "use_peft": lora, "lora_r": 2, "lora_alpha": 4}
    kept, rows = {}, {}
    for again in (False, True):
        trainer = home.trainer(f"again-{again}", gradient_checkpointing=again, **options)
        begun, sizes = trainer.begin(), []
        batch = trainer._join(begun.experience.rollouts, [0, 1, 2, 3])
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.nbytes) or x, lambda x: x):
            trainer.model(
                batch, begun.experience.log_probs[:4], begun.experience.advantages[:4], temperature=1.0,
                objective=Clip(),
            )  # fmt: skip
        kept[again] = sum(sizes)
        home.trainer(f"run-{again}", gradient_checkpointing=again, **options).train()
        rows[again] = home.rows(f"run-{again}")
    assert kept[True] < 0.6 * kept[False], kept
    for with_it, without in zip(rows[True], rows[False], strict=True):
        for name in ("objective/kl", "loss/policy_avg", "loss/value_avg", "grad_norm/policy", "grad_norm/value"):
            assert with_it[name] == pytest.approx(without[name], rel=1e-5, abs=1e-8), name


def test_gradient_checkpointing_of_a_model_that_has_none_is_refused(home, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match=r"^gradient_checkpointing: got True, want False: a Llama.* takes none"):
        home.trainer(gradient_checkpointing=True)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in ("MIXED_PRECISION", "DYNAMO_BACKEND", "GRADIENT_ACCUMULATION_STEPS"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MIXED_PRECISION", "fp16", "mixed_precision: accelerate was asked for fp16, want bf16"),
        ("MIXED_PRECISION", "fp8", "mixed_precision: accelerate was asked for fp8, want bf16"),
        ("DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend: accelerate was asked for inductor, want no"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps: accelerate launch got 4, the run 1"),
        ("USE_MEGATRON_LM", "true", "distributed_type: accelerate was asked for Megatron-LM"),
        ("USE_PARALLELISM_CONFIG", "true", "distributed_type: accelerate was asked for parallelism_config"),
    ],
)
def test_what_accelerate_is_asked_for_and_would_not_be_done_is_refused(home, monkeypatch, variable, value, message):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ValueError, match=f"^{message}"):
        home.trainer()
    assert not (home.path / "run").exists()


def test_gradients_are_not_divided_a_second_time(home, monkeypatch):
    """The same accumulation, asked for by the run and by accelerate, is one accumulation."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    home.trainer("alone", **options).train()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    home.trainer("both", **options).train()
    first, second = home.rows("alone")[0], home.rows("both")[0]
    assert first["grad_norm/policy"] == second["grad_norm/policy"]
    assert first["grad_norm/value"] == second["grad_norm/value"]


def test_rounded_weights_are_no_weights_of_mixed_precision():
    with pytest.raises(ValueError, match=r"^bf16: got True with dtype bfloat16, want dtype float32"):
        PPOConfig(bf16=True, dtype="bfloat16")


def test_steps_that_are_rounded_away_are_told(home):
    home.trainer("lost", dtype="bfloat16", learning_rate=1e-7).train()
    home.trainer("kept", bf16=True, learning_rate=1e-7).train()
    first, second = home.rows("lost")
    assert first["train/weights_moved"] < 0.1 and "train/weights_moved" not in second
    assert not any("train/weights_moved" in row for row in home.rows("kept"))
    (told,) = json.loads((home.path / "lost" / "run.json").read_text())["health"]
    assert told["guard"] == "weights_moved" and "use --bf16 true" in told["message"]
    assert json.loads((home.path / "kept" / "run.json").read_text())["health"] == []
