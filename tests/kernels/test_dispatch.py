"""Choosing a backend: automatic by rule, explicit without fallback, unknown names refused."""

import importlib
import pathlib

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import _native, dispatch
from rlhf_kernels._presence import missing

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
