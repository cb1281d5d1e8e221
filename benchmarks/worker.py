"""An implementation that runs in a process of its own: with other environment variables, or another commit's package.

The parent asks for a turn and waits for its answer, a line of JSON, so that only one of the two works at a time.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Worker:
    """`impl` of a case in a process with the given environment; `package`: the folder whose rlhf_kernels it takes."""

    def __init__(self, case, impl: str, environment: dict[str, str] | None = None, package: Path | None = None):
        facts = {key: getattr(case, key) for key in ("function", "direction", "dtype", "variant", "sizes")}
        self.arguments = [case.module, json.dumps(facts), impl, str(package or "")]
        path = os.pathsep.join(str(folder) for folder in (package, ROOT) if folder)
        self.environment = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        self.process = None
        self.warm = False

    def _ask(self, what: str):
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "benchmarks.worker", *self.arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment, cwd=ROOT,
            )  # fmt: skip
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that runs {self.arguments[2]} ended with {self.process.wait()}")
        answer = json.loads(answer)
        if isinstance(answer, dict):
            raise RuntimeError(answer["failed"])
        return answer

    def first(self):
        """({"error": ..., "grad_error": ...}, peak MiB) as the process itself found them."""
        return self._ask("warm first" if self.warm else "first")

    def turn(self) -> list[float]:
        """Seconds of the calls of one turn, by the process's own clock."""
        time.sleep(0.005)  # this process's OpenMP threads stop spinning, and leave the cores to the other
        seconds = self._ask("turn")
        time.sleep(0.005)
        return seconds

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def main(*arguments: str) -> None:
    """Answer the parent's lines; a failure is an answer too: {"failed": why}."""
    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        for answer in _answers(*arguments):
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as failure:
        print(json.dumps({"failed": f"{type(failure).__name__}: {failure}"}), file=answers, flush=True)
        raise


def _answers(module: str, facts: str, impl: str, package: str):
    import torch

    import rlhf_kernels
    from benchmarks import cases

    if package and not Path(rlhf_kernels.__file__).is_relative_to(package):
        raise RuntimeError(f"rlhf_kernels comes from {rlhf_kernels.__file__}, not from {package}")
    facts = json.loads(facts)
    sizes = facts.pop("sizes")
    alike = [c for c in importlib.import_module(module).CASES if all(getattr(c, k) == v for k, v in facts.items())]
    case = dataclasses.replace(alike[0], sizes=sizes)
    torch.manual_seed(0)
    bench = case.build(case)
    call = cases.implementation(bench.calls[impl])
    for line in sys.stdin:
        if line.strip() == "turn":
            yield call.turn()
        else:
            call.warm = line.startswith("warm")
            result, peak = call.first()
            found = {}
            if result is not None and bench.exact is not None:
                found = dict(zip(("error", "grad_error"), _errors(bench, result)))
            del result
            yield found, peak


def _errors(bench, result):
    from benchmarks import cases

    exact, result = bench.exact(), bench.part(result)
    return [cases.error(result, exact, which) for which in (0, 1)]


if __name__ == "__main__":
    main(*sys.argv[1:])
