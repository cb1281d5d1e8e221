"""Offsets past 2^31 elements without the memory: an address range in which only the pages that are written exist."""

import math
import mmap
import os
import sys

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import _native

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or sys.maxsize < 2**32, reason="needs a 64-bit Linux address space"
)
MANY = pytest.mark.skipif(
    _native.missing() is not None or "RLHF_KERNELS_SANITIZE" in os.environ,
    reason="takes minutes without the native kernels, or with a sanitizer in them",
)
MAP_NORESERVE = 0x4000  # Python names it from 3.13 on
FAR = 2**31 + 5  # elements from one row to the next


def untouched(count, dtype):
    """`count` zeros that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    region = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(region, dtype=torch.uint8).view(dtype)


def far_apart(x):
    """The rows of x [N, T], each FAR elements behind the one before it."""
    rows, columns = x.shape
    out = untouched((rows - 1) * FAR + columns, x.dtype).as_strided((rows, columns), (FAR, 1))
    return out.copy_(x)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(far, near):
    for a, b in zip(far, near, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_logits_far_apart(isa, dtype):
    """The gradient written over the logits as well."""
    near = normal(3, 1000, scale=3.0).to(dtype)
    labels = torch.tensor([999, 0, 500])
    results = []
    for x in (near, far_apart(near)):
        leaf = x.detach().requires_grad_()
        logprobs, entropy = rlhf_kernels.logprobs_and_entropy_from_logits(leaf, labels, inplace_backward=x is not near)
        (logprobs.sum() + entropy.sum()).backward()
        results.append((logprobs.detach(), entropy.detach(), leaf.grad))
    assert_same(*results)


def test_rows_of_two_logits_far_apart(isa):
    near = normal(3, 1000, scale=3.0), normal(3, 1000, seed=1)
    results = []
    for p, q in (near, [far_apart(x) for x in near]):
        leaf = p.detach().requires_grad_()
        kl = rlhf_kernels.kl_from_logits(leaf, q)
        kl.sum().backward()
        results.append((kl.detach(), leaf.grad, rlhf_kernels.approx_kl(p, q, estimator="k3")))
    assert_same(*results)


def test_rows_of_tokens_far_apart(isa):
    rewards, values, log_probs, ref = normal(4, 3, 200).unbind()
    mask = normal(3, 200, seed=1) > -1
    scores = normal(3, seed=2)
    results = []
    for change in (lambda x: x, far_apart):
        r, v, p, q, m = map(change, (rewards, values, log_probs, ref, mask))
        shaped = rlhf_kernels.rlhf_advantages(scores, p, q, v, m, kl_coef=0.1)
        results.append((*rlhf_kernels.gae(r, v, m), *shaped, rlhf_kernels.masked_whiten(r, m)))
    assert_same(*results)


def test_packed_tokens_far_into_the_buffer(isa):
    """A response that begins behind 2^31 others."""
    rewards, values = normal(2, 40).unbind()
    expected = rlhf_kernels.gae(rewards[None], values[None])
    far = [untouched(FAR + 40, torch.float32) for _ in range(4)]
    far[0][FAR:], far[1][FAR:] = rewards, values
    cu_seqlens = torch.tensor([FAR, FAR + 40])
    inputs = [far[0].data_ptr(), 0, far[1].data_ptr(), 0, 0, 0, 0, cu_seqlens.data_ptr(), 1, 0, 1.0, 0.95]
    _native._functions(isa)["gae_fwd_f32"](*inputs, far[2].data_ptr(), far[3].data_ptr(), 1)
    assert_same([far[2][FAR:], far[3][FAR:]], [expected[0][0], expected[1][0]])


def test_responses_far_into_the_buffer(isa):
    """A prompt whose responses begin behind 2^31 others; its margins stand at 2^31 times their columns."""
    scores, ranks, margins = normal(9), torch.arange(9) // 2, normal(9, 12).abs()
    leaf = scores[None].clone().requires_grad_()
    expected = rlhf_kernels.bradley_terry_loss(leaf, ranks[None], margins=margins[None, :, :9], ties="half")
    expected.loss.backward()
    far_scores, far_grad = untouched(FAR + 9, torch.float32), untouched(FAR + 9, torch.float32)
    far_ranks, far_margins = untouched(FAR + 9, torch.int64), untouched((FAR + 9) * 12, torch.float32)
    far_scores[FAR:], far_ranks[FAR:], far_margins[FAR * 12 :] = scores, ranks, margins.flatten()
    cu_groups, loss, stats = torch.tensor([FAR, FAR + 9]), torch.empty(1), torch.empty(8)
    inputs = [x.data_ptr() for x in (far_scores, far_ranks, cu_groups)]
    outputs = [x.data_ptr() for x in (loss, far_grad, stats)]
    functions = _native._functions(isa)
    functions["bradley_terry_fwd_f32"](*inputs, 1, far_margins.data_ptr(), 12, 1, *outputs, 1)
    assert_same([loss[0], far_grad[FAR:]], [expected.loss.detach(), leaf.grad[0]])
    expected = rlhf_kernels.plackett_luce_loss(scores[None], ranks[None]).loss
    functions["plackett_luce_fwd_f32"](*inputs, 1, *outputs, 1)
    assert torch.equal(loss[0], expected)


@MANY
@pytest.mark.slow
def test_more_than_2_31_logits_in_many_rows(assert_close_to_fp64):
    logits = normal(1, 2**15, scale=2.0).expand(2**16 + 1, -1)
    labels = torch.arange(2**16 + 1) % 2**15
    logprobs = rlhf_kernels.logprobs_from_logits(logits, labels)
    expected = logits[0].double().log_softmax(0)[labels]
    assert_close_to_fp64(logprobs, expected, torch.float32)


@MANY
@pytest.mark.slow
def test_more_than_2_31_logits_in_one_row(assert_close_to_fp64):
    """All zeros but for one: log p = 20 - log(V - 1 + e^20)."""
    vocab, label = 2**31 + 40, 2**31 + 33
    logits = untouched(vocab, torch.bfloat16)[None]
    logits[0, label] = 20.0
    logprob = rlhf_kernels.logprobs_from_logits(logits, torch.tensor([label]))
    expected = 20 - math.log(vocab - 1 + math.exp(20))
    assert_close_to_fp64(logprob, torch.tensor([expected], dtype=torch.float64), torch.float32)
