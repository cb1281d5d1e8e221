"""Fixtures that every test file shares: backends, instruction sets, error bounds, poisoned memory, the data folder."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.on_gpu import OnGPU, round_as_a_gpu_does

# Without a GPU the GPU backends run on CPU tensors: Triton in its interpreter, which must be chosen before its import,
# CUDA C++ in a build whose blocks are fibers. The tables prefer the cpu backend, so nothing else changes.
GPU = torch.cuda.is_available()
if not GPU:
    from tests.cuda_on_cpu.build import build

    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        importlib.import_module("triton.language")  # now: a test that unsets the variable may be the first to need it
        round_as_a_gpu_does()
    if "RLHF_KERNELS_CUDA_ON_CPU" not in os.environ and (built := build()) is not None:
        os.environ["RLHF_KERNELS_CUDA_ON_CPU"] = str(built)

import rlhf_kernels  # noqa: E402
from rlhf_kernels import _checks, dispatch  # noqa: E402

ON_GPU = ("triton", "cuda")
ROOT = Path(__file__).resolve().parent.parent


def available_backends(op: str) -> list[str]:
    """The backends that can run `op` on this machine, in the table's order."""
    return [name for name, state in rlhf_kernels.backends()[op].items() if state == "available"]


def machine_isas() -> list[str]:
    """The instruction sets of the native CPU backend that this machine has, plainest first."""
    from rlhf_kernels import _native

    return [] if _native.missing() else _native.isas()


def _op_of(module) -> str:
    return getattr(module, "OP", module.__name__.rpartition(".")[2].removeprefix("test_"))


def _marks(backend: str, state: str) -> list:
    marks = [] if state == "available" else [pytest.mark.skip(reason=f"{backend} {state}")]
    return [*marks, pytest.mark.gpu] if GPU and backend in ON_GPU else marks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend_name` takes each backend of the op that the file is named after; `isa` each instruction set."""
    if "backend_name" in metafunc.fixturenames:
        states = rlhf_kernels.backends()[_op_of(metafunc.module)]
        values = [pytest.param(name, marks=_marks(name, state)) for name, state in states.items()]
        metafunc.parametrize("backend_name", values, indirect=True)
    if "isa" in metafunc.fixturenames:
        values = machine_isas() or [pytest.param("base", marks=pytest.mark.skip(reason="no native CPU backend"))]
        metafunc.parametrize("isa", values, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted Triton and CUDA on fibers are slow: of their half types the quick tests take bf16."""
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        slow = torch.float16 in values.values() or item.get_closest_marker("slow_interpreted")
        if slow and not GPU and values.get("backend_name") in ON_GPU:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def backend_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The test runs once per backend, inside `with rlhf_kernels.backend(name)`; on the GPU if that is its place."""
    if request.param in ON_GPU:
        monkeypatch.setattr(_checks, "READ_ON", "no device")  # as on a GPU: values are read with RLHF_KERNELS_CHECK=1
    if not GPU or request.param not in ON_GPU:
        with dispatch.backend(request.param):
            yield request.param
        return
    reference = importlib.import_module(f"rlhf_kernels.reference.{_op_of(request.module)}")
    on_device = functools.partial(reference.example_inputs, device="cuda")
    monkeypatch.setattr(reference, "example_inputs", on_device)
    with dispatch.backend(request.param), OnGPU():
        yield request.param


@pytest.fixture
def served(request: pytest.FixtureRequest, backend_name: str):
    """served(dtype) skips the test where the chosen backend says that it does not take this dtype."""
    op = _op_of(request.module)

    def check(dtype: torch.dtype) -> None:
        try:
            dispatch.pick(op, torch.zeros(1, dtype=dtype))
        except RuntimeError as error:
            pytest.skip(str(error))

    return check


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """The test runs once per instruction set, on the native CPU backend."""
    monkeypatch.setenv("RLHF_KERNELS_CPU_ISA", request.param)
    with dispatch.backend("cpu"):
        yield request.param


@pytest.fixture
def assert_close_to_fp64(request: pytest.FixtureRequest):
    """assert_close_to_fp64(actual, expected64, dtype, scale=1, gradient=False).

    Bound of an element: 16 * scale * (eps(fp32) * (1 + |expected|) + eps(dtype) * |expected| if dtype is a half type).
    The first part pays for sums in fp32, the second for the rounding of a result (or gradient) to the input dtype.
    Infinities must agree exactly and NaN is never accepted.

    Triton's `linear` rounds each entry of d/dlogits to a half type once, before its products: where they cancel, an
    entry of a gradient is off by more than its own rounding, but the gradient by at most one unit in the last place. So
    a `gradient` in a half type is bound by norm there: 16 * scale * eps(fp32) * sqrt(n) + eps(dtype) * norm(expected).
    """
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    rounds = "linear" in request.module.__name__ and parameters.get("backend_name") == "triton"

    def check(
        actual: torch.Tensor, expected64: torch.Tensor, dtype: torch.dtype, scale: float = 1.0, gradient: bool = False
    ) -> None:
        assert actual.shape == expected64.shape, f"shape {tuple(actual.shape)} != {tuple(expected64.shape)}"
        assert expected64.dtype == torch.float64, f"the expected value must be float64, got {expected64.dtype}"
        actual = actual.detach().double().cpu()
        expected = expected64.detach().cpu()
        assert not torch.isnan(actual).any(), f"NaN in the result: {actual}"
        finite = torch.isfinite(expected)
        assert torch.equal(actual[~finite], expected[~finite]), "infinities differ"
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        if gradient and rounds and dtype in (torch.bfloat16, torch.float16):
            bound = 16 * scale * eps * expected.numel() ** 0.5 + torch.finfo(dtype).eps * expected.norm()
            error = (actual - expected).norm()
            assert error <= bound, f"the error's norm is {error:.3g}, {error / bound:.2f} times the bound"
            return
        size = expected[finite].abs()
        bound = eps * (1 + size)
        if dtype in (torch.bfloat16, torch.float16):
            bound = bound + torch.finfo(dtype).eps * size
        error = (actual[finite] - expected[finite]).abs()
        over = error > 16 * scale * bound
        assert not over.any(), (
            f"{int(over.sum())} of {error.numel()} elements are off; worst error {error.max():.3g}, "
            f"{(error / (16 * scale * bound)).max():.2f} times the bound"
        )

    return check


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch):
    """Every torch.empty starts as NaN (or a large integer), so that reading what was never written shows."""

    def poison(out: torch.Tensor) -> torch.Tensor:
        if type(out) is torch.Tensor and out.device.type != "meta" and not torch.compiler.is_compiling():
            if out.is_floating_point():
                out.detach().fill_(float("nan"))
            elif out.dtype in (torch.int32, torch.int64):
                out.fill_(torch.iinfo(out.dtype).max // 2)
        return out

    plain_empty, plain_empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_empty_like(*a, **k)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data (rankings, demonstrations, a tiny model): RLHF_SHARED_DATA or ../shared/data."""
    path = Path(os.environ.get("RLHF_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"needs the shared data folder, which is not at {path}; set RLHF_SHARED_DATA")
    return path


@pytest.fixture(scope="module")
def ppo_files(tmp_path_factory) -> Path:
    """A folder with tiny policies, reward models, prompts and texts for PPO."""
    from tests.tiny_ppo import write_files

    return write_files(tmp_path_factory.mktemp("ppo"))


@pytest.fixture
def home(ppo_files: Path, tmp_path: Path):
    """A `tests.tiny_ppo.Home`: the test's own folder, with links to those models and data."""
    from tests.tiny_ppo import own_home

    return own_home(ppo_files, tmp_path)


@pytest.fixture
def gloo_ranks(tmp_path: Path):
    """gloo_ranks(script, count, *arguments) runs `script RANK *arguments RENDEZVOUS_FILE` on `count` ranks."""

    def run(script: str, count: int, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "tests" / script)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        ranks = [
            subprocess.Popen([*command, str(rank), *arguments, str(tmp_path / "rendezvous")], **pipes)
            for rank in range(count)
        ]
        try:
            for rank in ranks:
                output, _ = rank.communicate(timeout=900)
                assert rank.returncode == 0, output
        finally:
            for rank in ranks:
                rank.kill()

    return run


@pytest.fixture(scope="session")
def _cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(_cache_directory: Path, monkeypatch: pytest.MonkeyPatch):
    """What the tests keep does not go into the cache directory of whoever runs them."""
    monkeypatch.setenv("RLHF_CACHE", str(_cache_directory))


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Two processes read and encode whatever there is, in small pieces, into a cache of the test's own."""
    from rlhf.data import encoders, large, streams

    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(large, "BYTES", 1)
    monkeypatch.setattr(large, "TOGETHER", 2)
    monkeypatch.setattr(encoders, "LARGE", 1)
    monkeypatch.setattr(encoders, "SPAN", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(streams, "BLOCK", 200)
    monkeypatch.setattr("rlhf.data.readers.CHUNK_ROWS", 3)


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch):
    """A backend chosen in the caller's shell does not leak into the tests. RLHF_KERNELS_CPU_ISA does: with it the suite
    runs as on a processor that has no more."""
    monkeypatch.delenv("RLHF_KERNELS_BACKEND", raising=False)
