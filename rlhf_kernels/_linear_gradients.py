"""The sums of gradients that the walk of _linear_walk.py makes of d/dlogits, in fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def factor(x, dtype, unit):
    """x in the dtype of d/dlogits, with the unit of their product; fp16 holds x over its largest entry."""
    if unit is None:
        return x.to(dtype), None
    x = x.to(torch.float32)
    largest = torch.nan_to_num(x.abs().amax(), nan=0.0, posinf=0.0).clamp(1e-30, 1e30)
    return (x / largest).to(dtype), unit * largest


class Inputs(NamedTuple):
    """Of some tokens: hidden states [n, H] as the products take them, and low [n, r] fp32 or None."""

    hidden: Tensor
    low: Tensor | None


class Gradients:
    """fp32 sums of d hidden, d weight, d bias, d low and d up; those not needed stay empty.

    apart: d hidden is kept for each label, [M, H], instead of summed over the labels that read one row.
    unit: of all d/dlogits that will be added; then d hidden, d weight and d bias are kept in it, and `finish` takes
    them out of it. Without it each product is, which reads and writes a sum once more than the product does.
    """

    def __init__(
        self, walk, need_hidden, need_weight, need_bias, need_low=False, need_up=False, apart=False, unit=None
    ):
        head = walk.head
        self.unit = unit
        self.apart = apart or head.rows is None
        self.kernels, self.head = walk.kernels, head
        self.need_hidden, self.need_low = need_hidden, need_low
        self.need_weight, self.need_bias, self.need_up = need_weight, need_bias, need_up
        self.hidden, self.low = self._of_rows(head.hidden, need_hidden), self._of_rows(head.low, need_low)
        self.weight, self.up = self._of_columns(head.weight, need_weight), self._of_columns(head.up, need_up)
        self.bias = self._zeros(head.vocab if need_bias else 0)

    def _zeros(self, shape):
        return self.head.hidden.new_zeros(shape, dtype=torch.float32)

    def _of_rows(self, x, need):
        if need and self.apart:  # every row is written
            return self.kernels.fresh((self.head.count, x.shape[1]), x.device)
        return self._zeros(x.shape if need else 0)

    def _of_columns(self, x, need):
        if need and self.head.count:  # as every row is here
            return self.kernels.fresh(x.shape, x.device)
        return self._zeros(x.shape if need else 0)

    def add(self, dlogits, unit, columns, inputs, sums, first_part):
        """Fold in d/dlogits [n, v] of these columns; unit as `kernels.gradient` returned it."""
        product, (h, low) = self.kernels.product, inputs
        here = unit if self.unit is None else None
        for block, weight in self.kernels.blocks(self.head.weight, columns):
            part = dlogits[:, block.start - columns.start : block.stop - columns.start]
            if sums.hidden is not None:
                product(part, weight, sums.hidden, block.start > 0, here)
            if self.need_weight:
                product(part.t(), h, self.weight[block], not first_part, here)
        if self.need_bias:
            bias = dlogits.sum(0, dtype=torch.float32)
            self.bias[columns] += bias if here is None else bias * here
        if sums.low is not None:
            up, scale = factor(self.head.up[columns], dlogits.dtype, unit)
            product(dlogits, up, sums.low, columns.start > 0, scale)
        if self.need_up:
            low, scale = factor(low, dlogits.dtype, unit)
            product(dlogits.t(), low, self.up[columns], not first_part, scale)

    def start_part(self, part, inputs):
        """`Inputs` where d hidden and d low of this part are summed, None where not needed.

        In their place, or, with `rows`, in tensors of their own.
        """

        def sums(total, x, need):
            if not need:
                return None
            return total[part] if self.apart else x.new_empty(x.shape, dtype=torch.float32)

        return Inputs(sums(self.hidden, inputs.hidden, self.need_hidden), sums(self.low, inputs.low, self.need_low))

    def finish_part(self, part, sums):
        """Spread d hidden and d low over the rows that the labels read."""
        for total, d in zip((self.hidden, self.low), sums):
            if d is None or self.apart:
                continue
            if d.device.type == "cpu":
                total.index_add_(0, self.head.safe_rows(part), d)
            else:  # index_add_ uses atomics on a GPU, index_put_ sorts: the same bits on every run
                total.index_put_((self.head.safe_rows(part),), d, accumulate=True)

    def finish(self, dtypes, group):
        """(d hidden, d weight, d bias, d low, d up), as many as dtypes, in these; of hidden and low over the group."""
        unit = self.unit
        if group is not None:
            if unit is not None:
                self.hidden.mul_(unit)
            for total, need in ((self.hidden, self.need_hidden), (self.low, self.need_low)):
                if need:
                    dist.all_reduce(total, group=group)
        units = (unit if group is None else None, unit, unit, None, None)
        sums = self.hidden, self.weight, self.bias, self.low, self.up
        return tuple(self._finished(*x) for x in zip(sums, units, dtypes))

    @staticmethod
    def _finished(total, unit, dtype):
        if unit is None:
            return total.to(dtype)
        return torch.mul(total, unit, out=total.new_empty(total.shape, dtype=dtype))
