"""linear_cross_entropy with smoothed labels, a z-loss, weights and dynamic fine-tuning."""

import math

import pytest
import torch
import torch.nn.functional as F

import rlhf_kernels as rk
from rlhf_kernels import _cross_entropy_ops as ops
from rlhf_kernels import _linear_walk
from rlhf_kernels.reference import cross_entropy as definition
from rlhf_kernels.reference import linear as reference
from rlhf_kernels.reference.logprobs import scale_logits

OP = "cross_entropy"
LEAVES = ("hidden_states", "weight", "bias")
TERMS = {
    "smoothed": {"label_smoothing": 0.1},
    "uniform": {"label_smoothing": 1.0},
    "z": {"z_loss": 0.01},
    "dft": {"loss_type": "dft"},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3},
}
OF_DTYPES = [*((torch.float32, terms) for terms in TERMS), (torch.bfloat16, "all"), (torch.float16, "all")]
CASES = [case for case in reference.CASES if case != "banned"]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_leaves(inputs, dtype):
    """The inputs with fresh leaves in `dtype`, and the list of these leaves."""
    leaves = {k: inputs[k].detach().to(dtype, copy=True).requires_grad_() for k in LEAVES if inputs.get(k) is not None}
    return {**inputs, **leaves}, list(leaves.values())


def weights_of(inputs):
    weights = torch.linspace(-1.0, 2.0, inputs["labels"].numel(), dtype=torch.float64)
    return torch.where(weights.abs() < 0.1, 0.0, weights).to(inputs["labels"].device)


def exact(inputs, weights, loss_type="nll", **terms):
    """(leaves, losses) of the definition on float64 logits."""
    inputs, leaves = with_leaves(inputs, torch.float64)
    wide = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()}
    scale = wide.pop("temperature", 1.0), wide.pop("softcap", None)
    labels = torch.where(weights == 0, -100, wide["labels"])
    logits = reference.full_logits(wide.pop("hidden_states"), wide.pop("weight"), **{**wide, "labels": labels})
    z = scale_logits(torch.where((labels != -100)[:, None], logits, 0.0), *scale)[0]
    return leaves, definition.cross_entropy(z, labels, weights, dft=loss_type == "dft", **terms)


def upstream_of(losses):
    return torch.linspace(-1.0, 2.0, losses.numel(), dtype=torch.float64).view(losses.shape).to(losses)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "terms"), OF_DTYPES, ids=str)
def test_values_and_gradients(backend_name, dtype, case, terms, reduction, assert_close_to_fp64):
    """In chunks of 4 tokens; a trained head and a frozen one."""
    inputs = reference.example_inputs(case, dtype=dtype)
    weights = weights_of(inputs)
    leaves64, losses64 = exact(inputs, weights, **TERMS[terms])
    count = max(int((inputs["labels"] != -100).sum()), 1)
    wanted = losses64 if reduction == "none" else losses64.sum() / count
    grads64 = torch.autograd.grad(wanted, leaves64, upstream_of(wanted))
    inputs, leaves = with_leaves(inputs, dtype)
    for trained in (leaves, leaves[:1]):
        for leaf in leaves[1:]:
            leaf.requires_grad_(len(trained) > 1)
        loss = rk.linear_cross_entropy(
            **inputs, weights=weights.to(dtype), reduction=reduction, chunk_size=4, **TERMS[terms]
        )
        assert loss.dtype == torch.float32
        assert_close_to_fp64(loss, wanted, dtype, scale=2)
        for grad, grad64 in zip(torch.autograd.grad(loss, trained, upstream_of(loss)), grads64):
            assert grad.dtype == dtype
            assert_close_to_fp64(grad, grad64, dtype, scale=4, gradient=True)


@pytest.mark.parametrize("smoothing", (0.0, 0.3))
def test_reference_independent(backend_name, smoothing):
    """Against torch's own linear and cross_entropy, and autograd through them; the z-loss by torch.logsumexp."""
    hidden, head, bias = normal(2, 5, 6), normal(11, 6, seed=1), normal(11, seed=2)
    labels = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    labels[0, 1] = -100
    leaves = [x.clone().requires_grad_() for x in (hidden, head, bias)]
    ours = rk.linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], label_smoothing=smoothing, z_loss=0.1)
    grads = torch.autograd.grad(ours, leaves)
    logits = F.linear(*leaves).flatten(0, 1)
    theirs = F.cross_entropy(logits, labels.flatten(), label_smoothing=smoothing)
    squares = logits.logsumexp(-1).square()[labels.flatten() != -100]
    theirs = theirs + 0.1 * squares.mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grads, torch.autograd.grad(theirs, leaves))


def test_dft_by_hand(backend_name):
    """One token with p = 0.15: its loss is 0.15 * 1.897, its gradient 0.15 times that of the nll."""
    head = torch.tensor([[math.log(0.15)], [math.log(0.85)]])
    hidden = torch.ones(1, 1).requires_grad_()
    loss = rk.linear_cross_entropy(hidden, head, torch.tensor([0]), loss_type="dft")
    assert loss.item() == pytest.approx(-0.15 * math.log(0.15), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, hidden)
    slope = (0.15 - 1.0) * math.log(0.15) + 0.85 * math.log(0.85)
    assert grad.item() == pytest.approx(0.15 * slope, rel=1e-5)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_banned_tokens_take_no_smoothing(backend_name, reduction):
    """A bias of -inf: the same as a head without these tokens, where PyTorch's smoothed loss is inf."""
    hidden, head, labels = normal(5, 6), normal(11, 6, seed=1), torch.tensor([0, 4, 2, -100, 6])
    bias = torch.where(torch.arange(11) < 7, 0.0, -math.inf)
    found = []
    for weight, b in ((head, bias), (head[:7], None)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        options = {"label_smoothing": 0.2, "z_loss": 0.1, "reduction": reduction}
        loss = rk.linear_cross_entropy(*leaves, labels, bias=b, **options)
        grads = torch.autograd.grad(loss, leaves, upstream_of(loss))
        assert not grads[1][7:].any()
        found.append((loss, grads[0], grads[1][:7]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("terms", TERMS)
def test_masked_garbage(backend_name, terms):
    """Hidden states and weights of labels that are ignored, or weigh nothing, may be NaN, their upstream too."""
    hidden, head, labels = normal(5, 6), normal(11, 6, seed=1), torch.tensor([1, -100, 3, 6, 5])
    weights, upstream = torch.tensor([1.0, 1.0, -2.0, 0.0, 0.5]), torch.tensor([1.0, 1.0, 2.0, 1.0, -1.0])
    found = []
    for garbage in (False, True):
        x, w, u = hidden.clone(), weights.clone(), upstream.clone()
        if garbage:
            x[1], x[3] = math.nan, math.inf
            w[1] = u[1] = u[3] = math.nan
        leaves = [x.requires_grad_(), head.clone().requires_grad_()]
        each = rk.linear_cross_entropy(*leaves, labels, weights=w, reduction="none", **TERMS[terms])
        mean = rk.linear_cross_entropy(*leaves, labels, weights=w, **TERMS[terms])
        found.append((each, mean, *torch.autograd.grad(each, leaves, u), *torch.autograd.grad(mean, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not found[1][0][[1, 3]].any() and not found[1][2][[1, 3]].any()


@pytest.mark.parametrize("terms", TERMS)
def test_edges(backend_name, terms):
    """Nothing counts, nothing is there, nothing is allowed."""
    hidden, head = normal(3, 6).requires_grad_(), normal(11, 6, seed=1).requires_grad_()
    for labels, x in ((torch.full((3,), -100), hidden), (torch.zeros(0, dtype=torch.int64), hidden[:0])):
        loss = rk.linear_cross_entropy(x, head, labels, **TERMS[terms])
        grads = torch.autograd.grad(loss, (hidden, head))
        assert loss.item() == 0.0 and not grads[0].any() and not grads[1].any()
    banned = torch.full((11,), -math.inf)
    each = rk.linear_cross_entropy(hidden, head, torch.arange(3), bias=banned, reduction="none", **TERMS[terms])
    grads = torch.autograd.grad(each, (hidden, head), torch.ones(3))
    assert not each.isnan().any() and not grads[0].any() and not grads[1].any()


def test_narrow_chunks(isa, assert_close_to_fp64, monkeypatch):
    """Chunks of 5 columns: sums of a row that come from several of them."""
    monkeypatch.setattr(_linear_walk, "NARROW", 5)
    monkeypatch.setattr(_linear_walk, "TOKENS", 4)
    inputs = reference.example_inputs("rich", dtype=torch.float32)
    leaves64, losses64 = exact(inputs, weights_of(inputs), **TERMS["all"])
    inputs, leaves = with_leaves(inputs, torch.float32)
    each = rk.linear_cross_entropy(**inputs, weights=weights_of(inputs), reduction="none", **TERMS["all"])
    assert_close_to_fp64(each, losses64, torch.float32)
    grads64 = torch.autograd.grad(losses64, leaves64, upstream_of(losses64))
    for grad, grad64 in zip(torch.autograd.grad(each, leaves, upstream_of(each)), grads64):
        assert_close_to_fp64(grad, grad64, torch.float32)


def test_terms_cost_no_gradient_of_what_is_frozen(backend_name):
    """The operators return nothing for a head that is not trained, and one product less."""
    hidden, head, labels = normal(4, 6), normal(11, 6, seed=1), torch.arange(4)
    inputs, scale = (hidden, head, labels, *(None,) * 6), (1.0, None, -100, 0.1, 0.1, False)
    kept = ops.linear_cross_entropy_fwd(*inputs, *scale, 0, False, "", 0, [True] + [False] * 4)
    assert [x.numel() for x in kept[1:]] == [hidden.numel(), 0, 0, 0, 0]
    each = ops.linear_cross_entropy_each_fwd(*inputs, *scale, True, 0, False, "", 0)
    assert [x.numel() for x in each] == [4, 0, 0, 0, 0, hidden.numel()]


def test_bad_input(backend_name):
    hidden, head, labels = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    bad = [
        ({"label_smoothing": -0.1}, "label_smoothing must be a number >= 0.0 and <= 1.0, got -0.1"),
        ({"z_loss": math.inf}, "z_loss must be a number >= 0.0 and < inf, got inf"),
        ({"weights": torch.ones(3)}, "weights has shape [3], expected [2] (the shape of labels)"),
        ({"weights": torch.ones(2).bool()}, "weights has dtype bool"),
        ({"loss_type": "chunked_nll"}, "loss_type must be one of 'nll', 'dft', got 'chunked_nll'"),
        ({"loss_type": "dft", "label_smoothing": 0.1}, "label_smoothing must be 0 with loss_type='dft', got 0.1"),
        ({"labels": labels[:1], "weights": torch.ones(2)}, "labels has shape [1], expected [2]"),
    ]
    for change, message in bad:
        for reduction in ("mean", "none"):
            with pytest.raises(ValueError) as error:
                rk.linear_cross_entropy(
                    **{"hidden_states": hidden, "weight": head, "labels": labels, "reduction": reduction, **change}
                )
            assert message in str(error.value)


def test_opcheck(backend_name):
    hidden, head, bias = (x.requires_grad_() for x in (normal(5, 4), normal(7, 4, seed=1), normal(7, seed=2)))
    labels, rows, warm = torch.tensor([1, 0, -100]), torch.tensor([4, 4, 0]), torch.tensor([0.5, 1.0, 2.0])
    low, up = normal(5, 2, seed=3).requires_grad_(), normal(7, 2, seed=4).requires_grad_()
    inputs = (hidden, head, labels, rows, bias, warm, low, up, torch.tensor([1.0, -2.0, 0.5]))
    terms = (0.1, 0.01, False)
    each, fused = ops.linear_cross_entropy_each_fwd, ops.linear_cross_entropy_fwd
    torch.library.opcheck(fused, (*inputs, 1.0, 3.0, -100, *terms, 2, False, "", 0, [True] * 5))
    torch.library.opcheck(each, (*inputs, 1.0, 3.0, -100, *terms, False, 2, False, "", 0))
    frozen = (hidden, head.detach(), labels, rows, *(None,) * 5)
    torch.library.opcheck(each, (*frozen, 1.0, None, -100, 0.0, 0.0, True, True, 2, False, "", 0))
