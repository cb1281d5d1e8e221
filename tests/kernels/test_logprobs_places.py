"""Rows of logits that lie in planes, as those of logits[:, :-1] do: read and written in their places, never copied."""

import importlib

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels._planes import blocks, places, planes
from rlhf_kernels.reference import logprobs as reference
from tests.kernels.places import COPIED, IN_PLACE, Allocated, V, laid, leave_out_the_interpreter

OP = "logprobs"
MANY = [name for name in IN_PLACE if name != "one row"]  # one is no larger than its results


@pytest.mark.parametrize("name", (*IN_PLACE, *COPIED))
def test_planes_are_the_rows_in_order(name):
    x, dense = laid(name)
    rows, beside = planes(x, torch.zeros_like(dense))
    batch, length, vocab = rows.shape
    assert torch.equal(rows.reshape(-1, vocab), dense.reshape(-1, vocab)) and beside.shape == rows.shape
    assert places(rows) == (length, *rows.stride()[:2]) and rows.stride(2) == 1
    assert (rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == (name in IN_PLACE)
    for entries in (1, 2 * V, 7 * V, 1000 * V):
        cut = blocks(rows, entries)
        found = torch.cat([rows[place].reshape(-1, vocab) for _, place in cut])
        assert torch.equal(found, dense.reshape(-1, vocab))
        assert [i for part, _ in cut for i in range(part.start, part.stop)] == list(range(batch * length))


def test_planes_of_two_layouts_have_the_same_rows():
    """The first tensor that lies in planes decides; a dense one is cut as it is, another layout is copied."""
    base = torch.randn(3, 4, V)
    sliced, dense, other = base[:, :2], base[:, 2:].contiguous(), torch.randn(2, 3, V).transpose(0, 1)
    wide = torch.randn(2, 4, V)[:, :3].reshape(3, 2, V)
    rows = planes(dense, sliced, other, wide)
    assert [tuple(x.shape) for x in rows] == [(3, 2, V)] * 4
    assert all(torch.equal(x, y) for x, y in zip(rows, (dense, sliced, other, wide)))
    kept = [
        x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for x, y in zip(rows, (dense, sliced, other))
    ]
    assert kept == [True, True, True]


@pytest.mark.parametrize("name", (*IN_PLACE, *COPIED))
def test_values_and_gradients_are_those_of_dense_rows(backend_name, name):
    x, dense = laid(name)
    labels = torch.arange(x.shape[:-1].numel()).view(x.shape[:-1])
    labels = torch.where(labels % 3 == 2, -100, labels % x.shape[-1])
    results = []
    for logits in (x, dense):
        leaf = logits.detach().requires_grad_()
        outputs = (
            *rk.logprobs_and_entropy_from_logits(leaf, labels, temperature=0.7),
            rk.logprobs_from_logits(leaf, labels, softcap=5.0),
            rk.entropy_from_logits(leaf),
        )
        upstream = [torch.linspace(-1, 2, y.numel()).view(y.shape) for y in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, leaf, upstream)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


@pytest.mark.parametrize(
    "name", [name for name in IN_PLACE if name != "one row"]
)  # which is no larger than its results
def test_nothing_of_the_size_of_the_logits_is_copied(backend_name, name, monkeypatch):
    """Forwards no memory of that size, backwards the gradient, and nothing where it is written over the logits."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", V)  # a row at a time
    x, dense = laid(name)
    rows, size = x.shape[:-1], dense.numel() * dense.element_size()
    labels = torch.zeros(rows, dtype=torch.int64)
    backend = importlib.import_module(f"rlhf_kernels.{backend_name}.logprobs")
    if backend_name == "triton":
        leave_out_the_interpreter(monkeypatch)
    with Allocated() as allocated:
        saved = backend.logprobs_fwd(x, labels, None, 0.5, None, -100, True)
    assert max(allocated.bytes) < size / 2
    given = (torch.ones(rows), torch.ones(rows), x, labels, None, *saved, 0.5, None, -100)
    with Allocated() as allocated:
        gradient = backend.logprobs_bwd(*given)
    assert sum(n >= size / 2 for n in allocated.bytes) == 1
    before = x.clone()
    with Allocated() as allocated:
        backend.logprobs_bwd(*given, inplace=True)
    assert max(allocated.bytes, default=0) < size / 2
    assert torch.equal(x, gradient.view(x.shape)) and not torch.equal(x, before)


def test_inplace_backward_leaves_what_lies_between(backend_name):
    """The rows of the last tokens, which the slice leaves out, keep what they hold."""
    base = torch.randn(2, 4, V)
    leaf = base.clone().requires_grad_()
    logits = leaf * 1.0
    rk.logprobs_from_logits(
        logits[:, :-1], torch.zeros(2, 3, dtype=torch.int64), inplace_backward=True
    ).sum().backward()
    assert torch.equal(logits[:, -1].detach(), base[:, -1])
    assert torch.equal(logits[:, :-1].detach(), leaf.grad[:, :-1]) and not leaf.grad[:, -1].any()
