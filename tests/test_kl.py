"""KL divergences: exact from logits, estimated from log-probs of samples."""

import math

import numpy as np
import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import kl as module
from rlhf_kernels.reference import kl as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIRECTIONS = ("reverse", "forward")
POLICY = torch.tensor([-0.15, -0.30, -0.05, -0.10, -0.08, -0.20, -0.03])
SFT = torch.tensor([-0.20, -0.45, -0.06, -0.12, -0.10, -0.80, -0.04])


def leaves(inputs, dtype):
    return [inputs[name].to(dtype, copy=True).requires_grad_() for name in ("logits", "ref_logits")]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend_name, dtype, case, direction, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=dtype)
    actual, expected = leaves(inputs, dtype), leaves(inputs, torch.float64)
    options = {"temperature": inputs["temperature"], "direction": direction}
    kl, kl64 = rk.kl_from_logits(*actual, **options), reference.kl_divergence(*expected, **options)
    assert kl.dtype == torch.float32
    assert_close_to_fp64(kl, kl64, torch.float32)
    upstream = torch.linspace(-1.5, 2.5, kl.numel(), dtype=torch.float64).view(kl.shape)
    for result, inputs_, weight in ((kl, actual, upstream.float()), (kl64, expected, upstream)):
        (torch.where(torch.isfinite(result), result, 0.0) * weight).sum().backward()
        assert all(x.grad.isfinite().all() for x in inputs_)
    for x, x64 in zip(actual, expected):
        assert x.grad.dtype == dtype
        assert_close_to_fp64(x.grad, x64.grad, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(backend_name, direction):
    logits, ref = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True).unbind()
    options = {"temperature": 0.7, "direction": direction}
    assert torch.autograd.gradcheck(lambda p, q: rk.kl_from_logits(p, q, **options), (logits, ref))
    p, q = torch.tensor([[-1.0, -2.5], [-0.3, -4.0]], dtype=torch.float64, requires_grad=True).unbind()
    for estimator in module.ESTIMATORS:
        assert torch.autograd.gradcheck(lambda p, q, e=estimator: rk.approx_kl(p, q, estimator=e), (p, q))


def test_reference_spec_2_penalty(backend_name):
    """Worked example 3: 0.86 nats, a penalty of 0.0172, an objective of 1.763."""
    total = rk.approx_kl(POLICY, SFT).sum().item()
    assert total == pytest.approx(0.86, abs=1e-6)
    assert 0.02 * total == pytest.approx(0.0172, abs=1e-7)
    assert 2.1 - 0.02 * total + 0.1 * -3.2 == pytest.approx(1.763, abs=5e-4)


def test_reference_independent(backend_name):
    """Against numpy with probabilities, and torch.distributions."""
    generator = np.random.default_rng(0)
    logits, ref = generator.normal(size=(2, 7, 13))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, ref))
    a, b = torch.tensor(logits), torch.tensor(ref)
    np.testing.assert_allclose(rk.kl_from_logits(a, b), (p * np.log(p / q)).sum(-1), atol=1e-12)
    np.testing.assert_allclose(rk.kl_from_logits(a, b, direction="forward"), (q * np.log(q / p)).sum(-1), atol=1e-12)
    categorical = torch.distributions.Categorical
    wanted = torch.distributions.kl_divergence(categorical(logits=a / 2), categorical(logits=b / 2))
    torch.testing.assert_close(rk.kl_from_logits(a, b, temperature=2), wanted)


def test_trap_14_estimators_by_enumeration(backend_name):
    """On 5 tokens: the means of k1 and k3 under the policy are the exact KL; k2's is near; k1 alone can be negative."""
    logits = torch.randn(200, 5, dtype=torch.float64)
    ref = logits + 0.3 * torch.randn(200, 5, dtype=torch.float64)
    log_p, log_q = logits.log_softmax(-1), ref.log_softmax(-1)
    exact = rk.kl_from_logits(logits, ref)
    means = {e: (log_p.exp() * rk.approx_kl(log_p, log_q, estimator=e)).sum(-1) for e in module.ESTIMATORS}
    torch.testing.assert_close(means["k1"], exact)
    torch.testing.assert_close(means["k3"], exact)
    assert ((means["k2"] - exact).abs() / exact).mean() < 0.2
    assert (rk.approx_kl(log_p, log_q) < 0).any()
    assert (rk.approx_kl(log_p, log_q, estimator="k3") >= 0).all()
    assert (exact > 0).all() and torch.equal(rk.kl_from_logits(logits, logits), torch.zeros(200, dtype=torch.float64))


def test_trap_14_k3_is_never_negative(backend_name):
    """Also where rounding decides: differences from 1e-12 to 80, in fp32; relative to fp64 it loses one ulp of d."""
    d = torch.logspace(-12, math.log10(80), 4001)
    for log_probs in (d, -d):
        k3 = rk.approx_kl(log_probs, torch.zeros_like(d), estimator="k3")
        assert (k3 >= 0).all()
        d64 = log_probs.double()
        assert ((k3 - (torch.expm1(-d64) + d64)).abs() <= 2e-7 * torch.maximum(d64.abs(), torch.exp(-d64))).all()


def test_trap_14_gradients_of_estimators(backend_name):
    """As losses on samples: k1's mean gradient is 0, k2's is that of KL(p || q), k3's that of KL(q || p)."""
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, 5, dtype=torch.float64)
    p = logits.softmax(-1).detach()

    def gradient(value):
        return torch.autograd.grad(value.sum(), logits)[0]

    means = {}
    for estimator in module.ESTIMATORS:
        tokens = rk.approx_kl(logits.log_softmax(-1), ref.log_softmax(-1), estimator=estimator)
        means[estimator] = gradient(p * tokens)
    torch.testing.assert_close(means["k1"], torch.zeros_like(p))
    torch.testing.assert_close(means["k2"], gradient(rk.kl_from_logits(logits, ref)))
    torch.testing.assert_close(means["k3"], gradient(rk.kl_from_logits(logits, ref, direction="forward")))


@pytest.mark.parametrize("estimator", module.ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_approx_kl_values_and_gradients(backend_name, dtype, estimator, assert_close_to_fp64):
    log_probs = (-3 * torch.rand(4, 9)).to(dtype).requires_grad_()
    ref = (-3 * torch.rand(4, 9)).to(dtype).requires_grad_()
    p, q = (x.detach().double().requires_grad_() for x in (log_probs, ref))
    kl, kl64 = rk.approx_kl(log_probs, ref, estimator=estimator), reference.approx_kl(p, q, estimator)
    assert_close_to_fp64(kl, kl64, torch.float32)
    upstream = torch.randn(4, 9)
    kl.backward(upstream)
    kl64.backward(upstream.double())
    assert_close_to_fp64(log_probs.grad, p.grad, dtype)
    assert_close_to_fp64(ref.grad, q.grad, dtype)


def test_masked_garbage(backend_name):
    """Entries are independent: garbage in one reaches no other, forward or backward, once its result is dropped."""
    log_probs = torch.tensor([-1.0, math.nan, -2.0], requires_grad=True)
    kl = rk.approx_kl(log_probs, torch.tensor([-1.5, -1.0, -1.0]), estimator="k3")
    assert kl.isnan().tolist() == [False, True, False]
    kl[[0, 2]].sum().backward()
    assert log_probs.grad[[0, 2]].isfinite().all()
    logits = torch.randn(3, 4)
    logits[1] = math.nan
    assert rk.kl_from_logits(logits, torch.randn(3, 4)).isnan().tolist() == [False, True, False]


def test_banned_tokens(backend_name):
    """Tokens that only one side allows: 0 or +inf, as the direction says; equal -inf log-probs differ by 0."""
    inf = math.inf
    logits = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, 0.0], [-inf] * 3], requires_grad=True)
    ref = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -inf], [-inf] * 3], requires_grad=True)
    reverse, forward = (rk.kl_from_logits(logits, ref, direction=d) for d in DIRECTIONS)
    torch.testing.assert_close(reverse, torch.tensor([math.log(1.5), inf, 0.0]))
    torch.testing.assert_close(forward, torch.tensor([inf, math.log(1.5), 0.0]))
    (reverse + forward).sum().backward()
    assert logits.grad.isfinite().all() and ref.grad.isfinite().all()
    assert torch.equal(logits.grad[2], torch.zeros(3)) and torch.equal(ref.grad[2], torch.zeros(3))
    for estimator in module.ESTIMATORS:
        same = torch.tensor([-inf, -1.0])
        assert torch.equal(rk.approx_kl(same, same, estimator=estimator), torch.zeros(2))


def test_edges(backend_name):
    assert rk.kl_from_logits(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    assert rk.kl_from_logits(torch.ones(4), torch.zeros(4)).item() == 0.0
    assert rk.approx_kl(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)
    assert rk.approx_kl(torch.tensor(-1.0), torch.tensor(-3.0)).item() == 2.0
    policy, ref = torch.randn(2, 5, 4, 6).unbind()
    strided = rk.kl_from_logits(policy.transpose(0, 1), ref.transpose(0, 1))
    torch.testing.assert_close(strided, rk.kl_from_logits(policy, ref).t())
    one = torch.randn(1, 6)
    torch.testing.assert_close(
        rk.kl_from_logits(policy[0], one.expand(4, 6)), rk.kl_from_logits(policy[0], one.repeat(4, 1))
    )


def test_mixed_dtypes(backend_name):
    logits, ref = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5).bfloat16().requires_grad_()
    kl = rk.kl_from_logits(logits, ref)
    kl.sum().backward()
    torch.testing.assert_close(kl, rk.kl_from_logits(logits, ref.float()))
    assert (kl.dtype, logits.grad.dtype, ref.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert rk.approx_kl(logits, ref.double()).dtype == torch.float64


def test_bad_input(backend_name):
    logits, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    bad = [
        (lambda: rk.kl_from_logits(logits, torch.zeros(2, 5)), "ref_logits has shape [2, 5], expected [2, 4]"),
        (lambda: rk.kl_from_logits(labels, logits), "logits has dtype int64"),
        (lambda: rk.kl_from_logits(logits, logits, temperature=-1), "temperature must be a number > 0.0 and < inf"),
        (lambda: rk.kl_from_logits(logits, logits, direction="both"), "direction must be one of 'reverse', 'forward'"),
        (lambda: rk.kl_from_logits(logits, logits.to("meta")), "ref_logits is on meta, expected cpu"),
        (lambda: rk.approx_kl(logits, logits, estimator="k4"), "estimator must be one of 'k1', 'k2', 'k3', got 'k4'"),
        (lambda: rk.approx_kl(logits, torch.zeros(4)), "ref_log_probs has shape [4], expected [2, 4]"),
        (lambda: rk.approx_kl(labels, labels), "log_probs has dtype int64"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


def test_contract(backend_name):
    logits, ref = torch.randn(2, 3, 5).unbind()
    logits.requires_grad_()
    ref.requires_grad_()
    torch.library.opcheck(module.kl_fwd, (logits, ref, 0.7, True))
    torch.library.opcheck(module.approx_kl_fwd, (logits, ref, "k3"))

    def loss(p, q):
        exact = rk.kl_from_logits(p, q, direction="forward").sum()
        return exact + rk.approx_kl(p.log_softmax(-1), q.log_softmax(-1), estimator="k3").mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(loss(logits, ref), (logits, ref))
    got = torch.autograd.grad(compiled(logits, ref), (logits, ref))
    torch.testing.assert_close(got, wanted)
    kl = rk.kl_from_logits(logits, ref.detach())
    first = torch.autograd.grad(kl.sum(), logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(kl.sum(), logits)[0])
    assert torch.equal(kl[1:2], rk.kl_from_logits(logits[1:2], ref[1:2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rk.kl_from_logits(logits, ref), kl)
