"""What the machine can do at best, next to which every row is measured, and the facts of the machine itself.

The roofs are ordinary calls (`read`, `copy`, `matmuls`) that take their turns in the same group as the implementations,
so that they see the same noise.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def read(*tensors: Tensor) -> Callable[[], None]:
    """One pass over each tensor: its largest element."""

    def run():
        for tensor in tensors:
            tensor.amax()

    return run


def copy(moved: int) -> Callable[[], None]:
    """A copy between two reused buffers that moves this many bytes, half of them read and half written."""
    source = torch.ones(max(moved // 2, 1), dtype=torch.uint8)
    target = torch.empty_like(source).copy_(source)

    def run():
        target.copy_(source)

    return run


def matmuls(
    rows: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    logits: int = 1,
    grad_hidden: int = 1,
    grad_weight: int = 1,
) -> Callable[[], None]:
    """The matrix products of a linear loss, each so many times, whole and into reused memory.

    logits = hidden @ weight.T, d hidden = d logits @ weight, d weight = d logits.T @ hidden.
    """
    x, weight, big = (torch.randn(shape, dtype=dtype) for shape in ((rows, hidden), (vocab, hidden), (rows, vocab)))
    out, grad_x, grad_w = torch.empty_like(big), torch.empty_like(x), torch.empty_like(weight)

    def run():
        for _ in range(logits):
            torch.mm(x, weight.T, out=out)
        for _ in range(grad_hidden):
            torch.mm(big, weight, out=grad_x)
        for _ in range(grad_weight):
            torch.mm(big.T, x, out=grad_w)

    return run


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, flags=re.MULTILINE)[1]) * 1024


def peak_of(run: Callable[[], object]) -> tuple[object, float | None]:
    """(result, MiB by which the resident memory rose at most during the call); None where Linux does not tell.

    Memory that a former call freed and that the C library or our pool kept is given back first; a workspace that the
    callee still holds is not seen.
    """
    if ours := sys.modules.get("rlhf_kernels._native"):
        ours.empty_pool()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return run(), None
    result = run()
    return result, max(_status("VmHWM") - before, 0) / 2**20


def cpu_model() -> str:
    """The model name that /proc/cpuinfo gives, else the architecture."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), flags=re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else platform.machine()


def slug(name: str) -> str:
    """The model name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_path() -> Path:
    """The file of this machine's results."""
    return RESULTS / f"{slug(cpu_model())}.json"


def machine() -> dict:
    """What of the machine a figure depends on."""
    from rlhf_kernels import _native

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "isa": "none" if _native.missing() else os.environ.get("RLHF_KERNELS_CPU_ISA") or _native.isas()[-1],
        "system": f"{platform.system()} {platform.machine()}",
    }


def run_facts(command: str, load: float) -> dict:
    """What of this run a figure depends on; load: of the machine, before the run."""
    commit = _git("rev-parse", "--short=10", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "rlhf_kernels", "csrc", "setup.py")
    return {
        "commit": commit + (" and uncommitted changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": command,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"git {' '.join(arguments)}: {error}", file=sys.stderr)
        return "unknown"
    return done.stdout.strip()
