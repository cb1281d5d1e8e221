"""The four files of gpu_compare.sh side by side: python -m benchmarks.gpu_compare OUTDIR A B

Of each call and implementation: ms of A and of B, each the lesser of its two turns, their ratio, and how far apart the
two turns of one version lie. A ratio nearer to 1 than that is noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TURNS = ("a-1", "b-1", "a-2", "b-2")


def times(file: Path) -> dict[tuple[str, str, str], float]:
    """{(call, shape, implementation): ms} of a results file; nothing of a turn that left none."""
    if not file.exists():
        return {}
    return {
        (call["call"], call["shape"], name): figures["ms"]
        for call in json.loads(file.read_text())["calls"]
        for name, figures in call.get("rows", {}).items()
        if "ms" in figures
    }


def lines(folder: Path) -> list[str]:
    """A line for each call that both versions made at least once."""
    turns = [times(folder / f"{name}.json") for name in TURNS]
    told = []
    for key in dict.fromkeys(key for turn in turns for key in turn):
        a, b = ([turn[key] for turn in turns[side::2] if key in turn] for side in (0, 1))
        if a and b:
            spread = max(max(x) / min(x) - 1 for x in (a, b))
            ratio = min(a) / min(b)
            note = "  noise" if abs(ratio - 1) <= spread else ""
            name = f"{key[0]:45} {key[1]:18} {key[2]:13}"
            told.append(f"{name} {min(a):10.4f} -> {min(b):10.4f} ms  {ratio:6.3f} x  turns apart {spread:.1%}{note}")
    return told


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("a", help="the first version")
    parser.add_argument("b", help="the second")
    parser.add_argument("--dry-run", action="store_true", help="there are no files")
    options = parser.parse_args(arguments)
    print(f"{options.a} -> {options.b}")
    found = lines(options.folder)
    print("\n".join(found))
    if not found and not options.dry_run:
        raise SystemExit(f"no call of both versions in {options.folder}")


if __name__ == "__main__":
    main()
