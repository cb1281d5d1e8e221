"""`linear` on Triton, with d/dlogits rounded and several chunks of tokens and of columns: its gradients by norm."""

import contextlib

import pytest
import torch

import rlhf_kernels as rk
from tests.on_gpu import OnGPU

OP = "linear"
triton = pytest.importorskip("triton", reason="the package triton is not installed")
tl = triton.language
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
N, H, V = 21, 16, 101


@triton.jit
def copy_kernel(source, target, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(target + lanes, tl.load(source + lanes))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_stores_round_to_nearest(many_chunks, dtype):
    """In the interpreter too, as the tests set it up."""
    values = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    rounded = torch.empty(1024, dtype=dtype, device=values.device)
    copy_kernel[(1,)](values, rounded, 1024)
    assert torch.equal(rounded, values.to(dtype))


@pytest.fixture
def many_chunks(monkeypatch):
    """Cuts small inputs into as many chunks as large ones have; they lie on the GPU if there is one."""
    from rlhf_kernels.triton import linear

    sizes = {
        "COLUMNS": 48,
        "FORWARD_COLUMNS": 16,
        "PART": 32,
        "BLOCK": 16,
        "LEAST_TOKENS": 8,
        "TOKENS": 8,
        "WIDE_BYTES": 4 * 8 * V,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(linear, name, value)
    monkeypatch.setattr(linear, "_even", lambda count, size: size)
    with OnGPU() if torch.cuda.is_available() else contextlib.nullcontext():
        yield


def gradients(backend, dtype, inputs, labels, upstream):
    """d hidden and d weight through log-probs and entropy, cross-entropy and KL, in a row."""
    with rk.backend(backend):
        hidden, weight = (x.to(dtype).requires_grad_() for x in inputs)
        logprobs, entropy = rk.linear_logprobs(hidden, weight, labels, return_entropy=True, temperature=0.7)
        weights = torch.linspace(-1, 2, N).to(logprobs.dtype) * upstream
        found = torch.autograd.grad(((logprobs + 0.3 * entropy) * weights).sum(), (hidden, weight))
        found += torch.autograd.grad(rk.linear_cross_entropy(hidden, weight, labels), (hidden, weight))
        ref = hidden.detach().flip(0)
        kl = rk.linear_kl(hidden, weight, ref, weight.detach()) + rk.linear_kl(
            hidden, weight, ref, weight.detach(), direction="forward"
        )
        return found + torch.autograd.grad((kl * weights).sum(), (hidden, weight))


def adapter_gradients(backend, dtype, inputs, adapter, labels, upstream):
    """Those of A and B, in fp32 beside a frozen head, through log-probs and entropy and cross-entropy, in a row."""
    with rk.backend(backend):
        hidden, weight = (x.to(dtype) for x in inputs)
        leaves = [x.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_() for x in adapter]
        options = {"lora": (*leaves, 2.0), "temperature": 0.7}
        logprobs, entropy = rk.linear_logprobs(hidden, weight, labels, return_entropy=True, **options)
        weights = torch.linspace(-1, 2, N).to(logprobs.dtype) * upstream
        found = torch.autograd.grad(((logprobs + 0.3 * entropy) * weights).sum(), leaves)
        return found + torch.autograd.grad(rk.linear_cross_entropy(hidden, weight, labels, **options), leaves)


@pytest.mark.parametrize("size", (1.0, 1e-9, 1e6))
@pytest.mark.parametrize("upstream", (1.0, 1e-4))
@pytest.mark.parametrize(("dtype", "bound"), ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)))
def test_gradients_of_an_adapter(many_chunks, dtype, bound, upstream, size):
    """The same bound for A and B, of whatever size they are: B is nearly 0 when training begins."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, H, generator=generator).to(dtype) for n in (N, V)]
    adapter = [torch.randn(4, H, generator=generator) / size, size * torch.randn(V, 4, generator=generator)]
    labels = torch.randint(0, V, (N,), generator=generator)
    actual = adapter_gradients("triton", dtype, inputs, adapter, labels, upstream)
    expected = adapter_gradients("reference", torch.float64, inputs, adapter, labels, upstream)
    for a, e in zip(actual, expected):
        assert (a.double() - e).norm() <= bound * e.norm()


@pytest.mark.parametrize("upstream", (1.0, 1e-4))
@pytest.mark.parametrize(("dtype", "bound"), ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)))
def test_gradients_are_rounded_once(many_chunks, dtype, bound, upstream):
    """By norm: an entry's roundings of dlogits and of the result add up to one unit in the last place of the dtype."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, H, generator=generator).to(dtype) for size in (N, V)]
    labels = torch.randint(0, V, (N,), generator=generator)
    actual = gradients("triton", dtype, inputs, labels, upstream)
    expected = gradients("reference", torch.float64, [x.double() for x in inputs], labels, upstream)
    for a, e in zip(actual, expected):
        assert a.dtype == dtype
        assert (a.double() - e).norm() <= bound * e.norm()


def test_a_backward_takes_its_sums_out_of_their_unit_once(many_chunks, monkeypatch):
    """fp16, three chunks of tokens: no product is multiplied by the unit, which would read and write its sum again."""
    from rlhf_kernels.triton import linear

    units, plain = [], linear.product

    def product(a, b, out, add=False, unit=None):
        units.append(unit)
        plain(a, b, out, add, unit)

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator).half().requires_grad_() for n in (N, V))
    labels, bias = torch.randint(0, V, (N,), generator=generator), torch.zeros(V).half().requires_grad_()
    leaves = hidden, weight, bias
    upstream = torch.linspace(-1, 2, N) * torch.where(torch.arange(N) < 8, 1.0, 1e-3)  # chunks of unlike sizes
    with rk.backend("triton"):
        log_probs = rk.linear_logprobs(hidden, weight, labels, bias=bias)
        monkeypatch.setattr(linear._Kernels, "product", staticmethod(product))
        found = torch.autograd.grad(log_probs, leaves, upstream)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.log_softmax(wide[0] @ wide[1].t() + wide[2], -1).gather(-1, labels[:, None]).squeeze(-1)
    wanted = torch.autograd.grad(exact, wide, upstream.double())
    assert len(units) > 12 and all(unit is None for unit in units)
    for a, e in zip(found, wanted):
        assert (a.double() - e).norm() <= 2**-10 * e.norm()
    assert (found[0][8:].double() - wanted[0][8:]).norm() <= 2**-10 * wanted[0][8:].norm()
