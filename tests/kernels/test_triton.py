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


def at(op, kernel, **constants):
    """The counts of the first launch of an op's kernel with these constants."""
    for launch in compile_triton.launches(op):
        if launch.name == kernel and constants.items() <= dict(launch.constants).items():
            return compile_triton.counts(launch, "sm_90")
    raise AssertionError(f"{kernel} is not launched with {constants}")


# op, kernel, constants of its specialisation: most instructions an entry, most barriers a turn, bits of the widest load
LABELLED, ALONE = {"HAS_LABELS": True, "SCALED": False, "UNIT": 8}, {"MODE": 1, "values": None, "entropy": None}
WITH_VALUES = {"MODE": 0, "counts": None, "entropy": None}
BOUNDS = (
    ("logprobs", "logprobs.statistics_kernel", {"WITH_ENTROPY": True, "SCALED": False, "UNIT": 8}, 10.6, 0, 128),
    ("logprobs", "logprobs.statistics_kernel", {"WITH_ENTROPY": False, "UNIT": 8}, 8.4, 0, 128),
    ("logprobs", "logprobs.statistics_kernel", {"UNIT": 1}, 12.5, 8, 16),  # through shared memory to a lane's thread
    ("logprobs", "logprobs.gradient_kernel", LABELLED, 19.5, 0, 128),  # all of it, in the label's block
    ("kl", "kl.statistics_kernel", {"UNIT": 8}, 24.0, 0, 128),  # a pair
    ("kl", "kl.gradient_kernel", {"NEED_B": False, "SCALED": False, "UNIT": 8}, 24.0, 0, 128),
    ("linear", "linear.gradient_kernel", {"SCALED": False, "UNIT": 8}, 18.6, 0, 128),
    ("ppo", "policy.loss_kernel", ALONE, 61.0, 0, 128),  # a token
    ("ppo", "policy.loss_kernel", WITH_VALUES, 110.0, 0, 128),
    ("ppo", "policy.product_kernel", {"grad_policy_loss": None}, 14.0, 0, 128),
)


def test_instructions_an_entry_barriers_and_loads():
    """By count on sm_90, of bf16 logits: what a change of the kernels would cost on a GPU shows without one."""
    program = """
import json, sys
from tests.kernels import test_triton as t
found = [t.at(op, kernel, **constants) for op, kernel, constants, *_ in t.BOUNDS]
json.dump([(x.per_entry, x.barriers, x.widest_load, x.spilled) for x in found], sys.stdout)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for (_, kernel, constants, most, barriers, load), found in zip(BOUNDS, json.loads(done.stdout), strict=True):
        assert found[0] <= most and found[1] <= barriers and found[2] >= load and found[3] == 0, (
            kernel, constants, found
        )  # fmt: skip


def batches(count):
    """op -> calls of its Triton functions with so many rows, sequences or prompts."""
    c = compile_triton
    new, i64, rows = c.new, c.I64, c.new(count)
    logits, labels, mask = new(count, 1024, dtype=c.BF16), new(count, dtype=i64), new(count, dtype=c.BOOL)
    hidden, weight, number = new(count, 64, dtype=c.BF16), new(1024, 64, dtype=c.BF16), new(1)[0]
    tokens, kept, packed = new(count, 4096), new(count, 4096, dtype=c.BOOL), new(count + 1, dtype=i64)
    responses, ranks = new(count * 9), new(count * 9, dtype=i64)
    cases = c.Tensors(kept, tokens, tokens, tokens, ref_log_probs=tokens, values=tokens, old_values=tokens,
                      returns=tokens, entropy=tokens)  # fmt: skip

    def logprobs(op):
        op.logprobs_fwd(logits, labels, None, 1.0, None, -100, True)
        op.logprobs_bwd(rows, rows, logits, labels, None, *(rows,) * 4, 1.0, None, -100)
        op.token_statistics_fwd(logits, labels, None, 1.0, None, -100)

    def kl(op):
        op.kl_fwd(logits, logits, 1.0, True)
        op.kl_bwd(rows, logits, logits, *(rows,) * 5, 1.0, True, True, True)
        for estimator in ("k1", "k3"):
            op.approx_kl_fwd(tokens, tokens, estimator)
            op.approx_kl_bwd(tokens, tokens, tokens, estimator, True, True)

    def cross_entropy(op):
        op.cross_entropy_fwd(logits, labels, None, 1.0, None, -100, 0.1, 0.0, False)
        op.cross_entropy_bwd(rows, logits, labels, None, *(rows,) * 4, 1.0, None, -100, 0.1, 0.0, False)

    def linear(op):
        head, rest = (hidden, weight, labels, *(None,) * 5), (1.0, None, -100)
        group, needs = (0, False, None, 0), (True, True, False)
        op.linear_logprobs_fwd(*head, *rest, True, False, *group)
        op.linear_logprobs_bwd(rows, rows, *head, *(rows,) * 4, *rest, *group, needs)
        op.linear_token_statistics_fwd(*head, *rest, *group)
        op.linear_ppo_fwd(*head, rows, rows, mask, None, *rest[:2], 0.2, 0.2, None, 0.1, "token-mean", *group, needs)

    def advantages(op):
        op.gae_fwd(tokens[:, :200], tokens[:, :200], kept[:, :200], 1.0, 0.95, None, rows)
        op.gae_fwd(tokens, tokens, kept, 1.0, 0.95, None, rows)
        op.gae_fwd(new(count * 4096), new(count * 4096), None, 1.0, 0.95, packed, None)
        shaping = (rows, tokens, tokens, tokens, kept, 0.1, 1.0, 0.95, "k3", None, True, None)
        op.rlhf_advantages_fwd(*shaping)
        op.whiten_fwd(tokens, kept, op.whiten_stats_fwd(tokens, kept), False)

    def ppo(op):
        op.ppo_fwd(
            tokens, tokens, tokens, kept, tokens, tokens, tokens, tokens, None, 0.2, 0.2, None, 0.2, "token-mean"
        )
        op.ppo_bwd(number, None, None, tokens, tokens, tokens, 0.1)

    def policy(op):
        for mode in range(len(c.AGG_MODES)):
            op.policy_fwd(cases, c.Settings(loss_agg_mode=mode, entropy_agg_mode=mode))
        op.policy_bwd(number, None, None, tokens, tokens, tokens, 0.1)

    def bradley_terry(op):
        op.bradley_terry_fwd(responses, ranks, packed, None, True)
        op.bradley_terry_fwd(responses, ranks, packed, rows, True)
        op.plackett_luce_fwd(responses, ranks, packed)
        op.bradley_terry_bwd(rows, responses, packed)
        op.ranking_metrics_fwd(new(count, 8))
        for kind in c.KINDS:
            op.ranking_fwd(responses, ranks, None, 9, count, None, kind, 0.0, None)
        op.ranking_bwd(number, responses, number)

    def preference(op):
        pairs = (rows, rows, rows, rows, labels, labels)
        op.preference_fwd(*pairs, None, "sigmoid", 0.1, 0.1, 0.5, "reverse_kl", 1.0)
        op.preference_fwd(*pairs, number, "kto", 0.1, 0.1, 0.5, "reverse_kl", 1.0)
        op.preference_bwd(rows, rows, rows)

    return {name: call for name, call in locals().items() if name in c.CALLS}


def launched(op, count):
    compile_triton.CALLS[op] = batches(count)[op]
    return set(compile_triton.launches(op))


def test_batches_of_any_size_share_a_kernel():
    """A count that is 1 or a multiple of 16 compiles nothing anew: it would in the middle of a training."""
    program = """
from tests.kernels import test_triton as t
for op in t.OPS:
    first = t.launched(op, 33)
    for count in (48, 16, 1):
        more = t.launched(op, count)
        assert more <= first, (op, count, more - first, [x for x in first if x.name in {y.name for y in more - first}])
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


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


@INTERPRETED
@pytest.mark.parametrize("offsets", ([0, 5, 12, 5000], [0, 5, 12, -3], [0, 5, 12, 7], [-9, 5, 12, 20]))
@pytest.mark.parametrize("length", (20, 900))
def test_offsets_that_leave_the_tokens_make_a_row_nan(offsets, length):
    """On a GPU nobody reads them before the kernel: it stays within the tokens, and the other rows are right."""
    from rlhf_kernels.triton import advantages

    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(length, generator=generator) for _ in range(2))
    good = [0, *offsets[1:3], length]
    offsets = [length if x == 20 else x for x in offsets]
    found = advantages.gae_fwd(rewards, values, None, 0.99, 0.95, torch.tensor(offsets), None)
    for row in range(3):
        begin, end = good[row : row + 2]
        if offsets[row : row + 2] == [begin, end]:
            expected = advantages.gae_fwd(
                rewards[None, begin:end], values[None, begin:end], None, 0.99, 0.95, None, None
            )
            torch.testing.assert_close([x[begin:end] for x in found], [x[0] for x in expected])
        elif offsets[row] >= 0 and offsets[row + 1] > begin:  # tokens that are within the bad row
            assert all(x[begin : min(end, offsets[row + 1])].isnan().all() for x in found)


@INTERPRETED
@pytest.mark.parametrize("name", ("bradley_terry", "plackett_luce"))
@pytest.mark.parametrize("count", (9, 60))
@pytest.mark.parametrize("last", (500, -3, 4))
def test_offsets_that_leave_the_responses_make_a_prompt_nan(name, count, last):
    from rlhf_kernels.triton import bradley_terry

    scores, ranks = torch.linspace(-1.0, 1.0, count), torch.arange(count)
    more = (None, False) if name == "bradley_terry" else ()
    function = getattr(bradley_terry, f"{name}_fwd")
    loss, grad, _ = function(scores, ranks, torch.tensor([0, 5, last]), *more)
    right, right_grad, _ = function(scores[:5], ranks[:5], torch.tensor([0, 5]), *more)
    torch.testing.assert_close((loss[:1], grad[:5]), (right, right_grad))
    assert loss[1].isnan() and (last != 500 or grad[5:].isnan().all())
    product = bradley_terry.bradley_terry_bwd(torch.ones(2), torch.ones(count), torch.tensor([0, 5, last]))
    assert (product[:5] == 1).all()
