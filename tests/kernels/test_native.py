"""The native module itself: threads, fork, DataLoader workers, the GIL, one OpenMP runtime, memory that it gets."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from rlhf_kernels import _native

SANITIZE = "RLHF_KERNELS_SANITIZE" in os.environ  # set by make sanitize, which then must find its own module
pytestmark = pytest.mark.skipif(
    _native.missing() is not None and not SANITIZE, reason=f"no native CPU backend: {_native.missing()}"
)
NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
NEEDS_MAPS = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc/self/maps")

# Comparing bytes, not tensors: PyTorch's own threads do not survive fork(), so a child keeps away from its large ops.
GAE = """
import os, sys
import torch
from rlhf_kernels import _native, gae

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
rewards, values = torch.randn(2, 96, 2048, generator=generator)

def bits():
    advantages, returns = gae(rewards, values, lam=0.9)
    return advantages.numpy().tobytes() + returns.numpy().tobytes()
"""


def run_script(text, timeout=60, **environment):
    """What a fresh Python prints; fails if it does not end in time."""
    script = textwrap.dedent(GAE) + textwrap.dedent(text)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@NEEDS_FORK
def test_fork_runs_serially_and_gives_the_same_bits():
    """fork() copies one thread; a child that waited for the parent's OpenMP threads would wait for ever."""
    script = """
    before = bits()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        same = bits() == before
        if grandchild == 0:
            os._exit(0 if same else 1)
        os._exit(0 if same and os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0 else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), bits() == before)
    """
    assert run_script(script, OMP_NUM_THREADS="2") == "0 True"


@NEEDS_FORK
def test_multiprocessing_fork():
    script = """
    import multiprocessing
    before = bits()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print([pool.apply_async(bits).get(30) == before for _ in range(3)], bits() == before)
    """
    assert run_script(script, OMP_NUM_THREADS="2") == "[True, True, True] True"


@NEEDS_FORK
def test_dataloader_workers():
    script = """
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rewards)

        def __getitem__(self, index):
            return gae(rewards[index : index + 1], values[index : index + 1], lam=0.9)[0]

    here = gae(rewards, values, lam=0.9)[0]
    loader = torch.utils.data.DataLoader(
        Rows(), batch_size=8, num_workers=2, multiprocessing_context="fork", timeout=30
    )
    print(torch.equal(torch.cat([batch.flatten(0, 1) for batch in loader]), here))
    """
    assert run_script(script, OMP_NUM_THREADS="2") == "True"


def long_call(isa, finished):
    """One native call of a good fraction of a second: all pairs of 12000 responses to one prompt."""
    count = 12000
    scores = torch.linspace(-3, 3, count)
    ranks, cu_groups = torch.arange(count), torch.tensor([0, count])
    loss, grad, stats = torch.empty(1), torch.empty(count), torch.empty(8)
    tensors = scores, ranks, cu_groups, loss, grad, stats
    addresses = [tensor.data_ptr() for tensor in tensors]
    function = _native._load()[0].functions(isa)["bradley_terry_fwd_f32"]
    finished.append(time.monotonic())
    function(*addresses[:3], 1, 0, 0, 0, *addresses[3:], 1)
    finished.append(time.monotonic())


def test_the_gil_is_released(isa):
    """While a native call runs in one Python thread, another one keeps going."""
    times = []
    worker = threading.Thread(target=long_call, args=(isa, times))
    worker.start()
    ticks = []
    while worker.is_alive():
        ticks.append(time.monotonic())
        time.sleep(0.001)
    worker.join()
    begin, end = times
    assert sum(begin < tick < end for tick in ticks) >= 10, f"{len(ticks)} ticks in {end - begin:.3f} s"


def test_calls_from_several_python_threads(isa):
    """Each Python thread is a master of its own; the kernels hold no state that they could share."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 64, 700, generator=generator)
    functions = _native._load()[0].functions(isa)

    def call(out):
        arguments = [rewards.data_ptr(), 700, values.data_ptr(), 700, 0, 0, 0, 0, 64, 700, 1.0, 0.9]
        functions["gae_fwd_f32"](*arguments, out[0].data_ptr(), out[1].data_ptr(), 2)

    results = [torch.full((2, 64, 700), float("nan")) for _ in range(8)]
    threads = [threading.Thread(target=call, args=(out,)) for out in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not results[0].isnan().any()
    assert all(torch.equal(out, results[0]) for out in results)


@NEEDS_MAPS
def test_one_openmp_runtime():
    """A second runtime would keep its own spinning threads beside PyTorch's and oversubscribe the cores."""
    script = """
    import re
    bits()
    libraries = {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"/lib[^/]*omp[^/]*[.]so", line)}
    print(_native._load()[0].threaded, sorted(map(os.path.realpath, libraries)))
    """
    threaded, _, libraries = run_script(script).partition(" ")
    assert threaded == "True"
    assert libraries.count(".so") == 1, libraries


@pytest.mark.skipif(not SANITIZE, reason="for make sanitize")
def test_the_module_under_test_is_the_sanitized_one():
    assert _native._load()[0].sanitized


POOLED = not SANITIZE and hasattr(_native._load()[0], "Buffer")


@pytest.mark.skipif(not POOLED, reason="results are pooled on Linux only, and never under a sanitizer")
def test_a_large_result_reuses_memory_only_after_its_last_view_is_gone():
    script = """
    kept = _native._load()[0].kept
    first = _native.fresh(2048, 1024)
    address, view = first.data_ptr(), first[1:].view(-1)
    view.fill_(7.0)
    del first
    second = _native.fresh(2048, 1024)
    second.fill_(8.0)
    print(kept(), second.data_ptr() != address, bool((view == 7.0).all()))
    del view
    print(kept() >> 20)
    third = _native.fresh(1024, 2000)
    print(kept(), third.data_ptr() == address)
    del second, third
    print(kept() >> 20, _native.fresh(1024, 1024).data_ptr() == address)
    _native.empty_pool()
    print(kept())
    _native.fresh(2048, 1024)
    print(kept() >> 20)
    """
    assert run_script(script).split("\n") == ["0 True True", "8", "0 True", "16 False", "0", "8"]


@pytest.mark.skipif(not POOLED, reason="results are pooled on Linux only, and never under a sanitizer")
@pytest.mark.parametrize("limit, kept", [("0", 0), ("10", 8), ("100", 64)])
def test_the_pool_keeps_no_more_than_its_limit(limit, kept):
    script = """
    results = [_native.fresh(2048, 1024) for _ in range(8)]
    for i, result in enumerate(results):
        result.fill_(float(i))
    del result, results
    print(_native._load()[0].kept() >> 20)
    """
    assert run_script(script, RLHF_KERNELS_CPU_POOL_MB=limit) == str(kept)


def test_a_pool_limit_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv(_native.POOL, "-1")
    _native._pool.cache_clear()
    with pytest.raises(ValueError, match=f"{_native.POOL}=-1: expected a whole number of MiB"):
        _native._pool()
    _native._pool.cache_clear()


def test_fresh_is_poisoned_in_tests_and_has_the_dtype_asked_for():
    for dtype in _native.DTYPES:
        out = _native.fresh(3, 5, dtype=dtype)
        assert out.dtype == dtype and out.shape == (3, 5) and out.isnan().all()


def test_arguments_are_counted_and_converted():
    function = _native._load()[0].functions("base")["whiten_fwd_f32"]
    with pytest.raises(TypeError, match="whiten_fwd_f32 takes 10 arguments, got 0"):
        function()
    with pytest.raises(RuntimeError, match=r"[Cc]ast"):
        function(*[0] * 9, "two")
    stats = torch.zeros(3, dtype=torch.float64)
    function(0, 0, 0, 0, 0, 0, stats.data_ptr(), True, 0, 1)
