"""The ops that have goals, on a GPU: time, share of the roof, peak memory, error, beside eager and compile.

    python -m benchmarks.gpu OUTDIR [--only OP ...] [--calls ours eager compile] [--seconds 300] [--name NAME]
                                            times, and writes OUTDIR/<device or NAME>.json after each row
    python -m benchmarks.gpu --check        small calls of every kernel, on a CPU too
    python -m benchmarks.gpu --profile      the first call of each op, once, for a profiler that waits for the start

The roof of a row is the larger of its bytes over the measured bandwidth of a copy and its floating-point operations
over the measured rate of a bf16 product. Calls are timed with events while the device is kept busy, the second-level
cache overwritten in between, and the median counts; where latency rules, what is timed is the replay of a CUDA graph,
of eager and compile too if they can be captured. The goals are an H200's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from pathlib import Path

import torch

from benchmarks import gpu_timing as timing
from benchmarks.gpu_rows import GROUPS, Place, Row, gpu_backends

CALLS = ("ours", "eager", "compile")
PROFILED = ("logprobs", "kl", "advantages", "ppo")


def worst(result, exact) -> float:
    """Largest difference, relative to the largest entry of each exact tensor."""
    found = 0.0
    for actual, expected in zip(result, exact):
        actual = actual[: len(expected)]
        if actual.dim() == 2:  # of advantages the last tokens are compared
            actual = actual[:, -expected.shape[1] :]
        gap = (actual.double() - expected).abs().max()
        found = max(found, (gap / expected.abs().max().clamp(min=1e-30)).item())
    return found


def kind_of(name: str) -> str:
    """Of a row's call: "ours", "eager" or "compile"."""
    return name if name in CALLS else "ours"


def milliseconds(row: Row, name: str, call, seconds: float, flush) -> tuple[float, bool]:
    """(ms of a call, whether it was a graph's replay)."""
    if row.latency:
        try:
            return timing.replayed(call), True
        except Exception as failure:
            if kind_of(name) == "ours":
                raise
            print(f"{row.name} {row.shape} {name} is not captured: {str(failure)[:100]}", flush=True)
    return timing.timed(call, seconds, flush), False


def measure(row: Row, bandwidth: float, rate: float, seconds: float, flush, calls=CALLS) -> dict:
    """{implementation: figures} of a row; what an implementation raises is kept as its reason."""
    floor = 1e3 * max(row.bytes / bandwidth, row.flops / rate)
    exact = row.exact() if row.exact else None
    found = {}
    for name, call in row.calls.items():
        if kind_of(name) not in calls:
            continue
        if name == "compile":
            torch.compiler.reset()  # else functions of one code object are no longer compiled for their shape
        try:
            result, peak = timing.peak_of(call)
            figures = {"peak_mib": peak}
            if exact is not None:
                figures["error"] = float(f"{worst(result, exact):.2e}")
            del result
            ms, graph = milliseconds(row, name, call, seconds, flush)
            found[name] = {"ms": round(ms, 5), "share": round(floor / ms, 4), **figures, "graph": graph}
        except Exception as failure:
            if kind_of(name) == "ours":
                print(f"FAILED {row.name} {row.shape} {name}: {type(failure).__name__}: {failure}", flush=True)
            found[name] = {"failed": f"{type(failure).__name__}: {str(failure)[:200]}"}
    return {"floor_ms": round(floor, 5), "rows": found}


def line(row: Row, name: str, figures: dict) -> str:
    if "failed" in figures:
        return f"{row.name:45} {row.shape:18} {name:12} failed: {figures['failed'][:60]}"
    goal = ""
    if name in ("triton", "cuda") and row.goal_ms is not None:
        goal = f"goal {row.goal_ms} ms: {'met' if figures['ms'] <= row.goal_ms else 'missed'}"
    if name in ("triton", "cuda") and row.goal_share is not None:
        goal = f"goal {row.goal_share:.0%}: {'met' if figures['share'] >= row.goal_share else 'missed'}"
    error = f"{figures['error']:.1e}" if "error" in figures else ""
    return (
        f"{row.name:45} {row.shape:18} {name:12} {figures['ms']:10.4f} ms {figures['share']:6.1%} of the roof "
        f"{figures['peak_mib']:9.1f} MiB {error:8} {goal}"
    )


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def file_of(folder: Path, name: str) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def run(folder: Path, groups, calls=CALLS, seconds: float = 300.0, name: str | None = None, place=None) -> Path:
    """Measures the rows of the groups, and writes the file after each."""
    place, device = place or Place("cuda", small=False), torch.cuda.get_device_name()
    bandwidth, rate = timing.ceilings()
    flush = torch.empty(256 << 20 if not place.small else 1, dtype=torch.uint8, device=place.device)
    warmth = timing.Warmth(place.device, 64 if place.small else 4096)
    print(f"{device}: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s", flush=True)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit()}
    data = {"device": device, **versions, "copy_bytes_s": bandwidth, "product_flops_s": rate, "calls": []}
    file, end = file_of(folder, name or device), time.perf_counter() + seconds
    for group in groups:
        for row in GROUPS[group](place):
            told = {"op": group, "call": row.name, "shape": row.shape}
            if not {kind_of(x) for x in row.calls} & set(calls):
                continue
            if time.perf_counter() > end:
                print(f"out of time before {row.name} {row.shape}", flush=True)
                data["calls"].append({**told, "failed": "out of time"})
            else:
                warmth.up()
                found = measure(row, bandwidth, rate, 0.3, flush, calls)
                clock, goals = timing.sm_clock(), {"goal_ms": row.goal_ms, "goal_share": row.goal_share}
                data["calls"].append({**told, **goals, "sm_mhz": clock, **found})
                for implementation, figures in found["rows"].items():
                    print(line(row, implementation, figures), flush=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(data, indent=1) + "\n")
            partial.replace(file)
    return file


def profile() -> None:
    """The first call of some ops on each backend: once to warm up, once between the profiler's start and stop."""
    for group in PROFILED:
        row = next(GROUPS[group](Place("cuda", small=False)))
        for name in gpu_backends(group):
            row.calls[name]()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            row.calls[name]()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(f"{row.name} {row.shape} {name}", flush=True)


def check() -> None:
    """Small calls on every backend but cpu and reference; fails if there is none, or if one is far from float64."""
    device, ran = "cuda" if torch.cuda.is_available() else "cpu", 0
    for rows in GROUPS.values():
        for row in rows(Place(device, small=True)):
            exact = row.exact() if row.exact else None
            for name, call in row.calls.items():
                if name == "compile":
                    continue
                result, mine = call(), name != "eager"
                error = None if exact is None else worst(result, exact)
                told = "not compared" if error is None else f"{error:.1e}"
                print(f"{row.name:45} {row.shape:14} {name:12} {device} {told}", flush=True)
                ran += mine
                if mine and error is not None and not error < 0.01:  # bf16 gradients are off by 2^-9
                    raise SystemExit(f"{row.name} on {name}: the error is {error}")
    if ran == 0:
        raise SystemExit("no GPU backend runs here: there is no GPU, and TRITON_INTERPRET=1 is not set")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir", nargs="?", type=Path, help="where the results go")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="some ops, in this order")
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS), help="whose calls")
    parser.add_argument("--seconds", type=float, default=300.0, help="no new row is begun after so many seconds")
    parser.add_argument("--name", help="of the file, instead of the device's")
    parser.add_argument("--check", action="store_true", help="small calls instead of measurements")
    parser.add_argument("--profile", action="store_true", help="single calls instead of measurements")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if not (options.check or options.profile or options.outdir):
        parser.error("OUTDIR is missing")
    if options.dry_run:
        told = "check" if options.check else "profile" if options.profile else f"{options.calls} of {options.only}"
        print(f"dry run: {told}")
    elif options.check:
        check()
    elif not torch.cuda.is_available():
        parser.error("there is no GPU to measure; --check makes small calls on the CPU")
    elif options.profile:
        profile()
    else:
        options.outdir.mkdir(parents=True, exist_ok=True)
        run(options.outdir, options.only, options.calls, options.seconds, options.name)


if __name__ == "__main__":
    main()
