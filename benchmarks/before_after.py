"""Tables of other trainers' steps with their own functions and with ours, from the groups of a results file."""

from __future__ import annotations

TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")
STEP_HEAD = (
    "| trainer | ms | TRL on labels takes | TRL takes | without the backbone | MiB: backbone, ours, on labels, TRL |",
    "|---|---|---|---|---|---|",
)
CALL_HEAD = ("| call | shape | ms | the peer takes | MiB: ours, the peer |", "|---|---|---|---|---|")


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(rows: dict, ours: str, other: str, less: float = 0.0) -> str:
    """How many times as long as ours the other takes, both less the backbone's ms; "" where either has not run."""
    if "ms" not in rows.get(ours, {}) or "ms" not in rows.get(other, {}):
        return ""
    own, theirs = (rows[name]["ms"] - less for name in (ours, other))
    return f"{number(theirs / own)} ×" if own > 0 else "–"


def _measured(groups: list[dict]) -> list[dict]:
    return [g for g in groups if g["op"] == "integrations" and "ms" in g["rows"]["ours"]]


def _ours(group: dict) -> list[str]:
    return [name for name in group["rows"] if name in ("ours", "ours-fast")]


def _peaks(rows: dict, names: tuple[str, ...]) -> str:
    return ", ".join(
        number(rows[name]["peak_mib"]) if rows[name].get("peak_mib") is not None else "–" for name in names
    )


def _steps(groups: list[dict]) -> list[dict]:
    return [g for g in _measured(groups) if g["function"].removeprefix("trl_") in TRAINERS]


def step_table(groups: list[dict]) -> list[str]:
    """A line for each step of a trainer of TRL and each precision of ours."""
    lines = list(STEP_HEAD)
    for group in _steps(groups):
        rows = group["rows"]
        for ours in _ours(group):
            less = rows["backbone"]["ms"]
            beyond = [_times(rows, ours, other, less) for other in ("trl-labels", "trl")]
            name = f"{group['function'].removeprefix('trl_').upper()}, {group['dtype']}"
            cells = [
                name + ours.removeprefix("ours").replace("-", ", "),
                number(rows[ours]["ms"]),
                _times(rows, ours, "trl-labels"),
                _times(rows, ours, "trl"),
                ", ".join(beyond),
                _peaks(rows, ("backbone", ours, "trl-labels", "trl")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def call_table(groups: list[dict]) -> list[str]:
    """A line for everything else: TRL's head alone, the actors of verl and OpenRLHF, their GAE."""
    lines = list(CALL_HEAD)
    steps = _steps(groups)
    for group in _measured(groups):
        if group in steps:
            continue
        rows, peer = group["rows"], group["function"].partition("_")[0]
        for ours in _ours(group):
            name = f"`{group['function']}`, {group['dtype']}" + ours.removeprefix("ours").replace("-", ", ")
            peaks = _peaks(rows, (ours, peer))
            cells = [name, group["shape"], number(rows[ours]["ms"]), _times(rows, ours, peer), peaks]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def short_table(groups: list[dict]) -> list[str]:
    """The README's: a column for each trainer of TRL; fp32, then bf16 with precision="fast"."""
    found = {(g["function"].removeprefix("trl_"), g["dtype"]): g["rows"] for g in _steps(groups)}
    kinds = [kind for kind in TRAINERS if (kind, "fp32") in found and (kind, "bf16") in found]
    if not kinds:
        return []
    names = " | ".join(kind.upper() for kind in kinds)
    lines = [
        f"| a step of TRL's trainer, fp32; bf16 with `precision='fast'` | {names} |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for other, text in (("trl", "TRL as it is takes"), ("trl-labels", "TRL on labels alone takes")):
        times = (
            f"{_times(found[kind, 'fp32'], 'ours', other)}; {_times(found[kind, 'bf16'], 'ours-fast', other)}"
            for kind in kinds
        )
        lines.append(f"| {text} | {' | '.join(times)} |")
    peaks = (_peaks(found[kind, "fp32"], ("ours", "trl-labels", "trl")) for kind in kinds)
    lines.append(f"| MiB, fp32: ours, labels, as it is | {' | '.join(peaks)} |")
    return ["", *lines]


def page(groups: list[dict]) -> list[str]:
    """Both tables, or nothing where nothing is measured."""
    if not _measured(groups):
        return []
    return [*step_table(groups), "", *call_table(groups)]
