"""The Triton backend without a GPU: every kernel compiles for four targets without spills, and its helpers are exact.

The ops' own tests run its kernels in the interpreter.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_kernels import dispatch

pytest.importorskip("triton", reason="the package triton is not installed")
from benchmarks import compile_triton

ROOT = Path(__file__).resolve().parents[2]
OPS = [op for op, rows in dispatch.TABLE.items() if "triton" in [name for name, _ in rows]]
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is interpreted")


def test_every_op_is_compiled():
    assert set(compile_triton.CALLS) == set(OPS)


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.slow if op != "preference" else ()) for op in OPS])
def test_every_kernel_compiles_for_every_target_without_spills(op):
    """In a process of its own: here the kernels belong to the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_triton", op, "--json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert {row["target"] for row in rows} == set(compile_triton.TARGETS)
    module = __import__(f"rlhf_kernels.triton.{op}", fromlist=[op])
    kernels = {f"{op}.{name}" for name in vars(module) if name.endswith("_kernel")}
    assert kernels == {row["kernel"] for row in rows if row["kernel"].startswith(f"{op}.")}
    assert [row for row in rows if row["spilled"]] == []


def test_batches_of_any_size_share_a_kernel():
    """A count that is 1 or a multiple of 16 compiles nothing anew."""
    program = """
from benchmarks import compile_triton as c
tensors = lambda *shape: c.Tensors(c.new(*shape, dtype=c.BOOL), *[c.new(*shape) for _ in range(3)])
def of(*shape):
    c.CALLS["policy"] = lambda op: op.policy_fwd(tensors(*shape), c.Settings())
    return {launch.kernel.fn.__name__: launch for launch in c.launches("policy")}
assert of(33, 47) == of(1, 1) == of(64, 160) == of(3000, 8000), [of(33, 47), of(1, 1)]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=True, timeout=300)


def test_every_launch_is_one_dimensional():
    """Grids reach 2^31 - 1 on x and 65535 on y: one function launches, and it knows x alone."""
    for path in (ROOT / "rlhf_kernels" / "triton").glob("*.py"):
        if path.name != "_launch.py":
            assert "program_id(1)" not in path.read_text() and "_kernel[" not in path.read_text(), path.name


def log1m_exp(x):
    return torch.where(x > -0.7, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


@INTERPRETED
@pytest.mark.parametrize(
    ("name", "exact", "low", "high", "bound"),
    (
        ("exp_f32", torch.exp, -80.0, 0.0, 8e-6),
        ("expm1_f32", torch.expm1, -30.0, 0.0, 5e-7),
        ("log1p_f32", torch.log1p, 0.0, 1e6, 5e-7),
        ("log1m_exp_f32", log1m_exp, -80.0, -1e-30, 8e-6),
        ("tanh_f32", torch.tanh, -20.0, 20.0, 5e-7),
    ),
)
def test_helpers(name, exact, low, high, bound, monkeypatch):
    """Relative error against float64, over the range that kernels use and near 0."""
    import triton
    import triton.language as tl

    from rlhf_kernels.triton import _math

    @triton.jit
    def apply_kernel(x, out, BLOCK: tl.constexpr):
        lanes = tl.arange(0, BLOCK)
        tl.store(out + lanes, helper(tl.load(x + lanes)))  # noqa: F821

    for global_name, value in (("helper", getattr(_math, name)), ("tl", tl)):  # a kernel sees its module's names
        monkeypatch.setitem(globals(), global_name, value)

    wide = torch.linspace(low, high, 4096)
    near = torch.logspace(-30, 0, 4096) * (1.0 if high > 0 else -1.0)
    for x in (wide, near.clamp(low, high)):
        out = torch.empty_like(x)
        apply_kernel[(1,)](x, out, BLOCK=4096)
        expected = exact(x.double())
        assert ((out.double() - expected).abs() <= bound * expected.abs() + 1e-38).all()


def test_helpers_are_all_tested():
    from rlhf_kernels.triton import _math

    defined = {name for name in vars(_math) if name.endswith("_f32") and not name.startswith("_")}
    tested = {case[0] for case in test_helpers.pytestmark[0].args[1]}
    assert defined == tested, inspect.getfile(_math)
