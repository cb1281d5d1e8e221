"""The rows that `benchmarks.gpu` measures: calls of the ops that have goals, beside eager and torch.compile.

The goals are an H200's. A row's `exact` is its float64 result for some rows of the batch.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import rlhf_kernels as rk
from benchmarks.cases import compiled
from benchmarks.test_policy import OBJECTIVES, eager_of
from rlhf_kernels import dispatch

BF16 = torch.bfloat16
CHECKED = 64  # rows that are compared with float64
LAST = 1024  # tokens of them: an advantage depends on later tokens alone, and the reference takes one at a time


@dataclass
class Row:
    """A call: its implementations, what it must move and compute, its goal, and its float64 result for some rows."""

    name: str
    shape: str
    calls: dict[str, Callable]
    bytes: float
    flops: float = 0.0
    goal_ms: float | None = None
    goal_share: float | None = None
    latency: bool = False  # timed as a graph's replay
    exact: Callable | None = None  # () -> tensors; compared with the first rows of what a call returns


def ours(op: str, call: Callable) -> dict[str, Callable]:
    """The call on each backend of the op that runs here."""
    return {name: on(name, call) for name in gpu_backends(op)}


def gpu_backends(op: str) -> list[str]:
    """Those that run here; with RLHF_KERNELS_BACKEND that one alone."""
    states, only = rk.backends()[op], os.environ.get("RLHF_KERNELS_BACKEND")
    names = [name for name, _ in dispatch.TABLE[op] if name not in ("cpu", "reference") and states[name] == "available"]
    return [name for name in names if only in (None, name)]


def on(name: str, call: Callable) -> Callable:
    def run():
        with rk.backend(name):
            return call()

    return run


def backwards(op: str, forward: Callable, eager: Callable, leaf: torch.Tensor, upstream) -> dict[str, Callable]:
    """The backward alone on each backend of the op, which must also have made the forward, and of eager."""
    mine = {name: on(name, differentiated(forward, leaf, upstream)) for name in gpu_backends(op)}
    return {**mine, "eager": differentiated(eager, leaf, upstream)}


@dataclass(frozen=True)
class Place:
    """Where the rows' tensors lie, and whether the shapes are the goals' or small ones."""

    device: str
    small: bool

    @property
    def columns(self) -> tuple[int, ...]:
        """Of a chunk of a head, the sizes to compare."""
        return (128, 256, 512) if self.small else (2048, 4096, 8192, 16384)

    def sizes(self, *pairs: tuple[int, int]) -> list[int]:
        """The first of each pair, or the second if the shapes are small."""
        return [pair[self.small] for pair in pairs]


def differentiated(forward: Callable, leaf: torch.Tensor, upstream) -> Callable:
    """Calls the backward of forward(), whose graph is made once and kept."""
    held = []

    def run():
        if not held:
            held.append(forward())
        return torch.autograd.grad(held[0], leaf, upstream, retain_graph=True)

    return run


def logits_rows(place):
    device = place.device
    for n, v in ((8192, 151936), (16, 151936), (256, 32768)):
        n, v = place.sizes((n, 8), (v, 1000))
        logits = torch.randn(n, v, device=device, dtype=BF16).mul_(2)
        labels = torch.randint(v, (n,), device=device)
        moved = n * v * 2

        def exact(logits=logits, labels=labels):
            p = torch.log_softmax(logits[:CHECKED].double(), -1)
            return p.gather(-1, labels[:CHECKED, None]).squeeze(-1), -(p.exp() * p).sum(-1)

        def eager(x=logits, y=labels):
            p = torch.log_softmax(x.float(), -1)
            return p.gather(-1, y[:, None]).squeeze(-1), -(p.exp() * p).sum(-1)

        def call(x=logits, y=labels):
            return rk.logprobs_and_entropy_from_logits(x, y)

        large = n * v > 1 << 29
        graph = functools.partial(compiled(eager), logits, labels)
        yield Row(
            "logprobs_and_entropy_from_logits, forward", f"{n}x{v}",
            {**ours("logprobs", call), "eager": eager, "compile": graph}, moved,
            goal_ms=0.63 if large else None, latency=not large, exact=exact,
        )  # fmt: skip
        leaf = logits.detach().requires_grad_()
        upstream = torch.randn(2, n, device=device) / n
        backward = backwards(
            "logprobs", functools.partial(call, leaf), functools.partial(eager, leaf), leaf, tuple(upstream)
        )

        def exact_gradient(x=logits, y=labels, upstream=upstream):
            x = x[:CHECKED].double().requires_grad_()
            p = torch.log_softmax(x, -1)
            rows = (p.gather(-1, y[:CHECKED, None]).squeeze(-1), -(p.exp() * p).sum(-1))
            return torch.autograd.grad(rows, x, tuple(upstream[:, :CHECKED].double()))

        yield Row(
            "logprobs_and_entropy_from_logits, backward", f"{n}x{v}", backward, 2 * moved,
            goal_ms=1.29 if large else None, exact=exact_gradient,
        )  # fmt: skip


def kl_rows(place):
    device = place.device
    n, v = place.sizes((8192, 8), (151936, 1000))
    logits = torch.randn(n, v, device=device, dtype=BF16).mul_(2).requires_grad_()
    ref = (logits.detach() + 0.3 * torch.randn(n, v, device=device)).to(BF16)

    def divergence(x, y):
        p, q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
        return (p.exp() * (p - q)).sum(-1)

    def eager(x, y):
        return divergence(x.float(), y.float())

    def exact():
        return (divergence(logits.detach()[:CHECKED].double(), ref[:CHECKED].double()),)

    detached, graph = logits.detach(), compiled(eager)
    calls = ours("kl", lambda: (rk.kl_from_logits(detached, ref),))
    calls |= {"eager": lambda: (eager(detached, ref),), "compile": lambda: (graph(detached, ref),)}
    yield Row("kl_from_logits, forward", f"{n}x{v}", calls, n * v * 4, goal_share=0.88, exact=exact)
    upstream = torch.randn(n, device=device) / n
    backward = backwards("kl", lambda: rk.kl_from_logits(logits, ref), lambda: eager(logits, ref), logits, upstream)
    yield Row("kl_from_logits, backward", f"{n}x{v}", backward, n * v * 6, goal_share=0.88)


def linear_rows(place):
    device = place.device
    n, h, v = place.sizes((8192, 16), (4096, 32), (151936, 500))
    hidden = torch.randn(n, h, device=device, dtype=BF16).requires_grad_()
    weight = torch.randn(v, h, device=device).mul_(2 / h**0.5).to(BF16).requires_grad_()
    labels = torch.randint(v, (n,), device=device)
    upstream = torch.randn(n, device=device) / n

    def exact():
        x = hidden.detach()[:CHECKED].double() @ weight.detach().double().t()
        return (torch.log_softmax(x, -1).gather(-1, labels[:CHECKED, None]).squeeze(-1),)

    def eager():
        return F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none").neg()

    def forward(call):
        def run():
            with torch.no_grad():
                return (call(),)

        return run

    def both(call, seed=None):
        return lambda: torch.autograd.grad(call(), (hidden, weight), seed)

    def logprobs():
        return rk.linear_logprobs(hidden, weight, labels)

    def loss():
        return rk.linear_cross_entropy(hidden, weight, labels)

    products, size = 2 * n * h * v, f"{n}x{h}x{v}"
    least = 2 * (n * h + v * h)
    rows = (
        ("linear_logprobs, forward", forward, logprobs, None, products, 16.0),
        ("linear_logprobs, forward + backward", both, logprobs, upstream, 4 * products, 69.0),
        ("linear_cross_entropy, forward + backward", both, loss, None, 3 * products, 50.0),
    )
    for name, how, call, seed, flops, goal in rows:
        calls = ours("linear", how(call, seed) if how is both else how(call))
        plain = eager if call is logprobs else lambda: -eager().mean()
        calls["eager"] = how(plain, seed) if how is both else how(plain)
        yield Row(name, size, calls, least, flops, goal_ms=goal, exact=exact if how is forward else None)


def gae_rows(place):
    device = place.device
    for b, t, goal, share in ((1024, 8192, None, 0.8), (256, 2048, 0.015, None), (4, 131072, None, None)):
        b, t = place.sizes((b, 4), (t, 300))
        rewards, values = torch.randn(2, b, t, device=device).unbind()
        mask = torch.ones(b, t, dtype=torch.bool, device=device)

        def call(rewards=rewards, values=values, mask=mask):
            return rk.gae(rewards, values, mask, gamma=1.0, lam=0.95)

        def exact(rewards=rewards, values=values, mask=mask):
            with rk.backend("reference"):
                last = (x[:8, -LAST:] for x in (rewards.double(), values.double(), mask))
                return rk.gae(*last, gamma=1.0, lam=0.95)

        yield Row(
            "gae", f"{b}x{t}", ours("advantages", call), b * t * 17, goal_ms=goal, goal_share=share,
            latency=goal is not None, exact=exact,
        )  # fmt: skip
    b, t = place.sizes((512, 4), (1024, 100))
    log_probs, ref, values = torch.randn(3, b, t, device=device).mul_(0.1).sub_(1).unbind()
    scores, mask = torch.randn(b, device=device), torch.ones(b, t, dtype=torch.bool, device=device)

    def fused():
        return tuple(rk.rlhf_advantages(scores, log_probs, ref, values, mask, kl_coef=0.05))

    yield Row("rlhf_advantages", f"{b}x{t}", ours("advantages", fused), b * t * 29, latency=True)


def ppo_rows(place):
    device = place.device
    for b, t, goal, share in ((1024, 8192, None, 0.75), (256, 1024, 0.012, None)):
        b, t = place.sizes((b, 4), (t, 100))
        old, advantages, old_values, returns = torch.randn(4, b, t, device=device).unbind()
        log_probs = (old + 0.1 * torch.randn(b, t, device=device)).requires_grad_()
        values = (old_values + 0.1 * torch.randn(b, t, device=device)).requires_grad_()
        mask = torch.rand(b, t, device=device) < 0.9

        def call(a=(log_probs, old, advantages, mask), v=(values, old_values, returns)):
            names = ("values", "old_values", "returns")
            return (rk.ppo_loss(*a, **dict(zip(names, v))).loss,)

        def both(call=call, leaves=(log_probs, values)):
            return torch.autograd.grad(call()[0], leaves)

        def eager(a=(log_probs, old, advantages, mask), v=(values, old_values, returns)):
            ratio, keep = torch.exp(a[0] - a[1]), a[3].float()
            policy = torch.maximum(-a[2] * ratio, -a[2] * ratio.clamp(0.8, 1.2))
            held = v[1] + (v[0] - v[1]).clamp(-0.2, 0.2)
            value = 0.5 * torch.maximum((v[0] - v[2]).square(), (held - v[2]).square())
            return ((policy + 0.1 * value) * keep).sum() / keep.sum()

        def eager_both(f=eager, leaves=(log_probs, values)):
            return torch.autograd.grad(f(), leaves)

        graph = functools.partial(eager_both, f=compiled(eager))
        calls = {**ours("ppo", both), "eager": eager_both, "compile": graph}
        yield Row(
            "ppo_loss, forward + backward", f"{b}x{t}", calls, b * t * 37, goal_ms=goal, goal_share=share,
            latency=goal is not None,
        )  # fmt: skip


def policy_rows(place):
    """With the KL, weights and every metric; GSPO must read log-probs and mask twice, and the advantages once."""
    device = place.device
    for b, t, latency in ((1024, 8192, False), (256, 1024, True)):
        b, t = place.sizes((b, 4), (t, 100))
        old, noise, advantages = torch.randn(3, b, t, device=device).unbind()
        old = old.abs().neg() - 0.01
        new = (old + 0.15 * noise).clamp(max=-1e-3).requires_grad_()
        others = (old, advantages, torch.rand(b, t, device=device) < 0.9, old + 0.1 * noise.flip(0), noise.sigmoid())
        for name, size in (("clip", 25), ("gspo", 34), ("cispo", 25)):
            eager = eager_of(name)

            def both(p=new, x=others, objective=OBJECTIVES[name]):
                options = {"objective": objective, "ref_log_probs": x[3], "kl": rk.KLTerm(0.1), "weights": x[4]}
                return torch.autograd.grad(rk.policy_loss(p, *x[:3], **options).loss, p)

            def plain(p=new, x=others, f=eager):
                return torch.autograd.grad(f(p, *x)[0], p)

            def exact(p=new, x=others, f=eager):
                p, (before, a, keep, *rest) = p.detach().double().requires_grad_(), x
                return torch.autograd.grad(f(p, before.double(), a.double(), keep, *(y.double() for y in rest))[0], p)

            calls = {
                **ours("policy", both),
                "eager": plain,
                "compile": functools.partial(plain, f=compiled(eager)),
            }
            continuous = name == "cispo"  # elsewhere a rounding at a bound switches a gradient off
            yield Row(
                f"policy_loss {name}, forward + backward", f"{b}x{t}", calls, b * t * size, latency=latency,
                exact=exact if continuous else None,
            )  # fmt: skip


def bradley_terry_rows(place):
    device = place.device
    for p, k, goal in ((4096, 16, 0.006), (1024, 256, None)):
        p, k = place.sizes((p, 8), (k, min(k, 24)))
        scores = torch.randn(p, k, device=device).requires_grad_()
        ranks = torch.stack([torch.randperm(k) for _ in range(p)]).to(device)

        def both(scores=scores, ranks=ranks):
            return torch.autograd.grad(rk.bradley_terry_loss(scores, ranks).loss, scores)

        def eager(s, r):
            gap = s[:, :, None] - s[:, None, :]
            better = r[:, :, None] < r[:, None, :]
            return (F.softplus(-gap) * better).sum((1, 2)).div(better.sum((1, 2))).mean()

        def eager_both(f=eager, scores=scores, ranks=ranks):
            return torch.autograd.grad(f(scores, ranks), scores)

        yield Row(
            "bradley_terry_loss, forward + backward", f"{p}x{k}", {**ours("bradley_terry", both), "eager": eager_both},
            p * k * 20, goal_ms=goal, latency=True,
        )  # fmt: skip


@contextlib.contextmanager
def forward_columns(count):
    """Chunks of so many columns in Triton's forward."""
    from rlhf_kernels.triton import linear

    before, linear.FORWARD_COLUMNS = linear.FORWARD_COLUMNS, count
    try:
        yield
    finally:
        linear.FORWARD_COLUMNS = before


def linear_columns_rows(place):
    """Log-probs from hidden states by the columns of a chunk in the forward: whether its logits stay in the cache."""
    n, h, v = place.sizes((8192, 16), (4096, 32), (151936, 500))
    hidden = torch.randn(n, h, device=place.device, dtype=BF16)
    weight = torch.randn(v, h, device=place.device).mul_(2 / h**0.5).to(BF16)
    labels = torch.randint(v, (n,), device=place.device)

    def call(count):
        with rk.backend("triton"), forward_columns(count):
            return (rk.linear_logprobs(hidden, weight, labels),)

    if "triton" in gpu_backends("linear"):
        calls = {f"triton {count}": functools.partial(call, count) for count in place.columns}
        yield Row("linear_logprobs, forward, by columns", f"{n}x{h}x{v}", calls, 2 * (n * h + v * h), 2 * n * h * v)


GROUPS = {
    "logprobs": logits_rows, "kl": kl_rows, "linear": linear_rows, "advantages": gae_rows, "ppo": ppo_rows,
    "bradley_terry": bradley_terry_rows, "policy": policy_rows, "linear_columns": linear_columns_rows,
}  # fmt: skip
