"""The algorithm of PPO and PPO-ptx on models of a few thousand parameters: the traps, with their numbers."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf import models
from rlhf.metrics import Averages
from rlhf.ppo import train_ppo
from rlhf.ppo.contract import ContractError, check_contract
from rlhf.ppo.kl_controller import KLController
from rlhf.ppo.state import learning_rate_factor
from rlhf.rollouts.sampling import Rollouts
from rlhf_kernels import ppo_loss
from tests.roundings import EXACT, STORED, assert_same
from tests.tiny_ppo import (
    EOS,
    HAND_MADE,
    STOP,
    WORDS,
    bananas,
    equal,
    experience_of,
    make_config,
    make_tokenizer,
    perturb,
    weights,
)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_trap_07_reward_position(home, beta):
    trainer = home.trainer(kl_coef=beta, lam=1.0, whiten_advantages=False)
    perturb(trainer.policy)
    scores = torch.tensor([2.1, -1.0, 0.5, 3.0])
    experience = trainer.evaluate(HAND_MADE)
    trainer.estimate_advantages(experience, scores, Averages())
    log_ratio = experience.log_probs - experience.ref_log_probs
    assert log_ratio.abs().sum() > 0.1
    for row, response in enumerate(HAND_MADE.response_ids):
        returns = experience.returns[row].double()  # with gamma = lam = 1: the sum of the rewards from a token on
        rewards = returns - torch.cat([returns[1:], torch.zeros(1)])
        last = len(response) - 1
        expected = -beta * log_ratio[row].double()
        expected[last] += scores[row]
        assert (expected[last + 1 :] == 0).all()
        torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)
        total = scores[row].item() - beta * log_ratio[row].sum().item()
        assert rewards.sum().item() == pytest.approx(total, abs=1e-5)


def test_trap_07_the_reward_model_reads_the_last_token(home):
    trainer = home.trainer(dtype="float64")
    scores = trainer.score([{}] * 4, HAND_MADE)
    for row, (prompt, response) in enumerate(zip(HAND_MADE.prompt_ids, HAND_MADE.response_ids, strict=True)):
        ids = torch.tensor([prompt + response])
        hidden = trainer.reward_model.model(input_ids=ids).last_hidden_state[0, -1]
        expected = (hidden @ trainer.reward_model.score.weight[0]).item() - 0.75
        assert_same(scores[row].item(), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_trap_11_ratio_and_kl_at_step_0(home, kind, temperature):
    """Up to what fp32 makes of old log-probs from -16 to 0: 16 * 2**-24 in their ratio, its square in its variance."""
    trainer = home.trainer(kind=kind, temperature=temperature, rollout_batch_size=4, dtype="float64")
    assert trainer.contract["kl"] == 0 and trainer.contract["ratio"] < EXACT
    metrics = trainer.iteration()
    assert metrics["objective/kl"] == 0 and metrics["objective/non_score_reward"] == 0
    assert abs(metrics["val/ratio"] - 1) < STORED and metrics["val/ratio_var"] < STORED**2
    assert abs(metrics["val/ratio_max"] - 1) < STORED and metrics["policy/approxkl_avg"] < STORED**2
    assert trainer.iteration()["objective/kl"] != 0


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_trap_12_log_probs_are_those_of_the_full_vocabulary(home, temperature):
    trainer = home.trainer(temperature=temperature, kl_coef=0.0, dtype="float64")
    perturb(trainer.policy)
    experience = trainer.evaluate(HAND_MADE)
    for row, (prompt, response) in enumerate(zip(HAND_MADE.prompt_ids, HAND_MADE.response_ids, strict=True)):
        logits = trainer.policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        full = (logits / temperature).log_softmax(-1)
        expected = full.gather(-1, torch.tensor(response)[:, None])[:, 0]
        found = experience.log_probs[row, : len(response)].double()
        assert_same(found, expected)
        entropy = -(full.exp() * full).sum(-1)
        assert_same(experience.entropy[row, : len(response)], entropy)
        value = models.token_scores(trainer.value, torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        assert_same(experience.values[row, : len(response)], value)


@pytest.mark.parametrize("kl, expected", [(12, 0.201024), (3, 0.198976), (6.6, 0.200512), (6, 0.2), (-1, 0.198976)])
def test_trap_15_adaptive_kl(kl, expected):
    """0.2 * (1 + clip(kl / 6 - 1, -0.2, 0.2) * 256 / 10000), by hand."""
    controller = KLController(0.2, target=6.0, horizon=10_000)
    controller.update(kl, 256)
    assert controller.value == pytest.approx(expected, rel=1e-12)
    fixed = KLController(0.2)
    fixed.update(kl, 256)
    assert fixed.value == 0.2


def test_trap_15_the_trainer_feeds_sampled_kl_and_episodes(home):
    train_ppo(home.config(kl_coef=0.1, kl_target=0.5, kl_horizon=40, max_steps=4))
    rows = home.rows()
    for before, after in itertools.pairwise(rows):
        error = max(-0.2, min(0.2, before["objective/kl"] / 0.5 - 1))
        assert after["objective/kl_coef"] == pytest.approx(before["objective/kl_coef"] * (1 + error * 8 / 40), rel=1e-9)
    assert rows[0]["objective/kl_coef"] == 0.1 and rows[1]["objective/kl_coef"] == pytest.approx(0.096)


def test_trap_16_metrics_do_not_depend_on_padding(home):
    found = []
    for length in (8, 20):
        trainer = home.trainer(f"run{length}", response_length=length, kl_coef=0.2)
        perturb(trainer.policy)
        averages = Averages()
        experience = trainer.evaluate(HAND_MADE)
        for name in ("log_probs", "ref_log_probs", "values", "entropy"):
            tensor = getattr(experience, name)
            tensor[~experience.mask] = torch.nan if name != "log_probs" else 0.0
        trainer.estimate_advantages(experience, torch.tensor([2.1, -1.0, 0.5, 3.0]), averages)
        perturb(trainer.policy, 0.02)
        trainer.accumulate_gradients(experience, [0, 1, 2, 3], [], averages)
        found.append(averages.read(trainer._sum) | {f"grad {n}": w.grad for n, w in trainer.policy.named_parameters()})
    assert found[0].keys() == found[1].keys() and found[0]["val/ratio_var"] > 1e-6
    for name, value in found[0].items():
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(found[1][name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shared_prompts_give_the_same_run(home, kind):
    """Several responses a prompt, behind one copy of it or apart: the same samples and metrics, after updates too.

    Two AdamW steps turn roundings of 2**-24 of a gradient, in Llama's norms, into at most 2 * learning_rate /
    adam_epsilon = 20 times that, 1.2e-6 of a weight. The metrics, which depend on thousands of weights, have 1e-4.
    """
    prompts = [{"prompt": " ".join(["the cat sat on a mat and saw it ."] * 2)}, {"prompt": "a dog ran . " * 4}]
    file = home.path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    options = {"dataset_name": str(file), "num_responses": 4, "num_mini_batches": 1, "num_ppo_epochs": 2, "kind": kind}
    options |= {"dtype": "float64", "adam_epsilon": 1e-3}
    runs = []
    for packing in ("auto", "false"):
        trainer = home.trainer(packing, packing=packing, per_device_train_batch_size=8, **options)
        assert trainer.share_width == (16 if packing == "auto" else None)
        batch = trainer._join(Rollouts([[5, 6, 7] * 6] * 4, [[8, 2]] * 4, [True] * 4), range(4))
        assert batch.input_ids.shape == ((1, 26) if packing == "auto" else (4, 20))
        trainer.train()
        rows = [
            {k: v for k, v in row.items() if not k.startswith(("time", "eps", "tokens", "throughput"))}
            for row in home.rows(packing)
        ]
        runs.append((home.rows(packing, "samples.jsonl"), rows))
    for shared, apart in zip(runs[0][0], runs[1][0], strict=True):
        assert {**shared, "score": 0} == {**apart, "score": 0}
        assert shared["score"] == pytest.approx(apart["score"], abs=1e-4)
    for shared, apart in zip(runs[0][1], runs[1][1], strict=True):
        assert shared.keys() == apart.keys()
        for name in shared:
            assert shared[name] == pytest.approx(apart[name], rel=1e-3, abs=1e-4), name


def test_trap_17_no_dropout_in_any_network(home):
    assert AutoModelForCausalLM.from_pretrained(home.path / "gpt2").transformer.drop.p == 0.1
    trainer = home.trainer(kind="gpt2")
    batch = trainer._join(HAND_MADE, range(4))
    for network in (trainer.policy, trainer.reference, trainer.value, trainer.reward_model):
        network.train()
    trainer.model.train()
    constants = torch.ones(2, *batch.response_mask.shape)
    (first, values), (second, again) = (trainer.model(batch, *constants, temperature=1.0) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and torch.equal(values, again)
    assert torch.equal(trainer.evaluate(HAND_MADE).ref_log_probs, trainer.evaluate(HAND_MADE).ref_log_probs)
    assert torch.equal(trainer.score([{}] * 4, HAND_MADE), trainer.score([{}] * 4, HAND_MADE))


def test_trap_18_ptx_gradient_is_added(home):
    """grad(total) = grad(ppo) + gamma * grad(ptx), the latter from transformers' own loss in float64."""
    gamma = 27.8
    options = {"ptx_dataset_name": str(home.path / "text.txt"), "ptx_batch_multiplier": 2, "dtype": "float64"}
    trainer = home.trainer(ptx_coef=gamma, **options)
    perturb(trainer.policy)
    experience, _ = experience_of(trainer)
    texts = trainer.next_texts(4)
    assert len(texts) == 8 and all(ids[-1] == EOS for ids in texts)

    def gradient(chosen_texts):
        trainer.optimizer.zero_grad()
        trainer.accumulate_gradients(experience, [0, 1, 2, 3, 4, 5, 6, 7], chosen_texts, Averages())
        return {name: weight.grad.double() for name, weight in trainer.model.named_parameters()}

    total, ppo = gradient(texts), gradient([])
    judge = AutoModelForCausalLM.from_config(make_config("llama")).double()
    judge.load_state_dict({name: weight.double() for name, weight in trainer.policy.state_dict().items()})
    count = sum(len(ids) - 1 for ids in texts)
    for ids in texts:
        ids = torch.tensor([ids])
        (judge(ids, labels=ids).loss * (ids.shape[1] - 1) / count).backward()
    for name, weight in judge.named_parameters():
        assert_same(total[f"policy.{name}"], ppo[f"policy.{name}"] + gamma * weight.grad)
    for name in ppo:
        assert name.startswith("policy.") or torch.equal(total[name], ppo[name])


def test_trap_18_without_gamma_it_is_ppo_to_the_bit(home):
    results = []
    for out, options in (("a", {}), ("b", {"ptx_coef": 0.0, "ptx_dataset_name": str(home.path / "text.txt")})):
        trainer = home.trainer(out, **options)
        trainer.train()
        results.append(weights(trainer.model))
    assert equal(*results)
    trainer = home.trainer("c", ptx_coef=1.0, ptx_dataset_name=str(home.path / "text.txt"))
    trainer.train()
    assert not equal(results[0], weights(trainer.model)) and home.rows("c")[0]["loss/ptx_avg"] > 0


def test_trap_19_value_at_eos_is_the_score_at_init(home):
    trainer = home.trainer(dtype="float64")
    assert trainer.contract["value_at_end"] < EXACT
    rows = trainer.next_prompts()
    rollouts = trainer.sample(rows)
    scores = trainer.score(rows, rollouts)
    for row in range(len(rows)):
        ids = torch.tensor([rollouts.prompt_ids[row] + rollouts.response_ids[row]])
        values = models.token_scores(trainer.value, ids)
        assert_same(values[0, -1].item(), scores[row].item())


@pytest.mark.slow
def test_trap_19_the_value_function_learns(home):
    args = home.config(
        reward_model_path=None, max_steps=24, learning_rate=0.0, value_learning_rate=1e-2, num_ppo_epochs=4,
        kl_coef=0.0, cliprange_value=5.0, rollout_batch_size=32, per_device_train_batch_size=16,
        max_grad_norm=None, lam=1.0,
    )  # fmt: skip
    train_ppo(args, reward_fn=bananas)
    explained = [row["val/explained_variance"] for row in home.rows()]
    assert sum(explained[-8:]) / 8 > 0.1 > explained[0]  # single batches of 32 scatter by 0.3
    assert all(row["objective/kl"] == 0 for row in home.rows())


def test_trap_20_value_clipping_and_the_scale_of_scores():
    """Scores 10 times as large need a clip 10 times as wide: the loss is 100 times as large, as much is clipped."""
    generator = torch.Generator().manual_seed(0)
    new, old, returns = (torch.randn(4, 6, generator=generator) for _ in range(3))
    mask = torch.ones(4, 6, dtype=torch.bool)

    def loss(scale, clip):
        zero = torch.zeros(4, 6)
        values = {"values": scale * new, "old_values": scale * old, "returns": scale * returns}
        return ppo_loss(zero, zero, zero, mask, cliprange_value=clip, **values)

    small, large, too_tight = loss(1.0, 0.2), loss(10.0, 2.0), loss(10.0, 0.2)
    assert large.value_loss.item() == pytest.approx(100 * small.value_loss.item(), rel=1e-5)
    clipped = [result.metrics["value_clip_fraction"].item() for result in (small, large, too_tight)]
    assert clipped[0] == clipped[1] and clipped[2] >= clipped[0] > 0


def test_trap_20_the_clipped_fraction_is_logged(home):
    options = {"num_ppo_epochs": 4, "value_learning_rate": 1e-2, "max_steps": 1}
    train_ppo(home.config("tight", cliprange_value=1e-4, **options))
    train_ppo(home.config("wide", cliprange_value=1e4, **options))
    assert home.rows("tight")[0]["val/clipfrac_avg"] > 0.3 and home.rows("wide")[0]["val/clipfrac_avg"] == 0


def test_trap_21_the_stop_token_need_not_be_eos(home):
    trainer = home.trainer(stop_token=".", missing_eos_penalty=5.0, reward_clip_range=[-0.5, 0.5])
    assert trainer.stop_ids == [EOS, STOP]
    rollouts = Rollouts([[5]] * 3, [[4, STOP], [4, EOS], [4, 5]], [True, True, False])
    assert trainer.shape_scores(torch.tensor([0.25, 9.0, -9.0]), rollouts).tolist() == [0.25, 0.5, -5.5]
    rows = trainer.next_prompts()
    sampled = trainer.sample(rows)
    for response, ended in zip(sampled.response_ids, sampled.ended, strict=True):
        assert ended == (response[-1] in (EOS, STOP)) and not {EOS, STOP} & set(response[:-1])
        assert ended or len(response) == 8
    assert any(response[-1] == STOP for response in sampled.response_ids)
    metrics = trainer.iteration()
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 - metrics["val/num_eos_tokens"] / 8)
    assert home.trainer("eos", stop_token="eos").stop_ids == [EOS]
    with pytest.raises(ValueError, match="'nowhere'"):
        home.trainer("bad", stop_token="nowhere")


def test_trap_27_learning_rate_sequence(home):
    seen = []

    def note(trainer, step, metrics):
        seen.append(trainer.scheduler.get_last_lr())

    trainer = home.trainer(
        num_ppo_epochs=2, max_steps=3, warmup_iterations=2, learning_rate=1e-3, value_learning_rate=5e-3,
        callbacks=[note],
    )  # fmt: skip
    trainer.train()  # 2 epochs * 2 minibatches = 4 steps an iteration: 0.1 + 0.9 * step / 8, then 1
    assert seen == [pytest.approx([f * 1e-3, f * 5e-3]) for f in (0.55, 1.0, 1.0)]
    mean = sum(0.1 + 0.9 * step / 8 for step in range(4)) / 4 * 1e-3
    assert home.rows()[0]["lr"] == pytest.approx(mean)
    shape = {"updates_per_iteration": 1, "iterations": 20, "warmup_iterations": 10}
    assert [learning_rate_factor(u, schedule="constant", **shape) for u in (0, 5, 10, 19)] == [0.1, 0.55, 1, 1]
    assert [learning_rate_factor(u, schedule="linear", **shape) for u in (10, 15, 20)] == [1, 0.5, 0]
    assert learning_rate_factor(15, schedule="cosine", **shape) == pytest.approx(0.5)


def test_trap_27_gradients_are_clipped_before_the_step_and_epsilon_counts(home):
    trainer = home.trainer(max_grad_norm=1e-4, adam_epsilon=1.0, learning_rate=1.0, warmup_iterations=0, max_steps=1)
    before = weights(trainer.model)
    metrics = trainer.iteration()
    assert metrics["grad_norm/policy"] > 1e-3
    moved = max((weight - before[name]).abs().max().item() for name, weight in trainer.model.named_parameters())
    assert 0 < moved < 5e-4  # two steps of at most 1e-4; without the clip, or with a small epsilon, 1e-3 and more


def test_a_gradient_limit_of_0_is_no_limit(home):
    """As in the other stages, and as in transformers: 0 does not mean that nothing is trained."""
    moved = {}
    for limit in (0, None, 1e9, 1e-3):
        trainer = home.trainer(f"run-{limit}", max_grad_norm=limit, max_steps=1, seed=3)
        trainer.iteration()
        moved[limit] = weights(trainer.model)
    assert equal(moved[0], moved[None]) and equal(moved[0], moved[1e9]) and not equal(moved[0], moved[1e-3])
    assert not equal(moved[0], weights(home.trainer("start", max_steps=1, seed=3).model))


def test_a_value_learning_rate_of_0_holds_the_values(home):
    trainer = home.trainer(value_learning_rate=0, max_steps=1)
    before = weights(trainer.model)
    trainer.iteration()
    changed = {name for name, weight in weights(trainer.model).items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("policy.") for name in changed)


def test_trap_29_the_reference_does_not_move(home):
    trainer = home.trainer(max_steps=2)
    before = weights(trainer.reference)
    policy = {weight.data_ptr() for weight in trainer.policy.parameters()}
    assert not policy & {weight.data_ptr() for weight in trainer.reference.parameters()}
    trainer.train()
    assert equal(before, weights(trainer.reference)) and not equal(before, weights(trainer.policy))
    assert equal(before, weights(models.load_policy(home.path / "llama")))


def test_the_contract_names_what_is_broken(home):
    trainer = home.trainer()
    perturb(trainer.reference)
    with pytest.raises(ContractError, match="kl: policy and reference are equal, yet"):
        check_contract(trainer)
    trainer.reference = trainer.policy
    with pytest.raises(ContractError, match=r"reference_storage: the reference shares tensors[^$]*reference_frozen"):
        check_contract(trainer)
    trainer = home.trainer("value")
    perturb(trainer.value)
    with pytest.raises(ContractError, match="value_at_end"):
        check_contract(trainer)
    trainer = home.trainer("dropout", kind="gpt2")
    trainer.policy.transformer.drop.p = 0.1
    with pytest.raises(ContractError, match="dropout: two forwards of the policy in train mode differ"):
        check_contract(trainer)


def test_a_reward_model_with_another_tokenizer_is_refused(home):
    folder = home.path / "other-rm"
    other = make_tokenizer(WORDS[:5] + WORDS[:4:-1])
    models.save_model(models.load_reward_model(home.path / "llama-rm"), other, folder)
    with pytest.raises(ContractError, match="reward_ids"):
        home.trainer(reward_model_path=str(folder))


@pytest.mark.parametrize(
    "mode",
    ["token-mean", "seq-mean-token-mean",
     *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm"))],
)  # fmt: skip
def test_gradients_do_not_depend_on_the_cut_into_micro_batches(home, mode):
    gradients = []
    for size in (8, 3, 1):
        options = {"loss_agg_mode": mode, "entropy_coef": 0.01, "dtype": "float64"}
        trainer = home.trainer(f"run{size}", per_device_train_batch_size=8, **options)
        experience, _ = experience_of(trainer)
        trainer.args.per_device_train_batch_size = size
        perturb(trainer.policy, 0.02)
        trainer.accumulate_gradients(experience, list(range(8)), [], Averages())
        gradients.append({name: weight.grad for name, weight in trainer.model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert_same(other[name], gradient)


def test_whitened_rewards(home):
    """Rewards scaled to variance 1 with their mean kept, then GAE and whitening: against a float64 double loop."""
    trainer = home.trainer(whiten_rewards=True, kl_coef=0.3)
    perturb(trainer.policy)
    experience = trainer.evaluate(HAND_MADE)
    scores = torch.tensor([2.1, -1.0, 0.5, 3.0])
    trainer.estimate_advantages(experience, scores, Averages())
    rewards = -0.3 * (experience.log_probs - experience.ref_log_probs).double()
    for row, response in enumerate(HAND_MADE.response_ids):
        rewards[row, len(response) - 1] += scores[row]
    kept = rewards[experience.mask]
    rewards = (rewards - kept.mean()) / kept.var().sqrt() + kept.mean()
    advantages = torch.zeros_like(rewards)
    for row, response in enumerate(HAND_MADE.response_ids):
        values = [*experience.values[row, : len(response)].double(), torch.zeros(())]
        for t in range(len(response)):
            advantages[row, t] = sum(
                0.95 ** (s - t) * (rewards[row, s] + values[s + 1] - values[s]) for s in range(t, len(response))
            )
    kept = advantages[experience.mask]
    expected = (kept - kept.mean()) / kept.var().sqrt()
    torch.testing.assert_close(experience.advantages[experience.mask].double(), expected, rtol=1e-4, atol=1e-4)
