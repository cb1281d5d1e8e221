"""What only a GPU can show: CUDA graphs, streams, sizes past 2^31. The op tests themselves run there as well."""

import pytest
import torch

import rlhf_kernels as rk

GPU = torch.cuda.is_available()


def on_gpu(*values, op):
    """Parameters of a test on a GPU; skipped, with the reason, where it or this backend of the op is missing."""
    state = rk.backends()[op][values[-1]]
    skip = None if GPU and state == "available" else state if GPU else "there is no GPU"
    marks = [pytest.mark.gpu] + ([pytest.mark.skip(reason=f"{values[-1]}: {skip}")] if skip else [])
    return pytest.param(*values, marks=marks)


BACKENDS = [on_gpu(op, x, op=op) for op, row in rk.backends().items() for x in ("triton", "cuda") if x in row]


def calls(op, device="cuda"):
    """A function of fresh inputs on the device, and the inputs, for one op."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, device=device, generator=generator)

    mask = torch.rand(64, 96, device=device, generator=generator) < 0.8
    tokens = [randn(64, 96) for _ in range(5)]
    labels = torch.randint(0, 5000, (64,), device=device, generator=generator)
    ranks = torch.rand(64, 9, device=device, generator=generator).argsort(-1)
    return {
        "logprobs": (lambda x: rk.logprobs_and_entropy_from_logits(x, labels), [randn(64, 5000)]),
        "linear": (lambda h, w: [rk.linear_logprobs(h, w, labels)], [randn(64, 32), randn(5000, 32)]),
        "cross_entropy": (lambda x: [rk.cross_entropy_from_logits(x, labels, z_loss=1e-4)], [randn(64, 5000)]),
        "kl": (lambda x, y: [rk.kl_from_logits(x, y)], [randn(64, 5000), randn(64, 5000)]),
        "advantages": (lambda r, v: rk.gae(r, v, mask), tokens[:2]),
        "policy": (lambda p, o, a: [rk.policy_loss(p, o, a, mask, objective=rk.GSPO()).loss], tokens[:3]),
        "ppo": (lambda p, o, a: [rk.ppo_loss(p, o, a, mask).loss], tokens[:3]),
        "bradley_terry": (lambda s: [rk.bradley_terry_loss(s, ranks).loss], [randn(64, 9)]),
        "preference": (lambda *x: [rk.preference_loss(*x).loss], [randn(64) for _ in range(4)]),
    }[op]


@pytest.mark.parametrize("op", sorted({parameters.values[0] for parameters in BACKENDS}))
def test_the_calls_run_on_a_cpu(op):
    """What follows makes these calls on a GPU; here they are made in plain PyTorch."""
    call, inputs = calls(op, "cpu")
    with rk.backend("reference"):
        first, second = call(*inputs), call(*inputs)
    assert all(x.isfinite().all() and torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(("op", "name"), BACKENDS)
def test_a_captured_call_gives_the_same_bits(op, name):
    """No op waits for the device or allocates outside of PyTorch's pool, so all of them can be captured."""
    call, inputs = calls(op)
    with rk.backend(name):
        expected = [x.clone() for x in call(*inputs)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph, static = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        with torch.cuda.graph(graph):
            results = call(*static)
        for tensor in static:
            tensor.zero_()
        graph.replay()
        for tensor, value in zip(static, inputs):
            tensor.copy_(value)
        graph.replay()
    for actual, value in zip(results, expected):
        assert torch.equal(actual, value)


@pytest.mark.parametrize(("op", "name"), BACKENDS)
def test_the_current_stream_is_used(op, name):
    call, inputs = calls(op)
    with rk.backend(name):
        expected = [x.clone() for x in call(*inputs)]
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late = [torch.zeros_like(x) for x in inputs]
            for tensor, value in zip(late, inputs):
                tensor.copy_(value)
            results = call(*late)
        torch.cuda.synchronize()
    for actual, value in zip(results, expected):
        assert torch.equal(actual, value)


@pytest.mark.parametrize("name", [on_gpu(name, op="logprobs") for name in ("triton", "cuda")])
def test_offsets_past_2_31(name):
    """17000 rows of 131072 bf16 logits: entries beyond 2^31 give what the same rows give alone."""
    if torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    logits = torch.empty(17000, 131072, dtype=torch.bfloat16, device="cuda")
    logits[:100].normal_()
    logits[-100:] = logits[:100]
    labels = torch.arange(17000, device="cuda") % 100
    labels[-100:] = labels[:100]
    with rk.backend(name):
        logprobs, entropy = rk.logprobs_and_entropy_from_logits(logits[-100:], labels[-100:])
        logits[100:-100].zero_()
        whole, whole_entropy = rk.logprobs_and_entropy_from_logits(logits, labels)
    assert torch.equal(whole[-100:], logprobs) and torch.equal(whole_entropy[-100:], entropy)
    assert torch.equal(whole[:100], logprobs)
