"""What the stages left on disk, read: one `Run` per stage directory, one `Report` for all that is told together."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..data import as_text
from ..disk import lines_of, read_object
from .plots import Series

STAGES = {"sft": "SFT", "reward": "Reward model", "ppo": "PPO", "ppo_ptx": "PPO-ptx", "dpo": "DPO", "kto": "KTO"}
"""Subdirectories of a pipeline in the order in which they run, and how the report calls them."""
COLUMNS = (
    ("gold", "Gold score", "{:z.2f}"),
    ("reward", "Reward model’s score", "{:z.2f}"),
    ("win_rate", "Win rate over SFT", "{:.0f} %"),
    ("kl", "KL from SFT, nats", "{:z.2f}"),
    ("ends_properly", "Ends properly", "{:.0f} %"),
    ("mean_length", "Mean length, tokens", "{:.1f}"),
    ("lm_loss", "Held-out text, nats a token", "{:z.3f}"),
)


@dataclass
class Run:
    """One stage's directory, read."""

    name: str
    stage: str
    config: dict
    summary: dict
    metrics: list[dict]
    samples: list[dict]
    health: list[dict] | None = None  # what the guards of a PPO run told, {"step", "guard", "message"}

    def series(self, *keys: str) -> Series:
        """(steps, values) of the first of `keys` that was ever logged, without the rows where it is not finite."""
        for key in keys:
            rows = [(row["step"], row[key]) for row in self.metrics if finite(row.get(key))]
            if rows:
                return [float(step) for step, _ in rows], [float(value) for _, value in rows]
        return [], []


@dataclass
class Report:
    """Everything that the report of one directory is made of."""

    title: str
    runs: dict[str, Run]
    evaluation: dict = field(default_factory=dict)

    @property
    def policies(self) -> dict[str, Run]:
        return {name: run for name, run in self.runs.items() if run.stage == "ppo"}

    @property
    def table(self) -> list[dict]:
        return self.evaluation.get("policies", [])

    @property
    def kl_budget(self) -> float:
        return float(self.evaluation.get("kl_budget", 10.0))

    @property
    def reward_summary(self) -> dict:
        run = next((run for run in self.runs.values() if run.stage == "reward"), None)
        return run.summary if run else {}

    def responses(self, name: str) -> list[dict]:
        """Rows {prompt, completion, length, score} of a policy: held-out if evaluated, else sampled in training."""
        rows = self.evaluation.get("responses", {}).get(name)
        if rows:
            return [{**row, "score": row["reward"]} for row in rows if finite(row.get("reward"))]
        rows = self.runs[name].samples if name in self.runs else []
        rows = [row for row in rows if finite(row.get("score"))]
        last = max((row["step"] for row in rows), default=0)
        return [{**row, "length": len(row["completion"].split())} for row in rows if row["step"] >= 0.5 * last]


def finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class PairRow(NamedTuple):
    """Held-out pairs of one kind, and how many of them the reward model and the longer-wins rule order right."""

    title: str
    group: str
    pairs: int
    accuracy: float
    longer_wins: float


PAIR_GROUPS = {"k": "K = {}", "gap": "ranks {} apart", "labeler": "labeler {}", "labeler_group": "labelers {}"}
"""What the reward stage measures its pairs by (`eval/accuracy_by_k`, ...), and how a reader is told."""
SHOWN_GROUPS = 9


def pair_rows(summary: dict, only: str | None = None) -> list[PairRow]:
    """The rows of the table of held-out pairs; with `only`, those of one of PAIR_GROUPS.

    Of many labelers, those with the most pairs are shown.
    """
    rows = []
    for name, title in PAIR_GROUPS.items() if only is None else [(only, PAIR_GROUPS[only])]:
        columns = [summary.get(f"eval/{column}_by_{name}") or {} for column in PairRow._fields[2:]]
        most = sorted(columns[0], key=columns[0].get, reverse=True)[:SHOWN_GROUPS]
        shown = [group for group in columns[0] if group in most]
        rows += [PairRow(title.format(group), group, *(column[group] for column in columns)) for group in shown]
    for end, title in (("_judged", "judged one by one"), ("", "all")) if only is None else ():
        if finite(summary.get(f"eval/accuracy{end}")):
            rows.append(PairRow(title, "", *(summary[f"eval/{column}{end}"] for column in PairRow._fields[2:])))
    return rows


def _json_lines(path: Path, *fields: str) -> list[dict]:
    """Rows of a log that hold `fields`; a last line that is still being written is left out."""
    rows = []
    if path.exists():
        for number, line in enumerate(lines_of(path), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if line.endswith("\n"):
                    raise ValueError(f"{path}:{number}: not a line of JSON: {error}") from None
                continue
            lacking = [name for name in fields if not isinstance(row, dict) or name not in row]
            if lacking:
                raise ValueError(f"{path}:{number}: lacks {', '.join(lacking)}; is it the log of a run?")
            rows.append(row)
    return rows


def read_run(directory: Path, name: str) -> Run:
    meta = read_object(directory / "run.json")
    samples = _json_lines(directory / "samples.jsonl", "step", "prompt", "completion")
    return Run(
        name,
        meta.get("stage", "?"),
        meta.get("config") or {},
        meta.get("summary") or {},
        _json_lines(directory / "metrics.jsonl", "step"),
        [{**row, "prompt": as_text(row["prompt"])} for row in samples],
        meta.get("health"),
    )


def read_report(run_dir: str | Path) -> Report:
    """Read a stage's directory, or a pipeline's with stage directories in it.

    Raises:
        ValueError: the directory does not exist or holds no run.
    """
    run_dir = Path(run_dir).expanduser()
    if not run_dir.is_dir():
        raise ValueError(f"run_dir must be the directory of a run, got {str(run_dir)!r}, which does not exist")
    known = list(STAGES)
    found = [run_dir] if (run_dir / "run.json").exists() else [path.parent for path in run_dir.glob("*/run.json")]
    if not found:
        raise ValueError(
            f"run_dir holds no run: neither {run_dir / 'run.json'} nor a stage's folder with a run.json was found"
        )
    found.sort(key=lambda path: (known.index(path.name) if path.name in known else len(known), path.name))
    runs = {}
    for path in found:
        run = read_run(path, path.name)
        run.name = STAGES.get(path.name) or (STAGES.get(run.stage) if len(found) == 1 else None) or path.name
        runs[run.name] = run
    evaluation = run_dir / "evaluation.json"
    return Report(
        run_dir.resolve().name,
        runs,
        read_object(evaluation) if evaluation.exists() else {},
    )


def cell(key: str, form: str, value) -> str:
    """One entry of the table as text: '–' when it was not measured, the interval after a win rate."""
    if value is None:
        return "–"
    if key == "win_rate":
        return f"{form.format(100 * value['rate'])} ({100 * value['low']:.0f}–{100 * value['high']:.0f})"
    if key == "ends_properly":
        value = 100 * value
    return form.format(value)
