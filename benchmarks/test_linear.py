"""Log-probs and losses from hidden states and the LM head, beside the whole logits, PyTorch's own and TRL's chunks."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

import rlhf_kernels as rk
from benchmarks import peers, roof
from benchmarks.cases import DTYPES, Bench, Case, Skip, compiled, doubled, faster, memory, within
from benchmarks.test_logprobs import as_eager, eager_statistics

BIG = {"N": 2048, "H": 768, "V": 50257}
ROWS, COLUMNS, BLOCK = 64, 128, 256  # rows of d hidden and d weight whose errors are looked at; rows of a float64 block


def products(case) -> dict[str, int]:
    """The matrix products that a call must make; a backward that comes later makes the logits once more."""
    if case.function == "linear_kl":
        return {"logits": 4}  # of both models, both in the forward and in the backward
    if case.function == "linear_token_statistics":
        return {"logits": 1, "grad_hidden": 0, "grad_weight": 0}  # forward alone
    frozen = case.variant == "frozen"
    logits = 2 if case.function == "linear_logprobs" and not frozen else 1
    return {"logits": logits, "grad_weight": 0 if frozen else 1}


def flops(case) -> int:
    """2 N H V for each matrix product; what is done to the logits is not counted."""
    count = sum(({"grad_hidden": 1, "grad_weight": 1} | products(case)).values())
    return 2 * case.sizes["N"] * case.sizes["H"] * case.sizes["V"] * count


def log_probs_of(hidden, weight, labels):
    return torch.log_softmax(F.linear(hidden, weight), -1).gather(-1, labels[:, None]).squeeze(-1)


def cross_entropy_of(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels)


def policy_loss(log_probs, old_log_probs, advantages):
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()


def policy_loss_with_kl(log_probs, old_log_probs, advantages, ref_log_probs, weights):
    """Clipped loss times importance weights, and 0.1 k3 to the reference."""
    ratio, distance = torch.exp(log_probs - old_log_probs), ref_log_probs - log_probs
    loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)) * weights
    return (loss + 0.1 * (torch.exp(distance) - distance - 1)).mean()


def kl_of(hidden, weight, ref_hidden, ref_weight):
    log_p = torch.log_softmax(F.linear(hidden, weight), -1)
    log_q = torch.log_softmax(F.linear(ref_hidden, ref_weight), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def torch_chunked(hidden, weight, labels):
    """PyTorch's own chunked loss; without options it would make the whole logits."""
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


def exact_by_rows(hidden, weight, labels, loss, frozen):
    """Float64: the loss of all rows' log-probs, d hidden of ROWS rows and d weight of COLUMNS rows of the head."""
    x, w = hidden.detach().double(), weight.detach().double()
    log_sum, picked = [], []
    for rows, targets in zip(x.split(BLOCK), labels.split(BLOCK)):
        logits = F.linear(rows, w)
        log_sum.append(logits.logsumexp(-1))
        picked.append(logits.gather(-1, targets[:, None]).squeeze(-1))
    log_sum = torch.cat(log_sum)
    log_probs = (torch.cat(picked) - log_sum).requires_grad_()
    output, upstream = loss(log_probs)
    (slope,) = torch.autograd.grad(output, log_probs, upstream)
    top = slope[:ROWS, None] * -(F.linear(x[:ROWS], w) - log_sum[:ROWS, None]).exp()
    top.scatter_add_(1, labels[:ROWS, None], slope[:ROWS, None])
    if frozen:
        return (output,), (top @ w,)
    left = slope[:, None] * -(F.linear(x, w[:COLUMNS]) - log_sum[:, None]).exp()
    left += slope[:, None] * (labels[:, None] == torch.arange(min(COLUMNS, len(w))))
    return (output,), (top @ w, left.T @ x)


def part(result):
    outputs, (grad_hidden, *grad_weight) = result
    return outputs, (grad_hidden[:ROWS], *(grad[:COLUMNS] for grad in grad_weight))


def errors(result, exact):
    """The largest and the mean |error| of log-probs or the loss, in nats; errors of d hidden and d weight by norm."""
    (output,), grads = result
    gap = (output.double() - exact[0][0]).abs()
    found = {"log p, max": gap.max().item(), "log p, mean": gap.mean().item()} if gap.dim() else {"loss": gap.item()}
    for name, actual, expected in zip(("d hidden", "d weight"), grads, exact[1]):
        found[name] = ((actual.double() - expected).norm() / expected.norm()).item()
    return found


def head(rows, width, vocab, dtype):
    """Hidden states and a head whose logits have a standard deviation of 2."""
    return torch.randn(rows, width).to(dtype), torch.randn(vocab, width).mul_(2 / width**0.5).to(dtype)


def build(case):
    rows, width, vocab = (case.sizes[name] for name in "NHV")
    dtype, frozen = DTYPES[case.dtype], case.variant == "frozen"
    hidden, weight = head(rows, width, vocab, dtype)
    labels, advantages, upstream = torch.randint(vocab, (rows,)), torch.randn(rows), torch.randn(rows) / rows
    old, mask = torch.zeros(rows), torch.ones(rows, dtype=torch.bool)
    if case.function in ("linear_ppo_loss", "linear_policy_loss"):
        old = log_probs_of(hidden, weight, labels) + 0.1 * torch.randn(rows)
    ref, factors = old + 0.1 * torch.randn(rows), torch.rand(rows) + 0.5
    leaves = (hidden,) if frozen else (hidden, weight)
    for leaf in leaves:
        leaf.requires_grad_()

    def run(function):
        if isinstance(function, Skip):
            return function

        def call():
            output = function(hidden, weight, labels)
            gradient = upstream.to(output.dtype) if output.dim() else None
            return (output,), torch.autograd.grad(output, leaves, gradient)

        return call

    def loss(log_probs):
        if case.function == "linear_logprobs":
            return log_probs, upstream.double()
        if case.function == "linear_cross_entropy":
            return -log_probs.mean(), None
        if case.function == "linear_policy_loss":
            others = (x.double() for x in (old, advantages, ref, factors))
            return policy_loss_with_kl(log_probs, *others), None
        return policy_loss(log_probs, old.double(), advantages.double()), None

    ours, eager, others = {
        "linear_logprobs": (rk.linear_logprobs, log_probs_of, {"trl": peers.trl_linear_logprobs()}),
        "linear_cross_entropy": (rk.linear_cross_entropy, cross_entropy_of, {"torch": torch_chunked}),
        "linear_ppo_loss": (
            lambda h, w, y: rk.linear_ppo_loss(h, w, y, old, advantages, mask).loss,
            lambda h, w, y: policy_loss(log_probs_of(h, w, y), old, advantages),
            {},
        ),
        "linear_policy_loss": (
            lambda h, w, y: (
                rk.linear_policy_loss(
                    h, w, y, old, advantages, mask, ref_log_probs=ref, kl=rk.KLTerm(0.1), weights=factors
                ).loss
            ),
            lambda h, w, y: policy_loss_with_kl(log_probs_of(h, w, y), old, advantages, ref, factors),
            {},
        ),
    }[case.function]
    calls = {"ours": ours, "eager": eager, "compile": compiled(eager), **others}
    if case.dtype != "fp32":
        calls["ours-fast"] = functools.partial(ours, precision="fast")
    calls = {name: run(function) for name, function in calls.items()} | peers.GPU
    calls["matmuls"] = roof.matmuls(rows, width, vocab, dtype, **products(case))
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: exact_by_rows(hidden, weight, labels, loss, frozen),
        part=part,
        errors=None if case.scale else errors,
        flops=flops(case),
        roof="matmuls",
    )


def build_kl(case):
    rows, width, vocab = (case.sizes[name] for name in "NHV")
    hidden, weight = head(rows, width, vocab, DTYPES[case.dtype])
    ref = hidden + 0.1 * torch.randn_like(hidden), weight + 0.1 * weight.std() * torch.randn_like(weight)
    upstream = torch.randn(rows) / rows
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def run(function):
        if isinstance(function, Skip):
            return function

        def call():
            output = function(*leaves, *ref)
            return (output,), torch.autograd.grad(output, leaves, upstream)

        return call

    def exact():
        x = hidden[:ROWS].detach().double().requires_grad_()
        output = kl_of(x, weight.detach().double(), ref[0][:ROWS].double(), ref[1].double())
        return (output,), (torch.autograd.grad(output, x, upstream[:ROWS].double())[0], None)

    calls = {"ours": rk.linear_kl, "eager": kl_of, "compile": compiled(kl_of), "trl": peers.trl_linear_kl()}
    calls = {name: run(function) for name, function in calls.items()}
    calls["matmuls"] = roof.matmuls(rows, width, vocab, DTYPES[case.dtype], **products(case))
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=exact,
        part=lambda result: ((result[0][0][:ROWS],), (result[1][0][:ROWS], None)),
        flops=flops(case),
        roof="matmuls",
    )


def build_statistics(case):
    rows, width, vocab = (case.sizes[name] for name in "NHV")
    hidden, weight = head(rows, width, vocab, DTYPES[case.dtype])
    labels = torch.randint(vocab, (rows,))

    def eager(h, w, y):
        return eager_statistics(F.linear(h, w), y)

    functions = {"ours": lambda *inputs: as_eager(rk.linear_token_statistics(*inputs)), "eager": eager}
    functions["compile"] = compiled(eager)
    calls = {name: lambda f=f: (f(hidden, weight, labels), ()) for name, f in functions.items()}
    calls["matmuls"] = roof.matmuls(rows, width, vocab, DTYPES[case.dtype], **products(case))
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: (eager(hidden[:ROWS].double(), weight.double(), labels[:ROWS]), ()),
        part=lambda result: (tuple(x[:ROWS] for x in result[0]), ()),
        flops=flops(case),
        roof="matmuls",
    )


def cases():
    logprobs, entropy, ppo = "linear_logprobs", "linear_cross_entropy", "linear_ppo_loss"
    recompute = within("matmuls", 1.05), memory("eager", 1 / 8)
    known = within("matmuls", 1.05), faster("eager", 1.1)
    policy, walked = "linear_policy_loss", (within("matmuls", 1.1), faster("eager", 1.1))
    rounded = (faster("eager", 1.0, "ours-fast"),)
    gpu = "liger", "cce", "verl"
    found = [
        Case(logprobs, "fwdbwd", "fp32", BIG, ("ours", "eager", "compile", "trl", *gpu, "matmuls"), build, recompute),
        Case(logprobs, "fwdbwd", "fp32", BIG, ("ours", "eager", "trl", "matmuls"), build, known, "frozen"),
        Case(logprobs, "fwdbwd", "bf16", BIG, ("ours", "ours-fast", "eager", "trl", "matmuls"), build, rounded),
        Case(entropy, "fwdbwd", "bf16", BIG, ("ours", "ours-fast", "eager", "torch", "matmuls"), build, rounded),
        Case(entropy, "fwdbwd", "fp32", BIG, ("ours", "eager", "compile", "torch", *gpu, "matmuls"), build, known),
        Case(entropy, "fwdbwd", "fp32", BIG, ("ours", "eager", "torch", "matmuls"), build, known, "frozen"),
        Case(ppo, "fwdbwd", "fp32", BIG, ("ours", "eager", "compile", "matmuls"), build, known),
        Case(policy, "fwdbwd", "fp32", BIG, ("ours", "eager", "compile", "matmuls"), build, walked),
        Case(ppo, "fwdbwd", "fp32", BIG, ("ours", "eager", "matmuls"), build, known, "frozen"),
    ]
    sizes, impls = {"N": 512, "H": 512, "V": 32000}, ("ours", "eager", "compile", "trl", "matmuls")
    found.append(Case("linear_kl", "fwdbwd", "fp32", sizes, impls, build_kl))
    impls, goals = ("ours", "eager", "compile", "matmuls"), (faster("eager", 1.5), within("matmuls", 1.1))
    found.append(Case("linear_token_statistics", "fwd", "fp32", BIG, impls, build_statistics, goals))
    curve = ("ours", "eager", "trl", "matmuls")
    for scale, values in (doubled(N=256), doubled(V=4096)):
        for value in values:
            sizes = {"N": 512, "H": 256, "V": 16384} | {scale: value}
            found.append(Case(logprobs, "fwdbwd", "fp32", sizes, curve, build, (), f"by{scale}", scale, seconds=0.3))
    return found


CASES = cases()


def test_linear_logprobs(row, measure):
    measure(row)


def test_linear_cross_entropy(row, measure):
    measure(row)


def test_linear_ppo_loss(row, measure):
    measure(row)


def test_linear_kl(row, measure):
    measure(row)


def test_linear_token_statistics(row, measure):
    measure(row)


def test_linear_policy_loss(row, measure):
    measure(row)
