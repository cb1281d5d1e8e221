"""Log-probs over kept tokens from hidden states, beside the whole logits with the others at -inf."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import rlhf_kernels as rk
from benchmarks.cases import Bench, Case, compiled, faster
from benchmarks.test_linear import head


def flops(case) -> int:
    """2 N K H for each of three products."""
    return 6 * case.sizes["N"] * case.sizes["K"] * case.sizes["H"]


def whole(hidden, weight, labels, kept):
    logits = F.linear(hidden, weight)
    among = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, kept, True)
    log_p = logits.masked_fill(~among, float("-inf")).log_softmax(-1)
    return log_p.gather(-1, labels[:, None]).squeeze(-1)


def of_logits(hidden, weight, labels, kept):
    return rk.kept_logprobs_from_logits(F.linear(hidden, weight), labels, kept)


def build(case):
    rows, width, vocab, count = (case.sizes[name] for name in "NHVK")
    hidden, weight = head(rows, width, vocab, torch.float32)
    kept = torch.rand(rows, vocab).topk(min(count, vocab)).indices
    labels, upstream = kept[:, 0].clone(), torch.randn(rows) / rows
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def run(function, h, w):
        output = function(h, w, labels, kept)
        return (output,), torch.autograd.grad(output, (h, w), upstream.to(output.dtype))

    def exact():
        return run(whole, *(x.detach().double().requires_grad_() for x in leaves))

    functions = {"ours": of_logits if case.function.startswith("kept") else rk.linear_kept_logprobs}
    functions |= {"eager": whole, "compile": compiled(whole)}
    calls = {name: lambda f=f: run(f, *leaves) for name, f in functions.items()}
    return Bench(calls={name: calls[name] for name in case.impls}, exact=exact, flops=flops(case), roof="matmuls")


SIZES = {"N": 256, "H": 768, "V": 50257, "K": 20}
IMPLS = ("ours", "eager", "compile")
CASES = [
    Case("linear_kept_logprobs", "fwdbwd", "fp32", SIZES, IMPLS, build, (faster("eager", 2),)),
    Case("kept_logprobs_from_logits", "fwdbwd", "fp32", SIZES, IMPLS, build),
]


def test_linear_kept_logprobs(row, measure):
    measure(row)


def test_kept_logprobs_from_logits(row, measure):
    measure(row)
