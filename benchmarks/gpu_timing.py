"""How long a call takes on a GPU: by events, or as part of a CUDA graph; and what the GPU can do at best."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(call: Callable, seconds: float, flush: torch.Tensor) -> float:
    """Median ms of a call, with the second-level cache overwritten before each."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 7 or (time.perf_counter() < end and len(times) < 200):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def replayed(call: Callable, count: int = 20) -> float:
    """ms of a call as a part of a CUDA graph of `count` calls, the median of many replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    times = []
    for _ in range(50):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / count)
    return sorted(times)[len(times) // 2]


def ceilings() -> tuple[float, float]:
    """(bytes a second of a copy, counting both ways; floating-point operations a second of a bf16 product)."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    a = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    b = torch.randn_like(a)
    moved = 2 * a.nbytes / timed(lambda: a.copy_(b), 0.5, flush) * 1e3
    x, y = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    product = timed(lambda: x @ y, 0.5, flush)
    return moved, 2 * 8192**3 / product * 1e3
