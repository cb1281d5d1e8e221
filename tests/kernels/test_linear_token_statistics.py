"""Token statistics from hidden states and the LM head."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels import _linear_walk
from rlhf_kernels.reference import linear as reference
from tests.kernels.row_statistics import expected_statistics

OP = "linear"
FIELDS = rk.TokenStatistics._fields


@pytest.fixture(autouse=True)
def narrow_chunks(monkeypatch):
    """Several chunks of columns, as a large vocabulary has."""
    monkeypatch.setattr(_linear_walk, "NARROW", 5)
    if rk.backends()["linear"].get("triton") == "available":
        from rlhf_kernels.triton import linear

        monkeypatch.setattr(linear, "FORWARD_COLUMNS", 5)


@pytest.mark.parametrize("case", [case for case in reference.CASES if case != "empty"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_values_and_gradients(backend_name, case, dtype, assert_close_to_fp64):
    if dtype == torch.float64 and backend_name != "reference":
        pytest.skip("float64 is the reference's")
    given = reference.example_inputs(case, dtype=dtype)
    leaves = {k: given[k].clone().requires_grad_() for k in ("hidden_states", "weight", "bias") if k in given}
    found = rk.linear_token_statistics(**{**given, **leaves}, chunk_size=4)
    exact = {k: given[k].double().requires_grad_() for k in leaves}
    options = {k: x for k, x in given.items() if k not in ("hidden_states", "weight", "labels", "rows", "bias")}
    hidden, weight = exact["hidden_states"], exact["weight"]
    logits = reference.full_logits(hidden, weight, given["labels"], given.get("rows"), exact.get("bias"))
    wanted = expected_statistics(logits, given["labels"], **options)
    for name in FIELDS[:-1]:
        assert_close_to_fp64(getattr(found, name).detach(), wanted[name].detach(), torch.float32)
    assert torch.equal(found.is_top1, wanted["is_top1"])
    upstream = torch.randn(2, len(found.log_probs), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for outputs, inputs, store in ((found, leaves, []), ([wanted[k] for k in FIELDS], exact, [])):
        total = sum((torch.where(x.isfinite(), x, 0.0) * u.to(x.dtype)).sum() for x, u in zip(outputs[:2], upstream))
        store += torch.autograd.grad(total, list(inputs.values()))
        if outputs is found:
            ours = store
    for x, y in zip(ours, store):
        assert_close_to_fp64(x, y, dtype, gradient=True)


def test_ties_between_chunks(backend_name):
    weight = torch.zeros(12, 1)
    weight[2], weight[9] = 1.0, 1.0
    labels = torch.tensor([2, 9, 0])
    found = rk.linear_token_statistics(torch.tensor([[1.0], [1.0], [-1.0]]), weight, labels)
    assert found.is_top1.tolist() == [True, False, True]
    assert math.isclose(float(found.mean_logit[0]), 2 / 12, rel_tol=1e-6)


def test_from_logits_alike(backend_name):
    """Of a chunk that spans the vocabulary, what the logits give."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator)
    labels = torch.randint(0, 40, (2, 3), generator=generator)
    found = rk.linear_token_statistics(hidden.view(2, 3, 8), weight, labels, temperature=0.8)
    wanted = rk.token_statistics_from_logits((hidden @ weight.t()).view(2, 3, 40), labels, temperature=0.8)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
