"""What `python -m rlhf_kernels.parity openrlhf` compares."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from openrlhf.models import loss as losses
from openrlhf.models import utils

from ..parity import Comparison, Shape
from . import _parity_plain as plain
from . import openrlhf as drop_in
from ._patch import check_version

NAME = "OpenRLHF"


def check() -> None:
    """Raise if the OpenRLHF that is installed is none of those tested."""
    check_version("openrlhf", drop_in.TESTED)


def first(function, *arguments):
    """The function of a leaf and these, its first result in a tuple."""

    def call(x):
        found = function(x, *arguments)
        return (found[0] if isinstance(found, tuple) else found,)

    return call


def comparisons(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """The functions from logits, then losses of tokens and of pairs, which are fp32 in every trainer."""
    generator = torch.Generator().manual_seed(0)
    logits = plain.normal(generator, 1, shape.rows, shape.vocab, scale=2.0).to(dtype).to(device)
    labels = torch.randint(0, shape.vocab, (1, shape.rows), generator=generator, dtype=torch.int64, device="cpu").to(
        device
    )

    def log_probs_of(function):  # the peer's divides the logits in place
        return lambda x: (function(x * 1, labels, 0.7),)

    yield Comparison(
        "log_probs_from_logits",
        log_probs_of(drop_in._log_probs_from_logits),
        log_probs_of(utils.log_probs_from_logits),
        lambda x: plain.selected(x, labels, 0.7),
        (logits,),
    )
    sides = first(drop_in._compute_entropy), first(utils.compute_entropy)
    yield Comparison("compute_entropy", *sides, plain.entropy, (logits,))
    t = plain.tokens(generator, shape.rows, device)
    functions = drop_in._compute_approx_kl, utils.compute_approx_kl
    sides = (first(lambda x, f=f: f(x, t.ref, kl_estimator="k3")) for f in functions)
    yield Comparison("compute_approx_kl, k3", *sides, lambda x: plain.k3(x, t.ref.double()), (t.new,))
    policy, values = losses.PolicyLoss(), losses.ValueLoss(0.2)
    sides = (first(f, t.old, t.advantages, t.mask) for f in (_method(drop_in._policy_loss, policy), policy))
    old, advantages, mask = (x.double() for x in (t.old, t.advantages, t.mask))
    yield Comparison("PolicyLoss", *sides, lambda x: plain.clipped(x, old, advantages, mask), (t.new,))
    before, returns = t.values + 0.1, t.returns
    sides = (first(f, before, returns, t.mask) for f in (_method(drop_in._value_loss, values), values))
    exact_value = before.double(), returns.double(), mask
    yield Comparison("ValueLoss", *sides, lambda x: plain.value(x, *exact_value), (t.values,))
    scores = plain.normal(generator, 2, shape.rows, scale=3.0).to(device)
    pair = losses.PairWiseLoss()
    sides = (lambda x, f=f: (f(*x.unbind()),) for f in (_method(drop_in._pair_loss, pair), pair))
    yield Comparison(
        "PairWiseLoss", *sides, lambda x: (-torch.nn.functional.logsigmoid(x[0] - x[1]).mean(),), (scores,)
    )


def _method(function, owner):
    return lambda *arguments: function(owner, *arguments)
