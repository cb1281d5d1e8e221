"""Goals, tables and figures of the README and the docs, from one results file.

FILE is by default the one in benchmarks/results that was measured last.
    python -m benchmarks.plot [FILE]           rewrites the tables in README.md, docs/benchmarks.md, docs/ops/linear.md
                                               and docs/integrations/measured.md, and the figures in docs/figures
    python -m benchmarks.plot [FILE] --goals   prints goal, measured, met or missed by how much
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from dataclasses import asdict
from pathlib import Path

from benchmarks import before_after, figures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
TRAINERS = ROOT / "docs" / "integrations" / "measured.md"
FIGURES = ROOT / "docs" / "figures"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
RATES = {"gb_s": "GB/s", "tflop_s": "TFLOP/s"}
TABLE_HEAD = "| call | shape | ms | MiB | error | beside the goals | others take | |\n|---|---|---|---|---|---|---|---|"
SHOWN = (  # of the README: an op's row, and the row whose time counts as 1 in the figure
    ("logprobs_from_logits-fwd-fp32-512x151936", "eager"),
    ("logprobs_and_entropy_from_logits-fwdbwd-fp32-512x151936", "eager"),
    ("kl_from_logits-fwd-fp32-512x151936", "eager"),
    ("cross_entropy_from_logits-fwdbwd-fp32-512x151936", "eager"),
    ("linear_cross_entropy-fwdbwd-fp32-2048x768x50257", "eager"),
    ("linear_jsd-fwdbwd-fp32-512x768x50257", "eager"),
    ("gae-fwd-fp32-1024x8192", "eager"),
    ("ppo_loss-fwdbwd-fp32-512x1024", "eager"),
    ("bradley_terry_loss-fwdbwd-fp32-16384x9", "eager"),
    ("policy_loss-fwdbwd-fp32-512x1024-gspo", "eager"),
    ("preference_loss-fwdbwd-fp32-65536-sigmoid", "eager"),
    ("linear_kept_logprobs-fwdbwd-fp32-256x768x50257x20", "eager"),
    ("pack_responses-fwdbwd-fp32-512x64x9x768", "rows"),
    ("ppo_iteration-fwdbwd-fp32-64x53x2048x4-demo", "trl"),
)
# Functions that came after the last run of all benchmarks on the machine of the results file. Figures of one run on
# another machine stand on the pages of their ops; a run of all of them empties this.
UNMEASURED = (
    "cross_entropy_from_logits", "kept_logprobs_from_logits", "linear_jsd", "linear_kept_logprobs",
    "linear_policy_loss", "linear_preference_loss", "linear_token_statistics", "linear_topk_kl", "masked_whiten",
    "pad_kept", "policy_loss", "token_statistics_from_logits", "unpaired_preference_loss", "value_loss", "wpo_weights",
)  # fmt: skip
SHORT_TEXT = (
    "fp32, forward + backward where not said otherwise. ms is ours; then, how many times as long the others take.",
    "All rows: [docs/benchmarks.md](docs/benchmarks.md), [in other trainers](docs/integrations/measured.md).",
)
SHORT_HEAD = "| call | shape | ms | eager | compile | others | goals |\n|---|---|---|---|---|---|---|"
NOTHING = "Nothing is measured yet; `make bench` fills this part."


def group_name(group: dict) -> str:
    """The group as pytest-benchmark names it."""
    return "-".join(group[key] for key in ("function", "direction", "dtype", "shape"))


def as_groups(measured: dict) -> list[dict]:
    """Plain data of {case: {implementation: row}}, without the single times; failed cases are left out."""
    groups = []
    for case, rows in measured.items():
        if None in rows:
            continue
        groups.append(
            {
                "op": case.op, "function": case.function, "direction": case.direction, "dtype": case.dtype,
                "shape": case.shape, "sizes": case.sizes, "scale": case.scale,
                "goals": [asdict(goal) for goal in case.goals],
                "rows": {name: _short(row) for name, row in rows.items()},
            }
        )  # fmt: skip
    return groups


def _short(row: dict) -> dict:
    """Four digits are more than a clock gives."""
    short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items() if k != "seconds"}
    return short | ({"errors": _short(row["errors"])} if "errors" in row else {})


def judge(group: dict, goal: dict) -> tuple[float | None, float | str]:
    """(measured, miss): miss is 0 where the goal is met, else by what share of the bound, or why nobody knows."""
    rows = [group["rows"].get(name, {"skipped": "not measured"}) for name in (goal["impl"], goal["than"])]
    for row in rows:
        if "skipped" in row:
            return None, row["skipped"]
    key = "peak_mib" if goal["kind"] == "memory" else "ms"
    own, other = (row[key] for row in rows)
    if own is None or other is None:
        return None, "this system does not tell the peak memory"
    if goal["kind"] == "faster":
        return other / own, max(1 - other / own / goal["bound"], 0.0)
    share = own / max(other, 1e-9)
    return share, max(share / goal["bound"] - 1, 0.0)


def _phrase(goal: dict, number: float | None) -> str:
    value = "?" if number is None else _number(number)
    relation = "≥" if goal["kind"] == "faster" else "≤"
    what = {"faster": "{v} × {t}", "within": "{v} × the time of {t}", "memory": "{v} × the memory of {t}"}[goal["kind"]]
    return f"{what.format(v=value, t=goal['than'])} ({relation} {_number(goal['bound'])})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _verdict(goal: dict, miss: float | str) -> str:
    what = f"memory of {goal['than']}" if goal["kind"] == "memory" else goal["than"]
    return f"{what}: {miss}" if isinstance(miss, str) else f"{what} by {100 * miss:.2g} %"


def goal_lines(groups: list[dict]) -> list[str]:
    """One line a goal: where, what was measured and wanted, met or missed by how much."""
    lines = []
    for group in groups:
        for goal in group["goals"]:
            measured, miss = judge(group, goal)
            end = "met" if miss == 0 else f"missed: {_verdict(goal, miss)}"
            lines.append(f"{group_name(group)} [{goal['impl']}]: {_phrase(goal, measured)}: {end}")
    return lines


def load(path: Path) -> dict:
    """The results file, or an empty one."""
    return json.loads(path.read_text()) if path.exists() else {"machine": {}, "runs": {}, "groups": []}


def merge(path: Path, machine: dict, run: dict, groups: list[dict]) -> None:
    """Replace everything of the ops in `groups`, keep the rest; one row stands on one line."""
    data = load(path)
    if data["machine"] and data["machine"] != machine:
        data = {"machine": {}, "runs": {}, "groups": []}  # rows of two machines never stand beside each other
    ops = list(dict.fromkeys(group["op"] for group in groups))
    data["machine"] = machine
    data["runs"] |= dict.fromkeys(ops, run)
    data["groups"] = sorted([g for g in data["groups"] if g["op"] not in ops] + groups, key=lambda g: g["op"])
    lines = ['{"machine": ' + json.dumps(machine) + ",", '"runs": {']
    lines += _joined([f" {json.dumps(op)}: {json.dumps(facts)}" for op, facts in sorted(data["runs"].items())])
    lines += ["},", '"groups": [']
    blocks = []
    for group in data["groups"]:
        head = json.dumps({key: value for key, value in group.items() if key != "rows"})[:-1]
        rows = _joined([f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in group["rows"].items()])
        blocks.append("\n".join([f' {head}, "rows": {{', *rows, " }}"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, *_joined(blocks), "]}", ""]))


def _joined(lines: list[str]) -> list[str]:
    return [line + "," for line in lines[:-1]] + lines[-1:]


def the_file() -> Path | None:
    """The results file that the README shows: the one measured last; None if there is none."""
    dated = [(max(run["date"] for run in load(path)["runs"].values()), path) for path in RESULTS.glob("*.json")]
    return max(dated)[1] if dated else None


def shown(groups: list[dict]) -> list[tuple[dict, str]]:
    """(group, baseline) of the README's table and figure."""
    named = {group_name(group): group for group in groups}
    return [(named[name], than) for name, than in SHOWN if name in named]


def readme_block(path: Path | None) -> str:
    """What stands between the README's two marks: a row of each op."""
    if path is None:
        return NOTHING + "\n"
    data = load(path)
    lines = [*_machine(data), *SHORT_TEXT, "", SHORT_HEAD]
    lines += [_short_line(group, than) for group, than in shown(data["groups"])]
    lines += before_after.short_table(data["groups"])
    return "\n".join(lines) + "\n"


def page_block(path: Path | None) -> str:
    """What stands between the two marks of docs/benchmarks.md: every row with a goal, the steps, the curves."""
    if path is None:
        return NOTHING + "\n"
    data = load(path)
    lines = [*_heading(data, path), "", TABLE_HEAD]
    for group in data["groups"]:
        for impl in dict.fromkeys(goal["impl"] for goal in group["goals"]):
            lines.append(_table_line(group, impl))
    lines += step_table(data["groups"])
    skipped = _skipped(data["groups"])
    if skipped:
        lines += ["", f"Not run there: {'; '.join(skipped)}."]
    if figures.curves(data["groups"]):
        lines += ["", "## Cost as one size is doubled three times", "", "![time and peak memory](figures/scale.svg)"]
    return "\n".join(lines) + "\n"


def trainers_block(path: Path | None) -> str:
    """What stands between the two marks of docs/integrations/measured.md: steps of other trainers, before and after."""
    data = {} if path is None else load(path)
    tables = before_after.page(data.get("groups", []))
    if not tables:
        return NOTHING + "\n"
    run, machine = data["runs"]["integrations"], data["machine"]
    heading = (
        f"{machine['cpu']} ({machine['isa']}), torch {run['torch']}, commit {run['commit']}, {run['date']}: "
        f"`{run['command']}`."
    )
    return "\n".join([heading, "", *tables]) + "\n"


def step_table(groups: list[dict]) -> list[str]:
    """Reward-model steps on one prompt: tokens computed, time and memory of the shared row beside all other ways."""
    steps = [g for g in groups if g["function"] == "pack_responses" and not g["scale"]]
    if not steps:
        return []
    lines = [
        "",
        "## A reward model's step",
        "",
        "A reward model's step on one prompt with K ranked responses (`pack_responses`, forward + backward, two layers",
        "of width 768): the prompt once, K rows, all K (K - 1) / 2 pairs apart, TRL's RewardTrainer on those pairs.",
        "Scores and gradients are compared in the same run.",
        "",
        "| prompt, response, K | tokens: shared, rows, pairs | ms | K rows take | pairs take | TRL takes "
        "| MiB: shared, rows, pairs, TRL |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in sorted(steps, key=lambda g: [g["sizes"][name] for name in ("prompt", "response", "K")]):
        prompt, response, k = (group["sizes"][name] for name in ("prompt", "response", "K"))
        tokens = (prompt + k * response, k * (prompt + response), k * (k - 1) * (prompt + response))
        rows = group["rows"]
        own = rows["ours"]["ms"]
        others = [rows.get(name, {}) for name in ("rows", "pairs", "trl")]
        times = [f"{_number(row['ms'] / own)} ×" if "ms" in row else "" for row in others]
        peaks = [_number(row["peak_mib"]) if "peak_mib" in row else "–" for row in (rows["ours"], *others)]
        cells = [f"{prompt}, {response}, {k}", ", ".join(map(str, tokens)), _number(own), *times, ", ".join(peaks)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _machine(data: dict) -> list[str]:
    """Machine, versions, commits and commands of a results file."""
    machine, runs = data["machine"], data["runs"]
    told = {key: ", ".join(sorted({str(run[key]) for run in runs.values()})) for key in ("torch", "threads", "commit")}
    days = ", ".join(sorted({run["date"].split()[0] for run in runs.values()}))
    text = (
        f"{machine['cpu']} ({machine['isa']}), {machine['cores']} cores, {told['threads']} threads, "
        f"torch {told['torch']}, commit {told['commit']}, {days}: `make bench` "
        "(`ppo_iteration`: `OP=train_ppo`; TRL's trainers: `make bench-integrations`)."
    )
    whole = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), text)  # code is not broken
    return [line.replace("\0", " ") for line in textwrap.wrap(whole, 118, break_on_hyphens=False)]


def _heading(data: dict, path: Path) -> list[str]:
    return [
        *_machine(data),
        f"All rows are in `{path.relative_to(ROOT).as_posix()}`. Implementations of a row take turns in one run, and",
        "the best time of each counts: `9 × eager` is nine times as fast as eager PyTorch. `read` is `x.amax()` of the",
        "inputs, `copy` a copy of as many bytes, `matmuls` the op's own matrix products. In brackets stands the goal.",
        "MiB is the peak on top of the inputs, error the worst against float64, of outputs and gradients, relative to",
        "a tensor's largest entry.",
    ]


def _short_line(group: dict, than: str) -> str:
    """A row of the README: our time, and how many times it the others take."""
    rows = group["rows"]
    own = rows["ours"]["ms"]
    times = {name: _number(row["ms"] / own) for name, row in rows.items() if "ms" in row}
    apart = ("ours", "eager", "compile", "dense", *figures.ROOFS)
    others = [name for name in times if name.partition("-")[0] not in apart or name == "eager-loop"]
    direction = ", forward" if group["direction"] == "fwd" else ""
    misses = [judge(group, goal)[1] for goal in group["goals"] if goal["impl"] == "ours"]
    missed = sum(miss != 0 for miss in misses)
    cells = [
        f"`{group['function']}`{direction}",
        group["shape"],
        _number(own),
        times.get("eager", ""),
        times.get("compile", ""),
        ", ".join(f"{figures.NAMES.get(name, name)} {times[name]}" for name in others),
        f"{missed} of {len(misses)} missed" if missed else "met" if misses else "none set",
    ]
    return f"| {' | '.join(cells)} |"


def _table_line(group: dict, impl: str) -> str:
    row = group["rows"].get(impl, {"skipped": "not measured"})
    call = (
        f"`{group['function']}`, {figures.PASSES[group['direction']]}{impl.removeprefix('ours').replace('-', ', ', 1)}"
    )
    goals = [(goal, *judge(group, goal)) for goal in group["goals"] if goal["impl"] == impl]
    missed = ", ".join(_verdict(goal, miss) for goal, _, miss in goals if miss != 0)
    cells = [
        f"{call}, {group['dtype']}",
        group["shape"],
        *_figures(row),
        ", ".join(_phrase(goal, measured) for goal, measured, _ in goals),
        _peers(group, row),
        f"missed: {missed}" if missed else "met",
    ]
    return f"| {' | '.join(cells)} |"


def _figures(row: dict) -> tuple[str, str, str]:
    """(ms and rate, peak MiB, worst error) of a row, as text."""
    if "skipped" in row:
        return row["skipped"], "", ""
    rate = next((f" ({_number(row[key])} {unit})" for key, unit in RATES.items() if key in row), "")
    worst = max((row[key] for key in ("error", "grad_error") if row.get(key) is not None), default=None)
    peak = "" if row.get("peak_mib") is None else _number(row["peak_mib"])
    return _number(row["ms"]) + rate, peak, "" if worst is None else f"{worst:.0e}"


def _peers(group: dict, row: dict) -> str:
    """How much longer everything takes that no goal names."""
    named = {*figures.ROOFS, *(goal["than"] for goal in group["goals"])}
    others = {name: other for name, other in group["rows"].items() if name not in named and not name.startswith("ours")}
    return ", ".join(
        f"{name} {_number(other['ms'] / row['ms'])} ×"
        for name, other in others.items()
        if "ms" in other and "ms" in row
    )


def _skipped(groups: list[dict]) -> list[str]:
    """Implementations that ran nowhere, each with its reason."""
    ran = {name for group in groups for name, row in group["rows"].items() if "skipped" not in row}
    reasons = {
        name: row["skipped"] for group in groups for name, row in group["rows"].items() if "skipped" in row
    }  # fmt: skip
    return [f"{name} ({reason})" for name, reason in sorted(reasons.items()) if name not in ran]


def errors_block(groups: list[dict]) -> str:
    """The table of named errors: a line for each implementation, beside its time and peak memory."""
    named = [group for group in groups if any("errors" in row for row in group["rows"].values())]
    columns = list(dict.fromkeys(key for g in named for row in g["rows"].values() for key in row.get("errors", ())))
    lines = [f"| call | ms | MiB | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
    for group in named:
        for name, row in group["rows"].items():
            if "errors" in row:
                cells = [f"{row['errors'][key]:.1e}" if key in row["errors"] else "" for key in columns]
                call = f"`{group['function']}`, {group['dtype']}, {group['shape']}: {name}"
                lines.append(f"| {call} | {_number(row['ms'])} | {_figures(row)[1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if named else NOTHING + "\n"


def replace_block(page: Path, begin: str, end: str, block: str) -> None:
    """Replace what stands between two marks of a page."""
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{block}{end}{after}")


def write_pages(path: Path | None) -> None:
    """The tables of the README, of docs/benchmarks.md and of docs/integrations, and the errors in docs/ops."""
    replace_block(README, BEGIN, END, readme_block(path))
    replace_block(PAGE, BEGIN, END, page_block(path))
    replace_block(TRAINERS, BEGIN, END, trainers_block(path))
    if path is not None:
        marks = (mark.replace("benchmarks", "errors") for mark in (BEGIN, END))
        replace_block(ROOT / "docs" / "ops" / "linear.md", *marks, errors_block(load(path)["groups"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="results file; default: the one in benchmarks/results")
    parser.add_argument("--goals", action="store_true", help="print the goals instead")
    arguments = parser.parse_args()
    path = arguments.file.resolve() if arguments.file else the_file()
    if path is None:
        print(NOTHING)
        return
    groups = load(path)["groups"]
    if arguments.goals:
        print("\n".join(goal_lines(groups)))
        return
    FIGURES.mkdir(exist_ok=True)
    figures.draw_curves(groups, FIGURES / "scale.svg")
    machine = "{cpu}, {cores} cores".format_map(load(path)["machine"])
    for theme in figures.THEMES:
        figures.draw_bars(shown(groups), machine, FIGURES / f"speed-{theme}.svg", theme)
    write_pages(path)


if __name__ == "__main__":
    main()
