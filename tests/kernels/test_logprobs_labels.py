"""What labels and masks of rows the functions from logits take."""

import math

import pytest
import torch

import rlhf_kernels as rk
from rlhf_kernels.reference import logprobs as reference

OP = "logprobs"


def gradient(outputs, leaf):
    """Of the leaf, for upstream gradients that differ."""
    outputs = [x for x in outputs if x.requires_grad]
    upstream = [torch.linspace(-1.0, 2.0, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in outputs]
    return torch.autograd.grad(outputs, leaf, upstream)[0]


@pytest.mark.parametrize("case", ("batched", "ignored", "empty"))
def test_int32_labels_are_int64_labels(backend_name, case):
    inputs = reference.example_inputs(case)
    wide = rk.logprobs_and_entropy_from_logits(**inputs)
    narrow = rk.logprobs_and_entropy_from_logits(**{**inputs, "labels": inputs["labels"].int()})
    alone = rk.logprobs_from_logits(**{**inputs, "labels": inputs["labels"].int()})
    assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1]) and torch.equal(alone, wide[0])


@pytest.mark.parametrize("dtype", (torch.bool, torch.int64, torch.uint8), ids=str)
def test_masked_rows_are_as_ignored_ones(backend_name, dtype):
    """0 and no gradient, whatever logits and labels are; the rows that are kept have the bits they have alone."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 3, 9, generator=generator), torch.randint(0, 9, (2, 3), generator=generator)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    dirty, astray = logits.clone(), labels.clone()
    dirty[mask == 0], astray[mask == 0] = math.nan, 1 << 40
    ignored = torch.where(mask == 1, labels, -100)
    alone = [logits.clone().requires_grad_() for _ in range(3)]
    masked = [dirty.clone().requires_grad_() for _ in range(3)]
    options = {"row_mask": mask.to(dtype)}
    expected = [
        [rk.logprobs_from_logits(alone[0], ignored)],
        rk.logprobs_and_entropy_from_logits(alone[1], ignored),
        [torch.where(mask == 1, rk.entropy_from_logits(alone[2]), 0.0)],
    ]
    found = [
        [rk.logprobs_from_logits(masked[0], astray, **options)],
        rk.logprobs_and_entropy_from_logits(masked[1], astray, **options),
        [rk.entropy_from_logits(masked[2], **options)],
    ]
    for theirs, ours, clean, leaf in zip(expected, found, alone, masked):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs))
        assert all(not x[mask == 0].any() and x[mask == 1].all() for x in ours)
        assert torch.equal(gradient(ours, leaf), gradient(theirs, clean))


def test_a_mask_and_ignore_index_together(backend_name):
    logits = torch.zeros(4, 8)
    logprobs, entropy = rk.logprobs_and_entropy_from_logits(
        logits, torch.tensor([1, -7, 2, -7]), ignore_index=-7, row_mask=torch.tensor([True, True, False, False])
    )
    wanted = torch.tensor([math.log(8), 0.0, 0.0, 0.0])
    torch.testing.assert_close(logprobs, -wanted)
    torch.testing.assert_close(entropy, wanted)


BAD_MASKS = {
    "shape": (lambda: torch.ones(3, dtype=torch.bool), "row_mask has shape [3], expected [2]"),
    "dtype": (lambda: torch.ones(2), "row_mask has dtype float32, expected bool or an integer dtype, 1 = keep"),
    "not a tensor": (lambda: [True, True], "row_mask must be a torch.Tensor, got list"),
    "device": (lambda: torch.ones(2, dtype=torch.bool, device="meta"), "row_mask is on meta, expected cpu"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_masks(case):
    mask, message = BAD_MASKS[case]
    options = {"row_mask": mask()}
    logits, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: rk.logprobs_from_logits(logits, labels, **options),
        lambda: rk.logprobs_and_entropy_from_logits(logits, labels, **options),
        lambda: rk.entropy_from_logits(logits, **options),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


@pytest.mark.parametrize("softcap", (None, 4.0), ids=("plain", "capped"))
def test_a_temperature_for_each_row(backend_name, softcap, assert_close_to_fp64):
    """Each row as alone under its own temperature; in float64 by PyTorch's own log_softmax."""
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(2, 3, 9, generator=generator)
    labels = torch.tensor([[1, -100, 8], [0, 4, 4]])
    heat = torch.tensor([[0.5, 0.0, 1.0], [2.0, 0.25, 1.0]])  # that of an ignored row is not read
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    log_p = (capped / torch.where(labels == -100, 1.0, heat).double().unsqueeze(-1)).log_softmax(-1)
    kept = (labels != -100).double()
    wanted = [
        log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * kept,
        -(log_p.exp() * log_p).sum(-1) * kept,
    ]
    found = rk.logprobs_and_entropy_from_logits(leaf, labels, temperature=heat, softcap=softcap)
    for ours, theirs in zip(found, wanted):
        assert_close_to_fp64(ours, theirs, torch.float32)
    assert_close_to_fp64(gradient(found, leaf), gradient(wanted, exact), torch.float32)
    alone = rk.logprobs_from_logits(logits[1, 1:2], labels[1, 1:2], temperature=0.25, softcap=softcap)
    assert torch.equal(alone[0], found[0][1, 1])


def test_a_temperature_for_each_row_of_an_entropy(backend_name):
    logits, heat = torch.tensor([[0.0, 2.0], [0.0, 4.0], [0.0, 1.0]]), torch.tensor([1.0, 2.0, 0.5])
    entropy = rk.entropy_from_logits(logits, temperature=heat.double(), row_mask=torch.tensor([1, 1, 0]))
    binary = math.log1p(math.exp(-2)) + 2 * math.exp(-2) / (1 + math.exp(-2))
    torch.testing.assert_close(entropy, torch.tensor([binary, binary, 0.0]))


BAD_TEMPERATURES = {
    "shape": (lambda: torch.ones(3), "temperature has shape [3], expected [2]"),
    "dtype": (lambda: torch.ones(2, dtype=torch.int64), "temperature has dtype int64"),
    "negative": (lambda: torch.tensor([1.0, -2.0]), "temperature holds -2.0, expected numbers > 0 and finite"),
    "nan": (lambda: torch.tensor([1.0, math.nan]), "temperature holds nan"),
    "infinite": (lambda: torch.tensor([math.inf, 1.0]), "temperature holds inf"),
    "device": (lambda: torch.ones(2, device="meta"), "temperature is on meta, expected cpu"),
}


@pytest.mark.parametrize("case", BAD_TEMPERATURES)
def test_bad_temperatures(case):
    heat, message = BAD_TEMPERATURES[case]
    options = {"temperature": heat()}
    logits, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: rk.logprobs_from_logits(logits, labels, **options),
        lambda: rk.entropy_from_logits(logits, **options),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
