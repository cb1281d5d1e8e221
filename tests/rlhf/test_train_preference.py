"""The preference stage: the reference is the model at the start, and the loss is that of the closed form."""

import json
import math
import random

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf import data, models
from rlhf.preference import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, pair_log_probs, train_dpo
from rlhf_kernels import preference_loss
from rlhf_kernels import preferences as preferences_of_kernels
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


LOSSES = [name for name in preferences_of_kernels.BY_NAME if name != "kto"]


def moved(trainer):
    """The policy away from its reference."""
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return trainer


def by_hand(trainer, examples, ld_alpha=1.0):
    """Log-probs [N, 2] of transformers' own logits, float64, differentiable, tokens beyond the shorter one scaled."""
    sums = []
    for example in examples:
        shared = min(map(len, example["responses"]))
        for ids in example["responses"]:
            logits = trainer.model(torch.tensor([example["prompt"] + ids])).logits[0].double().log_softmax(-1)
            tokens = [logits[len(example["prompt"]) + t - 1, token] for t, token in enumerate(ids)]
            sums.append(sum(x if t < shared else ld_alpha * x for t, x in enumerate(tokens)))
    return torch.stack(sums).view(-1, 2)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_is_that_of_the_pairs_log_probs(settings, loss_type):
    """Value and gradient of a step: the loss of log-probs made one response at a time."""
    smoothing = 1e-3 if loss_type == "exo_pair" else 0.1 if loss_type == "robust" else 0.0
    trainer = moved(make_trainer(settings(loss_type=loss_type, label_smoothing=smoothing, dtype="float64")))
    examples = trainer.train_dataset[:4]
    lengths = torch.tensor([[len(ids) for ids in example["responses"]] for example in examples])
    log_probs = by_hand(trainer, examples)
    options = {"beta": 0.1, "loss_type": loss_type}
    if smoothing:
        options["label_smoothing"] = smoothing
    if trainer.needs_reference:
        ref = torch.tensor([example["ref_log_probs"] for example in examples], dtype=torch.float64)
        options |= {"ref_chosen_logps": ref[:, 0], "ref_rejected_logps": ref[:, 1]}
    if trainer.args.losses[0][0].by_token:
        options |= {"chosen_lengths": lengths[:, 0], "rejected_lengths": lengths[:, 1]}
    wanted = preference_loss(*log_probs.unbind(1), **options).loss
    weights = list(trainer.model.parameters())
    found = trainer.compute_loss(trainer.model, trainer.collate(examples))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    for x, y in zip(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_list_of_losses_is_their_weighted_sum(settings):
    both = moved(make_trainer(settings(loss_type=["sigmoid", "sft"], loss_weights=[0.7, 0.3], dtype="float64")))
    batch = both.collate(both.train_dataset[:4])
    log_probs = by_hand(both, both.train_dataset[:4])
    ref = batch["ref_log_probs"].double()
    lengths = [len(example["responses"][0]) for example in both.train_dataset[:4]]
    dpo = -logsigmoid(0.1 * ((log_probs - ref)[:, 0] - (log_probs - ref)[:, 1])).mean()
    wanted = 0.7 * dpo - 0.3 * log_probs[:, 0].sum() / sum(lengths)
    assert both.compute_loss(both.model, batch).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_tokens_beyond_the_shorter_response_count_less(settings):
    trainer = make_trainer(settings(ld_alpha=0.3, dtype="float64"))
    rows = [
        {"prompt": "a", "chosen": "a b good", "rejected": "bad"},
        {"prompt": "b", "chosen": "a", "rejected": "b a b"},
    ]
    examples = trainer.encode(rows, "training")
    found, _ = pair_log_probs(trainer.model, trainer.collate(examples), 0.3)
    assert_same(found, by_hand(trainer, examples, 0.3).tolist())


def test_likely_pairs_weigh_more(settings):
    """WPO: exp of the mean over tokens of log p - log sum p^2, of both responses."""
    trainer = moved(make_trainer(settings(use_weighting=True, dtype="float64")))
    examples = trainer.train_dataset[:3]
    weights = []
    for example in examples:
        aligned = []
        for ids in example["responses"]:
            logits = trainer.model(torch.tensor([example["prompt"] + ids])).logits[0].double().log_softmax(-1)
            rows = logits[len(example["prompt"]) - 1 : -1]
            aligned.append((rows.gather(1, torch.tensor(ids)[:, None]).squeeze(1) - (2 * rows).logsumexp(1)).mean())
        weights.append(sum(aligned).exp())
    log_probs = by_hand(trainer, examples)
    ref = torch.tensor([example["ref_log_probs"] for example in examples], dtype=torch.float64)
    losses = -logsigmoid(0.1 * ((log_probs - ref)[:, 0] - (log_probs - ref)[:, 1]))
    wanted = (torch.stack(weights) * losses).mean()
    assert trainer.compute_loss(trainer.model, trainer.collate(examples)).item() == pytest.approx(
        wanted.item(), rel=1e-5
    )


def test_accumulation_with_a_likelihood_equals_one_batch(settings, tmp_path):
    found = []
    for batch, steps in ((8, 1), (2, 4)):
        args = settings(
            loss_type=["sigmoid", "sft"], per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            max_steps=2, optim="sgd", learning_rate=0.1, dtype="float64", output_dir=str(tmp_path / f"run-{batch}"),
            eval_strategy="no", save_strategy="no",
        )  # fmt: skip
        trainer = make_trainer(args)
        trainer.train()
        found.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
    assert_same(found[0], found[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type: got 'dpo', wants"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights: got 1 of them, wants 2"),
        ({"loss_type": "orpo", "f_divergence_type": "js_divergence"}, "f_divergence_type: got 'js_divergence'"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting: got True, wants False with loss_type aot"),
        ({"loss_type": "sft", "ld_alpha": 0.5}, "ld_alpha: got 0.5, wants None with loss_type sft"),
    ],
)
def test_losses_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
