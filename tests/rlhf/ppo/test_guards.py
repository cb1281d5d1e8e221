"""Guards of a PPO run: each fires on a series made for it and not on a healthy one; NaN stops and leaves its batch."""

import dataclasses
import json
import logging
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from rlhf import models
from rlhf.ppo import PPOConfig, PPOTrainer, guards, train_ppo
from rlhf.ppo.guards import HealthGuards
from rlhf.reports import health, runs
from rlhf.rollouts.sampling import RolloutError
from tests.tiny_ppo import EOS, PAD, WORDS, equal, weights


def healthy(step):
    """An iteration of a run that learns: the KL climbs, the entropy falls a little, the values get better."""
    return {
        "objective/kl": 0.4 * step, "completions/mean_length": 20.0, "policy/entropy_avg": 2.5 - 0.05 * step,
        "val/explained_variance": -1.5 + 0.2 * step, "loss/value_avg": 3.0 / step, "policy/clipfrac_avg": 0.2,
        "val/ratio": 1.02, "loss/policy_avg": -0.01,
    }  # fmt: skip


SICK = {  # guard: (what differs from iteration 6 on, what the message says)
    "kl_runaway": ({"objective/kl": 30.0}, r"the KL is 1.5 nats a token \(above 1\)"),
    "entropy_collapse": ({"policy/entropy_avg": 0.5}, r"0.5 nats a token, 2.35 at the start \(below 0.25 of it\)"),
    "value_blowup": ({"val/explained_variance": -3.0}, r"the values explain -3 of the returns' variance \(below -2"),
    "value_blowup by loss": ({"loss/value_avg": 500.0}, r"the value loss is 500, 1.37 at the start"),
    "ratio_blowup": ({"policy/clipfrac_avg": 0.6}, r"the ratio of 60% of the tokens is clipped \(above 50%\)"),
    "ratio_blowup by mean": ({"val/ratio": 1.7}, r"the mean ratio is 1.7 \(1 is unchanged\)"),
}


def run(series, **options):
    watch = HealthGuards(PPOConfig(reward_model_path="x", dataset_name="x", **options))
    return watch, [watch.check(step, metrics) for step, metrics in enumerate(series, 1)]


def test_a_healthy_run_is_let_be(caplog):
    watch, holding = run([healthy(step) for step in range(1, 40)][:12])
    assert watch.found == [] and not any(holding) and not caplog.records


@pytest.mark.parametrize("sickness", SICK)
def test_a_guard_fires_after_its_patience_and_tells_it_once(sickness, caplog):
    change, message = SICK[sickness]
    name = sickness.partition(" ")[0]
    series = [healthy(step) | (change if step >= 6 else {}) for step in range(1, 13)]
    with caplog.at_level(logging.WARNING, "rlhf"):
        watch, holding = run(series, health_patience=3)
    assert holding == [[]] * 7 + [[name]] * 5
    assert [(entry["step"], entry["guard"]) for entry in watch.found] == [(8, name)]
    assert len(caplog.records) == 1
    assert re.search(message, watch.found[0]["message"])
    assert watch.reason_to_stop([name]) is None
    watch.args = dataclasses.replace(watch.args, on_health="stop")
    assert watch.reason_to_stop([name]).startswith(f"on_health: {name}: the ")
    assert watch.reason_to_stop([]) is None


def test_single_bad_iterations_and_ignore_say_nothing():
    series = [healthy(step) | (SICK["kl_runaway"][0] if step % 3 else {}) for step in range(1, 13)]
    assert run(series)[0].found == []
    assert [entry["step"] for entry in run(series, health_patience=2)[0].found] == [2]
    assert run(series, health_patience=1, on_health="ignore")[0].found == []


def test_metrics_that_are_not_there_or_mean_nothing():
    """An iteration that max_kl ended has no update; rewards that do not vary have no explained variance."""
    few = {"objective/kl": 1.0, "completions/mean_length": 8.0}
    for value in (math.nan, -math.inf):
        assert run([few, few | {"val/explained_variance": value}], health_patience=1)[0].found == []


def test_the_state_goes_on():
    series = [healthy(step) | (SICK["entropy_collapse"][0] if step >= 6 else {}) for step in range(1, 13)]
    whole, holding = run(series)
    for cut in (3, 7, 9):
        first, _ = run(series[:cut])
        second = HealthGuards(first.args)
        second.load(json.loads(json.dumps(first.state())))
        assert [second.check(step, series[step - 1]) for step in range(cut + 1, 13)] == holding[cut:]
        assert second.state() == whole.state()


TIGHT = {"health_clip_fraction": -1.0, "health_patience": 2, "max_steps": 6}


def test_a_warning_is_in_the_log_the_metrics_the_summary_and_the_report(home, caplog):
    with caplog.at_level(logging.WARNING, "rlhf"):
        train_ppo(home.config(save_steps=1, **TIGHT))
    told = [record.message[:25] for record in caplog.records if record.name == "rlhf"]
    assert told == ["iteration 2: ratio_blowup"]
    assert [row.get("health") for row in home.rows()] == [None] + [["ratio_blowup"]] * 5
    told = json.loads((home.path / "run" / "run.json").read_text())["health"]
    assert len(told) == 1 and told[0]["step"] == 2 and "tokens is clipped" in told[0]["message"]
    check = health.warnings_told(runs.read_report(home.path / "run"))
    assert (check.number, check.verdict) == ("ratio blowup at iteration 2", "watch")
    plain = train_ppo(home.config("plain", **TIGHT | {"on_health": "ignore"}))
    assert equal(weights(models.load_policy(plain)), weights(models.load_policy(home.path / "run")))
    check = health.warnings_told(runs.read_report(plain))
    assert (check.number, check.verdict) == ("none", "good")


def test_stop_ends_the_run_and_saves_it(home):
    train_ppo(home.config(on_health="stop", save_steps=50, **TIGHT))
    assert len(home.rows()) == 2
    summary = json.loads((home.path / "run" / "run.json").read_text())["summary"]
    assert summary["iterations"] == 2 and summary["stopped"].startswith("on_health: ratio_blowup: the ratio of")
    models.load_policy(home.path / "run" / "checkpoint-2")


def test_a_stopped_run_goes_on_where_it_shall_only_be_warned(home):
    train_ppo(home.config("warned", **TIGHT))
    train_ppo(home.config(on_health="stop", save_steps=50, **TIGHT))
    train_ppo(home.config(on_health="stop", resume_from_checkpoint="true", **TIGHT))
    assert len(home.rows()) == 2
    train_ppo(home.config(resume_from_checkpoint="true", **TIGHT))
    assert len(home.rows()) == len(home.rows("warned")) == 6
    assert equal(*(weights(models.load_policy(home.path / out)) for out in ("run", "warned")))


def test_warnings_resume(home):
    train_ppo(home.config("whole", save_steps=1, **TIGHT))
    train_ppo(home.config("halves", save_steps=1, **TIGHT | {"max_steps": 1}))
    train_ppo(home.config("halves", save_steps=1, resume_from_checkpoint="true", **TIGHT))
    whole, halves = (json.loads((home.path / out / "run.json").read_text())["health"] for out in ("whole", "halves"))
    assert whole == halves and [row.get("health") for row in home.rows("halves")][:3] == [None] + [["ratio_blowup"]] * 2


def poison_weight(trainer):
    with torch.no_grad():
        trainer.value.score.weight[0, 3] = torch.nan


def poison_reward(trainer):
    score = trainer.score

    def poisoned(rows, rollouts, averages):
        scores = score(rows, rollouts, averages)
        scores[2] = torch.inf
        return scores

    trainer.score = poisoned


def poison_logits(trainer):
    """A logit of the policy becomes NaN from the first optimizer step's forward on, where sampling is over."""
    head, update = trainer.policy.lm_head, trainer.update

    def updated(*args):
        with torch.no_grad():
            head.weight[3, 0] = torch.nan
        update(*args)

    trainer.update = updated


POISONS = {
    "weight": (poison_weight, ["values", "advantages", "returns"]),
    "reward": (poison_reward, ["scores", "advantages", "returns"]),
    "logit": (poison_logits, ["grad_norm/policy"]),
}


@pytest.mark.parametrize("place", POISONS)
def test_nan_stops_the_run_saves_the_batch_and_spares_the_checkpoint(home, place):
    poison, bad = POISONS[place]
    trainer = home.trainer(save_steps=1, max_steps=4)
    original = trainer.next_prompts
    trainer.next_prompts = lambda: (trainer.step == 1 and poison(trainer)) or original()
    folder = home.path / "run" / "bad_batch-2"
    with pytest.raises(FloatingPointError, match=r"iteration 2: .* became NaN or infinite; the batch is in .*batch-2"):
        trainer.train()
    assert {path.name for path in folder.iterdir()} == {"batch.json", "batch.safetensors"}
    what, tensors = json.loads((folder / "batch.json").read_text()), load_file(folder / "batch.safetensors")
    assert what["iteration"] == 2 and what["bad"] == bad and len(what["responses"]) == 8
    wanted = {"mask", "log_probs", "ref_log_probs", "values", "entropy", "advantages", "returns"}
    assert wanted <= tensors.keys() and tensors["mask"].shape == (8, 8)
    for row, mask in zip(what["responses"], tensors["mask"], strict=True):
        assert len(row["response_ids"]) == mask.sum() and row["prompt_ids"]
        known = [WORDS[token] for token in row["response_ids"] if token not in (PAD, 1, EOS)]
        assert row["completion"].split() == known
    if place == "reward":
        assert (~tensors["scores"].isfinite()).tolist() == [row == 2 for row in range(8)]
    if place == "logit":
        assert len(what["optimizer_step_rows"]) == 4 and what["numbers"]["grad_norm/policy"] == "nan"
        assert "nan" in what["metrics"].values()
    assert [path.name for path in (home.path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert all(x.isfinite().all() for x in models.load_policy(home.path / "run" / "checkpoint-1").parameters())
    train_ppo(home.config(save_steps=1, max_steps=2, resume_from_checkpoint="true"))
    train_ppo(home.config("whole", save_steps=1, max_steps=2))
    again, whole = (weights(models.load_policy(home.path / out)) for out in ("run", "whole"))
    assert equal(again, whole)


@pytest.mark.parametrize("network", ["policy", "value"])
def test_no_checkpoint_is_made_of_weights_that_are_not_finite(home, network):
    def poison(trainer, step, metrics):
        with torch.no_grad():
            next(getattr(trainer, network).parameters()).view(-1)[5] = torch.inf

    with pytest.raises(FloatingPointError, match=f"iteration 1: weights of the {network} are NaN or infinite"):
        home.trainer(save_steps=1, callbacks=[poison]).train()
    with pytest.raises(FloatingPointError, match=f"iteration 2: weights of the {network} are"):
        home.trainer("end", callbacks=[lambda *args: args[1] == 2 and poison(*args)]).train()
    for out in ("run", "end"):
        assert not list((home.path / out).glob("checkpoint-*")) + list((home.path / out).glob("model.safetensors"))


def test_no_step_is_made_from_a_gradient_that_is_not_finite(home):
    trainer = home.trainer()
    before = weights(trainer.model)
    next(iter(trainer.policy.parameters())).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match="iteration 1: grad_norm/policy became NaN or infinite"):
        trainer.iteration()
    assert equal(before, weights(trainer.model))


def test_a_policy_that_cannot_be_sampled_leaves_its_prompts(home):
    trainer = home.trainer()
    with torch.no_grad():
        trainer.policy.lm_head.weight[3] = torch.nan
    with pytest.raises(RolloutError, match="diverged") as caught:
        trainer.train()
    what = json.loads((home.path / "run" / "bad_batch-1" / "batch.json").read_text())
    assert "diverged" in what["bad"][0] and len(what["responses"]) == 8 and what["responses"][0]["prompt_ids"]
    assert "its prompts are in" in str(caught.value)


@pytest.mark.parametrize("engine", ["builtin", "generate"])
def test_a_policy_that_breaks_behind_its_samples_leaves_them(home, engine):
    trainer = home.trainer(rollout_engine=engine)
    sample = trainer.sample

    def then_poison(rows):
        rollouts = sample(rows)
        with torch.no_grad():
            trainer.policy.lm_head.weight[3] = torch.nan
        return rollouts

    trainer.sample = then_poison
    with pytest.raises(FloatingPointError, match="iteration 1: log_probs, entropy, advantages, returns became NaN"):
        trainer.train()
    assert load_file(home.path / "run" / "bad_batch-1" / "batch.safetensors")["log_probs"].isnan().any()


def test_a_batch_is_whole_or_not_there(home, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(guards, "_write", full)
    trainer = home.trainer()
    poison_weight(trainer)
    with pytest.raises(FloatingPointError, match=r"values.* became NaN .*could not be written .*No space left"):
        trainer.train()
    assert not [path for path in (home.path / "run").iterdir() if "bad_batch" in path.name]


def test_tokens_a_second_of_each_phase(home, monkeypatch):
    trainer = home.trainer(num_ppo_epochs=3, ptx_coef=0.1, ptx_dataset_name=str(home.path / "text.txt"))
    seen, texts = [], []
    for name, notes in (("sample", seen), ("next_texts", texts)):
        original = getattr(PPOTrainer, name)
        monkeypatch.setattr(PPOTrainer, name, lambda self, *a, f=original, n=notes: n.append(f(self, *a)) or n[-1])
    metrics = trainer.iteration()
    sampled = sum(map(len, seen[0].response_ids))
    both = sampled + sum(map(len, seen[0].prompt_ids))
    trained = 3 * both + sum(len(ids) for chosen in texts for ids in chosen)
    for phase, tokens in (("rollout", sampled), ("score", both), ("evaluate", both), ("update", trained)):
        rate = metrics[f"throughput/{phase}_tokens_per_sec"]
        assert rate * metrics[f"time/{phase}"] == pytest.approx(tokens)


def test_returns_that_do_not_vary_have_no_explained_variance(home):
    metrics = {"val/explained_variance": math.nan, "grad_norm/policy": math.inf, "loss/value_avg": 1.0}
    assert home.trainer().must_be_finite(metrics).keys() == {"grad_norm/policy", "loss/value_avg"}
