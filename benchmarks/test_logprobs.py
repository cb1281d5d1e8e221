"""Log-probs and entropy from logits, beside PyTorch and the trainers' own functions."""

from __future__ import annotations

import torch

import rlhf_kernels as rk
from benchmarks import peers, roof
from benchmarks.cases import DTYPES, Bench, Case, Skip, compiled, doubled, faster, within
from benchmarks.worker import Worker

BIG = ({"N": 512, "V": 151936}, {"N": 2048, "V": 50257})
ROWS = 16  # rows whose errors are looked at
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # torch reads it when it is loaded, so it takes a process of its own


def moved(case) -> int:
    """Bytes: the forward reads the logits once; the backward reads them again and writes their gradient."""
    logits = case.sizes["N"] * case.sizes["V"] * DTYPES[case.dtype].itemsize
    return logits * (1 if case.direction == "fwd" else 3)


def eager(logits, labels):
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None]).squeeze(-1)


def eager_in_fp32(logits, labels):
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, labels[:, None]).squeeze(-1)


def eager_with_entropy(logits, labels):
    log_probs = torch.log_softmax(logits, -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, labels[:, None]).squeeze(-1), entropy


def eager_with_entropy_in_fp32(logits, labels):
    return eager_with_entropy(logits.float(), labels)


def eager_entropy(logits, labels):
    return eager_with_entropy(logits, labels)[1]


def eager_statistics(logits, labels):
    """What DPO and SFT log of a token: log p, entropy, log sum p^2, mean logit, whether it is the most likely."""
    log_probs = torch.log_softmax(logits, -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    with torch.no_grad():
        more = torch.logsumexp(2 * log_probs, -1), logits.mean(-1)
        top = (logits.argmax(-1) == labels).to(logits.dtype)
    return log_probs.gather(-1, labels[:, None]).squeeze(-1), entropy, *more, top


def as_eager(found):
    """The results of `eager_statistics` out of ours."""
    return *found[:2], found.log_sum_sq_probs, found.mean_logit, found.is_top1.to(found.log_probs.dtype)


def functions(case):
    """{implementation: function of logits and labels} of a public function."""
    if case.function == "token_statistics_from_logits":
        return {
            "ours": lambda logits, labels: as_eager(rk.token_statistics_from_logits(logits, labels)),
            "eager": eager_statistics, "compile": compiled(eager_statistics),
        }  # fmt: skip
    if case.function == "entropy_from_logits":
        return {
            "ours": lambda logits, labels: rk.entropy_from_logits(logits),
            "eager": eager_entropy, "compile": compiled(eager_entropy), "trl": peers.trl_entropy(),
        }  # fmt: skip
    if case.function == "logprobs_from_logits":
        ours, plain, in_fp32 = rk.logprobs_from_logits, eager, eager_in_fp32
        others = {"trl": peers.trl_logprobs(), "verl": peers.verl_logprobs()}
    else:
        ours, plain, in_fp32 = rk.logprobs_and_entropy_from_logits, eager_with_entropy, eager_with_entropy_in_fp32
        others = {"trl": peers.trl_logprobs_and_entropy(), "verl": peers.verl_logprobs_and_entropy()}
    return {
        "ours": ours, "ours-inplace": lambda logits, labels: ours(logits, labels, inplace_backward=True),
        "eager": plain, "eager-fp32": in_fp32, "compile": compiled(plain), **others,
    }  # fmt: skip


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def build(case):
    dtype = DTYPES[case.dtype]
    logits = torch.randn(case.sizes["N"], case.sizes["V"]).mul_(2).to(dtype)
    labels = torch.randint(case.sizes["V"], (case.sizes["N"],))
    upstream = torch.randn(2, case.sizes["N"]) / case.sizes["N"]

    def forward(function, x):
        with torch.no_grad():
            return as_tuple(function(x, labels)), ()

    def forward_backward(function, x, rows=None):
        outputs = as_tuple(function(x, labels[:rows]))[:2]
        grads = [up[:rows].to(out.dtype) for out, up in zip(outputs, upstream)]
        return outputs, torch.autograd.grad(outputs, x, grads)

    def call(name, function):
        if isinstance(function, Skip):
            return function
        if case.direction == "fwd":
            return lambda: forward(function, logits)
        x = (logits.clone() if name == "ours-inplace" else logits).requires_grad_()
        return lambda: forward_backward(function, x)

    def exact():
        x = logits[:ROWS].detach().double()
        plain = eager_entropy if case.function == "entropy_from_logits" else functions(case)["eager"]
        if case.direction == "fwd":
            return as_tuple(plain(x, labels[:ROWS])), ()
        return forward_backward(plain, x.requires_grad_(), ROWS)

    calls = {name: call(name, f) for name, f in functions(case).items() if name in case.impls}
    calls |= {"read": roof.read(logits), "liger": peers.GPU["liger"]}
    calls["eager-hugepages"] = Worker(case, "eager", HUGE_PAGES)
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=exact,
        part=lambda result: tuple(tuple(x[:ROWS] for x in tensors) for tensors in result),
        moved=moved(case),
        roof="read",
    )


def cases():
    logprobs, both, entropy = "logprobs_from_logits", "logprobs_and_entropy_from_logits", "entropy_from_logits"
    found = []
    forward = ("ours", "eager", "compile", "trl", "verl", "liger", "read")
    backward = ("ours", "ours-inplace", "eager", "eager-hugepages", "compile", "trl", "read")
    in_place = (
        faster("eager", 7, "ours-inplace"), faster("eager-hugepages", 2.5, "ours-inplace"),
        within("read", 5.5, "ours-inplace"), faster("eager", 3),
    )  # fmt: skip
    goals = {
        logprobs: (faster("eager", 8), faster("compile", 2), within("read", 2.2)),
        both: (faster("eager", 22), faster("compile", 2.5), within("read", 2.5)),
    }
    for function in (logprobs, both):
        for sizes in BIG:
            found.append(Case(function, "fwd", "fp32", sizes, forward, build, goals[function]))
            half = (*forward[:2], "eager-fp32", *forward[2:])
            found.append(Case(function, "fwd", "bf16", sizes, half, build, (faster("eager", 8),)))
            found.append(Case(function, "fwdbwd", "fp32", sizes, backward, build, in_place))
    for sizes in BIG:
        found.append(Case(logprobs, "fwdbwd", "bf16", sizes, backward, build))
    for sizes in BIG:
        impls, goals = ("ours", "eager", "compile", "read"), (faster("eager", 20), within("read", 3.0))
        found.append(Case("token_statistics_from_logits", "fwd", "fp32", sizes, impls, build, goals))
    found.append(Case(entropy, "fwd", "fp32", BIG[1], ("ours", "eager", "compile", "trl", "read"), build))
    curve = ("ours", "ours-inplace", "eager", "compile", "read")
    for scale, values in (doubled(N=256), doubled(V=8192)):
        for value in values:
            sizes = {"N": 512, "V": 16384} | {scale: value}
            variant = f"by{scale}"
            found.append(Case(both, "fwdbwd", "fp32", sizes, curve, build, variant=variant, scale=scale, seconds=0.3))
    return found


CASES = cases()


def test_logprobs_from_logits(row, measure):
    measure(row)


def test_logprobs_and_entropy_from_logits(row, measure):
    measure(row)


def test_entropy_from_logits(row, measure):
    measure(row)


def test_token_statistics_from_logits(row, measure):
    measure(row)
