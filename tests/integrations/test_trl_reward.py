"""TRL's RewardTrainer on our loss, and on rows of K ranked responses: the formula in float64, and TRL where K = 2."""

import copy
import itertools
import logging
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl", reason="the package trl is not installed: make test-integrations-trl")
import trl
from datasets import Dataset
from transformers import LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from rlhf_kernels.integrations import trl as rk_trl
from tests.tiny import language_model, word_tokenizer

if trl.__version__ not in rk_trl.TESTED:
    pytest.skip(f"trl {trl.__version__} is installed, tested is {', '.join(rk_trl.TESTED)}", allow_module_level=True)

CHAT = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} </s> {% endfor %}{% if tools %}up down{% endif %}"
PROMPTS = ("the dog ", "the cat sat ", "a b ", "was ", "c d e ")
WORDS = ["a", "b", "c", "d", "e", "f", "good", "bad", "up", "down", "ran", "sat"]
PAIRS = [
    {"prompt": p, "chosen": " ".join(WORDS[i : i + 3 + i % 2]), "rejected": " ".join(WORDS[2 * i : 2 * i + 2]) + " x"}
    for i, p in enumerate(PROMPTS)
]
RANKS = ([0, 1], [2, 0, 1, 1], [0, 3, 1, 2, 4, 5, 5, 2, 1], [1, 0, 0], [0, 0, 1, 2, 0, 1])  # K = 2, 4, 9, 3, 6
RANKED = [
    {"prompt": p, "completions": [" ".join(WORDS[j : j + 2 + (i + j) % 3]) for j in range(len(ranks))], "ranks": ranks}
    for i, (p, ranks) in enumerate(zip(PROMPTS, RANKS))
]


def tokenizer():
    return word_tokenizer(chat_template=CHAT)


def reward_model(dtype=torch.float32):
    config = copy.deepcopy(language_model(word_tokenizer()).config)
    config.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.3)
    return model.to(dtype)


def make(kind, rows, folder, model=None, eval_rows=None, compute_metrics=None, streamed=False, **changes):
    options = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "seed": 0,
        "learning_rate": 0.1, "optim": "sgd", "per_device_train_batch_size": 5, "save_strategy": "no",
        "gradient_checkpointing": False, "disable_tqdm": True, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "logging_steps": 1, **changes,
    }  # fmt: skip
    rows = Dataset.from_list(rows)
    sets = {"train_dataset": rows.to_iterable_dataset() if streamed else rows, "compute_metrics": compute_metrics}
    sets |= {"eval_dataset": Dataset.from_list(eval_rows)} if eval_rows else {}
    return kind(model or reward_model(), RewardConfig(**options), processing_class=tokenizer(), **sets)


def step(trainer):
    """(every logged number, weights) after training."""
    trainer.train()
    log = {key: value for row in trainer.state.log_history for key, value in row.items()}
    slow = ("runtime", "per_second", "flos", "mfu")
    return {k: v for k, v in log.items() if not any(x in k for x in slow)}, dict(trainer.model.named_parameters())


def same(ours, theirs, start=None, bound=2e-6):
    (log, weights), (their_log, their_weights) = ours, theirs
    assert log.keys() == their_log.keys()
    for key, value in their_log.items():
        assert log[key] == pytest.approx(value, rel=1e-5, abs=bound), key
    moved = 0.0
    for (key, weight), old in zip(their_weights.items(), reward_model().parameters(), strict=True):
        torch.testing.assert_close(weights[key], weight, rtol=1e-5, atol=bound, msg=lambda m, key=key: f"{key}: {m}")
        moved = max(moved, float((weight - old).abs().max()))
    assert moved > 1e-3, "a step that moves nothing compares nothing"


@pytest.mark.parametrize("centering", (None, 0.3), ids=("plain", "centred"))
@pytest.mark.parametrize("margins", (False, True), ids=("no margin", "margin"))
def test_pairs_of_trl(margins, centering, tmp_path):
    """Loss, every metric of training and evaluation, and every weight after a step, with and without."""
    rows = [row | ({"margin": 0.4 * i - 0.5} if margins else {}) for i, row in enumerate(PAIRS)]
    changes = {"center_rewards_coefficient": centering, "eval_strategy": "steps", "eval_steps": 1}
    changes |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "per_device_eval_batch_size": 2}
    theirs = step(make(RewardTrainer, rows, tmp_path, eval_rows=rows[1:], **changes))
    before = RewardTrainer.compute_loss
    with rk_trl.patched():
        assert RewardTrainer.compute_loss is not before
        ours = step(make(RewardTrainer, rows, tmp_path, eval_rows=rows[1:], **changes))
    assert RewardTrainer.compute_loss is before
    assert {"eval_loss", "eval_accuracy", "margin", "min_reward", "num_tokens"} <= ours[0].keys()
    same(ours, theirs)


def test_pairs_in_half_precision_lose_nothing_after_the_scores(tmp_path):
    trainer = make(RewardTrainer, PAIRS, tmp_path, reward_model(torch.bfloat16), center_rewards_coefficient=0.1)
    errors = []
    for context in (rk_trl.patched, torch.enable_grad):
        with context():
            batch = trainer.data_collator(list(trainer.train_dataset))
            loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        chosen, rejected = outputs.logits.detach().double().flatten().chunk(2)
        wanted = -torch.nn.functional.logsigmoid(chosen - rejected).mean() + 0.1 * ((chosen + rejected) ** 2).mean()
        errors.append(abs(loss.item() - wanted.item()))
    assert errors[0] < 2e-6 < errors[1]


def formula(model, rows, centering=0.0):
    """The loss as it is written, pair by pair, of scores that come one response at a time without padding."""
    total = 0.0
    for row in rows:
        scores = [model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in row["completions_ids"]]
        losses = []
        for i, j in itertools.permutations(range(len(scores)), 2):
            if row["ranks"][i] < row["ranks"][j]:
                gap = scores[i] - scores[j] - row.get("margin", 0.0)
                losses.append(torch.log1p(torch.exp(-gap)) + centering * (scores[i] + scores[j]) ** 2)
        total = total + sum(losses) / len(losses) / len(rows)
    return total


@pytest.mark.parametrize("centering", (None, 0.3), ids=("plain", "centred"))
@pytest.mark.parametrize("margins", (False, True), ids=("no margin", "margin"))
def test_ranked_rows_are_the_formula(margins, centering, tmp_path):
    rows = [row | ({"margin": 0.3 * i - 0.5} if margins else {}) for i, row in enumerate(RANKED)]
    trainer = make(rk_trl.RankedRewardTrainer, rows, tmp_path, center_rewards_coefficient=centering)
    prepared = list(trainer.train_dataset)
    assert [row["ranks"] for row in prepared] == list(RANKS)
    exact = reward_model(torch.float64)
    exact.config.pad_token_id = trainer.model.config.pad_token_id
    wanted = formula(exact, prepared, centering or 0.0)
    wanted.backward()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(prepared))
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for (name, weight), other in zip(trainer.model.named_parameters(), exact.parameters(), strict=True):
        bound = 1e-5 * other.grad.abs().max().item()
        torch.testing.assert_close(
            weight.grad.double(), other.grad, rtol=1e-5, atol=bound, msg=lambda m, name=name: f"{name}: {m}"
        )


def as_ranked(pair):
    """A pair as a ranked row, the rejected response first."""
    more = {key: value for key, value in pair.items() if key not in ("chosen", "rejected")}
    return {**more, "completions": [pair["rejected"], pair["chosen"]], "ranks": [7, 2]}


def chat(pair):
    said = {key: [{"role": "assistant", "content": pair[key]}] for key in ("chosen", "rejected")}
    tools = [{"type": "function", "function": {"name": "f"}}]
    return {"prompt": [{"role": "user", "content": pair["prompt"].strip()}], "tools": tools, **said}


def dialogue(pair):
    row = chat(pair)
    return {key: row["prompt"] + row[key] for key in ("chosen", "rejected")}


@pytest.mark.parametrize("form", (dict, chat, dialogue), ids=("text", "chat", "dialogue"))
def test_two_responses_are_a_pair_of_trl(form, tmp_path):
    """The same ids, loss, metrics and weights, with a margin and centring, over accumulated batches and evaluation."""
    pairs = [form(pair) | {"margin": 0.2 * i} for i, pair in enumerate(PAIRS)][:4]
    changes = {"center_rewards_coefficient": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    changes |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    theirs = make(RewardTrainer, pairs, tmp_path, eval_rows=pairs, **changes)
    ranked = [as_ranked(pair) for pair in pairs]
    ours = make(rk_trl.RankedRewardTrainer, ranked, tmp_path, eval_rows=ranked, **changes)
    for row, pair in zip(ours.train_dataset, theirs.train_dataset, strict=True):
        assert row["completions_ids"] == [pair["rejected_ids"], pair["chosen_ids"]] and row["ranks"] == [1, 0]
    same(step(ours), step(theirs))


def test_a_prompt_weighs_the_same_in_every_micro_batch(tmp_path):
    """Batches of 2, 2 and 1 prompts, of unequal numbers of pairs, make the step of one batch."""
    whole = step(make(rk_trl.RankedRewardTrainer, RANKED, tmp_path))
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    parts = step(make(rk_trl.RankedRewardTrainer, RANKED, tmp_path, **changes))
    for log, _ in (whole, parts):
        for key in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
            del log[key]  # means over batches
    same(parts, whole)


def test_streamed_and_tokenised_rows(tmp_path):
    trainer = make(rk_trl.RankedRewardTrainer, RANKED, tmp_path)
    prepared = list(trainer.train_dataset)
    whole = step(trainer)
    same(step(make(rk_trl.RankedRewardTrainer, RANKED, tmp_path, streamed=True)), whole)
    same(step(make(rk_trl.RankedRewardTrainer, prepared, tmp_path)), whole)


def test_evaluation_is_a_mean_over_prompts(tmp_path):
    changes = {"per_device_eval_batch_size": 2}
    trainer = make(rk_trl.RankedRewardTrainer, RANKED, tmp_path, eval_rows=RANKED, **changes)
    found = trainer.evaluate()
    exact = reward_model(torch.float64)
    exact.config.pad_token_id = trainer.model.config.pad_token_id
    with torch.no_grad():
        wanted = formula(exact, list(trainer.eval_dataset)).item()
    assert found["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    again = trainer.evaluate(Dataset.from_list(RANKED))
    assert again["eval_accuracy"] == found["eval_accuracy"] and 0.0 < found["eval_accuracy"] < 1.0


def test_scores_and_metrics_of_a_batch(tmp_path):
    trainer = make(rk_trl.RankedRewardTrainer, RANKED, tmp_path, per_device_eval_batch_size=2)
    prepared = list(trainer.train_dataset)
    scores = [[trainer.model(torch.tensor([x])).logits.item() for x in row["completions_ids"]] for row in prepared]
    for row, found in zip(scores, trainer.predict(trainer.train_dataset).predictions, strict=True):
        assert found.tolist() == pytest.approx(row + [-100.0] * (9 - len(row)), rel=1e-5)
    raw = trainer.predict(Dataset.from_list(RANKED)).predictions
    assert raw.tolist() == trainer.predict(trainer.train_dataset).predictions.tolist()
    log, _ = step(trainer)
    gaps = [
        s[i] - s[j]
        for s, row in zip(scores, prepared)
        for i, j in itertools.permutations(range(len(s)), 2)
        if row["ranks"][i] < row["ranks"][j]
    ]
    flat = [score for group in scores for score in group]
    wanted = {
        "accuracy": sum(gap > 0 for gap in gaps) / len(gaps), "margin": sum(gaps) / len(gaps),
        "min_reward": min(flat), "max_reward": max(flat), "mean_reward": sum(flat) / len(flat),
        "num_tokens": sum(len(ids) for row in prepared for ids in row["completions_ids"]),
    }  # fmt: skip
    for key, value in wanted.items():
        assert log[key] == pytest.approx(value, rel=1e-5), key


def test_what_is_too_long_leaves_its_row(tmp_path, caplog):
    rows = [
        {"prompt": "a ", "completions": ["b", "b c d e f", "c", "d"], "scores": [1.0, 2.5, -1.0, 1.0]},
        {"prompt": "a ", "completions": ["b", "b c d e f"], "scores": [1.0, 2.0]},
        {"prompt": "a ", "completions": ["b", "c", "d c b a a"], "scores": [1.0, 1.0, 0.0]},
    ]
    with caplog.at_level(logging.WARNING):
        trainer = make(rk_trl.RankedRewardTrainer, rows, tmp_path, max_length=4)
    (row,) = trainer.train_dataset
    assert row["ranks"] == [1, 2, 1] and [len(ids) for ids in row["completions_ids"]] == [3, 3, 3]
    assert "left out 3 of 9 responses of over 4 tokens" in caplog.text
    assert "left out 2 of 3 rows" in caplog.text


BAD = {
    "the train dataset has the columns chosen, rejected, expected `completions` with `ranks` or": {
        "chosen": "a",
        "rejected": "b",
    },
    "row 1 of the train dataset: `ranks` must be a list as long": {"ranks": [0]},
    "row 1 of the train dataset: `ranks` must hold finite": {"ranks": [0.0, float("nan")]},
    "row 1 of the train dataset: `completions` must be a list of at least two": {"completions": ["a"], "ranks": [0]},
    "row 1 of the train dataset: either `ranks` or `scores` must be given, got neither": {"ranks": None},
    "row 1 .*: either `ranks` or `scores` must be given, got ranks and scores": {"scores": [1.0, 0.0]},
    r"row 1 .*: `completions\[0\]` must be a string or a list of messages, got None": {"completions": [None, "a"]},
    "row 1 of the train dataset: `margin` must be a finite number, got inf": {"margin": float("inf")},
    "row 1 of the train dataset: `weight` is not taken here": {"weight": 2.0},
    "row 1 of the train dataset: `margins` is not taken here": {"margins": [[0.0, 1.0], [1.0, 0.0]]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows(message, tmp_path):
    good = {"prompt": "a ", "completions": ["b", "c"], "ranks": [0.0, 1.0]}
    bad = BAD[message]  # a set has the columns of its first row
    rows = [bad] if "chosen" in bad else [dict.fromkeys(bad) | good, good | bad]
    with pytest.raises(ValueError, match=message):
        make(rk_trl.RankedRewardTrainer, rows, tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    (
        ([{"prompt": 3, "completions": ["b", "c"], "ranks": [0, 1]}], "`prompt` must be a string or a list"),
        ([{"prompt": ["a"], "completions": ["b", "c"], "ranks": [0, 1]}], "`prompt` must be a string or a list"),
        ([{"prompt": "a ", "completions": ["b", "c"], "ranks": [True, False]}], "`ranks` must hold finite numbers"),
        ([{"prompt": "a ", "completions": ["b", "c"], "ranks": [1, 1]}], "no row left of 1: none has two responses"),
    ),
    ids=("number", "strings", "bools", "ties"),
)
def test_rows_alike(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(rk_trl.RankedRewardTrainer, rows, tmp_path)


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="compute_metrics must be None"):
        make(rk_trl.RankedRewardTrainer, RANKED, tmp_path, compute_metrics=len)
    with pytest.raises(AttributeError, match="no attribute 'RankedTrainer'"):
        rk_trl.RankedTrainer  # noqa: B018
    monkeypatch.setattr(RewardTrainer, "compute_loss", lambda self, model, inputs: None)
    with pytest.raises(RuntimeError, match="compute_loss takes self, model, inputs, expected self, model"):
        rk_trl.enable()
    assert not rk_trl._patches.enabled


def test_importing_the_module_does_not_import_trl():
    script = "import sys; from rlhf_kernels.integrations import trl; assert 'trl' not in sys.modules; "
    script += "assert trl.RankedRewardTrainer.__mro__[1] is sys.modules['trl'].RewardTrainer"
    subprocess.run([sys.executable, "-c", script], check=True)
