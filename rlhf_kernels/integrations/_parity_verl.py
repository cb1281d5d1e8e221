"""What `python -m rlhf_kernels.parity verl` compares."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config.actor import ActorConfig

from ..parity import Comparison, Shape
from . import _parity_plain as plain
from . import verl as drop_in
from ._patch import check_version

NAME = "verl"


def check() -> None:
    """Raise if the verl that is installed is none of those tested."""
    check_version("verl", drop_in.TESTED)


def comparisons(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """The head, the functions from logits, then losses of tokens, which are fp32 in every trainer."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, labels = plain.problem(generator, shape, dtype, device)
    theirs = FusedLinearForPPO()
    yield Comparison(
        "FusedLinearForPPO",
        lambda h, w: drop_in._fused_linear(theirs, h, w, labels, 0.7),
        lambda h, w: theirs(h, w, labels, temperature=0.7),
        lambda h, w: plain.head(h, w, labels, 0.7)[:2],
        (hidden, weight),
        2,
    )
    logits = plain.normal(generator, shape.rows, shape.vocab, scale=2.0).to(dtype).to(device)
    functions = drop_in._logprobs_from_logits, torch_functional.logprobs_from_logits
    sides = (lambda x, f=f: (f(x, labels, inplace_backward=False),) for f in functions)
    yield Comparison("logprobs_from_logits", *sides, lambda x: plain.selected(x, labels), (logits,))
    functions = drop_in._entropy_from_logits, torch_functional.entropy_from_logits
    sides = (lambda x, f=f: (f(x),) for f in functions)
    yield Comparison("entropy_from_logits", *sides, plain.entropy, (logits,))
    yield from _of_tokens(plain.tokens(generator, shape.rows, device))


def _of_tokens(t: plain.Tokens) -> Iterator[Comparison]:
    old, ref, advantages, returns, mask = (x.double() for x in (t.old, t.ref, t.advantages, t.returns, t.mask))
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    functions = drop_in.LOSSES["rk_vanilla"], core_algos.compute_policy_loss_vanilla
    sides = (lambda x, f=f: f(t.old, x, t.advantages, t.mask, "token-mean", config)[:1] for f in functions)
    dual = config.get("clip_ratio_c", 3.0)
    yield Comparison(
        "compute_policy_loss_vanilla", *sides, lambda x: plain.clipped(x, old, advantages, mask, dual), (t.new,)
    )
    before = t.values + 0.1
    functions = drop_in._compute_value_loss, core_algos.compute_value_loss
    sides = (lambda x, f=f: f(x, t.returns, before, t.mask, 0.2)[:1] for f in functions)
    yield Comparison(
        "compute_value_loss", *sides, lambda x: plain.value(x, before.double(), returns, mask), (t.values,)
    )
    functions = drop_in._kl_penalty, core_algos.kl_penalty
    sides = (lambda x, f=f: (f(x, t.ref, "low_var_kl"),) for f in functions)
    yield Comparison("kl_penalty, low_var_kl", *sides, lambda x: plain.k3(x, ref), (t.new,))
    functions = drop_in._gae, core_algos.compute_gae_advantage_return
    ones = torch.ones_like(t.mask)
    options = {"response_mask": ones, "gamma": 0.99, "lam": 0.95}
    sides = (
        lambda x, f=f: f(token_level_rewards=t.advantages, values=x, **options)[1:] for f in functions
    )  # its returns: the advantages are whitened
    yield Comparison(
        "compute_gae_advantage_return", *sides, lambda x: plain.gae(advantages, x, 0.99, 0.95)[1:], (t.values,), 0
    )
