"""The preference stage: the reference is the model at the start, and the loss is that of the closed form."""

import json
import math
import random

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf import data, models
from rlhf.preference import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, pair_log_probs, train_dpo
from tests.roundings import STORED, assert_same
from tests.tiny import config_maker, model_folder, words


def preferences(count, seed=0):
    """The chosen response ends with `good`, the rejected one with `bad`."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        answer = words(generator, 1, 6)
        rows.append({"prompt": words(generator, 1, 6), "chosen": f"{answer} good", "rejected": f"{answer} bad"})
    return rows


@pytest.fixture
def settings(tmp_path):
    """settings(**changes) -> DPOConfig on a tiny policy and small preferences."""
    return config_maker(DPOConfig, tmp_path, preferences(24), learning_rate=1e-3)


def make_trainer(args):
    args.eval_fraction = 0.0
    trainer = DPOTrainer(args=args)
    trainer.add_reference(trainer.train_dataset)
    return trainer


def summed_log_prob(model, prompt, response):
    log_probs = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(log_probs[len(prompt) + t - 1, token] for t, token in enumerate(response))


@pytest.mark.parametrize("packing", ["true", "false"])
def test_log_probs_of_pairs(settings, packing):
    trainer = make_trainer(settings(packing=packing, dtype="float64"))
    examples = trainer.train_dataset[:5]
    log_probs, lengths = pair_log_probs(trainer.model, trainer.collate(examples))
    for example, row, length in zip(examples, log_probs, lengths, strict=True):
        expected = [summed_log_prob(trainer.model, example["prompt"], ids).item() for ids in example["responses"]]
        assert_same(row, expected)
        assert length.tolist() == [len(ids) for ids in example["responses"]]
        assert_same(example["ref_log_probs"], expected)


def test_loss_is_log_two_at_the_start_and_dpo_after(settings):
    trainer = make_trainer(settings(beta=0.5, dtype="float64"))
    examples = trainer.train_dataset[:4]
    batch = trainer.collate(examples)
    reference = max(abs(value) for example in examples for value in example["ref_log_probs"])
    assert_same(trainer.compute_loss(trainer.model, batch).item(), math.log(2), STORED * reference)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    losses = []
    for example in examples:
        chosen, rejected = (summed_log_prob(trainer.model, example["prompt"], ids) for ids in example["responses"])
        ref = example["ref_log_probs"]
        losses.append(-logsigmoid(0.5 * ((chosen - ref[0]) - (rejected - ref[1]))).item())
    assert_same(trainer.compute_loss(trainer.model, batch).item(), sum(losses) / 4, STORED * reference)


def test_trap_10_accumulation_equals_one_batch(settings, tmp_path):
    found = []
    for batch, steps in ((8, 1), (1, 8)):
        args = settings(
            per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=2, optim="sgd",
            learning_rate=0.1, dtype="float64", output_dir=str(tmp_path / f"run-{batch}"), eval_strategy="no",
            save_strategy="no",
        )  # fmt: skip
        trainer = make_trainer(args)
        trainer.train()
        found.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
    assert_same(found[0], found[1])


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "orpo", "simpo"])
def test_training_learns_the_preference(settings, loss_type):
    run = train_dpo(settings(loss_type=loss_type, num_train_epochs=4, learning_rate=1e-2, eval_fraction=0.25))
    summary = json.loads((run / "run.json").read_text())["summary"]
    assert summary["eval/rewards/accuracies"] > 0.9
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "lr"}
    assert names <= set(next(row for row in metrics if "loss" in row))
    models.load_policy(run)


def test_reference_is_the_start_after_a_resume(settings, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    whole = train_dpo(settings(output_dir=str(tmp_path / "whole"), **options))
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (whole / "checkpoint-2").rename(stopped / "checkpoint-2")
    train_dpo(settings(output_dir=str(stopped), resume_from_checkpoint="true", **options))
    ours, theirs = models.load_policy(whole), models.load_policy(stopped)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(("config", "trainer_class"), [(DPOConfig, DPOTrainer), (KTOConfig, KTOTrainer)])
def test_other_rows_are_evaluated_against_the_same_reference(tmp_path, config, trainer_class):
    """Before the first step policy and reference are one; later the reference must have been given."""
    policy, rows = model_folder(tmp_path / "policy"), preferences(12)
    options = {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "eval_fraction": 0.25, "learning_rate": 1e-2}

    def trainer(name, **more):
        args = config(output_dir=str(tmp_path / name), **options)
        return trainer_class(policy, args=args, train_dataset=rows, **more)

    start, given = trainer("start"), trainer("given", ref_model=policy)
    for rows_to_try in (None, rows[:4]):
        metrics = start.evaluate(rows_to_try)
        assert abs(metrics["eval_rewards/chosen"]) < 1e-5 and metrics["eval_loss"] > 0
    start.train()
    given.train()
    with pytest.raises(ValueError, match="eval_dataset: the reference, the model before its training, is no more"):
        start.evaluate(rows[:4])
    policy_now, reference = (models.load_policy(path) for path in (tmp_path / "given", policy))
    expected = 0.0
    for example in given.encode(data.rows_of(rows[:4], given.kind, name="rows"), "held-out"):
        if config is DPOConfig or example["row"]["label"]:
            prompt, ids = example["prompt"], example["responses"][0]
            expected += (
                0.1 / 4 * float(summed_log_prob(policy_now, prompt, ids) - summed_log_prob(reference, prompt, ids))
            )
    assert given.evaluate(rows[:4])["eval_rewards/chosen"] == pytest.approx(expected, abs=1e-5)
