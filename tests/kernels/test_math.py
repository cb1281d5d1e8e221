"""The vector maths of csrc/include on every instruction set: over every float32 exponent, against float64.

The error bound of a function is the one that the comment above it states ("at most 1.5 ulp"); the test reads it there.
"""

import re
from pathlib import Path

import pytest
import torch

from rlhf_kernels import _native

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=f"no native CPU backend: {_native.missing()}")
INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"
LANES = 16  # of the widest instruction set; those of the narrower ones divide it
INF = torch.inf
MAX = torch.finfo(torch.float32).max
TINY = torch.finfo(torch.float32).tiny


def k3(d):
    """exp(-d) - 1 + d in float64; near 0, where that cancels, its series."""
    return torch.where(
        d.abs() < 1e-2, d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d / 720)))), torch.expm1(-d) + d
    )


def log1m_exp(x):
    """log(1 - exp(x)) in float64, by whichever of the two forms does not cancel."""
    return torch.where(x > -0.5, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


# function: (exact, where its bound holds, [(low, high, the one value it has there)])
FUNCTIONS = {
    "exp_f32": (torch.exp, -104, 88.7, [(-INF, -104, 0.0), (88.73, INF, INF)]),
    "exp2_nonpositive_f32": (torch.exp2, -125.5, 0.5, [(-INF, -125.50001, 0.0)]),
    "exp_nonpositive_f32": (torch.exp, -87, 0, [(-INF, -87.7, 0.0)]),
    "expm1_f32": (torch.expm1, -INF, 88.7, [(88.73, INF, INF)]),
    "expm1_nonpositive_f32": (torch.expm1, -INF, 0, []),
    "kl_k3": (k3, -88.7, INF, [(-INF, -88.8, INF)]),
    "kl_k3_of": (k3, -88.7, INF, [(-INF, -88.8, INF)]),
    "kl_k3_slope": (lambda d: -torch.expm1(-d), -88.7, INF, [(20, INF, 1.0), (-INF, -88.8, -INF)]),
    "log1m_exp_f32": (log1m_exp, -104, 0, [(-INF, -104.1, 0.0), (0, INF, -INF)]),
    "log1p_f32": (torch.log1p, 0, 2**24 - 1, []),
    "log1p_polynomial": (torch.log1p, 0, 1, []),
    "log1p_unit_f32": (torch.log1p, 0, 1, []),
    "log_unit_f32": (torch.log, TINY, 1, []),
    "tanh_f32": (torch.tanh, -INF, INF, [(20, INF, 1.0), (-INF, -20, -1.0)]),
}


def stated_bounds():
    """{function: ulp} of every comment "at most <ulp> ulp" or "within <ulp> ulp" that stands above a function."""
    text = "\n".join(path.read_text() for path in sorted(INCLUDE.glob("*.h")))
    pattern = r"(?:[Aa]t most|within) ([\d.]+) ulp[^\n]*(?:\n// [^\n]*)*\ntemplate <class T>\nRK_HD T (\w+)\("
    return {name: float(bound) for bound, name in re.findall(pattern, text)}


def test_every_stated_bound_is_tested():
    assert stated_bounds().keys() == FUNCTIONS.keys()


def every_exponent(mantissas=4096):
    """Floats of both signs and all 256 exponents, so zeros, subnormals, infinities and NaNs too, each with at least
    `mantissas` mantissas: the first and last ones, single bits, runs of ones, those in the middle, and random ones."""
    edges = [*range(64), *range(0x3FFFE0, 0x400020), *range(0x7FFFC0, 0x800000), *(1 << bit for bit in range(23))]
    edges += [(1 << bit) - 1 for bit in range(1, 24)]
    edges = torch.tensor(sorted({*edges, *(0x7FFFFF ^ edge for edge in edges)}))
    random = torch.randint(0, 1 << 23, (2, 256, mantissas), generator=torch.Generator().manual_seed(0))
    mantissa = torch.cat([edges.expand(2, 256, -1), random], 2)
    bits = torch.arange(-256, 256).view(2, 256, 1) << 23 | mantissa  # negative integers carry the sign bit
    return bits.to(torch.int32).view(torch.float32).flatten()


def evenly(low, high, count=1 << 18):
    """Evenly spaced floats, where an approximation's own period matters more than the exponents."""
    low, high = max(low, -200), min(high, 200)
    return torch.linspace(low, high, count, dtype=torch.float64).to(torch.float32).clamp(low, high)


def call(name, isa, x, out_dtype=torch.float32):
    out = torch.empty(x.shape, dtype=out_dtype)
    _native._load()[0].functions(isa)[name](x.data_ptr(), x.numel(), out.data_ptr(), 1)
    return out


def in_vectors(name, isa, x):
    """(points, values) of the template's vector instance; it takes whole vectors, so some points come twice."""
    x = torch.cat([x, x[:LANES].repeat(LANES)])
    x = x[: len(x) // LANES * LANES]
    return x, call(name, isa, x)


def one_at_a_time(name, isa, x):
    """(points, values) of the template's scalar instance, on some of the points."""
    x = torch.cat([x[:: 1 + len(x) // 4000], x[:LANES], x[-LANES:]])
    return x, torch.cat([call(name, isa, one) for one in x.split(1)])


def ulps(actual, exact):
    """Distance in units of the last place that a float32 next to `exact` has; 0 for the same infinity."""
    exponent = torch.where(exact == 0, -125, torch.frexp(exact)[1].clamp(min=-125))
    distance = torch.where(actual == exact, 0, (actual.double() - exact).abs())
    return distance / torch.ldexp(torch.ones_like(exact), exponent - 24)


@pytest.fixture(scope="module")
def points():
    return every_exponent()


@pytest.mark.parametrize("instance", [in_vectors, one_at_a_time])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_in_ulp(isa, name, instance, points):
    function, low, high, _ = FUNCTIONS[name]
    chosen = torch.cat([points[(points >= low) & (points <= high)], evenly(low, high)])
    x, actual = instance(f"{name}_each", isa, chosen)
    error = ulps(actual, function(x.double()))
    worst = error.nan_to_num(nan=INF).argmax()
    assert error[worst] <= stated_bounds()[name], f"{error[worst]:.3f} ulp at {x[worst].item()!r}"


@pytest.mark.parametrize("instance", [in_vectors, one_at_a_time])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_beyond_the_range_and_nan(isa, name, instance, points):
    """0, 1 or infinity exactly where the function has become that; a NaN stays a NaN whatever its other bits are."""
    for low, high, value in FUNCTIONS[name][3]:
        x, actual = instance(f"{name}_each", isa, points[(points >= low) & (points <= high)])
        assert (actual == value).all(), f"{actual[actual != value][0]} at {x[actual != value][0]}"
    if name == "log_unit_f32":
        return  # it takes normal numbers only
    x, actual = instance(f"{name}_each", isa, points[points.isnan()])
    assert actual.isnan().all(), f"NaN with bits {x[~actual.isnan()].view(torch.int32)[0]:#x} becomes a number"


HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("name", HALVES)
def test_widening_every_half(isa, name):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    actual = call(f"f32_from_{name}_each", isa, every)
    expected = every.view(HALVES[name]).float()
    nan = expected.isnan()
    assert torch.equal(actual[~nan].view(torch.int32), expected[~nan].view(torch.int32))
    assert actual[nan].isnan().all()


@pytest.mark.parametrize("name", HALVES)
def test_narrowing_rounds_to_even(isa, name, points):
    """Every half, every midpoint between two of them and the floats beside it, and every float32 exponent."""
    dtype = HALVES[name]
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).double()
    every = every[every.isfinite()].sort().values
    middle = ((every[1:] + every[:-1]) / 2).float()
    assert torch.equal(middle.double(), (every[1:] + every[:-1]) / 2)
    beside = [torch.nextafter(middle, torch.tensor(end)) for end in (-INF, INF)]
    x, _ = in_vectors("exp_f32_each", isa, torch.cat([points, every.float(), middle, *beside]))
    actual = call(f"{name}_from_f32_each", isa, x, torch.int16).view(dtype)
    expected = x.to(dtype)
    nan = x.isnan()
    assert torch.equal(actual[~nan].view(torch.int16), expected[~nan].view(torch.int16))
    assert actual[nan].isnan().all()
