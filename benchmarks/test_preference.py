"""Losses on the policy's own log-probs, beside their formulas in PyTorch."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

import rlhf_kernels as rk
from benchmarks import roof
from benchmarks.cases import Bench, Case, compiled, doubled

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


def cases():
    every = ("ours", "eager", "compile", "copy")
    function = "preference_loss"
    found = [Case(function, "fwdbwd", "fp32", {"N": 65536}, every, build, (), v) for v in ("sigmoid", "simpo", "kto")]
    curve = ("ours", "eager", "copy")
    for value in doubled(N=4096)[1]:
        found.append(Case(function, "fwdbwd", "fp32", {"N": value}, curve, build, (), "sigmoid-byN", "N", seconds=0.3))
    return found


CASES = cases()


def test_preference_loss(row, measure):
    measure(row)
