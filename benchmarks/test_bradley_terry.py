"""Losses of ranked responses, beside a loop over prompts and the padded all-pairs tensor in PyTorch."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

import rlhf_kernels as rk
from benchmarks import roof
from benchmarks.cases import Bench, Case, compiled, doubled, faster

FEWEST = 4  # responses of the smallest prompt


def moved(case) -> int:
    """Bytes, for K = 4..9 on average 6.5: a score and a rank are read and a gradient written, 16 a response."""
    return int(case.sizes["P"] * (min(FEWEST, case.sizes["K"]) + case.sizes["K"]) / 2 * 16)


def padded_pairs(scores, ranks, index, present):
    """All pairs of every prompt as [P, K, K]; the mean over a prompt's pairs, then over prompts."""
    padded, rank = scores[index], ranks[index]
    better = (rank[:, :, None] < rank[:, None, :]) & present[:, :, None] & present[:, None, :]
    gaps = padded[:, :, None] - padded[:, None, :]
    losses = torch.where(better, -logsigmoid(gaps), 0).sum((1, 2))
    return (losses / better.sum((1, 2)).clamp(min=1)).mean()


def loop_over_prompts(scores, ranks, sizes):
    """As reward trainers write it: each prompt's scores, best first, and all their differences."""
    losses = []
    for own, rank in zip(scores.split(sizes), ranks.split(sizes)):
        ordered = own[rank.argsort()]
        gaps = ordered[:, None] - ordered[None, :]
        rows, columns = torch.triu_indices(len(own), len(own), 1)
        losses.append(-logsigmoid(gaps[rows, columns]).mean())
    return torch.stack(losses).mean()


def padded_choices(scores, ranks, index, present):
    """Plackett-Luce: each response, except the worst, among itself and the worse ones."""
    rank = torch.where(present, ranks[index], ranks.numel())
    order = rank.argsort(1)
    padded = torch.where(present, scores[index], -torch.inf).gather(1, order)
    rest = padded.flip(1).logcumsumexp(1).flip(1)
    choices = present.sum(1, keepdim=True) - 1
    counted = torch.arange(padded.shape[1]) < choices
    losses = torch.where(counted, rest - padded, 0).sum(1)
    return (losses / choices[:, 0].clamp(min=1)).mean()


def build(case):
    prompts, largest = case.sizes["P"], case.sizes["K"]
    sizes = torch.randint(min(FEWEST, largest), largest + 1, (prompts,))
    cu_groups = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    scores = torch.randn(int(cu_groups[-1])).requires_grad_()
    ranks = torch.cat([torch.randperm(size) for size in sizes.tolist()])
    present = torch.arange(largest) < sizes[:, None]
    index = torch.where(present, cu_groups[:-1, None] + torch.arange(largest), 0)
    as_list = sizes.tolist()
    plackett = case.function == "plackett_luce_loss"
    ours, padded = (rk.plackett_luce_loss, padded_choices) if plackett else (rk.bradley_terry_loss, padded_pairs)
    graph = compiled(padded)

    def run(function, x):
        loss = function(x)
        return (loss,), torch.autograd.grad(loss, x)

    calls = {
        "ours": lambda: run(lambda x: ours(x, ranks, cu_groups).loss, scores),
        "eager": lambda: run(lambda x: padded(x, ranks, index, present), scores),
        "eager-loop": lambda: run(lambda x: loop_over_prompts(x, ranks, as_list), scores),
        "compile": lambda: run(lambda x: graph(x, ranks, index, present), scores),
        "copy": roof.copy(moved(case)),
    }
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: run(lambda x: padded(x, ranks, index, present), scores.detach().double().requires_grad_()),
        moved=moved(case),
        roof="copy",
    )


def cases():
    pairs, choices = "bradley_terry_loss", "plackett_luce_loss"
    every = ("ours", "eager", "eager-loop", "compile", "copy")
    padded = ("ours", "eager", "compile", "copy")
    loop = faster("eager-loop", 20)
    found = [
        Case(pairs, "fwdbwd", "fp32", {"P": 1024, "K": 9}, every, build, (loop,)),
        Case(pairs, "fwdbwd", "fp32", {"P": 16384, "K": 9}, every, build, (loop, faster("eager", 4))),
        Case(choices, "fwdbwd", "fp32", {"P": 16384, "K": 9}, padded, build),
    ]
    curve = ("ours", "eager", "copy")
    for scale, values in (doubled(K=8), doubled(P=1024)):
        for value in values:
            sizes = {"P": 1024, "K": 9} | {scale: value}
            variant = f"by{scale}"
            found.append(Case(pairs, "fwdbwd", "fp32", sizes, curve, build, (), variant, scale, seconds=0.3))
    return found


CASES = cases()


def test_bradley_terry_loss(row, measure):
    measure(row)


def test_plackett_luce_loss(row, measure):
    measure(row)
