"""The policy loss of every objective with its metrics, forward and backward, beside the same in PyTorch."""

from __future__ import annotations

import torch

import rlhf_kernels as rk
from benchmarks import roof
from benchmarks.cases import Bench, Case, compiled, doubled, faster, within
from benchmarks.test_ppo import masked_mean

OBJECTIVES = {
    "clip": rk.Clip(),
    "gspo": rk.GSPO(),
    "cispo": rk.CISPO(0.2, 0.28),
    "sapo": rk.SAPO(),
    "gmpo": rk.GMPO(),
    "dppo": rk.DPPO("kl"),
    "reinforce": rk.Reinforce(),
    "dro": rk.DRO(0.1),
}


def moved(case) -> int:
    """Bytes: five numbers and a mask are read and a gradient written, 25 a token."""
    return case.sizes["B"] * case.sizes["T"] * 25


def token_loss(name, new, old, a, mask):
    """The objective's terms as trainers write them."""
    gap = new - old
    ratio = torch.exp(gap)
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    if name == "clip":
        return torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    if name == "gspo":
        mean = (gap * mask).sum(-1, keepdim=True) / count
        ratio = torch.exp(mean.detach() + new - new.detach())
        return torch.maximum(-a * ratio, -a * ratio.clamp(1 - 3e-4, 1 + 4e-4))
    if name == "cispo":
        return -ratio.clamp(0.8, 1.28).detach() * a * new
    if name == "sapo":
        t = torch.where(a > 0, 1.0, torch.full_like(a, 1.05))
        return -a * torch.sigmoid(t * (ratio - 1)) * 4 / t
    if name == "gmpo":
        sign = torch.sign(a)
        held = sign * torch.minimum(sign * gap, sign * gap.clamp(-0.4, 0.4))
        mean = torch.exp(((held * mask).sum(-1, keepdim=True) / count).detach() + held - held.detach())
        return -(a * mask).sum(-1, keepdim=True) / count * mean
    if name == "dppo":
        p, before = torch.exp(new), torch.exp(old)
        divergence = before * (old - new) + (1 - before) * torch.log((1 - before + 1e-8) / (1 - p + 1e-8))
        valid = torch.where(a > 0, (divergence <= 0.2) | (p <= before), (divergence <= 0.2) | (p >= before))
        return -a * ratio.clamp(max=20.0).detach() * new * valid.detach()
    return 0.05 * gap.square() - a * new if name == "dro" else -a * new


def eager_of(name):
    def eager(new, old, a, mask, ref, weights):
        """(loss, metrics) with the KL to the reference, importance weights and what verl and TRL log of them."""
        gap, distance = new - old, ref - new
        ratio = torch.exp(gap)
        kl = torch.exp(distance) - distance - 1
        loss = masked_mean(token_loss(name, new, old, a, mask) * weights, mask) + 0.1 * masked_mean(kl, mask)
        with torch.no_grad():
            mean = masked_mean(ratio, mask)
            metrics = (
                masked_mean(((ratio > 1.2) & (a > 0)).float(), mask),
                masked_mean(((ratio < 0.8) & (a < 0)).float(), mask),
                masked_mean(-gap, mask),
                0.5 * masked_mean(gap.square(), mask),
                masked_mean(ratio - 1 - gap, mask),
                mean,
                masked_mean((ratio - mean).square(), mask),
                masked_mean(kl, mask),
                (weights * mask).sum().square() / (mask.sum() * (weights.square() * mask).sum()),
                masked_mean((weights == 0).float(), mask),
            )
        return loss, metrics

    return eager


def build(case):
    name = case.variant
    shape = case.sizes["B"], case.sizes["T"]
    old = torch.randn(shape).abs().neg() - 0.01
    new = (old + 0.15 * torch.randn(shape)).clamp(max=-1e-3).requires_grad_()
    advantages, ref, weights = torch.randn(shape), old + 0.1 * torch.randn(shape), torch.rand(shape) + 0.5
    lengths = torch.randint((shape[1] + 1) // 2, shape[1] + 1, (shape[0], 1))
    mask = torch.arange(shape[1]) < lengths
    others = old, advantages, mask, ref, weights
    kl = rk.KLTerm(0.1)

    def ours(p, *rest):
        before, a, keep, reference, w = rest
        return rk.policy_loss(p, before, a, keep, objective=OBJECTIVES[name], ref_log_probs=reference, kl=kl, weights=w)

    def run(function, p, *rest):
        loss = function(p, *rest)[0]
        return (loss,), torch.autograd.grad(loss, p)

    def exact():
        return run(
            eager_of(name), new.detach().double().requires_grad_(), *(x if x is mask else x.double() for x in others)
        )

    functions = {"ours": ours, "eager": eager_of(name), "compile": compiled(eager_of(name))}
    calls = {impl: lambda f=f: run(f, new, *others) for impl, f in functions.items()}
    calls["copy"] = roof.copy(moved(case))
    return Bench(calls={impl: calls[impl] for impl in case.impls}, exact=exact, moved=moved(case), roof="copy")


def build_plain(case):
    """Clip alone, beside ppo_loss without values: the same loss with more metrics."""
    shape = case.sizes["B"], case.sizes["T"]
    old = torch.randn(shape).abs().neg()
    new, advantages = (old + 0.15 * torch.randn(shape)).requires_grad_(), torch.randn(shape)
    mask = torch.arange(shape[1]) < torch.randint((shape[1] + 1) // 2, shape[1] + 1, (shape[0], 1))

    def run(function, p, before, a):
        loss = function(p, before, a, mask)[0]
        return (loss,), torch.autograd.grad(loss, p)

    def exact():
        with rk.backend("reference"):
            return run(rk.ppo_loss, new.detach().double().requires_grad_(), old.double(), advantages.double())

    functions = {"ours": rk.policy_loss, "ppo_loss": rk.ppo_loss}
    calls = {impl: lambda f=f: run(f, new, old, advantages) for impl, f in functions.items()}
    return Bench(
        calls={impl: calls[impl] for impl in case.impls}, exact=exact, moved=17 * shape[0] * shape[1], roof="copy"
    )


def build_values(case):
    """The clipped value loss with its metrics."""
    shape = case.sizes["B"], case.sizes["T"]
    old, returns = torch.randn(2, *shape).unbind()
    values = (old + 0.3 * torch.randn(shape)).requires_grad_()
    mask = torch.arange(shape[1]) < torch.randint((shape[1] + 1) // 2, shape[1] + 1, (shape[0], 1))

    def eager(v, before, target):
        near = before + (v - before).clamp(-0.2, 0.2)
        plain, clipped = (v - target).square(), (near - target).square()
        loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask)
        with torch.no_grad():
            wrong, spread = target - v, target - masked_mean(target, mask)
            wrong = masked_mean((wrong - masked_mean(wrong, mask)).square(), mask)
            explained = 1 - wrong / masked_mean(spread.square(), mask)
            metrics = masked_mean((clipped > plain).float(), mask), masked_mean(v, mask), masked_mean(target, mask)
        return loss, (*metrics, explained)

    def ours(v, before, target):
        return rk.value_loss(v, before, target, mask)

    def run(function, v, before, target):
        loss = function(v, before, target)[0]
        return (loss,), torch.autograd.grad(loss, v)

    def exact():
        return run(eager, values.detach().double().requires_grad_(), old.double(), returns.double())

    moved_bytes = 17 * shape[0] * shape[1]
    functions = {"ours": ours, "eager": eager, "compile": compiled(eager)}
    calls = {impl: lambda f=f: run(f, values, old, returns) for impl, f in functions.items()}
    calls["copy"] = roof.copy(moved_bytes)
    return Bench(calls={impl: calls[impl] for impl in case.impls}, exact=exact, moved=moved_bytes, roof="copy")


def cases():
    every, sizes = ("ours", "eager", "compile", "copy"), {"B": 512, "T": 1024}
    goals = (faster("eager", 8),)
    found = [Case("policy_loss", "fwdbwd", "fp32", sizes, every, build, goals, name) for name in OBJECTIVES]
    plain = (within("ppo_loss", 1.0),)
    found.append(Case("policy_loss", "fwdbwd", "fp32", sizes, ("ours", "ppo_loss"), build_plain, plain, "clip-alone"))
    found.append(Case("value_loss", "fwdbwd", "fp32", sizes, every, build_values, goals))
    for value in doubled(T=256)[1]:
        grown = {"B": 256, "T": value}
        found.append(Case("policy_loss", "fwdbwd", "fp32", grown, every, build, (), "gspo", "T", seconds=0.3))
    return found


CASES = cases()


def test_policy_loss(row, measure):
    measure(row)


def test_value_loss(row, measure):
    measure(row)
