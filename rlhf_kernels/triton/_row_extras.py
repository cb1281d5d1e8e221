"""Statistics of rows of logits with the extras.

They are those of logprobs.py and linear.py, and beside them the sum of the exps' squares, sum and number of the entries
that are not -inf, and where the first one at the maximum stands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import FREE, pieces, power_of_two, tile_rows
from ._math import FLOOR, NEG_INF, exp_f32, first_lane, raised, row_at, scale_of, scaled, whole_rest, with_former

PART = 32768  # columns whose statistics one program takes
BLOCK = 2048  # columns that it holds in registers at a time: there are twice the sums of the other kernels
ROWS = 16  # rows that a program of the merge finishes
NOWHERE = tl.constexpr(1 << 62)


@triton.jit(do_not_specialize=["T", "parts"])
def parts_kernel(
    logits, T, batch_stride, stride, bias, temperatures, scale, softcap, kept, columns, parts, out_max, out_rest,
    out_weighted, out_squares, out_total, out_count, out_first, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What one part of a row adds up to; out_* [n, parts], out_first int32. A row that is not kept adds nothing."""
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts
    begin = part * PART
    end = tl.where(tl.load(kept + row), tl.minimum(begin + PART, columns), begin)
    logits += row_at(row, T, batch_stride, stride)
    scale = scale_of(row, temperatures, scale)
    lanes = tl.arange(0, BLOCK)
    row_max, first = tl.full([], NEG_INF, tl.float32), tl.full([], -1, tl.int32)
    rest, weighted, squares = (tl.zeros([BLOCK], tl.float32),) * 3
    total, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        place = start + lanes
        x = tl.load(logits + place, mask=place < end, other=NEG_INF).to(tl.float32)
        if bias is not None:
            x += tl.load(bias + place, mask=place < end, other=0.0)
        z = scaled(x, scale, softcap, SCALED, CAPPED)
        total += tl.where(z == NEG_INF, 0.0, z)
        count += tl.where(z == NEG_INF, 0.0, 1.0)
        block_max = tl.max(z, 0)
        if block_max > row_max:
            fall = tl.where(row_max == NEG_INF, 0.0, tl.maximum(row_max - block_max, FLOOR))
            factor = exp_f32(fall)
            others = with_former(rest, row_max, lanes)
            weighted = factor * (weighted + others * fall)
            rest = factor * others
            squares = factor * factor * with_former(squares, row_max, lanes)
            at = first_lane(z, block_max, lanes, BLOCK)
            first = (start + at).to(tl.int32)
            z = tl.where(lanes == at, NEG_INF, z)
            row_max = block_max
        d = z - tl.where(row_max == NEG_INF, 0.0, row_max)
        e = exp_f32(d)
        weighted += e * tl.where(z == NEG_INF, 0.0, d)
        rest += e
        squares += e * e
    tl.store(out_max + program, row_max)
    tl.store(out_rest + program, tl.sum(rest, 0))
    tl.store(out_weighted + program, tl.sum(weighted, 0))
    tl.store(out_squares + program, tl.sum(squares, 0))
    tl.store(out_total + program, tl.sum(total, 0))
    tl.store(out_count + program, tl.sum(count, 0))
    tl.store(out_first + program, first)


@triton.jit(do_not_specialize=["T", "batch_stride", "stride", "column", "rows", "columns", "parts"])
def add_parts_kernel(
    logits, T, batch_stride, stride, bias, temperatures, scale, softcap, kept, labels, column, rows, columns, parts,
    part_max, part_rest, part_weighted, part_squares, part_total, part_count, part_first, state_max, state_rest,
    state_weighted, label_logit, here, state_squares, state_total, state_count, state_first, SCALED: tl.constexpr,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add a chunk's parts, whose first column is the vocabulary's entry `column`, to the rows' running statistics."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    part = tl.arange(0, PARTS)
    at = row[:, None] * parts + part[None, :]
    there = inside[:, None] & (part[None, :] < parts)
    maxima = tl.load(part_max + at, mask=there, other=NEG_INF)
    rests = tl.load(part_rest + at, mask=there, other=0.0).to(tl.float64)
    weights = tl.load(part_weighted + at, mask=there, other=0.0).to(tl.float64)
    squares = tl.load(part_squares + at, mask=there, other=0.0).to(tl.float64)
    totals = tl.load(part_total + at, mask=there, other=0.0).to(tl.float64)
    counts = tl.load(part_count + at, mask=there, other=0.0).to(tl.float64)
    firsts = tl.load(part_first + at, mask=there, other=-1).to(tl.int64) + column
    max_before = tl.load(state_max + row, mask=inside, other=NEG_INF)
    rest_before = tl.load(state_rest + row, mask=inside, other=0.0)
    weighted = tl.load(state_weighted + row, mask=inside, other=0.0)
    squares_before = tl.load(state_squares + row, mask=inside, other=0.0)
    first_before = tl.load(state_first + row, mask=inside, other=-1)

    row_max = tl.maximum(max_before, tl.max(maxima, 1))
    joined, tops, fall = raised(maxima, rests, row_max[:, None])
    joined_before, top_before, fall_before = raised(max_before, rest_before, row_max)
    weighted = exp_f32(fall_before) * (weighted + (1.0 + rest_before) * fall_before)
    weighted += tl.sum(exp_f32(fall) * (weights + (1.0 + rests) * fall), 1)
    seconds = top_before + tl.sum(tops, 1)
    rest = whole_rest(joined_before + tl.sum(joined, 1), seconds)
    joined, _tops, _fall = raised(maxima, squares, row_max[:, None], 2.0)
    joined_before, _top, _fall_before = raised(max_before, squares_before, row_max, 2.0)
    first = tl.min(tl.where(tops > 0.0, firsts, NOWHERE), 1)
    first = tl.where(top_before > 0.0, first_before, first)
    tl.store(state_max + row, row_max, mask=inside)
    tl.store(state_rest + row, rest, mask=inside)
    tl.store(state_weighted + row, weighted, mask=inside)
    tl.store(state_squares + row, whole_rest(joined_before + tl.sum(joined, 1), seconds), mask=inside)
    tl.store(state_total + row, tl.load(state_total + row, mask=inside, other=0.0) + tl.sum(totals, 1), mask=inside)
    tl.store(state_count + row, tl.load(state_count + row, mask=inside, other=0.0) + tl.sum(counts, 1), mask=inside)
    tl.store(state_first + row, tl.where(row_max == NEG_INF, -1, first), mask=inside)

    label = tl.load(labels + row, mask=inside, other=-1) - column
    found = inside & tl.load(kept + row, mask=inside, other=False) & (label >= 0) & (label < columns)
    x = tl.load(logits + row_at(row, T, batch_stride, stride) + label, mask=found, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + label, mask=found, other=0.0)
    if temperatures is not None:
        scale = 1.0 / tl.load(temperatures + row, mask=found, other=1.0)
    tl.store(label_logit + row, scaled(x, scale, softcap, SCALED, CAPPED), mask=found)
    tl.store(here + row, found, mask=found)


def fold(logits, place, chunk, state):
    """Add a `_linear_walk.Chunk`, whose rows lie as `place` (T, batch stride, stride) says, to a State with extras."""
    columns, rows = logits.shape[-1], chunk.labels.shape[0]
    parts, block = pieces(columns, PART), min(BLOCK, power_of_two(columns))
    found = [logits.new_empty(rows * parts, dtype=torch.float32) for _ in range(6)]
    found.append(logits.new_empty(rows * parts, dtype=torch.int32))
    softcap, scale = chunk.softcap or 0.0, 1.0 / chunk.temperature
    inputs = (logits, *place, chunk.bias, chunk.temperatures, scale, softcap, chunk.kept)
    options = {
        "SCALED": chunk.temperatures is not None or chunk.temperature != 1.0,
        "CAPPED": chunk.softcap is not None,
    }
    _launch.run(
        parts_kernel, rows * parts, *inputs, columns, parts, *found, PART=PART, BLOCK=block,
        num_warps=max(1, block // 256), registers=FREE, **options,
    )  # fmt: skip
    held = tile_rows(ROWS, 2 * parts)  # of twice as many sums
    _launch.run(
        add_parts_kernel, pieces(rows, held), *inputs, chunk.labels, chunk.first, rows, columns, parts, *found,
        state.max, state.rest, state.weighted, state.label_logit, state.here, *state.extras, ROWS=held,
        PARTS=power_of_two(parts), num_warps=1, **options,
    )  # fmt: skip
