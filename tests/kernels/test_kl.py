"""KL divergences: exact from logits, estimated from log-probs of samples."""

import math

import numpy as np
import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import kl as module
from rlhf_kernels.cpu import kl as native
from rlhf_kernels.reference import kl as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIRECTIONS = ("reverse", "forward")
KERNELS = ("k1", "k2", "k3")
POLICY = (-0.15, -0.30, -0.05, -0.10, -0.08, -0.20, -0.03)
SFT = (-0.20, -0.45, -0.06, -0.12, -0.10, -0.80, -0.04)


BOTH = pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)


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
def test_gradcheck(backend_name, served, direction):
    served(torch.float64)
    logits, ref = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True).unbind()
    options = {"temperature": 0.7, "direction": direction}
    assert torch.autograd.gradcheck(lambda p, q: rk.kl_from_logits(p, q, **options), (logits, ref))
    p, q = torch.tensor([[-1.0, -2.5], [-0.3, -4.0]], dtype=torch.float64, requires_grad=True).unbind()
    for estimator in module.ESTIMATORS:
        assert torch.autograd.gradcheck(lambda p, q, e=estimator: rk.approx_kl(p, q, estimator=e), (p, q))


def test_reference_spec_2_penalty(backend_name):
    """Worked example 3: 0.86 nats, a penalty of 0.0172, an objective of 1.763."""
    total = rk.approx_kl(torch.tensor(POLICY), torch.tensor(SFT)).sum().item()
    assert total == pytest.approx(0.86, abs=1e-6)
    assert 0.02 * total == pytest.approx(0.0172, abs=1e-7)
    assert 2.1 - 0.02 * total + 0.1 * -3.2 == pytest.approx(1.763, abs=5e-4)


@BOTH
def test_reference_independent(backend_name, served, dtype):
    """Against numpy with probabilities, and torch.distributions."""
    served(dtype)
    generator = np.random.default_rng(0)
    a, b = (torch.tensor(x).to(dtype) for x in generator.normal(size=(2, 7, 13)))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a.double().numpy(), b.double().numpy()))
    atol = 16 * torch.finfo(dtype).eps
    np.testing.assert_allclose(rk.kl_from_logits(a, b), (p * np.log(p / q)).sum(-1), rtol=atol, atol=atol)
    forward = rk.kl_from_logits(a, b, direction="forward")
    np.testing.assert_allclose(forward, (q * np.log(q / p)).sum(-1), rtol=atol, atol=atol)
    categorical = torch.distributions.Categorical
    wanted = torch.distributions.kl_divergence(categorical(logits=a / 2), categorical(logits=b / 2))
    torch.testing.assert_close(rk.kl_from_logits(a, b, temperature=2), wanted)


@BOTH
def test_trap_14_estimators_by_enumeration(backend_name, served, dtype):
    """On 5 tokens: the means of k1 and k3 under the policy are the exact KL; k2's is near; k1 alone can be negative."""
    served(dtype)
    logits = torch.randn(200, 5, dtype=dtype)
    ref = logits + 0.3 * torch.randn(200, 5, dtype=dtype)
    log_p, log_q = logits.log_softmax(-1), ref.log_softmax(-1)
    exact = rk.kl_from_logits(logits, ref)
    means = {e: (log_p.exp() * rk.approx_kl(log_p, log_q, estimator=e)).sum(-1) for e in module.ESTIMATORS}
    torch.testing.assert_close(means["k1"], exact)
    torch.testing.assert_close(means["k3"], exact)
    assert ((means["k2"] - exact).abs() / exact).mean() < 0.2
    assert (rk.approx_kl(log_p, log_q) < 0).any()
    assert (rk.approx_kl(log_p, log_q, estimator="k3") >= 0).all()
    assert (exact > 0).all() and torch.equal(rk.kl_from_logits(logits, logits), torch.zeros(200, dtype=dtype))


def test_trap_14_k3_is_never_negative(backend_name):
    """Also where rounding decides: differences from 1e-12 to 80, in fp32; relative to fp64 it loses one ulp of d."""
    d = torch.logspace(-12, math.log10(80), 4001)
    for log_probs in (d, -d):
        k3 = rk.approx_kl(log_probs, torch.zeros_like(d), estimator="k3")
        assert (k3 >= 0).all()
        d64 = log_probs.double()
        assert ((k3 - (torch.expm1(-d64) + d64)).abs() <= 2e-7 * torch.maximum(d64.abs(), torch.exp(-d64))).all()


@BOTH
def test_trap_14_gradients_of_estimators(backend_name, served, dtype):
    """As losses on samples: k1's mean gradient is 0, k2's is that of KL(p || q), k3's that of KL(q || p)."""
    served(dtype)
    logits = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    ref = torch.randn(6, 5, dtype=dtype)
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


def test_mixed_with_fp64(backend_name, served):
    """The wider dtype decides who serves the call, and in which precision."""
    logits, ref = torch.randn(3, 5), torch.randn(3, 5, dtype=torch.float64)
    if backend_name == "cpu":
        with pytest.raises(RuntimeError, match=r"does not take a torch\.float64 tensor"):
            rk.approx_kl(logits, ref)
    served(torch.float64)
    for a, b in ((logits, ref), (ref, logits)):
        assert rk.approx_kl(a, b).dtype == rk.kl_from_logits(a, b).dtype == torch.float64
        torch.testing.assert_close(rk.kl_from_logits(a, b), rk.kl_from_logits(a.double(), b.double()))


def test_bad_input(backend_name):
    logits, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    bad = [
        (lambda: rk.kl_from_logits(logits, torch.zeros(2, 5)), "ref_logits has shape [2, 5], expected [2, 4]"),
        (lambda: rk.kl_from_logits(labels, logits), "logits has dtype int64"),
        (lambda: rk.kl_from_logits(logits, logits, temperature=-1), "temperature must be a number > 0.0 and < inf"),
        (lambda: rk.kl_from_logits(logits, logits, direction="both"), "direction must be one of 'reverse', 'forward'"),
        (lambda: rk.kl_from_logits(logits, logits.to("meta")), f"ref_logits is on meta, expected {logits.device}"),
        (
            lambda: rk.approx_kl(logits, logits, estimator="k4"),
            "estimator must be one of 'k1', 'k2', 'k3', 'abs', got 'k4'",
        ),
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
    for reverse in (True, False):
        torch.library.opcheck(module.kl_fwd, (logits, ref, 0.7, reverse))
        rows = module.kl_fwd(logits, ref, 0.7, reverse)
        assert [x.requires_grad for x in rows] == [True] + 4 * [False]
        for needs in ((True, True), (False, True), (False, False)):
            saved = (torch.rand(3), *(x.detach() for x in (logits, ref, *rows)))
            torch.library.opcheck(module.kl_bwd, (*saved, 0.7, reverse, *needs))
    torch.library.opcheck(module.approx_kl_fwd, (logits, ref, "k3", False, 2 * [-math.inf, math.inf]))
    saved = torch.rand(3, 5), logits.detach(), ref.detach()
    torch.library.opcheck(module.approx_kl_bwd, (*saved, "k2", False, 2 * [-math.inf, math.inf], True, False))

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
    with torch.autocast(logits.device.type, dtype=torch.bfloat16):
        assert torch.equal(rk.kl_from_logits(logits, ref), kl)


PAIRS = [(a, b) for a in DTYPES for b in DTYPES]


def check_rows(policy, ref, assert_close_to_fp64, temperature=1.0):
    """Both directions of the native functions, with gradients, against the reference in float64."""
    upstream = torch.linspace(-1.5, 2.5, len(policy))
    for reverse in (True, False):
        out = native.kl_fwd(policy, ref, temperature, reverse)
        exact = reference.kl_fwd(policy.double(), ref.double(), temperature, reverse)
        for actual, expected in zip(out, exact, strict=True):
            assert_close_to_fp64(actual, expected, torch.float32)
        grads = native.kl_bwd(upstream, policy, ref, *out, temperature, reverse, True, True)
        inputs = (upstream.double(), policy.double(), ref.double())
        expected = reference.kl_bwd(*inputs, *exact, temperature, reverse, True, True)
        for grad, exact_grad, x in zip(grads, expected, (policy, ref), strict=True):
            assert grad.dtype == x.dtype
            assert_close_to_fp64(grad, exact_grad, x.dtype)


@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_every_isa(isa, dtype, case, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=dtype)
    vocab = inputs["logits"].shape[-1]
    policy, ref = (inputs[name].reshape(-1, vocab) for name in ("logits", "ref_logits"))
    check_rows(policy, ref, assert_close_to_fp64, inputs["temperature"])


WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1023, 1024, 1025, 2047, 2048, 2049, 4129]


@pytest.mark.parametrize("vocab", WIDTHS)
def test_values_every_width(isa, vocab, assert_close_to_fp64):
    """Rows around the edges of vectors and blocks, every pair of dtypes, odd starts, some entries banned."""
    generator = torch.Generator().manual_seed(vocab)
    policy = 3 * torch.randn(5, vocab + 3, generator=generator)
    ref = policy + torch.randn(5, vocab + 3, generator=generator)
    policy[:, :-4:3] = ref[:, :-4:5] = ref[:, :-4:3] = -math.inf  # the last entry of a row stays: none is empty
    for p_dtype, q_dtype in PAIRS:
        check_rows(policy.to(p_dtype)[:, 3:], ref.to(q_dtype)[:, 3:], assert_close_to_fp64, 0.7)


def test_maxima_that_rise_in_any_order(isa, assert_close_to_fp64):
    """Each block may raise either maximum, by little or by much, and begin or end with blocks that one side bans."""
    V = 5 * 2048
    ramp = torch.linspace(0, 60, V)
    noise = torch.randn(2, 8, V, generator=torch.Generator().manual_seed(0))
    policy, ref = noise[0].clone(), noise[1].clone()
    policy[0] += ramp
    ref[1] += ramp
    policy[2], ref[2] = policy[2] + ramp, ref[2] - ramp
    policy[3], ref[3] = policy[3] + 1000 * (ramp > 30), ref[3] + 1000 * (ramp > 30)
    policy[4, :4096] = ref[4, :4096] = -math.inf
    policy[5, :4096] = ref[5, 6000:] = policy[5, 6000:] = -math.inf
    policy[6, 4096:] = ref[6, 4096:] = -math.inf
    policy[7, :4096] = ref[7, 4096:] = -math.inf
    check_rows(policy, ref, assert_close_to_fp64)


def test_masks_of_the_smallest_number(isa, assert_close_to_fp64):
    """Logits masked by finfo.min instead of -inf: no probability, nothing to add, where both sides have it."""
    generator = torch.Generator().manual_seed(0)
    policy, ref = (3 * torch.randn(2, 4, 301, generator=generator)).unbind()
    lowest = torch.finfo(torch.float32).min
    policy[:, ::3] = ref[:, ::3] = lowest
    policy[1, 1::3] = lowest  # only the policy lacks these
    exact = reference.kl_divergence(policy.double(), ref.double())
    for temperature in (1.0, 0.25):  # lowest / 0.25 overflows
        sides = [torch.where(x == lowest, x, x * temperature) for x in (policy, ref)]
        kl, *rows = native.kl_fwd(*sides, temperature, True)
        assert_close_to_fp64(kl, exact, torch.float32)
        grads = native.kl_bwd(torch.ones(4), *sides, kl, *rows, temperature, True, True, True)
        assert all(grad.isfinite().all() and (grad[:, ::3] == 0).all() for grad in grads)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_that_are_no_distribution(isa, direction):
    """NaN and +inf stay in their row; a NaN's payload does not matter; infinite rows get no gradient."""
    for vocab in (5, 64, 5000):
        policy, ref = torch.randn(2, 9, vocab, generator=torch.Generator().manual_seed(0)).unbind()
        policy[1, vocab // 2] = math.nan
        ref[2, -1] = math.nan
        policy[3, 0] = math.inf
        policy[4, 1], ref[5, 1] = -math.inf, -math.inf
        policy[6], ref[6, 0] = math.nan, math.nan
        policy[7] = torch.tensor(0x7FC00123, dtype=torch.int32).view(torch.float32)
        reverse = direction == "reverse"
        out = native.kl_fwd(policy, ref, 1.0, reverse)
        broken = torch.tensor([False, True, True, True, False, False, True, True, False])
        assert out[0].isnan().tolist() == broken.tolist()
        infinite = 5 if reverse else 4
        assert out[0].isinf().nonzero().tolist() == [[infinite]]
        grads = native.kl_bwd(torch.ones(9), policy, ref, *out, 1.0, reverse, True, True)
        assert all(grad[~broken].isfinite().all() and (grad[infinite] == 0).all() for grad in grads)
        assert all(grad[broken].isnan().any(-1).all() for grad in grads)


def test_near_equal_distributions(isa):
    """A reference 1e-3 away: the divergence, 5e-7 nats, to the absolute error of float32; equal logits give 0."""
    generator = torch.Generator().manual_seed(0)
    policy = 3 * torch.randn(8, 50257, generator=generator)
    ref = policy + 1e-3 * torch.randn(8, 50257, generator=generator)
    exact = reference.kl_divergence(policy.double(), ref.double())
    kl = native.kl_fwd(policy, ref, 1.0, True)[0]
    assert (kl >= 0).all() and ((kl - exact).abs() <= 4 * torch.finfo(torch.float32).eps).all()
    for dtype in DTYPES:
        assert torch.equal(native.kl_fwd(policy.to(dtype), policy.to(dtype), 0.7, False)[0], torch.zeros(8))


def test_only_needed_gradients_are_made(isa):
    policy, ref = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(0)).unbind()
    upstream = torch.ones(3)
    for reverse in (True, False):
        rows = native.kl_fwd(policy, ref, 1.0, reverse)
        both = native.kl_bwd(upstream, policy, ref, *rows, 1.0, reverse, True, True)
        for needs in ((True, False), (False, True), (False, False)):
            some = native.kl_bwd(upstream, policy, ref, *rows, 1.0, reverse, *needs)
            for grad, whole, need in zip(some, both, needs, strict=True):
                assert torch.equal(grad, whole) if need else grad.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_same_bits(isa, dtype):
    """On any number of threads, for a row alone, and for rows that are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    policy, ref = (3 * torch.randn(2, 37, 4101, generator=generator)).to(dtype).unbind()
    upstream = torch.rand(37, generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            rows = native.kl_fwd(policy, ref, 1.3, True)
            results.append((*rows, *native.kl_bwd(upstream, policy, ref, *rows, 1.3, True, True, True)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    apart = [torch.nn.functional.pad(x, (5, 2))[:, 5:-2] for x in (policy, ref)]
    rows = native.kl_fwd(*apart, 1.3, True)
    again = (*rows, *native.kl_bwd(upstream, *apart, *rows, 1.3, True, True, True))
    assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))
    alone = native.kl_fwd(policy[11:12], ref[11:12], 1.3, True)
    assert all(torch.equal(a, b[11:12]) for a, b in zip(alone, results[0]))


def test_large_gradients_are_streamed(isa, assert_close_to_fp64):
    """Gradients beyond the cache take another kind of store; its rows begin at every alignment."""
    for dtype in DTYPES:
        policy, ref = (3 * torch.randn(2, 43, 100_003, generator=torch.Generator().manual_seed(0))).to(dtype).unbind()
        rows = native.kl_fwd(policy, ref, 1.0, True)
        grads = native.kl_bwd(torch.ones(43), policy, ref, *rows, 1.0, True, True, True)
        few = slice(20, 24)
        alone = native.kl_bwd(torch.ones(4), policy[few], ref[few], *(x[few] for x in rows), 1.0, True, True, True)
        assert all(torch.equal(a[few], b) for a, b in zip(grads, alone, strict=True))
        assert all(grad.isfinite().all() for grad in grads)


def test_offsets_beyond_32_bits(isa):
    """Rows 2^31 entries apart, in memory that is never touched in between."""
    far = torch.from_numpy(np.zeros(2**31 + 80, dtype=np.int16)).view(torch.bfloat16).as_strided((2, 80), (2**31, 1))
    far.copy_(torch.randn(2, 80, generator=torch.Generator().manual_seed(0)))
    near, ref = far.contiguous(), torch.zeros(2, 80)
    rows = native.kl_fwd(far, ref, 1.0, True)
    assert all(torch.equal(a, b) for a, b in zip(rows, native.kl_fwd(near, ref, 1.0, True), strict=True))
    grads = native.kl_bwd(torch.ones(2), far, ref, *rows, 1.0, True, True, True)
    wanted = native.kl_bwd(torch.ones(2), near, ref, *rows, 1.0, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    assert torch.equal(native.approx_kl_fwd(far, ref, "k3"), native.approx_kl_fwd(near, ref, "k3"))


@pytest.mark.parametrize("estimator", KERNELS)
def test_approx_kl_every_size(isa, estimator, assert_close_to_fp64):
    """Sizes around the edges of vectors and blocks, every pair of dtypes, matrices cut from larger ones."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(0, 4), (1, 0), (1, 1), (3, 5), (2, 16), (5, 17), (2, 2047), (3, 2048), (2, 2049), (1, 70_001)]
    for rows, columns in shapes:
        p, q, upstream = torch.rand(3, rows, columns + 2, generator=generator).mul(-3).unbind()
        for p_dtype, q_dtype in PAIRS:
            a, b, g = p.to(p_dtype)[:, 1:-1], q.to(q_dtype)[:, :-2], upstream[:, 2:]
            exact = reference.approx_kl_fwd(a.double(), b.double(), estimator)
            assert_close_to_fp64(native.approx_kl_fwd(a, b, estimator), exact, torch.float32)
            grads = native.approx_kl_bwd(g, a, b, estimator, True, True)
            wanted = reference.approx_kl_bwd(g.double(), a.double(), b.double(), estimator, True, True)
            for grad, exact, x in zip(grads, wanted, (a, b), strict=True):
                assert grad.dtype == x.dtype
                assert_close_to_fp64(grad, exact, x.dtype)
            assert native.approx_kl_bwd(g, a, b, estimator, True, False)[1].shape == (0,)
            transposed = native.approx_kl_fwd(a.t(), b.t(), estimator)
            assert torch.equal(transposed, native.approx_kl_fwd(a, b, estimator).t())


def test_accuracy_of_k3(isa):
    """k3 and its slope within 8 ulp of float64 from 1e-18 to 80, where the plain formula would cancel."""
    d = torch.cat([sign * torch.logspace(-18, math.log10(80), 8001) for sign in (1, -1)])
    zero, d64 = torch.zeros_like(d), d.double()
    series = sum((-d64) ** n / math.factorial(n) for n in range(2, 12))
    exact = torch.where(d64.abs() < 0.05, series, torch.expm1(-d64) + d64)
    limit = 8 * torch.finfo(torch.float32).eps
    assert ((native.approx_kl_fwd(d, zero, "k3") - exact).abs() <= limit * exact).all()
    slope = native.approx_kl_bwd(torch.ones_like(d), d, zero, "k3", True, False)[0]
    assert ((slope + torch.expm1(-d64)).abs() <= limit * torch.expm1(-d64).abs()).all()


def test_approx_kl_of_infinite_entries(isa):
    """As the reference: equal ones differ by 0, one-sided ones by +-inf; NaN stays in its entry."""
    inf, nan = math.inf, math.nan
    p, q = torch.tensor([-inf, -inf, -1.0, nan, -1.0, -90.0]), torch.tensor([-inf, -1.0, -inf, -1.0, nan, 0.0])
    for estimator in KERNELS:
        actual, expected = (f.approx_kl_fwd(p, q, estimator) for f in (native, reference))
        torch.testing.assert_close(actual, expected, equal_nan=True)
        actual, expected = (f.approx_kl_bwd(torch.ones(6), p, q, estimator, True, True) for f in (native, reference))
        torch.testing.assert_close(actual, expected, equal_nan=True)
