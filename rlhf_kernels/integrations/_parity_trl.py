"""What `python -m rlhf_kernels.parity trl` compares."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import trl.trainer.utils as trl_utils

from ..parity import Comparison, Shape
from . import _parity_plain as plain
from . import trl as drop_in
from ._patch import check_version

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
NAME = "TRL"


def check() -> None:
    """Raise if the TRL that is installed is none of those tested."""
    check_version("trl", drop_in.TESTED)


def _as_numbers(found):
    """Results without what was not asked for, the top-1 as numbers."""
    return tuple(x.to(found[0].dtype) if x.dtype == torch.bool else x for x in found if x is not None)


def comparisons(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """The fused head with one, two and five outputs, then the functions from logits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, labels = plain.problem(generator, shape, dtype, device)
    theirs, ours = trl_utils._ChunkedLogProbFunction, drop_in._Head(trl_utils)
    for outputs, temperature, softcap in ((OUTPUTS[:1], 1.0, None), (OUTPUTS[:2], 0.7, None), (OUTPUTS, 1.0, 30.0)):

        def scored(head, outputs=outputs, temperature=temperature, softcap=softcap):
            return lambda h, w: _as_numbers(head.apply(h, w, None, labels, temperature, 32768, softcap, 1.0, outputs))

        def exact(h, w, outputs=outputs, temperature=temperature, softcap=softcap):
            return plain.head(h, w, labels, temperature, softcap)[: len(outputs)]

        name = f"fused head, {len(outputs)} output{'s' if len(outputs) > 1 else ''}"
        count = min(len(outputs), 2)
        yield Comparison(name, scored(ours), scored(theirs), exact, (hidden, weight), count)
    logits = (plain.normal(generator, shape.rows, shape.vocab, scale=2.0)).to(dtype).to(device)
    rows, places = logits.unsqueeze(0), labels.unsqueeze(0)

    def alone(function, *arguments):
        def call(x):
            found = function(x, *arguments)
            return found if isinstance(found, tuple) else (found,)

        return call

    def both(x):
        return *plain.selected(x, places), *plain.entropy(x)

    for name, arguments, exactly, count in (
        ("selective_log_softmax", (places,), lambda x: plain.selected(x, places), 1),
        ("entropy_from_logits", (), plain.entropy, 1),
        ("selective_log_softmax_and_entropy", (places,), both, 2),
    ):
        sides = (alone(getattr(module, name), *arguments) for module in (drop_in, trl_utils))
        yield Comparison(name, *sides, exactly, (rows,), count)
