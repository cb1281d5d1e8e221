"""pytest glue: a test for each implementation of each case, whose figures go to pytest-benchmark and the results file.

`make bench` runs it. By hand:
    pytest benchmarks                     the tables and the goals, nothing is written
    pytest benchmarks --results[=FILE]    also puts the rows into FILE, by default this machine's in benchmarks/results
    pytest benchmarks --base=REF          ours against the package as it was at a commit, turn by turn
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from benchmarks import cases, plot, roof
from benchmarks.worker import Worker


class Replay:
    """A clock that shows pytest-benchmark times measured before: implementations take turns, tests do not."""

    def __init__(self):
        self.now, self.left = 0.0, []

    def __call__(self) -> float:
        return self.now

    def call(self) -> None:
        """Stands for a call: the clock moves on by the next measured time."""
        self.now += self.left.pop(0)


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, nargs="?", const=roof.results_path(), help="JSON file that takes the rows")
    parser.addoption("--base", help="commit to compare with")
    parser.addoption("--as-command", default="", help="the command that the results file names")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "benchmark: options of pytest-benchmark")
    config.bench_rows = {}
    config.bench_load = os.getloadavg()[0]
    config.bench_failed = set()  # ops


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`row` takes each implementation of each case of the public function that the test is named after."""
    if "row" not in metafunc.fixturenames:
        return
    name = metafunc.function.__name__.removeprefix("test_")
    base = metafunc.config.getoption("base")
    params = []
    for case in metafunc.module.CASES:
        if case.function == name:
            impls = ("ours", "base") if base else case.impls
            params += [pytest.param((case, impl), id=case.row_id(impl)) for impl in impls]
    metafunc.parametrize("row", params)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for case, _ in _rows(item):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY, group=case.group))


@pytest.fixture(scope="session")
def base_package(request: pytest.FixtureRequest):
    """A folder with rlhf_kernels as of --base, built; None without --base."""
    ref = request.config.getoption("base")
    if not ref:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", ref], cwd=roof.ROOT, check=True, capture_output=True).stdout
        tree, package = Path(folder) / "tree", Path(folder) / "package"
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(tree, filter="data")
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True)
        package.mkdir()  # holds this package alone: the benchmarks are the working tree's
        (package / "rlhf_kernels").symlink_to(tree / "rlhf_kernels")
        yield package


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark, base_package):
    """measure(row): the first row of a case measures all its chosen rows, each test then shows its own."""

    def show(row: tuple[cases.Case, str]) -> None:
        case, impl = row
        measured = request.config.bench_rows.setdefault(case, {})
        if not measured:
            chosen = [other for item in request.session.items for other in _rows(item) if other[0] is case]
            names = tuple(name for _, name in chosen if name != "base")
            extra = {"base": Worker(case, "ours", package=base_package)} if base_package else {}
            try:
                measured |= cases.measure(case, names, extra)
            except BaseException as failure:
                measured[None] = {"skipped": f"the case failed: {type(failure).__name__}"}
                raise
        figures = measured.get(impl) or measured[None]
        if "skipped" in figures:
            pytest.skip(figures["skipped"])
        REPLAY.left = list(figures["seconds"])
        benchmark.extra_info.update({name: value for name, value in figures.items() if name != "seconds"})
        benchmark.pedantic(REPLAY.call, rounds=figures["rounds"])

    return show


def _rows(item: pytest.Item) -> list:
    return [item.callspec.params["row"]] if hasattr(item, "callspec") and "row" in item.callspec.params else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed:
        item.config.bench_failed.update(case.op for case, _ in _rows(item))
    return report


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    groups = plot.as_groups(config.bench_rows)
    if not groups:
        return
    terminalreporter.section("goals")
    if config.getoption("base"):
        for group in groups:
            rows = group["rows"]
            if "ms" in rows.get("base", {}):
                ratio = rows["base"]["ms"] / rows["ours"]["ms"]
                line = f"{rows['base']['ms']:.3g} -> {rows['ours']['ms']:.3g} ms, {ratio:.3g} times as fast"
            else:
                line = rows.get("base", {}).get("skipped", "not measured")
            terminalreporter.write_line(f"{plot.group_name(group)}: {config.getoption('base')} -> working tree: {line}")
        return
    for line in plot.goal_lines(groups):
        terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("results")
    if not path or session.config.getoption("base") or exitstatus not in (0, 1):
        return
    if session.config.getoption("keyword") or any("::" in argument for argument in session.config.args):
        print("\n--results wants whole files: nothing is written", file=sys.stderr)
        return
    config = session.config
    groups = [group for group in plot.as_groups(config.bench_rows) if group["op"] not in config.bench_failed]
    command = config.getoption("as_command") or f"pytest {' '.join(config.invocation_params.args)}"
    if groups:
        plot.merge(path, roof.machine(), roof.run_facts(command, config.bench_load), groups)
