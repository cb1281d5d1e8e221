"""Best-of-n: the formula, the choice, and a learning test: a reward model is fitted, used, and then exploited."""

import json
import math

import numpy as np
import pytest
import torch

from rlhf import evaluate
from rlhf.reports import health, runs
from rlhf.rollouts.sampling import Rollouts
from rlhf_kernels import bradley_terry_loss

WEIGHTS = np.array([0.35, 0.25, 0.15, 0.15, 0.10])
"""True worth of correctness, clarity, tone, safety and length: what the labeler of the toy project wants."""
TRIPLED = np.array([1, 1, 1, 1, 3])
NOISE = 0.12


def responses(rng, *shape):
    """Features of sampled responses [*shape, 5]. Length has a heavy tail, and what is too long is unclear."""
    features = rng.standard_normal((*shape, 5))
    features[..., 4] = rng.lognormal(0.0, 1.0, shape) - 1.0
    features[..., 1] -= 0.75 * np.maximum(0.0, features[..., 4] - 1.0)
    return features


def rank_by(scores, rng):
    """[P, K] ranks by true score plus the labeler's noise."""
    noisy = scores + NOISE * rng.gumbel(size=scores.shape)
    return (-noisy).argsort(-1).argsort(-1)


@pytest.fixture(scope="module")
def fitted():
    """Weights of a linear reward model, fitted with the library's loss on 200 prompts with K = 4: 1200 comparisons."""
    rng = np.random.default_rng(0)
    features = responses(rng, 200, 4)
    ranks = torch.from_numpy(rank_by(features @ WEIGHTS, rng))
    x = torch.from_numpy(features).float()
    weights = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss, metrics = bradley_terry_loss(x @ weights, ranks)
        assert int(metrics["pairs"]) == 1200
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach().double().numpy()


def test_linear_reward_model_recovers_the_direction(fitted):
    cosine = fitted @ WEIGHTS / np.linalg.norm(fitted) / np.linalg.norm(WEIGHTS)
    assert cosine > 0.99


def test_linear_reward_model_beats_70_percent_on_new_pairs(fitted):
    rng = np.random.default_rng(1)
    features = responses(rng, 1000, 4)
    ranks = torch.from_numpy(rank_by(features @ WEIGHTS, rng))
    _, metrics = bradley_terry_loss(torch.from_numpy(features @ fitted), ranks)
    assert int(metrics["pairs"]) == 6000
    assert metrics["accuracy"].item() > 0.70


def test_best_of_16_beats_best_of_1(fitted):
    features = responses(np.random.default_rng(2), 2000, 16)
    true = features @ WEIGHTS
    chosen = evaluate.best_of((features @ fitted).ravel().tolist(), 16)
    won = evaluate.win_rate(true.ravel()[chosen].tolist(), true[:, 0].tolist())
    assert won.low > 0.85


def curve(reward_weights, n_values=(1, 2, 4, 16, 64, 256), prompts=4000):
    """[(reward model's score, true score)] of best-of-n, means over prompts."""
    features = responses(np.random.default_rng(3), prompts, max(n_values))
    proxy, true = features @ reward_weights, features @ WEIGHTS
    points = []
    for n in n_values:
        chosen = evaluate.best_of(proxy[:, :n].ravel().tolist(), n)
        points.append((proxy[:, :n].ravel()[chosen].mean(), true[:, :n].ravel()[chosen].mean()))
    return np.array(points)


def test_trap_32_true_score_stalls_while_the_proxy_rises(fitted):
    """One weight of the reward model tripled: the more samples to choose from, the longer the text, and the worse."""
    points = curve(fitted * TRIPLED)
    assert (np.diff(points[:, 0]) > 0).all()  # the reward model is ever happier
    peak = int(points[:, 1].argmax())
    assert 0 < peak < len(points) - 1
    assert points[peak, 1] > points[0, 1] + 0.2
    assert points[-1, 1] < points[peak, 1] - 0.2
    honest = curve(fitted)
    assert (np.diff(honest[:, 1]) > 0).all()  # the unspoilt one goes on helping


def tilted_run(folder, reward_weights, kl_stop=math.inf):
    """A run directory with the exact optima pi ∝ pi_ref exp(r / beta) of a finite candidate set, beta falling."""
    rng = np.random.default_rng(4)
    features = responses(rng, 20_000)
    proxy, true = features @ reward_weights, features @ WEIGHTS
    proxy = (proxy - proxy.mean()) / proxy.std()
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"stage": "ppo", "config": {}, "summary": {}}))
    rows = []
    for step, sharpness in enumerate(np.linspace(0.0, 2.0, 40), 1):
        log_weights = sharpness * proxy
        p = np.exp(log_weights - log_weights.max())
        p /= p.sum()
        kl = float((p * np.log(np.maximum(p, 1e-300) * len(p))).sum())
        if kl > kl_stop:
            break
        rows.append(
            {
                "step": step,
                "objective/scores": float(p @ proxy),
                "objective/gold": float(p @ true),
                "objective/kl": kl,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return runs.read_report(folder)


def test_trap_32_report_names_reward_hacking(fitted, tmp_path):
    hacked = tilted_run(tmp_path / "hacked", fitted * TRIPLED)
    check = health.reward_hacking(hacked)
    assert check.verdict == "bad", check.number
    assert "reward +" in check.number and "gold −" in check.number
    stopped = tilted_run(tmp_path / "stopped", fitted * TRIPLED, kl_stop=0.3)
    assert health.reward_hacking(stopped).verdict == "good"
    assert health.reward_hacking(tilted_run(tmp_path / "honest", fitted)).verdict == "good"


def test_trap_33_kl_of_best_of_n():
    """log n - (n - 1) / n, beside the exact KL over many equally likely responses, none of them tied."""
    assert evaluate.best_of_n_kl(1) == 0.0
    assert evaluate.best_of_n_kl(2) == pytest.approx(0.1931471805599453, abs=1e-15)
    assert evaluate.best_of_n_kl(16) == pytest.approx(1.8350887222397811, abs=1e-15)
    m = 100_000
    for n in (2, 16, 64):
        p = np.diff((np.arange(m + 1) / m) ** n)
        p = p[p > 0]
        exact = float((p * np.log(p * m)).sum())
        assert exact == pytest.approx(evaluate.best_of_n_kl(n), abs=1e-3)
        assert exact <= evaluate.best_of_n_kl(n)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        evaluate.best_of_n_kl(0)


def test_trap_33_n_of_1_is_the_identity_and_ties_are_stable():
    scores = [0.3, -1.0, 5.0, 5.0, 2.0, 5.0]
    assert evaluate.best_of(scores, 1) == [0, 1, 2, 3, 4, 5]
    assert evaluate.best_of(scores, 3) == [2, 3]
    assert evaluate.best_of(scores, 6) == [2]
    assert evaluate.best_of([1.0, 1.0, 1.0, 1.0], 2) == [0, 2]
    with pytest.raises(ValueError, match="whole groups of n = 4, got 6"):
        evaluate.best_of(scores, 4)


def test_trap_33_a_cut_response_does_not_win_by_its_torso():
    assert evaluate.best_of([9.0, 1.0, 2.0], 3, [False, True, True]) == [2]
    assert evaluate.best_of([9.0, 1.0, 2.0], 3, [False, False, False]) == [0]


@pytest.fixture(scope="module")
def tiny_reward_model():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=12,
        num_labels=1,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config).eval()


def test_trap_33_the_whole_text_is_scored_or_nothing(tiny_reward_model):
    """Scores are those of each text alone, in any batch; a text beyond the context is an error, never cut."""
    rollouts = Rollouts([[1, 2], [3], [1, 2, 4, 5]], [[5, 6, 7, 0], [8], [9, 0, 10]], [True, False, False])
    scores = evaluate.reward_scores(tiny_reward_model, rollouts, batch_size=2)
    for prompt, response, score in zip(rollouts.prompt_ids, rollouts.response_ids, scores, strict=True):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            alone = tiny_reward_model.score(tiny_reward_model.model(ids).last_hidden_state)[0, -1, 0].item()
        assert score == pytest.approx(alone, abs=1e-6)
    too_long = Rollouts([[1] * 8], [[2] * 5], [False])
    with pytest.raises(ValueError, match="longest prompt \\+ response has 13 tokens, the reward model's context is 12"):
        evaluate.reward_scores(tiny_reward_model, too_long)
