"""cross_entropy_from_logits: the seven questions."""

import math

import pytest
import torch
import torch.nn.functional as F

import rlhf_kernels as rk
from rlhf_kernels import _cross_entropy_ops as ops
from rlhf_kernels import logprobs as logprobs_module
from rlhf_kernels.reference import cross_entropy as reference

TERMS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "uniform": {"label_smoothing": 1.0},
    "z": {"z_loss": 0.01},
    "dft": {"dft": True},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3},
}
OF_DTYPES = [
    *((dtype, terms) for dtype in (torch.float32, torch.float64) for terms in TERMS),
    *((dtype, terms) for dtype in (torch.bfloat16, torch.float16) for terms in ("dft", "all")),
]


def public(inputs, dft=False, **options):
    return rk.cross_entropy_from_logits(**inputs, loss_type="dft" if dft else "nll", **options)


def exact(inputs, **terms):
    """(leaf, losses) of the definition in float64."""
    wide = {k: x.detach().double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()}
    wide["logits"].requires_grad_()
    return wide["logits"], reference.cross_entropy(**wide, **terms)


def upstream_of(losses):
    return torch.linspace(-1.0, 2.0, losses.numel(), dtype=torch.float64).view(losses.shape).to(losses)


@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize(("dtype", "terms"), OF_DTYPES, ids=str)
def test_values_and_gradients(backend_name, served, dtype, case, terms, assert_close_to_fp64):
    served(dtype)
    inputs = reference.example_inputs(case, dtype=dtype)
    leaf64, losses64 = exact(inputs, **TERMS[terms])
    inputs["logits"].requires_grad_()
    losses = public(inputs, reduction="none", **TERMS[terms])
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    assert losses.dtype == accumulator and losses.shape == inputs["labels"].shape
    assert_close_to_fp64(losses, losses64, accumulator, scale=2)
    (grad,) = torch.autograd.grad(losses, inputs["logits"], upstream_of(losses))
    (grad64,) = torch.autograd.grad(losses64, leaf64, upstream_of(losses64))
    assert grad.dtype == dtype
    # Autograd rounds its own sums over V entries: by 31 eps on one processor, where the tested gradient is exact.
    scale = 1 + inputs["logits"].shape[-1] ** 0.5 if dtype == torch.float64 else 1
    assert_close_to_fp64(grad, torch.where(inputs["logits"].isneginf(), 0.0, grad64), dtype, scale=scale)


def test_reference_by_hand(backend_name):
    """One token with p = (0.15, 0.85), and logits whose sum of exps is e^2."""
    logits = torch.log(torch.tensor([[0.15, 0.85]]))
    cost = -math.log(0.15)
    other = -math.log(0.85)
    label = torch.tensor([0])
    assert public({"logits": logits, "labels": label}).item() == pytest.approx(cost, rel=1e-6)
    smoothed = public({"logits": logits, "labels": label}, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.95 * cost + 0.05 * other, rel=1e-6)
    raised = public({"logits": logits + 2.0, "labels": label}, z_loss=0.5)
    assert raised.item() == pytest.approx(cost + 0.5 * 4.0, rel=1e-6)
    logits.requires_grad_()
    tuned = public({"logits": logits, "labels": label}, dft=True)
    assert tuned.item() == pytest.approx(0.15 * cost, rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(tuned, logits)[0], 0.15 * torch.tensor([[0.15 - 1.0, 0.85]]))


@pytest.mark.parametrize("smoothing", (0.0, 0.3, 1.0))
def test_reference_independent(backend_name, smoothing):
    """Against torch's own, value and gradient, for each reduction."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 13, generator=generator).requires_grad_()
    labels = torch.tensor([3, -100, 12, 0, 7])
    for reduction in ("mean", "sum", "none"):
        ours = rk.cross_entropy_from_logits(logits, labels, label_smoothing=smoothing, reduction=reduction)
        theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(x, logits, upstream_of(x)) for x in (ours, theirs)]
        torch.testing.assert_close(*grads)


def test_normalisers(backend_name):
    """The mean is over labels, or over what the caller counts; weights do not change the count."""
    logits = torch.zeros(4, 8)
    labels, weights = torch.tensor([1, 2, -100, 3]), torch.tensor([2.0, 0.0, math.nan, 1.0])
    each = math.log(8)
    options = {"weights": weights}
    assert rk.cross_entropy_from_logits(logits, labels, **options).item() == pytest.approx(3 * each / 3)
    assert rk.cross_entropy_from_logits(logits, labels, **options, reduction="sum").item() == pytest.approx(3 * each)
    for count in (10, torch.tensor(10)):
        loss = rk.cross_entropy_from_logits(logits, labels, **options, num_items_in_batch=count)
        assert loss.item() == pytest.approx(3 * each / 10)
    weights = weights.nan_to_num().requires_grad_()
    loss = rk.cross_entropy_from_logits(logits.requires_grad_(), labels, weights=weights)
    assert torch.autograd.grad(loss, weights, allow_unused=True) == (None,)


@pytest.mark.parametrize("terms", ("smoothed", "z", "dft", "all"))
def test_masked_garbage(backend_name, terms):
    """Logits, weights and upstream gradients of labels that are ignored, or weigh nothing, may be NaN."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    labels, weights = torch.tensor([1, -100, 3, 6, 5]), torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5])
    found = []
    for garbage in (False, True):
        x, w, upstream = logits.clone(), weights.clone(), torch.tensor([1.0, 1.0, -1.0, 1.0, 2.0])
        if garbage:
            x[1], x[3] = math.nan, math.inf
            w[1] = upstream[1] = upstream[3] = math.nan
        x.requires_grad_()
        losses = public({"logits": x, "labels": labels}, weights=w, reduction="none", **TERMS[terms])
        found.append((losses.detach(), *torch.autograd.grad(losses, x, upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not found[1][0][[1, 3]].any() and not found[1][1][[1, 3]].any()


@pytest.mark.parametrize("terms", TERMS)
def test_edges(backend_name, terms):
    """Nothing counts; nothing is there; nothing is allowed; the label is banned; logits in any layout."""
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nothing = public({"logits": logits, "labels": torch.full((3,), -100)}, **TERMS[terms])
    assert nothing.item() == 0.0 and not torch.autograd.grad(nothing, logits)[0].any()
    assert public({"logits": logits[:0], "labels": torch.zeros(0, dtype=torch.int64)}, **TERMS[terms]).item() == 0.0
    dead = torch.full((1, 5), -math.inf).requires_grad_()
    loss = public({"logits": dead, "labels": torch.tensor([2])}, reduction="none", **TERMS[terms])
    assert not loss.isnan().any() and not torch.autograd.grad(loss, dead, torch.ones(1))[0].any()
    banned = torch.tensor([[0.0, -math.inf, 1.0, 2.0, 3.0]]).requires_grad_()
    loss = public({"logits": banned, "labels": torch.tensor([1])}, reduction="none", **TERMS[terms])
    finite = terms in ("uniform", "dft")
    assert loss.isfinite().item() == finite and (finite or loss.item() == math.inf)
    (grad,) = torch.autograd.grad(loss, banned, torch.ones(1))
    assert grad.isfinite().all() and grad[0, 1] == 0
    wide = torch.randn(4, 3, 14, generator=torch.Generator().manual_seed(0))
    sliced, labels = wide[:, 1:, ::2], torch.arange(8).view(4, 2) % 7
    ours, whole = (public({"logits": x, "labels": labels}, **TERMS[terms]) for x in (sliced, sliced.contiguous()))
    assert torch.equal(ours, whole)


def test_banned_tokens_take_no_smoothing(backend_name):
    """The same as the loss without them, where PyTorch's is inf."""
    logits, labels = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 2])
    fewer, wanted = logits[:, :5].clone().requires_grad_(), logits.clone()
    wanted[:, 5:] = -math.inf
    wanted.requires_grad_()
    losses = [public({"logits": x, "labels": labels}, label_smoothing=0.2, z_loss=0.1) for x in (wanted, fewer)]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (wanted, fewer))]
    torch.testing.assert_close(grads[0][:, :5], grads[1])
    assert not grads[0][:, 5:].any()


def test_bad_input(backend_name, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    bad = [
        ({"logits": logits.long()}, "logits has dtype int64"),
        ({"logits": torch.zeros(2, 0)}, "logits has shape [2, 0], expected [..., V] with V >= 1"),
        ({"labels": labels[:1]}, "labels has shape [1], expected [2]"),
        ({"labels": labels.float()}, "labels has dtype float32"),
        ({"labels": torch.tensor([0, 5])}, "labels holds 5 at position [1], expected values in [0, 5)"),
        ({"label_smoothing": 1.5}, "label_smoothing must be a number >= 0.0 and <= 1.0, got 1.5"),
        ({"z_loss": -1.0}, "z_loss must be a number >= 0.0 and < inf, got -1.0"),
        ({"weights": torch.ones(3)}, "weights has shape [3], expected [2] (the shape of labels)"),
        ({"weights": torch.ones(2).long()}, "weights has dtype int64"),
        (
            {"weights": torch.ones(2, device="meta")},
            f"weights is on meta, expected {labels.device}, where labels is",
        ),
        ({"loss_type": "focal"}, "loss_type must be one of 'nll', 'dft', got 'focal'"),
        ({"loss_type": "dft", "label_smoothing": 0.1}, "label_smoothing must be 0 with loss_type='dft', got 0.1"),
        ({"reduction": "avg"}, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"reduction": "sum", "num_items_in_batch": 3}, "num_items_in_batch needs reduction='mean', got"),
        ({"num_items_in_batch": 0}, "num_items_in_batch must be a number > 0, got 0"),
        ({"num_items_in_batch": torch.ones(1)}, "num_items_in_batch has shape [1], expected [] (a number or"),
        ({"temperature": 0}, "temperature must be a number > 0.0 and < inf, got 0"),
        ({"softcap": -1}, "softcap must be a number > 0.0 and < inf, got -1"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError) as error:
            rk.cross_entropy_from_logits(**{"logits": logits, "labels": labels, **change})
        assert message in str(error.value)


def test_out_of_range_without_check(backend_name, monkeypatch):
    """Where labels may not be read, as on a GPU, such rows become NaN, and no other."""
    monkeypatch.setattr(logprobs_module, "reads_values", lambda tensor: False)
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = public({"logits": logits, "labels": torch.tensor([1, 5, 2])}, label_smoothing=0.1, reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(losses, logits, torch.ones(3))
    assert grad.isnan().any(-1).tolist() == [False, True, False]


def test_opcheck(backend_name):
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, weights = torch.tensor([1, -100, 6, 0]), torch.tensor([1.0, 2.0, -1.0, 0.5])
    torch.library.opcheck(ops.cross_entropy_fwd, (logits, labels, weights, 0.7, 4.0, -100, 0.1, 0.01, False))
    torch.library.opcheck(ops.cross_entropy_fwd, (logits, labels, None, 1.0, None, -100, 0.0, 0.0, True))


def test_same_answer(backend_name):
    """Same bits on every run; a row does not see its neighbours."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, options = torch.arange(4), {"label_smoothing": 0.1, "z_loss": 0.1, "reduction": "none"}
    runs = []
    for x in (logits, logits, torch.cat([logits[:2], 50 * logits[2:]])):
        losses = rk.cross_entropy_from_logits(x, labels, **options)
        runs.append((losses[:2].detach(), torch.autograd.grad(losses[:2].sum(), logits)[0][:2]))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))
