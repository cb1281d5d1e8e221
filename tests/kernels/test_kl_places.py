"""KL of logits whose rows lie in planes: read in their places, never copied."""

import importlib

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.reference import logprobs as rows_reference
from tests.kernels.places import COPIED, IN_PLACE, Allocated, V, laid, leave_out_the_interpreter

OP = "kl"


@pytest.mark.parametrize("direction", ("reverse", "forward"))
@pytest.mark.parametrize("name", (*IN_PLACE, *COPIED))
def test_values_and_gradients_are_those_of_dense_rows(backend_name, name, direction):
    """Both sides lie so, or one of them is dense."""
    x, dense = laid(name)
    other = dense.flip(-1)
    beside = laid(name)[0].copy_(other)
    results = []
    for sides in ((dense, other), (x, beside), (x, other), (dense, beside)):
        leaves = [side.detach().requires_grad_() for side in sides]
        kl = rk.kl_from_logits(*leaves, temperature=0.7, direction=direction)
        results.append((kl, *torch.autograd.grad(kl, leaves, torch.linspace(-1, 2, kl.numel()).view(kl.shape))))
    for found in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, results[0]))


@pytest.mark.parametrize("name", ("dense", "all but the last", "four dimensions", "batch last"))
def test_nothing_of_the_size_of_the_logits_is_copied(backend_name, name, monkeypatch):
    """Forwards no memory of that size, backwards the two gradients."""
    monkeypatch.setattr(rows_reference, "BLOCK_ELEMENTS", V)  # a row at a time
    (x, dense), ref = laid(name), laid(name)[0]
    rows, size = x.shape[:-1], dense.numel() * dense.element_size()
    backend = importlib.import_module(f"rlhf_kernels.{backend_name}.kl")
    if backend_name == "triton":
        leave_out_the_interpreter(monkeypatch)
    with Allocated() as allocated:
        saved = backend.kl_fwd(x, ref, 0.5, True)
    assert max(allocated.bytes) < size / 2
    with Allocated() as allocated:
        backend.kl_bwd(torch.ones(rows), x, ref, *saved, 0.5, True, True, True)
    assert sum(n >= size / 2 for n in allocated.bytes) == 2
