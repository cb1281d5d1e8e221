"""Log-probs and entropy from logits: values, gradients, garbage, edges, bad input, contract."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _checks
from rlhf_kernels import logprobs as module
from rlhf_kernels.reference import logprobs as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEG_INF = -math.inf


def exact(inputs):
    """The definition on the same inputs in float64: (logits, log-probs, entropy); the logits collect gradients."""
    logits = inputs["logits"].double().requires_grad_()
    options = {name: inputs[name] for name in ("temperature", "softcap")}
    return logits, *reference.logprobs_and_entropy(logits, inputs["labels"], **options)


@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_values(backend_name, served, dtype, case, assert_close_to_fp64):
    served(dtype)
    inputs = reference.example_inputs(case, dtype=dtype)
    _, logprobs, entropy = exact(inputs)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    both = rk.logprobs_and_entropy_from_logits(**inputs)
    alone = rk.logprobs_from_logits(**inputs)
    assert both[0].dtype == both[1].dtype == alone.dtype == out_dtype
    assert_close_to_fp64(both[0], logprobs, out_dtype)
    assert_close_to_fp64(both[1], entropy, out_dtype)
    assert torch.equal(alone, both[0])
    if case != "ignored":
        options = {name: inputs[name] for name in ("temperature", "softcap")}
        assert torch.equal(rk.entropy_from_logits(inputs["logits"], **options), both[1])


def test_reference_spec_2_one_token(backend_name):
    logits = torch.tensor([[0.15, 0.85]]).log()
    assert rk.logprobs_from_logits(logits, torch.tensor([0])).item() == pytest.approx(-1.90, abs=0.005)


def test_reference_by_hand(backend_name):
    """p = (1/2, 1/4, 1/8, 1/8): entropy 7/4 bits; a temperature of 1/2 squares and renormalises them."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert rk.entropy_from_logits(p.log()).item() == pytest.approx(1.75 * math.log(2))
    sharp = rk.logprobs_from_logits(p.log(), torch.tensor(1), temperature=0.5)
    assert sharp.item() == pytest.approx(math.log(4 / 22))
    capped = rk.logprobs_from_logits(torch.tensor([0.0, 1e4]), torch.tensor(0), softcap=3.0, temperature=1.5)
    assert capped.item() == pytest.approx(-math.log1p(math.exp(2.0)))


@pytest.mark.parametrize(("dtype", "digits"), ((torch.float64, 12), (torch.float32, 5)), ids=str)
def test_reference_independent(backend_name, served, dtype, digits):
    """Against numpy written as probabilities, and torch.distributions."""
    served(dtype)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 31, generator=generator, dtype=dtype) * 2
    labels = torch.randint(0, 31, (20,), generator=generator)
    p = np.exp(logits.double().numpy() / 0.8)
    p /= p.sum(-1, keepdims=True)
    logprobs, entropy = rk.logprobs_and_entropy_from_logits(logits, labels, temperature=0.8)
    np.testing.assert_allclose(logprobs.numpy(), np.log(p[np.arange(20), labels.numpy()]), atol=10**-digits)
    np.testing.assert_allclose(entropy.numpy(), -(p * np.log(p)).sum(-1), atol=10**-digits)
    categorical = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(rk.entropy_from_logits(logits), categorical.entropy())
    torch.testing.assert_close(rk.logprobs_from_logits(logits, labels), categorical.log_prob(labels))


@pytest.mark.parametrize("through", ("logprobs", "entropy", "both"))
@pytest.mark.parametrize("case", reference.CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(backend_name, dtype, case, through, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=dtype)
    expected, *exact_rows = exact(inputs)
    actual = inputs["logits"].clone().requires_grad_()
    rows = rk.logprobs_and_entropy_from_logits(**{**inputs, "logits": actual})
    generator = torch.Generator().manual_seed(1)
    for leaf, (logprobs, entropy) in ((actual, rows), (expected, exact_rows)):
        generator.manual_seed(1)
        upstream = torch.randn(2, *entropy.shape, generator=generator, dtype=torch.float64).to(entropy.dtype)
        finite = torch.where(torch.isfinite(logprobs), logprobs, 0.0)
        terms = {"logprobs": finite * upstream[0], "entropy": entropy * upstream[1]}
        sum(terms.values() if through == "both" else [terms[through]]).sum().backward()
        assert not leaf.grad.isnan().any()
    assert actual.grad.dtype == dtype
    assert_close_to_fp64(actual.grad, expected.grad, dtype)


@pytest.mark.parametrize("options", ({}, {"temperature": 0.6, "softcap": 3.0}), ids=("plain", "capped"))
def test_gradcheck(backend_name, served, options):
    served(torch.float64)
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, -100, 5])
    assert torch.autograd.gradcheck(lambda x: rk.logprobs_and_entropy_from_logits(x, labels, **options), logits)
    assert torch.autograd.gradcheck(lambda x: rk.entropy_from_logits(x, **options), logits)


def test_gradient_of_a_certain_label(backend_name):
    """p - 1 keeps its digits where p rounds to 1 in bf16, and its sign where p is 1 up to fp32."""
    logits = torch.tensor([[9.0, 0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    rk.logprobs_from_logits(logits, torch.tensor([0])).backward()
    rest = math.exp(-9) + math.exp(-8)
    assert logits.grad[0, 0].item() == pytest.approx(rest / (1 + rest), rel=2**-8)
    certain = torch.tensor([[40.0, 0.0]], requires_grad=True)
    rk.logprobs_from_logits(certain, torch.tensor([0])).backward()
    assert 0 <= certain.grad[0, 0].item() < 1e-7


def test_masked_garbage(backend_name):
    """Ignored rows: 0 out, 0 back, whatever their logits and whatever arrives from above."""
    logits = torch.randn(4, 5)
    labels = torch.tensor([1, -7, 2, -7])
    clean = logits.clone().requires_grad_()
    logits[1], logits[3] = math.nan, torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1e38])
    dirty = logits.requires_grad_()
    upstream = torch.tensor([2.0, math.nan, -1.0, math.inf])
    for x in (clean, dirty):
        logprobs, entropy = rk.logprobs_and_entropy_from_logits(x, labels, ignore_index=-7)
        assert torch.equal(logprobs[[1, 3]], torch.zeros(2)) and torch.equal(entropy[[1, 3]], torch.zeros(2))
        torch.autograd.backward((logprobs, entropy), (upstream, upstream))
    assert torch.equal(clean.grad, dirty.grad) and torch.equal(dirty.grad[[1, 3]], torch.zeros(2, 5))


def test_banned_logits(backend_name):
    """-inf logits take no probability, add no entropy, get no gradient; a row of them gives -inf and no gradient."""
    logits = torch.tensor([[NEG_INF, 0.0, 0.0], [NEG_INF] * 3, [0.0, NEG_INF, 2.0]], requires_grad=True)
    logprobs, entropy = rk.logprobs_and_entropy_from_logits(logits, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(2), NEG_INF, NEG_INF]))
    binary = math.log1p(math.exp(-2)) + 2 * math.exp(-2) / (1 + math.exp(-2))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0.0, binary]))
    (logprobs[0] + entropy.sum()).backward(retain_graph=True)
    assert logits.grad.isfinite().all() and torch.equal(logits.grad[1], torch.zeros(3))
    logits.grad = None
    logprobs.sum().backward()
    p = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(logits.grad, torch.tensor([[0, 0.5, -0.5], [0.0] * 3, [p - 1, 0.0, -p]]))


def test_edges(backend_name):
    assert rk.logprobs_from_logits(torch.zeros(0, 3, 4), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
    assert rk.logprobs_from_logits(torch.tensor([2.0, 2.0]), torch.tensor(1)).shape == ()
    one = torch.randn(3, 1, requires_grad=True)
    logprobs, entropy = rk.logprobs_and_entropy_from_logits(one, torch.zeros(3, dtype=torch.int64))
    (logprobs + entropy).sum().backward()
    assert torch.equal(torch.stack([logprobs, entropy]).detach(), torch.zeros(2, 3))
    assert torch.equal(one.grad, torch.zeros(3, 1))


def test_strides(backend_name):
    base = torch.randn(4, 6, 9)
    labels = torch.randint(0, 6, (9, 3))
    shared = torch.randn(1, 6).expand(5, 6)
    for logits, wanted in ((base.permute(2, 0, 1)[:, 1:], labels), (shared, torch.arange(5))):
        results = []
        for x in (logits.detach(), logits.contiguous()):
            x = x.requires_grad_()
            logprobs = rk.logprobs_from_logits(x, wanted)
            results.append((logprobs.detach(), *torch.autograd.grad(logprobs.square().sum(), x)))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_common_offset(backend_name):
    """(z_label - max) - log(sum): an offset of 4096, exact in fp32, changes no bit."""
    logits = torch.randn(6, 50).mul(256).round().div(256)
    labels = torch.arange(6)
    plain = rk.logprobs_and_entropy_from_logits(logits, labels)
    shifted = rk.logprobs_and_entropy_from_logits(logits + 4096.0, labels)
    assert torch.equal(plain[0], shifted[0]) and torch.equal(plain[1], shifted[1])


def test_blocks_of_rows(backend_name, monkeypatch):
    inputs = reference.example_inputs("ignored")
    whole = rk.logprobs_from_logits(**inputs)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 2 * 13)
    assert torch.equal(rk.logprobs_from_logits(**inputs), whole)


def test_bad_input(backend_name, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    logits, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    bad = [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels has shape [3], expected [2]"),
        ({"labels": labels.float()}, "labels has dtype float32, expected one of: int64, int32"),
        ({"logits": logits.long()}, "logits has dtype int64"),
        ({"logits": torch.zeros(2, 0)}, "logits has shape [2, 0], expected [..., V] with V >= 1"),
        ({"labels": [0, 1]}, "labels must be a torch.Tensor, got list"),
        ({"temperature": 0.0}, "temperature must be a number > 0.0 and < inf, got 0.0"),
        ({"temperature": math.nan}, "temperature must be a number > 0.0 and < inf, got nan"),
        ({"softcap": -1.0}, "softcap must be a number > 0.0 and < inf, got -1.0"),
        ({"labels": torch.tensor([0, 4])}, "labels holds 4 at position [1], expected values in [0, 4)"),
        ({"labels": torch.tensor([-1, 0])}, "labels holds -1 at position [0]"),
        ({"labels": labels.to("meta")}, f"labels is on meta, expected {logits.device}"),
    ]
    for change, message in bad:
        for function in (rk.logprobs_from_logits, rk.logprobs_and_entropy_from_logits):
            with pytest.raises(ValueError) as error:
                function(**{"logits": logits, "labels": labels, **change})
            assert message in str(error.value)


def test_label_out_of_range_without_check(backend_name, monkeypatch):
    """Where labels may not be read, as on a GPU, the row and its gradient become NaN, and no other row."""
    monkeypatch.setattr(module, "reads_values", lambda tensor: False)
    logits = torch.randn(3, 4, requires_grad=True)
    logprobs, entropy = rk.logprobs_and_entropy_from_logits(logits, torch.tensor([1, 4, 2]))
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    logprobs.sum().backward()
    assert logits.grad.isnan().any(-1).tolist() == [False, True, False]


def test_check_environment(monkeypatch):
    """Values are read on the CPU, elsewhere only with RLHF_KERNELS_CHECK=1, on no meta tensor."""
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.delenv("RLHF_KERNELS_CHECK", raising=False)
    assert _checks.reads_values(torch.zeros(1)) and not _checks.reads_values(on_gpu)
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")
    assert _checks.reads_values(on_gpu) and not _checks.reads_values(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("labels", ([[1, 2], [-100, 0]], None), ids=("labels", "entropy"))
def test_opcheck(backend_name, labels):
    labels = None if labels is None else torch.tensor(labels)
    logits = torch.randn(2, 2, 5, requires_grad=True)
    heat = torch.full((4,), 0.8)
    torch.library.opcheck(module.logprobs_fwd, (logits, labels, None, 0.9, 2.0, -100, True))
    torch.library.opcheck(module.logprobs_fwd, (logits.detach(), labels, heat, 1.0, None, -100, labels is None))
    rows = module.logprobs_fwd(logits.detach(), labels, heat, 1.0, 2.0, -100, True)
    upstream = torch.randn(2, 2)
    saved = (upstream if labels is not None else None, upstream, logits.detach(), labels, heat, *rows, 1.0, 2.0, -100)
    torch.library.opcheck(module.logprobs_bwd, saved)
    torch.library.opcheck(module.logprobs_bwd_, saved)


def test_compile(backend_name, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_CHECK", "1")

    def loss(logits, labels, inplace):
        logprobs, entropy = rk.logprobs_and_entropy_from_logits(logits, labels, inplace_backward=inplace)
        return (logprobs - 0.1 * entropy).sum() + rk.entropy_from_logits(logits).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for inplace in (False, True):
        logits = torch.randn(3, 7, requires_grad=True)
        labels = torch.tensor([1, -100, 6])
        expected = loss(logits, labels, False)
        (wanted,) = torch.autograd.grad(expected, logits)
        actual = compiled(logits, labels, inplace)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, logits)[0], wanted)
    with pytest.raises(ValueError, match="labels holds 7"):
        compiled(torch.randn(3, 7, requires_grad=True), torch.tensor([1, 2, 7]), False)


def test_same_answer(backend_name):
    """Same bits on every run, and a row does not depend on its neighbours."""
    inputs = reference.example_inputs("wide")
    logits, labels = inputs["logits"], inputs["labels"]
    runs = []
    for rows in (slice(None), slice(None), slice(1, 2)):
        x = logits[rows].clone().requires_grad_()
        logprobs, entropy = rk.logprobs_and_entropy_from_logits(x, labels[rows])
        (logprobs + entropy).sum().backward()
        runs.append((logprobs, entropy, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert all(torch.equal(a[1:2], b) for a, b in zip(runs[0], runs[2]))


def test_citizen(backend_name):
    logits, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    logprobs = rk.logprobs_from_logits(logits, labels)
    first = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logprobs.sum(), logits)[0])
    with torch.no_grad():
        assert not rk.logprobs_from_logits(logits, labels).requires_grad
    with torch.autocast(logits.device.type, dtype=torch.bfloat16):
        assert torch.equal(rk.logprobs_from_logits(logits, labels), logprobs)
    twice = rk.logprobs_from_logits(logits, labels) + 2 * rk.logprobs_from_logits(logits, labels)
    torch.testing.assert_close(torch.autograd.grad(twice.sum(), logits)[0], 3 * first)


VIEWS = {"whole": lambda x: x, "slice": lambda x: x[:, :-1], "transposed": lambda x: x.transpose(0, 1)}


@pytest.mark.parametrize("view", VIEWS)
def test_inplace_backward(backend_name, view):
    """The gradient lies where the logits were; whoever still needs the logits is told, not misled."""
    view = VIEWS[view]
    leaf = torch.randn(3, 4, 5, requires_grad=True)
    labels = torch.randint(0, 5, view(leaf).shape[:-1])
    (wanted,) = torch.autograd.grad(rk.logprobs_from_logits(view(leaf), labels).square().sum(), leaf)
    logits = view(leaf * 1.0)
    logprobs = rk.logprobs_from_logits(logits, labels, inplace_backward=True)
    other = logits.square().sum()
    logprobs.square().sum().backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, wanted)
    torch.testing.assert_close(logits.detach(), view(wanted))
    for needs_the_logits in (logprobs.sum(), other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            needs_the_logits.backward()


def test_inplace_backward_leaves_expanded_logits(backend_name):
    row = torch.randn(1, 5, requires_grad=True)
    before = row.detach().clone()
    rk.logprobs_from_logits(row.expand(3, 5), torch.arange(3), inplace_backward=True).sum().backward()
    assert torch.equal(row.detach(), before) and row.grad.isfinite().all()


def test_trap_25_bf16_log_softmax(backend_name):
    """bf16 log-softmax errs by 0.017 on average and 0.057 at most, 5 % of a ratio; ours only by its input's rounding.

    That rounding costs 0.012 and 0.033. Logits: standard deviation 2.5, 32768 tokens, the label at 5 to 10.
    """
    generator = torch.Generator().manual_seed(0)
    unrounded = 2.5 * torch.randn(128, 32768, generator=generator)
    labels, rows = torch.randint(0, 32768, (128,), generator=generator), torch.arange(128)
    unrounded[rows, labels] = 5 + 5 * torch.rand(128, generator=generator)
    logits = unrounded.bfloat16()
    truth = torch.log_softmax(unrounded.double(), -1)[rows, labels]
    of_rounded = torch.log_softmax(logits.double(), -1)[rows, labels]
    ours = rk.logprobs_from_logits(logits, labels).double()
    naive = (torch.log_softmax(logits, -1)[rows, labels].double() - truth).abs()
    assert naive.mean().item() == pytest.approx(0.017, rel=0.25) and naive.max().item() == pytest.approx(0.057, rel=0.1)
    assert (ours - truth).abs().mean() < 0.012 and (ours - truth).abs().max() < 0.033
    assert (ours - of_rounded).abs().max() < 2e-6


@pytest.mark.parametrize("vocab", (1, 3, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 4160, 5000))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(isa, dtype, vocab, assert_close_to_fp64):
    """Rows that fill a vector or a block exactly, by one too few and by one too many; rows start at any address."""
    generator = torch.Generator().manual_seed(vocab)
    wide = (4.0 * torch.randn(5, vocab + 3, generator=generator)).to(dtype)
    logits = wide[:, 2 : vocab + 2].detach()
    logits[1, vocab // 2] = -math.inf
    logits[2, -1] = 60.0  # the maximum stands in the last block
    labels = torch.randint(0, vocab, (5,), generator=generator)
    labels[2] = vocab - 1
    for options in ({"temperature": 0.8, "softcap": None}, {"temperature": 1.0, "softcap": 20.0}):
        leaf, logprobs, entropy = exact({"logits": logits, "labels": labels, **options})
        actual = logits.clone().requires_grad_()
        rows = rk.logprobs_and_entropy_from_logits(actual, labels, **options)
        for got, expected in zip(rows, (logprobs, entropy)):
            assert_close_to_fp64(got, expected.masked_fill(expected == -math.inf, -math.inf), torch.float32)
        (rows[1].sum() - rows[0][rows[0].isfinite()].sum()).backward()
        (entropy.sum() - logprobs[logprobs.isfinite()].sum()).backward()
        assert_close_to_fp64(actual.grad, leaf.grad, dtype)


def test_nan_is_told_from_banned(isa):
    """A NaN or +inf anywhere makes its row NaN, also among entries that are all banned; other rows do not notice."""
    logits = torch.full((4, 5000), -math.inf)
    logits[0, 4999] = logits[1, 10] = math.nan
    logits[2, 3000] = math.inf
    logits[3, 100] = 2.0
    logprobs, entropy = rk.logprobs_and_entropy_from_logits(logits, torch.tensor([0, 10, 3000, 100]))
    assert logprobs[:3].isnan().all() and entropy[:3].isnan().all()
    assert logprobs[3].item() == 0.0 and entropy[3].item() == 0.0


def test_same_bits_on_any_number_of_threads(isa):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(300, 3001, generator=generator), torch.randint(0, 3001, (300,), generator=generator)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaf = logits.clone().requires_grad_()
            rows = rk.logprobs_and_entropy_from_logits(leaf, labels)
            (rows[0] + rows[1]).sum().backward()
            results.append((*rows, leaf.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    alone = rk.logprobs_and_entropy_from_logits(logits[77:78], labels[77:78])
    assert torch.equal(alone[0], results[0][0][77:78]) and torch.equal(alone[1], results[0][1][77:78])


@pytest.mark.parametrize("options", ({"temperature": 0.7}, {"temperature": 1.3}, {"softcap": 30.0}), ids=str)
def test_log_probs_never_exceed_zero(isa, options):
    """One entry holds all probability: its log-prob is 0, not the rounding error of a scaled logit, however large."""
    for top in (3082.0, 1e9, 1e35):
        one = rk.logprobs_from_logits(torch.tensor([[top]]), torch.tensor([0]), **options)
        assert one.item() == 0.0
        logits = torch.tensor([[top, 0.5 * top, -top]], requires_grad=True)
        logprobs, entropy = rk.logprobs_and_entropy_from_logits(logits, torch.tensor([0]), **options)
        (grad,) = torch.autograd.grad(logprobs, logits)
        assert logprobs.item() <= 0 and entropy.item() >= 0 and grad.isfinite().all()
        if "softcap" not in options:
            assert logprobs.item() == 0.0 and torch.equal(grad, torch.zeros(1, 3))
