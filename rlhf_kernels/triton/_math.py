"""Arithmetic that several kernels share; the names are those of csrc/include."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
NEG_INF = tl.constexpr(float("-inf"))
FLOOR = tl.constexpr(-1e30)  # of a fall of the maximum: its exp is 0, and times a sum it stays finite


@triton.jit
def row_at(row, T, batch_stride, stride):
    """Where row b T + t of what `planes` returned begins; in 32 bits, because rows are fewer than programs may be."""
    row = row.to(tl.int32)
    return (row // T).to(tl.int64) * batch_stride + (row % T).to(tl.int64) * stride


@triton.jit
def scale_of(row, temperatures, scale):
    """1 / temperature of a row."""
    if temperatures is not None:
        return 1.0 / tl.load(temperatures + row)
    else:
        return scale


@triton.jit
def exp_f32(x):
    """exp(x); relative error |x| 2^-24 + 2 ulp."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def expm1_f32(x):
    """exp(x) - 1 for x <= 0, without cancellation near 0."""
    series = 1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0)))
    series = 1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * series))
    near = x > -0.5
    return tl.where(near, tl.where(near, x, 0.0) * series, exp_f32(x) - 1.0)


@triton.jit
def log1p_f32(x):
    """log(1 + x) for x >= 0: what 1 + x loses is put back."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def log1m_exp_f32(x):
    """log(1 - exp(x)) for x <= 0: without cancellation near 0, and what 1 - exp(x) loses put back far from it."""
    p, rest = exp_f32(x), -expm1_f32(x)
    y = 1.0 - p
    near = x > -0.6931472
    log = tl.log(tl.where(near, tl.where(rest < 0.0, 0.0, rest), y))
    return tl.where(near, log, tl.where(y == 1.0, -p, log * (p / (1.0 - y))))


@triton.jit
def tanh_f32(x):
    """tanh(x): a series near 0, where 1 - exp(-2 |x|) would cancel."""
    square = x * x
    series = -17.0 / 315.0 + square * (62.0 / 2835.0 - square * (1382.0 / 155925.0))
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series)))
    e = exp_f32(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -far, far))


@triton.jit
def scaled(x, scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """z of logits x in fp32: softcap * tanh(x / softcap) * scale; -inf stays -inf."""
    if CAPPED:
        return tl.where(x == NEG_INF, x, softcap * tanh_f32(x / softcap) * scale)
    elif SCALED:
        return x * scale
    else:
        return x


@triton.jit
def scaled_slope(x, scale, softcap, CAPPED: tl.constexpr):
    """dz/dx."""
    if CAPPED:
        t = tanh_f32(x / softcap)
        return (1.0 - t * t) * scale
    else:
        return scale


@triton.jit
def with_former(rest, row_max, lanes):
    """The sums of the others, lane by lane, with a former maximum, which is one of them from now on."""
    return rest + tl.where(lanes == 0, tl.where(row_max == NEG_INF, 0.0, 1.0), 0.0)


@triton.jit
def first_lane(z, block_max, lanes, BLOCK: tl.constexpr):
    """The first lane at a block's maximum; none for inf, which stays in the sum and makes it NaN."""
    return tl.where(block_max == INF, BLOCK, tl.min(tl.where(z == block_max, lanes, BLOCK), 0))


@triton.jit
def add_block(row_max, rest, weighted, z, lanes, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """A row's running maximum and sums, lane by lane, with one more block of z: one maximum, one exp an entry.

    `rest` leaves out one entry at the maximum. Only a block that brings a new one pays for that and for rescaling.
    """
    block_max = tl.max(z, 0)
    if block_max > row_max:
        fall = tl.where(row_max == NEG_INF, 0.0, tl.maximum(row_max - block_max, FLOOR))
        factor = exp_f32(fall)
        total = with_former(rest, row_max, lanes)
        if WITH_ENTROPY:
            weighted = factor * (weighted + total * fall)
        rest = factor * total
        z = tl.where(lanes == first_lane(z, block_max, lanes, BLOCK), NEG_INF, z)
        row_max = block_max
    d = z - tl.where(row_max == NEG_INF, 0.0, row_max)
    e = exp_f32(d)
    if WITH_ENTROPY:
        weighted += e * tl.where(z == NEG_INF, 0.0, d)
    return row_max, rest + e, weighted


@triton.jit
def raised(part_max, part_rest, highest, scale=1.0):
    """(rest, 1 if the maximum is the highest or else 0, maximum - highest) of parts whose maximum is at most `highest`.

    Exps are of differences times scale. A lower maximum joins the others, so the whole's rest is the sum of the parts',
    and 1 for each that is the highest beyond the first: `whole_rest`.
    """
    some = part_max != NEG_INF
    fall = tl.where(some, tl.maximum(part_max - highest, FLOOR), 0.0)
    top = some & (fall == 0.0)
    joined = tl.where(some & (fall != 0.0), exp_f32(fall * scale) * (1.0 + part_rest), part_rest)
    return joined, top.to(tl.float32), fall


@triton.jit
def whole_rest(rests, tops):
    """The rest of a whole from the sums over its parts that `raised` gives."""
    return rests + tl.maximum(tops - 1.0, 0.0)
