"""Choosing a backend: automatic by rule, explicit without fallback, unknown names refused."""

import asyncio
import contextlib
import importlib
import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import _choice, _native, dispatch
from rlhf_kernels._presence import missing
from tests.kernels.calls import ON_BACKENDS, build, results

NO_CPU = pytest.mark.skipif(_native.missing() is not None, reason=f"no native CPU backend: {_native.missing()}")
FP32, FP64 = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)


@pytest.fixture(autouse=True)
def no_gpu_backends_on_cpu_tensors(monkeypatch):
    """The choice as a user without a GPU has it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(_native.CUDA_ON_CPU, raising=False)


@pytest.fixture
def without_cpu(monkeypatch):
    """As if the extension had not been built."""
    monkeypatch.setattr(_native, "_load", lambda: (None, "the C++ build failed when the package was installed: no c++"))


def name_of(module):
    return module.__name__.removeprefix("rlhf_kernels.")


def test_every_table_row_names_a_module_that_exists():
    for op, rows in dispatch.TABLE.items():
        assert rows[-1][0] == "reference"
        for name, _ in rows:
            if missing(name) is None:
                importlib.import_module(f"rlhf_kernels.{name}.{op}")


@NO_CPU
def test_automatic_choice_follows_device_and_dtype():
    assert name_of(dispatch.pick("advantages", FP32)) == "cpu.advantages"
    assert name_of(dispatch.pick("advantages", FP64)) == "reference.advantages"
    assert name_of(dispatch.pick("advantages", FP32.to("meta"))) == "reference.advantages"
    assert name_of(dispatch.pick("ppo", FP64)) == "reference.ppo"


def test_automatic_choice_without_the_extension(without_cpu):
    assert name_of(dispatch.pick("advantages", FP32)) == "reference.advantages"
    assert rlhf_kernels.gae(FP32, FP32)[0].shape == (2, 3)


def test_explicit_choice_raises_with_the_reason_instead_of_falling_back(without_cpu, monkeypatch):
    with rlhf_kernels.backend("cpu"), pytest.raises(RuntimeError, match=r"cannot serve advantages.*no c\+\+"):
        rlhf_kernels.gae(FP32, FP32)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="RLHF_KERNELS_BACKEND=cpu was asked for"):
        rlhf_kernels.gae(FP32, FP32)


@NO_CPU
def test_explicit_choice_raises_where_the_backend_does_not_apply():
    with rlhf_kernels.backend("cpu"), pytest.raises(RuntimeError, match=r"does not take a torch.float64 tensor on cpu"):
        rlhf_kernels.gae(FP64, FP64)
    without = next(op for op, rows in dispatch.TABLE.items() if "cpu" not in [row[0] for row in rows])
    with rlhf_kernels.backend("cpu"), pytest.raises(RuntimeError, match="no such backend; it has: reference"):
        dispatch.pick(without, FP32)


def test_unknown_names_are_refused_with_the_known_ones(monkeypatch):
    known = ", ".join(dispatch.BACKENDS)
    with pytest.raises(ValueError, match=f"unknown backend 'turbo'; known backends: {known}"):
        rlhf_kernels.backend("turbo").__enter__()
    with pytest.raises(ValueError, match="unknown op 'gae'; known ops: logprobs"):
        dispatch.pick("gae", FP32)
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "turbo")
    with pytest.raises(ValueError, match="RLHF_KERNELS_BACKEND names the unknown backend 'turbo'"):
        rlhf_kernels.gae(FP32, FP32)


def test_context_wins_over_environment_and_nests(monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "cpu")
    with rlhf_kernels.backend("reference"):
        assert name_of(dispatch.pick("advantages", FP64)) == "reference.advantages"
        with pytest.raises(ZeroDivisionError), rlhf_kernels.backend("cpu"):
            _ = 1 / 0
        assert name_of(dispatch.pick("advantages", FP64)) == "reference.advantages"
    with pytest.raises(RuntimeError):
        dispatch.pick("advantages", FP64)


def test_backends_says_what_is_there_and_why_not(without_cpu):
    table = rlhf_kernels.backends()
    assert list(table) == list(dispatch.TABLE)
    assert table["advantages"]["reference"] == "available"
    assert table["advantages"]["cpu"] == "missing: the C++ build failed when the package was installed: no c++"
    assert "advantages     cpu        missing: the C++" in str(table)


def test_missing_shows_the_note_of_the_build(monkeypatch, tmp_path):
    monkeypatch.setitem(importlib.import_module("sys").modules, "rlhf_kernels._cpu", None)
    monkeypatch.delattr(rlhf_kernels, "_cpu", raising=False)
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    assert "cannot be imported" in _native._load.__wrapped__()[1]
    pathlib.Path(tmp_path / "_cpu_build_error.txt").write_text("no compiler\n")
    assert _native._load.__wrapped__() == (None, "no compiler")


@NO_CPU
def test_instruction_set_is_forced_or_refused(monkeypatch):
    known = _native.isas()
    assert known[0] == "base"
    for isa in known:
        monkeypatch.setenv("RLHF_KERNELS_CPU_ISA", isa)
        rlhf_kernels.gae(FP32, FP32)
    monkeypatch.setenv("RLHF_KERNELS_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match=f"RLHF_KERNELS_CPU_ISA=avx1024: this machine runs only {', '.join(known)}"):
        rlhf_kernels.gae(FP32, FP32)


@NO_CPU
def test_the_extension_refuses_what_the_cpu_does_not_have():
    from rlhf_kernels import _cpu

    with pytest.raises(ValueError, match="cannot run the instruction set sse9"):
        _cpu.functions("sse9")
    with pytest.raises(TypeError, match="gae_fwd_f32 takes 15 arguments, got 2"):
        _cpu.functions("base")["gae_fwd_f32"](1, 2)


@pytest.fixture
def picked(monkeypatch):
    """The modules that served, in order."""
    found, pick = [], dispatch.pick

    def record(op, tensor):
        found.append(name_of(pick(op, tensor)))
        return pick(op, tensor)

    monkeypatch.setattr(dispatch, "pick", record)
    return found


def in_thread(function):
    """What the function returns in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def served():
    return name_of(dispatch.pick("advantages", FP32))


@NO_CPU
def test_blocks_of_two_threads_overlap():
    entered, overlapping, left = threading.Event(), threading.Event(), threading.Event()

    def first():
        with rlhf_kernels.backend("reference"):
            entered.set()
            assert overlapping.wait(60)
            own = served()
        left.set()
        return own, served()

    def second():
        assert entered.wait(60)
        with rlhf_kernels.backend("cpu"):
            overlapping.set()
            assert left.wait(60)
            return served()

    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(first), pool.submit(second)]
        own, outside = threads[0].result()
        assert own == "reference.advantages"
        assert outside == threads[1].result() == "cpu.advantages"
    assert dispatch.chosen() is None and not _choice._open


@NO_CPU
def test_a_thread_in_no_block_has_the_latest_of_all():
    with rlhf_kernels.backend("reference"):
        assert in_thread(served) == "reference.advantages"
        with rlhf_kernels.backend("cpu"):
            assert in_thread(served) == "cpu.advantages"
        assert in_thread(served) == "reference.advantages"
    with pytest.raises(ZeroDivisionError), rlhf_kernels.backend("reference"):
        _ = 1 / 0
    assert in_thread(served) == "cpu.advantages"


@NO_CPU
def test_blocks_of_two_tasks_overlap():
    async def block(name, mine, others):
        with rlhf_kernels.backend(name):
            mine.set()
            await others.wait()
            return served()

    async def both():
        one, two = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(block("reference", one, two), block("cpu", two, one))

    assert asyncio.run(both()) == ["reference.advantages", "cpu.advantages"]
    assert dispatch.chosen() is None


@NO_CPU
@pytest.mark.parametrize("forward", ("reference", "cpu", None))
@pytest.mark.parametrize("backward", ("reference", "cpu", None))
def test_a_backward_takes_the_backend_of_its_forward(forward, backward, picked):
    def chosen(name):
        return rlhf_kernels.backend(name) if name else contextlib.nullcontext()

    logits, labels = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 2])
    with chosen(forward):
        loss = rlhf_kernels.logprobs_from_logits(logits, labels).sum()
    with chosen(backward):
        loss.backward(retain_graph=True)
        in_thread(loss.backward)
        assert dispatch.chosen() == backward
    assert picked == [f"{forward or 'cpu'}.logprobs"] * 3


@NO_CPU
def test_threads_with_backends_of_their_own_disturb_no_result():
    calls = [(name, backend) for name, backend in ON_BACKENDS if backend in ("cpu", "reference")]

    def run(call):
        name, backend = call
        with rlhf_kernels.backend(backend):
            return results(build()[name])

    alone = [run(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(run, calls * 2), alone * 2, strict=True):
            for x, y in zip(found, expected, strict=True):
                assert (x is None and y is None) or torch.equal(x.nan_to_num(0.125), y.nan_to_num(0.125))
