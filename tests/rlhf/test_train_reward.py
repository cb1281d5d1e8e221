"""The reward stage: every prompt weighs the same, rankings stay whole, demonstrations score 0, killed runs go on."""

import errno
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf import checkpoint, data, models, reward, training
from rlhf.models import sequences
from rlhf.reward import RewardTrainer, train_reward
from tests import processes
from tests.roundings import assert_same
from tests.tiny import model_folder, word_tokenizer, write_jsonl
from tests.tiny_reward import config_maker, gradient, make_trainer, rankings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path):
    """settings(**changes) -> RewardConfig on a tiny policy and small rankings."""
    return config_maker(tmp_path, rankings(24))


@pytest.mark.parametrize("packing", ["true", "false"])
def test_trap_04_prompts_weigh_the_same(settings, packing):
    """Gradient of a batch {K=4, K=9} = mean of the two prompts' gradients, by an independent pairwise loss."""
    trainer = make_trainer(settings(packing=packing, dtype="float64"))
    four, nine = (next(ex for ex in trainer.train_dataset if len(ex["responses"]) == k) for k in (4, 9))
    both = gradient(trainer, trainer.collate([four, nine]), 2)
    alone = [gradient(trainer, trainer.collate([example]), 1) for example in (four, nine)]
    assert_same(both, (alone[0] + alone[1]) / 2)

    trainer.model.zero_grad()
    for example, pairs in ((four, 6), (nine, 36)):
        scores = [
            models.token_scores(trainer.model, torch.tensor([example["prompt"] + response]))[0, -1]
            for response in example["responses"]
        ]
        ranks = example["row"]["ranks"]
        decided = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
        losses = [-logsigmoid(scores[i] - scores[j]) for i, j in decided]
        assert len(losses) == pairs
        (sum(losses) / pairs / 2).backward()
    independent = torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])
    assert_same(both, independent)


def test_trap_04_two_responses_are_bradley_terry_and_order_does_not_matter(settings):
    trainer = make_trainer(settings(dtype="float64"))
    pair = next(ex for ex in trainer.train_dataset if len(ex["responses"]) == 2)
    loss = trainer.compute_loss(trainer.model, trainer.collate([pair]))
    (first, second), ranks = reward.batch_scores(trainer.model, trainer.collate([pair])), pair["row"]["ranks"]
    gap = first - second if ranks[0] < ranks[1] else second - first
    assert_same(loss, -logsigmoid(gap))

    nine = next(ex for ex in trainer.train_dataset if len(ex["responses"]) == 9)
    order = random.Random(1).sample(range(9), 9)
    row = {**nine["row"], "ranks": [nine["row"]["ranks"][i] for i in order]}
    shuffled = {**nine, "responses": [nine["responses"][i] for i in order], "row": row}
    losses = [trainer.compute_loss(trainer.model, trainer.collate([ex])).item() for ex in (nine, shuffled)]
    assert_same(losses[0], losses[1])


def test_centring_pulls_the_scores_to_zero(settings):
    """The coefficient times the mean over pairs of squared sums, of K = 4 and of a pair."""
    trainer = make_trainer(settings(dtype="float64"))
    for responses in (2, 4):
        example = next(ex for ex in trainer.train_dataset if len(ex["responses"]) == responses)
        batch, ranks = trainer.collate([example]), example["row"]["ranks"]
        scores = reward.batch_scores(trainer.model, batch)
        decided = [(i, j) for i in range(responses) for j in range(responses) if ranks[i] < ranks[j]]
        added = 0.01 * sum((scores[i] + scores[j]) ** 2 for i, j in decided) / len(decided)
        losses = []
        for trainer.args.center_rewards_coefficient in (0.01, 0.0):
            losses.append(trainer.compute_loss(trainer.model, batch))
        assert_same(losses[0] - losses[1], added)
    with pytest.raises(
        ValueError, match=r"center_rewards_coefficient: got 0\.01, wants 0 with loss_type plackett_luce"
    ):
        settings(center_rewards_coefficient=0.01, loss_type="plackett_luce")


@pytest.mark.parametrize("loss_type", ["bradley_terry", "plackett_luce"])
def test_trap_10_accumulation_equals_one_batch(settings, tmp_path, loss_type):
    """Two optimizer steps with (batch 8, accumulation 1) and (1, 8), K = 2, 4, 9 mixed: the same weights."""
    weights = []
    for batch, steps in ((8, 1), (1, 8)):
        args = settings(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=2,
            optim="sgd",
            dtype="float64",
            loss_type=loss_type,
            output_dir=str(tmp_path / f"run-{batch}"),
            eval_strategy="no",
            save_strategy="no",
        )
        trainer = make_trainer(args)
        trainer.train()
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]))
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert len(losses) == 2
        weights[-1] = torch.cat([weights[-1], torch.tensor(losses)])
    assert_same(weights[0], weights[1])


@pytest.mark.parametrize("source", ["demonstrations", "best_ranked"])
def test_trap_06_demonstrations_score_zero(settings, tmp_path, source):
    demonstrations = [{"prompt": f"a {word}", "completion": f"{word} good"} for word in "bcdefgh"]
    path = write_jsonl(tmp_path / "demonstrations.jsonl", demonstrations)
    args = settings(max_steps=3, demonstrations=path if source == "demonstrations" else None, eval_fraction=0.0)
    run = train_reward(args)
    if source == "best_ranked":
        rows = data.load_rows(args.dataset_name, "ranked")
        texts = [(row["prompt"], row["completions"][row["ranks"].index(0)]) for row in rows]
    else:
        texts = [(row["prompt"], row["completion"]) for row in demonstrations]
    model, tokenizer = models.load_reward_model(run), models.load_tokenizer(run)
    ids = [data.encode_prompt(tokenizer, prompt) + data.encode_completion(tokenizer, text) for prompt, text in texts]
    scores = torch.stack([models.token_scores(model, torch.tensor([row]))[0, -1] for row in ids])
    assert abs(scores.mean().item()) < 1e-5
    bias = json.loads((run / "run.json").read_text())["summary"]["reward_bias"]
    assert model.config.reward_bias == bias and abs(bias) > 1e-3

    models.save_model(model, tokenizer, tmp_path / "again")  # saved and loaded once more: not applied twice
    again = models.load_reward_model(tmp_path / "again")
    twice = torch.stack([models.token_scores(again, torch.tensor([row]))[0, -1] for row in ids])
    assert torch.equal(twice, scores)
    again.config.reward_bias = 0.0  # differences of pairs do not know of the calibration
    plain = torch.stack([models.token_scores(again, torch.tensor([row]))[0, -1] for row in ids])
    torch.testing.assert_close(plain - plain[0], scores - scores[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain - bias, scores, rtol=1e-6, atol=1e-6)


def test_training_further_from_a_reward_model(settings, tmp_path):
    """A reward model as the start keeps its head, and is calibrated afresh: once, not on top."""
    first = train_reward(settings(max_steps=2))
    second = train_reward(settings(max_steps=1, model_name_or_path=str(first), output_dir=str(tmp_path / "second"),
                                   learning_rate=0.0))  # fmt: skip
    biases = [models.load_reward_model(run).config.reward_bias for run in (first, second)]
    assert biases[0] == pytest.approx(biases[1], abs=1e-6)
    heads = [models.load_reward_model(run).score.weight for run in (first, second)]
    assert torch.equal(*heads)


def test_trap_23_training_ids_are_scoring_ids(settings):
    """What the reward model is trained on, token by token, is what PPO scores for the same sample."""
    from rlhf.models.sequences import join

    args = settings(packing="false")
    trainer = make_trainer(args)
    tokenizer = trainer.tokenizer
    example = next(ex for ex in trainer.train_dataset if len(ex["responses"]) == 4)
    row = example["row"]
    prompt = data.encode_prompt(tokenizer, row["prompt"])
    sampled = [data.encode_completion(tokenizer, text, eos=False) for text in row["completions"]]
    sampled = [[*ids, tokenizer.eos_token_id] for ids in sampled]
    scored = join([prompt] * 4, sampled)
    trained = trainer.collate([example])
    assert torch.equal(trained["attention_mask"], scored.attention_mask.bool())
    assert torch.equal(trained["input_ids"][trained["attention_mask"]], scored.input_ids[scored.attention_mask.bool()])
    assert torch.equal(trained["last_token_rows"], scored.last_rows)
    golden = tokenizer.convert_ids_to_tokens(example["prompt"] + example["responses"][0])
    assert golden == [*row["prompt"].split(), *row["completions"][0].split(), "</s>"]


SUFFIXED = (
    "{% for m in messages %}<|{{ 'bot' if m.role == 'assistant' else 'user' }}|> {{ m.content }} <|end|> <|line|> "
    "{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def test_trap_23_a_chat_is_trained_and_scored_up_to_its_end_of_turn(settings, tmp_path):
    """The template goes on behind the end of turn, as ChatML does with a line break; sampling stops before that."""
    from rlhf.models.sequences import join

    special = ("<|user|>", "<|bot|>", "<|end|>", "<|line|>")
    tokenizer = word_tokenizer(extra=special, chat_template=SUFFIXED)
    policy = model_folder(tmp_path / "chat", tokenizer=tokenizer)
    prompt = [{"role": "user", "content": "the dog"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("ran", "sat down", "ran up and down")]
    rows = [{"prompt": prompt, "completions": answers, "ranks": [0, 1, 2]}]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    trainer = make_trainer(settings(model_name_or_path=policy, dataset_name=path, packing="false"))
    trained = trainer.collate(trainer.train_dataset)
    whole = tokenizer.apply_chat_template([*prompt, *answers[0]], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(whole)[-2:] == ["<|end|>", "<|line|>"]  # the trap
    stop = models.stop_token_ids(tokenizer, trainer.model)
    sampled = [
        [*tokenizer(answer[0]["content"]).input_ids, tokenizer.convert_tokens_to_ids("<|end|>")] for answer in answers
    ]
    assert all(ids[-1] in stop for ids in sampled)
    scored = join([data.encode_prompt(tokenizer, prompt)] * 3, sampled)
    mask = scored.attention_mask.bool()
    assert torch.equal(trained["attention_mask"], mask)
    assert torch.equal(trained["input_ids"][mask], scored.input_ids[mask])
    assert trained["input_ids"].flatten()[trained["last_token_rows"]].tolist() == [ids[-1] for ids in sampled]
    assert trained["input_ids"][0][mask[0]].tolist() == whole[:-1]


def test_training_learns_and_reports(settings, capsys):
    run = train_reward(settings(num_train_epochs=8, eval_fraction=0.25))
    summary = json.loads((run / "run.json").read_text())["summary"]
    assert summary["eval/accuracy"] > 0.9
    assert set(summary["eval/accuracy_by_k"]) == {"2", "4", "9"}
    assert summary["eval/pairs"] == sum(summary["eval/pairs_by_k"].values())
    table = capsys.readouterr().out
    assert "longer wins" in table and "K = 9" in table and f"{summary['eval/accuracy']:.3f}" in table
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in metrics if "loss" in row)
    assert {"step", "time", "loss", "lr", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"} <= set(first)
    assert sum("eval/accuracy" in row for row in metrics) >= 4
    models.load_reward_model(run)


def test_tied_rankings_and_long_completions_are_left_out(settings, caplog):
    tokenizer = word_tokenizer()
    long = " ".join(["dog"] * 70)
    rows = [
        {"prompt": "a", "completions": ["b", "c"], "ranks": [0, 0], "at": "x:1"},
        {"prompt": "a", "completions": ["b", long, "c"], "ranks": [0, 1, 2], "at": "x:2"},
        {"prompt": "a", "completions": ["b", long], "ranks": [0, 1], "at": "x:3"},
        {"prompt": long, "completions": ["b", "c"], "ranks": [0, 1], "at": "x:4"},
    ]
    args = settings(max_length=64)
    kept = training.encode_rows(tokenizer, reward.decided(rows), ("completions",), args, what="training")
    assert [ex["row"]["at"] for ex in kept] == ["x:2", "x:4"]
    assert kept[0]["row"]["ranks"] == [0, 2] and len(kept[0]["responses"]) == 2
    assert len(kept[1]["prompt"]) == 62 and all(ids[-1] == tokenizer.eos_token_id for ids in kept[1]["responses"])
    assert "left out 1 of 4 rankings" in caplog.text
    assert "dropped 1 of 3 training rows" in caplog.text and "cut 1 of 3" in caplog.text
    args.long_prompts = "error"
    with pytest.raises(ValueError, match="x:4: the prompt has 70 tokens, longer than the 62 that fit"):
        training.encode_rows(tokenizer, rows, ("completions",), args, what="training")


def test_killed_run_goes_on_to_the_same_bits(settings, tmp_path):
    """Stopped after the checkpoint of step 4 of 8 and resumed: weights and logged losses as without the stop."""
    options = {"max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 4}
    whole = train_reward(settings(output_dir=str(tmp_path / "whole"), **options))
    stopped = tmp_path / "stopped"
    shutil.copytree(whole / "checkpoint-4", stopped / "checkpoint-4")
    shutil.copy(whole / "metrics.jsonl", stopped)  # lines behind step 4 are dropped on resume
    (stopped / ".checkpoint-8.tmp-1").mkdir()  # left over from the kill
    with pytest.raises(ValueError, match="already holds a run"):
        train_reward(settings(output_dir=str(stopped), **options))
    train_reward(settings(output_dir=str(stopped), resume_from_checkpoint="true", **options))
    assert not (stopped / ".checkpoint-8.tmp-1").exists()
    ours, theirs = models.load_reward_model(whole), models.load_reward_model(stopped)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    lines = [map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) for run in (whole, stopped)]
    logs = [[(row["step"], row["loss"], row["accuracy"]) for row in rows if "loss" in row] for rows in lines]
    assert logs[0] == logs[1] and [step for step, *_ in logs[0]] == list(range(1, 9))


@pytest.mark.parametrize("failing", ["save_model", "_save_rng_state"])
def test_full_disk_leaves_no_checkpoint(settings, tmp_path, monkeypatch, failing):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RewardTrainer, failing, full)
    with pytest.raises(OSError, match="No space left"):
        train_reward(settings(max_steps=2, save_steps=1))
    run = tmp_path / "run"
    assert checkpoint.last_checkpoint(run) is None
    assert not [path for path in run.iterdir() if path.is_dir()]
    with pytest.raises(ValueError, match="holds no"):
        models.resolve_model_path(run)


def test_old_checkpoints_go(settings):
    run = train_reward(settings(max_steps=5, save_steps=1, save_total_limit=2))
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-4", "checkpoint-5"]


def test_packing_must_be_possible(settings):
    with pytest.raises(ValueError, match=r"packing: .* eager attention does not give the same results"):
        make_trainer(settings(packing="true", attn_implementation="eager"))
    assert not make_trainer(settings(packing="auto", attn_implementation="eager")).can_pack


def test_packing_where_it_saves_arithmetic(settings):
    """Long prompts with many short responses are packed; short prompts with long responses are padded."""
    assert sequences.packing_pays([(256, [64] * 9)], 512)  # 832 tokens in place of 2880
    assert not sequences.packing_pays([(8, [500] * 4)], 64)  # nothing to share, and rows of 2008 tokens
    shared = [{"prompt": [1] * 256, "responses": [[1] * 64] * 9}]
    apart = [{"prompt": [1] * 8, "responses": [[1] * 500] * 4}]
    trainer = make_trainer(settings(packing="auto"))
    assert trainer.can_pack
    row = trainer.train_dataset[0]["row"]
    for example in (shared[0], apart[0]):
        ranks = list(range(len(example["responses"])))
        batch = trainer.collate([{**example, "row": {**row, "ranks": ranks}}])
        assert (batch["attention_mask"].dim() == 4) is (example is shared[0])


TWO_RANKS = """
import sys
from rlhf.reward import RewardConfig, train_reward
args = RewardConfig(model_name_or_path=sys.argv[1], dataset_name=sys.argv[2], output_dir=sys.argv[3], use_cpu=True,
    disable_tqdm=True, learning_rate=1e-2, per_device_train_batch_size=int(sys.argv[4]), max_steps=2, optim="sgd",
    eval_fraction=0.0, save_steps=1, max_grad_norm=0.0, dtype="float64")
assert args.world_size == int(sys.argv[5]), args.world_size
train_reward(args)
"""


@pytest.mark.slow
def test_trap_10_two_processes_equal_one(settings, tmp_path):
    """2 gloo ranks of 4 weighted prompts = 1 process of 8, after two SGD steps; both leave whole checkpoints."""
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    rows = [{**row, "weight": (0.25, 1.0, 3.0, 0.5, 2.0)[index % 5]} for index, row in enumerate(rankings(24))]
    args = settings(dataset_name=write_jsonl(tmp_path / "weighted.jsonl", rows))
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"ranks-{ranks}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [str(script), args.model_name_or_path, args.dataset_name, str(out), str(8 // ranks), str(ranks)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = processes.run(command, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(list(models.load_reward_model(out).parameters()))
        saved = checkpoint.last_checkpoint(out)
        assert saved.name == "checkpoint-2"
        assert len(list(saved.glob("rng_state*"))) == ranks
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 2]
    start = models.reward_model_from_policy(args.model_name_or_path, args.seed)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(found[0], start.parameters(), strict=True))
    for a, b in zip(*found, strict=True):
        assert_same(a, b)


def test_real_rankings(settings, shared_data, tmp_path, capsys):
    """Human rankings on a real model: a few steps, K from 2 to 9, the table at the end."""
    rows = data.load_rows(shared_data / "rankings.jsonl", "ranked")
    rows.sort(key=lambda row: max(map(len, row["completions"])))
    few = [row for k in range(2, 10) for row in [row for row in rows if len(row["ranks"]) == k][:4]]
    path = write_jsonl(tmp_path / "few.jsonl", [{k: v for k, v in row.items() if k != "at"} for row in few])
    model = str(shared_data / "stories260K-hf")
    run = train_reward(
        settings(
            model_name_or_path=model,
            dataset_name=path,
            max_steps=2,
            per_device_train_batch_size=2,
            eval_strategy="no",
            eval_fraction=0.3,
        )
    )
    summary = json.loads((run / "run.json").read_text())["summary"]
    assert summary["eval/pairs"] > 10 and 0 <= summary["eval/accuracy"] <= 1
    assert "longer wins" in capsys.readouterr().out
