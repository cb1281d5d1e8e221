"""What the compiler made of the CUDA C++ kernels, read from the built module without a GPU.

    python -m benchmarks.compile_cuda [WORD ...] [--arch 90] [--json]

Of each kernel whose name holds the words: registers a thread, bytes that spill, bytes of shared memory, instructions
an entry, barriers a turn, bytes of the widest load. Instructions and barriers are counted in a turn of the loop that
reads most of global memory (where two read as much, in the cheaper one: the other is for addresses that are not
aligned), or, of kernels in WHOLE, along the cheapest way through the whole kernel that takes every access of 16 bytes;
barriers and loads of other kernels in all of it (`benchmarks.machine_code`).
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import machine_code

PACKAGE = Path(__file__).resolve().parent.parent / "rlhf_kernels"
SCOPE = re.compile(r"rk::device::|\(anonymous namespace\)::")
# kernel -> entries of a thread in a turn of its loop
ENTRIES = {"statistics_kernel": 16, "gradient_kernel": 16, "kl_fwd_kernel": 16, "kl_bwd_kernel": 8}
WHOLE = {"walk_kernel": 8, "tiles_kernel": 4}  # kernel -> entries of a thread
FLOAT_ENTRIES = {"gradient_kernel": 8, "kl_bwd_kernel": 4}  # where a word of 16 bytes holds four


@dataclass(frozen=True)
class Counts:
    """A kernel's: spilled and shared in bytes, per_entry in instructions, widest_load in bytes."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    per_entry: float | None
    barriers: int
    widest_load: int


def module() -> Path:
    """The built module; FileNotFoundError without one."""
    found = sorted(PACKAGE.glob("_cuda*.so"))
    if not found:
        raise FileNotFoundError("rlhf_kernels._cuda is not built; python setup.py build_ext --inplace builds it")
    return found[0]


def cuobjdump() -> str:
    """That of triton's package, else the one on the path."""
    beside = Path(machine_code.tool()).with_name("cuobjdump")
    found = str(beside) if beside.exists() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("no cuobjdump: it comes with the package triton and with the CUDA toolkit")
    return found


def _readable(name: str) -> str:
    """The kernel and the arguments of its template."""
    tool = shutil.which("c++filt")
    if tool is not None:
        name = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()
    name = SCOPE.sub("", name).removeprefix("void ").replace("__nv_bfloat16", "bf16").replace("__half", "half")
    return re.sub(r"\((?!\d).*", "", re.sub(r"\((?:Transform|bool|int)\)", "", name))


def _cheapest(kernel: machine_code.Kernel, start: int, ends: set[int]) -> list[int]:
    """The blocks after `start` on the cheapest way to one of `ends`."""
    best, waiting = {start: (0, -1)}, [(0, start)]
    while waiting:
        cost, block = heapq.heappop(waiting)
        if block in ends and block != start:
            way = [block]
            while best[way[0]][1] != start:
                way.insert(0, best[way[0]][1])
            return way
        for after in kernel.followers[block]:
            more = cost + len(kernel.blocks[after])
            if more < best.get(after, (more + 1,))[0]:
                best[after] = more, block
                heapq.heappush(waiting, (more, after))
    return []


def _wide_way(kernel: machine_code.Kernel) -> machine_code.Code:
    """The cheapest way from the first instruction to the end that takes every access of 16 bytes."""
    wide = {i for i, block in enumerate(kernel.blocks) if any(".E.128" in line for line in block)}
    way = [0]
    while left := wide - set(way):
        on = _cheapest(kernel, way[-1], left)
        if not on:
            break
        way += on
    way += _cheapest(kernel, way[-1], {i for i, after in enumerate(kernel.followers) if not after})
    return machine_code.Code(tuple(line for i in way for line in kernel.blocks[i]))


def _counted(kernel: machine_code.Kernel, name: str) -> tuple[machine_code.Code, float | None]:
    """The code that is counted, and its instructions an entry."""
    base = re.match(r"\w+", name)[0]
    if base in WHOLE:
        code = _wide_way(kernel)
        return code, code.instructions / WHOLE[base]
    if base not in ENTRIES:
        return kernel.all, None
    entries = FLOAT_ENTRIES.get(base, ENTRIES[base]) if "float" in name else ENTRIES[base]
    loops = kernel.loops()
    most = sum(loops[0].loads)
    code = min((loop for loop in loops if sum(loop.loads) == most), key=lambda loop: loop.instructions)
    return code, code.instructions / entries


def report(path: Path, arch: str = "90") -> list[Counts]:
    """The counts of every kernel in a module for one architecture."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([cuobjdump(), "-xelf", "all", str(path)], cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).glob(f"*.sm_{arch}*.cubin")):
            usage = subprocess.run([cuobjdump(), "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
            numbers = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
            uses = {name: [int(x) for x in row] for name, *row in numbers}
            for kernel in machine_code.kernels(cubin):
                registers, stack, shared, local = uses[kernel.name]
                name = _readable(kernel.name)
                code, per_entry = _counted(kernel, name)
                widest = max(code.loads, default=0)
                found.append(Counts(name, registers, stack + local, shared, per_entry, code.count("BAR"), widest))
    return sorted(found, key=lambda row: row.kernel)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of kernels' names; all by default")
    parser.add_argument("--arch", default="90", help="the architecture's number, 90 by default")
    parser.add_argument("--json", action="store_true", help="a list of rows instead of a table")
    options = parser.parse_args(arguments)
    rows = [row for row in report(module(), options.arch) if all(word in row.kernel for word in options.words)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    heads = ("kernel", "registers", "spilled", "shared", "an entry", "barriers", "load")
    print("{:74}{:>10}{:>8}{:>7}{:>9}{:>9}{:>5}".format(*heads))
    for row in rows:
        entry = "" if row.per_entry is None else f"{row.per_entry:.1f}"
        print(
            f"{row.kernel:74}{row.registers:10}{row.spilled:8}{row.shared:7}{entry:>9}{row.barriers:9}{row.widest_load:5}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
