"""The op `linear` with heads that are not trained, dtypes that differ, rounded factors, and KL at some rows only."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import rlhf_kernels as rk
from rlhf_kernels.reference import linear as reference
from rlhf_kernels.reference.kl import kl_divergence

OP = "linear"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32))


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact_hidden_gradient(inputs, upstream):
    """(log-probs, d hidden) of the definition with full logits in float64."""
    wide = {k: x.detach().double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()}
    hidden = wide.pop("hidden_states").requires_grad_()
    logprobs, _ = reference.linear_logprobs(hidden, **wide)
    finite = torch.where(logprobs.isfinite(), logprobs, 0.0)
    return logprobs.detach(), torch.autograd.grad((finite * upstream.double()).sum(), hidden)[0]


@pytest.mark.parametrize("chunk_size", (None, 1, 4))
@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_head(backend_name, dtype, case, chunk_size, assert_close_to_fp64):
    """The forward makes d log p / d hidden; the upstream gradient of an ignored label may be NaN."""
    inputs = reference.example_inputs(case, dtype=dtype)
    labels = inputs["labels"]
    upstream = torch.linspace(-1.0, 2.0, labels.numel()).view(labels.shape).to(labels.device)
    logprobs64, wanted = exact_hidden_gradient(inputs, upstream)
    hidden = inputs["hidden_states"].requires_grad_()
    logprobs = rk.linear_logprobs(**inputs, chunk_size=chunk_size)
    assert_close_to_fp64(logprobs, logprobs64, torch.float32)
    upstream = torch.where(labels == -100, math.nan, torch.where(logprobs.isfinite(), upstream, 0.0))
    (grad,) = torch.autograd.grad(logprobs, hidden, upstream, retain_graph=True)
    assert grad.dtype == dtype
    assert_close_to_fp64(grad, wanted, dtype, gradient=True)
    assert torch.equal(grad, torch.autograd.grad(logprobs, hidden, upstream)[0])


def test_frozen_head_makes_its_gradient_in_the_forward(backend_name, monkeypatch):
    """No recomputation: the backward works without the operator that makes logits again, and without the head."""
    from rlhf_kernels import _linear_ops as ops

    hidden, head, labels = normal(5, 6).requires_grad_(), normal(11, 6, seed=1), torch.arange(5)
    ref = normal(5, 6, seed=2)
    logprobs, kl = rk.linear_logprobs(hidden, head, labels), rk.linear_kl(hidden, head, ref, head)
    wanted = torch.autograd.grad(
        F.log_softmax(hidden @ head.t(), -1)[labels, labels].sum()
        + kl_divergence(hidden @ head.t(), ref @ head.t()).sum(),
        hidden,
    )
    for name in ("linear_logprobs_bwd", "linear_kl_bwd"):
        monkeypatch.setattr(ops, name, None)
    head.fill_(math.nan)
    torch.testing.assert_close(torch.autograd.grad(logprobs.sum() + kl.sum(), hidden), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("direction", ("reverse", "forward"))
@pytest.mark.parametrize("trained", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kl_at_rows(backend_name, dtype, trained, direction, assert_close_to_fp64):
    """Some rows only, one of them twice; a trained and a frozen head; the reference has another width."""
    hidden, head, ref_hidden, ref_head = (
        normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(((6, 5), (11, 5), (6, 3), (11, 3)))
    )
    hidden[2], ref_hidden[2] = math.nan, math.inf  # no row asks for it
    rows = torch.tensor([4, 0, 0, 5])
    leaves = [hidden.requires_grad_(), head.requires_grad_(trained)]
    options = {"temperature": 0.8, "direction": direction}
    kl = rk.linear_kl(hidden, head, ref_hidden, ref_head, rows=rows, chunk_size=3, **options)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    kl64 = kl_divergence(wide[0][rows] @ wide[1].t(), (ref_hidden.double() @ ref_head.double().t())[rows], **options)
    assert_close_to_fp64(kl, kl64, torch.float32)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    wanted = (x for x in wide if x.requires_grad)
    got = torch.autograd.grad((kl * weights).sum(), [x for x in leaves if x.requires_grad])
    for grad, grad64 in zip(got, torch.autograd.grad((kl64 * weights.double()).sum(), list(wanted)), strict=True):
        assert grad.dtype == dtype
        assert_close_to_fp64(grad, grad64, dtype, scale=2, gradient=True)
    assert not got[0][[1, 2, 3]].any()


def test_kl_bad_rows(backend_name, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    hidden, head = torch.zeros(2, 4), torch.zeros(5, 4)
    bad = [
        ({"rows": torch.tensor([0, 2])}, "rows holds values outside [0, 2), the rows of hidden_states"),
        ({"rows": torch.zeros(2)}, "rows has dtype float32"),
        ({"rows": torch.zeros(1, 1, dtype=torch.int64)}, "rows has shape [1, 1], expected [*] ([M])"),
        ({"precision": "bf16"}, "precision must be one of 'exact', 'fast', got 'bf16'"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError) as error:
            rk.linear_kl(hidden, head, hidden, head, **options)
        assert message in str(error.value)
    with pytest.raises(ValueError, match=r"hidden_states has shape \[1, 2, 4\], expected \[N, H\] to go with rows"):
        rk.linear_kl(hidden[None], head, hidden[None], head, rows=torch.tensor([0]))


def losses(hidden, head, labels, **options):
    """All four functions in one row: log-probs, entropy, cross-entropy, PPO loss, KL to a shifted copy."""
    logprobs, entropy = rk.linear_logprobs(hidden, head, labels, return_entropy=True, **options)
    old, mask = torch.full((1, len(labels)), -2.0), (labels != -100)[None]
    ppo = rk.linear_ppo_loss(hidden[None], head, labels[None], old, old, mask, entropy_coef=0.1, **options)
    kl = rk.linear_kl(hidden, head, hidden.detach().flip(0), head.detach(), **options)
    cross_entropy = rk.linear_cross_entropy(hidden, head, labels, reduction="sum", **options)
    return torch.cat([logprobs, entropy, kl, cross_entropy[None], ppo.loss[None]])


@pytest.mark.parametrize("precision", ("exact", "fast"))
@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_mixed_dtypes(backend_name, dtypes, precision, assert_close_to_fp64):
    """Hidden states and head of different dtypes: products of what was given, gradients in each one's dtype."""
    hidden, head = normal(9, 16, dtype=dtypes[0]).requires_grad_(), normal(13, 16, dtype=dtypes[1], seed=1)
    head.requires_grad_()
    labels = torch.tensor([3, 12, -100, 0, 5, 5, 1, 2, 9])
    found = losses(hidden, head, labels, precision=precision, chunk_size=4)
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
    with rk.backend("reference"):
        wanted = losses(*wide, labels)
        weights = torch.linspace(-1, 2, len(wanted), dtype=torch.float64)
        grads64 = torch.autograd.grad((wanted * weights).sum(), wide)
    grads = torch.autograd.grad((found * weights.float()).sum(), (hidden, head))
    assert [g.dtype for g in grads] == list(dtypes)
    if precision == "exact":
        assert_close_to_fp64(found, wanted, torch.float32)
        for grad, grad64, dtype in zip(grads, grads64, dtypes):
            assert_close_to_fp64(grad, grad64, dtype, scale=4, gradient=True)
    else:  # a factor rounded to a half dtype is off by half a unit in its last place
        assert (found.double() - wanted).norm() <= 2**-7 * wanted.norm()
        for grad, grad64 in zip(grads, grads64):
            assert (grad.double() - grad64).norm() <= 2**-6 * grad64.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fast(backend_name, dtype, assert_close_to_fp64):
    """Exact but for bf16 on the cpu backend: logits and products of gradients are rounded to bf16, without bias."""
    hidden, head = normal(40, 64, dtype=dtype).requires_grad_(), normal(300, 64, dtype=dtype, seed=1).requires_grad_()
    labels = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0))
    found = rk.linear_logprobs(hidden, head, labels, return_entropy=True, precision="fast")
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
    wanted = reference.linear_logprobs(*wide, labels)
    grads = torch.autograd.grad(sum(x.sum() for x in found), (hidden, head))
    grads64 = torch.autograd.grad(sum(x.sum() for x in wanted), wide)
    if (backend_name, dtype) != ("cpu", torch.bfloat16):
        for a, b in zip(found, wanted, strict=True):
            assert_close_to_fp64(a, b, torch.float32, scale=2)
        for grad, grad64 in zip(grads, grads64, strict=True):
            assert grad.dtype == dtype
            assert (grad.double() - grad64).norm() <= max(2 * torch.finfo(dtype).eps, 1e-5) * grad64.norm()
        return
    half_unit = torch.finfo(dtype).eps / 2 * (wide[0] @ wide[1].t()).abs().max()  # of the largest logit
    for a, b in zip(found, wanted, strict=True):
        gap = a.double() - b
        assert 1e-4 < gap.abs().max() <= 2 * half_unit * 8 and gap.mean().abs() <= 4 * gap.std() / len(gap) ** 0.5
    for grad, grad64 in zip(grads, grads64, strict=True):
        assert (grad.double() - grad64).norm() <= 2**-4 * grad64.norm()
    loss = rk.linear_cross_entropy(hidden, head, labels, precision="fast", chunk_size=8)
    (d_head,) = torch.autograd.grad(loss, head)
    (d_head64,) = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].t(), labels), wide[1])
    assert d_head.dtype == dtype and (d_head.double() - d_head64).norm() <= 2**-4 * d_head64.norm()


def test_gradient_checkpointing(backend_name):
    """A checkpointed layer in front, and a loss inside a checkpoint: the same bits as without."""
    layer, head, labels = torch.nn.Linear(6, 6), normal(11, 6, seed=1).requires_grad_(), torch.tensor([3, -100, 0, 10])
    x = normal(4, 6).requires_grad_()

    def loss(x):
        hidden = torch.tanh(layer(x))
        return rk.linear_cross_entropy(hidden, head, labels) + rk.linear_logprobs(hidden, head, labels).sum()

    leaves = (x, head, *layer.parameters())
    plain = torch.autograd.grad(loss(x), leaves)
    for use_reentrant in (False, True):
        total = checkpoint(loss, x, use_reentrant=use_reentrant)
        if use_reentrant:  # this form works with backward() alone
            total.backward()
            found = tuple(leaf.grad for leaf in leaves)
        else:
            found = torch.autograd.grad(total, leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_compile_with_ignored_rows(backend_name):
    """fullgraph, with ignored labels, rows that several labels read, a frozen and a trained head."""

    def loss(hidden, head, labels, rows):
        kept = rk.linear_logprobs(hidden, head, labels, rows=rows).sum()
        kl = rk.linear_kl(hidden, head, hidden.detach().flip(0), head.detach(), rows=rows.clamp(min=0))
        return kept + rk.linear_cross_entropy(hidden, head, labels, rows=rows) + kl.mean()

    labels, rows = torch.tensor([1, -100, 3, 6, 2]), torch.tensor([0, 1, 2, 2, 2])
    for trained in (True, False):
        hidden, head = normal(3, 4).requires_grad_(), normal(7, 4, seed=1).requires_grad_(trained)
        leaves = [hidden, head] if trained else [hidden]
        results = []
        for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
            value = function(hidden, head, labels, rows)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results)
