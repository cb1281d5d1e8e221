"""Cross-entropy from logits with smoothed labels and a z-loss, beside PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import rlhf_kernels as rk
from benchmarks import roof
from benchmarks.cases import DTYPES, Bench, Case, compiled

BIG = ({"N": 512, "V": 151936}, {"N": 2048, "V": 50257})
ROWS = 16  # rows whose errors are looked at
SMOOTHING, Z = 0.1, 1e-4


def moved(case) -> int:
    """Bytes: the forward reads the logits once; the backward reads them again and writes their gradient."""
    return 3 * case.sizes["N"] * case.sizes["V"] * DTYPES[case.dtype].itemsize


def eager(logits, labels):
    losses = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING, reduction="none")
    return losses + Z * logits.logsumexp(-1).square()


def ours(logits, labels):
    return rk.cross_entropy_from_logits(logits, labels, label_smoothing=SMOOTHING, z_loss=Z, reduction="none")


def build(case):
    logits = torch.randn(case.sizes["N"], case.sizes["V"]).mul_(2).to(DTYPES[case.dtype]).requires_grad_()
    labels = torch.randint(case.sizes["V"], (case.sizes["N"],))
    upstream = torch.randn(case.sizes["N"]) / case.sizes["N"]

    def run(function, x, rows=None):
        losses = function(x, labels[:rows])
        return (losses,), torch.autograd.grad(losses, x, upstream[:rows].to(losses.dtype))

    functions = {"ours": ours, "eager": eager, "compile": compiled(eager)}
    calls = {name: lambda f=f: run(f, logits) for name, f in functions.items()}
    calls["read"] = roof.read(logits.detach())
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: run(eager, logits[:ROWS].detach().double().requires_grad_(), ROWS),
        part=lambda result: tuple(tuple(x[:ROWS] for x in tensors) for tensors in result),
        moved=moved(case),
        roof="read",
    )


IMPLS = ("ours", "eager", "compile", "read")
CASES = [Case("cross_entropy_from_logits", "fwdbwd", dtype, sizes, IMPLS, build) for sizes in BIG for dtype in DTYPES]


def test_cross_entropy_from_logits(row, measure):
    measure(row)
