"""Log-prob, entropy, log-sum-exp, log sum p^2, mean logit and top-1 of tokens, from one read of the logits."""

import math

import mpmath
import pytest
import torch

import rlhf_kernels as rk
from tests.kernels.row_statistics import expected_statistics

OP = "logprobs"
FIELDS = rk.TokenStatistics._fields
SCALES = {"plain": {}, "warm": {"temperature": 0.7}, "capped": {"temperature": 1.3, "softcap": 4.0}}


def inputs(dtype=torch.float32, rows=(2, 3), vocab=11, seed=0):
    """Rows with banned entries, one with nothing else, one that does not count, ties of which the label is one."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3.0 * torch.randn(*rows, vocab, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, rows, generator=generator)
    logits[0, 1, : vocab // 2] = -math.inf
    labels[0, 2] = logits[0, 2].argmax()
    logits[1, 0] = -math.inf
    labels[1, 1], logits[1, 1] = -100, math.nan
    logits[1, 2, 3] = logits[1, 2, vocab - 2] = logits[1, 2].max() + 1
    labels[1, 2] = 3
    return logits, labels


@pytest.mark.parametrize("vocab", (11, 4099, 40000))
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_values(backend_name, dtype, scale, vocab, assert_close_to_fp64):
    logits, labels = inputs(dtype, vocab=vocab)
    found = rk.token_statistics_from_logits(logits, labels, **SCALES[scale])
    wanted = expected_statistics(logits.double(), labels, **SCALES[scale])
    for name in FIELDS[:-1]:
        assert_close_to_fp64(getattr(found, name), wanted[name], torch.float32)
    assert torch.equal(found.is_top1, wanted["is_top1"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_gradients_are_those_of_log_probs_and_entropy(backend_name, dtype):
    if dtype == torch.float64 and backend_name != "reference":
        pytest.skip("float64 is the reference's")
    logits, labels = inputs(dtype)
    upstream = torch.randn(2, *labels.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = []
    for function in (rk.token_statistics_from_logits, rk.logprobs_and_entropy_from_logits):
        for through in ((True, False), (False, True), (True, True)):
            leaf = logits.clone().requires_grad_()
            outputs = function(leaf, labels, temperature=0.7)[:2]
            outputs = [torch.where(x.isfinite(), x, 0.0) for x in outputs]
            total = sum((x * u).sum() for x, u, want in zip(outputs, upstream, through) if want)
            gradients.append(torch.autograd.grad(total, leaf)[0])
    for ours, theirs in zip(gradients[:3], gradients[3:]):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


def test_the_first_of_equal_entries_is_the_most_likely(backend_name):
    logits = torch.zeros(4, 9000)
    logits[0], logits[1, 70], logits[1, 8500], logits[2, 8500] = 1.0, 2.0, 2.0, 2.0
    labels = torch.tensor([0, 70, 8500, 8500])
    assert rk.token_statistics_from_logits(logits, labels).is_top1.tolist() == [True, True, True, False]
    labels = torch.tensor([1, 8500, 0, 0])
    assert rk.token_statistics_from_logits(logits, labels).is_top1.tolist() == [False, False, False, True]


@pytest.mark.parametrize("margin", (1.0, 17.0, 40.0, 80.0))
def test_sum_of_squares_near_certainty(backend_name, margin):
    """-log sum p^2 is about 2 (1 - p) there, which 1 - p^2 in fp32 would lose."""
    logits = torch.zeros(3, 1000)
    logits[0, 17], logits[1, 999], logits[2, 0] = margin, margin, margin
    found = rk.token_statistics_from_logits(logits, torch.tensor([17, 3, 1])).log_sum_sq_probs
    with mpmath.workdps(60):
        e = mpmath.exp(-margin)
        wanted = mpmath.log(1 + 999 * e**2) - 2 * mpmath.log(1 + 999 * e)
    for x in found:
        assert abs(float(x) - wanted) <= 2e-6 * abs(wanted)


def test_places_masks_and_temperatures(backend_name):
    """Rows in planes, a temperature for each row, a mask; all as of a dense copy with those labels ignored."""
    logits, labels = inputs(rows=(2, 4))
    heat = torch.tensor([[0.5, 1.0, 2.0], [0.7, 1.5, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    planes, few = logits[:, :-1], labels[:, :-1]
    found = rk.token_statistics_from_logits(planes, few.int(), temperature=heat, row_mask=mask)
    wanted = rk.token_statistics_from_logits(
        planes.contiguous().view(6, -1), torch.where(mask == 1, few, -100).view(6), temperature=heat.view(6)
    )
    for ours, theirs in zip(found, wanted):
        assert torch.equal(ours, theirs.view(2, 3))
    assert not found.is_top1[0, 2] and found.log_sum_sq_probs[0, 2] == found.mean_logit[1, 1] == 0.0


def test_empty_and_wrong(backend_name, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    empty = rk.token_statistics_from_logits(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert all(x.shape == (0,) for x in empty)
    with pytest.raises(ValueError, match=r"labels has shape \[2, 2\]"):
        rk.token_statistics_from_logits(torch.zeros(2, 5), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels holds 5"):
        rk.token_statistics_from_logits(torch.zeros(1, 5), torch.tensor([5]))


def test_results_may_be_written_in_place_before_the_backward(backend_name):
    logits, labels = inputs()
    gradients = []
    for write in (False, True):
        leaf = logits.clone().requires_grad_()
        found = rk.token_statistics_from_logits(leaf, labels)
        total = found.log_probs[0].sum() + found.entropy[0].sum()
        if write:
            found.log_probs[1] = 7.0
            found.entropy[1] = 7.0
        gradients.append(torch.autograd.grad(total, leaf)[0])
    assert torch.equal(*gradients)
    assert not found.log_sum_sq_probs.requires_grad and not found.mean_logit.requires_grad
