"""A case: one public function at one shape, all its implementations, and what ours should reach beside them.

    def build(case):
        x = torch.randn(case.sizes["N"], case.sizes["V"])
        return Bench(
            calls={"ours": lambda: ((f(x),), ()), "eager": ..., "compile": compiled(...), "peer": Skip("needs a GPU")},
            exact=lambda: ((f64(x),), ()), moved=4 * x.numel(), roof="read",
        )

    IMPLS = ("ours", "eager", "compile", "peer")
    CASES = [Case("f", "fwd", "fp32", {"N": 8, "V": 9}, IMPLS, build, goals=(faster("eager", 8),))]

    def test_f(row, measure):
        measure(row)

A call takes nothing and returns (outputs, gradients), two tuples of tensors. What it returns and what `exact` returns
are compared in this order; a None on either side is passed over, and a roof returns None instead of a tuple.
Implementations of one case take turns, call by call, so noise hits all of them alike.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks import roof

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TINY = {"N": 6, "V": 37, "H": 8, "B": 5, "T": 13, "P": 6}
SECONDS = 0.7  # what each implementation of a case is timed for
SLOW = 1.0  # calls this long are timed 3 times at least, shorter ones 5 times
MOST = 10_000  # calls of one implementation
TURN = 0.004  # a turn repeats a short call for this long, so that it runs from warm caches, as in a loop

Result = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Goal:
    """What `impl` should reach beside `than`, both of the same case.

    faster: time of `than` / time of `impl` >= bound.  within: time of `impl` / time of `than` <= bound.
    memory: peak of `impl` / peak of `than` <= bound.
    """

    kind: str
    than: str
    bound: float
    impl: str = "ours"


def faster(than: str, bound: float, impl: str = "ours") -> Goal:
    """At least `bound` times as fast as `than`."""
    return Goal("faster", than, bound, impl)


def within(than: str, bound: float, impl: str = "ours") -> Goal:
    """At most `bound` times the time of `than`."""
    return Goal("within", than, bound, impl)


def memory(than: str, bound: float, impl: str = "ours") -> Goal:
    """At most `bound` times the extra peak memory of `than`."""
    return Goal("memory", than, bound, impl)


@dataclass(frozen=True)
class Skip:
    """An implementation that does not run here, and why."""

    reason: str


@dataclass
class Bench:
    """What `build` makes: the calls by implementation, the truth, and what a call has to do at least."""

    calls: dict[str, object]
    exact: Callable[[], Result] | None = None
    part: Callable[[Result], Result] = lambda result: result  # what of a call's result `exact` computes
    errors: Callable[[Result, Result], dict[str, float]] | None = None  # named errors of (result, exact), for the docs
    moved: int = 0  # bytes that the op must read and write
    flops: int = 0
    roof: str = ""  # the implementation that is the roof: read, copy, matmuls


@dataclass(eq=False)
class Case:
    """One public function at one shape; see the module's text."""

    function: str
    direction: str  # fwd | fwdbwd
    dtype: str  # fp32 | bf16 | fp16
    sizes: dict[str, int]
    impls: tuple[str, ...]
    build: Callable[[Case], Bench]
    goals: tuple[Goal, ...] = ()
    variant: str = ""  # whatever else tells the case from others of this shape
    scale: str = ""  # the size that grows in this case and its siblings; "" = no point of a curve
    module: str = field(default="", kw_only=True)
    seconds: float = field(default=SECONDS, kw_only=True)

    def __post_init__(self):
        self.module = self.module or self.build.__module__

    @property
    def op(self) -> str:
        return self.module.rpartition("test_")[2]

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.sizes.values())) + (f"-{self.variant}" if self.variant else "")

    @property
    def group(self) -> str:
        return f"{self.function}-{self.direction}-{self.dtype}-{self.shape}"

    def row_id(self, impl: str) -> str:
        return f"{impl}-{self.direction}-{self.dtype}-{self.shape}"

    def tiny(self) -> Case:
        """The same case at sizes that take no time, for tests."""
        return replace(self, sizes={name: min(size, TINY.get(name, size)) for name, size in self.sizes.items()})


def doubled(**start: int):
    """The four values of a size that is doubled three times: doubled(V=8192) -> ("V", [8192, ..., 65536])."""
    ((name, value),) = start.items()
    return name, [value << i for i in range(4)]


class Call:
    """An implementation in this process. `warm`: its first call does more than compute (it compiles)."""

    def __init__(self, run: Callable[[], Result | None], *, warm: bool = False):
        self.run, self.warm = run, warm

    def first(self) -> tuple[Result | None, float | None]:
        """(result, peak MiB) on inputs that no call has written to yet."""
        if not self.warm:
            return roof.peak_of(self.run)
        result = self.run()
        return result, roof.peak_of(self.run)[1]

    def once(self) -> float:
        """Seconds of one call; what it returns is freed outside of them."""
        start = time.perf_counter()
        result = self.run()
        seconds = time.perf_counter() - start
        del result
        return seconds

    def turn(self) -> list[float]:
        """Seconds of the calls of one turn."""
        seconds, total = [], 0.0
        while total < TURN:
            seconds.append(self.once())
            total += seconds[-1]
        return seconds

    def close(self) -> None:
        """Nothing is held; an implementation in another process ends it here."""


def compiled(function: Callable) -> Callable:
    """torch.compile for one shape, which raises where it would fall back to eager; made at its first call."""
    graph = functools.cache(lambda: torch.compile(function, fullgraph=True, dynamic=False))
    return lambda *inputs: graph()(*inputs)


def error(result: Result, exact: Result, which: int) -> float | None:
    """Largest |actual - exact| over the largest |exact| of the same tensor, worst tensor; 0 outputs, 1 gradients."""
    worst = None
    for actual, expected in zip(result[which], exact[which], strict=True):
        if actual is None or expected is None:
            continue
        if actual.shape != expected.shape:
            raise ValueError(f"result has shape {list(actual.shape)}, the float64 one {list(expected.shape)}")
        gap = (actual.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
        worst = max(gap.item(), worst or 0.0) if not torch.isnan(gap) else float("nan")
    return worst


def _kept(result: Result) -> Result:
    return tuple(tuple(None if x is None else x.detach().clone() for x in tensors) for tensors in result)


def implementation(call) -> object:
    """Something with first(), turn() and close(): what `build` gave, or a plain function wrapped."""
    return call if hasattr(call, "turn") else Call(call)


def measure(case: Case, impls: tuple[str, ...] | None = None, extra: dict | None = None) -> dict[str, dict]:
    """{implementation: row} of one case; a row is figures, or {"skipped": reason}.

    First a call of each on fresh inputs for memory and errors, then rounds in which each takes its turn.
    `extra` adds implementations that `build` does not know.
    """
    torch.manual_seed(0)
    bench = case.build(case)
    calls = {name: bench.calls[name] for name in (impls or case.impls)} | (extra or {})
    if any(name.startswith("compile") for name in calls):
        torch.compiler.reset()  # else a function met eight times is no longer compiled, and nothing says so
    rows: dict[str, dict] = {}
    live: dict[str, object] = {}
    results: dict[str, Result] = {}
    for name, call in calls.items():
        if isinstance(call, Skip):
            rows[name] = {"skipped": call.reason}
            continue
        live[name] = implementation(call)
        if name.startswith("compile"):
            live[name].warm = True
        try:
            result, peak = live[name].first()
        except Exception as failure:  # a peer that fails is a row with its reason; ours and PyTorch must run
            if name.partition("-")[0] in ("ours", "eager", "read", "copy", "matmuls"):
                raise
            rows[name] = {"skipped": f"raises {type(failure).__name__}: {str(failure).splitlines()[0][:160]}"}
            del live[name]
            continue
        rows[name] = {"peak_mib": None if peak is None else round(peak, 2)}
        if isinstance(result, dict):  # another process has compared its own results
            rows[name] |= result
        elif result is not None and bench.exact is not None:
            results[name] = _kept(bench.part(result))
        del result
    if results:
        exact = bench.exact()
        for name, result in results.items():
            rows[name] |= {"error": error(result, exact, 0), "grad_error": error(result, exact, 1)}
            if bench.errors is not None:
                rows[name]["errors"] = bench.errors(result, exact)
        del exact, results
    _fill_in(rows, _take_turns(live, case.seconds), bench, torch.get_num_threads())
    for call in live.values():
        call.close()
    return rows


def _take_turns(live: dict[str, object], budget: float) -> dict[str, list[float]]:
    """Seconds of every call; an implementation stops after its budget and its least number of calls."""
    gc.collect()
    gc.disable()
    try:
        warm_up = {name: call.turn() for name, call in live.items()}
        least = {name: 3 if first[0] > SLOW else 5 for name, first in warm_up.items()}
        seconds = {name: first if first[0] > SLOW else [] for name, first in warm_up.items()}
        while waiting := [n for n, s in seconds.items() if len(s) < least[n] or (sum(s) < budget and len(s) < MOST)]:
            for name in waiting:
                seconds[name] += live[name].turn()
    finally:
        gc.enable()
    return seconds


def _fill_in(rows: dict, seconds: dict[str, list[float]], bench: Bench, threads: int) -> None:
    best = {name: min(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        row = rows[name]
        row["seconds"] = values
        row["ms"] = best[name] * 1e3
        row["median_ms"] = statistics.median(values) * 1e3
        row["rounds"] = len(values)
        row.setdefault("threads", threads)  # another process has said how many of its own
        if bench.moved:
            row["gb_s"] = bench.moved / best[name] / 1e9
        if bench.flops:
            row["tflop_s"] = bench.flops / best[name] / 1e12
        if bench.roof in best:
            row["of_roof"] = best[bench.roof] / best[name]
        for other in ("eager", "compile"):
            if other in best and name != other:
                row[f"over_{other}"] = best[other] / best[name]
