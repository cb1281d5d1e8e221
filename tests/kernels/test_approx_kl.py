"""approx_kl with clamps and gradients that are not its own: against Python, at gaps where exponentials overflow."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import kl as module

OP = "kl"
GAPS = [-100.0, -30.0, -20.0, -12.5, -10.0, -3.0, -1e-3, 0.0, 0.25, 4.0, 10.0, 15.0, 20.0, 25.0, 100.0]
CLAMPS = {
    "none": {},
    "verl": {"clamp_input": 20, "clamp_output": 10},
    "openrlhf": {"clamp_input": (-10.0, math.inf), "clamp_output": 10.0},
    "output": {"clamp_output": (-8.0, 12.0)},
    "input": {"clamp_input": (-4.0, 5.0)},
}


def bounds_of(clamp):
    return (-math.inf, math.inf) if clamp is None else clamp if isinstance(clamp, tuple) else (-clamp, clamp)


def loop(gap, estimator, gradient="plain", clamp_input=None, clamp_output=None):
    """(value, slope) of one gap in Python's floats; at a bound a clamp lets the gradient through, as torch.clamp's."""
    low, high = bounds_of(clamp_input)
    d, slope = min(max(gap, low), high), float(low <= gap <= high)
    value = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "abs": abs(d)}[estimator]
    slope *= {"k1": 1.0, "k2": d, "k3": 1 - math.exp(-d), "abs": math.copysign(1.0, d) if d else 0.0}[estimator]
    least, most = bounds_of(clamp_output)
    slope = slope if least <= value <= most else 0.0
    return min(max(value, least), most), gap if gradient == "straight_through" else slope


def leaves(gaps, dtype):
    """Log-probs whose difference is exactly that of the gaps, in fp32 too."""
    ref = torch.full((len(gaps),), -128.0, dtype=dtype)
    return [(ref + torch.tensor(gaps, dtype=dtype)).requires_grad_(), ref.requires_grad_()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clamps", CLAMPS)
@pytest.mark.parametrize("gradient", module.GRADIENTS)
@pytest.mark.parametrize("estimator", module.ESTIMATORS)
def test_values_and_gradients(backend_name, served, estimator, gradient, clamps, dtype, assert_close_to_fp64):
    served(dtype)
    p, q = leaves(GAPS, dtype)
    options = {"estimator": estimator, "gradient": gradient, **CLAMPS[clamps]}
    gaps = (p - q).detach().double().tolist()
    values, slopes = zip(*(loop(gap, **options) for gap in gaps))
    fits = [abs(x) < 3e38 for x in values]  # exp(100) is beyond fp32
    kl = rk.approx_kl(p, q, **options)
    upstream = torch.linspace(-2.0, 3.0, len(GAPS), dtype=dtype)
    kl.backward(upstream)
    for found, expected in (
        (kl, values),
        (p.grad, [x * g for x, g in zip(slopes, upstream.tolist())]),
        (q.grad, [-x * g for x, g in zip(slopes, upstream.tolist())]),
    ):
        expected = torch.tensor(expected, dtype=torch.float64)
        assert_close_to_fp64(found[fits], expected[fits], dtype, scale=1 if dtype == torch.float32 else 8)
    assert all(fits) or (clamps == "none" and estimator == "k3")


def test_reference_by_hand(backend_name):
    """At 100 nats below the reference k3 is e^100: its clamp of 10 has gradient 0, not NaN; d is the slope of k2."""
    new, ref = torch.tensor([-100.0], requires_grad=True), torch.tensor([0.0])
    for options, value, slope in (
        ({"estimator": "k3", "clamp_output": 10.0}, 10.0, 0.0),
        ({"estimator": "k3", "clamp_input": 2.0}, math.exp(2) - 3, 0.0),
        ({"estimator": "k3", "clamp_output": 10.0, "gradient": "straight_through"}, 10.0, -100.0),
        ({"estimator": "abs"}, 100.0, -1.0),
        ({"estimator": "abs", "gradient": "straight_through"}, 100.0, -100.0),
        ({"estimator": "k1", "clamp_output": (-7.0, 3.0)}, -7.0, 0.0),
    ):
        kl = rk.approx_kl(new, ref, **options)
        assert kl.item() == pytest.approx(value, rel=1e-6)
        assert torch.autograd.grad(kl.sum(), new)[0].item() == slope


def test_gradients_in_the_mean(backend_name, served):
    """Over samples of the policy "straight_through" has the gradient of KL(policy || reference), whatever the value."""
    served(torch.float32)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator).requires_grad_()
    ref = torch.randn(6, 5, generator=generator).log_softmax(-1)
    p = logits.softmax(-1).detach()
    expected = torch.autograd.grad(rk.kl_from_logits(logits, ref).sum(), logits)[0]
    for estimator in module.ESTIMATORS:
        tokens = rk.approx_kl(logits.log_softmax(-1), ref, estimator=estimator, gradient="straight_through")
        torch.testing.assert_close(torch.autograd.grad((p * tokens).sum(), logits)[0], expected)


@pytest.mark.parametrize("estimator", module.ESTIMATORS)
def test_masked_garbage(backend_name, estimator):
    """What torch.where or a clamp of one's own takes out of the sum gets gradient 0: NaN, infinities, gaps of 100."""
    new = torch.tensor([-1.0, torch.nan, -torch.inf, -100.0, -1.0, -2.0], requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -1.0, 0.0, torch.nan, -1.0], requires_grad=True)
    mask = torch.tensor([True, False, False, False, False, True])
    for clamps in CLAMPS.values():
        kl = rk.approx_kl(new, ref, estimator=estimator, **clamps)
        for found in torch.autograd.grad(torch.where(mask, kl, 0.0).sum(), (new, ref)):
            assert found.isfinite().all() and (found[~mask] == 0).all() and (found[mask] != 0).all()
    gap = rk.approx_kl(new, ref, estimator="k3")[3:4].clamp(max=10.0)
    assert [x[3].item() for x in torch.autograd.grad(gap.sum(), (new, ref))] == [0.0, 0.0]


@pytest.mark.parametrize("estimator", module.ESTIMATORS)
def test_edges(backend_name, estimator):
    """Equal -inf differ by 0 and have a finite gradient; nothing; no dimension; other strides."""
    inf = math.inf
    same = torch.tensor([-inf, -1.0], requires_grad=True)
    for clamps in CLAMPS.values():
        kl = rk.approx_kl(same, same.detach(), estimator=estimator, **clamps)
        assert torch.equal(kl, torch.zeros(2)) and torch.autograd.grad(kl.sum(), same)[0].isfinite().all()
    options = {"estimator": estimator, **CLAMPS["verl"]}
    assert rk.approx_kl(torch.zeros(0, 3), torch.zeros(0, 3), **options).shape == (0, 3)
    assert rk.approx_kl(torch.tensor(-1.0), torch.tensor(-1.0), **options).item() == 0.0
    p, q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(rk.approx_kl(p.t(), q.t(), **options), rk.approx_kl(p, q, **options).t())


@pytest.mark.parametrize(
    "options,words",
    [
        ({"estimator": "kl"}, "estimator must be one of 'k1', 'k2', 'k3', 'abs', got 'kl'"),
        ({"gradient": "ratio"}, "gradient must be one of 'plain', 'straight_through', got 'ratio'"),
        ({"clamp_input": 0.0}, "clamp_input must be a number > 0, got 0.0"),
        ({"clamp_output": (1.0, 1.0)}, "clamp_output is (1.0, 1.0), expected a number > 0 or (low, high)"),
        ({"clamp_output": (1.0,)}, "clamp_output is (1.0,), expected a number > 0 or (low, high)"),
        ({"clamp_input": (-1.0, math.nan)}, "clamp_input must be a number, got nan"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError) as error:
        rk.approx_kl(torch.zeros(2), torch.zeros(2), **options)
    assert words in str(error.value)


@pytest.mark.parametrize("estimator", module.ESTIMATORS)
def test_contract(backend_name, estimator):
    p, q = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    bounds = [-1.0, 2.0, -0.5, 0.75]
    torch.library.opcheck(module.approx_kl_fwd, (p.requires_grad_(), q, estimator, False, bounds))
    torch.library.opcheck(module.approx_kl_bwd, (q, p.detach(), q, estimator, True, bounds, True, False))

    def loss(p, q):
        return rk.approx_kl(p, q, estimator=estimator, gradient="straight_through", **CLAMPS["openrlhf"]).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p, q), loss(p, q))
    assert torch.equal(*(torch.autograd.grad(f(p, q), p)[0] for f in (compiled, loss)))
