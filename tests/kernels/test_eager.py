"""Eager calls go past the operators; compilers, tracers, modes, transforms and odd tensors get them. Results agree."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_kernels as rk
from rlhf_kernels import _autograd
from tests.kernels.calls import GPU, ON_BACKENDS, build, results, serving

COMPOSED = {"aggregate_loss", "importance_weights", "off_policy_mask", "high_entropy_mask", "wpo_weights"}
COMPOSED |= {"group_advantages", "PackedResponses.per_response", "shared_prefix_attention"}  # no operator in them
CALLS = [
    pytest.param(name, backend, marks=[pytest.mark.slow] if backend == "triton" and not GPU else [])
    for name, backend in ON_BACKENDS
    if name not in COMPOSED
]
LOGITS, LABELS = torch.linspace(-2, 3, 28).view(4, 7), torch.tensor([3, 0, -100, 6])


class Operators(TorchDispatchMode):
    """Those of this project that are called inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rlhf_kernels":
            self.seen.append(function._opname)
        return function(*args, **kwargs or {})


def operators_in(function):
    """Names of the operators that the profiler sees in a call."""
    with torch.autograd.profiler.profile() as profile:
        function()
    return {event.name for event in profile.function_events if event.name.startswith("rlhf_kernels::")}


@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_an_eager_call_makes_what_the_operators_make(name, backend):
    """Which check, besides, that no result shares memory with another tensor."""
    with serving(backend):
        call = build()[name]
        direct = results(call)
        assert operators_in(lambda: results(call)) == set()
        with Operators() as mode:
            found = results(call)
        assert mode.seen
        for x, y in zip(direct, found, strict=True):
            assert (x is None and y is None) or torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_without_autograd_the_results_are_the_same(name, backend):
    with serving(backend):
        call = build()[name]
        outputs = [x.detach() for x in call.function(*[x.clone().requires_grad_() for x in call.leaves])]
        for ways in (torch.no_grad, torch.inference_mode):
            with ways():
                found = list(call.function(*call.leaves))
            assert not any(x.requires_grad for x in found)
            for x, y in zip(outputs, found, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_function_modes_and_subclasses_get_the_operator():
    class Seen(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **kwargs or {})

    class Own(torch.Tensor):
        pass

    with Seen() as mode:
        expected = rk.logprobs_from_logits(LOGITS, LABELS)
    assert "rlhf_kernels.logprobs_fwd.default" in mode.names
    assert operators_in(lambda: rk.logprobs_from_logits(LOGITS.as_subclass(Own), LABELS)) != set()
    assert torch.equal(rk.logprobs_from_logits(LOGITS.as_subclass(Own), LABELS), expected)
    assert operators_in(lambda: rk.logprobs_from_logits(torch.nn.Parameter(LOGITS), LABELS)) == set()


def test_tensors_without_memory_or_negated_when_read_get_the_operator():
    expected = rk.logprobs_from_logits(-LOGITS, LABELS)
    assert torch.equal(rk.logprobs_from_logits(torch._neg_view(LOGITS), LABELS), expected)
    x = LOGITS.clone().requires_grad_()
    y = (-LOGITS).requires_grad_()
    (found,) = torch.autograd.grad(rk.logprobs_from_logits(torch._neg_view(x), LABELS).sum(), x)
    (wanted,) = torch.autograd.grad(rk.logprobs_from_logits(y, LABELS).sum(), y)
    assert torch.equal(found, -wanted)
    meta = rk.logprobs_from_logits(LOGITS.to("meta"), LABELS.to("meta"))
    assert meta.is_meta and meta.shape == (4,)


def test_a_trace_holds_the_operator():
    with torch._subclasses.FakeTensorMode() as mode:
        fake = rk.entropy_from_logits(mode.from_tensor(LOGITS))
    assert type(fake) is torch._subclasses.FakeTensor and fake.shape == (4,)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: rk.entropy_from_logits(x))(LOGITS)
    assert any("logprobs_fwd" in str(node.target) for node in graph.graph.nodes)
    traced = torch.jit.trace(lambda x: rk.entropy_from_logits(x), (LOGITS,), check_trace=False)
    assert "rlhf_kernels::logprobs_fwd" in str(traced.graph)
    assert torch.equal(traced(2 * LOGITS), rk.entropy_from_logits(2 * LOGITS))


def test_hooks_see_what_a_call_saves():
    x = LOGITS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(rk.logprobs_from_logits(x, LABELS).sum(), x)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        (found,) = torch.autograd.grad(rk.logprobs_from_logits(x, LABELS).sum(), x)
    assert any(t.shape == x.shape for t in packed) and torch.equal(found, expected)


def test_the_version_of_what_an_operator_writes_to_goes_up():
    """So that autograd notices a saved tensor that a direct call has written over."""
    library = "rlhf_kernels_test::doubled_"

    @torch.library.custom_op(library, mutates_args=("x",))
    def doubled_(x: torch.Tensor) -> None:
        x.numpy()[:] *= 2

    x = torch.ones(3)
    before = x._version
    _autograd.direct(doubled_)(x)
    assert x.tolist() == [2.0, 2.0, 2.0] and x._version == before + 1
