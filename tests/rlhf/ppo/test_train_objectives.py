"""PPO with other objectives, without a value network, with the KL in the loss: gradients by autograd on logits."""

import json
import math
import re

import pytest
import torch
from transformers import HfArgumentParser

from rlhf.metrics import Averages
from rlhf.ppo import PPOConfig
from rlhf.ppo.iteration import Experience
from rlhf.ppo.objective import importance_weights, objective_of
from rlhf.reports.report import write_report
from rlhf.rollouts.sampling import RolloutError, Rollouts
from rlhf_kernels import CISPO, DPPO, GSPO, Clip, ClipCov
from tests.tiny_ppo import ROOT, bananas, equal, experience_of, perturb, weights

GROUPS = ("grpo", "dr_grpo", "rloo", "reinforce++-baseline")
ALL = {"num_responses": 4, "dtype": "float64", "kl_coef": 0.3}


def advantages_by_hand(kind, rewards, scores, mask):
    """[B, T] from rewards that hold KL and score, groups of four, in plain Python."""
    rows, found = [[x for x, keep in zip(*pair) if keep] for pair in zip(rewards.tolist(), mask.tolist())], []
    for row in range(len(rows)):
        group = range(row // 4 * 4, row // 4 * 4 + 4)
        totals = [sum(rows[i]) for i in group]
        mean, own = sum(totals) / 4, sum(rows[row])
        if kind == "grpo":
            found.append([(own - mean) / ((sum((x - mean) ** 2 for x in totals) / 3) ** 0.5 + 1e-6)] * len(rows[row]))
        elif kind == "dr_grpo":
            found.append([own - mean] * len(rows[row]))
        elif kind == "rloo":
            found.append([own - (sum(totals) - own) / 3] * len(rows[row]))
        else:
            less = sum(scores[i].item() for i in group) / 4 if kind.endswith("baseline") else 0.0
            found.append([sum(rows[row][t:]) - less for t in range(len(rows[row]))])
    if kind.startswith("reinforce++"):
        flat = [x for row in found for x in row]
        mean = sum(flat) / len(flat)
        std = (sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)) ** 0.5
        found = [[(x - mean) / std for x in row] for row in found]
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for row, values in enumerate(found):
        out[row, mask[row]] = torch.tensor(values, dtype=torch.float64)
    return out


def log_probs_of(trainer, experience):
    """[B, T] of the responses by transformers' own logits, a row at a time, differentiable."""
    rollouts = experience.rollouts
    rows = []
    for prompt, response in zip(rollouts.prompt_ids, rollouts.response_ids):
        logits = trainer.policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        found = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
        rows.append(torch.nn.functional.pad(found, (0, experience.mask.shape[1] - len(response))))
    return torch.stack(rows)


def gradient(trainer, experience, chosen=range(8)):
    trainer.optimizer.zero_grad()
    averages = Averages()
    trainer.accumulate_gradients(experience, list(chosen), [], averages)
    return {name: w.grad.clone() for name, w in trainer.policy.named_parameters()}, averages.read(trainer._sum)


@pytest.mark.parametrize("kind", (*GROUPS, "reinforce++"))
def test_advantages_without_a_value_network(home, kind):
    trainer = home.trainer(advantage=kind, **ALL)
    assert trainer.value is None and list(trainer.trained()) == ["policy"]
    perturb(trainer.policy)
    experience, scores = experience_of(trainer)
    mask = experience.mask
    rewards = -0.3 * torch.where(mask, experience.log_probs - experience.ref_log_probs, 0).double()
    rewards[torch.arange(8), mask.sum(-1) - 1] += scores.double()
    wanted = advantages_by_hand(kind, rewards, scores, mask)
    assert experience.values is None and experience.returns is None
    torch.testing.assert_close(experience.advantages.double(), wanted, rtol=1e-4, atol=2e-5)


def test_the_gradient_of_grpo(home):
    """A step of GRPO with its KL in the loss, written out: mean over responses of the mean over tokens."""
    options = {"kl_in": "loss", "kl_estimator": "k3", "kl_gradient": "plain", "loss_agg_mode": "seq-mean-token-mean"}
    trainer = home.trainer(advantage="grpo", **ALL, **options)
    perturb(trainer.policy)
    experience, scores = experience_of(trainer)
    perturb(trainer.policy, 0.1)
    groups = scores.double().view(-1, 4)
    a = ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-6)).view(-1, 1)
    now = log_probs_of(trainer, experience)
    ratio = torch.exp(now - experience.log_probs.double())
    e = now - experience.ref_log_probs.double()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) + 0.3 * (torch.exp(-e) - 1 + e)
    mask = experience.mask
    loss = (torch.where(mask, loss, 0).sum(-1) / mask.sum(-1)).mean()
    wanted = torch.autograd.grad(loss, list(trainer.policy.parameters()))
    found, metrics = gradient(trainer, experience)
    for (name, grad), exact in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-6, msg=name)
    kl = torch.where(mask, torch.exp(-e) - 1 + e, 0).sum(-1) / mask.sum(-1)
    assert metrics["loss/kl_avg"] == pytest.approx(kl.mean().item(), rel=1e-4) and kl.mean() > 0
    assert "loss/value_avg" not in metrics


@pytest.mark.parametrize("name", ("gspo:low=0.01,high=0.02", "cispo:low=0.1,high=0.2", "reinforce", "dro:beta=0.5"))
def test_the_gradient_of_other_objectives(home, name):
    trainer = home.trainer(objective=name, loss_agg_mode="seq-mean-token-mean", dtype="float64", vf_coef=0.0)
    perturb(trainer.policy)
    experience, _ = experience_of(trainer)
    perturb(trainer.policy, 0.1)
    mask, a = experience.mask, experience.advantages.double()
    now, old = log_probs_of(trainer, experience), experience.log_probs.double()
    u, count = torch.where(mask, now - old, 0), mask.sum(-1, keepdim=True)
    if name.startswith("gspo"):
        s = torch.exp((u.sum(-1, keepdim=True) / count).detach() + now - now.detach())
        loss = torch.maximum(-a * s, -a * s.clamp(0.99, 1.02))
    elif name.startswith("cispo"):
        loss = -u.exp().clamp(0.9, 1.2).detach() * a * now
    else:
        loss = -a * now + (0.25 * u.square() if name.startswith("dro") else 0)
    loss = (torch.where(mask, loss, 0).sum(-1) / count.squeeze(-1)).mean()
    wanted = torch.autograd.grad(loss, list(trainer.policy.parameters()))
    found, _ = gradient(trainer, experience)
    for (weight, grad), exact in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-6, msg=weight)


def test_the_kl_in_the_loss_leaves_the_rewards(home):
    """Rewards are the scores alone, and the gradient moves by that of the KL."""
    options = {"dtype": "float64", "whiten_advantages": False, "vf_coef": 0.0, "kl_coef": 0.5}
    found = {}
    for place in ("reward", "loss"):
        trainer = home.trainer(place, kl_in=place, kl_estimator="k2", kl_gradient="plain", **options)
        perturb(trainer.policy)
        averages = Averages()
        experience, _ = experience_of(trainer, averages)
        found[place] = experience, averages.read(trainer._sum), gradient(trainer, experience)[0], trainer
    assert found["loss"][1]["objective/non_score_reward"] == 0 > found["reward"][1]["objective/non_score_reward"]
    experience, _, grad, trainer = found["loss"]
    now = log_probs_of(trainer, experience)
    kl = (now - experience.ref_log_probs.double()).square() / 2
    loss = torch.where(experience.mask, -experience.advantages.double() * (now - now.detach()).exp() + 0.5 * kl, 0)
    wanted = torch.autograd.grad(loss.sum() / experience.mask.sum(), list(trainer.policy.parameters()))
    for exact, (name, x) in zip(wanted, grad.items(), strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_without_a_value_network(home):
    """It saves, reports and resumes to the bit; no value network is made, stepped or written."""
    options = {"advantage": "rloo", "num_responses": 4, "max_steps": 3, "save_steps": 1, "ema_decay": 0.9}
    whole = home.trainer("whole", reward_fn=bananas, **options)
    whole.train()
    assert not (home.path / "whole" / "value").exists()
    assert not (home.path / "whole" / "checkpoint-3" / "value").exists()
    rows = home.rows("whole")
    assert all(not any("value" in name or name == "val/explained_variance" for name in row) for row in rows)
    first = home.trainer("parts", reward_fn=bananas, **{**options, "max_steps": 1})
    first.train()
    second = home.trainer("parts", reward_fn=bananas, resume_from_checkpoint="true", **options)
    second.train()
    assert equal(weights(whole.policy), weights(second.policy))
    page = write_report(home.path / "whole")
    assert page.exists() and "What the value function explains" not in page.read_text()
    summary = json.loads((home.path / "whole" / "run.json").read_text())["summary"]
    assert summary["iterations"] == 3


@pytest.mark.parametrize("kind", ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"))
def test_an_engines_samples_are_weighted(home, kind):
    """The gradient is that of the loss times ratios of the trainer's and the engine's log-probs, held or filtered."""
    options = {"rollout_correction": kind, "rollout_correction_low": 0.8, "rollout_correction_high": 1.2}
    trainer = home.trainer(rollout_engine="generate", vf_coef=0.0, dtype="float64", cliprange=1.0, **options)
    experience, _ = experience_of(trainer)
    mask, generator = experience.mask, torch.Generator().manual_seed(3)
    off = 0.2 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    theirs = experience.log_probs.double() - off
    experience.rollouts.log_probs = [row[keep].tolist() for row, keep in zip(theirs, mask)]
    experience.weights, metrics = importance_weights(trainer.args, experience)
    wanted = torch.where(mask, off, 0).float()
    wanted = (wanted.sum(-1, keepdim=True).expand_as(wanted) if kind.startswith("seq") else wanted).exp()
    held = wanted.clamp(0.8, 1.2)
    wanted = torch.where(wanted == held, wanted, 0) if kind.endswith("mask") else held
    wanted = torch.where(mask, wanted, 0)
    torch.testing.assert_close(experience.weights, wanted, rtol=1e-5, atol=1e-6)
    assert 0 < metrics["rollout/effective_sample_size"] <= 1
    now = log_probs_of(trainer, experience)
    loss = -wanted.double() * experience.advantages.double() * torch.exp(now - now.detach())
    loss = torch.where(mask, loss, 0).sum() / mask.sum()
    found, _ = gradient(trainer, experience)
    for exact, (name, grad) in zip(torch.autograd.grad(loss, list(trainer.policy.parameters())), found.items()):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-6, msg=name)


def test_the_short_names_are_the_truncating_ones(home):
    """A run that was told `token` goes on with `token_truncate`, and says so."""
    options = {"rollout_engine": "generate", "max_steps": 1, "save_steps": 1}
    for short in ("token", "sequence"):
        given, meant = (PPOConfig(rollout_correction=name, **options) for name in (short, f"{short}_truncate"))
        assert given == meant and given.rollout_correction == f"{short}_truncate"
    home.trainer(rollout_correction="token", **options).train()
    config = json.loads((home.path / "run" / "run.json").read_text())["config"]
    assert config["rollout_correction"] == "token_truncate"
    options |= {"max_steps": 2, "resume_from_checkpoint": "true"}
    assert home.trainer(rollout_correction="token_truncate", **options).step == 1
    assert home.trainer(rollout_correction="token", **options).step == 1
    with pytest.raises(ValueError, match=r"^rollout_correction: .* run with 'token_truncate', this run has 'sequence_"):
        home.trainer(rollout_correction="sequence", **options)


@pytest.mark.parametrize("kind", ["none", "token"])
def test_the_effective_sample_size_is_always_told(home, kind):
    """Ratios 4, 1, 1/2 of three tokens: bare (5.5)^2 / (3 * 17.25); held at 2: (3.5)^2 / (3 * 5.25)."""
    mask = torch.tensor([[True, True], [True, False]])
    trained = torch.tensor([[0.4, 0.3], [0.1, 0.0]]).log()
    rollouts = Rollouts([[5], [6]], [[4, 5], [6]], [False, False], [[math.log(0.1), math.log(0.3)], [math.log(0.2)]])
    experience = Experience(rollouts, mask, trained, trained, trained)
    args = home.config(rollout_engine="generate", rollout_correction=kind)
    weights, metrics = importance_weights(args, experience)
    assert (weights is None) == (kind == "none")
    wanted = 5.5**2 / (3 * 17.25) if kind == "none" else 3.5**2 / (3 * 5.25)
    assert float(metrics["rollout/effective_sample_size"]) == pytest.approx(wanted, rel=1e-6)
    if kind == "none":
        assert len(metrics) == 1
        rollouts.log_probs = None
        assert importance_weights(args, experience) == (None, {})
    else:
        assert float(metrics["rollout/truncated_fraction"]) == pytest.approx(1 / 3)


def test_a_corrected_run(home):
    """transformers' generate gives log-probs; the weights reach the metrics and a checkpoint inside an iteration."""
    options = {"rollout_engine": "generate", "rollout_correction": "token_truncate", "max_steps": 2}
    trainer = home.trainer(reward_fn=bananas, save_steps=1, save_updates=1, num_mini_batches=2, **options)
    trainer.train()
    for row in home.rows():
        assert row["rollout/effective_sample_size"] == pytest.approx(1.0, abs=1e-3)
        assert row["rollout/weight_max"] == pytest.approx(1.0, abs=1e-2)


def test_an_engine_without_log_probs_cannot_be_corrected(home):
    trainer = home.trainer(rollout_engine="generate", rollout_correction="token_mask")
    experience, _ = experience_of(trainer)
    experience.rollouts.log_probs = None
    with pytest.raises(RolloutError, match="rollout_correction: got token_mask, but the engine generate gives no"):
        importance_weights(trainer.args, experience)


@pytest.mark.slow
@pytest.mark.parametrize("kind", (*GROUPS, "reinforce++"))
def test_it_learns(home, kind):
    options = {"advantage": kind, "num_responses": 4, "rollout_batch_size": 32, "max_steps": 12, "kl_coef": 0.0}
    trainer = home.trainer(reward_fn=bananas, **options)
    trainer.train()
    scores = [row["objective/scores"] for row in home.rows()]
    assert scores[-1] > scores[0] + 1, scores


def test_names_and_parameters():
    def made(text, **options):
        return objective_of(PPOConfig(objective=text, **options))

    assert made("clip", cliprange=0.1, cliprange_high=0.3, dual_clip=2.0) == Clip(0.1, 0.3, 2.0)
    assert made("gspo") == GSPO() and made("gspo:low=0.1,high=none") == GSPO(0.1, None)
    assert made("cispo:low=0.2,high=4") == CISPO(0.2, 4.0) and made("dppo:divergence=kl,low=0.05") == DPPO("kl", 0.05)
    assert made("clip_cov:ratio=0.01", cliprange=0.3) == ClipCov(0.3, ratio=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ppo"}, "objective: got 'ppo', want one of clip, gspo"),
        ({"objective": "gspo:tau=1"}, "objective: got 'tau=1', want of gspo: low, high"),
        ({"objective": "clip:low=0.1"}, "objective: got 'low=0.1', want it in cliprange"),
        ({"objective": "sapo:positive=-1"}, "positive must be a number > 0"),
        ({"objective": "dro"}, "beta"),
        ({"rollout_correction": "token_mask"}, "rollout_correction: got token_mask, want none with rollout_engine"),
        ({"rollout_correction_low": 3.0}, "rollout_correction_low: got 3.0, want at most rollout_correction_high, 2.0"),
        ({"advantage": "grpo"}, "num_responses: got 1, want at least 2 with advantage grpo"),
        (
            {"advantage": "rloo", "num_responses": 2, "value_model_path": "x"},
            "value_model_path: got a model, want none",
        ),
        ({"advantage": "rloo", "num_responses": 2, "whiten_rewards": True}, "whiten_rewards: got True"),
        ({"advantage": "rloo", "num_responses": 2, "gamma": 0.9}, "gamma: got 0.9, want 1 with advantage rloo"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_a_value_model_is_refused_where_there_are_no_values(home):
    from rlhf.ppo import PPOTrainer

    args = home.config(advantage="grpo", num_responses=4)
    with pytest.raises(ValueError, match="value_model: got a model, want None with advantage grpo"):
        PPOTrainer(args, value_model=torch.nn.Linear(1, 1))


def recipes():
    """(recipe, its flags) of each line of docs/objectives.md."""
    text = (ROOT / "docs" / "objectives.md").read_text()
    for name, cell in re.findall(r"^\| ([^|]+) \| ([^|]*--[^|]*) \|$", text, flags=re.MULTILINE):
        for flags in re.findall(r"`(--[^`]+)`", cell):
            yield pytest.param(flags, id=name.split(",")[0].split(" (")[0])


@pytest.mark.parametrize("flags", list(recipes()))
def test_every_recipe_is_taken(flags):
    """The flags of the page are options, and go together."""
    flags = flags.replace("--config instructgpt", "").split()
    args, rest = HfArgumentParser(PPOConfig).parse_args_into_dataclasses([*flags], return_remaining_strings=True)
    assert isinstance(args, PPOConfig) and not rest
