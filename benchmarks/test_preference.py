"""Losses on the policy's own log-probs, beside their formulas in PyTorch."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

import rlhf_kernels as rk
from benchmarks import roof
from benchmarks.cases import Bench, Case, compiled, doubled
from benchmarks.test_linear import head, log_probs_of

BETA = 0.1


def moved(case) -> int:
    """Bytes a pair: four log-probs are read (simpo: two and two lengths), two gradients and two rewards written."""
    return case.sizes["N"] * (40 if "simpo" in case.variant else 32)


def metrics(chosen, rejected):
    return chosen.mean(), rejected.mean(), (chosen - rejected).mean(), (chosen > rejected).float().mean()


def sigmoid(chosen, rejected, ref_chosen, ref_rejected, lengths, kl):
    won, lost = chosen - ref_chosen, rejected - ref_rejected
    return -logsigmoid(BETA * (won - lost)).mean(), metrics(BETA * won.detach(), BETA * lost.detach())


def simpo(chosen, rejected, ref_chosen, ref_rejected, lengths, kl):
    won, lost = chosen / lengths[0], rejected / lengths[1]
    return -logsigmoid(BETA * (won - lost) - 0.5).mean(), metrics(BETA * won.detach(), BETA * lost.detach())


def kto(chosen, rejected, ref_chosen, ref_rejected, lengths, kl):
    won, lost = chosen - ref_chosen, rejected - ref_rejected
    zero = torch.clamp(kl, min=0)
    losses = torch.cat([torch.sigmoid(-BETA * (won - zero)), torch.sigmoid(-BETA * (zero - lost))])
    return losses.mean(), metrics(BETA * won.detach(), BETA * lost.detach())


def build(case):
    pairs = case.sizes["N"]
    lengths = torch.randint(20, 200, (2, pairs))
    chosen, rejected = (torch.randn(2, pairs) - 1.5).mul(lengths).clamp(max=-1).unbind()
    ref = chosen + 3 * torch.randn(pairs), rejected + 3 * torch.randn(pairs)
    leaves = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    kl = torch.tensor(0.3)
    eager = {"sigmoid": sigmoid, "simpo": simpo, "kto": kto}[case.variant.removesuffix("-byN")]
    options = {
        sigmoid: {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]},
        simpo: {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]},
        kto: {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1], "kl": kl},
    }[eager]

    def ours(won, lost, *_):
        return rk.preference_loss(won, lost, loss_type=eager.__name__, beta=BETA, **options)

    def run(function, won, lost, dtype=torch.float32):
        loss = function(won, lost, ref[0].to(dtype), ref[1].to(dtype), lengths, kl.to(dtype))[0]
        return (loss,), torch.autograd.grad(loss, (won, lost))

    functions = {"ours": ours, "eager": eager, "compile": compiled(eager)}
    calls = {name: lambda f=f: run(f, *leaves) for name, f in functions.items()}
    calls["copy"] = roof.copy(moved(case))
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: run(eager, *(x.detach().double().requires_grad_() for x in leaves), torch.float64),
        moved=moved(case),
        roof="copy",
    )


def build_unpaired(case):
    count = case.sizes["N"]
    logps = (torch.randn(count) - 1.5).mul(50).clamp(max=-1).requires_grad_()
    ref, desirable, kl = logps.detach() + 3 * torch.randn(count), torch.rand(count) < 0.5, torch.tensor(0.3)

    def eager(logp, of_reference):
        ratio = logp - of_reference
        losses = torch.sigmoid(torch.where(desirable, -BETA * (ratio - kl), -BETA * (kl - ratio)))
        rewards = BETA * ratio.detach()
        return losses.mean(), ((rewards * desirable).sum(), (rewards * ~desirable).sum())

    def ours(logp, of_reference):
        return rk.unpaired_preference_loss(logp, desirable, of_reference, beta=BETA, kl=kl)

    def run(function, logp, of_reference):
        loss = function(logp, of_reference)[0]
        return (loss,), torch.autograd.grad(loss, logp)

    functions = {"ours": ours, "eager": eager, "compile": compiled(eager)}
    calls = {name: lambda f=f: run(f, logps, ref) for name, f in functions.items()}
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: run(eager, logps.detach().double().requires_grad_(), ref.double()),
        moved=13 * count,
        roof="copy",
    )


def build_linear(case):
    """DPO from hidden states of P chosen and P rejected responses of T tokens."""
    pairs, length, width, vocab = (case.sizes[name] for name in "PTHV")
    hidden, weight = head(2 * pairs * length, width, vocab, torch.float32)
    hidden = hidden.view(2 * pairs, length, width).requires_grad_()
    labels, weight = torch.randint(vocab, (2 * pairs, length)), weight.requires_grad_()
    ref = log_probs_of(hidden.detach().flatten(0, 1), weight.detach(), labels.flatten()).view(labels.shape)
    ref = ref + 0.1 * torch.randn_like(ref)

    def eager(h, w):
        sums = log_probs_of(h.flatten(0, 1), w, labels.flatten()).view(labels.shape).sum(1) - ref.to(h.dtype).sum(1)
        return (-logsigmoid(BETA * (sums[:pairs] - sums[pairs:])).mean(),)

    def ours(h, w):
        return rk.linear_preference_loss(h, w, labels, ref, beta=BETA)

    def run(function, h, w):
        loss = function(h, w)[0]
        return (loss,), torch.autograd.grad(loss, (h, w))

    functions = {"ours": ours, "eager": eager}
    calls = {name: lambda f=f: run(f, hidden, weight) for name, f in functions.items()}
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: run(eager, hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()),
        flops=2 * 4 * 2 * pairs * length * width * vocab,
        roof="matmuls",
    )


def build_weights(case):
    shape = case.sizes["B"], case.sizes["T"]
    log_probs = torch.randn(shape).abs().neg()
    squares, mask = log_probs - 0.1 * torch.rand(shape), torch.rand(shape) < 0.8

    def eager(x, y):
        return (((x - y) * mask).sum(1) / mask.sum(1)).exp()

    calls = {
        "ours": lambda: ((rk.wpo_weights(log_probs, squares, mask),), ()),
        "eager": lambda: ((eager(log_probs, squares),), ()),
    }
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: ((eager(log_probs.double(), squares.double()),), ()),
        moved=9 * shape[0] * shape[1],
        roof="copy",
    )


def cases():
    every = ("ours", "eager", "compile", "copy")
    function = "preference_loss"
    found = [Case(function, "fwdbwd", "fp32", {"N": 65536}, every, build, (), v) for v in ("sigmoid", "simpo", "kto")]
    curve = ("ours", "eager", "copy")
    for value in doubled(N=4096)[1]:
        found.append(Case(function, "fwdbwd", "fp32", {"N": value}, curve, build, (), "sigmoid-byN", "N", seconds=0.3))
    found.append(
        Case("unpaired_preference_loss", "fwdbwd", "fp32", {"N": 65536}, ("ours", "eager", "compile"), build_unpaired)
    )
    sizes = {"P": 8, "T": 64, "H": 768, "V": 50257}
    found.append(Case("linear_preference_loss", "fwdbwd", "fp32", sizes, ("ours", "eager"), build_linear))
    found.append(Case("wpo_weights", "fwd", "fp32", {"B": 512, "T": 1024}, ("ours", "eager"), build_weights))
    return found


CASES = cases()


def test_unpaired_preference_loss(row, measure):
    measure(row)


def test_linear_preference_loss(row, measure):
    measure(row)


def test_wpo_weights(row, measure):
    measure(row)


def test_preference_loss(row, measure):
    measure(row)
