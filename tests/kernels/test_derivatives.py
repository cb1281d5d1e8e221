"""Derivatives other than a first gradient: right, or an error. Nothing passes for a constant."""

import pytest
import torch
from torch.autograd import forward_ad

from tests.kernels.calls import GPU, ON_BACKENDS, build, differentiated, results, serving, upstream_of

PLAIN = ("PackedResponses.per_response", "aggregate_loss")  # of PyTorch's own ops
# constants by their contract
TARGETS = tuple(name for name, call in build().items() if not call.differentiable)
TWICE = r"trying to differentiate twice .*, which has first derivatives only"
ELSEWHERE = r"is differentiated by torch\.func or in forward mode"
INTERPRETED = [] if GPU else ["triton"]


def calls(*but):
    """(name, backend) of every call but these; Triton's interpreter is slow."""
    return [
        pytest.param(name, backend, marks=[pytest.mark.slow] if backend in INTERPRETED else [])
        for name, backend in ON_BACKENDS
        if name not in but
    ]


def loss_of(call, *leaves):
    """A number that depends on all that a call returns and that is differentiable."""
    outputs = [x for x in call.function(*leaves) if x.is_floating_point()]
    return sum((x * upstream_of(x)).sum() for x in outputs)


@pytest.mark.parametrize("constant_upstream", (False, True))
@pytest.mark.parametrize(("name", "backend"), calls(*PLAIN, *TARGETS))
def test_a_gradient_of_a_gradient_is_an_error(name, backend, constant_upstream):
    with serving(backend):
        call = build()[name]
        leaves = [x.clone().requires_grad_() for x in call.leaves]
        inputs = [x * x for x in leaves]  # whose own second derivative goes on without the op's
        outputs = differentiated(call.function(*inputs))
        if constant_upstream:
            found = torch.autograd.grad(outputs[0].sum(), leaves, create_graph=True, allow_unused=True)
        else:
            found = torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves, create_graph=True)
        penalty = sum(x.square().sum() for x in found if x is not None)
        for again in (lambda: torch.autograd.grad(penalty, leaves, retain_graph=True), penalty.backward):
            with pytest.raises(RuntimeError, match=TWICE):
                again()


@pytest.mark.parametrize(("name", "backend"), calls(*TARGETS))
def test_first_gradients_are_the_same_with_a_graph_of_them_and_again(name, backend):
    with serving(backend):
        call = build()[name]
        leaves = [x.clone().requires_grad_() for x in call.leaves]
        outputs = differentiated(call.function(*leaves))
        upstream = [upstream_of(x) for x in outputs]
        in_place = name.endswith("in place")  # its backward spends the logits
        ways = [{"create_graph": True}] if in_place else [{"retain_graph": True}, {"create_graph": True}, {}]
        expected = results(call)[-len(leaves) :]
        for way in ways:
            found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, **way)
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(("name", "backend"), calls(*TARGETS))
def test_inputs_that_need_no_gradient_change_nothing_for_the_others(name, backend):
    with serving(backend):
        call = build()[name]
        expected = results(call)[-len(call.leaves) :]
        for wanted, gradient in enumerate(expected):
            leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(call.leaves)]
            outputs = call.function(*leaves)
            (found,) = torch.autograd.grad(loss_of_outputs(outputs), leaves[wanted])
            assert all(x.grad is None for x in leaves)
            torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def loss_of_outputs(outputs):
    return sum((x * upstream_of(x)).sum() for x in differentiated(outputs))


@pytest.mark.parametrize(("name", "backend"), calls(*PLAIN, *TARGETS))
def test_torch_func_and_forward_mode_are_errors(name, backend):
    with serving(backend):
        call = build()[name]
        leaves, tangents = call.leaves, [torch.ones_like(x) for x in call.leaves]
        if name != "shared_prefix_attention":  # under torch.func it takes PyTorch's own attention
            for way in (
                lambda: torch.func.grad(lambda *x: loss_of(call, *x))(*leaves),
                lambda: torch.func.jvp(lambda *x: loss_of(call, *x), tuple(leaves), tuple(tangents)),
                lambda: torch.func.jacfwd(lambda *x: loss_of(call, *x))(*leaves),
                lambda: torch.func.vmap(torch.func.grad(lambda *x: loss_of(call, *x)))(*[x[None] for x in leaves]),
            ):
                with pytest.raises(NotImplementedError, match=ELSEWHERE):
                    way()
        with forward_ad.dual_level():
            for place, (x, tangent) in enumerate(zip(leaves, tangents)):
                duals = [*leaves[:place], forward_ad.make_dual(x, tangent), *leaves[place + 1 :]]
                with pytest.raises(NotImplementedError, match=ELSEWHERE):
                    call.function(*duals)
            call.function(*leaves)


@pytest.mark.parametrize(("name", "backend"), [call for call in ON_BACKENDS if call[0] in TARGETS])
def test_targets_are_constants_in_forward_mode_too(name, backend):
    with serving(backend):
        call = build()[name]
        tangents = tuple(torch.ones_like(x) for x in call.leaves)
        outputs, found = torch.func.jvp(lambda *x: tuple(call.function(*x)), tuple(call.leaves), tangents)
        for x, y, tangent in zip(outputs, call.function(*call.leaves), found, strict=True):
            assert torch.equal(x, y) and not tangent.any()


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_made_of_pytorchs_ops_has_all_derivatives(name):
    call = build(torch.float64)[name]
    leaves = [x.clone().requires_grad_() for x in call.leaves]
    assert torch.autograd.gradgradcheck(lambda *x: call.function(*x)[0].exp(), leaves, check_fwd_over_rev=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("name", "backend"), calls())
def test_vmap_calls_an_op_for_each_example(name, backend):
    with serving(backend):
        call = build()[name]
        examples = [torch.stack((x, 0.5 * x, x)).requires_grad_(call.differentiable) for x in call.leaves]
        first = torch.func.vmap(lambda *x: call.function(*x)[0])(*examples)
        alone = [call.function(*[x[i] for x in examples])[0] for i in range(3)]
        assert same(first, torch.stack(alone), name)
        if call.differentiable:
            upstream = upstream_of(first)
            found = torch.autograd.grad(first, examples, upstream, allow_unused=True, retain_graph=True)
            expected = torch.autograd.grad(torch.stack(alone), examples, upstream, allow_unused=True)
            for x, y in zip(found, expected, strict=True):
                assert (x is None) == (y is None) and (x is None or same(x, y, name))


def same(x, y, name):
    """The same bits; attention takes another kernel under vmap."""
    return torch.allclose(x, y, atol=1e-6) if name == "shared_prefix_attention" else torch.equal(x, y)
