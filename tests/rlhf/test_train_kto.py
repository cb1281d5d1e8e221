"""KTO: single responses held against the reference and against z, the KL that mismatched responses show."""

import json
import math
import random
from itertools import pairwise

import pytest
import torch

from rlhf import data, models
from rlhf.data.examples import Examples
from rlhf.data.mismatches import mismatched
from rlhf.preference import KTOConfig, KTOTrainer, train_kto
from tests.rlhf.test_train_preference import preferences, summed_log_prob
from tests.roundings import STORED, assert_same
from tests.tiny import config_maker, words, write_jsonl


def judged(count, seed=0):
    """A response that ends with `good` is desired, one that ends with `bad` is not; three of four are desired."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        label = index % 4 > 0
        completion = f"{words(generator, 1, 6)} {'good' if label else 'bad'}"
        rows.append({"prompt": words(generator, 1, 6), "completion": completion, "label": label})
    return rows


@pytest.fixture
def settings(tmp_path):
    """settings(**changes) -> KTOConfig on a tiny policy and a few judged responses."""
    return config_maker(KTOConfig, tmp_path, judged(24), learning_rate=1e-3)


def make_trainer(args):
    args.eval_fraction = 0.0
    trainer = KTOTrainer(args=args)
    trainer.add_reference(trainer.train_dataset)
    return trainer


@torch.no_grad()
def move(model, seed):
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)


def steps_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def encoded(*pairs):
    rows = [{"prompt": prompt, "responses": [response], "row": {"label": True}} for prompt, response in pairs]
    return Examples.of(rows)


def others(*pairs, spare=None, max_length=64):
    found = mismatched(encoded(*pairs), max_length, spare)
    assert [(row["prompt"], row["responses"][0]) for row in found] == list(pairs)
    return [row["responses"][1] for row in found]


def test_each_prompt_gets_the_response_of_the_next_other_prompt():
    a, b, c = [1, 2], [1, 3], [4]
    rows = [(a, [11]), (a, [12]), (b, [13]), (c, [14]), (a, [15])]
    assert others(*rows) == [[13], [13], [14], [15], [13]]
    assert others(([1] * 6, [7]), ([2] * 3, [8] * 5), max_length=8) == [[8, 8], [7]]
    spare = mismatched(encoded(*rows[1:]), 64)
    assert others(*rows[:2], spare=spare) == [[13], [13]]
    assert others(spare=spare) == []
    with pytest.raises(data.DataError, match="all rows have one prompt"):
        mismatched(encoded(*rows[:2]), 64)


def test_what_is_not_learned_of_a_response_is_not_learned_behind_another_prompt():
    rows = [
        {"prompt": [1], "responses": [[5, 6, 7]], "learned": [[False, True, False]]},
        {"prompt": [2], "responses": [[8, 9]]},
    ]
    first, second = mismatched(Examples.of(rows), 64)
    assert first["responses"] == [[5, 6, 7], [8, 9]] and first["learned"] == [[False, True, False], None]
    assert second["responses"] == [[8, 9], [5, 6, 7]] and second["learned"] == [None, [False, True, False]]
    (alone,) = mismatched(Examples.of(rows[1:]), 64, spare=mismatched(Examples.of(rows), 64))
    assert alone["responses"] == [[8, 9], [5, 6, 7]] and alone["learned"] == [None, [False, True, False]]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_log_probs_of_responses_and_of_mismatched_ones(settings, packing):
    trainer = make_trainer(settings(packing=packing, dtype="float64"))
    examples = trainer.train_dataset[:5]
    expected = [
        [summed_log_prob(trainer.model, row["prompt"], each["responses"][0]).item() for each in (row, following)]
        for row, following in pairwise(trainer.train_dataset[:6])
    ]
    assert_same(trainer.log_probs(trainer.model, trainer.collate(examples)), expected)
    assert_same([row["ref_log_probs"] for row in examples], expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_is_that_of_the_paper(settings, seed):
    """lambda_y - v(x, y), eq. (8): v is lambda_y sigmoid(beta (r - z)), or of beta (z - r); seed 0 clamps z."""
    weights = {True: 1.5, False: 0.75}
    args = settings(beta=0.5, desirable_weight=weights[True], undesirable_weight=weights[False], dtype="float64")
    trainer = make_trainer(args)
    rows = trainer.train_dataset
    batch = trainer.collate(rows[:6])
    reference = max(abs(value) for row in rows[:6] for value in row["ref_log_probs"])
    move(trainer.model, seed)

    def ratio(prompt, ids, ref):
        return summed_log_prob(trainer.model, prompt, ids) - ref

    pairs = [(row, following["responses"][0]) for row, following in pairwise(rows[:7])]
    apart = [ratio(row["prompt"], ids, row["ref_log_probs"][1]).item() for row, ids in pairs]
    z, losses = max(sum(apart) / 6, 0.0), []
    for row in rows[:6]:
        good, r = row["row"]["label"], ratio(row["prompt"], row["responses"][0], row["ref_log_probs"][0])
        losses.append(weights[good] - weights[good] * torch.sigmoid(0.5 * ((r - z) if good else (z - r))))
    expected = torch.stack(losses).mean()
    found = trainer.compute_loss(trainer.model, batch)
    assert_same(found.item(), expected.item(), STORED * reference)
    assert_same(trainer.of_step([batch])["kl"].item(), z, STORED * reference)
    weight = trainer.model.get_input_embeddings().weight
    ours, theirs = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (found, expected))
    assert_same(ours, theirs, STORED * reference)
    assert expected.item() != pytest.approx(sum(weights[row["row"]["label"]] for row in rows[:6]) / 12, abs=1e-3)


def test_trap_10_accumulation_equals_one_batch(settings, tmp_path):
    """z is that of the step: with the rows of a micro-batch alone the weights would differ."""
    found = []
    for batch, steps in ((8, 1), (1, 8)):
        args = settings(
            per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=3, optim="sgd",
            learning_rate=0.3, dtype="float64", output_dir=str(tmp_path / f"run-{batch}"), eval_strategy="no",
            save_strategy="no",
        )  # fmt: skip
        trainer = make_trainer(args)
        trainer.train()
        weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
        names = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen")
        found.append((weights, [[line[name] or 0.0 for name in names] for line in steps_of(tmp_path / f"run-{batch}")]))
    assert_same(found[0][0], found[1][0])
    assert_same(found[0][1], found[1][1], 64 * 2**-24)
    assert found[0][1][2][1] > 0.1 and found[0][1][2][4] > 0.01


def test_training_learns_the_labels(settings, tmp_path):
    held_out = write_jsonl(tmp_path / "held-out.jsonl", judged(8, seed=1))
    run = train_kto(settings(num_train_epochs=8, learning_rate=1e-2, eval_dataset_name=held_out))
    summary = json.loads((run / "run.json").read_text())["summary"]
    assert summary["eval/rewards/chosen"] > summary["eval/rewards/rejected"] + 0.3
    assert summary["eval/rewards/margins"] == pytest.approx(
        summary["eval/rewards/chosen"] - summary["eval/rewards/rejected"], abs=1e-5
    )
    steps = steps_of(run)
    assert steps[0]["loss"] == pytest.approx(0.5) and steps[-1]["loss"] < 0.45
    margins = [step["rewards/margins"] for step in steps if step["rewards/margins"] is not None]
    assert margins[-1] > margins[0] + 0.2 and abs(steps[0]["rewards/chosen"]) < 1e-5
    models.load_policy(run)


def test_apo_zero_holds_responses_against_the_reference_alone(settings):
    """1 - sigmoid(beta r) of a desired response, sigmoid(beta r) of another, without mismatched responses."""
    trainer = make_trainer(settings(loss_type="apo_zero_unpaired", beta=0.5, dtype="float64"))
    rows = trainer.train_dataset[:6]
    batch = trainer.collate(rows)
    assert "mismatched" not in batch and all(len(row["responses"]) == 1 for row in rows)
    move(trainer.model, 1)
    losses = []
    for row in rows:
        r = summed_log_prob(trainer.model, row["prompt"], row["responses"][0]) - row["ref_log_probs"][0]
        losses.append(torch.sigmoid(-0.5 * r if row["row"]["label"] else 0.5 * r))
    expected = torch.stack(losses).mean()
    found = trainer.compute_loss(trainer.model, batch)
    reference = max(abs(row["ref_log_probs"][0]) for row in rows)
    assert_same(found.item(), expected.item(), STORED * reference)
    weight = trainer.model.get_input_embeddings().weight
    ours, theirs = (torch.autograd.grad(loss, weight)[0] for loss in (found, expected))
    assert_same(ours, theirs, STORED * reference)


def test_apo_zero_learns(settings):
    run = train_kto(settings(loss_type="apo_zero_unpaired", num_train_epochs=4, learning_rate=1e-2, eval_fraction=0.25))
    summary = json.loads((run / "run.json").read_text())["summary"]
    assert summary["eval/loss"] < 0.48 and "eval/kl" not in summary  # 0.5 at the start


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone_trains(settings, tmp_path, label):
    rows = write_jsonl(tmp_path / "one.jsonl", [{**row, "label": label} for row in judged(8)])
    run = train_kto(settings(dataset_name=rows, eval_fraction=0.25, num_train_epochs=4, learning_rate=1e-2))
    summary = json.loads((run / "run.json").read_text())["summary"]
    assert math.isfinite(summary["eval/loss"])
    own, lacking = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert f"eval/rewards/{lacking}" not in summary and "eval/rewards/margins" not in summary
    assert (summary[f"eval/rewards/{own}"] > 0) == label
    assert all(step[f"rewards/{lacking}"] is None and step["rewards/margins"] is None for step in steps_of(run))


def test_a_pair_is_a_desired_and_an_undesired_response(settings, tmp_path):
    pairs = preferences(6)
    trainer = make_trainer(settings(dataset_name=write_jsonl(tmp_path / "pairs.jsonl", pairs)))
    rows = [{key: value for key, value in each["row"].items() if key != "at"} for each in trainer.train_dataset]
    assert rows == [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    answers = [each["responses"][0] for each in trainer.train_dataset]
    following = [each["responses"][1] for each in trainer.train_dataset]
    assert following == [answers[(i // 2 * 2 + 2) % 12] for i in range(12)]


def test_the_example_that_is_shown_is_the_response_to_its_prompt(settings, tmp_path, capsys):
    rows = [{"prompt": "a", "completion": "b good", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
    KTOTrainer(args=settings(dataset_name=write_jsonl(tmp_path / "two.jsonl", rows), eval_fraction=0.0))
    assert "a\u27e6b good </s>\u27e7\n" in capsys.readouterr().out


def test_reference_is_the_start_after_a_resume(settings, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    whole = train_kto(settings(output_dir=str(tmp_path / "whole"), **options))
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (whole / "checkpoint-2").rename(stopped / "checkpoint-2")
    train_kto(settings(output_dir=str(stopped), resume_from_checkpoint="true", **options))
    ours, theirs = models.load_policy(whole), models.load_policy(stopped)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_pairs_of_whole_dialogues_share_their_prompt_and_tools():
    asked = [{"role": "system", "content": "be good"}, {"role": "user", "content": "hi"}]
    yo, no = ({"role": "assistant", "content": text} for text in ("yo", "no"))
    row = {"chosen": [*asked, yo], "rejected": [*asked, no], "tools": [{"name": "find"}]}
    good, bad = data.rows_of([row], "unpaired", name="rows")
    assert (good["prompt"], good["completion"], good["label"]) == (asked, [yo], True)
    assert (bad["prompt"], bad["completion"], bad["label"]) == (asked, [no], False)
    assert good["prompt"].tools == bad["prompt"].tools == [{"name": "find"}]
