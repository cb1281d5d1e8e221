"""Mixed precision in the supervised stages: whatever a stage computes of a model, it computes in the same precision."""

import json
from pathlib import Path

import pytest
import torch

from rlhf.preference import DPOConfig, DPOTrainer, pair_log_probs
from rlhf.reward import RewardConfig, RewardTrainer, batch_scores
from rlhf.sft import SFTConfig, SFTTrainer
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
    examples = list(trainer.train_dataset)
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
