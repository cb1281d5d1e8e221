"""Arithmetic that several kernels share; the names are those of csrc/include."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
NEG_INF = tl.constexpr(float("-inf"))
FLOOR = tl.constexpr(-1e30)  # of a fall of the maximum: its exp is 0, and times a sum it stays finite
NEVER = tl.constexpr(-200.0)  # of log p + entropy where p is 0 in fp32: times any gradient it stays finite
LOWEST = tl.constexpr(-3.4028234663852886e38)  # stands for a maximum of nothing but -inf: what is less it stays -inf
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def row_at(row, T, batch_stride, stride, UNIT: tl.constexpr = 1):
    """Where row b T + t of what `planes` returned begins; in 32 bits, because rows are fewer than programs may be.

    UNIT divides it. That is said here: about what a function returned it would be forgotten (Triton 3.6).
    """
    row = row.to(tl.int32)
    return tl.multiple_of((row // T).to(tl.int64) * batch_stride + (row % T).to(tl.int64) * stride, UNIT)


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
def widened(x):
    """x in fp32: of a bf16 its bits, moved by one instruction."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def eight(x, LANES: tl.constexpr):
    """The first, second, ... eighth of each 8 consecutive entries of x [8 LANES], each [LANES]."""
    even, odd = tl.split(tl.reshape(x, [LANES, 4, 2]))
    even_0, even_1 = tl.split(tl.reshape(even, [LANES, 2, 2]))
    odd_0, odd_1 = tl.split(tl.reshape(odd, [LANES, 2, 2]))
    x_0, x_4 = tl.split(even_0)
    x_2, x_6 = tl.split(even_1)
    x_1, x_5 = tl.split(odd_0)
    x_3, x_7 = tl.split(odd_1)
    return x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7


@triton.jit
def add_eights(lane_max, rest, weighted, z, WITH_ENTROPY: tl.constexpr, LANES: tl.constexpr):
    """Each lane's running maximum and sums [LANES] with 8 consecutive entries more of z [8 LANES].

    No lane looks at another. `rest` leaves out one entry at the maximum: of two numbers that are compared, the larger
    one goes on as the maximum, and the other, be it the former maximum, is added. A NaN goes into the sums.
    """
    entries = eight(z, LANES)
    highest = lane_max
    for i in tl.static_range(8):
        highest = tl.maximum(highest, entries[i])
    shift = tl.maximum(highest, LOWEST)
    fall = tl.maximum(lane_max - shift, FLOOR)
    factor = exp_f32(fall)
    if WITH_ENTROPY:
        weighted = factor * tl.fma(rest, fall, weighted)
    rest = factor * rest
    larger = lane_max
    for i in tl.static_range(8):
        other = tl.minimum(larger, entries[i], propagate_nan=ALL)
        larger = tl.maximum(larger, entries[i])
        d = other - shift
        e = exp_f32(d)
        rest += e
        if WITH_ENTROPY:
            weighted = tl.fma(e, tl.maximum(d, FLOOR), weighted)
    return highest, rest, weighted


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


@triton.jit
def of_lanes(lane_max, rest, weighted, WITH_ENTROPY: tl.constexpr):
    """(max, rest, weighted) of all lanes together; inf stays in the sum and makes it NaN."""
    rest = tl.where(lane_max == INF, float("nan"), rest)
    row_max = tl.max(lane_max, 0)
    joined, tops, fall = raised(lane_max, rest, row_max)
    if WITH_ENTROPY:
        weighted = tl.sum(exp_f32(fall) * (weighted + (1.0 + rest) * fall), 0)
    return row_max, whole_rest(tl.sum(joined, 0), tl.sum(tops, 0)), weighted


@triton.jit
def log_prob_gradient(z, row_max, log_sum, entropy, grad, grad_entropy):
    """d/dz of grad log p of another entry + grad_entropy entropy: -p (grad + grad_entropy (log p + entropy)).

    0 where z is -inf. The gradient of a log-sum-exp is taken off `grad`. grad_entropy may be None.
    """
    log_p = (z - tl.maximum(row_max, LOWEST)) - log_sum
    if grad_entropy is None:
        return exp_f32(log_p) * -grad
    else:
        surprise = tl.maximum(log_p + entropy, NEVER, propagate_nan=ALL)
        return exp_f32(log_p) * tl.fma(tl.zeros_like(z) - grad_entropy, surprise, -grad)


@triton.jit
def label_gradient(log_p, entropy, grad, grad_entropy, grad_log_sum_exp):
    """The same at the label itself: grad (1 - p), less what entropy and log-sum-exp take; 0 where its logit is -inf."""
    dz = -grad * expm1_f32(log_p)
    if grad_entropy is not None:
        p = exp_f32(log_p)
        dz -= grad_entropy * p * (tl.where(p == 0.0, 0.0, log_p) + entropy)
    if grad_log_sum_exp is not None:
        dz += grad_log_sum_exp * exp_f32(log_p)
    return tl.where(log_p == NEG_INF, 0.0, dz)


@triton.jit
def dlogits(dz, x, each, scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """d/dx of z's gradient and of `each`, which every entry but -inf has besides, unless it is None."""
    if each is not None:
        dz += tl.where(x == NEG_INF, 0.0, each)
    if CAPPED or SCALED:
        dz = dz * scaled_slope(x, scale, softcap, CAPPED)
    return dz
