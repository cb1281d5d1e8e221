"""Sums of the entries of rows of logits that are not -inf, and their number, part by part as in logprobs.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import pieces, power_of_two, warps
from ._math import NEG_INF, scaled

PART = 32768  # columns that one program adds up
BLOCK = 4096  # columns that it holds in registers at a time


@triton.jit(do_not_specialize=["parts"])
def row_sums_kernel(
    logits, stride, bias, temperatures, scale, softcap, kept, columns, parts, out_total, out_count,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(sum of z that are not -inf, their number) of one part of a row; out_* [n, parts]; 0 if the row is not kept."""
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts
    first = part * PART
    end = tl.where(tl.load(kept + row), tl.minimum(first + PART, columns), first)
    if temperatures is not None:
        scale = 1.0 / tl.load(temperatures + row)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    lanes = tl.arange(0, BLOCK)
    for start in range(first, end, BLOCK):
        place = start + lanes
        x = tl.load(logits + row * stride + place, mask=place < end, other=NEG_INF).to(tl.float32)
        if bias is not None:
            x += tl.load(bias + place, mask=place < end, other=0.0)
        z = scaled(x, scale, softcap, SCALED, CAPPED)
        total += tl.where(z == NEG_INF, 0.0, z)
        count += tl.where(z == NEG_INF, 0.0, 1.0)
    tl.store(out_total + program, tl.sum(total, 0))
    tl.store(out_count + program, tl.sum(count, 0))


def add_row_sums(
    logits, stride, bias, temperatures, scale, softcap, rows, columns, kept, total, count, SCALED, CAPPED
):  # fmt: skip
    """Add the sums of logits [rows, columns] and their numbers to total and count [rows], fp64."""
    parts, block = pieces(columns, PART), min(BLOCK, power_of_two(columns))
    sums = torch.empty(2, rows, parts, dtype=torch.float32, device=logits.device)
    _launch.run(
        row_sums_kernel, rows * parts, logits, stride, bias, temperatures, scale, softcap, kept, columns, parts,
        *sums, SCALED=SCALED, CAPPED=CAPPED, PART=PART, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    total += sums[0].sum(-1, dtype=torch.float64)
    count += sums[1].sum(-1, dtype=torch.float64)
