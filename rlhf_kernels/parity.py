"""`python -m rlhf_kernels.parity trl`: a trainer's own functions beside ours, on your shapes, on your machine.

For the peer that is installed, each function that its drop-in serves: the largest error of both sides against float64
of the same inputs, of values and of gradients, time and peak memory. Ends with 1 if ours is outside its tolerance.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PEERS = ("trl", "openrlhf", "verl")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VALUE_BOUND = 1e-5  # of an error over 1 + |value|: sums of products in fp32
GRADIENT_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of an error by norm


class Shape(NamedTuple):
    """Rows, vocabulary and width of the hidden states that the functions are compared on."""

    rows: int
    vocab: int
    hidden: int


class Comparison(NamedTuple):
    """A function of a peer, ours in its place, and the same in float64; each takes leaves, gives a tuple of tensors.

    The first `differentiable` results are differentiated in the leaves; 0 for none.
    """

    name: str
    ours: Callable
    theirs: Callable
    exact: Callable
    leaves: tuple[Tensor, ...]
    differentiable: int = 1


class Side(NamedTuple):
    """What one side gave: errors of values and gradients against float64, seconds, bytes."""

    value: float
    gradient: float
    seconds: float
    memory: int


def upstream(x: Tensor) -> Tensor:
    """The same gradient of a result for every side."""
    return torch.linspace(-1.0, 2.0, x.numel(), dtype=torch.float64, device=x.device).view(x.shape).to(x.dtype)


def run(function: Callable, leaves: tuple[Tensor, ...], differentiable: int) -> tuple[list[Tensor], list[Tensor]]:
    """(results, gradients of the leaves)."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    results = list(function(*leaves))
    outputs = results[:differentiable]
    gradients = torch.autograd.grad(outputs, leaves, [upstream(x) for x in outputs]) if outputs else ()
    return [x.detach() for x in results], list(gradients)


def value_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest |error| over 1 + |value|; NaN and an infinity in the wrong place count as inf."""
    worst = 0.0
    for x, y in zip(found, exact, strict=True):
        same = x.double() == y
        error = torch.where(same, 0.0, (x.double() - y).abs() / (1.0 + y.abs())).nan_to_num(
            nan=math.inf, posinf=math.inf
        )
        worst = max(worst, float(error.max()) if error.numel() else 0.0)
    return worst


def gradient_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest norm of an error over the norm of the gradient."""
    errors = [float((x.double() - y).norm() / y.norm().clamp(min=1e-300)) for x, y in zip(found, exact, strict=True)]
    return max((math.inf if math.isnan(x) else x for x in errors), default=0.0)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Puts the bytes that were added at the peak into a list: of the device, or resident ones on Linux; else 0."""
    found, status = [], Path("/proc/self/status")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _resident(status, "VmRSS")
    except OSError:
        before = None
    yield found
    found.append(0 if before is None else max(_resident(status, "VmHWM") - before, 0))


def _resident(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(comparison: Comparison, repeats: int) -> dict[str, Side]:
    """{"ours": ..., "theirs": ...}, in turn, so that both meet the same noise."""
    exact = run(comparison.exact, tuple(x.double() for x in comparison.leaves), comparison.differentiable)
    device, sides = comparison.leaves[0].device, {"ours": comparison.ours, "theirs": comparison.theirs}
    errors, seconds, memory = {}, {name: [] for name in sides}, {}
    for name, function in sides.items():
        with peak_memory(device) as peak:
            found, gradients = run(function, comparison.leaves, comparison.differentiable)
        errors[name], memory[name] = (value_error(found, exact[0]), gradient_error(gradients, exact[1])), peak[0]
        del found, gradients
    for _ in range(repeats):
        for name, function in sides.items():
            _wait(device)
            begin = time.perf_counter()
            run(function, comparison.leaves, comparison.differentiable)
            _wait(device)
            seconds[name].append(time.perf_counter() - begin)
    return {name: Side(*errors[name], statistics.median(seconds[name]), memory[name]) for name in sides}


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def within(side: Side, dtype: torch.dtype) -> bool:
    """Whether a side's errors are those of its roundings."""
    return side.value <= VALUE_BOUND and side.gradient <= GRADIENT_BOUNDS[dtype]


HEAD = ("function", "error", "peer's", "gradient", "peer's", "ms", "peer's", "MiB", "peer's", "")
LINE = "{:42}{:>10}{:>10}{:>10}{:>10}{:>9}{:>9}{:>8}{:>8}  {}"


def line(name: str, sides: dict[str, Side], fits: bool) -> str:
    ours, theirs = sides["ours"], sides["theirs"]
    numbers = [f"{x:.1e}" for x in (ours.value, theirs.value, ours.gradient, theirs.gradient)]
    times = [f"{x.seconds * 1e3:.4g}" for x in (ours, theirs)]
    sizes = [f"{x.memory / 2**20:.0f}" for x in (ours, theirs)]
    return LINE.format(name, *numbers, *times, *sizes, "" if fits else "OUTSIDE")


def shape_of(text: str) -> Shape:
    """Shape from "ROWSxVOCABxHIDDEN"."""
    try:
        shape = Shape(*(int(x) for x in text.lower().split("x")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape, expected ROWSxVOCABxHIDDEN, as 512x50257x768"
        ) from None
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return shape


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_kernels.parity", description=__doc__.split("\n\n")[1])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument(
        "--shape", type=shape_of, default=Shape(512, 50257, 256), help="ROWSxVOCABxHIDDEN, default 512x50257x256"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the inputs, default fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side that are timed, default 3")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, expected 1 or more")
    try:
        peer = importlib.import_module(f".integrations._parity_{options.peer}", __package__)
        peer.check()
    except (ImportError, RuntimeError) as reason:
        parser.error(f"{options.peer} cannot be compared: {reason}")
    try:
        torch.empty(0, dtype=torch.float32, device=options.device)
    except (AssertionError, RuntimeError) as reason:
        parser.error(f"--device is {options.device}: {str(reason).splitlines()[0]}")
    dtype, shape = DTYPES[options.dtype], options.shape
    print(
        f"{peer.NAME}: {shape.rows} rows, {shape.vocab} tokens, width {shape.hidden}, "
        f"{options.dtype} on {options.device}"
    )
    print("errors against float64 of the same inputs: values over 1 + |value|, gradients by norm")
    print("forward and backward: median time; memory added at the peak, 0 where what was free already did\n")
    print(LINE.format(*HEAD))
    every = True
    for comparison in peer.comparisons(shape, dtype, torch.device(options.device)):
        sides = measured(comparison, options.repeats)
        fits = within(sides["ours"], dtype)
        every = every and fits
        print(line(comparison.name, sides, fits), flush=True)
    return 0 if every else 1


if __name__ == "__main__":
    sys.exit(main())
