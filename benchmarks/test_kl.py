"""KL between two sets of logits, and its estimators, beside PyTorch."""

from __future__ import annotations

import torch

import rlhf_kernels as rk
from benchmarks import roof
from benchmarks.cases import DTYPES, Bench, Case, compiled, doubled, faster, within

ROWS = 16  # rows whose errors are looked at


def moved(case) -> int:
    """Bytes. The forward reads both logits; the backward reads both again and writes the policy's gradient.

    An estimator reads two log-probs and writes one number a token, its backward one number more of each kind.
    """
    if case.function == "approx_kl":
        return case.sizes["B"] * case.sizes["T"] * 4 * (3 if case.direction == "fwd" else 8)
    logits = case.sizes["N"] * case.sizes["V"] * DTYPES[case.dtype].itemsize
    return logits * (2 if case.direction == "fwd" else 5)


def eager(logits, ref_logits):
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def build(case):
    shape, dtype = (case.sizes["N"], case.sizes["V"]), DTYPES[case.dtype]
    logits = torch.randn(shape).mul_(2)
    ref_logits = (logits + 0.3 * torch.randn(shape)).to(dtype)
    logits = logits.to(dtype).requires_grad_(case.direction == "fwdbwd")
    upstream = torch.randn(shape[0]) / shape[0]

    def run(function, x, y, rows=None):
        output = function(x, y)
        if case.direction == "fwd":
            return (output,), ()
        return (output,), torch.autograd.grad(output, x, upstream[:rows].to(output.dtype))

    def exact():
        x = logits[:ROWS].detach().double().requires_grad_(case.direction == "fwdbwd")
        return run(eager, x, ref_logits[:ROWS].double(), ROWS)

    functions = {"ours": rk.kl_from_logits, "eager": eager, "compile": compiled(eager)}
    calls = {name: lambda f=f: run(f, logits, ref_logits) for name, f in functions.items()}
    calls["read"] = roof.read(logits.detach(), ref_logits)
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=exact,
        part=lambda result: tuple(tuple(x[:ROWS] for x in tensors) for tensors in result),
        moved=moved(case),
        roof="read",
    )


def k3(log_probs, ref_log_probs):
    gap = log_probs - ref_log_probs
    return torch.exp(-gap) - 1 + gap


def build_estimator(case):
    shape = case.sizes["B"], case.sizes["T"]
    log_probs = torch.randn(shape).abs().neg()
    ref_log_probs = log_probs + 0.5 * torch.randn(shape)
    upstream = torch.randn(shape) / shape[0]

    def run(function, x, y):
        x = x.detach().requires_grad_()
        output = function(x, y)
        return (output,), torch.autograd.grad(output, x, upstream.to(output.dtype))

    def ours(x, y):
        return rk.approx_kl(x, y, estimator="k3")

    functions = {"ours": ours, "eager": k3, "compile": compiled(k3)}
    calls = {name: lambda f=f: run(f, log_probs, ref_log_probs) for name, f in functions.items()}
    calls["copy"] = roof.copy(moved(case))
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: run(k3, log_probs.double(), ref_log_probs.double()),
        moved=moved(case),
        roof="copy",
    )


def cases():
    big, every = {"N": 512, "V": 151936}, ("ours", "eager", "compile", "read")
    found = [
        Case("kl_from_logits", "fwd", "fp32", big, every, build, (within("read", 2.5), faster("eager", 15))),
        Case("kl_from_logits", "fwdbwd", "fp32", big, every, build),
        Case("kl_from_logits", "fwd", "bf16", big, every, build),
        Case(
            "approx_kl", "fwdbwd", "fp32", {"B": 512, "T": 1024}, ("ours", "eager", "compile", "copy"), build_estimator,
            variant="k3",
        ),
    ]  # fmt: skip
    for value in doubled(V=8192)[1]:
        sizes = {"N": 512, "V": value}
        found.append(Case("kl_from_logits", "fwd", "fp32", sizes, every, build, (), "byV", "V", seconds=0.3))
    return found


CASES = cases()


def test_kl_from_logits(row, measure):
    measure(row)


def test_approx_kl(row, measure):
    measure(row)
