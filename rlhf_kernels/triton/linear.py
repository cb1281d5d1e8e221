"""The walk of _linear_walk.py on a GPU: its chunk kernels, and matrix products in the inputs' dtype with fp32 results.

A chunk of narrow columns is up to TOKENS x COLUMNS logits: so many tokens, because each chunk of tokens reads and
writes the whole fp32 d weight once; so many columns, because each chunk of columns does the same to d hidden. Neither
counts in a forward: FORWARD_COLUMNS are fewer, so that the logits are still in the second-level cache when they are
read, and not so few that enqueueing a chunk takes longer than its product (not measured yet). A chunk that spans the
vocabulary holds WIDE_BYTES, but at least LEAST_TOKENS tokens. Parts of one call are of equal size.

Logits are fp32 sums of exact products, whatever the inputs' dtype. From bf16 or fp16 inputs d/dlogits is rounded to
that dtype for the products with the head and the hidden states, which tensor cores then take as they are. Each entry is
rounded once, to nearest, from its fp32 value, so its error is at most half a unit in the last place and has no sign of
its own; nothing that is a sum is rounded: products add up in fp32, over columns and over chunks of tokens, and d hidden
and d weight are rounded once, when all is summed. fp16 has few exponents, so there entries are first divided by
`unit`, a number on the device that brings the largest possible one near 2^14: otherwise small ones would all be rounded
to 0, which is a bias. A backward knows what comes from upstream, so it has one unit for all its chunks, and its sums
are multiplied by it when they are done; where the loss is known, each chunk has its own, and each product is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _linear_walk as walk
from .._linear_backend import Operators
from . import _launch, kl
from ._launch import FREE, pieces, power_of_two, tile_rows, warps
from ._math import (
    NEG_INF,
    add_eights,
    dlogits,
    exp_f32,
    label_gradient,
    log_prob_gradient,
    of_lanes,
    raised,
    scale_of,
    scaled,
    tanh_f32,
    whole_rest,
)
from ._row_extras import fold as fold_extras
from ._row_sums import add_row_sums

TOKENS = 4096
FORWARD_COLUMNS = 4096
COLUMNS = 16384
LEAST_TOKENS = 2048
WIDE_BYTES = 5 << 29
PART = 32768  # columns whose statistics one program takes
BLOCK = 4096  # columns that a program holds in registers at a time
ROWS = 32  # rows that a program of the merge finishes
HALVES = (torch.bfloat16, torch.float16)
# addmm takes an fp32 sum and bf16 or fp16 factors since torch 2.10; before, the product goes through memory
ADDS = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 10)


@triton.jit
def logits_of(logits, bias, columns, inside):
    """A row's logits with their bias; -inf outside. Inside is None where all of them are."""
    x = tl.load(logits + columns, mask=inside, other=None if inside is None else NEG_INF)
    if bias is not None:
        x += tl.load(bias + columns, mask=inside, other=None if inside is None else 0.0)
    return x


@triton.jit(do_not_specialize=["stride", "columns", "parts"])
def statistics_kernel(
    logits, stride, bias, temperatures, scale, softcap, kept, columns, parts, out_max, out_rest, out_weighted,
    WITH_ENTROPY: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """(max z, sum exp(z - max) less 1, sum exp(z - max) (z - max)) of one part of a chunk's row; out_* [n, parts]."""
    LANES: tl.constexpr = BLOCK // 8
    program = tl.program_id(0)
    row, first = program // parts, program % parts * PART
    end = tl.where(tl.load(kept + row), tl.minimum(first + PART, columns), first)
    scale = scale_of(row, temperatures, scale)
    logits += tl.multiple_of(row.to(tl.int64) * stride, UNIT)
    lane_max = tl.full([LANES], NEG_INF, tl.float32)
    rest = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    lanes = tl.arange(0, BLOCK)
    end = tl.multiple_of(end, UNIT)
    whole = first + (end - first) // BLOCK * BLOCK
    for start in range(first, whole, BLOCK):
        z = scaled(logits_of(logits, bias, start + lanes, None), scale, softcap, SCALED, CAPPED)
        lane_max, rest, weighted = add_eights(lane_max, rest, weighted, z, WITH_ENTROPY, LANES)
    if whole < end:
        z = scaled(logits_of(logits, bias, whole + lanes, whole + lanes < end), scale, softcap, SCALED, CAPPED)
        lane_max, rest, weighted = add_eights(lane_max, rest, weighted, z, WITH_ENTROPY, LANES)
    row_max, rest, weighted = of_lanes(lane_max, rest, weighted, WITH_ENTROPY)
    tl.store(out_max + program, row_max)
    tl.store(out_rest + program, rest)
    if WITH_ENTROPY:
        tl.store(out_weighted + program, weighted)


@triton.jit(do_not_specialize=["stride", "first", "rows", "columns", "parts"])
def merge_kernel(
    logits, stride, bias, temperatures, scale, softcap, labels, first, kept, rows, columns, parts, part_max, part_rest,
    part_weighted, state_max, state_rest, state_weighted, label_logit, here, WITH_ENTROPY: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add a chunk's parts to the rows' running statistics, and its label's z where the label is in the chunk."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    part = tl.arange(0, PARTS)
    at = row[:, None] * parts + part[None, :]
    there = inside[:, None] & (part[None, :] < parts)
    maxima = tl.load(part_max + at, mask=there, other=NEG_INF)
    rests = tl.load(part_rest + at, mask=there, other=0.0).to(tl.float64)
    max_before = tl.load(state_max + row, mask=inside, other=NEG_INF)
    rest_before = tl.load(state_rest + row, mask=inside, other=0.0)
    row_max = tl.maximum(max_before, tl.max(maxima, 1))
    joined, tops, fall = raised(maxima, rests, row_max[:, None])
    joined_before, top_before, fall_before = raised(max_before, rest_before, row_max)
    if WITH_ENTROPY:
        weights = tl.load(part_weighted + at, mask=there, other=0.0).to(tl.float64)
        weighted = tl.load(state_weighted + row, mask=inside, other=0.0)
        weighted = exp_f32(fall_before) * (weighted + (1.0 + rest_before) * fall_before)
        weighted += tl.sum(exp_f32(fall) * (weights + (1.0 + rests) * fall), 1)
        tl.store(state_weighted + row, weighted, mask=inside)
    rest = whole_rest(joined_before + tl.sum(joined, 1), top_before + tl.sum(tops, 1))
    tl.store(state_rest + row, rest, mask=inside)
    tl.store(state_max + row, row_max, mask=inside)
    column = tl.load(labels + row, mask=inside, other=-1) - first
    found = inside & tl.load(kept + row, mask=inside, other=False) & (column >= 0) & (column < columns)
    x = tl.load(logits + row * stride + column, mask=found, other=0.0)
    if bias is not None:
        x += tl.load(bias + column, mask=found, other=0.0)
    if temperatures is not None:
        scale = 1.0 / tl.load(temperatures + row, mask=found, other=1.0)
    tl.store(label_logit + row, scaled(x, scale, softcap, SCALED, CAPPED), mask=found)
    tl.store(here + row, found, mask=found)


@triton.jit(do_not_specialize=["stride", "first", "columns", "blocks", "out_stride"])
def gradient_kernel(
    logits, stride, bias, temperatures, scale, softcap, labels, first, kept, grad_logprob, grad_entropy,
    grad_log_sum_exp, grad_each, unit, logprob, entropy, row_max, log_sum, columns, blocks, out, out_stride,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """d/dlogits over unit of one block of a row; 0 if the row is not kept, NaN if its log-prob is."""
    program = tl.program_id(0)
    row, start = program // blocks, program % blocks * BLOCK
    lanes = tl.arange(0, BLOCK)
    inside = lanes < tl.multiple_of(columns - start, UNIT)
    place = out + tl.multiple_of(row.to(tl.int64) * out_stride, UNIT) + start + lanes
    if tl.load(kept + row):
        x = logits_of(logits + tl.multiple_of(row.to(tl.int64) * stride, UNIT), bias, start + lanes, inside)
        scale = scale_of(row, temperatures, scale)
        share = 1.0
        if unit is not None:
            share = 1.0 / tl.load(unit)
        grad, through_entropy, other, each, own_entropy = 0.0, None, None, None, None
        if grad_logprob is not None:
            grad += tl.load(grad_logprob + row) * share
        if grad_entropy is not None:
            through_entropy, own_entropy = tl.load(grad_entropy + row) * share, tl.load(entropy + row)
        if grad_log_sum_exp is not None:
            other = tl.load(grad_log_sum_exp + row) * share
        if grad_each is not None:
            each = tl.load(grad_each + row) * share
        label_log_p = tl.load(logprob + row)
        base = grad if other is None else grad - other
        base = tl.where(label_log_p == label_log_p, base, float("nan"))
        z = scaled(x, scale, softcap, SCALED, CAPPED)
        dz = log_prob_gradient(z, tl.load(row_max + row), tl.load(log_sum + row), own_entropy, base, through_entropy)
        if grad_logprob is not None:
            at = tl.load(labels + row) - first - start
            if (at >= 0) & (at < BLOCK):
                at_label = label_gradient(label_log_p, own_entropy, grad, through_entropy, other)
                dz = tl.where(lanes == at.to(tl.int32), at_label, dz)
        dx = dlogits(dz, x, each, scale, softcap, SCALED, CAPPED)
        tl.store(place, dx.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(place, tl.zeros([BLOCK], out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def capped_kernel(logits, stride, bias, softcap, columns, blocks, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """softcap(logits + bias) of one block of a row, in place."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    lanes = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    x = logits_of(logits + row * stride, bias, lanes, lanes < columns)
    if CAPPED:
        x = tl.where(x == NEG_INF, x, softcap * tanh_f32(x / softcap))
    tl.store(logits + row * stride + lanes, x, mask=lanes < columns)


def product(a, b, out, add=False, unit=None):
    """out (+)= a b (* unit): bf16 or fp16 factors, fp32 sums. Other devices than CUDA's widen the factors first."""
    wide = a.dtype == torch.float32 or a.device.type != "cuda"
    if wide:
        a, b = a.to(torch.float32), b.to(torch.float32)
    if unit is None and add and (wide or ADDS):
        torch.addmm(out, a, b, out=out) if wide else torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        return
    into = {"out": out} if unit is None and not add else {}
    result = torch.mm(a, b, **into) if wide else torch.mm(a, b, out_dtype=torch.float32, **into)
    if unit is None:
        out.add_(result) if add else None
    elif add:
        out.addcmul_(result, unit)
    else:
        torch.mul(result, unit, out=out)


def fp16_unit(bound):
    """A number [] such that rows whose entries are at most bound [n] reach no more than about 2^14 of it."""
    largest = torch.nan_to_num(bound, nan=0.0, posinf=0.0).amax()
    return largest.clamp(1e-30, 1e30) * 2.0**-14


class _Kernels(walk.Kernels):
    """Of one call: its dtype of factors, and the memory in which d/dlogits wait in that dtype."""

    product = staticmethod(product)

    def __init__(self, hidden, weight, fast):
        halves = [x.dtype for x in (hidden, weight) if x.dtype in HALVES]
        alike = hidden.dtype == weight.dtype
        self.dtype = halves[0] if halves and (alike or fast) else torch.float32
        self.narrow = self.unit = None

    @staticmethod
    def tokens(count):
        return _even(count, TOKENS)

    @staticmethod
    def columns(vocab):
        return FORWARD_COLUMNS

    @staticmethod
    def backward_columns(vocab):
        return COLUMNS

    @staticmethod
    def wide_tokens(count, vocab, group):
        fits = min(max(WIDE_BYTES // (4 * vocab), LEAST_TOKENS), TOKENS)
        return _even(count, TOKENS if group is not None else fits)

    @staticmethod
    def gradient_columns(vocab):
        return COLUMNS

    @staticmethod
    def row_stride(columns):
        return (columns + 15) // 16 * 16  # rows that tensor cores can load and store in whole vectors

    def inputs(self, head, part, kept):
        h = head.hidden[part] if head.rows is None else head.hidden[head.safe_rows(part)]
        return torch.where(kept.unsqueeze(-1), h.to(self.dtype), 0.0)

    def blocks(self, weight, columns):
        return walk.Kernels.blocks(weight, columns, self.dtype)

    @staticmethod
    def fold(chunk, state):
        rows, columns = chunk.logits.shape
        if state.extras is not None:
            fold_extras(chunk.logits, (rows, 0, chunk.logits.stride(0)), chunk, state)
            return
        parts, block = pieces(columns, PART), min(BLOCK, max(power_of_two(columns), 8))
        sizes = (rows * parts,) * (2 if state.weighted is None else 3)
        statistics = [chunk.logits.new_empty(size) for size in sizes]
        statistics += [None] * (3 - len(statistics))
        inputs, options = _scaled(chunk)
        options["WITH_ENTROPY"] = state.weighted is not None
        _launch.run(
            statistics_kernel, rows * parts, *inputs, chunk.kept, columns, parts, *statistics, PART=PART, BLOCK=block,
            UNIT=_launch.unit(columns, chunk.logits.stride(0)), num_warps=warps(block), registers=FREE, **options,
        )  # fmt: skip
        held = tile_rows(ROWS, parts)
        _launch.run(
            merge_kernel, pieces(rows, held), *inputs, chunk.labels, chunk.first, chunk.kept, rows, columns, parts,
            *statistics, state.max, state.rest, state.weighted, state.label_logit, state.here, ROWS=held,
            PARTS=power_of_two(parts), num_warps=1, **options,
        )  # fmt: skip

    @staticmethod
    def row_sums(chunk, total, count):
        inputs, options = _scaled(chunk)
        add_row_sums(*inputs, *chunk.logits.shape, chunk.kept, total, count, **options)

    def gradient(self, chunk, upstream, found):
        rows, columns = chunk.logits.shape
        upstream = [None if g is None else g.to(torch.float32).contiguous() for g in upstream]
        unit = self.unit
        if unit is None:
            unit = self._unit(upstream, chunk.kept, chunk.temperature, chunk.temperatures)
        out = self._dlogits(chunk.logits)
        block = min(BLOCK, power_of_two(columns))
        blocks = pieces(columns, block)
        inputs, options = _scaled(chunk)
        _launch.run(
            gradient_kernel, rows * blocks, *inputs, chunk.labels, chunk.first, chunk.kept, *upstream, unit, *found[:4],
            columns, blocks, out, out.stride(0), BLOCK=block,
            UNIT=_launch.unit(columns, chunk.logits.stride(0), out.stride(0)), num_warps=warps(block), **options,
        )  # fmt: skip
        return out, unit

    def _unit(self, upstream, kept, temperature, temperatures):
        """Of d/dlogits of these rows; None where the factors are not fp16."""
        if self.dtype != torch.float16 or not kept.numel():
            return None
        sizes = [f * g.to(torch.float32).abs() for f, g in zip((1.0, 16.0, 1.0, 1.0), upstream) if g is not None]
        heat = temperature if temperatures is None else temperatures  # 16 > entropy
        return fp16_unit(torch.where(kept, sum(sizes) / heat, 0.0))

    def common_unit(self, walk, upstream):
        self.unit = self._unit(upstream, walk.kept, walk.head.temperature, walk.temperatures)
        return self.unit

    @staticmethod
    def capped(logits, bias, softcap):
        if bias is not None or softcap is not None:
            rows, columns = logits.shape
            block = min(BLOCK, power_of_two(columns))
            blocks = pieces(columns, block)
            _launch.run(
                capped_kernel, rows * blocks, logits, logits.stride(0), bias, softcap or 0.0, columns, blocks,
                CAPPED=softcap is not None, BLOCK=block, num_warps=warps(block),
            )  # fmt: skip
        return logits

    @staticmethod
    def divergence(logits, ref_logits, temperature, reverse):
        a, b = (logits, ref_logits) if reverse else (ref_logits, logits)
        return kl.divergence(a, b, temperature)

    def divergence_gradient(self, grad, logits, ref_logits, results, head, reverse):
        grad, unit = grad.to(torch.float32), None
        if self.dtype == torch.float16:  # |a (log a - log b - KL)| <= KL + 1, and |b - a| <= 1
            unit = fp16_unit(grad.abs() * (results[0] + 1.0) / head.temperature)
            grad = grad / unit
        out = self._dlogits(logits)
        sides, outputs = (logits, ref_logits), (out, None)
        if not reverse:
            sides, outputs = sides[::-1], outputs[::-1]
        kl.divergence_gradient(grad, *sides, results, head.temperature, *outputs, softcap=head.softcap)
        return out, unit

    def _dlogits(self, logits):
        """Where the gradients of these logits go: over them, or, in the products' dtype, into memory of their own."""
        if self.dtype == torch.float32:
            return logits
        rows, columns = logits.shape
        stride = self.row_stride(columns)
        if self.narrow is None or self.narrow.numel() < rows * stride:
            self.narrow = logits.new_empty(rows * stride, dtype=self.dtype)
        return self.narrow[: rows * stride].view(rows, stride)[:, :columns]


def _even(count, size):
    """The size of equal parts of `count` tokens, at most `size`, a multiple of 128 unless that is more."""
    return min(pieces(pieces(count, pieces(max(count, 1), size)), 128) * 128, size) or size


def _scaled(chunk):
    """The arguments that make z from logits, and their constants."""
    warm = chunk.temperatures is not None
    scale, softcap = 1.0 / chunk.temperature, chunk.softcap or 0.0
    inputs = (chunk.logits, chunk.logits.stride(0), chunk.bias, chunk.temperatures, scale, softcap)
    return inputs, {"SCALED": warm or chunk.temperature != 1.0, "CAPPED": chunk.softcap is not None}


operators = Operators(_Kernels)
linear_logprobs_fwd = operators.linear_logprobs_fwd
linear_logprobs_bwd = operators.linear_logprobs_bwd
linear_token_statistics_fwd = operators.linear_token_statistics_fwd
linear_policy_fwd = operators.linear_policy_fwd
linear_ppo_fwd = operators.linear_ppo_fwd
linear_kl_fwd = operators.linear_kl_fwd
linear_kl_bwd = operators.linear_kl_bwd
