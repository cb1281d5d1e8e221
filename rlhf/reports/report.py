"""`rlhf report RUN_DIR`: one self-contained report.html about one stage, or about a whole pipeline.

What it shows, in this order: the table of policies, the health of the run (every failure mode with its number and a
verdict), sample completions side by side, and the plots. It reads only the files that the stages leave behind
(`run.json`, `metrics.jsonl`, `samples.jsonl`, and `evaluation.json` of a pipeline), so it can be written again at any
time, also while a stage runs.
"""

from collections.abc import Sequence
from pathlib import Path

from ..disk import write_bytes
from ..settings import ToolParser
from .page import render
from .runs import COLUMNS, cell, read_report


def text_table(policies: Sequence[dict]) -> str:
    """The table of policies for a terminal: one line per policy; columns without any number are left out."""
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in policies)]
    heads = ["", *(title for _, title, _ in columns)]
    body = [[row["name"], *(cell(key, form, row.get(key)) for key, _, form in columns)] for row in policies]
    heads = [
        head.replace("Reward model’s score", "RM score").replace("Held-out text, nats a token", "LM loss")
        for head in heads
    ]
    widths = [max(len(row[i]) for row in (heads, *body)) for i in range(len(heads))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(row, widths))
        )
        for row in (heads, *body)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_report(run_dir: str | Path) -> Path:
    """Write `<run_dir>/report.html` from the files in `run_dir` and return its path.

    Args:
        run_dir: directory of one stage (with run.json), or of a pipeline (with stage directories in it).
    Returns:
        Path of the report: one HTML file with its plots inside.
    Raises:
        ValueError: run_dir does not exist, holds no run, or a log line is not JSON.
        WriteError: the report could not be written.
    """
    page = render(read_report(run_dir))
    path = Path(run_dir).expanduser() / "report.html"
    write_bytes(path, page.encode("utf-8", errors="backslashreplace"))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = ToolParser(prog="rlhf report", description="Write report.html for a run.")
    parser.add_argument("run_dir", help="output directory of a stage, of `rlhf pipeline` or of `rlhf demo`")
    args = parser.parse_args(argv)
    try:
        print(write_report(args.run_dir))
    except ValueError as error:
        parser.exit(2, f"rlhf report: {error}\n")
    return 0
