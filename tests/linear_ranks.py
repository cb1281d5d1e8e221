"""One rank of the vocabulary-parallel test of test_linear.py: python linear_ranks.py RANK WORLD RENDEZVOUS_FILE.

Each rank holds its shard of a head, of another size on each, and compares itself with the head in one piece.
"""

import sys

import torch
import torch.distributed as dist

import rlhf_kernels as rk

VOCAB = 13


def problem(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 6, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, 6, generator=generator).to(dtype)
    bias = torch.randn(VOCAB, generator=generator).to(dtype)
    bias[:5] = -torch.inf  # everything in the first rank's shard is banned
    labels = torch.tensor([5, 12, -100, 6, 7, 11, 2, 9, 10])
    return hidden, weight, bias, labels


def sharded(tensors, lines):
    """Copies that require grad: hidden states whole, head and bias cut to these lines."""
    hidden, weight, bias = tensors
    return [x.detach().clone().requires_grad_() for x in (hidden, weight[lines], bias[lines])]


def compare(loss_function, tensors, lines, tolerance):
    """Values and gradients of the shard against the whole."""
    results = []
    placement = {"process_group": dist.group.WORLD, "vocab_start_index": lines.start}
    for part, options in ((slice(None), {}), (lines, placement)):
        leaves = sharded(tensors, part)
        outputs = loss_function(*leaves, options)
        finite = [torch.where(x.isfinite(), x, 0.0) for x in outputs]
        weighted = sum((x * torch.linspace(0.5, 2.0, x.numel()).view(x.shape)).sum() for x in finite)
        results.append(([x.detach() for x in outputs], torch.autograd.grad(weighted, leaves)))
    (whole, grads), (split, split_grads) = results
    grads = (grads[0], grads[1][lines], grads[2][lines])
    for expected, actual in zip((*whole, *grads), (*split, *split_grads), strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


def losses(labels):
    """Functions of (hidden, weight, bias, options) to compare, each returning a tuple of tensors."""

    def logprobs(hidden, weight, bias, options):
        rows, temperature = torch.tensor([0, 3, 3, 3, 8, 1, 2, 2, 5]), torch.linspace(0.5, 1.5, 9)
        return rk.linear_logprobs(
            hidden, weight, labels, bias=bias, rows=rows, temperature=temperature, softcap=3.0, return_entropy=True,
            chunk_size=4, **options,
        )  # fmt: skip

    def entropy_alone(hidden, weight, bias, options):
        return rk.linear_logprobs(hidden, weight, labels, bias=bias, return_entropy=True, **options)[1:]

    def cross_entropy(hidden, weight, bias, options):
        kept = torch.where(labels == 2, -100, labels)
        return (rk.linear_cross_entropy(hidden, weight, kept, bias=bias, chunk_size=3, **options),)

    def ppo(hidden, weight, bias, options):
        old, advantages = torch.full((3, 3), -2.0), torch.linspace(-1, 1, 9).view(3, 3)
        mask = ((labels != 2) & (labels != -100)).view(3, 3)
        loss = rk.linear_ppo_loss(
            hidden.view(3, 3, -1), weight, labels.view(3, 3), old, advantages, mask, bias=bias, entropy_coef=0.1,
            chunk_size=2, **options,
        )  # fmt: skip
        return loss.loss, *loss.metrics.values()

    return logprobs, entropy_alone, cross_entropy, ppo


def main():
    rank, world, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    lines = (slice(0, 5), slice(5, VOCAB))[rank]
    placement = {"process_group": dist.group.WORLD, "vocab_start_index": lines.start}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        hidden, weight, bias, labels = problem(dtype)
        for function in losses(labels):
            compare(function, (hidden, weight, bias), lines, {"atol": tolerance, "rtol": tolerance})
    try:
        rk.linear_logprobs(hidden, weight[lines], torch.full((9,), VOCAB), **placement)
    except ValueError as error:
        assert f"expected values in [0, {VOCAB})" in str(error)
    else:
        raise AssertionError("a label beyond the whole vocabulary must raise on every rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
