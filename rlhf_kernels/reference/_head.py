"""The head that hidden states go through, as the definitions of the linear ops hold it, and sums of their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import logprobs as row_reference

UPCAST_BLOCK = 4096  # head rows that are widened to fp32 at a time


def default_chunk_size(vocab, device, group=None):
    """Tokens a chunk: 2048 on accelerators and between ranks, which must agree; on a CPU about 16 MiB of logits."""
    if device.type != "cpu" or group is not None:
        return 2048
    return max(64, (1 << 22) // max(vocab, 1))


@dataclass
class Head:
    """One call's inputs: hidden [N, H], weight [V, H], bias [V] or None, and how logits become z."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None = None  # [M] row of hidden for each label, or None for one label a row
    temperatures: Tensor | None = None  # [M], instead of temperature
    temperature: float = 1.0
    softcap: float | None = None
    low: Tensor | None = None  # [N, r], with up [V, r]: low[rows] up^T is added to the logits
    up: Tensor | None = None

    def __post_init__(self):
        self.dtype = row_reference.accumulator_dtype(self.hidden)
        self.vocab = self.weight.shape[0]
        self.count = self.hidden.shape[0] if self.rows is None else self.rows.shape[0]

    def blocks(self):
        """Row ranges of the head, with its rows in the accumulator dtype."""
        step = self.vocab if self.weight.dtype == self.dtype else UPCAST_BLOCK
        for start in range(0, self.vocab, step):
            yield slice(start, start + step), self.weight[start : start + step].to(self.dtype)

    def inputs(self, part, kept):
        """Hidden states [n, H] of a slice of labels, 0 where not kept."""
        return self.read(self.hidden, part, kept)

    def read(self, x, part, kept):
        """Rows of x [N, ...] that a slice of labels reads, 0 where not kept."""
        found = x[part] if self.rows is None else x[self.safe_rows(part)]
        return torch.where(kept.unsqueeze(-1), found.to(self.dtype), 0.0)

    def low_inputs(self, part, kept):
        """low [n, r] of a slice of labels, 0 where not kept; or None."""
        return None if self.low is None else self.read(self.low, part, kept)

    def safe_rows(self, part):
        return self.rows[part].clamp(0, max(self.hidden.shape[0] - 1, 0))

    def astray(self, part):
        """Where `rows` points outside the hidden states."""
        if self.rows is None:
            return torch.zeros((), dtype=torch.bool, device=self.hidden.device)
        return (self.rows[part] < 0) | (self.rows[part] >= self.hidden.shape[0])

    def scaled(self, h, part, low=None):
        """z [n, V] and dz/dlogits of these hidden states, and of what `low_inputs` gives."""
        logits = h.new_empty(h.shape[0], self.vocab)
        for columns, weight in self.blocks():
            torch.mm(h, weight.t(), out=logits[:, columns])
        if low is not None:
            logits.addmm_(low, self.up.to(self.dtype).t())
        if self.bias is not None:
            logits += self.bias.to(self.dtype)
        temperature = self.temperature if self.temperatures is None else self.temperatures[part]
        return row_reference.scale_logits(logits, temperature, self.softcap)


class Rows(NamedTuple):
    """Results of rows over the columns of all ranks, each [n]; of those not asked for, None."""

    log_prob: Tensor
    entropy: Tensor | None
    max: Tensor
    log_sum: Tensor
    gap: Tensor | None = None  # from the maximum down to the mean of the entries that are not -inf
    count: Tensor | None = None  # number of these entries


class Gradients:
    """fp32 sums of d hidden, d weight, d bias, d low and d up; those not needed stay empty.

    apart: d hidden is kept for each label, [M, H], instead of summed over the labels that read one row.
    """

    def __init__(self, head, need_hidden, need_weight, need_bias, need_low=False, need_up=False, apart=False):
        self.head, self.apart = head, apart or head.rows is None
        self.hidden, self.low = self._of_rows(head.hidden, need_hidden), self._of_rows(head.low, need_low)
        self.weight, self.up = self._like(head.weight, need_weight), self._like(head.up, need_up)
        self.bias = head.hidden.new_zeros(head.vocab if need_bias else 0, dtype=head.dtype)
        self.need_hidden, self.need_low = need_hidden, need_low
        self.need_weight, self.need_bias, self.need_up = need_weight, need_bias, need_up

    def _like(self, x, need):
        return self.head.hidden.new_zeros(x.shape if need else 0, dtype=self.head.dtype)

    def _of_rows(self, x, need):
        shape = (self.head.count, x.shape[1]) if need and self.apart else x.shape if need else 0
        return self.head.hidden.new_zeros(shape, dtype=self.head.dtype)

    def add(self, part, h, dlogits, low=None):
        """Fold in a chunk's dlogits [n, V] and inputs [n, H] and [n, r]."""
        dh = torch.zeros_like(h)
        for columns, weight in self.head.blocks():
            if self.need_hidden:
                dh.addmm_(dlogits[:, columns], weight)
            if self.need_weight:
                self.weight[columns].addmm_(dlogits[:, columns].t(), h)
        if self.need_bias:
            self.bias += dlogits.sum(0)
        if self.need_hidden:
            self._spread(self.hidden, part, dh)
        if self.need_low:
            self._spread(self.low, part, dlogits @ self.head.up.to(self.head.dtype))
        if self.need_up:
            self.up.addmm_(dlogits.t(), low)

    def _spread(self, total, part, d):
        """Add d [n, ...] of some labels to the rows that they read."""
        if self.apart:
            total[part] = d
        elif d.device.type == "cpu":
            total.index_add_(0, self.head.safe_rows(part), d)
        else:  # index_add_ uses atomics on a GPU, index_put_ sorts: the same bits on every run
            total.index_put_((self.head.safe_rows(part),), d, accumulate=True)

    def finish(self, dtypes, group=None):
        """(d hidden, d weight, d bias, d low, d up), as many as dtypes, in these; of hidden and low over the group."""
        for total, need in ((self.hidden, self.need_hidden), (self.low, self.need_low)):
            if group is not None and need:
                dist.all_reduce(total, group=group)
        return tuple(g.to(x) for g, x in zip((self.hidden, self.weight, self.bias, self.low, self.up), dtypes))


def dtypes_of(head):
    """dtypes of the gradients that `Gradients` sums: those of the inputs."""
    tensors = (head.hidden, head.weight, head.bias, head.low, head.up)
    return [head.dtype if x is None else x.dtype for x in tensors]
