"""Batches of prompts and responses: how they are cut, and the policy loss of one."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.models import sequences
from rlhf.models.sequences import cheapest_cut, join, policy_loss
from rlhf_kernels import Clip
from tests.roundings import assert_same
from tests.tiny_ppo import make_config


def cost(lengths, ends, overhead):
    chunks = [lengths[start:end] for start, end in itertools.pairwise([0, *ends])]
    return sum(len(chunk) * max(chunk) + overhead for chunk in chunks)


@pytest.mark.parametrize("size", [1, 3, 9])
@pytest.mark.parametrize("overhead", [0, 5, 64])
def test_no_cut_is_cheaper(size, overhead):
    """All 2^8 ways to cut nine rows, sorted by length and not."""
    for lengths in ([1, 2, 2, 3, 30, 31, 40, 41, 90], [7, 3, 50, 4, 4, 20, 1, 19, 21]):
        ends = cheapest_cut(lengths, size, overhead)
        assert ends[-1] == 9 and all(0 < b - a <= size for a, b in itertools.pairwise([0, *ends]))
        ways = ([*inner, 9] for count in range(9) for inner in itertools.combinations(range(1, 9), count))
        allowed = [way for way in ways if all(b - a <= size for a, b in itertools.pairwise([0, *way]))]
        assert cost(lengths, ends, overhead) == min(cost(lengths, way, overhead) for way in allowed)


def expected_loss(model, prompts, responses, old, advantages, mode, temperature):
    """SPEC's clipped loss less 0.1 entropies, from float64 logits of one row at a time."""
    losses, entropies = [], []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        log_p = logits.log_softmax(-1)
        ratio = (log_p.gather(-1, torch.tensor(response)[:, None])[:, 0] - old[row, : len(response)]).exp()
        gain = advantages[row, : len(response)]
        losses.append(torch.maximum(-gain * ratio, -gain * ratio.clamp(0.8, 1.2)))
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    token_losses = [loss - 0.1 * entropy for loss, entropy in zip(losses, entropies, strict=True)]
    if mode == "token-mean":
        return torch.cat(token_losses).sum() / 40
    return sum(loss.mean() for loss in token_losses) / 40


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_policy_loss(mode, linear, monkeypatch):
    """Loss and every gradient, in the place of the head and, where that cannot be, from logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama")).double().eval()
    judge = copy.deepcopy(model)
    if not linear:
        monkeypatch.setattr(sequences, "linear_head", lambda model: None)
    prompts, responses = [[5, 6, 7], [8]], [[9, 3], [4, 11, 12, 2]]
    batch = join(prompts, responses, steps=6)
    old, advantages = torch.full((2, 6), torch.nan), torch.full((2, 6), torch.nan)
    old[batch.response_mask] = -torch.rand(6) - 3.5
    advantages[batch.response_mask] = torch.randn(6)
    options = {"entropy_coef": 0.1, "loss_agg_mode": mode, "num_items_in_batch": 40}
    options |= {"entropy_agg_mode": mode, "entropy_num_items_in_batch": 40}
    found = policy_loss(model, batch, old, advantages, temperature=0.7, objective=Clip(0.2), **options)
    found.loss.backward()
    expected = expected_loss(judge, prompts, responses, old.double(), advantages.double(), mode, 0.7)
    expected.backward()
    assert_same(found.loss, expected)
    for weight, wanted in zip(model.parameters(), judge.parameters(), strict=True):
        largest = wanted.grad.abs().max()
        assert_same(weight.grad / largest, wanted.grad / largest)
    assert {"ratio_mean", "clip_fraction", "approx_kl", "entropy"} <= found.metrics.keys()
