"""The benchmarks agree with the ops, with float64 and with what the README shows of them; nothing is timed here."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import rlhf_kernels
from benchmarks import before_after, cases, figures, overhead, plot, roof
from benchmarks.cases import Bench, Case, Skip, faster, memory, within
from benchmarks.worker import Worker
from rlhf_kernels import dispatch
from tests.test_build import LINEAR

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("benchmarks/test_*.py"))
NAMES = [path.stem.removeprefix("test_") for path in FILES]


def module(name):
    return importlib.import_module(f"benchmarks.test_{name}")


def kinds(op):
    """One tiny case for each way in which the op's cases are built."""
    found = {}
    for case in module(op).CASES:
        found.setdefault((case.function, case.direction, case.dtype, case.variant), case.tiny())
    return list(found.values())


def test_every_op_is_measured_and_every_file_has_its_tests():
    assert set(dispatch.TABLE) <= set(NAMES)
    assert [name for name in NAMES if not [*ROOT.glob(f"tests/**/test_{name}.py")]] == []
    functions = {
        name for name in rlhf_kernels.__all__
        if inspect.isfunction(getattr(rlhf_kernels, name))
        and getattr(rlhf_kernels, name).__module__.rpartition(".")[2] in {*NAMES, *LINEAR}
    }  # fmt: skip
    measured = {case.function for op in dispatch.TABLE for case in module(op).CASES}
    assert measured == functions


@pytest.mark.parametrize("name", NAMES)
def test_cases_are_whole(name):
    measured = module(name)
    groups = [case.group for case in measured.CASES]
    assert len(groups) == len(set(groups))
    for case in measured.CASES:
        assert case.op == name and case.direction in ("fwd", "fwdbwd") and case.dtype in cases.DTYPES
        assert callable(getattr(measured, f"test_{case.function}"))
        assert case.impls[0] == "ours" and len(case.impls) == len(set(case.impls))
        assert {name for goal in case.goals for name in (goal.impl, goal.than)} <= set(case.impls)
        assert not case.scale or case.scale in case.sizes
    tests = {name.removeprefix("test_") for name in vars(measured) if name.startswith("test_")}
    assert tests == {case.function for case in measured.CASES}


def test_no_file_imports_one_that_imports_it():
    """Imports among benchmarks/*.py, those inside functions too, lead to no circle."""
    names = {path.stem for path in ROOT.glob("benchmarks/*.py")}
    imports = {name: imported(ROOT / "benchmarks" / f"{name}.py") & names for name in sorted(names)}
    assert "cases" in imports["worker"] and "worker" not in imports["cases"]
    while leaves := [name for name, others in imports.items() if not others & imports.keys()]:
        for name in leaves:
            del imports[name]
    assert not imports, f"in a circle, or before one: {imports}"


def imported(path):
    """Names of the modules of benchmarks that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("benchmarks.")}
    return found


def test_pytest_collects_them():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "benchmarks", "-p", "no:cacheprovider"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "benchmarks/test_advantages.py::test_gae[ours-fwd-fp32-256x4096]" in listing, listing
    rows = sum(len(case.impls) for name in NAMES for case in module(name).CASES)
    assert len(re.findall(r"^benchmarks/test_\w+\.py::test_\w+\[", listing, flags=re.MULTILINE)) == rows


@pytest.mark.parametrize("op", dispatch.TABLE)
def test_implementations_compute_the_same(op):
    """Everything that runs here, at tiny sizes, against float64; half types are rounded by PyTorch's expressions."""
    for case in kinds(op):
        torch.manual_seed(0)
        bench = case.build(case)
        assert set(bench.calls) == set(case.impls), case.group
        exact = bench.exact()
        for name, call in bench.calls.items():
            if isinstance(call, Skip):
                assert call.reason, f"{case.group}: {name} is skipped without a reason"
                continue
            if isinstance(call, Worker) or name.startswith("compile"):
                continue
            result = cases.implementation(call).run()
            if result is None:
                assert name in figures.ROOFS
                continue
            result = bench.part(result)
            for which, gradients in enumerate((False, True)):
                worst = cases.error(result, exact, which) or 0.0
                half = case.dtype != "fp32" and (gradients or name != "ours")
                assert worst < (0.2 if half else 1e-4), f"{case.group}: {name} is off by {worst}"


def test_formulas():
    """Bytes and FLOPs by hand, at the tiny sizes B x T = 5 x 13, N x V = 6 x 37, N x H x V = 6 x 8 x 37."""
    by_hand = {
        ("gae", "fwd"): 5 * 13 * (4 + 4 + 1 + 4 + 4),
        ("rlhf_advantages", "fwd"): 5 * 13 * (3 * 4 + 1 + 4 * 4),
        ("logprobs_from_logits", "fwd"): 888,
        ("logprobs_and_entropy_from_logits", "fwdbwd"): 3 * 888,
        ("kl_from_logits", "fwd"): 2 * 888,
        ("ppo_loss", "fwdbwd"): 5 * 13 * (6 * 4 + 1 + 2 * 4),
        ("linear_logprobs", "fwdbwd"): 4 * 2 * 6 * 8 * 37,
        ("linear_cross_entropy", "fwdbwd"): 3 * 2 * 6 * 8 * 37,
    }
    seen = set()
    for op in ("advantages", "logprobs", "kl", "ppo", "linear"):
        for case in kinds(op):
            key = case.function, case.direction
            if key in by_hand and key not in seen and case.dtype == "fp32":
                bench = case.build(case)
                assert (bench.flops or bench.moved) == by_hand[key], key
                seen.add(key)
    assert seen == by_hand.keys()


def test_tiny_calls_of_every_op_are_measured(capsys):
    """Each function that is timed beside PyTorch; and one of them measured."""
    for op in dispatch.TABLE:
        found = overhead.tiny_cases(op)
        beside = {case.function for case in module(op).CASES if "eager" in case.impls and case.dtype == "fp32"}
        assert {case.function for case in found} == beside and len({case.group for case in found}) == len(found)
        assert all(case.op == op and max(case.sizes.values()) <= 64 for case in found)
    case = next(case for case in overhead.tiny_cases("ppo"))
    rows = {"ours": {"ms": 0.030}, "eager": {"ms": 0.010}}
    assert overhead.line(case, rows).split()[-3:] == ["3.00", "x", "met"]
    assert overhead.line(case, {**rows, "ours": {"ms": 0.031}}).endswith("3.10 x  missed")
    overhead.main(["ppo"])
    head, row = capsys.readouterr().out.splitlines()
    assert head.endswith("at most 3 x") and row.startswith("ppo_loss")


def toy(calls, **options):
    return Case("f", "fwd", "fp32", {"N": 4}, tuple(calls), lambda case: Bench(calls, **options), seconds=0.002)


def test_measuring_a_case():
    """Turns, errors and ratios; a peer that raises becomes its reason, ours may not."""
    one = torch.ones(3)

    def broken():
        raise OSError("no such thing")

    case = toy(
        {"ours": lambda: ((one,), ()), "eager": lambda: ((one * 1.5,), ()), "peer": broken, "gpu": Skip("needs a GPU"),
         "read": roof.read(one)},
        exact=lambda: ((one.double(),), ()), moved=12, roof="read",
    )  # fmt: skip
    rows = cases.measure(case)
    assert rows["ours"]["error"] == 0 and rows["eager"]["error"] == 0.5 and rows["ours"]["grad_error"] is None
    assert rows["peer"] == {"skipped": "raises OSError: no such thing"} and rows["gpu"] == {"skipped": "needs a GPU"}
    assert len(rows["ours"]["seconds"]) == rows["ours"]["rounds"] >= 5
    assert rows["ours"]["over_eager"] == rows["eager"]["ms"] / rows["ours"]["ms"]
    assert rows["ours"]["of_roof"] == rows["read"]["ms"] / rows["ours"]["ms"]
    with pytest.raises(OSError):
        cases.measure(toy({"ours": broken}))


def test_peak_memory_is_seen():
    _, peak = roof.peak_of(lambda: torch.ones(8 << 20).sum())
    assert peak is None or 30 < peak < 60


def test_a_worker_takes_turns():
    case = next(case for case in module("advantages").CASES if case.function == "gae").tiny()
    worker = Worker(case, "eager", {"THP_MEM_ALLOC_ENABLE": "1"})
    try:
        figures, _ = worker.first()
        assert figures["error"] < 1e-6
        assert all(seconds > 0 for seconds in worker.turn())
    finally:
        worker.close()


GROUP = {
    "op": "toy", "function": "f", "direction": "fwdbwd", "dtype": "fp32", "shape": "4", "sizes": {"N": 4}, "scale": "N",
    "goals": [asdict(g) for g in (faster("eager", 8), within("read", 2.5), memory("eager", 0.5), faster("gpu", 2))],
    "rows": {
        "ours": {"ms": 2.0, "peak_mib": 3.0, "gb_s": 7.5, "error": 1e-7, "grad_error": 2e-7},
        "verl": {"ms": 5.0, "peak_mib": 3.0}, "eager": {"ms": 18.0, "peak_mib": 4.0},
        "read": {"ms": 0.5, "peak_mib": 0.0}, "gpu": {"skipped": "needs a GPU"},
    },
}  # fmt: skip


def test_goals_are_judged():
    found = [plot.judge(GROUP, goal) for goal in GROUP["goals"]]
    assert found == [(9.0, 0.0), (4.0, pytest.approx(0.6)), (0.75, pytest.approx(0.5)), (None, "needs a GPU")]
    assert [line.partition("]: ")[2] for line in plot.goal_lines([GROUP])] == [
        "9 × eager (≥ 8): met",
        "4 × the time of read (≤ 2.5): missed: read by 60 %",
        "0.75 × the memory of eager (≤ 0.5): missed: memory of eager by 50 %",
        "? × gpu (≥ 2): missed: gpu: needs a GPU",
    ]


def test_results_file_and_what_comes_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    path, run = tmp_path / "cpu.json", {"torch": "2", "threads": 1, "commit": "c", "date": "d"}
    machine = {"cpu": "toy", "cores": 1, "isa": "base"}
    plot.merge(path, machine, run, [GROUP])
    other = {**GROUP, "op": "other", "function": "g"}
    plot.merge(path, machine, {**run, "commit": "later"}, [other])
    plot.merge(path, machine, run, [{**GROUP, "shape": "8", "sizes": {"N": 8}}])
    data = json.loads(path.read_text())
    assert [(g["op"], g["shape"]) for g in data["groups"]] == [("other", "4"), ("toy", "8")]
    assert data["runs"]["other"]["commit"] == "later"
    block = plot.page_block(path)
    assert "| `g`, forward + backward, fp32 | 4 | 2 (7.5 GB/s) | 3 | 2e-07 | 9 × eager (≥ 8), " in block
    assert "| verl 2.5 × | missed: read by 60 %, memory of eager by 50 %, gpu: needs a GPU |" in block
    assert "gpu (needs a GPU)" in block and "](figures/scale.svg)" in block
    monkeypatch.setattr(plot, "SHOWN", (("g-fwdbwd-fp32-4", "eager"), ("gone-fwd-fp32-4", "eager")))
    assert plot.readme_block(path).endswith("| `g` | 4 | 2 | 9 |  | verl 2.5 | 3 of 4 missed |\n")
    assert figures.bars(*plot.shown(data["groups"])[0]) == [("ours", 9.0), ("verl", 3.6)]
    for theme in figures.THEMES:
        figures.draw_bars(plot.shown(data["groups"]), "toy", tmp_path / f"{theme}.svg", theme)
        assert "verl 3.6 ×" in (tmp_path / f"{theme}.svg").read_text()
    figures.draw_curves(data["groups"], tmp_path / "scale.svg")
    assert "extra peak memory" in (tmp_path / "scale.svg").read_text()
    plot.merge(path, {**machine, "cpu": "another"}, run, [GROUP])
    assert [g["op"] for g in json.loads(path.read_text())["groups"]] == ["toy"]


@pytest.mark.parametrize(
    ("page", "block"),
    ((plot.README, plot.readme_block), (plot.PAGE, plot.page_block), (plot.TRAINERS, plot.trainers_block)),
)
def test_pages_show_the_results_file(page, block):
    shown = page.read_text().partition(plot.BEGIN)[2].partition(plot.END)[0]
    assert shown.lstrip("\n") == block(plot.the_file()), "run `python -m benchmarks.plot`"


def test_readme_shows_every_op():
    """A row of each, also of one that is slower than eager; one row an op, PPO's iteration, a table of TRL's steps."""
    path = plot.the_file()
    if path is None:
        pytest.skip("no results file is committed yet")
    rows = plot.shown(plot.load(path)["groups"])
    later = [name for name, _ in plot.SHOWN if name.partition("-")[0] in plot.UNMEASURED]
    ops = {case.op for name in NAMES for case in module(name).CASES if case.function not in plot.UNMEASURED}
    assert {group["op"] for group, _ in rows} == ops - {"integrations"}
    assert len(before_after.short_table(plot.load(path)["groups"])) == 6
    assert len(rows) == len(plot.SHOWN) - len(later) and len(plot.SHOWN) <= len(NAMES) + 1


def test_every_case_has_its_result_or_a_reason():
    path = plot.the_file()
    if path is None:
        pytest.skip("no results file is committed yet")
    groups = {plot.group_name(group): group for group in plot.load(path)["groups"]}
    for name in NAMES:
        for case in module(name).CASES:
            group = groups.get(case.group)
            if case.function in plot.UNMEASURED:
                assert group is None, f"{case.group} is measured: take {case.function} out of plot.UNMEASURED"
                continue
            assert group is not None, f"{path.name} lacks {case.group}: run `make bench OP={name}`"
            assert group["goals"] == [asdict(goal) for goal in case.goals], case.group
            for impl in case.impls:
                row = group["rows"][impl]
                assert row.get("skipped") or row["ms"] > 0, f"{case.group}: {impl}"
