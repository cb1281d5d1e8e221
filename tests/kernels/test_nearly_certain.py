"""Rows whose largest logit stands up to 80 nats above the rest: log p, entropy, KL and gradients keep their digits.

Expected values are computed with 60 digits. A bound is relative: to the number itself, or, where it is a difference, to
what the two distributions leave to others than the likeliest entry. It allows for the rounding of z and of z - max z,
half a unit in the last place of |z| each, which is a relative error of the exp.
"""

import math

import mpmath
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf_kernels as rk
from rlhf_kernels import dispatch
from tests.conftest import GPU, ON_GPU, machine_isas
from tests.on_gpu import OnGPU

NEG_INF = -math.inf
EPS = torch.finfo(torch.float32).eps
LEAST = 2e-38  # exps below it are 0
WIDTHS = (1, 2, 15, 16, 17, 65, 130, 1000)
FEW = (1, 2, 17, 130)  # where a walk over chunks is interpreted
property_test = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def servers(op):
    """Each backend of the op that runs here, the native one on each instruction set."""
    states = rk.backends()[op]
    names = [name for name in states if states[name] == "available"]
    return [x for name in names for x in ([f"cpu-{isa}" for isa in machine_isas()] if name == "cpu" else [name])]


@pytest.fixture
def server(request, monkeypatch):
    backend, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("RLHF_KERNELS_CPU_ISA", isa)
    with dispatch.backend(backend):
        if GPU and backend in ON_GPU:
            with OnGPU():
                yield request.param
        else:
            yield request.param


@pytest.fixture
def small_parts(monkeypatch):
    """Rows are cut as long ones are: into chunks of columns, and where Triton runs, into parts and blocks."""
    from rlhf_kernels import _linear_walk

    monkeypatch.setattr(_linear_walk, "NARROW", 48)
    if "triton" in servers("linear"):
        from rlhf_kernels.triton import kl, linear, logprobs

        for name in ("FORWARD_COLUMNS", "COLUMNS"):
            monkeypatch.setattr(linear, name, 48)
        for module in (kl, linear, logprobs):
            monkeypatch.setattr(module, "PART", 64)
            monkeypatch.setattr(module, "BLOCK", 32)


class Row:
    """One row's log p and p with 60 digits, given its z in float64; and its entropy."""

    def __init__(self, z):
        with mpmath.workdps(60):
            self.z = [mpmath.mpf(x) for x in z.tolist()]
            highest = max(self.z)
            self.top = self.z.index(highest)
            exps = [mpmath.exp(x - highest) for x in self.z]
            total = mpmath.fsum(exps)
            log_total = mpmath.log(total)
            self.logs = [x - highest - log_total for x in self.z]
            self.p = [e / total for e in exps]
            self.entropy = -float(mpmath.fsum(p * x for p, x in zip(self.p, self.logs) if p))

    def floats(self):
        return (torch.tensor([float(x) for x in values], dtype=torch.float64) for values in (self.logs, self.p))


def peaked(draw, vocab, margin, top=None):
    """z [vocab] fp32: one entry, or equal ones, `margin` above the next; some others banned. And the entry's index."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    z = -margin - 5.0 * torch.rand(vocab, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        z[torch.rand(vocab, generator=generator) < 0.3] = NEG_INF
    top = draw(st.integers(0, vocab - 1)) if top is None else top
    z[top] = 0.0
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        z[draw(st.integers(0, vocab - 1))] = 0.0
    return (z + draw(st.sampled_from((0.0, 0.37, -30.0, 12.5)))).float(), top


def slack(*rows):
    """The relative error of an exp that the rounding of z and of z - max z allows, and some roundings more."""
    return EPS * (16 + 2 * max(abs(float(x)) for row in rows for x in row.z if x != NEG_INF))


def assert_within(actual, expected, bound):
    actual = actual.detach().double().cpu()
    assert not actual.isnan().any()
    over = torch.where(actual == expected, 0.0, (actual - expected).abs()).view(-1) - bound
    worst = over.argmax()
    assert over[worst] <= 0, f"{actual.view(-1)[worst]} instead of {expected.view(-1)[worst]}"


def check_log_probs(function, z, label, temperature):
    """function(z [V], label, temperature) -> (log-prob, entropy, what gives their gradient as to z / temperature)."""
    row = Row(z.double() / temperature)
    logs, p = row.floats()
    relative = slack(row)
    log_prob, entropy, gradient = function(z, label, temperature)
    assert_within(log_prob, logs[label], relative * logs[label].abs() + LEAST)
    assert_within(entropy, torch.tensor(row.entropy, dtype=torch.float64), relative * row.entropy + LEAST * len(p))
    if logs[label] != NEG_INF:
        expected = -p
        expected[label] = float(-mpmath.expm1(row.logs[label]))
        assert_within(gradient(log_prob), expected, relative * expected.abs() + LEAST)
    finite = torch.where(p == 0, 0.0, logs)
    size = p * (finite.abs() + row.entropy)
    assert_within(gradient(entropy), -p * (finite + row.entropy), relative * size + LEAST * 100)


def drawn_log_probs(draw, widths=WIDTHS):
    vocab, margin = draw(st.sampled_from(widths)), draw(st.floats(0, 80))
    temperature = draw(st.sampled_from((1.0, 1.0, 0.7, 1.6)))
    z, top = peaked(draw, vocab, margin * min(temperature, 1.0))
    label = top if draw(st.booleans()) else draw(st.integers(0, vocab - 1))
    return z, label, temperature


@pytest.mark.parametrize("server", servers("logprobs"), indirect=True)
@property_test
@given(st.data())
def test_from_logits(server, small_parts, data):
    def function(z, label, temperature):
        logits = torch.stack([z, torch.zeros_like(z)]).requires_grad_()  # a neighbour that is not certain
        log_probs, entropy = rk.logprobs_and_entropy_from_logits(
            logits, torch.tensor([label, 0]), temperature=temperature
        )

        def gradient(x):
            return temperature * torch.autograd.grad(x, logits, retain_graph=True)[0][0]

        return log_probs[0], entropy[0], gradient

    check_log_probs(function, *drawn_log_probs(data.draw))


@pytest.mark.parametrize("server", servers("linear"), indirect=True)
@property_test
@given(st.data())
def test_from_hidden_states(server, small_parts, data):
    """Hidden states [1, 0], [0, 1] and a head of the logits' columns: products are exact, d weight is d logits."""

    def function(z, label, temperature):
        weight = torch.stack([z.clamp(min=-1e30), torch.zeros_like(z)], -1).requires_grad_()
        bias = torch.where(z == NEG_INF, NEG_INF, 0.0)
        log_probs, entropy = rk.linear_logprobs(
            torch.eye(2), weight, torch.tensor([label, 0]), bias=bias, temperature=temperature, return_entropy=True
        )

        def gradient(x):
            return temperature * torch.autograd.grad(x, weight, retain_graph=True)[0][:, 0]

        return log_probs[0], entropy[0], gradient

    check_log_probs(function, *drawn_log_probs(data.draw, FEW))


def check_kl(function, z_a, z_b, temperature):
    """function(z_a, z_b, temperature) -> (KL(a || b), its gradients as to both z)."""
    a, b = (Row(z.double() / temperature) for z in (z_a, z_b))
    (_, p_a), (_, p_b) = a.floats(), b.floats()
    with mpmath.workdps(60):
        gaps = [x - y if p else mpmath.mpf(0) for p, x, y in zip(a.p, a.logs, b.logs)]
        kl = mpmath.fsum(p * gap for p, gap in zip(a.p, gaps))
        slopes_a = [float(p * (gap - kl)) for p, gap in zip(a.p, gaps)]
        slopes_b = [float(q - p) for p, q in zip(a.p, b.p)]
    gaps = torch.tensor([abs(float(x)) for x in gaps], dtype=torch.float64)
    sizes = p_a * (1 + gaps) + p_b
    others = torch.cat((sizes[: a.top], sizes[a.top + 1 :])).sum()
    relative = slack(a, b)
    actual, grad_a, grad_b = function(z_a, z_b, temperature)
    assert_within(actual, torch.tensor(float(kl), dtype=torch.float64), relative * others + LEAST * len(p_a))
    size_a, size_b = p_a * (1 + gaps + float(kl)), p_a + p_b
    size_a[a.top] = size_b[a.top] = others
    assert_within(grad_a, torch.tensor(slopes_a, dtype=torch.float64), relative * size_a + LEAST * 100)
    assert_within(grad_b, torch.tensor(slopes_b, dtype=torch.float64), relative * size_b + LEAST * 100)


def drawn_pair(draw, widths=WIDTHS):
    """Rows that are certain of the same entry or of two, or alike up to a thousandth; what b bans, a bans."""
    vocab, temperature = draw(st.sampled_from(widths)), draw(st.sampled_from((1.0, 1.0, 0.7)))
    margins = st.floats(0, 80 * min(temperature, 1.0))
    z_a, top = peaked(draw, vocab, draw(margins))
    if draw(st.booleans()):
        z_b = z_a + 1e-3 * torch.linspace(-1, 1, vocab)
    else:
        z_b, _ = peaked(draw, vocab, draw(margins), draw(st.sampled_from((top, top, None))))
    z_b = torch.where((z_b == NEG_INF) & (z_a != NEG_INF), z_a, z_b)
    return z_a, z_b, temperature


@pytest.mark.parametrize("server", servers("kl"), indirect=True)
@property_test
@given(st.data())
def test_kl_from_logits(server, small_parts, data):
    direction = data.draw(st.sampled_from(("reverse", "forward")))

    def function(z_a, z_b, temperature):
        sides = [torch.stack([z, torch.zeros_like(z)]).requires_grad_() for z in (z_a, z_b)]
        policy, ref = sides if direction == "reverse" else sides[::-1]
        kl = rk.kl_from_logits(policy, ref, temperature=temperature, direction=direction)[0]
        return kl, *(temperature * x[0] for x in torch.autograd.grad(kl, sides))

    check_kl(function, *drawn_pair(data.draw))


@pytest.mark.parametrize("server", servers("linear"), indirect=True)
@property_test
@given(st.data())
def test_kl_from_hidden_states(server, small_parts, data):
    def function(z_a, z_b, temperature):
        grads = []
        for direction in ("reverse", "forward"):
            heads = [torch.stack([z.clamp(min=-1e30), torch.zeros_like(z)], -1) for z in (z_a, z_b)]
            biases = [torch.where(z == NEG_INF, NEG_INF, 0.0) for z in (z_a, z_b)]
            if direction == "forward":
                heads, biases = heads[::-1], biases[::-1]
            heads[0].requires_grad_()
            kl = rk.linear_kl(
                torch.eye(2), heads[0], torch.eye(2), heads[1], bias=biases[0], ref_bias=biases[1],
                temperature=temperature, direction=direction,
            )[0]  # fmt: skip
            grads.append(temperature * torch.autograd.grad(kl, heads[0])[0][:, 0])
        return kl, *grads

    check_kl(function, *drawn_pair(data.draw, FEW))


@pytest.mark.parametrize("margin", (5.0, 17.0, 36.0, 80.0))
@pytest.mark.parametrize("server", servers("logprobs"), indirect=True)
def test_wide_rows_by_hand(server, margin):
    """V - 1 entries equally far below the one, wherever it stands: log p = -log(1 + r), 1 - p = r / (1 + r)."""
    vocab, labels = 20001, torch.tensor([0, 421, 8192, 20000])
    logits = torch.full((4, vocab), -margin).scatter(1, labels[:, None], 0.0).requires_grad_()
    log_probs, entropy = rk.logprobs_and_entropy_from_logits(logits, labels)
    (gradient,) = torch.autograd.grad(log_probs.sum(), logits)
    r = (vocab - 1) * math.exp(-margin)
    ones = torch.ones(4, dtype=torch.float64)
    expected = {-math.log1p(r): log_probs, math.log1p(r) + margin * r / (1 + r): entropy}
    expected[r / (1 + r)] = gradient.gather(1, labels[:, None])[:, 0]
    for value, actual in expected.items():
        torch.testing.assert_close(actual.detach().double(), value * ones, rtol=4e-6, atol=0)


@pytest.mark.parametrize("server", servers("kl"), indirect=True)
def test_wide_pairs_by_hand(server):
    """Margins of 60 and 61: with r and q the sums over the others, KL = q - r + r up to their squares; q = r / e."""
    vocab, tops = 20001, torch.tensor([[0], [421], [8192], [20000]])
    policy, ref = (torch.full((4, vocab), -margin).scatter(1, tops, 0.0) for margin in (60.0, 61.0))
    r = (vocab - 1) * math.exp(-60.0)
    expected = torch.full((4,), r / math.e, dtype=torch.float64)
    torch.testing.assert_close(rk.kl_from_logits(policy, ref).double(), expected, rtol=4e-6, atol=0)
    forward = rk.kl_from_logits(policy, ref, direction="forward")
    torch.testing.assert_close(forward.double(), expected * (math.e - 2), rtol=4e-6, atol=0)
