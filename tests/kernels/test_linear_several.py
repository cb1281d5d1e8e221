"""K labels of a row from hidden states: as K calls of one label, from one walk over the head."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.reference import linear as reference

OP = "linear"
CASES = [case for case in reference.CASES if case not in ("empty", "one_entry")]


def several(labels, vocab):
    """[M, 4] labels: the given one, two others, one of them twice; some do not count, of one row none does."""
    generator = torch.Generator().manual_seed(3)
    more = torch.randint(0, vocab, (len(labels), 2), generator=generator)
    counts = labels != -100  # the hidden states of other rows are NaN
    labels = torch.stack((labels, more[:, 0], more[:, 1], more[:, 0]), -1)
    labels[~counts] = -100
    labels[0, 1] = labels[3, 0] = -100
    labels[4] = -100
    return labels


def exact(leaves, labels, options):
    """(log-probs [M, K], entropy [M]) in float64 by the whole logits."""
    kept = labels != -100
    rows = options.get("rows")
    some = torch.where(kept.any(-1), 0, -100)
    logits = reference.full_logits(leaves["hidden_states"], leaves["weight"], some, rows, leaves.get("bias"))
    softcap, temperature = options.get("softcap"), options.get("temperature", 1.0)
    z = logits if softcap is None else torch.where(logits == -math.inf, logits, softcap * torch.tanh(logits / softcap))
    z = z / (temperature.double().unsqueeze(-1) if torch.is_tensor(temperature) else temperature)
    log_p = torch.log_softmax(z, -1)
    entropy = -(log_p.exp() * torch.where(log_p == -math.inf, 0.0, log_p)).sum(-1)
    picked = log_p.gather(-1, labels.clamp(min=0))
    return torch.where(kept, picked, 0.0), torch.where(kept.any(-1), entropy, 0.0)


@pytest.mark.parametrize("frozen", (False, True), ids=("trained", "frozen"))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_values_and_gradients(backend_name, case, dtype, frozen, assert_close_to_fp64):
    given = reference.example_inputs(case, dtype=dtype)
    labels = several(given.pop("labels"), given["weight"].shape[0])
    names = [k for k in ("hidden_states", "weight", "bias") if k in given]
    options = {k: x for k, x in given.items() if k not in names}
    trained = names[:1] if frozen else names
    leaves = {k: given[k].clone().requires_grad_(k in trained) for k in names}
    leaves64 = {k: given[k].double().requires_grad_(k in trained) for k in names}
    found = rk.linear_logprobs(**leaves, labels=labels, **options, return_entropy=not frozen)
    found = (found,) if frozen else found
    wanted = exact(leaves64, labels, options)[: len(found)]
    gradients = []
    for outputs, inputs in ((found, leaves), (wanted, leaves64)):
        total = 0.0
        for x in outputs:
            upstream = torch.linspace(-1.0, 2.0, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype)
            total = total + (torch.where(x.isfinite(), x, 0.0) * upstream).sum()
        gradients.append(torch.autograd.grad(total, [inputs[k] for k in trained]))
    for ours, theirs in zip(found, wanted):
        assert_close_to_fp64(ours, theirs, torch.float32)
    for ours, theirs in zip(*gradients):
        assert_close_to_fp64(ours, theirs, dtype, scale=2, gradient=True)


def test_the_likeliest_keeps_its_digits(backend_name):
    """Of a token 40 nats above the rest, 1 - p is about 4e-17 V: log p_best - 0, and the other is 40 nats below."""
    hidden, weight = torch.tensor([[1.0]]), torch.zeros(50, 1)
    weight[7] = 40.0
    found = rk.linear_logprobs(hidden, weight, torch.tensor([[3, 7]]))[0].double()
    assert found[1].item() == pytest.approx(-49 * math.exp(-40.0), rel=1e-5)
    assert found[0].item() == pytest.approx(-40.0, rel=1e-6)


def test_lora_and_leading_dimensions(backend_name, assert_close_to_fp64):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 5, generator=generator), torch.randn(11, 5, generator=generator)
    a, b = torch.randn(2, 5, generator=generator), torch.randn(11, 2, generator=generator)
    labels = torch.randint(0, 11, (2, 3, 4), generator=generator)
    found = rk.linear_logprobs(hidden, weight, labels, lora=(a, b, 0.5), precision="exact")
    whole = weight.double() + 0.5 * b.double() @ a.double()
    wanted = torch.log_softmax(hidden.double() @ whole.t(), -1).gather(-1, labels)
    assert found.shape == (2, 3, 4)
    assert_close_to_fp64(found, wanted, torch.float32)


def test_wrong_labels(backend_name, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    hidden, weight = torch.zeros(2, 3), torch.zeros(7, 3)
    with pytest.raises(ValueError, match=r"labels has shape \[3, 2\]|labels has shape \[3\]"):
        rk.linear_logprobs(hidden, weight, torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels has shape \[2, 0\].*K >= 1"):
        rk.linear_logprobs(hidden, weight, torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels holds 7 at position \[1, 1\]"):
        rk.linear_logprobs(hidden, weight, torch.tensor([[1, 2], [3, 7]]))
    with pytest.raises(ValueError, match="labels"):
        rk.linear_logprobs(hidden, weight, torch.zeros(2, 2, 2, dtype=torch.int64))
