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
    "shape": (torch.ones(3, dtype=torch.bool), "row_mask has shape [3], expected [2]"),
    "dtype": (torch.ones(2), "row_mask has dtype float32, expected bool or an integer dtype, 1 = keep"),
    "not a tensor": ([True, True], "row_mask must be a torch.Tensor, got list"),
    "device": (torch.ones(2, dtype=torch.bool, device="meta"), "row_mask is on meta, expected cpu"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_masks(case):
    mask, message = BAD_MASKS[case]
    logits, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: rk.logprobs_from_logits(logits, labels, row_mask=mask),
        lambda: rk.logprobs_and_entropy_from_logits(logits, labels, row_mask=mask),
        lambda: rk.entropy_from_logits(logits, row_mask=mask),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
