"""`linear` as a GPU computes it, on CPU tensors: rounded d/dlogits, several chunks of tokens and of columns."""

import pytest
import torch

import rlhf_kernels as rk

OP = "linear"
pytest.importorskip("triton", reason="the package triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where the op's own tests do this")
N, H, V = 21, 16, 101


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Rounds where a GPU does, and cuts small inputs into as many chunks as large ones have."""
    from rlhf_kernels.triton import linear

    def rounding(kernels, hidden, weight, fast):
        kernels.dtype, kernels.narrow = hidden.dtype, None

    monkeypatch.setattr(linear._Kernels, "__init__", rounding)
    sizes = {"COLUMNS": 48, "PART": 32, "BLOCK": 16, "LEAST_TOKENS": 8, "TOKENS": 8, "WIDE_BYTES": 4 * 8 * V}
    for name, value in sizes.items():
        monkeypatch.setattr(linear, name, value)
    monkeypatch.setattr(linear, "_even", lambda count, size: size)


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
def test_gradients_of_an_adapter(as_on_a_gpu, dtype, bound, upstream, size):
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
def test_gradients_are_rounded_once(as_on_a_gpu, dtype, bound, upstream):
    """By norm: an entry's roundings of dlogits and of the result add up to one unit in the last place of the dtype."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, H, generator=generator).to(dtype) for size in (N, V)]
    labels = torch.randint(0, V, (N,), generator=generator)
    actual = gradients("triton", dtype, inputs, labels, upstream)
    expected = gradients("reference", torch.float64, [x.double() for x in inputs], labels, upstream)
    for a, e in zip(actual, expected):
        assert a.dtype == dtype
        assert (a.double() - e).norm() <= bound * e.norm()
