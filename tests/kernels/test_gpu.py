"""What only a GPU can show: CUDA graphs, streams, sizes past 2^31. The op tests themselves run there as well."""

import pytest
import torch

import rlhf_kernels as rk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
BACKENDS = [(op, name) for op, row in rk.backends().items() for name in ("triton", "cuda") if name in row]


def calls(op):
    """A function of fresh inputs on the device, and the inputs, for one op."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, device="cuda", generator=generator)

    mask = torch.rand(64, 96, device="cuda", generator=generator) < 0.8
    tokens = [randn(64, 96) for _ in range(5)]
    labels = torch.randint(0, 5000, (64,), device="cuda", generator=generator)
    ranks = torch.rand(64, 9, device="cuda", generator=generator).argsort(-1)
    return {
        "logprobs": (lambda x: rk.logprobs_and_entropy_from_logits(x, labels), [randn(64, 5000)]),
        "linear": (lambda h, w: [rk.linear_logprobs(h, w, labels)], [randn(64, 32), randn(5000, 32)]),
        "kl": (lambda x, y: [rk.kl_from_logits(x, y)], [randn(64, 5000), randn(64, 5000)]),
        "advantages": (lambda r, v: rk.gae(r, v, mask), tokens[:2]),
        "policy": (lambda p, o, a: [rk.policy_loss(p, o, a, mask, objective=rk.GSPO()).loss], tokens[:3]),
        "ppo": (lambda p, o, a: [rk.ppo_loss(p, o, a, mask).loss], tokens[:3]),
        "bradley_terry": (lambda s: [rk.bradley_terry_loss(s, ranks).loss], [randn(64, 9)]),
        "preference": (lambda c, r: [rk.preference_loss(c, r, loss_type="simpo").loss], [randn(64), randn(64)]),
    }[op]


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


@pytest.mark.parametrize("name", ("triton", "cuda"))
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
