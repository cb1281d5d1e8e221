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


def build_padding(case):
    """Token ids with offsets as padded rows, beside torch's own padding of a list of rows."""
    rows, count = case.sizes["N"], case.sizes["K"]
    counts = torch.randint(1, count + 1, (rows,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    ids = torch.randint(50257, (int(offsets[-1]),))

    def eager():
        split = ids.split(counts.tolist())
        return (torch.nn.utils.rnn.pad_sequence(split, batch_first=True, padding_value=-1),), ()

    calls = {"ours": lambda: ((rk.pad_kept(ids, offsets),), ()), "eager": eager}
    return Bench(calls={name: calls[name] for name in case.impls}, exact=eager, moved=8 * rows * count, roof="copy")


SIZES = {"N": 256, "H": 768, "V": 50257, "K": 20}
IMPLS = ("ours", "eager", "compile")
CASES = [
    Case("linear_kept_logprobs", "fwdbwd", "fp32", SIZES, IMPLS, build, (faster("eager", 2),)),
    Case("kept_logprobs_from_logits", "fwdbwd", "fp32", SIZES, IMPLS, build),
    Case("pad_kept", "fwd", "fp32", {"N": 2048, "K": 20}, ("ours", "eager"), build_padding),
]


def test_linear_kept_logprobs(row, measure):
    measure(row)


def test_kept_logprobs_from_logits(row, measure):
    measure(row)


def test_pad_kept(row, measure):
    measure(row)
