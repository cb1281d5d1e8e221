"""Mixed precision in the supervised stages: whatever a stage computes of a model, it computes in the same precision."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.preference import DPOConfig, DPOTrainer, pair_log_probs
from rlhf.reward import RewardConfig, RewardTrainer, batch_scores
from rlhf.sft import SFTConfig, SFTTrainer
from rlhf.training.steps import WeightsMoved
from tests.tiny import model_folder

DEMONSTRATIONS = [{"prompt": f"the {what}", "completion": "ran up and down"} for what in ("dog", "cat", "a b", "c d")]
PAIRS = [{"prompt": row["prompt"], "chosen": "was good", "rejected": "was bad and"} for row in DEMONSTRATIONS]
RANKINGS = [{"prompt": row["prompt"], "completions": ["was good", "a b", "bad"], "ranks": [0, 1, 2]} for row in PAIRS]
STAGES = {
    "sft": (SFTTrainer, SFTConfig, DEMONSTRATIONS),
    "reward": (RewardTrainer, RewardConfig, RANKINGS),
    "dpo": (DPOTrainer, DPOConfig, PAIRS),
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(stage, **settings) -> its trainer, without a step of training."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    policy = model_folder(tmp_path / "policy")

    def trainer(stage, **changes):
        kind, config, rows = STAGES[stage]
        options = {
            "model_name_or_path": policy, "output_dir": str(tmp_path / f"{stage}-{changes.get('bf16')}"),
            "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 2, "learning_rate": 1e-3,
            "save_strategy": "no",
        }  # fmt: skip
        if stage == "sft":
            options["num_samples"] = 0
        return kind(None, args=config(**options | changes), train_dataset=rows, eval_dataset=rows)

    return trainer


def logged(trainer):
    lines = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {name: [row[name] for row in rows if name in row] for name in ("loss", "eval/loss")}


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_evaluations_are_of_bf16_products(make, stage):
    losses = {}
    for bf16 in (False, True):
        trainer = make(stage, bf16=bf16)
        trainer.train()
        assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
        losses[bf16] = logged(trainer)
    for name in losses[True]:  # bf16 steps are 2**-8, losses of a tiny model about 1
        assert losses[True][name] == pytest.approx(losses[False][name], abs=0.1), name
        assert losses[True][name] != losses[False][name], name


def test_dpo_holds_mixed_log_probs_against_mixed_ones(make):
    trainer = make("dpo", bf16=True)
    examples = trainer.train_dataset
    batch = trainer.collate(examples)
    trainer.model.eval()
    with torch.no_grad():
        exact, _ = pair_log_probs(trainer.model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            rounded, _ = pair_log_probs(trainer.model, batch)
    trainer.add_reference(examples)
    reference = torch.tensor([example["ref_log_probs"] for example in examples])
    assert torch.equal(reference, rounded) and not torch.equal(rounded, exact)


def test_a_reward_model_is_calibrated_as_it_was_trained(make):
    trainer = make("reward", bf16=True)
    trainer.train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = [batch_scores(trainer.model, batch).mean() for batch in trainer.batches(trainer.demonstrations)]
    assert sum(scores).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_that_only_accelerate_was_asked_for_is_refused(make, monkeypatch, stage):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"^gradient_accumulation_steps: accelerate launch got 4, the run 1"):
        make(stage)
    assert make(stage, gradient_accumulation_steps=4).args.gradient_accumulation_steps == 4


def test_the_share_of_weights_that_moved():
    """Of those that had a gradient; weights of more bits, and frozen ones, are passed over."""
    weight = torch.nn.Parameter(torch.ones(4, 5, dtype=torch.bfloat16))
    others = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float16), False)]
    moved = WeightsMoved([weight, *others])
    moment = torch.ones(4, 5)
    moment[0] = 0
    with torch.no_grad():
        weight[:2] += 1  # the first row without a gradient, the second with one
        weight[2] += 2**-10  # less than half of the last bit
    optimizer = SimpleNamespace(state={weight: {"exp_avg": moment}})
    assert moved.share(optimizer) == 5 / 15
    assert moved.share(SimpleNamespace(state={})) == 10 / 20
    assert moved.complaint(0.5, 3) is None and moved.complaint(None, 3) is None
    assert "only 25% of the bfloat16 weights with a gradient moved in the first 3 steps" in moved.complaint(0.25, 3)
    assert WeightsMoved(others).share(optimizer) is None


@pytest.mark.parametrize("stage", STAGES)
def test_steps_that_are_rounded_away_are_told(make, stage, tmp_path, caplog):
    found = {}
    for dtype, rate in (("bfloat16", 1e-6), ("bfloat16", 1e-1), ("float32", 1e-6)):
        with caplog.at_level(logging.WARNING, "rlhf"):
            trainer = make(stage, dtype=dtype, learning_rate=rate, output_dir=str(tmp_path / f"{dtype}-{rate}"))
            trainer.train()
        lines = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
        shares = [json.loads(line).get("train/weights_moved") for line in lines]
        told = any(record.message.startswith("weights_moved: only") for record in caplog.records)
        found[dtype, rate] = shares[0], told
        assert not any(shares[1:])
        caplog.clear()
    low, high = found["bfloat16", 1e-6], found["bfloat16", 1e-1]
    assert low[0] < 0.1 and low[1] and high[0] > 0.9 and not high[1]
    assert found["float32", 1e-6] == (None, False)
