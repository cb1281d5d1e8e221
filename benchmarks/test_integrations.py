"""Training steps of TRL, verl and OpenRLHF with their own functions, and with these in their place.

Each peer runs in an environment of its own, that of `make test-integrations`: the environment variable
RLHF_KERNELS_PEER_PYTHONS is the path of its python with {} for the peer's name, as `make bench-integrations` sets it.
benchmarks/peer_steps.py is the process. On a CPU it has one thread, and its seconds are the CPU's.

TRL stands twice: `trl` is TRL as it is, which on a CPU scores prompts and padding too; `trl-labels` is TRL told to
score the positions with a label alone, as it does on a GPU and as ours does anywhere: what is left there is the
kernels'. `backbone` is the same step with a head that scores nothing: what it takes, no head can save. bf16 is TRL's
own default, autocast; `ours-fast` rounds products to bf16, as TRL does.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess

from benchmarks import roof
from benchmarks.cases import Bench, Case, Skip, faster, memory
from benchmarks.worker import Worker

PYTHONS = "RLHF_KERNELS_PEER_PYTHONS"
_processes: dict[str, subprocess.Popen] = {}


def peer_python(peer: str) -> str | Skip:
    """The python that has the peer, or why there is none."""
    path = os.environ.get(PYTHONS, "").replace("{}", peer)
    if not path:
        return Skip(f"{PYTHONS} names no python with {peer}")
    return path if os.access(path, os.X_OK) else Skip(f"there is no environment with {peer}: make bench-integrations")


class PeerStep(Worker):
    """One implementation of a case's step; those of one peer share a process, and a turn is theirs one by one."""

    def __init__(self, case: Case, impl: str, python: str):
        facts = {"function": case.function, "dtype": case.dtype, "variant": case.variant, "sizes": case.sizes}
        self.asked, self.arguments, self.warm = {"case": facts, "impl": impl}, [python, case.function, impl], False
        self.python = python

    def _ask(self, what: str):
        self.process = _process(self.python)
        return super()._ask(json.dumps({**self.asked, "what": what}))

    def close(self) -> None:
        """The process goes on to the next case."""


def _process(python: str) -> subprocess.Popen:
    """The peer's process, started where none runs; it ends with this one."""
    if python not in _processes or _processes[python].poll() is not None:
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        _processes[python] = subprocess.Popen(
            [python, "-P", "-m", "benchmarks.peer_steps"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **offline, "PYTHONPATH": str(roof.ROOT)}, cwd=roof.ROOT,
        )  # fmt: skip
    return _processes[python]


@atexit.register
def _end() -> None:
    for process in _processes.values():
        process.stdin.close()
        process.wait()


def build(case: Case) -> Bench:
    peer = case.function.partition("_")[0]
    python = peer_python(peer)
    if isinstance(python, Skip):
        return Bench(dict.fromkeys(case.impls, python))
    return Bench({impl: PeerStep(case, impl, python) for impl in case.impls}, roof="backbone")


def _cases():
    sizes = {"B": 8, "T": 96, "H": 256, "V": 50000}
    for kind in ("sft", "dpo", "kto", "grpo", "rloo"):
        for dtype in ("fp32", "bf16"):
            impls = ("ours", *(("ours-fast",) if dtype == "bf16" else ()), "trl-labels", "trl", "backbone")
            goals = (faster("trl", 2), faster("trl-labels", 1.5), memory("trl-labels", 1))
            yield Case(f"trl_{kind}", "fwdbwd", dtype, sizes, impls, build, goals, seconds=1.0)
    for dtype in ("fp32", "bf16"):
        impls = ("ours", *(("ours-fast",) if dtype == "bf16" else ()), "trl")
        head = {"N": 512, "H": 256, "V": 50000}
        yield Case("trl_head", "fwdbwd", dtype, head, impls, build, (faster("trl", 1.5), memory("trl", 1)), seconds=1.0)
    for dtype in ("fp32", "bf16"):
        for variant in ("logits", "fused"):
            goals = (faster("verl", 1), memory("verl", 1))
            yield Case(
                "verl_actor", "fwdbwd", dtype, sizes, ("ours", "verl"), build, goals, variant=variant, seconds=1.0
            )
        goals = (faster("openrlhf", 1), memory("openrlhf", 1))
        yield Case("openrlhf_actor", "fwdbwd", dtype, sizes, ("ours", "openrlhf"), build, goals, seconds=1.0)
    for peer in ("verl", "openrlhf"):
        goals = (faster(peer, 10),)
        yield Case(f"{peer}_gae", "fwd", "fp32", {"B": 256, "T": 1024}, ("ours", peer), build, goals)


CASES = list(_cases())


def test_trl_sft(row, measure):
    measure(row)


def test_trl_dpo(row, measure):
    measure(row)


def test_trl_kto(row, measure):
    measure(row)


def test_trl_grpo(row, measure):
    measure(row)


def test_trl_rloo(row, measure):
    measure(row)


def test_trl_head(row, measure):
    measure(row)


def test_verl_actor(row, measure):
    measure(row)


def test_verl_gae(row, measure):
    measure(row)


def test_openrlhf_actor(row, measure):
    measure(row)


def test_openrlhf_gae(row, measure):
    measure(row)
