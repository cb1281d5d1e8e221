"""What a call on a tiny batch takes beside PyTorch's own ops: the way to the kernel and back, not the kernel.

    OMP_NUM_THREADS=1 python -m benchmarks.overhead [OP ...]     a row for each function, and whether it meets the goal

The cases are those of benchmarks/test_<op>.py, at the sizes below. They are not in the results file: a few microseconds
say as much of the machine, and of what else it does, as of the call.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

from benchmarks import cases
from rlhf_kernels import dispatch

MOST = 3.0  # times PyTorch's own time
SIZES = {"N": 32, "V": 64, "H": 16, "B": 4, "T": 8, "P": 16, "K": 2, "S": 2}
PAIRS = {"N": 16}  # of the preference losses
GOAL = cases.within("eager", MOST)


def tiny(case: cases.Case) -> cases.Case:
    """The case at these sizes, ours beside PyTorch's."""
    sizes = SIZES | PAIRS if case.op == "preference" else SIZES
    small = {name: min(size, sizes.get(name, 8)) for name, size in case.sizes.items()}
    return replace(case, sizes=small, impls=("ours", "eager"), goals=(GOAL,), seconds=0.2)


def tiny_cases(op: str) -> list[cases.Case]:
    """One for each function and direction of an op that is measured beside PyTorch."""
    found = {}
    for case in importlib.import_module(f"benchmarks.test_{op}").CASES:
        if "eager" in case.impls and case.dtype == "fp32":
            found.setdefault((case.function, case.direction), tiny(case))
    return list(found.values())


def line(case: cases.Case, rows: dict[str, dict]) -> str:
    """A row of the table."""
    ours, eager = rows["ours"]["ms"] * 1e3, rows["eager"]["ms"] * 1e3
    verdict = "met" if ours / eager <= MOST else "missed"
    return f"{case.function:32} {case.direction:7} {ours:8.1f} us {eager:8.1f} us {ours / eager:6.2f} x  {verdict}"


def main(ops: list[str]) -> None:
    print(f"{'function':32} {'':7} {'ours':>11} {'PyTorch':>11} {'ratio':>8}  at most {MOST:g} x")
    for op in ops or dispatch.TABLE:
        for case in tiny_cases(op):
            print(line(case, cases.measure(case)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
