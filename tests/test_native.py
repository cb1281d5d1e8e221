"""The native CPU kernels of the ranking losses and their shared arithmetic, on every instruction set."""

import pytest
import torch

from rlhf_kernels import bradley_terry_loss, plackett_luce_loss
from rlhf_kernels.cpu import bradley_terry as native
from rlhf_kernels.reference import bradley_terry as reference


def in_fp64(inputs):
    return {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()}


@pytest.mark.parametrize("case", reference.CASES)
def test_values(isa, case, assert_close_to_fp64):
    inputs = reference.example_inputs(case, dtype=torch.float32)
    exact = in_fp64(inputs)
    for actual, expected in zip(native.bradley_terry_fwd(**inputs), reference.bradley_terry_fwd(**exact)):
        assert_close_to_fp64(actual, expected, torch.float32)
    order = ("scores", "ranks", "cu_groups")
    plackett_luce = native.plackett_luce_fwd(*(inputs[name] for name in order))
    for actual, expected in zip(plackett_luce, reference.plackett_luce_fwd(*(exact[name] for name in order))):
        assert_close_to_fp64(actual, expected, torch.float32)


@pytest.mark.parametrize("K", [1, 3, 4, 5, 8, 9, 15, 16, 17, 33, 150])
def test_values_every_block_size(isa, K, assert_close_to_fp64):
    """Prompts that fill a vector exactly, by one too few and by one too many, with ties, gaps and pair margins."""
    generator = torch.Generator().manual_seed(K)
    inputs = {
        "scores": torch.randn(3 * K, generator=generator),
        "ranks": torch.randint(-1, K, (3 * K,), generator=generator),
        "cu_groups": torch.arange(4) * K,
        "margins": torch.rand(3 * K, K + 1, generator=generator),
        "ties_half": True,
    }
    for actual, expected in zip(native.bradley_terry_fwd(**inputs), reference.bradley_terry_fwd(**in_fp64(inputs))):
        assert_close_to_fp64(actual, expected, torch.float32, scale=2)


def test_values_wide_ranks(isa):
    """Ranks are compared as 64-bit integers: time stamps order correctly, also when only high or low halves differ."""
    ranks = torch.tensor([2**62, 2**32, 2**32 + 1, 2**31, 2**31 - 1, 0, 2**40 + 2**31, 2**40])
    scores = torch.linspace(-1, 1, 8)
    small = ranks.argsort().argsort()
    cu_groups = torch.tensor([0, 8])
    wide = native.bradley_terry_fwd(scores, ranks, cu_groups, None, False)
    dense = native.bradley_terry_fwd(scores, small, cu_groups, None, False)
    assert all(torch.equal(a, b) for a, b in zip(wide, dense))


def test_pair_loss_accuracy(isa):
    """-log sigmoid over the whole range: relative error of loss and slope at most 4 ulp."""
    gap = torch.linspace(-87, 87, 8001)
    scores = torch.stack([gap, torch.zeros_like(gap)], 1).flatten()
    ranks = torch.tensor([0, 1]).repeat(len(gap))
    loss, grad, _ = native.bradley_terry_fwd(scores, ranks, torch.arange(len(gap) + 1) * 2, None, False)
    exact = torch.nn.functional.softplus(-gap.double(), threshold=1e9)
    slope = -torch.sigmoid(-gap.double())
    limit = 4 * torch.finfo(torch.float32).eps
    assert ((loss.double() - exact).abs() <= limit * exact).all()
    assert ((grad[::2].double() - slope).abs() <= limit * slope.abs()).all()
    assert torch.equal(grad[::2], -grad[1::2])


def test_trap_05_large_gap_is_finite(isa):
    scores = torch.tensor([[-60.0, 60.0]], requires_grad=True)
    loss = bradley_terry_loss(scores, torch.tensor([[0, 1]])).loss
    loss.backward()
    assert loss.item() == 120.0
    assert scores.grad.tolist() == [[-1.0, 1.0]]
    assert plackett_luce_loss(scores, torch.tensor([[0, 1]])).loss.item() == 120.0


def test_row_independent_and_same_bits_on_any_number_of_threads(isa):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 12, (700,), generator=generator)
    cu_groups = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    scores = torch.randn(int(cu_groups[-1]), generator=generator)
    ranks = torch.randint(0, 9, scores.shape, generator=generator)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(native.bradley_terry_fwd(scores, ranks, cu_groups, None, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    begin, end = cu_groups[77], cu_groups[78]
    alone = native.bradley_terry_fwd(scores[begin:end], ranks[begin:end], torch.tensor([0, end - begin]), None, True)
    loss, grad, stats = results[0]
    assert all(torch.equal(a, b) for a, b in zip(alone, (loss[77:78], grad[begin:end], stats[77:78])))


def test_scores_need_not_be_contiguous(isa):
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    ranks = torch.arange(4).expand(5, 4)
    transposed = bradley_terry_loss(scores.t(), ranks).loss
    assert torch.equal(transposed, bradley_terry_loss(scores.t().contiguous(), ranks.contiguous()).loss)
