"""Log-probs over kept tokens: against the whole vocabulary with the others at -inf, by torch in float64."""

import math

import pytest
import torch

from rlhf_kernels import kept_logprobs_from_logits, linear_kept_logprobs, linear_logprobs, pad_kept
from rlhf_kernels.reference import kept as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def leaves_of(inputs, dtype):
    names = [name for name in ("hidden_states", "weight", "bias") if name in inputs]
    return {name: inputs[name].to(dtype).requires_grad_() for name in names}


def wanted(inputs):
    """((log-probs, entropy), gradients by name) through the whole logits, float64, for upstreams 0.3 and -0.7."""
    leaves = leaves_of(inputs, torch.float64)
    hidden = torch.where((inputs["labels"] != -100).unsqueeze(-1), leaves["hidden_states"], 0)
    logits = hidden @ leaves["weight"].t()
    if "bias" in leaves:
        logits = logits + leaves["bias"]
    options = {name: inputs[name] for name in ("temperature", "softcap") if name in inputs}
    results = reference.kept_logprobs(logits, inputs["labels"], inputs["kept"], **options)
    finite = torch.where(results[0].isfinite(), results[0], 0)
    total = 0.3 * finite.sum() - 0.7 * results[1].sum()
    return results, dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def ours(inputs, dtype, **changes):
    leaves = leaves_of(inputs, dtype)
    results = linear_kept_logprobs(**{**inputs, **leaves, **changes}, return_entropy=True)
    finite = torch.where(results[0].isfinite(), results[0], 0)
    total = 0.3 * finite.sum() - 0.7 * results[1].sum()
    return results, dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", reference.CASES)
def test_values_and_gradients(backend_name, served, dtype, case, assert_close_to_fp64):
    served(dtype)
    inputs = reference.example_inputs(case, dtype=dtype)
    (log_probs, entropy), grads = wanted(inputs)
    found, found_grads = ours(inputs, dtype)
    assert_close_to_fp64(found[0], log_probs.detach(), dtype, 4)
    assert_close_to_fp64(found[1], entropy.detach(), dtype, 4)
    for name, grad in grads.items():
        assert_close_to_fp64(found_grads[name], grad, dtype, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_logits(dtype, assert_close_to_fp64):
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(4, 5, 31, generator=generator, dtype=torch.float64)).to(dtype)
    kept = torch.rand(4, 5, 31, generator=generator, dtype=torch.float64).argsort(-1)[..., :6]
    kept[0, 0, 3:] = -1
    labels = kept[..., 1].clone()
    labels[1, 1], logits[1, 1] = -100, math.nan
    exact = logits.double().requires_grad_()
    results = reference.kept_logprobs(exact.flatten(0, 1), labels.flatten(), kept.flatten(0, 1), temperature=0.8)
    expected = torch.autograd.grad(results[0].sum() + 0.5 * results[1].sum(), exact)[0]
    leaf = logits.clone().requires_grad_()
    found = kept_logprobs_from_logits(leaf, labels, kept, temperature=0.8, return_entropy=True)
    for x, y in zip(found, results, strict=True):
        assert_close_to_fp64(x, y.detach().view(4, 5), dtype, 4)
    grad = torch.autograd.grad(found[0].sum() + 0.5 * found[1].sum(), leaf)[0]
    assert_close_to_fp64(grad, expected, dtype, 8)
    assert torch.equal(kept_logprobs_from_logits(logits, labels.int(), kept.int(), temperature=0.8), found[0].detach())


def test_by_hand():
    """Logits 0, ln 2, ln 3, ln 4; of {0, 1, 3} the shares are 1/7, 2/7, 4/7."""
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().expand(4, 4)
    kept = torch.tensor([[0, 1, 3], [3, 1, 0], [0, -1, -1], [1, 2, -1]])
    found = kept_logprobs_from_logits(logits, torch.tensor([3, 1, 0, 0]), kept)
    expected = torch.tensor([4 / 7, 2 / 7, 1.0, 0.0]).log()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_all_tokens_are_the_whole_vocabulary(backend_name):
    inputs = reference.example_inputs("small")
    every = torch.arange(23).expand(9, 23)
    found = linear_kept_logprobs(**{**inputs, "kept": every})
    torch.testing.assert_close(found, linear_logprobs(*list(inputs.values())[:3]), rtol=1e-5, atol=1e-6)


def test_a_label_that_is_not_kept(backend_name):
    """-inf and no gradient; so has a row that keeps nothing, and an entropy of 0."""
    inputs = reference.example_inputs("small")
    inputs["labels"] = torch.tensor([next(v for v in range(23) if v not in row) for row in inputs["kept"].tolist()])
    inputs["kept"][0] = -1
    (log_probs, entropy), grads = ours(inputs, torch.float32)
    assert (log_probs == -math.inf).all() and entropy[0] == 0 and (entropy[1:] > 0).all()
    assert (grads["hidden_states"][0] == 0).all() and grads["hidden_states"].isfinite().all()
    leaves = leaves_of(inputs, torch.float32)
    result = linear_kept_logprobs(**{**inputs, **leaves})
    grad = torch.autograd.grad(result.sum(), leaves["hidden_states"])[0]
    assert (grad == 0).all()


def test_offsets():
    """Token ids after each other and where each row begins, as vLLM gives them."""
    ids, offsets = torch.tensor([4, 9, 1, 2, 2], dtype=torch.int32), torch.tensor([0, 3, 3, 4, 5], dtype=torch.int32)
    expected = torch.tensor([[4, 9, 1], [-1, -1, -1], [2, -1, -1], [2, -1, -1]])
    assert torch.equal(pad_kept(ids, offsets), expected)
    assert torch.equal(pad_kept(ids, offsets, max_kept=2), expected[:, :2])
    assert torch.equal(pad_kept(ids[:0], torch.tensor([0, 0])), torch.tensor([[-1]]))
    assert pad_kept(ids[:0], torch.tensor([0])).shape == (0, 1)


def test_nearly_certain(assert_close_to_fp64):
    """What a certain token leaves to the others keeps its digits."""
    logits = torch.tensor([[40.0, 0.0, -3.0, 40.0]])
    found = kept_logprobs_from_logits(logits, torch.tensor([0]), torch.tensor([[0, 1, 2]]))
    assert found.item() == pytest.approx(-(math.exp(-40) + math.exp(-43)), rel=1e-5)


def test_bad_input():
    inputs = reference.example_inputs("small")

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            linear_kept_logprobs(**{**inputs, **changes})

    refused(r"kept holds 23 at position \[0, 0\]", kept=inputs["kept"].clone().fill_(23))
    refused(r"kept holds -2", kept=inputs["kept"].clone().fill_(-2))
    refused(r"kept has shape \[9\]", kept=inputs["labels"])
    refused(r"kept has shape \[9, 0\]", kept=inputs["kept"][:, :0])
    refused("kept has dtype float32", kept=inputs["kept"].float())
    refused(r"labels has shape \[3\]", labels=inputs["labels"][:3])
    refused("temperature", temperature=0.0)
    with pytest.raises(ValueError, match="cu_kept ends with 2"):
        pad_kept(torch.arange(5), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="max_kept"):
        pad_kept(torch.arange(5), torch.tensor([0, 5]), max_kept=0)
