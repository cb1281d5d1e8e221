"""How long a call takes on a GPU: by events, or as part of a CUDA graph; and what the GPU can do at best.

What is measured is the device, not Python: while the device spins or works on what was enqueued before, the host
enqueues the call between two events, so that no wait for the host lies between them.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import torch
from torch import cuda

CYCLES = 2e9  # of the device's clock in a second, at most: a slower one spins for longer
LONGEST = 0.05  # seconds that the device spins at most
LEAST, MOST = 7, 200  # calls that are timed
REPLAYS = 50


def enqueued_in(call: Callable) -> float:
    """Seconds that the host takes for a call, whose kernels may still run then."""
    cuda.synchronize()
    begin = time.perf_counter()
    call()
    taken = time.perf_counter() - begin
    cuda.synchronize()
    return taken


def behind_a_spin(call: Callable, spin: float) -> float:
    """ms on the device of a call that is enqueued while the device spins for so many seconds."""
    start, stop = (cuda.Event(enable_timing=True) for _ in range(2))
    cuda._sleep(int(min(spin, LONGEST) * CYCLES))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def timed(call: Callable, seconds: float, flush: torch.Tensor) -> float:
    """Median ms of a call, with the second-level cache overwritten before each."""
    for _ in range(2):
        call()
    spin = 1e-3 + 2 * enqueued_in(call)
    times, end = [], time.perf_counter() + seconds
    while len(times) < LEAST or (time.perf_counter() < end and len(times) < MOST):
        flush.zero_()
        times.append(behind_a_spin(call, spin))
    return sorted(times)[len(times) // 2]


def replayed(call: Callable, count: int = 20) -> float:
    """ms of a call as a part of a CUDA graph of `count` calls, the median of many replays."""
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(3):
            call()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        for _ in range(count):
            call()
    times = sorted(behind_a_spin(graph.replay, 1e-3) / count for _ in range(REPLAYS))
    return times[len(times) // 2]


def peak_of(call: Callable) -> tuple[object, float]:
    """(result of a call, MiB that it took at most)."""
    cuda.empty_cache()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    result = call()
    cuda.synchronize()
    return result, round((cuda.max_memory_allocated() - before) / 2**20, 1)


class Warmth:
    """Work that brings the clocks up before a row: they fall while the host prepares it."""

    def __init__(self, device: str = "cuda", size: int = 4096):
        self.factors = torch.randn(2, size, size, device=device, dtype=torch.bfloat16).unbind()

    def up(self, seconds: float = 0.1) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(10):
                torch.mm(*self.factors)
            cuda.synchronize()


def sm_clock() -> int | None:
    """MHz of the multiprocessors now, as nvidia-smi says; None where it is not there."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return int(done.stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def ceilings() -> tuple[float, float]:
    """(bytes a second of a copy, counting both ways; floating-point operations a second of a bf16 product)."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    a = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    b = torch.randn_like(a)
    moved = 2 * a.nbytes / timed(lambda: a.copy_(b), 0.5, flush) * 1e3
    x, y = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    product = timed(lambda: x @ y, 0.5, flush)
    return moved, 2 * 8192**3 / product * 1e3
