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
from benchmarks import compile_triton, machine_code

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


DISASSEMBLY = """
\t.headerflags\t@"EF_CUDA_SM90"
.text.example_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/              @!P1 BRA `(.L_x_2) ;
        /*0050*/                   SHFL.BFLY PT, R3, R3, 0x1, 0x1f ;
        /*0060*/                   MUFU.EX2 R3, R3 ;
.L_x_2:
        /*0070*/                   FADD R3, R3, R4 ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
        /*0090*/                   STG.E.U16 desc[UR4][R2.64], R3 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
"""


def test_machine_code_is_counted():
    """A turn leaves out what it may skip, the whole kernel takes it; padding behind the end is no part of it."""
    (kernel,) = machine_code.parse(DISASSEMBLY)
    (turn,) = kernel.loops()
    assert kernel.name == "example_kernel"
    assert (turn.instructions, turn.count("BAR"), turn.count("SHFL"), turn.loads) == (5, 1, 0, [16])
    once = kernel.once()
    assert (once.instructions, once.count("SHFL"), once.loads, once.stores) == (11, 1, [16], [2])


def at(kernel, target="sm_90", **constants):
    """The counts of the first launch of a kernel with these constants."""
    for launch in compile_triton.launches(kernel.partition(".")[0]):
        if launch.name == kernel and constants.items() <= dict(launch.constants).items():
            return compile_triton.counts(launch, target)
    raise AssertionError(f"{kernel} is not launched with {constants}")


# kernel, constants of its specialisation: most instructions an entry, most barriers a turn, bits of the widest load
BOUNDS = (
    ("logprobs.statistics_kernel", {"WITH_ENTROPY": True, "SCALED": False}, 14.2, 2, 128),
    ("kl.statistics_kernel", {}, 32.2, 4, 128),
)


def test_instructions_an_entry_barriers_and_loads():
    """By count on sm_90, of bf16 logits: what a change of the kernels would cost on a GPU shows without one."""
    program = """
import json, sys
from tests.kernels import test_triton as t
found = [t.at(kernel, **constants) for kernel, constants, *_ in t.BOUNDS]
json.dump([(x.per_entry, x.barriers, x.widest_load, x.spilled) for x in found], sys.stdout)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for (kernel, constants, most, barriers, load), found in zip(BOUNDS, json.loads(done.stdout), strict=True):
        assert found[0] <= most and found[1] <= barriers and found[2] >= load and found[3] == 0, (
            kernel, constants, found
        )  # fmt: skip


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
