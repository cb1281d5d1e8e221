"""The PPO loss with its metrics, forward and backward, beside the one of TRL's PPOTrainer in PyTorch and verl's."""

from __future__ import annotations

import torch

import rlhf_kernels as rk
from benchmarks import peers, roof
from benchmarks.cases import Bench, Case, Skip, compiled, doubled, faster


def moved(case) -> int:
    """Bytes: six numbers and a mask are read and two gradients written, 33 a token."""
    return case.sizes["B"] * case.sizes["T"] * 33


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def eager(log_probs, old_log_probs, advantages, mask, values, old_values, returns):
    """(loss, metrics) as in TRL's PPOTrainer up to 0.1x: every metric of its training step that needs no logits."""
    clipped = torch.clamp(values, old_values - 0.2, old_values + 0.2)
    value_losses, clipped_losses = torch.square(values - returns), torch.square(clipped - returns)
    value_loss = 0.5 * masked_mean(torch.max(value_losses, clipped_losses), mask)
    gap = log_probs - old_log_probs
    ratio = torch.exp(gap)
    policy_losses, clipped_policy = -advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)
    policy_loss = masked_mean(torch.max(policy_losses, clipped_policy), mask)
    with torch.no_grad():
        ratio_mean = masked_mean(ratio, mask)
        metrics = (
            masked_mean((clipped_policy > policy_losses).float(), mask),
            masked_mean((clipped_losses > value_losses).float(), mask),
            0.5 * masked_mean(gap.square(), mask),
            ratio_mean,
            masked_mean((ratio - ratio_mean).square(), mask),
            masked_mean(values, mask),
            masked_mean(returns, mask),
        )
    return policy_loss + 0.1 * value_loss, metrics


def build(case):
    shape = case.sizes["B"], case.sizes["T"]
    old_log_probs, advantages, old_values, returns = torch.randn(4, *shape).unbind()
    old_log_probs = old_log_probs.abs().neg()
    log_probs = (old_log_probs + 0.15 * torch.randn(shape)).requires_grad_()
    values = (old_values + 0.15 * torch.randn(shape)).requires_grad_()
    lengths = torch.randint((shape[1] + 1) // 2, shape[1] + 1, (shape[0], 1))
    mask = torch.arange(shape[1]) < lengths
    others = old_log_probs, advantages, mask, old_values, returns

    def ours(new, old, adv, keep, val, old_val, ret):
        return rk.ppo_loss(new, old, adv, keep, values=val, old_values=old_val, returns=ret, cliprange_value=0.2).loss

    def run(function, new, val, old, adv, keep, old_val, ret):
        output = function(new, old, adv, keep, val, old_val, ret)
        loss = output[0] if isinstance(output, tuple) else output
        return (loss,), torch.autograd.grad(loss, (new, val))

    def exact():
        new, val = (x.detach().double().requires_grad_() for x in (log_probs, values))
        return run(eager, new, val, *(x if x is mask else x.double() for x in others))

    functions = {"ours": ours, "eager": eager, "compile": compiled(eager), "verl": peers.verl_ppo()}
    calls = {
        name: f if isinstance(f, Skip) else lambda f=f: run(f, log_probs, values, *others)
        for name, f in functions.items()
    }  # fmt: skip
    calls["copy"] = roof.copy(moved(case))
    return Bench(calls={name: calls[name] for name in case.impls}, exact=exact, moved=moved(case), roof="copy")


def cases():
    every = ("ours", "eager", "compile", "verl", "copy")
    goals = faster("eager", 8), faster("compile", 2)
    found = [Case("ppo_loss", "fwdbwd", "fp32", {"B": 512, "T": 1024}, every, build, goals)]
    for value in doubled(T=256)[1]:
        sizes = {"B": 256, "T": value}
        found.append(Case("ppo_loss", "fwdbwd", "fp32", sizes, every, build, (), "byT", "T", seconds=0.3))
    return found


CASES = cases()


def test_ppo_loss(row, measure):
    measure(row)
