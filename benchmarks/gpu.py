"""The ops that have goals, on a GPU: time, share of the roof, peak memory, error, beside eager and compile.

    python -m benchmarks.gpu OUTDIR [--only OP] [--seconds 300]     times, and writes OUTDIR/<device>.json
    python -m benchmarks.gpu --check                                small calls of every kernel, on a CPU too

The roof of a row is the larger of its bytes over the measured bandwidth of a copy and its floating-point operations
over the measured rate of a bf16 product. Calls are timed with events, the second-level cache overwritten in between,
and the median counts; where latency rules, what is timed is the replay of a CUDA graph. The goals are an H200's.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import rlhf_kernels as rk
from benchmarks.gpu_timing import ceilings, replayed, timed
from benchmarks.test_policy import OBJECTIVES, eager_of
from rlhf_kernels import dispatch

BF16 = torch.bfloat16
CHECKED = 64  # rows that are compared with float64


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
    states = rk.backends()[op]
    return [name for name, _ in dispatch.TABLE[op] if name not in ("cpu", "reference") and states[name] == "available"]


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
        yield Row(
            "logprobs_and_entropy_from_logits, forward", f"{n}x{v}",
            {**ours("logprobs", call), "eager": eager, "compile": torch.compile(eager)}, moved,
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

    detached, compiled = logits.detach(), torch.compile(eager)
    calls = ours("kl", lambda: (rk.kl_from_logits(detached, ref),))
    calls |= {"eager": lambda: (eager(detached, ref),), "compile": lambda: (compiled(detached, ref),)}
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
                return rk.gae(rewards.double()[:8], values.double()[:8], mask[:8], gamma=1.0, lam=0.95)

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

        compiled = torch.compile(eager)
        calls = {
            **ours("ppo", both), "eager": eager_both,
            "compile": lambda leaves=(log_probs, values), f=compiled: torch.autograd.grad(f(), leaves),
        }  # fmt: skip
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
                "compile": functools.partial(plain, f=torch.compile(eager)),
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


GROUPS = {
    "logprobs": logits_rows, "kl": kl_rows, "linear": linear_rows, "advantages": gae_rows, "ppo": ppo_rows,
    "policy": policy_rows, "bradley_terry": bradley_terry_rows,
}  # fmt: skip


def worst(result, exact) -> float:
    """Largest difference, relative to the largest entry of each exact tensor."""
    found = 0.0
    for actual, expected in zip(result, exact):
        gap = (actual[: len(expected)].double() - expected).abs().max()
        found = max(found, (gap / expected.abs().max().clamp(min=1e-30)).item())
    return found


def measure(row: Row, bandwidth: float, rate: float, seconds: float, flush) -> dict:
    """{implementation: figures} of a row; what an implementation raises is kept as its reason."""
    floor = 1e3 * max(row.bytes / bandwidth, row.flops / rate)
    exact = row.exact() if row.exact else None
    found = {}
    for name, call in row.calls.items():
        try:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = call()
            torch.cuda.synchronize()
            figures = {"peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)}
            if exact is not None:
                figures["error"] = float(f"{worst(result, exact):.2e}")
            del result
            graph = row.latency and name not in ("eager", "compile")
            ms = replayed(call) if graph else timed(call, seconds, flush)
            found[name] = {"ms": round(ms, 5), "share": round(floor / ms, 4), **figures, "graph": graph}
        except Exception as failure:
            if name not in ("eager", "compile"):
                print(f"FAILED {row.name} {row.shape} {name}: {type(failure).__name__}: {failure}", flush=True)
            found[name] = {"failed": f"{type(failure).__name__}: {str(failure)[:200]}"}
    return {"floor_ms": round(floor, 5), "rows": found}


def line(row: Row, name: str, figures: dict) -> str:
    if "failed" in figures:
        return f"{row.name:45} {row.shape:18} {name:9} failed: {figures['failed'][:60]}"
    goal = ""
    if name in ("triton", "cuda") and row.goal_ms is not None:
        goal = f"goal {row.goal_ms} ms: {'met' if figures['ms'] <= row.goal_ms else 'missed'}"
    if name in ("triton", "cuda") and row.goal_share is not None:
        goal = f"goal {row.goal_share:.0%}: {'met' if figures['share'] >= row.goal_share else 'missed'}"
    error = f"{figures['error']:.1e}" if "error" in figures else ""
    return (
        f"{row.name:45} {row.shape:18} {name:9} {figures['ms']:10.4f} ms {figures['share']:6.1%} of the roof "
        f"{figures['peak_mib']:9.1f} MiB {error:8} {goal}"
    )


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def run(folder: Path, only: str | None, seconds: float) -> None:
    name = torch.cuda.get_device_name()
    bandwidth, rate = ceilings()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    print(f"{name}: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s", flush=True)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit()}
    data = {"device": name, **versions, "copy_bytes_s": bandwidth, "product_flops_s": rate, "calls": []}
    file = folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    end = time.perf_counter() + seconds
    for group, rows in GROUPS.items():
        if only and group != only:
            continue
        for row in rows(Place("cuda", small=False)):
            if time.perf_counter() > end:
                print(f"out of time before {row.name} {row.shape}", flush=True)
                data["calls"].append({"op": group, "call": row.name, "shape": row.shape, "failed": "out of time"})
                continue
            found = measure(row, bandwidth, rate, 0.3, flush)
            goals = {"goal_ms": row.goal_ms, "goal_share": row.goal_share}
            data["calls"].append({"op": group, "call": row.name, "shape": row.shape, **goals, **found})
            for implementation, figures in found["rows"].items():
                print(line(row, implementation, figures), flush=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(data, indent=1) + "\n")
            partial.replace(file)


def check() -> None:
    """Small calls on every backend but cpu and reference; fails if there is none, or if one is far from float64."""
    device, ran = "cuda" if torch.cuda.is_available() else "cpu", 0
    for rows in GROUPS.values():
        for row in rows(Place(device, small=True)):
            exact = row.exact() if row.exact else None
            for name, call in row.calls.items():
                if name == "compile":
                    continue
                result, mine = call(), name != "eager"
                error = None if exact is None else worst(result, exact)
                told = "not compared" if error is None else f"{error:.1e}"
                print(f"{row.name:45} {row.shape:14} {name:9} {device} {told}", flush=True)
                ran += mine
                if mine and error is not None and not error < 0.01:  # bf16 gradients are off by 2^-9
                    raise SystemExit(f"{row.name} on {name}: the error is {error}")
    if ran == 0:
        raise SystemExit("no GPU backend runs here: there is no GPU, and TRITON_INTERPRET=1 is not set")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir", nargs="?", type=Path, help="where the results go")
    parser.add_argument("--only", choices=list(GROUPS), help="one op")
    parser.add_argument("--seconds", type=float, default=300.0, help="no new row is begun after so many seconds")
    parser.add_argument("--check", action="store_true", help="small calls instead of measurements")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.check:
        check()
    elif options.outdir is None:
        parser.error("OUTDIR is missing")
    elif not torch.cuda.is_available():
        parser.error("there is no GPU to measure; --check makes small calls on the CPU")
    else:
        options.outdir.mkdir(parents=True, exist_ok=True)
        run(options.outdir, options.only, options.seconds)


if __name__ == "__main__":
    main()
