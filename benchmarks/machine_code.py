"""What a GPU's machine code does, counted without a GPU: instructions, barriers, and how wide memory is read.

    python -m benchmarks.machine_code FILE.cubin

`nvdisasm`, of triton's package or of the CUDA toolkit, prints the code. A loop is a block of code with every block that
leads back to it. A turn is counted along its cheapest way, so what a turn seldom does (a new maximum) is left out; a
whole kernel along its dearest way, each loop taken once. What a predicate skips is counted: it is issued all the same.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"^(@!?U?P\w+\s+)?(BRA|BRX|JMP|EXIT|RET|BREAK)\b.*?(?:`\((\.L_\w+)\))?$")
CONDITION = re.compile(r"BRA(\.DIV|\.CONV|(\.\w+)*\s+!?U?P)")  # that a branch has as an operand
ACCESS = re.compile(r"\b(LDG|STG|LDGSTS|LD|ST)\.E(?=[.\s])([.\w]*)")


@dataclass(frozen=True)
class Code:
    """Instructions in the order in which they run."""

    lines: tuple[str, ...]

    @property
    def instructions(self) -> int:
        return len(self.lines)

    def count(self, operation: str) -> int:
        """How often an operation such as BAR, SHFL or MUFU.EX2 occurs."""
        return sum(re.search(rf"(^|\s){re.escape(operation)}(?=[.\s]|$)", line) is not None for line in self.lines)

    def widths(self, *operations: str) -> list[int]:
        """Bytes a thread of each access to global memory by LDG, STG or LDGSTS (which copies to shared memory)."""
        found = []
        for line in self.lines:
            access = ACCESS.search(line)
            if access and access[1] in operations:
                wide = re.search(r"\.(256|128|64)\b", access[2])
                narrow = re.search(r"\.[US](8|16)\b", access[2])
                found.append(int(wide[1]) // 8 if wide else int(narrow[1]) // 8 if narrow else 4)
        return found

    @property
    def loads(self) -> list[int]:
        return self.widths("LDG", "LDGSTS", "LD")

    @property
    def stores(self) -> list[int]:
        return self.widths("STG", "ST")


@dataclass(frozen=True)
class Kernel:
    """A kernel's blocks of instructions, and which block may follow which."""

    name: str
    blocks: tuple[tuple[str, ...], ...]
    followers: tuple[tuple[int, ...], ...]

    @property
    def all(self) -> Code:
        return Code(tuple(line for block in self.blocks for line in block))

    def _reached(self, start: int, without: int | None = None) -> set[int]:
        found, waiting = set(), [start]
        while waiting:
            block = waiting.pop()
            if block != without and block not in found:
                found.add(block)
                waiting += self.followers[block]
        return found

    def _loops(self) -> list[tuple[int, set[int]]]:
        """(first block, all blocks) of each loop."""
        there = self._reached(0)
        leaders = {i: [j for j in there if i in self.followers[j]] for i in there}
        found: dict[int, set[int]] = {}
        for head in sorted(there):
            within = there - self._reached(0, head)  # blocks that are reached through this one alone
            body, waiting = {head}, [i for i in leaders[head] if i in within]
            if not waiting:
                continue
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += leaders[block]
            found[head] = body
        return list(found.items())

    def loops(self) -> list[Code]:
        """A turn of each innermost loop, the one that reads most of global memory first."""
        loops = self._loops()
        inner = [(head, body) for head, body in loops if not any(other < body for _, other in loops)]
        turns = [self._turn(head, body) for head, body in inner]
        return sorted(turns, key=lambda turn: (-sum(turn.loads), -turn.instructions))

    def _turn(self, head: int, body: set[int]) -> Code:
        """The cheapest way around a loop."""
        best: dict[int, tuple[int, list[int]]] = {head: (len(self.blocks[head]), [head])}
        waiting, turns = [head], []
        while waiting:
            block = waiting.pop()
            cost, way = best[block]
            for after in self.followers[block]:
                if after == head:
                    turns.append((cost, way))
                elif after in body:
                    more = cost + len(self.blocks[after])
                    if after not in best or more < best[after][0]:
                        best[after] = more, [*way, after]
                        waiting.append(after)
        _cost, way = min(turns)
        return Code(tuple(line for block in way for line in self.blocks[block]))

    def once(self, *, cheapest: bool = False) -> Code:
        """The dearest (or cheapest) way from the first instruction to the end, without a second turn of any loop."""
        heads = dict(self._loops())
        ways: dict[int, tuple[str, ...]] = {}

        def way(block: int) -> tuple[str, ...]:
            if block not in ways:
                ways[block] = ()
                onward = [i for i in self.followers[block] if not (i in heads and block in heads[i])]
                rest = (min if cheapest else max)((way(i) for i in onward), key=len, default=())
                ways[block] = self.blocks[block] + rest
            return ways[block]

        return Code(way(0))


def parse(text: str) -> list[Kernel]:
    """The kernels of what `nvdisasm -c` printed."""
    kernels = []
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition(":")
        blocks: list[list[str]] = [[]]
        labels: dict[str, int] = {}
        for line in body.splitlines():
            if line.startswith(".L_"):
                if blocks[-1]:
                    blocks.append([])
                labels[line.strip().rstrip(":")] = len(blocks) - 1
            elif found := INSTRUCTION.match(line):
                blocks[-1].append(found[1])
                if BRANCH.match(found[1]):
                    blocks.append([])
        followers = []
        for index, block in enumerate(blocks):
            branch = BRANCH.match(block[-1]) if block else None
            after = [labels[branch[3]]] if branch and branch[3] in labels else []
            if (branch is None or branch[1] or CONDITION.search(block[-1])) and index + 1 < len(blocks):
                after.append(index + 1)
            followers.append(tuple(after))
        kernels.append(Kernel(name, tuple(tuple(block) for block in blocks), tuple(followers)))
    return kernels


def tool() -> str:
    """nvdisasm of triton's package, else the one on the path."""
    try:
        import triton.backends.nvidia as nvidia
    except ImportError:
        nvidia = None
    inside = Path(nvidia.__file__).parent / "bin" / "nvdisasm" if nvidia is not None else None
    found = str(inside) if inside is not None and inside.exists() else shutil.which("nvdisasm")
    if found is None:
        raise RuntimeError("no nvdisasm: it comes with the package triton and with the CUDA toolkit")
    return found


def kernels(cubin: Path) -> list[Kernel]:
    """The kernels of a cubin."""
    done = subprocess.run([tool(), "-c", str(cubin)], capture_output=True, text=True, check=True)
    return parse(done.stdout)


def main() -> None:
    for kernel in kernels(Path(sys.argv[1])):
        parts = [("once", kernel.once()), *(("a turn", turn) for turn in kernel.loops())]
        for what, code in parts:
            counts = ", ".join(f"{name} {code.count(name)}" for name in ("BAR", "SHFL", "MUFU"))
            print(f"{kernel.name} {what}: {code.instructions} instructions, {counts}, loads of {code.loads} bytes")


if __name__ == "__main__":
    main()
