"""GAE, and the chain from scores to whitened advantages, beside loops over T and the trainers' own functions."""

from __future__ import annotations

import torch

import rlhf_kernels as rk
from benchmarks import peers, roof
from benchmarks.cases import Bench, Case, Skip, compiled, doubled, faster

GAMMA, LAM, KL_COEF = 1.0, 0.95, 0.05
LONG_LOOP = Skip("torch.compile unrolls the loop over T, which takes minutes")


def moved(case) -> int:
    """Bytes. GAE reads rewards, values and mask and writes advantages and returns: 17 a token.

    The whole chain reads two log-probs, values and mask and writes four results: 29 a token, whitening in cache.
    Whitening reads values and mask twice and writes one result: 14.
    """
    tokens = case.sizes["B"] * case.sizes["T"]
    return tokens * {"gae": 17, "rlhf_advantages": 29, "masked_whiten": 14}[case.function]


def loop(rewards, values, gamma, lam):
    """GAE as trainers write it: a loop over T on vectors over B."""
    carry, found = 0, []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carry = delta + gamma * lam * carry
        found.append(carry)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values


def ragged_mask(rows, steps):
    """Responses between half and all of the steps long."""
    return torch.arange(steps) < torch.randint((steps + 1) // 2, steps + 1, (rows, 1))


def build_gae(case):
    shape = case.sizes["B"], case.sizes["T"]
    mask = ragged_mask(*shape)
    rewards, values = torch.randn(shape) * mask, torch.randn(shape) * mask
    keep = mask.float()

    def peer(function):
        if isinstance(function, Skip):
            return function
        return lambda: (function(rewards, values, keep if function is peers.verl_gae() else mask, GAMMA, LAM), ())

    calls = {
        "ours": lambda: (rk.gae(rewards, values, mask, gamma=GAMMA, lam=LAM), ()),
        "eager": lambda: (loop(rewards, values, GAMMA, LAM), ()),
        "compile": LONG_LOOP,
        "verl": peer(peers.verl_gae()),
        "openrlhf": peer(peers.openrlhf_gae()),
        "torchrl": peer(peers.torchrl_gae()),
        "copy": roof.copy(moved(case)),
    }
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: (loop(rewards.double(), values.double(), GAMMA, LAM), ()),
        part=lambda result: (tuple(None if x is None else torch.where(mask, x, 0) for x in result[0]), ()),
        moved=moved(case),
        roof="copy",
    )


def chain(scores, log_probs, ref_log_probs, values, mask, last):
    """As TRL's PPOTrainer: KL-shaped rewards, the score at the last token, GAE, whitening over the mask."""
    kl = log_probs - ref_log_probs
    rewards = torch.where(mask, -KL_COEF * kl, 0)
    rewards[torch.arange(len(scores)), last] += scores
    values = torch.where(mask, values, 0)
    advantages, returns = loop(rewards, values, GAMMA, LAM)
    return whitened(advantages, mask), torch.where(mask, returns, 0), rewards, torch.where(mask, kl, 0)


def whitened(values, mask):
    """Less their mean and over their standard deviation, both over the mask, as TRL and verl do it."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / count
    variance = variance * count / (count - 1)
    return torch.where(mask, (values - mean) * torch.rsqrt(variance + 1e-8), 0)


def build_chain(case):
    shape = case.sizes["B"], case.sizes["T"]
    mask = ragged_mask(*shape)
    scores, values = torch.randn(shape[0]), torch.randn(shape)
    log_probs = torch.randn(shape).abs().neg()
    ref_log_probs = log_probs + 0.1 * torch.randn(shape)
    last = mask.sum(1) - 1
    inputs = scores, log_probs, ref_log_probs, values

    def ours():
        out = rk.rlhf_advantages(*inputs, mask, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM)
        return (out.advantages, out.returns, out.rewards, out.kl), ()

    calls = {
        "ours": ours,
        "eager": lambda: (chain(*inputs, mask, last), ()),
        "compile": LONG_LOOP,
        "copy": roof.copy(moved(case)),
    }
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: (chain(*(x.double() for x in inputs), mask, last), ()),
        part=lambda result: (tuple(torch.where(mask, x, 0) for x in result[0]), ()),
        moved=moved(case),
        roof="copy",
    )


def build_whitening(case):
    shape = case.sizes["B"], case.sizes["T"]
    values, mask = 2 + torch.randn(shape), ragged_mask(*shape)
    functions = {"ours": rk.masked_whiten, "eager": whitened, "compile": compiled(whitened)}
    calls = {name: lambda f=f: ((f(values, mask),), ()) for name, f in functions.items()}
    calls["copy"] = roof.copy(moved(case))
    return Bench(
        calls={name: calls[name] for name in case.impls},
        exact=lambda: ((whitened(values.double(), mask),), ()),
        moved=moved(case),
        roof="copy",
    )


def cases():
    every = ("ours", "eager", "compile", "verl", "openrlhf", "torchrl", "copy")
    goals = faster("eager", 100), faster("copy", 0.6)
    found = [
        Case("gae", "fwd", "fp32", {"B": rows, "T": steps}, every, build_gae, goals)
        for rows, steps in ((256, 4096), (1024, 8192), (64, 32768))
    ]
    chain_impls = ("ours", "eager", "compile", "copy")
    goal = (faster("eager", 20),)
    found.append(Case("rlhf_advantages", "fwd", "fp32", {"B": 512, "T": 1024}, chain_impls, build_chain, goal))
    found.append(Case("masked_whiten", "fwd", "fp32", {"B": 256, "T": 4096}, chain_impls, build_whitening))
    curve = ("ours", "eager", "verl", "torchrl", "copy")
    for scale, values in (doubled(T=512), doubled(B=64)):
        for value in values:
            sizes = {"B": 128, "T": 1024} | {scale: value}
            found.append(
                Case("gae", "fwd", "fp32", sizes, curve, build_gae, variant=f"by{scale}", scale=scale, seconds=0.3)
            )
    return found


CASES = cases()


def test_gae(row, measure):
    measure(row)


def test_rlhf_advantages(row, measure):
    measure(row)


def test_masked_whiten(row, measure):
    measure(row)
