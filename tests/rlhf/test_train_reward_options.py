"""Weights, margins, ties and shuffled pairs of the reward stage; its calibration, wherever a score is read."""

import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from rlhf import cli, data, evaluate, models, reward, training
from rlhf.data.examples import Examples
from rlhf.ppo import PPOConfig, PPOTrainer
from rlhf.reward import train_reward
from rlhf.rollouts.sampling import Rollouts
from tests import tiny_reward
from tests.roundings import assert_same
from tests.tiny import WORDS, model_folder, write_jsonl
from tests.tiny_reward import config_maker, gradient, make_trainer


def marked_rankings(count=24):
    """Rankings with weights 0.25 to 2 and, in every other row, a margin for each pair."""
    generator = random.Random(3)
    rows = tiny_reward.rankings(count)
    for index, row in enumerate(rows):
        row["weight"] = generator.choice([0.25, 0.5, 1.0, 2.0])
        k = len(row["completions"])
        if index % 2:
            row["margins"] = [[generator.uniform(0, 2) for _ in range(k)] for _ in range(k)]
    return rows


@pytest.fixture
def settings(tmp_path):
    return config_maker(tmp_path, marked_rankings())


def response_scores(trainer, example):
    """The score of each response, one forward for each, without packing or padding."""
    rows = [torch.tensor([example["prompt"] + response]) for response in example["responses"]]
    return [models.token_scores(trainer.model, row)[0, -1] for row in rows]


def pairwise_loss(trainer, example):
    """Mean of -log sigmoid(r_w - r_l - margin) over the pairs of one ranking, pair by pair."""
    scores, row = response_scores(trainer, example), example["row"]
    k = len(scores)
    margins = row.get("margins") or [[0.0] * k] * k
    decided = [(i, j) for i, j in itertools.product(range(k), repeat=2) if row["ranks"][i] < row["ranks"][j]]
    return sum(-logsigmoid(scores[i] - scores[j] - margins[i][j]) for i, j in decided) / len(decided)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_weights_and_margins_by_an_independent_loss(settings, packing):
    trainer = make_trainer(settings(packing=packing, dtype="float64"))
    examples = trainer.train_dataset[:6]
    weights = [example["row"]["weight"] for example in examples]
    assert len(set(weights)) > 1 and sum("margins" in example["row"] for example in examples) == 3
    found = gradient(trainer, trainer.collate(examples), None)
    trainer.model.zero_grad()
    losses = [pairwise_loss(trainer, example) for example in examples]
    expected = sum(weight * loss for weight, loss in zip(weights, losses)) / sum(weights)
    expected.backward()
    independent = torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])
    assert_same(found, independent)
    assert_same(trainer.compute_loss(trainer.model, trainer.collate(examples)), expected)
    trainer.held_out = examples
    assert_same(trainer.evaluate_rows(examples)["loss"], expected)


def test_weight_two_is_the_row_twice(settings):
    trainer = make_trainer(settings(dtype="float64"))
    example, other = ({**ex, "row": {**ex["row"], "weight": 1.0}} for ex in trainer.train_dataset[:2])
    heavy = {**example, "row": {**example["row"], "weight": 2.0}}
    batches = [trainer.collate([heavy, other]), trainer.collate([example, example, other])]
    assert [trainer.count_items(batch) for batch in batches] == [3.0, 3.0]
    assert_same(*(gradient(trainer, batch, 3.0) for batch in batches))


@pytest.mark.parametrize("comparisons", ["prompt", "shuffled"])
def test_trap_10_accumulation_equals_one_batch_of_weighted_rows(settings, tmp_path, comparisons):
    """Two SGD steps with (batch 8, accumulation 1) and (1, 8), weights and margins in the rows: the same weights."""
    found = []
    for batch, steps in ((8, 1), (1, 8)):
        args = settings(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=2,
            optim="sgd",
            dtype="float64",
            comparisons=comparisons,
            output_dir=str(tmp_path / f"run-{batch}"),
            save_strategy="no",
            eval_fraction=0.0,
        )
        run = train_reward(args)
        found.append(torch.cat([weight.flatten() for weight in models.load_reward_model(run).parameters()]))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[-1] = torch.cat([found[-1].detach(), torch.tensor([row["loss"] for row in lines if "loss" in row])])
    start = models.reward_model_from_policy(args.model_name_or_path, args.seed)
    assert (found[0][:-2] - torch.cat([weight.detach().flatten() for weight in start.parameters()])).abs().max() > 1e-4
    assert_same(*found)


def test_scalar_margin_of_chosen_and_rejected(settings, tmp_path):
    """TRL's column: -log sigmoid(r_chosen - r_rejected - margin)."""
    rows = [{"prompt": "a b", "chosen": "c good", "rejected": "d", "margin": 1.25}]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    trainer = make_trainer(settings(dataset_name=path, dtype="float64"))
    (example,) = trainer.train_dataset
    chosen, rejected = (score.item() for score in response_scores(trainer, example))
    expected = math.log1p(math.exp(-(chosen - rejected - 1.25)))
    assert_same(trainer.compute_loss(trainer.model, trainer.collate([example])).item(), expected)


def test_margins_and_plackett_luce_do_not_go_together(settings):
    with pytest.raises(ValueError, match=r"plackett_luce knows no margins, but .*rows\.jsonl:2 holds one"):
        train_reward(settings(loss_type="plackett_luce"))


def test_a_dropped_completion_takes_its_margins_with_it(settings):
    long = " ".join(["dog"] * 70)
    margins = [[0.0, 9.0, 0.5], [9.0, 0.0, 9.0], [9.0, 9.0, 0.0]]
    row = {"prompt": "a", "completions": ["b", long, "c"], "ranks": [0, 1, 2], "margins": margins, "at": "x:1",
           "pairs": [[0, 1], [0, 2]], "weight": 2.0}  # fmt: skip
    trainer = make_trainer(settings(max_length=64, dtype="float64"), rows=[row])
    (example,) = trainer.train_dataset
    assert example["row"]["margins"] == [[0.0, 0.5], [9.0, 0.0]] and example["row"]["pairs"] == [[0, 1]]
    first, second = (score.item() for score in response_scores(trainer, example))
    expected = math.log1p(math.exp(-(first - second - 0.5)))
    assert_same(trainer.compute_loss(trainer.model, trainer.collate([example])).item(), expected)


def test_tied_rankings_count_where_ties_do(settings, tmp_path):
    """A prompt whose two responses are tied is left out under "drop"; under "half" it pulls their scores together."""
    rows = [{"prompt": f"{a} b", "completions": [f"{a} good", "c d"], "ranks": [0, 0]} for a in "efghijkl"]
    rows += tiny_reward.rankings(2)
    path = write_jsonl(tmp_path / "tied.jsonl", rows)
    gaps = {}
    for ties in ("drop", "half"):
        args = settings(dataset_name=path, ties=ties, output_dir=str(tmp_path / ties), num_train_epochs=10,
                        eval_fraction=0.0, per_device_train_batch_size=2)  # fmt: skip
        run = train_reward(args)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in lines if "loss" in row]
        assert len(steps) == {"drop": 10, "half": 50}[ties]
        known = [row["accuracy"] for row in steps if row["accuracy"] is not None]  # null where all pairs are tied
        assert known and all(0 <= value <= 1 for value in known)
        model, tokenizer = models.load_reward_model(run), models.load_tokenizer(run)
        for row in rows[:8]:
            prompt = data.encode_prompt(tokenizer, row["prompt"])
            pair = [prompt + data.encode_completion(tokenizer, text) for text in row["completions"]]
            first, second = (models.token_scores(model, torch.tensor([ids]))[0, -1].item() for ids in pair)
            gaps.setdefault(ties, []).append(abs(first - second))
    assert max(gaps["half"]) < 0.5 * min(gaps["drop"])


def test_shuffled_pairs_meet_each_response_k_minus_1_times(settings, tmp_path):
    """The paper's control: in one epoch of single pairs a response of a ranking of K takes part in K - 1 updates."""
    path = write_jsonl(tmp_path / "three.jsonl", tiny_reward.rankings(3))
    whole = make_trainer(settings(dataset_name=path))
    alone = make_trainer(
        settings(dataset_name=path, per_device_train_batch_size=1, eval_strategy="no", save_strategy="no")
    )
    alone.train_dataset = whole.train_dataset.pairs()
    assert len(alone.train_dataset) == sum(math.comb(len(ex["responses"]), 2) for ex in whole.train_dataset)
    updates, collate = Counter(), alone.data_collator

    def counted(examples):
        updates.update((*example["prompt"], -1, *ids) for example in examples for ids in example["responses"])
        return collate(examples)

    alone.data_collator = counted
    alone.train()
    assert alone.state.global_step == len(alone.train_dataset)
    expected = Counter()
    for example in whole.train_dataset:
        for ids in example["responses"]:
            expected[(*example["prompt"], -1, *ids)] += len(example["responses"]) - 1
    assert updates == expected and set(expected.values()) >= {1, 3, 8}


def test_shuffled_pairs_have_the_loss_of_their_rankings(settings, tmp_path):
    """At one parameter vector: the mean over all pairs is the mean of the prompts' losses, weighed by C(K, 2)."""
    args = settings(dataset_name=write_jsonl(tmp_path / "plain.jsonl", tiny_reward.rankings(6)), dtype="float64")
    trainer = make_trainer(args)
    pairs = trainer.train_dataset.pairs()
    losses = [trainer.compute_loss(trainer.model, trainer.collate([ex])).item() for ex in trainer.train_dataset]
    counts = [math.comb(len(ex["responses"]), 2) for ex in trainer.train_dataset]
    assert sorted(set(counts)) == [1, 6, 36]
    expected = sum(count * loss for count, loss in zip(counts, losses)) / sum(counts)
    shuffled = trainer.compute_loss(trainer.model, trainer.collate(pairs)).item()
    assert_same(shuffled, expected)
    nine = [ex for ex in trainer.train_dataset if len(ex["responses"]) == 9]
    losses = [
        trainer.compute_loss(trainer.model, trainer.collate(part)).item() for part in (nine, Examples.of(nine).pairs())
    ]
    assert_same(losses[0], losses[1])


def noisy_rankings(count, seed):
    """K = 9 responses of random words, ranked by how often they say good rather than bad, under much noise."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        texts = [" ".join(generator.choices(WORDS, k=6)) for _ in range(9)]
        counts = [text.split().count("good") - text.split().count("bad") for text in texts]
        scores = [count + generator.gauss(0, 4) for count in counts]
        rows.append({"prompt": " ".join(generator.choices(WORDS, k=3)), "completions": texts, "scores": scores})
    return rows


def one_epoch(folder, comparisons, seed):
    """(held-out loss, mean training loss of the last quarter) of 48 steps of 72 comparisons each: 96 prompts, once."""
    held_out = write_jsonl(folder / "held_out.jsonl", noisy_rankings(60, seed + 100))
    policy = model_folder(folder / "wide", seed=seed, hidden_size=128, intermediate_size=256)
    make = config_maker(folder, noisy_rankings(96, seed), model_name_or_path=policy, eval_dataset_name=held_out)
    options = {"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 5, "seed": seed}
    options |= {"packing": "false", "per_device_eval_batch_size": 60, "eval_strategy": "no", "save_strategy": "no"}
    options |= {"per_device_train_batch_size": {"prompt": 2, "shuffled": 72}[comparisons]}
    run = train_reward(make(comparisons=comparisons, **options))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in lines if "loss" in row]
    assert len(losses) == 48
    return json.loads((run / "run.json").read_text())["summary"]["eval/loss"], sum(losses[-12:]) / 12


@pytest.mark.slow
def test_shuffled_pairs_overfit_in_one_epoch(tmp_path):
    """Shuffled pairs end with the worse held-out loss, in the mean over three seeds, and know what they trained on.

    Whole rankings are new at every step: the training loss of the last quarter is the held-out loss but for noise. Of
    shuffled pairs nearly all responses were seen before, so it lies far below.
    """
    found = {"prompt": [], "shuffled": []}
    for seed in (0, 1, 2):
        for comparisons, losses in found.items():
            (tmp_path / f"{comparisons}-{seed}").mkdir()
            losses.append(one_epoch(tmp_path / f"{comparisons}-{seed}", comparisons, seed))
    whole, shuffled = (torch.tensor(losses) for losses in found.values())
    assert shuffled[:, 0].mean() > whole[:, 0].mean()
    assert ((whole[:, 0] - whole[:, 1]) < 0.05).all() and ((shuffled[:, 0] - shuffled[:, 1]) > 0.05).all()


def test_the_papers_schedule(tmp_path):
    """Preset `instructgpt`: one epoch, cosine from 9e-6 to a tenth of it, 64 prompts a batch, ties dropped."""
    path, policy = write_jsonl(tmp_path / "rows.jsonl", tiny_reward.rankings(128)), model_folder(tmp_path / "policy")
    flags = {"model_name_or_path": policy, "dataset_name": path, "output_dir": tmp_path / "run", "eval_fraction": 0,
             "logging_steps": 1, "use_cpu": "true", "disable_tqdm": "true"}  # fmt: skip
    flags = [f"--{name}={value}" for name, value in flags.items()]
    whole = cli.parse_stage("reward", reward.RewardConfig, ["--preset=instructgpt", *flags])
    assert (whole.per_device_train_batch_size, whole.num_train_epochs, whole.ties) == (64, 1, "drop")
    assert whole.comparisons == "prompt" and whole.loss_type == "bradley_terry"
    args = cli.parse_stage("reward", reward.RewardConfig, ["--preset=instructgpt", *flags, "--max_steps=10"])
    run = train_reward(args)
    rates = [json.loads(line).get("lr") for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [rate for rate in rates if rate is not None]
    expected = [9e-6 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2) for step in range(10)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_scores_that_are_not_finite_stop_the_run(settings):
    with pytest.raises(FloatingPointError, match=r"step \d+: scores are not finite; lower --learning_rate"):
        train_reward(settings(learning_rate=1e30, max_grad_norm=0.0, eval_fraction=0.3))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def calibrated(request, tmp_path_factory):
    """(folder, run, demonstrations): a reward model trained for three steps on a family, calibrated on those rows."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = [{"prompt": f"a {word}", "completion": f"{word} good"} for word in "bcdefgh"]
    policy = model_folder(folder / request.param, family=request.param)
    path = write_jsonl(folder / "demonstrations.jsonl", rows)
    make = config_maker(folder, tiny_reward.rankings(12), model_name_or_path=policy, demonstrations=path)
    return folder, train_reward(make(max_steps=3, eval_fraction=0.0, output_dir=str(folder / "rm"))), rows


def demonstration_rollouts(run, rows):
    """The demonstrations as if a policy had sampled them."""
    tokenizer = models.load_tokenizer(run)
    prompts = [data.encode_prompt(tokenizer, row["prompt"]) for row in rows]
    responses = [data.encode_completion(tokenizer, row["completion"]) for row in rows]
    return Rollouts(prompts, responses, [True] * len(rows))


def ppo_trainer(folder, run, out):
    policy = json.loads((run / "run.json").read_text())["config"]["model_name_or_path"]
    path = write_jsonl(folder / "prompts.jsonl", [{"prompt": "a b"}, {"prompt": "c d"}])
    options = {"response_length": 4, "rollout_batch_size": 2, "per_device_train_batch_size": 2, "max_steps": 1}
    options |= {"disable_tqdm": True, "save_steps": 0, "output_dir": str(folder / out)}
    return PPOTrainer(PPOConfig(sft_model_path=policy, reward_model_path=str(run), dataset_name=path, **options))


def test_trap_06_every_score_is_calibrated_once(calibrated, tmp_path):
    """Demonstrations score 0 in PPO and in evaluation; and with 1 more to subtract, every score is lower by exactly 1.

    Read through PPO, the scores of evaluation, the table of policies, and best-of-n.
    """
    _, run, rows = calibrated
    rollouts = demonstration_rollouts(run, rows)
    policy = json.loads((run / "run.json").read_text())["config"]["model_name_or_path"]
    moved = tmp_path / "moved"
    model = models.load_reward_model(run)
    model.config.reward_bias += 1.0
    models.save_model(model, models.load_tokenizer(run), moved)
    found = []
    for place, path in enumerate((run, moved)):
        ppo = ppo_trainer(tmp_path, run, f"ppo-{place}")
        ppo.reward_model = models.load_reward_model(path).eval()
        in_ppo = ppo.score([{}] * len(rows), rollouts)
        scored = torch.tensor(evaluate.reward_scores(models.load_reward_model(path), rollouts))
        torch.testing.assert_close(in_ppo, scored, rtol=1e-6, atol=1e-6)
        table = evaluate.evaluate_policies({"SFT": policy}, ["a b", "c"], reward_model=path, response_length=6)
        best, _ = evaluate.best_of_n(policy, path, ["a b", "c"], n_values=(2,), response_length=6)
        found.append((in_ppo.mean().item(), scored.mean().item(), table["policies"][0]["reward"], best[0]["reward"]))
    assert abs(found[0][0]) < 1e-5 and abs(found[0][1]) < 1e-5
    for calibrated_score, moved_score in zip(*found):
        assert calibrated_score - moved_score == pytest.approx(1.0, abs=1e-5)


def test_trap_06_calibration_survives_the_plain_class(calibrated, tmp_path):
    """AutoModelForSequenceClassification loads and saves it; logits - config.reward_bias is `sequence_scores`.

    Also where the final norm or the head has a bias that could hold it: the rule is one.
    """
    _, run, rows = calibrated
    rollouts = demonstration_rollouts(run, rows)
    AutoModelForSequenceClassification.from_pretrained(run).save_pretrained(tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    bias = json.loads((run / "run.json").read_text())["summary"]["reward_bias"]
    assert plain.config.reward_bias == bias and abs(bias) > 1e-3
    ours = models.load_reward_model(tmp_path / "plain").eval()
    scores = []
    for prompt, response in zip(rollouts.prompt_ids, rollouts.response_ids):
        ids = torch.tensor([prompt + response])
        mask, last = torch.ones_like(ids), torch.tensor([ids.shape[1] - 1])
        score = models.sequence_scores(ours, ids, mask, last).item()
        assert plain(ids, attention_mask=mask).logits.item() - plain.config.reward_bias == pytest.approx(
            score, abs=1e-6
        )
        assert score == pytest.approx(models.sequence_scores(models.load_reward_model(run), ids, mask, last).item())
        scores.append(score)
    assert abs(sum(scores) / len(scores)) < 1e-5


@pytest.mark.slow
def test_head_starts_with_the_variance_that_scores_of_unit_states_show(tmp_path):
    """N(0, 1/sqrt(d + 1)), by its effect: over heads of 400 seeds, h @ w has the variance |h|^2 / (d + 1)."""
    path = model_folder(tmp_path / "policy", hidden_size=32, intermediate_size=8)
    states = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    states = states / states.norm(dim=1, keepdim=True)
    heads = torch.stack([models.reward_model_from_policy(path, seed).score.weight[0].detach() for seed in range(400)])
    variance = (heads @ states.T).square().mean().item()
    assert variance == pytest.approx(
        1 / 33, rel=0.1
    )  # 1/33^2, the paper's text without the root, would be 33 times less
    assert abs(heads.mean().item()) < 4 * (1 / 33) ** 0.5 / heads.numel() ** 0.5


def test_training_goes_through_the_shuffled_option(settings):
    whole, shuffled = (settings(max_steps=1, comparisons=name, eval_fraction=0.0, output_dir=None) for name in
                       ("prompt", "shuffled"))  # fmt: skip
    tokenizer = training.load_stage_tokenizer(whole)
    training.set_max_length(whole, reward.load_start(whole, tokenizer))
    shuffled.max_length = whole.max_length
    rows = data.load_rows(whole.dataset_name, "ranked")
    counts = [len(reward.training_examples(tokenizer, rows, args)) for args in (whole, shuffled)]
    assert counts == [24, 8 * (1 + 6 + 36)]
