"""K labels of a row of logits: as K calls of one label, from one read of the row."""

import importlib
import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _several_labels
from rlhf_kernels.reference import logprobs as reference

OP = "logprobs"
SCALES = {"plain": {}, "warm": {"temperature": 0.7}, "capped": {"temperature": 1.3, "softcap": 4.0}}


def inputs(dtype=torch.float32, rows=(2, 3), vocab=11, count=4):
    """Logits, and labels of which some are the same, some do not count, and one row has none that counts."""
    generator = torch.Generator().manual_seed(0)
    logits = (2.0 * torch.randn(*rows, vocab, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, (*rows, count), generator=generator)
    labels[0, 0, 1] = labels[0, 0, 3] = labels[0, 0, 0]
    labels[0, 1, 0] = labels[1, 0, 2] = -100
    labels[1, 1] = -100
    logits[1, 1] = math.nan
    logits[1, 2, labels[1, 2, 0]] = -math.inf
    return logits, labels


def upstream_of(x, seed):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x.dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_values_and_gradients(backend_name, dtype, scale, assert_close_to_fp64):
    """Against the definition in float64; gradients through log-probs and entropy."""
    logits, labels = inputs(dtype)
    options = SCALES[scale]
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = rk.logprobs_and_entropy_from_logits(leaf, labels, **options)
    alone = rk.logprobs_from_logits(leaf, labels, **options)
    wanted = reference.logprobs_and_entropy(exact, labels, **options)
    assert found[0].shape == labels.shape and found[1].shape == labels.shape[:-1]
    for ours, theirs in zip(found, wanted):
        assert_close_to_fp64(ours, theirs, torch.float32)
    assert torch.equal(alone, found[0])
    for through in ((0,), (1,), (0, 1)):
        gradients = []
        for outputs, x in ((found, leaf), (wanted, exact)):
            finite = [torch.where(outputs[i].isfinite(), outputs[i], 0.0) for i in through]
            upstream = [upstream_of(y, i) for i, y in zip(through, finite)]
            gradients.append(torch.autograd.grad(finite, x, upstream, retain_graph=True)[0])
        assert_close_to_fp64(gradients[0], gradients[1], dtype)


def test_each_label_is_as_alone(backend_name):
    """The log-probs of one label a row, within the rounding of one subtraction, and the sum of their gradients."""
    logits, labels = inputs()
    leaf, one = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = rk.logprobs_from_logits(leaf, labels)
    apart = torch.stack([rk.logprobs_from_logits(one, labels[..., k]) for k in range(labels.shape[-1])], -1)
    torch.testing.assert_close(found, apart, rtol=2e-7, atol=2e-7)
    upstream = torch.where(found.isfinite(), upstream_of(found, 1), 0.0)
    ours, theirs = (torch.autograd.grad(x, y, upstream)[0] for x, y in ((found, leaf), (apart, one)))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_reference_by_hand(backend_name):
    """p = (1/2, 1/4, 1/4): of labels (0, 0, 1) with gradients (1, 2, 4), d = (3, 4, 0) - 7 p."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    log_probs = rk.logprobs_from_logits(logits, torch.tensor([[0, 0, 1]]))
    torch.testing.assert_close(log_probs, -math.log(2) * torch.tensor([[1.0, 1.0, 2.0]]))
    (gradient,) = torch.autograd.grad(log_probs, logits, torch.tensor([[1.0, 2.0, 4.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 2.25, -1.75]]))


def test_all_labels_are_the_whole_row(backend_name):
    """K = V: PyTorch's log_softmax and its gradient."""
    logits = torch.randn(3, 7, dtype=torch.float32, requires_grad=True)
    labels = torch.stack([torch.randperm(7) for _ in range(3)])
    found = rk.logprobs_from_logits(logits, labels)
    wanted = logits.log_softmax(-1).gather(-1, labels)
    torch.testing.assert_close(found, wanted)
    upstream = upstream_of(found, 2)
    ours, theirs = (torch.autograd.grad(x, logits, upstream)[0] for x in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_nearly_certain_label_keeps_its_gradient(backend_name):
    """1 - p and the others' p are not differences of rounded numbers."""
    logits = torch.tensor([[30.0, 0.0, 1.0]], requires_grad=True)
    log_probs = rk.logprobs_from_logits(logits, torch.tensor([[0, 2]]))
    (gradient,) = torch.autograd.grad(log_probs, logits, torch.tensor([[1.0, 0.0]]), retain_graph=True)
    assert gradient[0, 2].item() == pytest.approx(-math.exp(-29), rel=1e-5)
    (gradient,) = torch.autograd.grad(log_probs, logits, torch.tensor([[0.0, 1.0]]))
    assert gradient[0, 2].item() == pytest.approx(1.0) and gradient[0, 0].item() == pytest.approx(-1.0)


def test_edges(backend_name):
    logits = torch.randn(2, 5, requires_grad=True)
    none = rk.logprobs_from_logits(logits, torch.zeros(2, 0, dtype=torch.int64))
    assert none.shape == (2, 0) and not torch.autograd.grad(none.sum(), logits)[0].any()
    entropy = rk.logprobs_and_entropy_from_logits(logits, torch.zeros(2, 0, dtype=torch.int32))[1]
    assert torch.equal(entropy.detach(), torch.zeros(2))
    assert rk.logprobs_from_logits(torch.zeros(0, 5), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
    one = rk.logprobs_from_logits(torch.zeros(5), torch.tensor([4]))
    torch.testing.assert_close(one, torch.tensor([-math.log(5)]))
    single = rk.logprobs_from_logits(logits, torch.tensor([[3], [1]]))
    torch.testing.assert_close(single.squeeze(-1), rk.logprobs_from_logits(logits, torch.tensor([3, 1])))


def test_masks_temperatures_and_planes(backend_name):
    """Of a slice, with a mask and a temperature of each row: as the dense rows, each alone."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 4, 9, generator=generator)
    labels, mask = torch.randint(0, 9, (2, 3, 2), generator=generator), torch.tensor([[1, 0, 1], [1, 1, 0]])
    heat = 0.5 + torch.rand(2, 3, generator=generator)
    leaf = base.clone().requires_grad_()
    found = rk.logprobs_from_logits(leaf[:, :-1], labels, row_mask=mask, temperature=heat)
    exact = base.clone().requires_grad_()
    log_p = (exact[:, :-1] / heat.unsqueeze(-1)).log_softmax(-1).gather(-1, labels) * mask.unsqueeze(-1)
    torch.testing.assert_close(found, log_p, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x.square().sum(), y)[0] for x, y in ((found, leaf), (log_p, exact)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_inplace_backward(backend_name, scale):
    """The gradient lies where the logits were, those of the labels too, which it needs."""
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(3, 4, 6, generator=generator, requires_grad=True)
    labels = torch.randint(0, 6, (3, 3, 2), generator=generator)
    (wanted,) = torch.autograd.grad(rk.logprobs_from_logits(leaf[:, 1:], labels, **SCALES[scale]).square().sum(), leaf)
    logits = (leaf * 1.0)[:, 1:]
    rk.logprobs_from_logits(logits, labels, inplace_backward=True, **SCALES[scale]).square().sum().backward()
    assert torch.equal(leaf.grad, wanted) and torch.equal(logits.detach(), wanted[:, 1:])


def test_the_row_is_read_once(backend_name, monkeypatch):
    """A backend sees the rows in one call, and besides only rows of one entry."""
    seen = []
    backend = importlib.import_module(f"rlhf_kernels.{backend_name}.logprobs")
    forward = backend.logprobs_fwd
    monkeypatch.setattr(backend, "logprobs_fwd", lambda *args: seen.append(tuple(args[0].shape)) or forward(*args))
    rk.logprobs_from_logits(torch.randn(3, 8), torch.randint(0, 8, (3, 5)))
    assert sorted(seen) == [(3, 5, 1), (3, 8)]


def test_pairs_are_compared_a_few_rows_at_a_time(backend_name, monkeypatch):
    logits, labels = inputs()
    results = []
    for pairs in (_several_labels.PAIRS, 16):
        monkeypatch.setattr(_several_labels, "PAIRS", pairs)
        leaf = logits.clone().requires_grad_()
        x = rk.logprobs_from_logits(leaf, labels)
        results.append(torch.autograd.grad(torch.where(x.isfinite(), x, 0.0).square().sum(), leaf)[0])
    assert torch.equal(*results)


def test_labels_out_of_range(backend_name, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    logits = torch.randn(3, 4, requires_grad=True)
    labels = torch.tensor([[1, 2], [4, 0], [-100, 3]])
    with pytest.raises(ValueError, match=r"labels holds 4 at position \[1, 0\], expected values in \[0, 4\)"):
        rk.logprobs_from_logits(logits, labels)
    monkeypatch.setattr("rlhf_kernels.logprobs.reads_values", lambda tensor: False)
    found = rk.logprobs_and_entropy_from_logits(logits, labels)
    assert found[0].isnan().tolist() == [[False, False], [True, True], [False, False]]
    assert found[1].isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(found[0].sum(), logits)
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


def test_bad_shapes():
    for shape in ((2,), (3, 2, 1), (2, 2)):
        with pytest.raises(
            ValueError, match=r"labels has shape .*, expected .* \(the shape of logits without its last"
        ):
            rk.logprobs_from_logits(torch.zeros(3, 4), torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"row_mask has shape \[3, 2\], expected \[3\]"):
        rk.logprobs_from_logits(
            torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64), row_mask=torch.ones(3, 2, dtype=torch.bool)
        )
